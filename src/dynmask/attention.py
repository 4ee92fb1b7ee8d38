"""The one entry to every kernel: checks inputs once, dispatches, never falls back silently."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .kernels import ops
from .kernels.autograd import Attend, Work
from .kernels.cpu import cpu_attention
from .kernels.reference import reference_attention
from .masks.base import Mask, repeat_heads
from .masks.mixed import MixedMask
from .masks.placed import PlacedMask
from .plan import Plan

IMPLS = ("auto", "cpu", "triton", "reference", "sdpa")

ROWS_AT_A_TIME = 4096
"""Query rows lowered and computed at a time, so that plans stay small at any length."""

LIST_BYTES = 2**30
"""Key lists that the Triton kernels are given at a time; 4,096 rows at least."""

KEPT_SHARE = 1 / 8
"""A call that autograd records keeps its key lists for the backward while they take no more than
this share of the queries' bytes; longer ones are made again."""

DENSE_KEYS = 1024
"""On a GPU, keys up to which a single call of SDPA with the mask written out beats our kernels,
whose launches cost the host more (``docs/performance.md``)."""

MOST_DIM, MOST_ROWS = 256, 256
"""Head dims and rows of a tile that the Triton kernels know."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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
    deterministic: bool | None = None,
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
    deterministic: bool | None = None,
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
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention over the pairs that a mask lets through.

    Queries are the last q positions of the keys (bottom-right aligned), so prefill, chunked
    prefill and decoding are one case. Rows that see no key give 0. Keys that no row reads may hold
    anything; the values of the others must be finite, for 0 times NaN is NaN.

    Differentiable in query, key, value and bias; by the kernels "triton" and "cpu" once. They keep
    the tensors, the mask and one number a row for backward, which computes the same pairs again.

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
        impl: "triton" is the GPU's kernels (on the CPU they run under ``TRITON_INTERPRET=1``);
            "cpu" gathers what the plan lists (tensor operations, any device); "reference" is the
            dense oracle, a range of rows at a time; "sdpa" is PyTorch's fused attention with the
            mask written out, for masks without bias or lse. "auto" chooses among them, always for
            the same pairs: see :func:`dynmask.explain`.
        deterministic: gradients of the Triton kernels are the same bits in every run; slower,
            more launches. As ``torch.use_deterministic_algorithms`` says when None. The results
            of a forward always are, and so are the gradients of the other kernels but "sdpa".

    Returns:
        out [b, h, q, dv] in the dtype of ``query``, and lse when asked for.

    Raises:
        ValueError: shapes, dtypes, devices or heads that disagree, before any work.
    """
    mask = check_inputs(query, key, value, mask_or_plan, bias, impl)
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, received {scale!r}")
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if deterministic is None:
        deterministic = bool(torch.are_deterministic_algorithms_enabled())
    if _is_dtensor(query):
        from .sharded import attend

        return attend(query, key, value, mask, bias, factor, return_lse, impl, deterministic)
    if impl == "auto":
        impl = choose(query, mask, bias, return_lse, (key, value)).impl
    if impl == "triton":
        _check_triton(query, value, mask)
    with _without_autocast(query.device.type):
        if impl == "sdpa":
            return _sdpa(query, key, value, mask, bias, factor, return_lse)
        if isinstance(mask, MixedMask) and impl != "reference":
            return _by_parts(query, key, value, mask, bias, factor, return_lse, impl, deterministic)
        if impl != "reference" and _wants_grad(query, key, value, bias):
            work = work_of(query, mask, factor, impl, deterministic)
            out, lse = Attend.apply(query, key, value, bias, work)
            return (out, lse) if return_lse else out
        if impl == "triton":
            return _triton(query, key, value, bias, mask, factor, return_lse)
        return _by_ranges(query, key, value, bias, mask, factor, return_lse, impl)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Tensors are computed in the dtype they have: autocast would round single products only."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # entering the other costs a third of what SDPA's call does


def _is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is one of several processes; there is none where nobody imported them."""
    if type(x) is Tensor:
        return False
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def work_of(
    query: Tensor, mask: Mask | Plan, factor: float, impl: str, deterministic: bool
) -> Work:
    """Forward and backward of a call that autograd records."""
    holes = isinstance(mask, Plan | PlacedMask)
    if impl == "cpu":
        forward = partial(_by_ranges, mask=mask, factor=factor, return_lse=True, impl=impl)
        plans = partial(_cpu_plans, mask, query.shape[2])
        return Work(forward, plans, None, False, mask.heads, holes, factor)
    members = query.shape[1] // max(mask.heads, 1)
    plans = partial(_triton_plans, mask, members, deterministic)
    key_plans = None
    kept: list[Plan] | None = None if torch.compiler.is_compiling() else []
    if isinstance(mask, Mask):
        tile = mask.backward_tile(members)
        if tile != mask.preferred_tile(fused=True, members=members):
            key_plans = partial(plans, tile)
    forward = partial(_triton, mask=mask, factor=factor, return_lse=True, kept=kept)
    plans = partial(plans, kept=kept)
    return Work(forward, plans, key_plans, True, mask.heads, holes, factor)


def _by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    *rest: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute each part of a mixed mask by itself, and take each head from its own part."""
    call: Any = attention  # the type of its result depends on return_lse
    found = [call(query, key, value, part, *rest) for part in mask.parts]
    if isinstance(found[0], Tensor):
        return mask.pick(found)
    outs, norms = zip(*found, strict=True)
    return mask.pick(list(outs)), mask.pick(list(norms))


def _by_ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Mask | Plan,
    factor: float,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Lower and compute a range of query rows at a time."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    lse: Tensor | None = None
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


class Choice(NamedTuple):
    """What runs a call, and why."""

    impl: str
    reason: str


def choose(
    query: Tensor,
    mask: Mask | Plan,
    bias: Tensor | None,
    return_lse: bool,
    others: tuple[Tensor, ...] = (),
) -> Choice:
    """What ``impl="auto"`` runs. Every choice computes the same pairs."""
    on_gpu = query.device.type == "cuda"
    bare = mask if isinstance(mask, Mask) and bias is None and not return_lse else None
    if bare is not None and bare.is_causal and (not on_gpu or bare.queries in (1, bare.keys)):
        return Choice("sdpa", "the mask is plain causal by construction")
    if not on_gpu:
        return Choice("cpu", "the tensors are on the CPU")
    if query.dtype not in TRITON_DTYPES:
        return Choice("cpu", f"the Triton kernels do not compute in {query.dtype}")
    if max(x.shape[-1] for x in (query, *others)) > MOST_DIM:
        return Choice("cpu", f"the Triton kernels know head dims up to {MOST_DIM}")
    if isinstance(mask, Plan) and mask.tile > MOST_ROWS:
        return Choice("cpu", f"the Triton kernels know tiles of up to {MOST_ROWS} rows")
    if not ops.has_triton():
        return Choice("cpu", "the triton package is not installed: pip install 'dynmask[triton]'")
    # a row that sees no key gives 0, but SDPA's gradient of it is NaN: not where they are wanted
    short = bare is not None and bare.queries > 1 and bare.keys <= DENSE_KEYS
    if bare is not None and short and not _wants_grad(query, *others, bias):
        reason = (
            f"{bare.keys} keys are no more than {DENSE_KEYS}: launching costs more than it saves"
        )
        return Choice("sdpa", reason)
    return Choice("triton", "a sparse mask on a GPU")


def _wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Mask | Plan,
    factor: float,
    return_lse: bool,
    kept: list[Plan] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Lower and compute by the Triton kernels, as many rows at a time as ``LIST_BYTES`` hold.

    Plans that are small beside the queries are left in ``kept`` for the backward.
    """
    shape = (*query.shape[:3], value.shape[-1])
    room = query.nbytes * KEPT_SHARE
    # a plan and placed sequences may leave rows out, every other mask has a tile for each row
    holes = isinstance(mask, Plan | PlacedMask)
    out = query.new_zeros(shape) if holes else query.new_empty(shape)
    lse = None
    if return_lse:
        lse = torch.full(shape[:3], float("-inf"), dtype=torch.float32, device=query.device)
    for plan in _plans(mask, query.shape[1] // max(mask.heads, 1)):
        ops.attend(
            query, key, value, bias, plan.index, plan.full, plan.count, plan.batch, plan.row,
            plan.rows, plan.position, plan.death, plan.bits, plan.tile, plan.block, plan.even,
            factor, out, lse,
        )  # fmt: skip
        room -= plan.nbytes
        if kept is not None and room >= 0:
            kept.append(plan)
    if kept is not None and room < 0:
        kept.clear()  # all of them or none
    return out if lse is None else (out, lse)


def _cpu_plans(mask: Mask | Plan, queries: int) -> Iterator[tuple[Plan, int]]:
    """The plans of a call of the CPU kernel, as backward takes them."""
    for rows in _ranges(mask, queries, ROWS_AT_A_TIME):
        yield mask if isinstance(mask, Plan) else mask.lower(rows), 0


def _triton_plans(
    mask: Mask | Plan,
    members: int,
    deterministic: bool,
    tile: int | None = None,
    kept: list[Plan] | None = None,
) -> Iterator[tuple[Plan, int]]:
    """The plans of a call of the Triton kernels, as backward takes them; those of ``kept`` if any.

    Tiles of one batch row may share keys; a mask's own plans have as many for each batch row.
    """
    alike = not isinstance(mask, Plan | PlacedMask)
    for plan in kept or _plans(mask, members, tile):
        launches = plan.tiles // plan.shape[0] if alike else plan.tiles
        yield plan, launches if deterministic else 0


def _plans(mask: Mask | Plan, members: int, tile: int | None = None) -> Iterator[Plan]:
    """The plans of a call of the Triton kernels, one range of rows after the other.

    Args:
        mask: what is visible.
        members: query heads that share a list.
        tile: rows of a tile; what the forward prefers when None.
    """
    if isinstance(mask, Plan):
        if mask.tiles:
            yield mask
        return
    if tile is None:
        tile = mask.preferred_tile(fused=True, members=members)
    tile = min(tile, mask.queries)
    row = 4 * mask.list_words(tile) * mask.heads * mask.batch // tile
    most = max(LIST_BYTES // max(row, 1), ROWS_AT_A_TIME)
    cuts = {x - mask.offset for x in mask.cuts()}
    for first, last in _ranges(mask, mask.queries, most):
        inside = sorted({first, last, *(x for x in cuts if first < x < last)})
        for rows in pairwise(inside):
            plan = mask.lower(rows, min(tile, rows[1] - rows[0]), fused=True)
            if plan.tiles:
                yield plan


def _check_triton(query: Tensor, value: Tensor, mask: Mask | Plan) -> None:
    """Raise ValueError where the Triton kernels cannot run a call that asked for them."""
    if not ops.has_triton():
        raise ValueError(
            'impl="triton": expected the triton package, which is not installed; '
            "pip install 'dynmask[triton]'"
        )
    if query.device.type != "cuda" and not ops.interpreting():
        raise ValueError(
            f'impl="triton": expected tensors on a GPU, received them on {query.device}; use '
            'impl="cpu", or set TRITON_INTERPRET=1 before Python starts to try the kernels here'
        )
    if query.dtype not in TRITON_DTYPES:
        raise ValueError(
            f'impl="triton": expected float16, bfloat16 or float32, received {query.dtype}; '
            'use impl="cpu"'
        )
    if isinstance(mask, Plan) and mask.tile > MOST_ROWS:
        raise ValueError(
            f'impl="triton": expected tiles of up to {MOST_ROWS} rows, received a plan with '
            f"{mask.tile}; lower the mask with tile={MOST_ROWS // 2}"
        )
    if max(query.shape[-1], value.shape[-1]) > MOST_DIM:
        raise ValueError(
            f'impl="triton": expected head dims up to {MOST_DIM}, received {query.shape[-1]} and '
            f'{value.shape[-1]}; use impl="cpu"'
        )


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
    """PyTorch's fused attention; masks that are not plain causal are written out."""
    if isinstance(mask, Plan) or bias is not None or return_lse:
        raise ValueError(
            'impl="sdpa": expected a mask, no bias and return_lse=False, received a plan, a bias '
            'or a wish for lse; use impl="auto"'
        )
    queries, keys = query.shape[2], key.shape[2]
    heads = query.shape[1]
    # groups are read in place, not repeated
    more: dict[str, Any] = {"scale": scale, "enable_gqa": heads != key.shape[1]}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if mask.is_causal and queries == keys:
        return sdpa(query, key, value, is_causal=True, **more)
    if mask.is_causal and queries == 1:
        return sdpa(query, key, value, **more)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for first, last in _ranges(mask, queries, ROWS_AT_A_TIME):
        visible = repeat_heads(mask.dense((first, last)), heads if mask.heads > 1 else 1)
        part = sdpa(query[:, :, first:last], key, value, attn_mask=visible, **more)
        if not mask.is_causal:  # a row that sees no key gives 0
            part = part.masked_fill(~visible.any(-1, keepdim=True), 0)
        out[:, :, first:last] = part
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
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(
            f"bias: expected a floating tensor [{b} or 1, 1 or {g} or {h}, {k}], received "
            f"{type(bias).__name__}"
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
