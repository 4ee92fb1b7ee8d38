"""The guard: looks at a few query rows of a call whether a mask keeps the attention it promised.

Budgets are chosen on documents, and a prompt may be unlike them. The true attention of some query
rows says how much of it a mask keeps, and where that is less than what calibration saw, less what
is tolerated, the map gets wider for this call: twice, four times, eight times what its gate says,
and dense where that is not enough. Looking costs O(rows x keys). Calls of few query rows are not
looked at: a single row's kept mass is no mean that a promise could be compared with. So the guard
watches over prefill, not over decoding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks import LifetimeMask, Mask
from .kept import kept_mass, sampled_rows

GUARD_ROWS = 16
"""Query rows that are looked at, the same as those of a card's kept mass."""

DENSE = 0
"""The factor that stands for a dense map."""

Made = tuple[Mask, Tensor | None]
"""A mask, and a bias of keys or None."""

STEPS = (2, 4, 8, DENSE)
"""How much wider a map gets, one after the other until it keeps enough."""


def widened(
    factor: Tensor,
    keys: int,
    number: int,
    window: Tensor,
    columns: Tensor,
    blocks: Tensor,
    kept: Tensor,
    slashes: Tensor,
) -> tuple[Tensor, ...]:
    """Window, columns, blocks, kept and slashes of maps [h], so many times as wide: [b, h] each.

    A window alone may miss what lies far away, however wide: columns come with it, beside diagonals
    too. A map that chooses blocks stays one, and is dense when it chooses all of them; one that
    keeps by score stays one until it is dense.

    Args:
        factor: [b, h].
        keys, number: of the input, and of its blocks.
        window, columns, blocks, kept, slashes: int64 [h], blocks, kept and slashes above 0 only
            for maps that choose by them.
    """
    times, picks, scored = factor.clamp(min=1), blocks > 0, kept > 0
    wide, many = (window * times).clamp(max=LifetimeMask.INF), (blocks * times).clamp(max=number)
    dense = factor == DENSE
    many = torch.where(dense & picks, number, many)
    wide = torch.where(dense & ~picks, LifetimeMask.INF, wide)
    more = (torch.maximum(columns, window.clamp(max=keys)) * times).clamp(max=keys)
    more = torch.where((times > 1) & ~picks & ~scored, more, columns.expand_as(times))
    return wide, more, many, *((x * times).clamp(max=keys) for x in (kept, slashes))


def guarded(
    query: Tensor, key: Tensor, least: Tensor, make: Callable[[Tensor | None], Made]
) -> tuple[Made, Tensor | None]:
    """A mask whose maps all keep enough of the attention of the sampled rows.

    Args:
        query, key: [b, h, q, d] and [b, g, k, d].
        least: kept mass of each head at least, mean over the rows, [h], on the host.
        make: mask and bias of a factor for each map, [b, h] on the host; None for the gates' own.

    Returns:
        mask and bias, and the factors, int64 [b, h]: 1 where a map stays as it is; None where every
        map was dense already.
    """
    made = make(None)
    if made[0].is_causal:
        return made, None
    rows = sampled_rows(query.shape[2], GUARD_ROWS)
    factor = torch.ones(query.shape[:2], dtype=torch.int64)
    for step in STEPS:
        mass = kept_mass(query, key, made[0], rows).mean(-1)
        short = mass.to(least.device, least.dtype) < least  # waits for the device
        if not bool(short.any()):
            break
        factor = factor.masked_fill(short, step)
        made = make(factor)
    return made, factor
