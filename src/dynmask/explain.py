"""What does an attention call run, why, and what does it cost?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import attention, check_inputs, choose
from .masks.base import Mask
from .plan import Plan

RUNS = 5
"""Timed calls, after one that is not (it may compile)."""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printing it gives a paragraph.

    Attributes:
        impl: what runs the call: "triton", "cpu", "sdpa" or "reference".
        reason: why that one.
        density: kept pairs over causal pairs, the mean over batch rows and heads.
        milliseconds: median of a whole call, lowering included; the host's launches too.
        dense_milliseconds: the same for plain causal attention by PyTorch's fused kernel; None
            where the call has no dense counterpart of the same shape (few queries, many keys).
    """

    impl: str
    reason: str
    density: float
    milliseconds: float
    dense_milliseconds: float | None

    def __str__(self) -> str:
        text = (
            f"impl={self.impl!r}: {self.reason}. It keeps {self.density:.2%} of the causal pairs "
            f"and takes {self.milliseconds:.3f} ms a call"
        )
        if self.dense_milliseconds is None:
            return text + "."
        ratio = self.dense_milliseconds / self.milliseconds
        return (
            f"{text}; dense causal attention takes {self.dense_milliseconds:.3f} ms ({ratio:.2f}x)."
        )


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_or_plan: Mask | Plan,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Run an attention call a few times and say what ran, why, and what it cost.

    Arguments, units and errors are those of :func:`dynmask.attention`. The mask's construction is
    not inside the time: it happened before this call. Gradients are not computed, but a call whose
    tensors ask for them is explained as such.

    Returns:
        an :class:`Explanation`; ``print`` it.
    """
    mask = check_inputs(query, key, value, mask_or_plan, bias, impl)
    chosen, reason = impl, "it was asked for"
    if impl == "auto":
        chosen, reason = choose(query, mask, bias, return_lse, (key, value))
    call: Any = attention  # the type of its result depends on return_lse
    with torch.no_grad():
        taken = _median_ms(
            lambda: call(query, key, value, mask, bias, scale, return_lse, chosen),
            query.device,
        )
        dense = None
        if query.shape[2] == key.shape[2]:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            grouped = query.shape[1] != key.shape[1]
            dense = _median_ms(
                lambda: sdpa(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped),
                query.device,
            )
    return Explanation(chosen, reason, _density(mask), taken, dense)


def _density(mask: Mask | Plan) -> float:
    """Kept over causal pairs, the mean over batch rows and heads."""
    if isinstance(mask, Mask):
        return float(mask.density().mean())
    _, queries, keys = mask.shape
    pairs = queries * keys - queries * (queries - 1) // 2
    return float(mask.kept().double().mean()) / pairs


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a call that the device has finished."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    taken = []
    for _ in range(RUNS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)
