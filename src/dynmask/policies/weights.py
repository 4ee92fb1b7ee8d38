"""What several policies compute from attention weights; no policy by itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..masks.base import repeat_heads

WEIGHTS_AT_A_TIME = 2**25
"""Attention weights that a policy holds at a time, so that none needs N x N memory."""


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """True attention of query rows, the last of the keys: [b, h, rows, keys], float32 at least.

    The rows of a group are stacked, so that no key is copied. A row of NaN weighs nothing.
    """
    (batch, heads, rows, dim), (groups, keys) = query.shape, key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    stacked = query.to(dtype).reshape(batch, groups, -1, dim)
    logits = (stacked @ key.to(dtype).mT * dim**-0.5).view(batch, heads, rows, keys)
    logits.masked_fill_(future(rows, keys, key.device), float("-inf"))
    return logits.softmax(-1).nan_to_num_()


def future(rows: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each of the last ``rows`` positions must not read: bool [rows, keys]."""
    position = torch.arange(keys - rows, keys, device=device)[:, None]
    return torch.arange(keys, device=device) > position


def row_ranges(rows: int, width: int, align: int = 1, start: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold ``WEIGHTS_AT_A_TIME`` weights, ``width`` for each row.

    All but the last end where ``start + row`` is a multiple of ``align``: blocks stay whole.
    """
    step = max(WEIGHTS_AT_A_TIME // (width * align), 1) * align
    first = 0
    while first < rows:
        last = min(first + step - (start + first) % align, rows)
        yield first, last
        first = last


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum over each diagonal q - k of the last rows: [..., keys], by offset.

    The rows are flipped and written one after the other with a gap, which shifts each by one
    more place than the row before: diagonals stand in columns.
    """
    rows, keys = weights.shape[-2:]
    line = torch.nn.functional.pad(weights.flip(-1), (0, rows)).flatten(-2)
    skewed = line[..., : rows * (keys + rows - 1)].unflatten(-1, (rows, -1))
    return skewed.sum(-2)[..., rows - 1 :]


def line_sums(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, summed over columns and diagonals: float32 [b, h, keys] each.

    A few heads or rows at a time: the weights of all would be gigabytes where keys are a million.
    """
    (batch, heads, rows, _), (groups, keys) = query.shape, key.shape[1:3]
    members = heads // groups
    columns = query.new_zeros(batch, heads, keys, dtype=torch.float32)
    diagonals = torch.zeros_like(columns)
    step = max(WEIGHTS_AT_A_TIME // (batch * members * rows * keys), 1)
    for first in range(0, groups, step):
        own = slice(first * members, (first + step) * members)
        for start, stop in row_ranges(rows, batch * members * step * keys):
            seen = keys - rows + stop
            weights = _last_rows(query[:, own, start:stop], key[:, first : first + step, :seen])
            columns[:, own, :seen] += weights.sum(-2)
            diagonals[:, own, :seen] += diagonal_sums(weights)
    return columns, diagonals


def _last_rows(query: Tensor, key: Tensor) -> Tensor:
    """Causal softmax of the last queries: float32 [b, h, rows, keys]."""
    rows, keys = query.shape[2], key.shape[2]
    key = repeat_heads(key, query.shape[1])
    logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
    return logits.masked_fill(future(rows, keys, query.device), float("-inf")).softmax(-1)


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension, of which the last may be short."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block))
    return x.unflatten(-1, (-1, block)).sum(-1)


def block_means(x: Tensor, start: int, block: int) -> Tensor:
    """Mean over each block of positions [start, start + n): float32 [b, heads, blocks, d]."""
    b, heads, n, d = x.shape
    first, blocks = start // block, -(-(start + n) // block) - start // block
    number = torch.arange(start, start + n, device=x.device) // block - first
    total = torch.zeros(b, heads, blocks, d, device=x.device)
    total.index_add_(2, number, x.float())
    border = torch.arange(first, first + blocks + 1, device=x.device) * block
    return total / border.clamp(start, start + n).diff()[:, None]


def smallest_set(
    weights: Tensor, share: float, forced: Tensor | None = None, most: int = 0
) -> Tensor:
    """The fewest entries of each row that have ``share`` of its sum: bool, like ``weights``.

    Args:
        weights: [..., n], 0 or more; on a tie the earlier entry comes first.
        share: of the row's sum; from 1 on no entry is left out for it.
        forced: bool [..., n], entries that are always in the set: taken before all others, so
            what they weigh counts.
        most: entries of a set at most; 0 for any number.
    """
    rank = weights if forced is None else weights.masked_fill(forced, float("inf"))
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.ones_like(order, dtype=torch.bool)
    if share < 1:
        total = weights.gather(-1, order).cumsum(-1)
        before = torch.nn.functional.pad(total[..., :-1], (1, 0))
        keep = before < share * total[..., -1:]
    if most:
        keep[..., most:] = False
    chosen = torch.zeros_like(keep).scatter_(-1, order, keep)
    return chosen if forced is None else chosen | forced
