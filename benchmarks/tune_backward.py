"""Which configurations of the backward kernels are fastest on this GPU.

    python benchmarks/tune_backward.py [--keys 32768] [--out tune_backward.jsonl]

Times the forward, the kernel that holds query rows and the kernel that holds keys, each candidate
in turn, round by round; then whole calls of attention() and of their backward. Prints a line for
each, fastest first, and writes medians to ``--out``. Kernels are compiled beforehand by ``--jobs``
processes. What wins goes into ``row_config_of``, ``key_config_of`` and ``BACKWARD_TILE`` by hand.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.timing import Clock
from benchmarks.tune import DIM, GROUPS, HEADS, inputs, tensors_of
from dynmask import LifetimeMask, Mask, attention
from dynmask.kernels.triton.backward import KeyConfig, RowConfig, keys_backward, rows_backward
from dynmask.kernels.triton.prefill import prefill

Candidate = tuple[str, int, Any]
"""What is timed (forward, rows or keys), the tile, and the configuration."""

TILES = (512, 1024, 2048, 4096)

FORWARD = [
    RowConfig(128, 64, 8, 2, 128),
    RowConfig(128, 64, 8, 2, 168),
    RowConfig(128, 64, 8, 2),
    RowConfig(128, 32, 8, 2, 128),
    RowConfig(128, 32, 8, 3, 128),
    RowConfig(64, 64, 4, 2),
    RowConfig(64, 64, 4, 2, 168),
    RowConfig(64, 32, 4, 2, 128),
    RowConfig(64, 32, 4, 3, 168),
]

KEYS = [
    KeyConfig(64, 64, 4, 2),
    KeyConfig(64, 64, 4, 3),
    KeyConfig(64, 64, 4, 1),
    KeyConfig(64, 64, 4, 2, 224),
    KeyConfig(64, 64, 4, 1, 168),
    KeyConfig(64, 128, 4, 1),
    KeyConfig(64, 32, 4, 2),
    KeyConfig(64, 32, 4, 3, 168),
    KeyConfig(32, 64, 4, 2),
    KeyConfig(128, 64, 8, 1),
    KeyConfig(128, 64, 8, 2),
    KeyConfig(128, 32, 8, 2, 128),
]

ROWS = [
    (64, RowConfig(64, 64, 4, 2)),
    (64, RowConfig(64, 64, 4, 3)),
    (64, RowConfig(64, 64, 4, 2, 168)),
    (64, RowConfig(64, 64, 4, 2, 224)),
    (64, RowConfig(64, 32, 4, 3)),
    (64, RowConfig(64, 32, 4, 2, 168)),
    (64, RowConfig(64, 128, 4, 1)),
    (64, RowConfig(128, 32, 8, 2, 128)),
    (64, RowConfig(128, 32, 8, 3, 128)),
    (64, RowConfig(128, 64, 8, 2)),
    (128, RowConfig(64, 64, 4, 2)),
    (32, RowConfig(64, 64, 4, 2)),
]


def candidates() -> list[Candidate]:
    """All that is tried; every configuration of keys at one tile, the likely ones at each."""
    out: list[Candidate] = [("forward", 64, config) for config in FORWARD]
    out += [("rows", tile, config) for tile, config in ROWS]
    out += [("keys", 1024, config) for config in KEYS]
    likely = [KEYS[0], KEYS[2], KEYS[9]]
    out += [("keys", tile, config) for tile in TILES if tile != 1024 for config in likely]
    return out


def mask_of(kind: str, keys: int) -> Mask:
    """Random top-w (also for ``biased``), a window of the same width, or plain causal attention."""
    width = min(1024, keys // 2)
    if kind == "window":
        return LifetimeMask.streaming(keys, 4, width - 4, device="cuda")
    if kind == "causal":
        return LifetimeMask.causal(keys, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    return LifetimeMask.top_w(torch.randn(1, GROUPS, keys, generator=g, device="cuda"), width)


class Case:
    """Tensors of one mask, and a run of each candidate's kernel alone."""

    def __init__(self, kind: str, keys: int) -> None:
        self.mask = mask_of(kind, keys)
        self.query, self.key, self.value = inputs(keys)
        self.bias = torch.randn(1, GROUPS, keys, device="cuda") if kind == "biased" else None
        self.out, self.lse = attention(
            self.query, self.key, self.value, self.mask, self.bias, return_lse=True, impl="triton"
        )
        self.slope = torch.randn_like(self.out)
        self.query_grad, self.delta = torch.empty_like(self.query), torch.zeros_like(self.lse)
        self.key_grad, self.value_grad = (
            torch.zeros(x.shape, device="cuda") for x in (self.key, self.value)
        )
        self.bias_grad = None if self.bias is None else torch.zeros_like(self.bias)
        self.plans: dict[int, Any] = {}

    def run(self, candidate: Candidate) -> Callable[[], None]:
        """The kernel of a candidate, its plan made beforehand."""
        what, tile, config = candidate
        if tile not in self.plans:
            self.plans[tile] = tensors_of(self.mask.lower(tile=tile, fused=True))
        plan, scale = self.plans[tile], DIM**-0.5
        inputs = (self.query, self.key, self.value, self.bias, plan, scale)
        if what == "forward":
            return lambda: prefill(*inputs, self.out, self.lse, config)
        if what == "rows":
            results = (self.query_grad, self.delta)
            return lambda: rows_backward(
                *inputs, self.out, self.slope, self.lse, None, *results, config
            )
        results = (self.key_grad, self.value_grad, self.bias_grad)
        return lambda: keys_backward(*inputs, self.slope, self.lse, self.delta, *results, 0, config)


def compile_some(kind: str, keys: int, chosen: list[Candidate]) -> None:
    """Run candidates once, which leaves the compiled kernels on disk.

    On the real sizes: kernels are compiled anew for sizes that divide by 16.
    """
    case = Case(kind, keys)
    for candidate in chosen:
        try:
            case.run(candidate)()
            torch.cuda.synchronize()
        except Exception as error:
            print("compile", candidate, type(error).__name__, str(error)[:80], flush=True)


def tune(kind: str, keys: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Every candidate, fastest first; timing ends after ``seconds``."""
    case, runs = Case(kind, keys), {}
    for candidate in candidates():
        if candidate[0] == "rows" and kind == "causal" and candidate[1] != 128:
            continue
        try:
            run = case.run(candidate)
            run()
            torch.cuda.synchronize()
            runs[candidate] = run
        except Exception as error:
            print(kind, candidate, type(error).__name__, str(error)[:80], flush=True)
    clock = Clock(case.query.device)
    taken: dict[Candidate, list[float]] = {candidate: [] for candidate in runs}
    deadline = time.monotonic() + seconds  # what is not on disk was compiled above
    for _ in range(rounds):
        for candidate, run in runs.items():
            if time.monotonic() < deadline:
                taken[candidate].append(1e3 * clock.time(run, cover=4))
    pairs = float(case.mask.density().double().mean()) * case.mask.causal_pairs() * HEADS
    products = {"forward": 2, "rows": 3, "keys": 4}
    rows = []
    for (what, tile, config), times in taken.items():
        if not times:
            continue
        row = {"kind": kind, "keys": keys, "kernel": what, "tile": tile}
        row |= {} if config is None else asdict(config)
        row["ms"] = statistics.median(times)
        row["tflops"] = products[what] * 2 * DIM * pairs / row["ms"] / 1e9
        rows.append(row)
    rows.sort(key=lambda row: (row["kernel"], row["ms"]))
    return rows


def whole(kind: str, keys: int, rounds: int) -> list[dict[str, Any]]:
    """attention() and its backward as a layer calls them, and dense causal attention beside it."""
    leaves = [x.requires_grad_() for x in inputs(keys)]
    mask = mask_of(kind, keys)
    bias = torch.randn(1, GROUPS, keys, device="cuda", requires_grad=True)
    ours = [*leaves, bias] if kind == "biased" else leaves

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, is_causal=True, enable_gqa=True)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attention(*leaves, mask, *ours[3:], impl="triton", deterministic=False),
        "ours deterministic": lambda: attention(
            *leaves, mask, *ours[3:], impl="triton", deterministic=True
        ),
        "dense": lambda: dense(*leaves),
    }
    clock = Clock(leaves[0].device)
    outs = {name: call() for name, call in calls.items()}
    slope = torch.randn_like(outs["ours"])
    runs: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        runs[f"{name}, forward"] = call
        wanted = leaves if name == "dense" else ours
        runs[f"{name}, backward"] = lambda out=outs[name], wanted=wanted: torch.autograd.grad(
            out, wanted, slope, retain_graph=True
        )
    for run in runs.values():
        run()
    taken = clock.interleave(runs, rounds)
    return [
        {"kind": kind, "keys": keys, "call": name, "ms": 1e3 * statistics.median(times)}
        for name, times in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", default=["top_w", "biased"])
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10, help="timing of one kind at most")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--out", default="tune_backward.jsonl")
    args = parser.parse_args()
    chosen = candidates()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        parts = [chosen[i :: args.jobs] for i in range(args.jobs)]
        for done in [pool.submit(compile_some, args.kind[0], args.keys, part) for part in parts]:
            try:
                done.result()
            except Exception as error:
                print("compile", type(error).__name__, str(error)[:80], flush=True)
    rows: list[dict[str, Any]] = []
    for kind in args.kind:
        for part in (
            lambda kind=kind: whole(kind, args.keys, args.rounds),
            lambda kind=kind: tune(kind, args.keys, args.rounds, args.seconds),
        ):
            try:
                rows += part()
            except Exception as error:
                print(kind, type(error).__name__, str(error)[:200], flush=True)
            Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
