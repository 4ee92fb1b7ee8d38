"""make benchmark: every case of the registry, variants interleaved in one run.

Selection (scores to lifetimes) and lowering (lifetimes to key lists) are inside our time. The
dense baseline is PyTorch's fused attention; its key/value heads are repeated beforehand, outside
its time, because that is its fastest form.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import record, rows_of, write_rows
from benchmarks.registry import CPU, GOALS, Case
from dynmask import LifetimeMask, attention
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine

RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
SDPA = torch.nn.functional.scaled_dot_product_attention


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key, value and scores of a case, the same for every variant."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    query, key, value = (
        torch.randn(1, heads, case.keys, case.dim, generator=g).to(dtype)
        for heads in (case.heads, case.groups, case.groups)
    )
    return query, key, value, torch.randn(1, case.groups, case.keys, generator=g)


def mask_of(case: Case, scores: Tensor) -> LifetimeMask:
    """The case's mask; for "top_w" this is the selection."""
    if case.mask == "window":
        return LifetimeMask.window(case.keys, case.width)
    return LifetimeMask.top_w(scores, case.width)


def variants(case: Case) -> dict[str, Callable[[], Tensor]]:
    """What is timed."""
    query, key, value, scores = inputs(case)
    times = case.heads // case.groups
    wide_key, wide_value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return {
        "dynmask": lambda: attention(query, key, value, mask_of(case, scores)),
        "sdpa": lambda: SDPA(query, wide_key, wide_value, is_causal=True),
    }


def measure(case: Case) -> list[dict[str, Any]]:
    """Time every variant of a case in turn, ``rounds`` times."""
    runs = variants(case)
    peak = {}
    for name, run in runs.items():  # first call: warm-up, and the memory it takes
        with PeakMemory(torch.device("cpu")) as memory:
            run()
        peak[name] = memory.bytes
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(case.rounds), desc=case.name, leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    *_, scores = inputs(case)
    parts = stages(case, scores)
    rows = []
    for name, taken in seconds.items():
        ordered = sorted(taken)
        rows.append(
            {
                "case": case.name,
                "variant": name,
                "median_s": statistics.median(taken),
                "q20_s": ordered[int(0.2 * (len(ordered) - 1))],
                "q80_s": ordered[round(0.8 * (len(ordered) - 1))],
                "rounds": case.rounds,
                "peak_bytes": peak[name],
                **(parts if name == "dynmask" else {}),
            }
        )
    return rows


def stages(case: Case, scores: Tensor) -> dict[str, float]:
    """What selection and lowering take alone, and how much work is left."""
    start = time.perf_counter()
    mask = mask_of(case, scores)
    selected = time.perf_counter()
    plan = mask.lower()
    lowered = time.perf_counter()
    return {
        "selection_s": selected - start,
        "lowering_s": lowered - selected,
        "density": float(mask.density().mean()),
        "work": float(plan.work().double().mean()) / mask.causal_pairs(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = machine(torch.device("cpu"))
    command = "make benchmark"
    print(f"{here['device']['name']}, {args.threads} threads, torch {here['versions']['torch']}")
    print(f"{'case':38s} {'dynmask s':>10s} {'sdpa s':>9s} {'speedup':>8s} {'extra MB':>9s}")
    for case in CPU:
        if args.only not in case.name:
            continue
        rows = measure(case)
        ours, dense = rows[0], rows[1]
        ratio = dense["median_s"] / ours["median_s"]
        print(
            f"{case.name:38s} {ours['median_s']:10.2f} {dense['median_s']:9.2f} {ratio:7.2f}x "
            f"{ours['peak_bytes'] / 2**20:9.1f}",
            flush=True,
        )
        kept = [r for r in rows_of(RESULTS) if r["case"] != case.name]
        write_rows(RESULTS, [*kept, *({**row, **here} for row in rows)])
        for goal in GOALS:
            if goal.case == case.name:
                record(
                    goal.issue,
                    goal.goal,
                    "speedup",
                    round(ratio, 2),
                    goal.target,
                    "higher",
                    torch.device("cpu"),
                    command=command,
                    origin=here,
                )


if __name__ == "__main__":
    main()
