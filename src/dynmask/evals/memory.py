"""Peak memory of a phase, above the level at which it began."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from typing import Self

import torch

__all__ = ["PeakMemory"]

STATUS = "/proc/self/status"
RESET = "/proc/self/clear_refs"
INTERVAL = 0.002  # seconds between two samples where the kernel keeps no resettable peak
HIGH_WATER = "resident set of the process (VmHWM)"


class PeakMemory:
    """A context that measures how far memory rises inside it; the result is in ``bytes``.

    On CUDA it is what PyTorch's allocator handed out. On the CPU it is the resident set of the
    process: the kernel's own high-water mark where it can be reset (Linux), else samples taken
    every two milliseconds. Freed memory is handed back to the system first, so that a phase
    cannot hide in what an earlier one left behind.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self.method = _method(device)

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        _trim()
        self.method = _method(self.device)
        self.peak = self.start = _resident()
        if self.method != HIGH_WATER:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.method == HIGH_WATER:
            peak = _status("VmHWM")
        else:
            self._done.set()
            self._thread.join()
            peak = self.peak
        self.bytes = max(0, peak - self.start)

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, _resident())


def _method(device: torch.device) -> str:
    """Return how memory is measured on ``device``; the kernel's mark is reset where it can be."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    if _reset_high_water():
        return HIGH_WATER
    return f"resident set of the process, sampled every {1000 * INTERVAL:.0f} ms"


def _status(field: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    with open(STATUS, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def _resident() -> int:
    """Return the resident set in bytes; 0 where neither /proc nor psutil tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        try:
            import psutil
        except ImportError:
            return 0
        return psutil.Process().memory_info().rss


def _reset_high_water() -> bool:
    """Set the kernel's peak of the resident set to its present size; say whether that worked."""
    try:
        with open(RESET, "w", encoding="ascii") as file:
            file.write("5")
        # Some kernels accept the write and keep the old mark: only trust a mark that moved.
        return _status("VmHWM") - _resident() < 64 * 2**20
    except OSError:
        return False


def _trim() -> None:
    """Ask the C library to return freed memory to the system, where it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
