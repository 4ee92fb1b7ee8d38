"""make benchmark where a GPU is: every case of gpu_cases.py, variants interleaved in one run.

Selection (scores to lifetimes, tables to lists) and lowering are inside our time, but for decoding,
where lists are made beforehand and what that takes is a figure of its own. Before a case is timed,
its kernel is compared with the dense oracle at a smaller length; one that disagrees is not
recorded. Rows are written after every case.

    python benchmarks/gpu.py --only top_w          # some cases
    python benchmarks/gpu.py --peers               # other projects' kernels too
    python benchmarks/gpu.py --device cpu --smoke  # try the runner without a GPU
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_cases import CASES, GOALS, NOTES, Goal, GpuCase
from benchmarks.gpu_inputs import Inputs, decode_mask, inputs, mask_of
from benchmarks.headline import record, rows_of, write_rows
from benchmarks.peers import Adapter, adapters
from benchmarks.timing import Clock, Run, ceilings, summary
from dynmask import Mask, Plan, attention
from dynmask.attention import _plans  # the ranges that attention() lowers, to time them alone
from dynmask.evals.memory import PeakMemory
from dynmask.evals.provenance import machine
from dynmask.kernels import ops

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-2
"""Relative error in the Frobenius norm that a bfloat16 result may have."""

MILLION = 2**20
CALLS = 20
"""Calls between two events where one call is short."""

Row = dict[str, Any]


@dataclass
class Variant:
    """What is timed: ``inside`` calls in one run."""

    run: Run
    inside: int = 1
    row: Row = field(default_factory=dict)


# Ours


def impl_of(case: GpuCase, device: torch.device) -> str:
    """The implementation that a case measures; the CPU's where the GPU's cannot run."""
    if case.mask == "auto":
        return "auto"
    return "triton" if device.type == "cuda" or ops.interpreting() else "cpu"


def ours(data: Inputs) -> Variant:
    """Selection, lowering and attention in one call; in decoding, every plan once."""
    query, key, value = data.query, data.key, data.value
    impl = impl_of(data.case, data.device)
    if data.case.mask == "decode":

        def decode() -> Tensor:
            outs = [attention(query, key, value, plan, impl=impl) for plan in data.plans]
            return outs[0]

        return Variant(decode, len(data.plans))
    if data.case.mask == "auto":  # a model makes its causal mask once, not once a layer
        mask = mask_of(data)
        return Variant(lambda: attention(query, key, value, mask, impl=impl))
    return Variant(lambda: attention(query, key, value, mask_of(data), impl=impl))


def plans_of(data: Inputs, mask: Mask) -> Iterator[Plan]:
    """The plans of a call, one range of rows after the other, as attention() makes them."""
    if impl_of(data.case, data.device) == "triton":
        return _plans(mask, data.query.shape[1] // max(mask.heads, 1))
    return iter([mask.lower()])


def error_of(out: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm, a head at a time: long outputs are large."""
    pairs = [(o.float(), e.float()) for o, e in zip(out.unbind(1), expected.unbind(1), strict=True)]
    wrong = sum(float((o - e).square().sum()) for o, e in pairs)
    return (wrong / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5


def check(case: GpuCase, device: torch.device) -> float:
    """Error of the measured implementation against the oracle, at a small length."""
    data = inputs(case.small() if device.type == "cuda" else case, device, seed=1)
    visible = data.plans[0] if case.mask == "decode" else mask_of(data)
    call = (data.query, data.key, data.value, visible)
    return error_of(
        attention(*call, impl=impl_of(case, device)), attention(*call, impl="reference")
    )


def stages(data: Inputs, clock: Clock, rounds: int) -> Row:
    """Selection, lowering and attention, each alone, and how much work the mask leaves."""
    case = data.case
    mask = mask_of(data)
    runs: dict[str, Run] = {
        "selection_s": lambda: mask_of(data),
        "lowering_s": lambda: [None for _ in plans_of(data, mask)],
    }
    first = list(_at_most(plans_of(data, mask), 2))
    if len(first) == 1:  # lists of several ranges are not kept in memory all at once
        call = (data.query, data.key, data.value, first[0])
        impl = impl_of(case, data.device)
        runs["attention_s"] = lambda: attention(*call, impl=impl)
    for run in runs.values():
        run()
    row: Row = {k: statistics.median(v) for k, v in clock.interleave(runs, rounds).items()}
    density = float(mask.density().double().mean())
    pairs = density * mask.causal_pairs() * case.heads * case.batch
    tile = first[0].tile
    return {**row, "density": density, "kept_tflop": 4 * case.dim * pairs / 1e12, "tile": tile}


def _at_most(plans: Iterator[Plan], n: int) -> Iterator[Plan]:
    for i, plan in enumerate(plans):
        yield plan
        if i + 1 == n:
            return


def finish(row: Row, data: Inputs, limits: Row) -> None:
    """Rates, shares and the roofline of our row."""
    case, seconds = data.case, row["median_s"]
    size = data.key.element_size()
    if case.mask == "decode":
        kept = 2 * size * case.dim * case.batch * case.groups * case.width
        row["kept_bytes"] = kept
        row["bandwidth_share"] = kept / seconds / 1e9 / limits["copy_gbps"]
        row["floor_s"] = kept / 1e9 / limits["copy_gbps"]
        return
    # every tensor once: what a kernel with an endless cache would move
    moved = size * (2 * data.query.numel() + data.key.numel() + data.value.numel())
    moved += sum(x.numel() * x.element_size() for x in data.given)
    work = row["kept_tflop"] / limits["matmul_tflops"]
    row["floor_s"] = max(work, moved / 1e9 / limits["copy_gbps"])
    row["kept_tflops"] = row["kept_tflop"] / seconds
    row["share"] = (row["selection_s"] + row["lowering_s"]) / seconds
    if "attention_s" not in row:
        row["attention_s"] = max(seconds - row["selection_s"] - row["lowering_s"], 0.0)
        row["attention_derived"] = True


# One case


@dataclass
class Runner:
    """What all cases share."""

    device: torch.device
    clock: Clock
    limits: Row
    here: Row
    out: Path
    peers: bool = False
    rounds: int | None = None
    extrapolate: bool = False

    def measure(self, case: GpuCase) -> list[Row]:
        """Check a case, then time its variants in turn."""
        error = check(case, self.device)
        if not error < TOLERANCE:
            return [self.row(case, "dynmask", status=f"refused: error {error:.1e} to the oracle")]
        data = inputs(case, self.device)
        variants, rows = self.prepare(data)
        rounds = self.rounds or case.rounds
        extra: Row = {"error": error}
        if case.mask == "decode":
            run = decode_mask(data)
            run()
            extra["lowering_s"] = statistics.median(self.clock.time(run) for _ in range(rounds))
        elif case.mask != "auto":
            extra |= stages(data, self.clock, min(rounds, 6))
        times = self.time(case, variants, rounds)
        for name, variant in variants.items():
            rows.append(self.row(case, name, **variant.row, **times[name]))
        mine = next(row for row in rows if row["variant"] == "dynmask")
        # the same call on a device that waits for it: the host's launches are inside
        alone = [self.clock.time(variants["dynmask"].run, cover=1) for _ in range(min(rounds, 5))]
        mine["alone_s"] = statistics.median(alone) / variants["dynmask"].inside
        mine |= extra
        if case.mask != "auto":
            finish(mine, data, self.limits)
        return rows

    def prepare(self, data: Inputs) -> tuple[dict[str, Variant], list[Row]]:
        """Variants that run, called once, and a row for each that does not."""
        case = data.case
        own = ours(data)
        expected = own.run()  # compiles
        with PeakMemory(self.device) as memory:
            own.run()
        own.row["peak_bytes"] = memory.bytes
        variants, rows = {"dynmask": own}, []
        for adapter in adapters(case, self.peers):
            status = adapter.refuses(case)
            if not status and adapter.name in case.once and self.extrapolate:
                rows.append(self.extrapolated(case, adapter.name))
                continue
            try:
                if not status:
                    variants[adapter.name] = self.variant(adapter, data, expected)
            except Exception as error:  # whatever a peer does must not end the run
                status = one_line(error)
                self.still_there(status)
            if status:
                rows.append(self.row(case, adapter.name, status=status))
        return variants, rows

    def variant(self, adapter: Adapter, data: Inputs, expected: Tensor) -> Variant:
        """A peer's call, warm, its result compared with ours where its mask is the same."""
        if adapter.name in data.case.once:  # too slow to be called twice: a short call warms it
            adapter.prepare(_shortened(data)).run()
            prepared = adapter.prepare(data)
            how = "one call, the first at this length"
            return Variant(prepared.run, row={"pairs": adapter.pairs, "how": how, **prepared.extra})
        prepared = adapter.prepare(data)
        out = prepared.run()
        row = {"pairs": adapter.pairs, **prepared.extra}
        if adapter.pairs == "same":
            row["error"] = error_of(out, expected)
            if not row["error"] < 2 * TOLERANCE:
                raise RuntimeError(f"computes other values: error {row['error']:.1e} to ours")
        return Variant(prepared.run, row=row)

    def time(self, case: GpuCase, variants: dict[str, Variant], rounds: int) -> dict[str, Row]:
        """Medians and quantiles of each variant.

        Short calls ("auto", "decode") are replayed as CUDA graphs, which leaves the host out;
        "auto" also has ``calls_s``, the median of many plain calls between two events.
        """
        runs = {name: variant.run for name, variant in variants.items()}
        if case.mask not in ("auto", "decode"):
            taken = self.clock.interleave(runs, rounds, once=case.once)
            return {name: {**summary(t), "timing": "events"} for name, t in taken.items()}
        replays, kinds = {}, {}
        for name, run in runs.items():
            try:
                replays |= self.clock.graph({name: run})
                kinds[name] = "CUDA graph" if self.clock.gpu else "clock"
            except Exception as error:  # a call that waits for the device cannot be captured
                self.still_there(one_line(error))
                replays[name], kinds[name] = run, "events"
        calls = CALLS if case.mask == "auto" and self.clock.gpu else 1
        taken = self.clock.interleave(replays, rounds, calls)
        rows = {}
        for name, seconds in taken.items():
            each = [s / variants[name].inside for s in seconds]
            rows[name] = {**summary(each), "timing": kinds[name]}
        if case.mask == "auto":
            for name, seconds in self.clock.interleave(runs, rounds, calls).items():
                rows[name]["calls_s"] = statistics.median(seconds)
        return rows

    def extrapolated(self, case: GpuCase, name: str) -> Row:
        """A dense variant's time from a shorter case: dense work grows with the square."""
        known = [
            row
            for row in rows_of(self.out / "gpu.jsonl")
            if (row.get("mask"), row["variant"]) == (case.mask, name)
            and row.get("keys", case.keys) < case.keys
            and "median_s" in row
        ]
        if not known:
            return self.row(case, name, status="no shorter case to extrapolate from")
        near = max(known, key=lambda row: row["keys"])
        seconds = near["median_s"] * (case.keys / near["keys"]) ** 2
        origin = f"{near['keys']:,} keys, by the square of the length"
        return self.row(
            case, name, median_s=seconds, pairs="dense", extrapolated=True, extrapolated_from=origin
        )

    def row(self, case: GpuCase, variant: str, **more: Any) -> Row:
        """One row of gpu.jsonl."""
        return {
            "case": case.name,
            "mask": case.mask,
            "layout": case.layout,
            "keys": case.keys,
            "width": case.width,
            "variant": variant,
            **more,
        }

    def save(self, rows: list[Row]) -> None:
        """Write rows in place of those of the same case and variant."""
        new = {(row["case"], row["variant"]) for row in rows}
        file = self.out / "gpu.jsonl"
        kept = [row for row in rows_of(file) if (row["case"], row["variant"]) not in new]
        write_rows(file, [*kept, *({**row, **self.here} for row in rows)])

    def still_there(self, status: str) -> None:
        """Stop when a peer's failure took the device with it; what was measured is saved."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise SystemExit(f"the device is lost after: {status}") from error


def _shortened(data: Inputs) -> Inputs:
    """The first 4,096 positions of a case without a mask: for warming dense variants."""
    n = min(data.case.keys, 4096)
    query, key, value = (x[:, :, :n].contiguous() for x in (data.query, data.key, data.value))
    return Inputs(replace(data.case, keys=n), query, key, value)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# Goals


def value_of(goal: Goal, rows: dict[str, Row]) -> float | None:
    """The goal's number from a case's rows; None where a row is missing."""
    mine = rows.get("dynmask", {})
    if goal.metric not in ("speedup", "time ratio"):
        return mine.get(goal.metric)
    others = [rows[name]["median_s"] for name in goal.against if "median_s" in rows.get(name, {})]
    if not others or "median_s" not in mine:
        return None
    ratio = min(others) / mine["median_s"]
    return ratio if goal.metric == "speedup" else 1 / ratio


def note_of(goal: Goal, rows: dict[str, Row], limits: Row) -> str:
    """What the measurement itself says about a number."""
    mine = rows["dynmask"]
    parts = [NOTES[goal.goal]] if goal.goal in NOTES else []
    parts.append(f"ours {1e3 * mine['median_s']:.3f} ms ({mine.get('timing', '')})")
    if "floor_s" in mine:
        parts.append(f"roofline floor {1e3 * mine['floor_s']:.3f} ms")
    if "kept_tflops" in mine:
        rate, most = mine["kept_tflops"], limits["matmul_tflops"]
        parts.append(f"kept work at {rate:.0f} of {most:.0f} TFLOP/s measured")
    if mine.get("selection_s") is not None:
        chosen, lowered = 1e3 * mine["selection_s"], 1e3 * mine["lowering_s"]
        parts.append(f"selection {chosen:.3f} ms, lowering {lowered:.3f} ms")
    if "calls_s" in mine and "calls_s" in rows.get("sdpa", {}):
        ratio = mine["calls_s"] / rows["sdpa"]["calls_s"]
        parts.append(f"plain calls, the host's time included: ratio {ratio:.2f}")
    if any(rows.get(name, {}).get("extrapolated") for name in goal.against):
        parts.append("the baseline is extrapolated by the square of the length")
    return "; ".join(parts)


def record_goals(runner: Runner, rows: list[Row], command: str) -> None:
    """Headline rows of a case, and a line for each on the screen."""
    by_name = {row["variant"]: row for row in rows}
    for goal in GOALS:
        if not rows or goal.case != rows[0]["case"]:
            continue
        value = value_of(goal, by_name)
        if value is None:
            print(f"    not measured: {goal.goal}", flush=True)
            continue
        row = record(
            goal.issue,
            goal.goal,
            goal.metric,
            round(value, 4),
            goal.target,
            goal.better,
            runner.device,
            note=note_of(goal, by_name, runner.limits),
            command=command,
            origin=runner.here,
            path=runner.out / "headline.jsonl",
        )
        verdict = "met" if row["met"] else "MISSED"
        print(f"    {verdict}: {goal.goal}: {value:.3g} (goal {goal.target:g})", flush=True)


def show(rows: list[Row]) -> None:
    """One line per variant."""
    mine = next((r["median_s"] for r in rows if r["variant"] == "dynmask" and "median_s" in r), 0.0)
    for row in rows:
        if "median_s" not in row:
            print(f"  {row['variant']:22s} {row.get('status', '')}", flush=True)
            continue
        times = f"{row['median_s'] / mine:7.2f}x" if mine else ""
        print(f"  {row['variant']:22s} {1e3 * row['median_s']:12.4f} ms {times}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    parser.add_argument("--peers", action="store_true", help="other projects' kernels too")
    parser.add_argument("--rounds", type=int, help="timings of each variant")
    parser.add_argument("--skip-million", action="store_true", help="leave out 1,048,576 tokens")
    parser.add_argument(
        "--extrapolate",
        action="store_true",
        help="take the dense time of 1,048,576 tokens from a shorter case",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the runner")
    args = parser.parse_args()
    if args.smoke and args.out.resolve() == RESULTS.resolve():
        parser.error("--smoke: expected --out with another folder; trials are no results")
    return args


def cases_of(args: argparse.Namespace) -> list[tuple[GpuCase, str]]:
    """Cases to run, and the name that goals know each by."""
    chosen = [c for c in CASES if args.only in c.name]
    if args.skip_million:
        chosen = [c for c in chosen if c.keys < MILLION]
    return [(c.tiny() if args.smoke else c, c.name) for c in chosen]


def start(args: argparse.Namespace) -> Runner:
    """Measure what the device can do, and say what is measured."""
    device = torch.device(args.device)
    here = machine(device)
    here["commit"] = args.commit or here["commit"]
    clock = Clock(device)
    limits = ceilings(device, clock, args.smoke)
    runner = Runner(
        device, clock, limits, here, args.out, args.peers, args.rounds, args.extrapolate
    )
    print(
        f"{here['device']['name']}, torch {here['versions']['torch']}: "
        f"{limits['matmul_tflops']:.0f} TFLOP/s, {limits['copy_gbps']:.0f} GB/s",
        flush=True,
    )
    runner.save([{"case": "ceilings", "variant": "device", **limits}])
    return runner


def guarded(measure: Callable[[GpuCase], list[Row]], runner: Runner, case: GpuCase) -> list[Row]:
    """A case's rows; one that fails is a row that says why, and the next case is run."""
    try:
        return measure(case)
    except Exception as error:
        status = one_line(error)
        runner.still_there(status)
        return [runner.row(case, "dynmask", status=status)]


@torch.no_grad()
def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: the GPU cases are left out.")
        return
    torch.manual_seed(0)
    runner = start(args)
    command = "python benchmarks/gpu.py" + (" --peers" if args.peers else "")
    for case, name in cases_of(args):
        print(name, flush=True)
        rows = [{**row, "case": name} for row in guarded(runner.measure, runner, case)]
        show(rows)
        runner.save(rows)
        record_goals(runner, rows, command)
        del rows
        gc.collect()
        if runner.clock.gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
