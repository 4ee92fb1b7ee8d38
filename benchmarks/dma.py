"""The trainable layer and the bounded cache, timed: a training step, and a token at any position.

A training step is selection of the exact running top w from scores, attention with the scores as
bias, and every gradient; full attention's is SDPA forward and backward by cuDNN and by
FlashAttention-2. A decoded token goes through ``dynmask.cache.KeyStore``. A prompt of a million
tokens is read by the reference model with DMA layers, 8,192 at a time, through
``dynmask.BoundedCache``: its peak memory is compared with that of the first 8,192. Before anything
is timed the gradients are compared with the dense oracle's at a smaller length.

    python benchmarks/dma.py                             # where a GPU is
    python benchmarks/dma.py --device cpu --smoke --out /tmp/trial
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import record, rows_of, write_rows
from benchmarks.peers import SDPA, _backend
from benchmarks.timing import Clock, summary
from dynmask import LifetimeMask, attention
from dynmask.cache import KeyStore
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine
from dynmask.retention import Retention

RESULTS = Path(__file__).parent / "results"
MODEL = Path(__file__).parent.parent / "models" / "dynmask-reference"
HEADS, GROUPS, DIM = 32, 8, 128
TOLERANCE = 2e-2
"""Relative error in the Frobenius norm that a bfloat16 gradient may have."""

SHOWN = (
    ("median_s", "ms", 1e3),
    ("device_s", "ms on the device", 1e3),
    ("peak_bytes", "MB", 1e-6),
    ("cache_bytes", "MB", 1e-6),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A training step: its length, width and the speedup asked for."""

    keys: int
    width: int
    target: float
    rounds: int

    @property
    def name(self) -> str:
        return f"train {self.keys:,} / w {self.width}"


STEPS = (Step(8192, 1024, 0.0, 10), Step(32768, 1024, 6.0, 8), Step(131072, 2048, 14.0, 4))
POSITIONS = (8_192, 65_536, 262_144, 1_048_576)
WIDTH, CHUNK, TOKENS = 2_048, 8_192, 200
PROMPT = "reference model with DMA layers"


@dataclass
class Trial:
    """Tensors of one step."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    slope: Tensor
    width: int

    @classmethod
    def of(cls, step: Step, device: torch.device, seed: int = 0) -> Trial:
        g = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, *more: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            shape = (1, heads, step.keys, *more)
            return torch.randn(shape, generator=g, device=device, dtype=dtype)

        query, key, value = (normal(n, DIM).requires_grad_() for n in (HEADS, GROUPS, GROUPS))
        scores = normal(GROUPS, dtype=torch.float32).requires_grad_()
        return cls(query, key, value, scores, normal(HEADS, DIM), step.width)

    def ours(self, impl: str = "auto") -> tuple[Tensor, ...]:
        """Selection, forward and every gradient."""
        mask = LifetimeMask.top_w(self.scores.detach(), self.width, check=False)
        out = attention(self.query, self.key, self.value, mask, bias=self.scores, impl=impl)
        inputs = (self.query, self.key, self.value, self.scores)
        return torch.autograd.grad(out, inputs, self.slope)

    def forward(self) -> Tensor:
        """Selection and forward, ready for a backward."""
        mask = LifetimeMask.top_w(self.scores.detach(), self.width, check=False)
        return attention(self.query, self.key, self.value, mask, bias=self.scores)

    def dense(self, backend: str, grouped: bool) -> tuple[Tensor, ...]:
        """Full attention and its gradients by one of SDPA's backends."""
        inputs = (self.query, self.key, self.value)
        key, value = self.key, self.value
        if not grouped:
            key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
        with _backend(backend, key.device):
            out = SDPA(self.query, key, value, is_causal=True, enable_gqa=grouped)
            return torch.autograd.grad(out, inputs, self.slope)


def error_of(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check(device: torch.device, keys: int = 2048) -> float:
    """The largest relative error of a gradient against the dense oracle's."""
    trial = Trial.of(Step(keys, keys // 8, 0.0, 1), device, seed=1)
    pairs = zip(trial.ours(), trial.ours("reference"), strict=True)
    return max(error_of(a, b) for a, b in pairs)


def fastest_form(trial: Trial, backend: str, clock: Clock) -> bool | str:
    """Whether grouped heads are faster than repeated ones, or why neither runs."""
    seconds, error = {}, ""
    for grouped in (True, False):
        try:
            trial.dense(backend, grouped)
            seconds[grouped] = clock.time(lambda g=grouped: trial.dense(backend, g))
        except RuntimeError as e:
            error = " ".join(str(e).split())[:200]
    return min(seconds, key=lambda grouped: seconds[grouped]) if seconds else error


def train(step: Step, clock: Clock, device: torch.device) -> list[Row]:
    """Rows of one step: ours, cuDNN's and FlashAttention-2's."""
    trial = Trial.of(step, device)
    short = Trial.of(Step(min(step.keys, 8192), 1, 0.0, 1), device)
    trial.ours()
    runs: dict[str, Callable[[], Any]] = {"dynmask": trial.ours, "dynmask forward": trial.forward}
    rows, forms = [], {}
    for name, backend in (("cudnn", "CUDNN_ATTENTION"), ("fa2", "FLASH_ATTENTION")):
        form = fastest_form(short, backend, clock)
        if isinstance(form, str):
            rows.append({"case": step.name, "variant": name, "status": form})
            continue
        forms[name] = "grouped heads" if form else "heads repeated inside the time"
        runs[name] = lambda b=backend, g=form: trial.dense(b, g)
        runs[name]()
    del short
    memory = {}
    for name, run in runs.items():
        with PeakMemory(device) as peak:
            run()
        memory[name] = peak.bytes
    for name, taken in clock.interleave(runs, step.rounds).items():
        rows.append(
            {
                "case": step.name,
                "keys": step.keys,
                "width": step.width,
                "variant": name,
                **summary(taken),
                "peak_bytes": memory[name],
                **({"form": forms[name]} if name in forms else {}),
            }
        )
    return rows


def seconds_of_a_token(step: Callable[[], Any], device: torch.device, tokens: int) -> Row:
    """Median time of a decoded token, the host's part inside."""
    for _ in range(20):
        step()
    taken = []
    for _ in range(tokens):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return summary(taken)


def captured(step: Callable[[], Any], clock: Clock, rounds: int = 20) -> float | None:
    """Device time of a token, as a replayed CUDA graph; None where there is no GPU."""
    if not clock.gpu:
        return None
    replay = clock.graph({"token": step})["token"]
    return statistics.median(clock.time(replay, calls=20) for _ in range(rounds))


def decode(
    positions: tuple[int, ...], width: int, chunk: int, tokens: int, clock: Clock,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """A token at each position: through the bounded cache, and by SDPA over all keys."""
    g = torch.Generator(device).manual_seed(2)

    def normal(heads: int, n: int, *more: int) -> Tensor:
        return torch.randn(1, heads, n, *more, generator=g, device=device, dtype=torch.bfloat16)

    store = KeyStore(Retention(width, window=min(128, width // 4), sinks=4))
    size = 2 * GROUPS * DIM * 2
    rows = []
    new = (normal(GROUPS, 1, DIM), normal(GROUPS, 1, DIM), normal(GROUPS, 1).float())
    query = normal(HEADS, 1, DIM)
    with torch.no_grad():
        for position in positions:
            with PeakMemory(device) as peak:
                while store.batch == 0 or store.seen[0] < position:
                    n = min(chunk, position - (store.seen[0] if store.batch else 0))
                    scores = normal(GROUPS, n).float()
                    store.extend(normal(GROUPS, n, DIM), normal(GROUPS, n, DIM), scores)

            def step() -> Tensor:
                return store.attend(query, *new)

            row = seconds_of_a_token(step, device, tokens)
            held = store.nbytes
            row["device_s"] = captured(step, clock)
            # the graph's replays moved the device's counts alone: start the next stretch anew
            store.seen = [int(store._tensors["next"].max())]
            rows.append(
                {
                    "case": f"decode at {position:,}",
                    "variant": "bounded cache",
                    "position": position,
                    "width": width,
                    **row,
                    "cache_bytes": held,
                    "full_bytes": position * size,
                    "prefill_peak_bytes": peak.bytes,
                }
            )
        key, value = normal(GROUPS, positions[-1], DIM), normal(GROUPS, positions[-1], DIM)
        for position in positions:
            k, v = key[:, :, :position], value[:, :, :position]

            def dense(k: Tensor = k, v: Tensor = v) -> Tensor:
                return SDPA(query, k, v, enable_gqa=True)

            row = seconds_of_a_token(dense, device, tokens)
            row["device_s"] = captured(dense, clock)
            case = f"decode at {position:,}"
            more = {"position": position, "cache_bytes": position * size}
            rows.append({"case": case, "variant": "sdpa, full cache", **row, **more})
    return rows


def prompt(lengths: tuple[int, ...], width: int, chunk: int, device: torch.device) -> list[Row]:
    """The reference model with DMA layers reads one prompt; memory and seconds at each length."""
    from transformers import AutoModelForCausalLM

    import dynmask

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(device).eval()
    model = dynmask.convert(model, width=width, window=min(128, width // 4), form="bounded")
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(model.config.vocab_size, (1, lengths[-1]), generator=g)
    rows: list[Row] = []
    with torch.inference_mode():
        # everything is compiled and every workspace taken before anything is measured
        for part in ids[:, : 2 * chunk].split(chunk, 1):
            warm = dynmask.BoundedCache(model)
            model(part.to(device), past_key_values=warm, logits_to_keep=1)
        del warm
        cache, seconds, read, most = dynmask.BoundedCache(model), 0.0, 0, 0
        base = None
        for length in lengths:
            start = time.perf_counter()
            with PeakMemory(device) as peak:
                base = peak.start if base is None else base
                for part in ids[:, read:length].split(chunk, 1):
                    model(part.to(device), past_key_values=cache, logits_to_keep=1)
            seconds += time.perf_counter() - start
            read, most = length, max(most, peak.start - base + peak.bytes)
            rows.append(
                {
                    "case": f"prompt of {length:,}",
                    "variant": PROMPT,
                    "keys": length,
                    "width": width,
                    "chunk": chunk,
                    "median_s": seconds,
                    "rounds": 1,
                    "peak_bytes": most,
                    "cache_bytes": cache.nbytes,
                }
            )
    return rows


def show(rows: Iterable[Row]) -> None:
    """One line per row."""
    for row in rows:
        figures = [row.get("status", "")]
        for key, unit, scale in SHOWN:
            if row.get(key):
                figures.append(f"{scale * row[key]:,.3f} {unit}")
        print(f"  {row['case']} {row['variant']}: {', '.join(filter(None, figures))}", flush=True)


def record_goals(rows: list[Row], here: Row, out: Path, device: torch.device) -> None:
    """Headline rows of what was measured."""
    found = {(row["case"], row["variant"]): row for row in rows if "median_s" in row}

    def say(
        goal: str, metric: str, value: float, target: float, better: str, note: str = ""
    ) -> None:
        row = record(
            3, goal, metric, round(value, 4), target, better, device, note,
            "python benchmarks/dma.py", here, out / "headline.jsonl",
        )  # fmt: skip
        verdict = "met" if row["met"] else "MISSED"
        print(f"  {verdict}: {goal}: {metric} {value:.3g} (asked {target:g})", flush=True)

    for step in STEPS:
        mine, dense = found.get((step.name, "dynmask")), found.get((step.name, "cudnn"))
        flash = found.get((step.name, "fa2"))
        if mine and dense and step.target:
            forward = found[(step.name, "dynmask forward")]["median_s"]
            note = (
                f"ours {1e3 * mine['median_s']:.2f} ms, of it selection and forward "
                f"{1e3 * forward:.2f} ms; cuDNN {1e3 * dense['median_s']:.1f} ms"
            )
            goal = f"forward and backward, {step.keys:,} / w {step.width}, against cuDNN's"
            ratio = dense["median_s"] / mine["median_s"]
            say(goal, "speedup", ratio, step.target, "higher", note)
        if mine and flash and step.keys == STEPS[-1].keys:
            goal = f"peak extra memory of a training step, {step.keys:,}, over FlashAttention's"
            note = f"ours {mine['peak_bytes'] / 1e6:,.0f} MB"
            say(goal, "ratio", mine["peak_bytes"] / flash["peak_bytes"], 1.1, "lower", note)
    ends = [found.get((f"decode at {n:,}", "bounded cache")) for n in (POSITIONS[0], POSITIONS[-1])]
    if ends[0] and ends[1]:
        for key, what in (("median_s", "the host included"), ("device_s", "the device alone")):
            if ends[0].get(key):
                goal = f"decoding at 1,048,576 over at 8,192, w {WIDTH}, {what}"
                note = "the host's Python and launches, which vary from run to run"
                note = note if key == "median_s" else ""
                say(goal, "time ratio", ends[1][key] / ends[0][key], 1.05, "lower", note)
        size = ends[1]["full_bytes"] / ends[1]["cache_bytes"]
        note = "keys and values alone 512x; the rest is a position and a score for each slot"
        say(f"cache at 1,048,576, w {WIDTH}, smaller than the full one by", "ratio", size, 512,
            "higher", note)  # fmt: skip
    ends = [found.get((f"prompt of {n:,}", PROMPT)) for n in (POSITIONS[0], POSITIONS[-1])]
    if ends[0] and ends[1]:
        ratio = ends[1]["peak_bytes"] / ends[0]["peak_bytes"]
        note = (
            f"{ends[1]['peak_bytes'] / 1e6:,.1f} MB beside the weights, cache "
            f"{ends[1]['cache_bytes'] / 1e6:,.1f} MB, {ends[1]['median_s']:.1f} s"
        )
        goal = f"reference model with DMA layers, w {WIDTH}: peak memory of a prompt of 1,048,576"
        say(f"{goal} over that of its first 8,192", "ratio", ratio, 1.05, "lower", note)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    parser.add_argument("--only", choices=("train", "decode", "prompt"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the runner")
    args = parser.parse_args()
    if args.smoke and args.out.resolve() == RESULTS.resolve():
        parser.error("--smoke: expected --out with another folder; trials are no results")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing is measured.")
        return
    device = torch.device(args.device)
    clock, here = Clock(device), machine(device)
    here["commit"] = args.commit or here["commit"]
    rows: list[Row] = []
    if args.only in (None, "train"):
        error = check(device, 128 if args.smoke else 2048)
        if not error < TOLERANCE:
            raise SystemExit(f"refused: gradients are off by {error:.1e}")
        print(f"gradients agree with the oracle's: {error:.1e}", flush=True)
        for step in (Step(256, 32, 1.0, 2),) if args.smoke else STEPS:
            rows += train(step, clock, device)
            gc.collect()
            if clock.gpu:
                torch.cuda.empty_cache()
            show(row for row in rows if row["case"] == step.name)
    if args.only in (None, "decode"):
        sizes = ((64, 256), 32, 64, 5) if args.smoke else (POSITIONS, WIDTH, CHUNK, TOKENS)
        rows += decode(*sizes, clock, device)
        show(row for row in rows if row["case"].startswith("decode"))
    if args.only in (None, "prompt"):
        sizes = ((128, 512), 64, 128) if args.smoke else (POSITIONS, WIDTH, CHUNK)
        rows += prompt(*sizes, device)
        show(row for row in rows if row["case"].startswith("prompt"))
    new = {(row["case"], row["variant"]) for row in rows}
    file = args.out / "dma.jsonl"
    kept = [row for row in rows_of(file) if (row["case"], row["variant"]) not in new]
    write_rows(file, [*kept, *({**row, **here} for row in rows)])
    if not args.smoke:
        record_goals(rows, here, args.out, device)


if __name__ == "__main__":
    main()
