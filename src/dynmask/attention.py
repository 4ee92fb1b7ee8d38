"""The one entry to every kernel: checks inputs once, dispatches, never falls back silently."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from .kernels.cpu import cpu_attention
from .kernels.reference import reference_attention
from .masks.base import Mask, repeat_heads
from .plan import Plan

IMPLS = ("auto", "cpu", "reference", "sdpa")

ROWS_AT_A_TIME = 4096
"""Query rows lowered and computed at a time, so that plans stay small at any length."""

LOGITS_AT_A_TIME = 2**24
"""Logits that the reference holds at a time, so that it never needs N x N memory."""


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_or_plan: Mask | Plan,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_or_plan: Mask | Plan,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_or_plan: Mask | Plan,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention over the pairs that a mask lets through.

    Queries are the last q positions of the keys (bottom-right aligned), so prefill, chunked
    prefill and decoding are one case. Rows that see no key give 0. Keys that no row reads may hold
    anything; the values of the others must be finite, for 0 times NaN is NaN.

    Args:
        query: [b, h, q, d]; float16, bfloat16, float32 or float64.
        key: [b, g, k, d], g divides h; query head i reads kv head ``i // (h / g)``.
        value: [b, g, k, dv].
        mask_or_plan: what is visible. A mask is lowered a range of rows at a time; a plan is
            executed as it is, rows outside its tiles give 0.
        bias: [b or 1, 1 or g or h, k], added to the scaled logits of each key.
        scale: of the logits, ``d ** -0.5`` when None.
        return_lse: also return the log-sum-exp of each row's visible logits, float32 (float64
            for float64 inputs) [b, h, q], -inf for rows that see no key. Outputs over disjoint
            sets of keys are merged by it.
        impl: "cpu" gathers what the plan lists (tensor operations, any device); "reference" is
            the dense oracle, a range of rows at a time; "sdpa" is PyTorch's fused attention, for
            plain causal masks only; "auto" takes "sdpa" for a mask that is plain causal by
            construction, without bias or lse, and "cpu" for every other.

    Returns:
        out [b, h, q, dv] in the dtype of ``query``, and lse when asked for.

    Raises:
        ValueError: shapes, dtypes, devices or heads that disagree, before any work.
    """
    mask = check_inputs(query, key, value, mask_or_plan, bias, impl)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = choose(query, mask, bias, return_lse)
    # Tensors are computed in the dtype they have: autocast would round single products only.
    with torch.autocast(query.device.type, enabled=False):
        if impl == "sdpa":
            return _sdpa(query, key, value, mask, bias, factor, return_lse)
        return _by_ranges(query, key, value, mask, bias, factor, return_lse, impl)


def _by_ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Plan,
    bias: Tensor | None,
    factor: float,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Lower and compute a range of query rows at a time."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    lse = None
    if return_lse:
        lse = torch.full(query.shape[:3], float("-inf"), dtype=dtype, device=query.device)
    if bias is not None:
        bias = bias.expand(query.shape[0], -1, -1)
        bias = repeat_heads(bias, max(bias.shape[1], key.shape[1]))
    most = ROWS_AT_A_TIME
    if impl == "reference":
        most = max(1, LOGITS_AT_A_TIME // (query.shape[0] * query.shape[1] * key.shape[2]))
    for rows in _ranges(mask, query.shape[2], most):
        if impl == "reference":
            visible = mask.dense() if isinstance(mask, Plan) else mask.dense(rows)
            part = query[:, :, slice(*rows)]
            result, norm = reference_attention(part, key, value, visible, bias, factor)
            out[:, :, slice(*rows)] = result
            if lse is not None:
                lse[:, :, slice(*rows)] = norm
        else:
            plan = mask if isinstance(mask, Plan) else mask.lower(rows)
            cpu_attention(query, key, value, plan, bias, factor, out, lse)
    return out if lse is None else (out, lse)


def choose(query: Tensor, mask: Mask | Plan, bias: Tensor | None, return_lse: bool) -> str:
    """What ``impl="auto"`` runs."""
    if isinstance(mask, Mask) and mask.is_causal and bias is None and not return_lse:
        return "sdpa"
    return "cpu"


def _ranges(mask: Mask | Plan, queries: int, most: int) -> list[tuple[int, int]]:
    """Ranges of query rows computed one after the other; a plan is executed whole."""
    if isinstance(mask, Plan):
        return [(0, queries)]
    return [(first, min(first + most, queries)) for first in range(0, queries, most)]


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Plan,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> Tensor:
    """PyTorch's fused attention for plain causal masks."""
    if isinstance(mask, Plan) or not mask.is_causal or bias is not None or return_lse:
        raise ValueError(
            'impl="sdpa": expected a plain causal mask (LifetimeMask.causal) without bias and '
            'lse, received another; use impl="auto"'
        )
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]  # groups are read in place, not repeated
    sdpa = partial(
        torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=grouped
    )
    if queries == keys:
        return sdpa(query, key, value, is_causal=True)
    if queries == 1:
        return sdpa(query, key, value)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for first, last in _ranges(mask, queries, ROWS_AT_A_TIME):
        visible = mask.dense((first, last))
        part = query[:, :, first:last]
        out[:, :, first:last] = sdpa(part, key, value, attn_mask=visible)
    return out


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Plan,
    bias: Tensor | None,
    impl: str,
) -> Mask | Plan:
    """Raise ValueError unless everything fits together; returns the mask for this batch."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, received {impl!r}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name}: expected a floating tensor [batch, heads, positions, head dim], "
                f"received {what}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name}: expected {query.dtype} on {query.device} like query, received "
                f"{x.dtype} on {x.device}; convert with {name}.to(query)"
            )
        if 0 in x.shape:
            raise ValueError(
                f"{name}: expected no empty dimension, received {tuple(x.shape)}; "
                "leave the call out where there is nothing to attend"
            )
    b, h, q, d = query.shape
    g, k = key.shape[1:3]
    if key.shape[0] != b or key.shape[3] != d:
        raise ValueError(
            f"key: expected [{b}, kv heads, keys, {d}] like query {tuple(query.shape)}, received "
            f"{tuple(key.shape)}; tensors are [batch, heads, positions, head dim]"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [{b}, {g}, {k}, value dim] like key, received {tuple(value.shape)}"
        )
    if g < 1 or h % g:
        raise ValueError(
            f"query: expected heads that are a multiple of the {g} kv heads, received {h}; "
            "query head i reads kv head i // (heads / kv heads)"
        )
    if not isinstance(mask, Mask | Plan):
        raise ValueError(
            f"mask_or_plan: expected a dynmask mask or plan, received {type(mask).__name__}; "
            "for plain causal attention pass LifetimeMask.causal(keys, queries)"
        )
    batch, queries, keys = (
        mask.shape if isinstance(mask, Plan) else (mask.batch, mask.queries, mask.keys)
    )
    if (queries, keys) != (q, k) or batch not in (1, b) or (isinstance(mask, Plan) and batch != b):
        raise ValueError(
            f"mask_or_plan: expected one for {b} batch rows, {q} queries and {k} keys, received "
            f"{batch} batch rows, {queries} queries and {keys} keys"
        )
    if mask.device != query.device:
        raise ValueError(
            f"mask_or_plan: expected on {query.device} like query, received on {mask.device}; "
            "build the mask on the device of the tensors"
        )
    if mask.heads not in (1, g, h):
        raise ValueError(
            f"mask_or_plan: expected 1, {g} (kv) or {h} (query) heads, received {mask.heads}"
        )
    if bias is not None and (
        bias.dim() != 3
        or bias.shape[0] not in (1, b)
        or bias.shape[1] not in (1, g, h)
        or bias.shape[2] != k
        or bias.device != query.device
        or not bias.is_floating_point()
    ):
        raise ValueError(
            f"bias: expected floating [{b} or 1, 1 or {g} or {h}, {k}] on {query.device}, "
            f"received {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
    return mask if isinstance(mask, Plan) or mask.batch == b else mask.expand(b)
