"""Which configurations of the Triton kernels are fastest on this GPU.

    python benchmarks/tune.py [--kind lifetime block structural decode] [--keys 32768]

Prints a line for each configuration, fastest first, and writes them to ``--out``. Kernels are
compiled beforehand by ``--jobs`` processes. What wins goes into ``config_of`` by hand.
"""

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.timing import Clock
from dynmask import BlockMask, LifetimeMask, Mask, StructuralMask
from dynmask.kernels.triton.call import PlanTensors
from dynmask.kernels.triton.decode import decode
from dynmask.kernels.triton.prefill import Config, prefill
from dynmask.plan import Plan

HEADS, GROUPS, DIM = 32, 8, 128
SMALL = 2048


def candidates(kind: str) -> list[tuple[int, Config]]:
    """Tiles and configurations worth a try."""
    if kind == "block":
        return [
            (128, Config(128, 64, 8, 2, 128)),
            (128, Config(128, 32, 8, 3, 128)),
            (128, Config(128, 128, 8, 2)),
            (128, Config(128, 64, 8, 3, 168)),
            (64, Config(64, 64, 4, 2, 168)),
            (64, Config(64, 128, 4, 2)),
        ]
    if kind == "structural":
        return [
            *(
                (64, Config(64, 32, 4, stages, registers))
                for stages in (2, 3)
                for registers in (128, 168)
            ),
            (64, Config(64, 64, 4, 2, 168)),
            *(
                (32, Config(32, step, 4, 2, registers))
                for step in (32, 64)
                for registers in (128, 168)
            ),
            (32, Config(32, 32, 4, 3, 128)),
            (16, Config(16, 64, 2, 2, 168)),
            (16, Config(16, 32, 2, 3)),
            (16, Config(16, 64, 4, 2, 128)),
            (128, Config(128, 32, 8, 2, 128)),
        ]
    out = []
    for tile in (128, 64, 32):
        out += [(tile, Config(128, 64, 8, 2, 128)), (tile, Config(128, 32, 8, 3, 128))]
    out += [(64, Config(128, 32, 8, 4, 128)), (64, Config(256, 64, 8, 3))]
    out += [(64, Config(256, 64, 16, 3, 128)), (128, Config(128, 64, 8, 3))]
    return out


def mask_of(kind: str, keys: int) -> Mask:
    """One kind of mask."""
    g = torch.Generator("cuda").manual_seed(0)
    if kind == "lifetime":
        width = 2048 if keys > 65536 else min(1024, keys // 2)
        scores = torch.randn(1, GROUPS, keys, generator=g, device="cuda")
        return LifetimeMask.top_w(scores, width)
    if kind == "block":
        n = keys // 128
        chosen = torch.rand(1, HEADS, n, n, generator=g, device="cuda") < 0.05
        return BlockMask.from_scores(chosen, 128, 128, keys)
    base = torch.arange(8, device="cuda") * (keys // 9)
    d = (base[:, None] + torch.arange(8, device="cuda")).flatten().int().expand(1, HEADS, 64)
    v = (torch.arange(32, device="cuda") * (keys // 33)).int().expand(1, HEADS, 32)
    return StructuralMask(d.contiguous(), v.contiguous(), keys)


def tensors_of(plan: Plan) -> PlanTensors:
    """A plan as the kernels take it."""
    return PlanTensors(
        plan.index, plan.full, plan.count, plan.batch, plan.row, plan.rows, plan.position,
        plan.death, plan.bits, plan.tile, plan.block, plan.even,
    ).contiguous()  # fmt: skip


def inputs(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value."""
    g = torch.Generator("cuda").manual_seed(1)
    return tuple(
        torch.randn(1, heads, keys, DIM, generator=g, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS)
    )  # type: ignore[return-value]


def compile_some(kind: str, chosen: list[tuple[int, Config]]) -> None:
    """Run configurations once on a short input, which leaves the compiled kernels on disk."""
    for tile, config in chosen:
        try:
            time_one(config, mask_of(kind, SMALL).lower(tile=tile), inputs(SMALL), 0)
        except Exception:
            continue  # too large for the chip: the run below says so


def time_one(
    config: Config, plan: Plan, tensors: tuple[Tensor, Tensor, Tensor], rounds: int = 7
) -> float:
    """Median milliseconds of the kernel alone."""
    query, key, value = tensors
    out = torch.empty_like(query)
    lists = tensors_of(plan)

    def run() -> None:
        prefill(query, key, value, None, lists, DIM**-0.5, out, None, config)

    run()
    clock = Clock(query.device)
    times = sorted(clock.time(run) for _ in range(rounds))
    return 1000 * times[len(times) // 2] if times else 0.0


def tune(kind: str, keys: int) -> list[dict[str, Any]]:
    """Every candidate of a kind, fastest first."""
    tensors, mask = inputs(keys), mask_of(kind, keys)
    kept = float(mask.density().double().mean()) * mask.causal_pairs() * HEADS
    rows, plans = [], {}
    for tile, config in candidates(kind):
        try:
            if tile not in plans:
                plans = {}  # one at a time: lists are large
                plans = {tile: mask.lower(tile=tile)}
            ms = time_one(config, plans[tile], tensors)
        except Exception as error:
            print(kind, tile, config, type(error).__name__, str(error)[:80], flush=True)
            continue
        rate = 4 * DIM * kept / ms / 1e9
        rows.append({"kind": kind, "keys": keys, "tile": tile, **asdict(config), "ms": ms})
        rows[-1]["tflops"] = rate
    rows.sort(key=lambda row: row["ms"])
    for row in rows:
        print(
            f"{kind} {keys} tile {row['tile']:4d} rows {row['rows']:4d} step {row['step']:4d} "
            f"warps {row['warps']:3d} stages {row['stages']} registers {row['registers']!s:5s} "
            f"{row['ms']:8.3f} ms {row['tflops']:6.1f} TFLOP/s",
            flush=True,
        )
    return rows


def tune_decode(keys: int = 65536, kept: int = 2048, batch: int = 8) -> list[dict[str, Any]]:
    """Splits, steps, warps and stages of decoding, by graph replay."""
    g = torch.Generator("cuda").manual_seed(2)
    query, key, value = (
        torch.randn(batch, heads, n, DIM, generator=g, device="cuda", dtype=torch.bfloat16)
        for heads, n in ((HEADS, 1), (GROUPS, keys), (GROUPS, keys))
    )
    index = torch.rand(GROUPS, batch, keys, generator=g, device="cuda").topk(kept).indices
    index = index.sort(-1).values.int().contiguous()
    count = torch.full((GROUPS, batch), kept, dtype=torch.int32, device="cuda")
    each = torch.arange(batch, dtype=torch.int32, device="cuda")
    zero, one = torch.zeros_like(each), torch.ones_like(each)
    lists = PlanTensors(
        index, count, count, each, zero, one, one * (keys - 1), None, None, 1, 1, True
    )
    out = torch.empty_like(query)
    rows = []
    for splits, step, warps, stages in itertools.product(
        (4, 6, 8, 12), (32, 64, 128), (4,), (2, 3, 4)
    ):

        def run(s: int = splits, t: int = step, w: int = warps, p: int = stages) -> None:
            decode(query, key, value, None, lists, DIM**-0.5, out, None, s, t, w, p)

        try:
            ms = triton.testing.do_bench_cudagraph(run, rep=10)
        except Exception as error:
            print("decode", splits, step, warps, stages, type(error).__name__, flush=True)
            continue
        gbs = 2 * batch * GROUPS * kept * DIM * 2 / ms / 1e6
        rows.append({"kind": "decode", "splits": splits, "step": step, "warps": warps})
        rows[-1] |= {"stages": stages, "ms": ms, "gbs": gbs}
    rows.sort(key=lambda row: row["ms"])
    for row in rows[:12]:
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", default=["lifetime", "block", "structural", "decode"])
    parser.add_argument("--keys", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--out", default="tune.jsonl")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()
    parts = []
    for kind in args.kind:
        if kind != "decode":
            chosen = candidates(kind)
            parts += [(kind, chosen[i :: args.jobs // 2]) for i in range(args.jobs // 2)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_some, kind, some) for kind, some in parts]:
            done.result()
    if args.compile_only:
        return
    rows = []
    for kind in args.kind:
        if kind == "decode":
            rows += tune_decode()
            continue
        for keys in args.keys:
            rows += tune(kind, keys)
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
