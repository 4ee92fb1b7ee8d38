"""The gated policy, timed: attention, first token, decoding memory, a lesson of its encoder.

    python benchmarks/generator.py                             # where a GPU is
    python benchmarks/generator.py --device cpu --smoke --out /tmp/trial

The gates are those of the reference model's card, its maps repeated over the heads and its layers
over the layers of the shapes below; so the shares of windows, columns and dense maps are those
that a calibration left. Inputs and weights are random, and keys of any worth are taken (``least``
0): every map reads as much as its gate allows, which is the most that the card can cost. Every
timed call chooses, lowers and attends. Beside it stands dense attention, SDPA's. A lesson is what
one layer's encoder learns from one document.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import record, rows_of, write_rows
from benchmarks.peers import SDPA, _backend
from benchmarks.timing import Clock, summary
from dynmask import MaskCard, attention, sparsify
from dynmask.encoder_loss import encoder_loss_of
from dynmask.encoder_training import encoder_of
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine
from dynmask.gated_settings import WITH_BLOCKS, GatedSettings
from dynmask.integrations.gated_cache import GatedCache
from dynmask.policies import Gated, Layer

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CARD = ROOT / "models" / "dynmask-reference-gated"
HEADS, GROUPS, DIM = 32, 8, 128
DECODED = 32  # tokens of the decode phase
LESSON = 65_536  # tokens of the encoder's lesson
PARTS = "attention", "first", "short", "batch", "lessons"
DENSE_UP_TO = 16_384  # where decoding drops nothing: shorter inputs gain nothing by a choice

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model of transformers with random weights."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    dim: int
    vocabulary: int = 128_256

    def model(self, device: torch.device, positions: int) -> Any:
        """The model in bfloat16 (float32 on a CPU)."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.groups, head_dim=self.dim, vocab_size=self.vocabulary,
            max_position_embeddings=positions, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config)
        return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64)
LLAMA_3B = Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128)
TINY = Shape("tiny", 64, 128, 2, 4, 2, 16, 512)
ATTENTION = (32_768, 131_072)
FIRST = (131_072,)
BATCH = 4
SHORT = (4_096, 8_192, 16_384)


def kind_of(card: MaskCard) -> str:
    """What a row says of a card of gates."""
    blocks = card.tensors.get("blocks")  # older cards have none
    some = blocks is not None and bool(blocks.any())
    kinds = "columns and blocks" if some else "columns alone"
    return f"max_kl {card.header['settings']['max_kl']:g}, {kinds}"


def spread(policy: Gated, layers: int, heads: int) -> Gated:
    """The card's policy for a model of another shape: each map for several neighbouring heads."""
    gates = policy.gates
    assert gates is not None
    if policy.scored:
        raise ValueError(
            "card: expected one of columns and blocks, received one whose maps keep by score; "
            "score heads are those of one model"
        )
    of_layer = torch.arange(layers) * gates.window.shape[0] // layers
    of_head = torch.arange(heads) * gates.window.shape[1] // heads

    def wide(table: Tensor) -> Tensor:
        return table[of_layer][:, of_head].clone()

    spread_gates = type(gates)(**{f.name: wide(getattr(gates, f.name)) for f in fields(gates)})
    promise = None if policy.promise is None else wide(policy.promise)
    # attention of random inputs keeps no promise: the guard looks, and lets everything pass
    guard = None if policy.guard is None else 1.0
    return replace(policy, gates=spread_gates, promise=promise, guard=guard, least=0.0, card=None)


def attend(policy: Gated, keys: int, device: torch.device, rounds: int) -> list[Row]:
    """Attention calls of the card's layers, and cuDNN's: a row each, seconds of a layer."""
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, n, keys, DIM, generator=g, device=device, dtype=dtype)
        for n in (HEADS, GROUPS, GROUPS)
    )
    assert policy.gates is not None
    layers = policy.gates.window.shape[0]
    wide = spread(policy, layers, HEADS)

    def ours(index: int) -> Tensor:
        return attention(query, key, value, wide(query, key, value, Layer(index)))

    def dense() -> Tensor:
        with _backend("CUDNN_ATTENTION", device):
            return SDPA(query, key, value, is_causal=True, enable_gqa=True)

    clock = Clock(device)
    runs: dict[str, Callable[[], Any]] = {str(i): lambda i=i: ours(i) for i in range(layers)}
    runs["cudnn"] = dense
    for run in runs.values():
        run()
    taken = clock.interleave(runs, rounds)
    case = f"attention {keys:,}"
    by_layer = [statistics.median(taken[str(i)]) for i in range(layers)]
    kept = [float(wide(query, key, value, Layer(i)).density().mean()) for i in range(layers)]
    return [
        {"case": case, "variant": "gated", "keys": keys, "median_s": statistics.mean(by_layer),
         "by_layer_s": by_layer, "rounds": rounds, "density": statistics.mean(kept)},
        {"case": case, "variant": "cudnn", "keys": keys, **summary(taken["cudnn"])},
    ]  # fmt: skip


def lessons(keys: int, device: torch.device, rounds: int) -> list[Row]:
    """One lesson of a layer's encoder, by either teacher: seconds, and the peak beside its inputs.

    The lesson draws blocks of the default settings; a teacher's maps are made a tile at a time.
    """
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, n, keys, DIM, generator=g, device=device, dtype=dtype)
        for n in (HEADS, GROUPS, GROUPS)
    )
    settings, rows = GatedSettings(budgets=WITH_BLOCKS, encoder=True), []
    about = {"heads": HEADS, "kv_heads": GROUPS, "head_dim": DIM}
    for teacher in ("mass", "effect"):
        encoder = encoder_of(settings, about).to(device)
        taken, highest = [], 0
        for turn in range(rounds + 1):
            with PeakMemory(device) as peak:
                wait(device)
                started = time.perf_counter()
                encoder_loss_of(
                    encoder, query, key, value, query_blocks=settings.lessons, teacher=teacher
                ).backward()
                wait(device)
            if turn:  # the first compiles
                taken.append(time.perf_counter() - started)
                highest = max(highest, peak.bytes)
        rows.append({"case": f"encoder lesson {keys:,}", "variant": teacher, "keys": keys,
                     "peak_bytes": highest, **summary(taken)})  # fmt: skip
    return rows


def model_rows(
    shape: Shape, policy: Gated, lengths: tuple[int, ...], device: torch.device, rounds: int,
    decode: bool = False, batch: int = 1,
) -> list[Row]:  # fmt: skip
    """Time to the first token of both, and with ``decode`` the peak of decoding from there."""
    model = shape.model(device, max(lengths) + DECODED)
    chosen = {"decode": "keep"} if decode else {"dense_up_to": DENSE_UP_TO}
    spread_policy = replace(spread(policy, shape.layers, shape.heads), **chosen)
    rows = []
    for keys in lengths:
        ids = torch.randint(shape.vocabulary, (batch, keys), device=device)
        case = f"{shape.name} {keys:,}" + (f" x {batch}" if batch > 1 else "")
        policies = {"sdpa": None, "gated": spread_policy}
        found: dict[str, list[Row]] = {name: [] for name in policies}
        for turn in range(rounds + 1):
            for name in sorted(policies, reverse=bool(turn % 2)):  # neither is always the second
                gc.collect()
                row = prefill(model, ids, policies[name], decode)
                if turn:  # the first compiles
                    found[name].append(row)
        for name, some in found.items():
            row = {"case": case, "variant": name, "keys": keys, "batch": batch}
            row |= {key: value for key, value in some[-1].items() if key != "first_s"}
            rows.append({**row, **summary([one["first_s"] for one in some])})
            show(rows[-1])
    return rows


@torch.no_grad()
def prefill(model: Any, ids: Tensor, policy: Gated | None, decode: bool) -> Row:
    """Seconds to the first token; what the cache holds and how far decoding rises above weights."""
    from contextlib import nullcontext

    from transformers import DynamicCache

    device = ids.device
    weights = memory(device)
    context: Any = nullcontext() if policy is None else sparsify(model, policy)
    with context as run:
        model(input_ids=ids[:, :64], use_cache=False)  # what a server does once, for all prompts
        bounded = policy is not None and decode
        cache: Any = GatedCache(run) if bounded else DynamicCache(config=model.config)
        with PeakMemory(device) as peak:
            wait(device)
            started = time.perf_counter()
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            token = logits.argmax(-1)
            token.tolist()
            seconds = time.perf_counter() - started
            del logits
        row: Row = {"first_s": seconds, "prefill_peak_bytes": peak.bytes}
        if decode:
            held = memory(device) - weights
            with PeakMemory(device) as peak:
                for _ in range(DECODED):
                    out = model(input_ids=token, past_key_values=cache)
                    token = out.logits.argmax(-1)
                    del out
            row |= {"held_bytes": held, "decode_peak_bytes": held + peak.bytes}
    return row


def memory(device: torch.device) -> int:
    """Bytes that PyTorch's allocator has handed out; 0 without a GPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def wait(device: torch.device) -> None:
    """Until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(row: Row) -> None:
    """Print what a row says."""
    more = "".join(
        f"  {name} {row[key] * scale:,.1f}"
        for key, name, scale in (
            ("density", "density %", 100), ("held_bytes", "held MB", 1e-6),
            ("decode_peak_bytes", "decode MB", 1e-6), ("prefill_peak_bytes", "prefill MB", 1e-6),
            ("peak_bytes", "peak MB", 1e-6),
        )
        if key in row
    )  # fmt: skip
    print(
        f"{row['case']:24s} {row['variant']:8s} {row['median_s'] * 1e3:10.2f} ms{more}", flush=True
    )


def goals(rows: list[Row], device: torch.device) -> None:
    """The numbers that were asked for."""
    by = {(row["case"], row["variant"]): row for row in rows}

    def pair(case: str, ours: str, theirs: str) -> tuple[Row, Row] | None:
        both = by.get((case, ours)), by.get((case, theirs))
        return both if all(both) else None  # type: ignore[return-value]

    def write(
        goal: str, metric: str, value: float, target: float, better: str, note: str, issue: int = 4
    ) -> None:
        record(issue=issue, goal=goal, metric=metric, value=round(value, 4), target=target,
               better=better, device=device, note=note, origin=rows[0],
               command="python benchmarks/generator.py")  # fmt: skip

    if both := pair("attention 131,072", "gated", "cudnn"):
        ours, dense = both
        write("gated attention at 131,072, choice and lowering included, against cuDNN",
              "speedup", dense["median_s"] / ours["median_s"], 8.0, "higher",
              f"ours {ours['median_s'] * 1e3:.2f} ms, cuDNN {dense['median_s'] * 1e3:.1f} ms, the "
              f"card's maps read {ours['density']:.2%} of the pairs")  # fmt: skip
    case = f"{LLAMA_1B.name} {FIRST[0]:,}"
    if both := pair(case, "gated", "sdpa"):
        ours, dense = both
        write(f"{LLAMA_1B.name} shape, first token at {FIRST[0]:,}, gated against SDPA",
              "share of the time saved", 1 - ours["median_s"] / dense["median_s"], 0.6, "higher",
              f"{ours['median_s']:.2f} s instead of {dense['median_s']:.2f} s")  # fmt: skip
        write(f"{LLAMA_1B.name} shape, decoding at {FIRST[0]:,}, peak beyond the weights",
              "share of the memory saved",
              1 - ours["decode_peak_bytes"] / dense["decode_peak_bytes"], 0.5, "higher",
              f"{ours['decode_peak_bytes'] / 1e6:,.0f} MB instead of "
              f"{dense['decode_peak_bytes'] / 1e6:,.0f} MB; decode=keep")  # fmt: skip
    if both := pair(f"{case} x {BATCH}", "gated", "sdpa"):
        ours, dense = both
        write(f"{LLAMA_1B.name} shape, decoding at {FIRST[0]:,}, batch {BATCH}, peak beyond the "
              "weights", "share of the memory saved",
              1 - ours["decode_peak_bytes"] / dense["decode_peak_bytes"], 0.5, "higher",
              f"{ours['decode_peak_bytes'] / 1e6:,.0f} MB instead of "
              f"{dense['decode_peak_bytes'] / 1e6:,.0f} MB; decode=keep", issue=5)  # fmt: skip
    ratios = {}
    for keys in SHORT:
        if both := pair(f"{LLAMA_3B.name} {keys:,}", "gated", "sdpa"):
            ratios[keys] = both[0]["median_s"] / both[1]["median_s"]
    if ratios:
        write(f"{LLAMA_3B.name} shape at 4,096 to 16,384, gated over SDPA, the slowest",
              "time ratio", max(ratios.values()), 1.0, "lower",
              ", ".join(f"{n:,}: {r:.3f}" for n, r in ratios.items()))  # fmt: skip


def main() -> None:
    """Time, write rows and goals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--card", type=Path, default=CARD)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot tell")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    device, out = torch.device(args.device), Path(args.out) / "generator.jsonl"
    card = MaskCard.from_pretrained(args.card)
    policy = card.policy()
    if not isinstance(policy, Gated) or policy.gates is None:
        parser.error(f"--card: expected a card of gates, received {args.card}")
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    here["card"] = f"{kind_of(card)}, {'no guard' if policy.guard is None else 'guard on'}"
    rows: list[Row] = []
    small = args.smoke
    parts: dict[str, Callable[[], list[Row]]] = {
        "first": lambda: model_rows(
            TINY if small else LLAMA_1B, policy, (256,) if small else FIRST, device, 2, True
        ),
        "short": lambda: model_rows(
            TINY if small else LLAMA_3B, policy, (128,) if small else SHORT, device, 10
        ),
        "batch": lambda: model_rows(
            TINY if small else LLAMA_1B, policy, (256,) if small else FIRST, device, 1, True, BATCH
        ),
        "attention": lambda: [
            row for n in ((256,) if small else ATTENTION)
            for row in attend(policy, n, device, 2 if small else 5)
        ],
        "lessons": lambda: lessons(256 if small else LESSON, device, 1 if small else 3),
    }  # fmt: skip
    for name, part in parts.items():
        if args.only and name not in args.only:
            continue
        found = [{**row, **here} for row in part()]
        if name in ("attention", "lessons"):
            for row in found:
                show(row)
        rows += found
        new = {(row["case"], row["variant"]) for row in rows}
        kept = [row for row in rows_of(out) if (row["case"], row["variant"]) not in new]
        write_rows(out, [*kept, *rows])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if out.parent == RESULTS:
        goals(rows, device)


if __name__ == "__main__":
    main()
