"""Attention as one node of PyTorch's graph: what is kept for backward, and what backward runs.

Kept are the inputs, the output, its log-sum-exp and the mask, so memory follows the tensors;
backward lowers the mask again, a range of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.base import repeat_heads
from ..plan import Plan
from . import ops
from .cpu import cpu_backward

Plans = Callable[[], Iterable[tuple[Plan, int]]]
"""Makes the plans of a call, one range of query rows after the other.

Beside each stands in how many launches the Triton kernel that holds keys may add up its tiles so
that no two of one launch share a key; 0 where any order of adding will do.
"""


@dataclass(frozen=True)
class Work:
    """What one call computes, forward and backward.

    Attributes:
        forward: of query, key, value and bias: out and lse.
        plans: of the call.
        key_plans: the same pairs in larger tiles, for the kernel that holds keys; None where it
            shares the others'.
        fused: whether the Triton kernels run it.
        heads: of the mask.
        holes: whether the plans may leave query rows out.
        scale: of the logits.
    """

    forward: Callable[..., Any]
    plans: Plans
    key_plans: Plans | None
    fused: bool
    heads: int
    holes: bool
    scale: float


class Attend(torch.autograd.Function):
    """``Attend.apply(query, key, value, bias, work)``: out and lse, both differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        """Run the forward and keep what backward needs."""
        out, lse = work.forward(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.set_materialize_grads(False)
        ctx.work = work
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and bias."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                "attention: expected to be differentiated once, received create_graph=True; use "
                'impl="reference" where gradients of gradients are needed'
            )
        query, key, value, bias, out, lse = ctx.saved_tensors
        if out_grad is None and lse_grad is None:
            return (None,) * 5
        if out_grad is None:
            out_grad = torch.zeros_like(out)
        return (*gradients(query, key, value, bias, out, lse, out_grad, lse_grad, ctx.work), None)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    lse_grad: Tensor | None,
    work: Work,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and bias, from those of out and lse."""
    run = _triton if work.fused else _cpu
    with torch.autocast(query.device.type, enabled=False):
        return run(query, key, value, bias, out, lse, out_grad, lse_grad, work)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    lse_grad: Tensor | None,
    work: Work,
) -> tuple[Tensor | None, ...]:
    """Backward of :func:`dynmask.kernels.cpu.cpu_attention`."""
    dtype = lse.dtype
    delta = (out.to(dtype) * out_grad.to(dtype)).sum(-1)
    if lse_grad is not None:
        delta -= lse_grad
    own = None if bias is None else _wide_bias(bias, query.shape[0], key.shape[1])
    query_grad = query.new_zeros(query.shape)
    sums = _sums(key, value, own, work.heads, dtype)
    for plan, _ in work.plans():
        cpu_backward(
            query, key, value, plan, own, work.scale, lse, delta, out_grad, query_grad, *sums
        )
    return (query_grad, *_results(sums, key, value, bias))


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    lse_grad: Tensor | None,
    work: Work,
) -> tuple[Tensor | None, ...]:
    """Backward of the Triton kernels: rows first, which leave delta for the keys."""
    if out_grad.stride(-1) != 1:
        out_grad = out_grad.contiguous()
    if lse_grad is not None:
        lse_grad = lse_grad.contiguous()
    fresh = query.new_zeros if work.holes else query.new_empty
    query_grad, delta = fresh(query.shape), torch.empty_like(lse)
    sums = _sums(key, value, bias, work.heads, torch.float32)

    def add_keys(plan: Plan, launches: int) -> None:
        ops.attend_keys_backward(
            query, key, value, bias, *_lists(plan), work.scale, out_grad, lse, delta, *sums,
            launches,
        )  # fmt: skip

    for plan, launches in work.plans():
        ops.attend_rows_backward(
            query, key, value, bias, *_lists(plan), work.scale, out, out_grad, lse, lse_grad,
            query_grad, delta,
        )  # fmt: skip
        if work.key_plans is None:
            add_keys(plan, launches)
    for plan, launches in () if work.key_plans is None else work.key_plans():
        add_keys(plan, launches)
    return (query_grad, *_results(sums, key, value, bias))


def _lists(plan: Plan) -> tuple[Any, ...]:
    """A plan as the operators take it."""
    return (
        plan.index, plan.full, plan.count, plan.batch, plan.row, plan.rows, plan.position,
        plan.death, plan.bits, plan.tile, plan.block, plan.even,
    )  # fmt: skip


def _wide_bias(bias: Tensor, batch: int, groups: int) -> Tensor:
    """A bias of every batch row, of the kv heads at least: what the CPU kernel reads."""
    bias = bias.expand(batch, -1, -1)
    return repeat_heads(bias, max(bias.shape[1], groups))


def _sums(
    key: Tensor, value: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zeros to which the tiles add the gradients of key, value and the bias of each list."""
    key_sum, value_sum = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    if bias is None:
        return key_sum, value_sum, None
    lists = max(heads, key.shape[1], bias.shape[1])
    shape = (key.shape[0], lists, key.shape[2])
    return key_sum, value_sum, torch.zeros(shape, dtype=dtype, device=key.device)


def _results(
    sums: tuple[Tensor, Tensor, Tensor | None], key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The sums in the types of the inputs, the bias's in its shape as well."""
    key_sum, value_sum, bias_sum = sums
    grads = key_sum.to(key.dtype), value_sum.to(value.dtype)
    if bias is None or bias_sum is None:
        return (*grads, None)
    bias_sum = bias_sum.unflatten(1, (bias.shape[1], -1)).sum(2)
    if bias.shape[0] == 1:
        bias_sum = bias_sum.sum(0, keepdim=True)
    return (*grads, bias_sum.to(bias.dtype))
