"""How time is taken: events on a GPU, a clock elsewhere; variants in turn, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]

FLUSH_BYTES = 2**28
"""Written before every timing, so that no variant finds its inputs in the cache."""

COVER = 25
"""Such writes: two milliseconds or more in which the host launches the call's kernels, as it does
in a model while the GPU is busy with the layer before. Without them the time is the host's too."""


class Clock:
    """Seconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.buffer = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.gpu else None
        )

    def time(self, run: Run, calls: int = 1, cover: int = COVER) -> float:
        """Seconds per call of ``calls`` calls in a row, the device busy when the first begins."""
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        assert self.buffer is not None
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(cover):
            self.buffer.zero_()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000 / calls

    def interleave(
        self, runs: Mapping[str, Run], rounds: int, calls: int = 1, once: tuple[str, ...] = ()
    ) -> dict[str, list[float]]:
        """Time each run in turn, ``rounds`` times; those in ``once`` in the first round only."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            for name, run in runs.items():
                if turn == 0 or name not in once:
                    taken[name].append(self.time(run, calls))
        return taken

    def graph(self, runs: Mapping[str, Run]) -> dict[str, Run]:
        """The same runs as replays of CUDA graphs: the device's time without the host's."""
        return {name: _captured(run) for name, run in runs.items()} if self.gpu else dict(runs)


def _captured(run: Run) -> Run:
    """Replay of one run; its inputs and outputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def summary(taken: list[float]) -> dict[str, float]:
    """Median and the 20 and 80 % quantiles."""
    ordered = sorted(taken)
    last = len(ordered) - 1
    return {
        "median_s": statistics.median(ordered),
        "q20_s": ordered[int(0.2 * last)],
        "q80_s": ordered[round(0.8 * last)],
        "rounds": len(ordered),
    }


def ceilings(device: torch.device, clock: Clock, smoke: bool = False) -> dict[str, float]:
    """What the device can do: TFLOP/s of a large bfloat16 product, GB/s of a copy (both ways).

    Random data: a product of zeros draws less power and runs faster than any real one.
    """
    n, size = (256, 2**22) if smoke else (8192, 2**32)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.empty(size, dtype=torch.int8, device=device).random_(0, 100)
    target = torch.empty_like(source)
    runs = {"matmul": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    for run in runs.values():
        run()
    taken = clock.interleave(runs, rounds=2 if smoke else 10, calls=3)
    matmul, copy = (statistics.median(taken[name]) for name in runs)
    return {"matmul_tflops": 2 * n**3 / matmul / 1e12, "copy_gbps": 2 * size / copy / 1e9}
