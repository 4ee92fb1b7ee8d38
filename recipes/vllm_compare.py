"""vLLM under dynmask against vLLM's own attention: first token and tokens per second.

    python recipes/vllm_compare.py --list                  # the cases, most important first
    python recipes/vllm_compare.py                         # all, on the GPU
    python recipes/vllm_compare.py --only gated flash      # some
    python recipes/vllm_compare.py --device cpu --smoke --out /tmp/trial

The shape of Llama-3.2-1B with random weights, bfloat16, one prompt at a time, no prefix cache. An
engine is a process of its own and reads prompts of 1,024, 32,768 and 131,072 random tokens, each
once to warm up and then a few times; the median counts. "First token" is when the first one of an
answer comes back; "tokens per second" counts those after it. ``flash`` is vLLM as it comes, with
FlashAttention; ``flash-whole`` the same without chunked prefill; ``gated`` the gates of the shipped
card, spread over the shape's maps, which read all that their gates allow (random attention gives no
key much, so the least worth is 0), prompts of up to 16,384 tokens whole, as ``dynmask serve`` does.
It chooses for prompts alone: decoded tokens read every key, in CUDA graphs; ``gated-select``
chooses for them too. ``streaming`` is sinks and a window of 4,096 keys, for both.
Rows are written as soon as they are known; a case that fails says why and leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.generator import CARD, LLAMA_1B, RESULTS, Shape, kind_of
from benchmarks.headline import record, rows_of, write_rows
from dynmask import MaskCard
from dynmask.evals.provenance import machine

ROOT = Path(__file__).parent.parent
TINY = Shape("tiny", 128, 256, 2, 4, 2, 32, 512)
LENGTHS, SMOKE_LENGTHS = (1_024, 32_768, 131_072), (64, 256)
NEW, SMOKE_NEW = 128, 8
ROUNDS, SMOKE_ROUNDS = 3, 1
SECONDS_OF_A_CASE = 2_400
DENSE_UP_TO, SMOKE_DENSE_UP_TO = 16_384, 128
MARK = "row: "
"""How a line of an engine's process begins that is meant for us."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        name: of the case, and the variant of its rows.
        policy: its text form, with CARD for the card and SHORT for the tokens of what is read
            whole; None for vLLM's own attention.
        whole: whether prompts are read in one piece.
    """

    name: str
    policy: str | None
    whole: bool


CASES = {
    case.name: case
    for case in (
        Case("gated", "gated:CARD,dense_up_to=SHORT", True),
        Case("flash", None, False),
        Case("flash-whole", None, True),
        Case("streaming", "streaming:sinks=64,window=4032", False),
        Case("gated-select", "gated:CARD,dense_up_to=SHORT,decode=select", True),
    )
}


def main(argv: list[str] | None = None) -> None:
    """Measure cases; write each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--card", type=Path, default=CARD, help="card of gates (models')")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, help="cases by name")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help="of the prompts")
    parser.add_argument("--rounds", type=int, help=f"measurements of each ({ROUNDS})")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument(
        "--limit", type=int, default=SECONDS_OF_A_CASE, metavar="SECONDS",
        help=f"a case is stopped after so long ({SECONDS_OF_A_CASE})",
    )  # fmt: skip
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--list", action="store_true", help="names of the cases, then stop")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--engine", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.engine:
        engine(json.loads(Path(args.engine).read_text(encoding="utf-8")))
        return
    for name, numbers in (
        ("--lengths", args.lengths), ("--rounds", [args.rounds]), ("--limit", [args.limit]),
    ):  # fmt: skip
        if any(number is not None and number < 1 for number in numbers or ()):
            parser.error(f"{name}: expected at least 1, received {min(numbers)}")
    if MaskCard.from_pretrained(args.card).header["policy"] != "gated":
        parser.error(f"--card: expected a card of gates, received {args.card}")
    if args.list:
        print("\n".join(CASES))
        return
    require_vllm("recipes/vllm_compare.py")
    device, out = torch.device(args.device), args.out / "vllm.jsonl"
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    here["card"] = kind_of(MaskCard.from_pretrained(args.card))
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if args.smoke else LLAMA_1B
        lengths = args.lengths or (SMOKE_LENGTHS if args.smoke else LENGTHS)
        model = write_model(Path(folder) / "model", shape, max(lengths) + NEW + 64)
        card = write_card(Path(folder) / "card", args.card, shape)
        asked = {
            "model": str(model),
            "lengths": lengths,
            "short": SMOKE_DENSE_UP_TO if args.smoke else DENSE_UP_TO,
            "new": SMOKE_NEW if args.smoke else NEW,
            "rounds": args.rounds or (SMOKE_ROUNDS if args.smoke else ROUNDS),
            "vocabulary": shape.vocabulary,
            "eager": args.eager or args.smoke,
            "cpu": device.type == "cpu",
            "memory": args.memory,
            "limit": args.limit,
        }
        for name in args.only or CASES:
            if not run(CASES[name], asked, card, Path(folder), shape, here, out):
                failed.append(name)
    found = [row for row in rows_of(out) if row["commit"] == here["commit"]]
    compare(found)
    if not args.smoke:
        goals(found, device, args.out / "headline.jsonl")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def require_vllm(recipe: str) -> None:
    """Leave with a message where vLLM is not installed."""
    if find_spec("vllm") is None:
        sys.exit(
            f"{recipe}: expected vLLM in this Python's environment, received none; remedy: "
            "pip install 'dynmask[vllm]' (a build for CPUs: CONTRIBUTING.md)"
        )


def write_model(folder: Path, shape: Shape, positions: int) -> Path:
    """The shape's configuration; vLLM fills in random weights (``load_format="dummy"``)."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, head_dim=shape.dim,
        vocab_size=shape.vocabulary, max_position_embeddings=positions, tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_card(folder: Path, source: Path, shape: Shape) -> Path:
    """A card for the shape: each map of another card for several neighbouring ones."""
    card = MaskCard.from_pretrained(source)
    layers, heads = card.header["model"]["layers"], card.header["model"]["heads"]
    of_layer = torch.arange(shape.layers) * layers // shape.layers
    of_head = torch.arange(shape.heads) * heads // shape.heads
    tensors = {name: x[of_layer][:, of_head].clone() for name, x in card.tensors.items()}
    figures = [[0.0] * shape.heads] * shape.layers
    settings = card.header["settings"] | {"least": 0.0}
    model = card.header["model"] | {
        "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.groups,
        "head_dim": shape.dim,
    }  # fmt: skip
    # promising nothing: the guard looks, and lets all maps of random attention pass
    nothing = dict.fromkeys(("density", "kept_mass", "least_mass"), figures)
    header = card.header | {"settings": settings, "model": model} | nothing
    MaskCard(header, tensors).save_pretrained(folder)
    return folder


def run(
    case: Case, asked: Row, card: Path, folder: Path, shape: Shape, here: Row, out: Path
) -> bool:
    """Start a case's engine and write what it finds; whether it came to its end."""
    policy = case.policy and case.policy.replace("SHORT", str(asked["short"]))
    question = folder / f"{case.name}.json"
    question.write_text(json.dumps(asked | {"policy": policy, "whole": case.whole}))
    own = None if policy is None else policy.replace("CARD", str(card))
    environment = environment_of(own, folder, asked["cpu"])
    command = [sys.executable, __file__, "--engine", str(question)]
    print(f"{case.name}: starting", flush=True)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail: list[str] = []
    late = threading.Timer(asked["limit"], process.kill)  # an engine that hangs says nothing
    late.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                row = {"case": shape.name, "variant": case.name, "policy": policy}
                keep({**row, **json.loads(line.removeprefix(MARK)), **here}, out)
            tail = [*tail[-80:], line]
        code = process.wait()
    finally:
        late.cancel()
        if process.poll() is None:  # we are interrupted ourselves
            process.kill()
    if code:
        said = "".join(tail)
        print(f"{case.name} FAILED ({code}; limit {asked['limit']} s):\n{said}", flush=True)
    return code == 0


def environment_of(policy: str | None, folder: Path, cpu: bool) -> dict[str, str]:
    """The environment of an engine's process: this one's, the plugin of this checkout, a policy."""
    environment = dict(os.environ)
    paths = [str(ROOT / "src"), str(ROOT), str(write_entry_points(folder))]
    if environment.get("PYTHONPATH"):
        paths.append(environment["PYTHONPATH"])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # the engine runs in its own process and nothing is fetched: no network is needed
    environment.setdefault("VLLM_HOST_IP", "127.0.0.1")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    for name in ("DYNMASK_CARD", "DYNMASK_POLICY", "DYNMASK_PHASE"):
        environment.pop(name, None)
    if policy is not None:
        environment["DYNMASK_POLICY"] = policy
    if cpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return environment


def write_entry_points(folder: Path) -> Path:
    """Where vLLM finds the plugin of this checkout, installed or not."""
    made = folder / "plugins" / "dynmask_recipe-0.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: dynmask-recipe\nVersion: 0\n")
    points = "[vllm.general_plugins]\ndynmask = dynmask.integrations.vllm:register\n"
    (made / "entry_points.txt").write_text(points)
    return made.parent


def keep(row: Row, out: Path) -> None:
    """Write a row in place of an earlier one, and print it."""
    same = ("case", "variant", "keys")
    old = [r for r in rows_of(out) if [r[k] for k in same] != [row[k] for k in same]]
    write_rows(out, [*old, row])
    print(
        f"{row['case']} {row['variant']:12s} {row['keys']:>8,} tokens: first "
        f"{row['first_s'] * 1e3:9.1f} ms, then {row['tokens_per_s']:8.1f} tokens/s",
        flush=True,
    )


def engine(asked: Row) -> None:
    """Measure in this process, which is a case's own; rows go to standard output."""
    begun = time.perf_counter()
    from importlib.metadata import PackageNotFoundError, version

    from vllm import LLM

    try:
        found = version("vllm")
    except PackageNotFoundError:
        import vllm

        found = vllm.__version__
    lengths, new = asked["lengths"], asked["new"]
    longest = max(lengths) + new + 8
    own: Row = {"enable_chunked_prefill": not asked["whole"]}
    if asked["whole"]:
        own["max_num_batched_tokens"] = longest
    if asked["policy"] is not None and not asked["cpu"]:
        own["attention_backend"] = "CUSTOM"
    elif not asked["cpu"]:
        own["attention_backend"] = "FLASH_ATTN"
    if not asked["cpu"]:
        own["gpu_memory_utilization"] = asked["memory"]
    llm = LLM(
        model=asked["model"], load_format="dummy", skip_tokenizer_init=True, max_model_len=longest,
        dtype="float32" if asked["cpu"] else "bfloat16", enable_prefix_caching=False,
        max_num_seqs=8, enforce_eager=asked["eager"], seed=0, **own,
    )  # fmt: skip

    ready = time.perf_counter() - begun
    draw = torch.Generator().manual_seed(0)
    for keys in lengths:
        prompt = torch.randint(5, asked["vocabulary"], (keys,), generator=draw).tolist()
        answer(llm.llm_engine, prompt, new)  # compiles, and sizes what is kept between calls
        timed = [answer(llm.llm_engine, prompt, new) for _ in range(asked["rounds"])]
        firsts, wholes = ([one[i] for one in timed] for i in (0, 1))
        rates = [(new - 1) / max(whole - first, 1e-9) for first, whole in timed]
        row = {
            "keys": keys, "new_tokens": new, "rounds": asked["rounds"],
            "first_s": statistics.median(firsts), "first_s_all": firsts,
            "whole_s": statistics.median(wholes), "tokens_per_s": statistics.median(rates),
            "tokens_per_s_all": rates, "whole": asked["whole"], "eager": asked["eager"],
            "ready_s": ready, "vllm": found,
        }  # fmt: skip
        print(f"{MARK}{json.dumps(row)}", flush=True)


def answer(engine: Any, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds until the first token of one greedy answer, and until the last."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, min_tokens=tokens, detokenize=False, ignore_eos=True
    )
    first, made = None, 0
    started = time.perf_counter()
    engine.add_request("0", {"prompt_token_ids": prompt}, greedy)
    while engine.has_unfinished_requests():
        for found in engine.step():
            made = len(found.outputs[0].token_ids)
            if first is None and made:
                first = time.perf_counter() - started
    whole = time.perf_counter() - started
    if first is None or made != tokens:
        raise RuntimeError(f"expected an answer of {tokens} tokens, received {made}")
    return first, whole


def compare(rows: list[Row]) -> None:
    """Print how many times as fast each policy is as vLLM's own attention."""
    own = {r["keys"]: r for r in rows if r["variant"] == "flash"}
    for row in rows:
        base = own.get(row["keys"])
        if base is None or row["policy"] is None:
            continue
        sooner, faster = (
            base["first_s"] / row["first_s"],
            row["tokens_per_s"] / base["tokens_per_s"],
        )
        print(
            f"  {row['variant']} at {row['keys']:,}: first token {sooner:.2f}x as soon, "
            f"tokens per second {faster:.2f}x"
        )


def goals(rows: list[Row], device: torch.device, file: Path) -> None:
    """What was asked for of the gates beside vLLM's own attention, as rows of a headline file."""
    by = {(row["variant"], row["keys"]): row for row in rows}
    short, long = LENGTHS[0], LENGTHS[-1]

    def write(
        keys: int, metric: str, value: float, target: float, better: str, note: str, ours: Row
    ) -> None:
        record(
            5, f"vLLM, {LLAMA_1B.name} shape, prompts of {keys:,} tokens, gated against its own "
            "attention", metric, round(value, 4), target, better, device, note,
            "python recipes/vllm_compare.py", ours, file,
        )  # fmt: skip

    def both(keys: int) -> tuple[Row, Row] | None:
        pair = by.get(("gated", keys)), by.get(("flash", keys))
        return pair if all(pair) else None  # type: ignore[return-value]

    if pair := both(long):
        ours, own = pair
        write(long, "share of the time to the first token saved",
              1 - ours["first_s"] / own["first_s"], 0.45, "higher",
              f"{ours['first_s'] * 1e3:.0f} ms instead of {own['first_s'] * 1e3:.0f} ms; vLLM "
              f"{ours['vllm']}, choosing for prompts alone", ours)  # fmt: skip
    if pair := both(short):
        ours, own = pair
        write(short, "time to the first token, ratio", ours["first_s"] / own["first_s"], 1.05,
              "lower", f"{ours['first_s'] * 1e3:.1f} ms, its own {own['first_s'] * 1e3:.1f} ms",
              ours)  # fmt: skip
        rates = (", ".join(f"{x:.0f}" for x in row["tokens_per_s_all"]) for row in (ours, own))
        write(short, "tokens per second, ratio", ours["tokens_per_s"] / own["tokens_per_s"], 0.95,
              "higher", "by round: {}; its own: {}".format(*rates), ours)  # fmt: skip


if __name__ == "__main__":
    main()
