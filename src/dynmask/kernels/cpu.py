"""The CPU kernel: for every tile, gather the keys that the plan lists and compute only those.

Built from tensor operations, so it needs no compiler and runs on any device; the sizes are tuned
for CPUs. One gather of a kv head's keys serves all query heads of its group, whose rows are
stacked into one matrix product. Every large result goes to a buffer that is allocated once a
call: fresh memory costs more in page faults than the arithmetic on it. The backward is written
out: recorded operations would keep every tile's weights, and make a gradient as large as all keys
for every gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..plan import Plan, unpack_rows

KEYS_AT_A_TIME = 2048
"""Longest key list computed at once; longer ones go in pieces merged by log-sum-exp."""

Keys = slice | Tensor
"""Keys of one list: a slice where they are one run (no gather needed), else int64 [n]."""


class Buffers:
    """Memory that one call uses again for every tile."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._flat: dict[str, Tensor] = {}
        self._like = like
        self._dtype = dtype

    def get(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape."""
        size = 1
        for n in shape:
            size *= n
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size, dtype=self._dtype)
        return flat[:size].view(shape)


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
        bias: [b, g or h, k] or None.
        scale: of the logits.
        out: [b, h, q, dv], rows of the plan's tiles are overwritten.
        lse: float32 or float64 [b, h, q] or None, likewise.
    """
    if plan.tile == 1 and plan.block == 1:
        return _single_rows(query, key, value, plan, bias, scale, out, lse)
    heads, groups = query.shape[1], key.shape[1]
    lists = max(plan.heads, groups, 1 if bias is None else bias.shape[1])
    members = heads // lists  # query heads that share a list, a kv head and a bias
    dtype = torch.promote_types(query.dtype, torch.float32)
    buffers = Buffers(query, dtype)
    tables = (plan.batch.tolist(), plan.row.tolist(), plan.rows.tolist())
    for t, (b, row, rows) in enumerate(zip(*tables, strict=True)):
        listed = [_listed(plan, head, t) for head in range(plan.heads)]
        for i in range(lists):
            head = slice(i * members, (i + 1) * members)
            kv = i * groups // lists
            q = query[b, head, row : row + rows].reshape(members * rows, -1).to(dtype) * scale
            part = None if bias is None else bias[b, i * bias.shape[1] // lists]
            args = (q, key[b, kv], value[b, kv], part, *listed[i * plan.heads // lists])
            result, norm = _tile(*args, lse is not None, buffers)
            out[b, head, row : row + rows] = result.view(members, rows, -1).to(out.dtype)
            if lse is not None and norm is not None:
                lse[b, head, row : row + rows] = norm.view(members, rows)


def _single_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Tiles of one row, as in decoding: all at once, their lists padded to the longest.

    With one row to a tile every listed key is seen, so the lists are all there is to know.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, groups = query.shape[1], key.shape[1]
    lists = max(plan.heads, groups, 1 if bias is None else bias.shape[1])
    batch, row = plan.batch.long(), plan.row.long()
    number = torch.arange(lists, device=query.device)
    keys = plan.index[number * plan.heads // lists].transpose(0, 1).long()  # [t, lists, n]
    count = plan.count[number * plan.heads // lists].T[..., None]
    listed = torch.arange(keys.shape[-1], device=query.device) < count
    # padding may be anything: in its place stands a key that is read, 0 where none is
    keys = torch.where(listed, keys, keys[..., :1].masked_fill(count == 0, 0))

    def take(x: Tensor) -> Tensor:  # x [b, heads', k, ...] -> [t, lists, n, ...]
        return gather_rows(
            x, batch[:, None, None], (number * x.shape[1] // lists)[:, None], keys
        ).to(dtype)

    q = query[batch, :, row].unflatten(1, (lists, heads // lists)).to(dtype) * scale
    logits = q @ take(key).mT
    if bias is not None:
        logits = logits + take(bias)[:, :, None]
    logits = logits.masked_fill(~listed[:, :, None], float("-inf"))
    norm = logits.logsumexp(-1)
    weights = (logits - norm[..., None]).exp()
    empty = norm[..., None] == float("-inf")  # a row that sees no key gives 0
    result = (weights @ take(value)).masked_fill(empty, 0)
    out[batch, :, row] = result.flatten(1, 2).to(out.dtype)
    if lse is not None:
        lse[batch, :, row] = norm.flatten(1, 2)


def gather_rows(x: Tensor, batch: Tensor, head: Tensor, key: Tensor) -> Tensor:
    """``x[batch, head, key]`` of x [b, heads, k, ...].

    Of four dimensions rows are copied whole, one index for each instead of three: several times
    as fast. All of them start at a multiple of the same step.
    """
    step = math.gcd(*x.stride()[:3])
    if x.dim() != 4 or x.stride(3) != 1 or not step:
        return x[batch, head, key]
    first, second, third = (stride // step for stride in x.stride()[:3])
    last = sum((n - 1) * s for n, s in zip(x.shape, (first, second, third), strict=False))
    flat = x.as_strided((last + 1, x.shape[3]), (step, 1))
    return nn.functional.embedding(batch * first + head * second + key * third, flat)


def _listed(plan: Plan, head: int, t: int) -> tuple[Keys, int, Tensor]:
    """A tile's keys, how many of them every row sees, and which rows see each of the rest."""
    full, count = int(plan.full[head, t]), int(plan.count[head, t])
    if plan.bits is not None:  # every listed key has a row that sees it
        keys = plan.index[head, t, :count].long()
        return (
            _run(keys),
            full,
            unpack_rows(plan.bits[head, t, : count - full], int(plan.rows[t])).T,
        )
    whole = plan.index[head, t, :full].long()
    if plan.block > 1:
        whole = (whole[:, None] + torch.arange(plan.block, device=plan.device)).flatten()
    edge, seen = plan.boundary(head, t)
    some = seen.any(0)  # a key that no row sees is not read: it may be padding
    if not bool(some.all()):
        edge, seen = edge[some], seen[:, some]
    return _run(torch.cat([whole, edge])), len(whole), seen


def _run(keys: Tensor) -> Keys:
    """The keys as a slice where they are one run."""
    if not len(keys):
        return keys
    first, last = int(keys[0]), int(keys[-1])
    if last - first != len(keys) - 1 or not bool((keys.diff() == 1).all()):
        return keys
    return slice(first, last + 1)


def _tile(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keys: Keys,
    full: int,
    seen: Tensor,
    want_lse: bool,
    buffers: Buffers,
) -> tuple[Tensor, Tensor | None]:
    """Scaled rows q [m * rows, d] against the listed keys of key [k, d] and value [k, dv].

    Returns [m * rows, dv] and, when wanted, the log-sum-exp [m * rows].
    """
    n = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
    if n == 0:
        return q.new_zeros(len(q), value.shape[-1]), q.new_full((len(q),), float("-inf"))
    if n <= KEYS_AT_A_TIME:
        return _piece(q, key, value, bias, keys, full, seen, want_lse, buffers)
    total = q.new_zeros(len(q), value.shape[-1])
    norm = q.new_full((len(q),), float("-inf"))
    for some, inner, edge in _pieces(keys, full, seen):
        part, log = _piece(q, key, value, bias, some, inner, edge, True, buffers)
        assert log is not None
        total, norm = merge(total, norm, part, log)
    return total, norm


def _pieces(keys: Keys, full: int, seen: Tensor) -> Iterator[tuple[Keys, int, Tensor]]:
    """A list in pieces of ``KEYS_AT_A_TIME``, each as a list is given."""
    n = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
    for first in range(0, n, KEYS_AT_A_TIME):
        last = min(first + KEYS_AT_A_TIME, n)
        if isinstance(keys, slice):
            some: Keys = slice(keys.start + first, keys.start + last)
        else:
            some = keys[first:last]
        inner = min(max(full - first, 0), last - first)
        yield some, inner, seen[:, max(first - full, 0) : max(last - full, 0)]


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint keys: outputs [..., dv] with log-sum-exps [...]."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == float("-inf"), 0)
    return a * (lse_a - safe).exp()[..., None] + b * (lse_b - safe).exp()[..., None], lse


def _piece(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keys: Keys,
    full: int,
    seen: Tensor,
    want_lse: bool,
    buffers: Buffers,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over one piece of a list; arguments as in :func:`_tile`."""
    k, v = _take(key, keys, q.dtype, buffers, "k"), _take(value, keys, q.dtype, buffers, "v")
    logits = _logits(q, k, bias, keys, full, seen, buffers)
    empty = None
    if bias is not None or (full == 0 and bool((~seen).all(-1).any())):
        empty = (logits == float("-inf")).all(-1)  # softmax of nothing is NaN, 0 is meant
        logits = logits.masked_fill(empty[:, None], 0)
    lse = logits.logsumexp(-1) if want_lse else None
    weights = torch.softmax(logits, -1, out=buffers.get("weights", *logits.shape))
    out = torch.mm(weights, v, out=buffers.get("out", len(q), v.shape[1]))
    if empty is not None:
        out = out.masked_fill(empty[:, None], 0)
        lse = None if lse is None else lse.masked_fill(empty, float("-inf"))
    return out, lse


def _logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    keys: Keys,
    full: int,
    seen: Tensor,
    buffers: Buffers,
) -> Tensor:
    """Logits [m * rows, n] of one piece, -inf for pairs that are not visible."""
    n, rows = len(k), seen.shape[0]
    logits = torch.mm(q, k.T, out=buffers.get("logits", len(q), n))
    if bias is not None:
        own = bias[keys] if isinstance(keys, slice) else bias.index_select(0, keys)
        logits.add_(own.to(q.dtype))
    if n > full:
        logits.view(-1, rows, n)[:, :, full:].masked_fill_(~seen, float("-inf"))
    return logits


def _take(x: Tensor, keys: Keys, dtype: torch.dtype, buffers: Buffers, name: str) -> Tensor:
    """The listed rows of x [k, d] in ``dtype``."""
    if isinstance(keys, slice):
        return x[keys].to(dtype)
    if x.dtype != dtype:
        return x.index_select(0, keys).to(dtype)
    return torch.index_select(x, 0, keys, out=buffers.get(name, len(keys), x.shape[1]))


def cpu_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    out_grad: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
    bias_grad: Tensor | None,
) -> None:
    """Gradients of attention over the pairs of ``plan``, the weights computed again from ``lse``.

    Args:
        query, key, value, plan, bias, scale: as in :func:`cpu_attention`.
        lse: what it wrote, [b, h, q].
        delta: [b, h, q], sum of ``out * out_grad`` of each row, less the gradient of ``lse``.
        out_grad: [b, h, q, dv].
        query_grad: [b, h, q, d], rows of the plan's tiles are overwritten.
        key_grad, value_grad: float32 or float64 [b, g, k, d or dv], added to.
        bias_grad: [b, lists, k], added to; ``lists`` is the most heads of key, plan and bias.
    """
    heads, groups = query.shape[1], key.shape[1]
    lists = max(plan.heads, groups, 1 if bias is None else bias.shape[1])
    members = heads // lists
    dtype = key_grad.dtype
    buffers = Buffers(query, dtype)
    tables = (plan.batch.tolist(), plan.row.tolist(), plan.rows.tolist())
    for t, (b, row, rows) in enumerate(zip(*tables, strict=True)):
        listed = [_listed(plan, head, t) for head in range(plan.heads)]
        for i in range(lists):
            head, kv = slice(i * members, (i + 1) * members), i * groups // lists
            q, slope, norm, lost = (
                x[b, head, row : row + rows].reshape(members * rows, -1).to(dtype)
                for x in (query, out_grad, lse[..., None], delta[..., None])
            )
            q = q * scale
            norm = norm.masked_fill(norm == float("-inf"), float("inf"))  # its weights are 0
            part = None if bias is None else bias[b, i * bias.shape[1] // lists]
            total = torch.zeros_like(q)
            for keys, full, seen in _pieces(*listed[i * plan.heads // lists]):
                k = _take(key[b, kv], keys, dtype, buffers, "k")
                v = _take(value[b, kv], keys, dtype, buffers, "v")
                weights = _logits(q, k, part, keys, full, seen, buffers).sub_(norm).exp_()
                _add(value_grad[b, kv], keys, torch.mm(weights.T, slope))
                change = torch.mm(slope, v.T, out=buffers.get("weights", *weights.shape))
                change.sub_(lost).mul_(weights)
                total.addmm_(change, k)
                _add(key_grad[b, kv], keys, torch.mm(change.T, q))
                if bias_grad is not None:
                    _add(bias_grad[b, i], keys, change.sum(0))
            query_grad[b, head, row : row + rows] = (total * scale).view(members, rows, -1)


def _add(x: Tensor, keys: Keys, more: Tensor) -> None:
    """Add to the listed rows of x, each listed once."""
    if isinstance(keys, slice):
        x[keys] += more
    else:
        x.index_add_(0, keys, more)
