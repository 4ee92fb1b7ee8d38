"""A prompt of a million tokens on one GPU: seconds and peak memory of a Llama-3.2-1B shape.

    python recipes/million.py --list                       # the cases, most important first
    python recipes/million.py --only gated-1048576         # one of them
    python recipes/million.py                              # all
    python recipes/million.py --device cpu --smoke --out /tmp/trial

Weights are random, bfloat16, made from the shape. A prompt is read in chunks through the adapter,
choice, lowering and cache inside the time, until the first token is known. The gates are those of
a card, spread over the shape's maps, which read all that their gates allow; without a card every
map has the zero-shot policy's window and columns. DMA layers are ``dynmask.convert``'s, untrained.
Beside them stands the model's own attention (SDPA, the whole prompt at once) at 65,536 to 262,144
tokens. Its time at 1,048,576 is extrapolated by the exponent between the longest two, and every
row that uses it says so. "generate" is ``dynmask generate``, a command of its own that reads the
prompt from a file under the gates without calibration and compiles while it reads. A case stands
alone; its row replaces that of an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dynmask
from benchmarks.generator import CARD, LLAMA_1B, RESULTS, TINY, Shape, kind_of, spread, wait
from benchmarks.headline import record, rows_of, write_rows
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine
from dynmask.integrations.prefill import (
    BOUNDED_CHUNK,
    CHUNK,
    cache_bytes,
    cache_for,
    read_chunks,
)
from dynmask.policies import Gated, Streaming, VerticalSlash

MILLION, QUARTER = 1_048_576, 262_144
DENSE = (65_536, 131_072, QUARTER)
WIDTH = 2_048
NEW = 32  # tokens that dynmask generate adds
REFERENCE = CARD.with_name("dynmask-reference")  # whose tokenizer reads the file
PAGES = CARD.parent.parent / "docs"
COMMAND = "python recipes/million.py"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One prompt under one policy.

    Attributes:
        variant: gated, dma, vertical_slash, streaming, dense or generate.
        tokens: of the prompt.
        chunk: read at once; 0 for the whole prompt.
    """

    variant: str
    tokens: int
    chunk: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.tokens}"


def cases(smoke: bool = False) -> list[Case]:
    """All cases, most important first."""
    million, quarter, dense = (512, 256, (64, 128, 256)) if smoke else (MILLION, QUARTER, DENSE)
    bounded, anew = (64, 128) if smoke else (BOUNDED_CHUNK, CHUNK)
    chunks = {"gated": anew, "dma": bounded, "vertical_slash": anew, "streaming": bounded}
    return [
        Case("gated", million, anew),
        *(Case("dense", tokens, 0) for tokens in reversed(dense)),
        Case("dma", million, bounded),
        Case("vertical_slash", million, anew),
        Case("streaming", million, bounded),
        *(Case(variant, quarter, chunk) for variant, chunk in chunks.items()),
        Case("generate", million, anew),
    ]


def policy_of(variant: str, shape: Shape, card: Path | None) -> tuple[Any, str]:
    """The policy of a case, and what is to be said of it."""
    if variant == "streaming":
        return Streaming(sinks=4, window=WIDTH - 4), f"sinks and window of {WIDTH} keys"
    if variant == "vertical_slash":
        return VerticalSlash(), "1,000 columns and 6,096 diagonals of each map"
    if variant == "gated" and card is None:
        return Gated(window=1024, columns=1024, least=0.0), "no card: 1,024 newest keys and columns"
    if variant == "gated":
        loaded = dynmask.MaskCard.from_pretrained(str(card))
        policy = loaded.policy()
        if not isinstance(policy, Gated) or policy.gates is None:
            raise ValueError(f"--card: expected a card of gates, received {card}; calibrate one")
        return spread(policy, shape.layers, shape.heads), f"a card's gates, {kind_of(loaded)}"
    return None, ""


def measure(case: Case, shape: Shape, card: Path | None, device: torch.device) -> Row:
    """Read a prompt once, after a short one that compiles: seconds, and what memory was for."""
    model = shape.model(device, case.tokens + 1)
    policy, note = policy_of(case.variant, shape, card)
    if case.variant == "dma":
        width = min(WIDTH, case.tokens // 8)
        dynmask.convert(model, width=width, window=min(128, width // 4), form="bounded")
        note = f"w {width}, untrained scores"
    ids = torch.randint(shape.vocabulary, (1, case.tokens), device=device)
    context: Any = nullcontext() if policy is None else dynmask.sparsify(model, policy)
    with context as run, torch.inference_mode():
        first(model, run, ids[:, : 2 * case.chunk or case.tokens], case)
        gc.collect()
        with PeakMemory(device) as peak:
            started = time.perf_counter()
            cache = first(model, run, ids, case, shown=True)
            seconds = time.perf_counter() - started
        weights = sum(x.nbytes for x in model.parameters())
        held = cache_bytes(cache)
    return {
        "case": f"{shape.name} {case.tokens:,}", "variant": case.variant, "keys": case.tokens,
        "chunk": case.chunk, "median_s": seconds, "rounds": 1, "policy": note,
        "tokens_per_s": case.tokens / seconds, "weight_bytes": weights,
        "peak_beyond_weights_bytes": peak.bytes, "cache_bytes": held,
        "rest_bytes": max(peak.bytes - (held or 0), 0), "memory": peak.method,
    }  # fmt: skip


def by_command(case: Case, shape: Shape, device: torch.device) -> Row:
    """Seconds and memory as ``dynmask generate`` tells them, of a prompt in a file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE, model_max_length=2**31)
    shape = replace(shape, vocabulary=max(shape.vocabulary, len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        shape.model(device, case.tokens + NEW + 1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(text_of(case.tokens, tokenizer), encoding="utf-8")
        command = [
            sys.executable, "-m", "dynmask", "generate", "--model", folder, "--file", str(prompt),
            "--policy", "gated", "--max-new-tokens", str(NEW), "--no-density", "--json",
            "--device", str(device), "--dtype", "bfloat16" if device.type == "cuda" else "float32",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout)
    memory, seconds = told["memory"], told["first_token_seconds"]
    return {
        "case": f"{shape.name} {case.tokens:,}", "variant": case.variant,
        "keys": told["prompt_tokens"], "chunk": told["chunk"], "median_s": seconds, "rounds": 1,
        "policy": "dynmask generate, a file, gates without calibration",
        "tokens_per_s": told["prompt_tokens"] / seconds, "weight_bytes": memory["weight_bytes"],
        "peak_beyond_weights_bytes": memory["peak_bytes"] - memory["weight_bytes"],
        "cache_bytes": memory["cache_bytes"], "rest_bytes": memory["rest_bytes"],
        "memory": memory["method"],
    }  # fmt: skip


def text_of(tokens: int, tokenizer: Any) -> str:
    """This project's pages, over and over, of about so many tokens."""
    pages = "\n".join(p.read_text(encoding="utf-8") for p in sorted(PAGES.glob("*.md")))
    ids = tokenizer(pages).input_ids
    times, left = divmod(tokens, len(ids))
    return pages * times + tokenizer.decode(ids[:left], skip_special_tokens=True)


def first(model: Any, run: Any, ids: torch.Tensor, case: Case, shown: bool = False) -> Any:
    """Read a prompt until the first token is known; the cache."""
    from tqdm.auto import tqdm
    from transformers import DynamicCache

    tokens, read = ids.shape[1], 0
    if case.variant == "dma":
        cache: Any = dynmask.BoundedCache(model)
    else:
        cache = DynamicCache(config=model.config) if run is None else cache_for(run, tokens)
    with tqdm(total=tokens, desc=case.name, unit="token", disable=not shown) as bar:
        if case.chunk:
            policy = None if run is None else run.policy
            read = read_chunks(model, ids, cache, case.chunk, bar.update, policy)
        out = model(input_ids=ids[:, read:], past_key_values=cache, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        wait(ids.device)
        bar.update(tokens - read)
    return cache


def dense_law(rows: list[Row]) -> tuple[float, Callable[[int], float]] | None:
    """The exponent between the longest two dense prompts, and seconds of a prompt by it."""
    dense = sorted((r["keys"], r["median_s"]) for r in rows if r["variant"] == "dense")
    if len(dense) < 2:
        return None
    (short, quick), (long, slow) = dense[-2:]
    exponent = math.log(slow / quick) / math.log(long / short)
    return exponent, lambda tokens: slow * (tokens / long) ** exponent


def goals(rows: list[Row], device: torch.device, out: Path) -> list[Row]:
    """Headline rows of what one device and commit has measured."""
    law = dense_law(rows)
    found = {(row["variant"], row["keys"]): row for row in rows}
    made: list[Row] = []

    def write(row: Row, goal: str, metric: str, value: float, target: float, better: str,
              note: str) -> None:  # fmt: skip
        file = out / "headline.jsonl"
        made.append(
            record(
                5, goal, metric, round(value, 4), target, better, device, note, COMMAND, row, file
            )
        )

    shape, length = LLAMA_1B.name, f"{MILLION:,}"
    asked = (("gated", 6.0), ("vertical_slash", 6.0), ("dma", 12.0))
    for variant, target in asked:
        row = found.get((variant, MILLION))
        if row is None:
            continue
        seconds = row["median_s"]
        memory = (
            f"peak beyond {row['weight_bytes'] / 1e9:.2f} GB of weights "
            f"{row['peak_beyond_weights_bytes'] / 1e9:.2f} GB, the cache "
            f"{(row['cache_bytes'] or 0) / 1e9:.2f} of it"
        )
        if law is not None:
            exponent, at = law
            write(row, f"{shape} shape, prefill of {length}, {variant} against SDPA", "speedup",
                  at(MILLION) / seconds, target, "higher",
                  f"{seconds:.1f} s; SDPA's {at(MILLION):.0f} s are extrapolated from its longest "
                  f"prompt by the measured exponent {exponent:.2f}; {row['policy']}")  # fmt: skip
        if variant != "dma":
            write(row, f"{shape} shape, prefill of {length}, {variant}", "seconds", seconds, 60.0,
                  "lower", f"{row['policy']}; {memory}")  # fmt: skip
    dma, quarter = found.get(("dma", MILLION)), found.get(("dma", QUARTER))
    if dma and quarter:
        write(dma, f"{shape} shape, DMA layers, cache at {length} over that at {QUARTER:,}",
              "bytes ratio", dma["cache_bytes"] / quarter["cache_bytes"], 1.0, "lower",
              f"{dma['cache_bytes'] / 1e6:.0f} MB, {dma['policy']}")  # fmt: skip
    return made


def show(row: Row) -> None:
    """Print what a row says."""
    sizes = (row["weight_bytes"], row["cache_bytes"] or 0, row["rest_bytes"])
    weights, cache, rest = (f"{size / 1e9:.2f}" for size in sizes)
    print(
        f"{row['case']:24s} {row['variant']:15s} {row['median_s']:9.2f} s "
        f"{row['tokens_per_s']:12,.0f} tokens/s  GB: weights {weights} + cache {cache} + "
        f"rest {rest} ({row['policy'] or 'SDPA, the whole prompt at once'})",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Measure cases; write each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--card", type=Path, help="card of gates (default: models', if there)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases by name, see --list")
    parser.add_argument("--list", action="store_true", help="names of the cases, then stop")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    known = {case.name: case for case in cases(args.smoke)}
    if args.list:
        print("\n".join(known))
        return
    wrong = sorted(set(args.only or ()) - known.keys())
    if wrong:
        parser.error(f"--only: expected some of {', '.join(known)}, received {wrong[0]}")
    device, out = torch.device(args.device), args.out / "million.jsonl"
    card = args.card or (CARD if CARD.is_dir() else None)
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    shape = TINY if args.smoke else LLAMA_1B
    for name in args.only or known:
        case = known[name]
        if case.variant == "generate":
            found = by_command(case, shape, device)
        else:
            found = measure(case, shape, card, device)
        row = {**found, **here}
        show(row)
        kept = [
            old for old in rows_of(out)
            if (old["case"], old["variant"]) != (row["case"], row["variant"])
        ]  # fmt: skip
        write_rows(out, [*kept, row])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not args.smoke:
        same = ("device", "commit")
        of_device = [r for r in rows_of(out) if all(r[key] == here[key] for key in same)]
        for row in goals(of_device, device, args.out):
            verdict = "met" if row["met"] else "MISSED"
            print(f"  {verdict}: {row['goal']}: {row['metric']} {row['value']:.3g}")


if __name__ == "__main__":
    main()
