"""Diagonals that a call's last queries look at, beside a window, sinks and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import StructuralMask
from .blocks import head_runs
from .weights import line_sums


def slash_mask(
    query: Tensor,
    key: Tensor,
    heads: list[int],
    window: Tensor,
    slashes: Tensor,
    verticals: Tensor,
    last: int,
) -> StructuralMask:
    """The window's diagonals, the best ones beyond it, and verticals.

    A diagonal is worth the attention that the last queries give to it, the sum over them (as in
    :class:`dynmask.policies.VerticalSlash`); one that gets none is not read.

    Args:
        query, key: [b, h, q, d] and [b, g, k, d].
        heads: those that choose diagonals, ascending; the others read their own keys alone.
        window: newest keys of each of them, on the host, int64 [b or 1, n].
        slashes: how many diagonals each of them chooses, likewise.
        verticals: keys of each of them that every query reads, int64 [b or 1, n, any], each once;
            those beyond the last key are none.
        last: queries that are looked at.
    """
    every, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    near, count = (x.to(key.device, non_blocking=True)[..., None] for x in (window, slashes))
    worth = _diagonal_sums(query[:, :, -last:], key, heads)
    offset = torch.arange(keys, device=key.device)
    worth.masked_fill_(offset < near, 0)
    most = int(slashes.max())
    found = worth.topk(most, -1)
    chosen = (torch.arange(most, device=key.device) < count) & (found.values > 0)
    far = found.indices.masked_fill(~chosen, keys)
    close = offset[: int(window.max())]
    close = torch.where(close < near, close, keys).expand(len(far), -1, -1)
    diagonals = torch.cat([close, far], -1).sort(-1).values
    longest = min(int((window + slashes).max()), keys)
    return StructuralMask(
        diagonals=_listed(diagonals[..., :longest], heads, every, keys),
        verticals=_listed(verticals.expand(len(far), -1, -1).sort(-1).values, heads, every, keys),
        keys=keys,
        queries=queries,
        bands=most + 1,  # the window is one
        checked=True,
    )


def _diagonal_sums(query: Tensor, key: Tensor, heads: list[int]) -> Tensor:
    """Attention of all these queries, summed over diagonals, of some heads: [b, n, keys]."""
    members = query.shape[1] // key.shape[1]
    runs = head_runs(heads, members, len(heads))
    sums = [line_sums(query[:, heads[own]], key[:, groups])[1] for own, groups in runs]
    return torch.cat(sums, 1)


def _listed(lines: Tensor, heads: list[int], every: int, stop: int) -> Tensor:
    """Ascending lists of some heads among those of all: int32 [b, every, width], -1 as padding.

    Args:
        lines: [b, n, width]; ``stop`` and more stand for none.
        heads: whose lists these are; those of others are empty.
        every: heads of the layer.
        stop: keys.
    """
    batch, _, width = lines.shape
    out = lines.new_full((batch, every, max(width, 1)), -1, dtype=torch.int32)
    out[:, heads, :width] = lines.masked_fill(lines >= stop, -1).int()
    return out


__all__ = ["slash_mask"]
