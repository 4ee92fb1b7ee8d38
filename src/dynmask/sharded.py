"""Attention of DTensors: one operator for any mask, and the sharding rules that PyTorch asks for.

Attention never mixes batch rows or heads, so ranks that hold some of either compute alone. The
mask goes into the operator as tensors (:mod:`dynmask.masks.flat`), and is cut like the others.
Rules are registered by ``torch.distributed.tensor.experimental.register_sharding``; the operators
of :mod:`dynmask.kernels.ops` have none, for they write into tensors that they are given, and a
rule could hand them copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .attention import attention, choose, work_of
from .errors import bad
from .kernels.autograd import gradients
from .masks import Mask
from .masks.flat import dims_of, flatten, has_batch, unflatten
from .masks.mixed import MixedMask
from .plan import Plan

BATCH, HEADS = 0, 1
IMPLS = ("auto", "cpu", "triton")


def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | Plan,
    bias: Any,
    scale: float,
    return_lse: bool,
    impl: str,
    deterministic: bool,
) -> Any:
    """:func:`dynmask.attention` of DTensors; the result is placed as the query is.

    Args:
        query, key, value: DTensors of one mesh, replicated or cut along batch rows or heads.
        mask: of all batch rows and heads, the same on all ranks.
        bias: a DTensor, a plain tensor that is the same on all ranks, or None.
        scale: of the logits.
        return_lse: return lse too.
        impl: "auto", "cpu" or "triton".
        deterministic: as in ``dynmask.attention``.

    Raises:
        ValueError: plain tensors beside DTensors, other placements, heads or batch rows that the
            mesh does not share evenly, a plan, or another ``impl``.
    """
    mesh = query.device_mesh
    if impl not in IMPLS:
        raise bad("impl", f"one of {', '.join(IMPLS)} for DTensors", impl)
    if not isinstance(mask, Mask):
        raise bad("mask_or_plan", "a mask for DTensors", type(mask).__name__,
                  "A plan is about all heads: pass the mask.")  # fmt: skip
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_placed(name, x, query)
    parts, form = flatten(mask)
    _check_shared(query, key, parts, form)

    def whole(x: Tensor) -> Any:
        replicated = [Replicate()] * mesh.ndim
        return DTensor.from_local(x.contiguous(), mesh, replicated, run_check=False)

    if bias is not None and not isinstance(bias, DTensor):
        bias = whole(bias)
    out, lse = torch.ops.dynmask.attention(
        query, key, value, bias, [whole(x) for x in parts], len(parts), form, scale, impl,
        deterministic,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_placed(name: str, x: Any, query: Any) -> None:
    """Raise ValueError for a tensor that no rule is about."""
    if not isinstance(x, DTensor) or x.device_mesh != query.device_mesh:
        got = "one of another mesh" if isinstance(x, DTensor) else "a plain tensor"
        raise bad(name, "a DTensor of the query's mesh", got, "Use distribute_tensor.")
    allowed = (Replicate(), Shard(BATCH), Shard(HEADS))
    wrong = [p for p in x.placements if p not in allowed]
    if wrong:
        raise bad(
            name, "replicated, or cut along batch rows or heads", wrong[0],
            "Positions are shared by dynmask.distributed.context_attention.",
        )  # fmt: skip


def _check_shared(query: Any, key: Any, parts: Sequence[Tensor], form: str) -> None:
    """Raise ValueError where the query is cut as no rule allows."""
    sizes = {BATCH: _sizes(query, key, None, parts, form, BATCH),
             HEADS: _sizes(query, key, None, parts, form, HEADS)}  # fmt: skip
    for size, placement in zip(query.device_mesh.shape, query.placements, strict=True):
        dim = getattr(placement, "dim", None)
        if dim == BATCH and not has_batch(form):
            raise bad("mask", "one whose batch rows can be cut", "a packed or padded one",
                      "Cut the heads, or give each rank its own sequences.")  # fmt: skip
        if dim is not None and any(n % size for n in sizes[dim]):
            what = "batch rows" if dim == BATCH else "heads and kv heads"
            raise bad(
                "query", f"{what} that {size} ranks share evenly", sorted(set(sizes[dim])),
                "Use as many ranks as divide them.",
            )  # fmt: skip


# the operator: it sees the tensors of one rank


@torch.library.custom_op("dynmask::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    count: int,  # the first integer: PyTorch tells calls apart by it and by what follows
    form: str,
    scale: float,
    impl: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    mask = unflatten(parts, form)
    return attention(
        query, key, value, mask, bias, scale, return_lse=True, impl=impl,
        deterministic=deterministic,
    )  # fmt: skip


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("dynmask::attention_backward", mutates_args=())
def _attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    out_grad: Tensor,
    lse_grad: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    count: int,
    form: str,
    scale: float,
    impl: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = unflatten(parts, form)
    how = impl, scale, deterministic
    if not isinstance(mask, MixedMask):
        return _gradients(query, key, value, bias, mask, out, lse, out_grad, lse_grad, *how)
    sums: list[Tensor] = []
    for number, part in enumerate(mask.parts):
        other = ~mask.own(number)[:, None]
        out, lse = attention(query, key, value, part, bias, scale, return_lse=True, impl=impl)
        wanted = out_grad.masked_fill(other[..., None], 0), lse_grad.masked_fill(other, 0)
        found = _gradients(query, key, value, bias, part, out, lse, *wanted, *how)
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else list(found)
    return tuple(sums)  # type: ignore[return-value]


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask, out: Tensor,
    lse: Tensor, out_grad: Tensor, lse_grad: Tensor, impl: str, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of one mask that is not mixed; an empty one where there is no bias."""
    mask = mask if mask.batch == len(query) else mask.expand(len(query))
    if impl == "auto":
        impl = choose(query, mask, bias, True, (key, value)).impl
    work = work_of(query, mask, scale, impl, deterministic)
    query_grad, key_grad, value_grad, bias_grad = gradients(
        query, key, value, bias, out, lse, out_grad, lse_grad, work
    )
    assert query_grad is not None and key_grad is not None and value_grad is not None
    if bias_grad is None:
        bias_grad = query.new_empty(0)
    return query_grad, key_grad, value_grad, bias_grad


@_attention_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, out_grad: Tensor,
    lse_grad: Tensor, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_bias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
    return of_query, of_key, of_value, of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, parts, *rest = inputs
    ctx.save_for_backward(query, key, value, *output, bias, *parts)
    ctx.rest = rest
    ctx.set_materialize_grads(False)  # they would be no DTensors


def _backward(ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, bias, *parts = ctx.saved_tensors
    if out_grad is None and lse_grad is None:
        return None, None, None, None, [None] * len(parts), *[None] * len(ctx.rest)
    found = torch.ops.dynmask.attention_backward(
        query, key, value, out, lse,
        torch.zeros_like(out) if out_grad is None else out_grad,
        torch.zeros_like(lse) if lse_grad is None else lse_grad, bias, parts, *ctx.rest,
    )  # fmt: skip
    of_bias = None if bias is None else found[3]
    return *found[:3], of_bias, [None] * len(parts), *[None] * len(ctx.rest)


_attention.register_autograd(_backward, setup_context=_keep)


# the rules: they see shapes and meshes of whole tensors


def _sizes(query: Any, key: Any, bias: Any, parts: Sequence[Any], form: str, dim: int) -> list[int]:
    """Sizes along batch rows or heads of all that would be cut; 1 stands for all and is not."""
    sizes = [query.shape[dim], key.shape[dim]]
    if bias is not None and bias.shape[dim] > 1:
        sizes.append(bias.shape[dim])
    for part, dims in zip(parts, dims_of(form), strict=True):
        own = dims[dim]
        if own is not None and part.shape[own] > 1:
            sizes.append(part.shape[own])
    return sizes


def _even(sizes: list[int], mesh: Any) -> bool:
    """Whether heads that belong together stay so, however a mesh's dimensions share them."""
    some = [mesh.shape[i] for i in range(mesh.ndim)]
    products = {prod(c) for n in range(1, len(some) + 1) for c in combinations(some, n)}
    # what is cut into more parts than it has is no choice of PyTorch's
    return all(p > min(sizes) or not any(n % p for n in sizes) for p in products)


def _placements(
    query: Any, key: Any, bias: Any, parts: Sequence[Any], form: str
) -> list[tuple[Any, Any, list[Any], Any]]:
    """Ways to share a call: placements of its tensors, bias, mask, and the gradient of bias."""
    found: list[tuple[Any, Any, list[Any], Any]] = [
        (Replicate(), Replicate(), [Replicate()] * len(parts), Replicate())
    ]
    for dim in (HEADS, BATCH):
        if dim == BATCH and not has_batch(form):
            continue
        if not _even(_sizes(query, key, bias, parts, form, dim), query.mesh):
            continue
        one = bias is not None and bias.shape[dim] == 1
        of_bias = Replicate() if bias is None or one else Shard(dim)
        of_grad = Partial() if one else of_bias
        of_parts = [
            Replicate() if own[dim] is None or part.shape[own[dim]] == 1 else Shard(own[dim])
            for part, own in zip(parts, dims_of(form), strict=True)
        ]
        found.append((Shard(dim), of_bias, of_parts, of_grad))
    return found


@register_sharding(torch.ops.dynmask.attention.default)
def _(query: Any, key: Any, value: Any, bias: Any, parts: Any, count: int, form: str, *rest: Any):
    others = [None] * (2 + len(rest))
    return [
        ([x] * 2, [x, x, x, None if bias is None else y, *z, *others])
        for x, y, z, _ in _placements(query, key, bias, parts, form)
    ]


@register_sharding(torch.ops.dynmask.attention_backward.default)
def _(
    query: Any, key: Any, value: Any, out: Any, lse: Any, out_grad: Any, lse_grad: Any, bias: Any,
    parts: Any, count: int, form: str, *rest: Any,
):  # fmt: skip
    others = [None] * (2 + len(rest))
    return [
        ([x, x, x, w], [*[x] * 7, None if bias is None else y, *z, *others])
        for x, y, z, w in _placements(query, key, bias, parts, form)
    ]


__all__ = ["attend"]
