"""The CPU kernel: for every tile, gather the keys that the plan lists and compute only those.

Built from tensor operations, so it needs no compiler, is differentiable and runs on any device;
the sizes are tuned for CPUs. One gather of a kv head's keys serves all query heads of its group,
whose rows are stacked into one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..plan import Plan

KEYS_AT_A_TIME = 4096
"""Longest key list computed at once; longer ones go in pieces merged by log-sum-exp."""


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention over the pairs of ``plan``, written into ``out`` (and ``lse``).

    Args:
        query: [b, h, q, d].
        key: [b, g, k, d], g divides h.
        value: [b, g, k, dv].
        plan: for these tensors.
        bias: [b, g or h, k] or None; with h heads, the plan must list keys per query head.
        scale: of the logits.
        out: [b, h, q, dv], rows of the plan's tiles are overwritten.
        lse: float32 or float64 [b, h, q] or None, likewise.
    """
    heads, groups = query.shape[1], key.shape[1]
    lists = max(plan.heads, groups, 1 if bias is None else bias.shape[1])
    members = heads // lists  # query heads that share a list and a kv head
    tables = plan.batch.tolist(), plan.row.tolist(), plan.rows.tolist()
    grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, bias)
    )
    for t, (b, row, rows) in enumerate(zip(*tables, strict=True)):
        listed = [_listed(plan, head, t) for head in range(plan.heads)]
        for i in range(lists):
            head = slice(i * members, (i + 1) * members)
            keys, full, seen = listed[i * plan.heads // lists]
            kv = i * groups // lists
            part = None if bias is None else bias[b, i * bias.shape[1] // lists]
            args = (
                query[b, head, row : row + rows],
                key[b, kv],
                value[b, kv],
                part,
                keys,
                full,
                seen,
                scale,
                lse is not None,
            )
            if grad:  # recompute a tile in backward: memory stays that of one tile
                result, norm = checkpoint(_tile, *args, use_reentrant=False)  # type: ignore
            else:
                result, norm = _tile(*args)
            out[b, head, row : row + rows] = result.to(out.dtype)
            if lse is not None:
                lse[b, head, row : row + rows] = norm


def _listed(plan: Plan, head: int, t: int) -> tuple[slice | Tensor, int, Tensor]:
    """A tile's keys (a slice where they are one run), how many are full, who sees the rest."""
    fulls = int(plan.full[head, t])
    edge, seen = plan.boundary(head, t)
    whole = plan.index[head, t, :fulls].long()
    if plan.block > 1:
        whole = (whole[:, None] + torch.arange(plan.block, device=plan.device)).flatten()
    if len(edge):
        some = seen.any(0)  # a key that no row sees is not read
        if not bool(some.all()):
            edge, seen = edge[some], seen[:, some]
    keys = torch.cat([whole, edge])
    n = len(keys)
    if n and int(keys[-1]) - int(keys[0]) == n - 1 and bool((keys.diff() == 1).all()):
        return slice(int(keys[0]), int(keys[-1]) + 1), len(whole), seen
    return keys, len(whole), seen


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keys: slice | Tensor,
    full: int,
    seen: Tensor,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One tile: query [m, rows, d] against the listed keys of key [k, d] and value [k, dv]."""
    members, rows, d = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.reshape(members * rows, d).to(dtype) * scale
    n = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
    if n == 0:
        none = q.new_full((members, rows), float("-inf"))
        return q.new_zeros(members, rows, value.shape[-1]), none
    if n <= KEYS_AT_A_TIME:
        return _piece(q, key, value, bias, keys, full, seen, members, want_lse)
    total: Tensor | None = None
    norm: Tensor | None = None
    for first in range(0, n, KEYS_AT_A_TIME):
        last = min(first + KEYS_AT_A_TIME, n)
        if isinstance(keys, slice):
            some = slice(keys.start + first, keys.start + last)
        else:
            some = keys[first:last]
        edge = seen[:, max(first - full, 0) : max(last - full, 0)]
        inner = min(max(full - first, 0), last - first)
        part, log = _piece(q, key, value, bias, some, inner, edge, members, True)
        assert log is not None
        if total is None or norm is None:
            total, norm = part, log
            continue
        both = torch.logaddexp(norm, log)
        safe = both.masked_fill(both == float("-inf"), 0)
        total = total * (norm - safe).exp()[..., None] + part * (log - safe).exp()[..., None]
        norm = both
    assert total is not None
    return total, norm


def _piece(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keys: slice | Tensor,
    full: int,
    seen: Tensor,
    members: int,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of the stacked rows q [m * rows, d] over some of the listed keys."""
    k, v = _take(key, keys).to(q.dtype), _take(value, keys).to(q.dtype)
    rows = q.shape[0] // members
    logits = q @ k.T
    if bias is not None:
        logits = logits + _take(bias, keys).to(q.dtype)
    empty = None
    if seen.shape[1]:
        hidden = ~seen
        edge = logits.view(members, rows, -1)[:, :, full:]
        if logits.requires_grad:
            edge = edge.masked_fill(hidden, float("-inf"))
            logits = torch.cat([logits.view(members, rows, -1)[:, :, :full], edge], -1)
            logits = logits.view(members * rows, -1)
        else:
            edge.masked_fill_(hidden, float("-inf"))
        if full == 0:
            empty = hidden.all(-1).repeat(members)[:, None]
            if bool(empty.any()):  # softmax of nothing is NaN; such rows give 0
                logits = logits.masked_fill(empty, 0)
            else:
                empty = None
    lse = logits.logsumexp(-1) if want_lse else None
    weights = logits.softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0)
        lse = None if lse is None else lse.masked_fill(empty[:, 0], float("-inf"))
    out = (weights @ v).view(members, rows, -1)
    return out, None if lse is None else lse.view(members, rows)


def _take(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[keys] if isinstance(keys, slice) else x.index_select(0, keys)
