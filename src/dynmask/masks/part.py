"""A part of a mask: some of its query rows, as a mask of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import bad
from .base import Mask
from .block import BlockMask
from .lifetime import LifetimeMask
from .mixed import MixedMask
from .placed import PlacedMask, Span
from .structural import StructuralMask
from .union import UnionMask


def part_of(mask: Mask, rows: tuple[int, int]) -> Mask:
    """The mask of query rows [rows[0], rows[1]), over the keys up to the last row's own.

    Later keys are visible to none of them. What a row reads does not change: the part is again
    about the last positions of its keys.

    Args:
        mask: any of dynmask's masks.
        rows: a non-empty range of its query rows.

    Returns:
        A mask with ``rows[1] - rows[0]`` queries and ``mask.offset + rows[1]`` keys (views of the
        tensors of ``mask`` where there is nothing to change).

    Raises:
        ValueError: an empty range or one outside the mask, or a mask of another kind.
    """
    first, last = mask._range(rows)
    keys, queries = mask.offset + last, last - first
    if isinstance(mask, LifetimeMask):
        return _lifetime(mask, keys, queries)
    if isinstance(mask, MixedMask):
        return MixedMask(tuple(part_of(p, rows) for p in mask.parts), mask.of)
    if isinstance(mask, UnionMask):
        return UnionMask(tuple(part_of(p, rows) for p in mask.parts))
    if isinstance(mask, PlacedMask):
        return _placed(mask, first, last)
    if not isinstance(mask, StructuralMask | BlockMask):
        raise bad(
            "mask", "a mask of dynmask.masks", type(mask).__name__,
            "Build it of LifetimeMask, StructuralMask and BlockMask.",
        )  # fmt: skip
    changed: dict[str, Any] = {"keys": keys, "queries": queries, "checked": True}
    if mask.limit is not None:
        changed["limit"] = _lifetime(mask.limit, keys, queries)
    if isinstance(mask, StructuralMask):
        return replace(mask, **changed)
    block = (mask.offset + first) // mask.block_q - mask.first_block
    stop = (keys - 1) // mask.block_q - mask.first_block + 1
    index = mask.index[:, :, block:stop]
    # lists ascend: what lies in the future of all rows is at their ends
    changed["index"] = index.masked_fill(index > (keys - 1) // mask.block_k, -1)
    return replace(mask, **changed)


def _lifetime(mask: LifetimeMask, keys: int, queries: int) -> LifetimeMask:
    """The last ``queries`` of the first ``keys``: the mask of a prefix is the mask's prefix."""
    most = None if mask.most is None else min(mask.most, keys)
    return LifetimeMask(mask.death[..., :keys], queries, mask.plain, most)


def _placed(mask: PlacedMask, first: int, last: int) -> Mask:
    """Each sequence's rows in the range; a mask that lets nothing through where there are none."""
    masks, spans, keys = [], [], mask.offset + last
    for own, s in zip(mask.masks, mask.spans, strict=True):
        a, b = max(first, s.query_start), min(last, s.query_stop)
        if a < b:
            masks.append(part_of(own, (a - s.query_start, b - s.query_start)))
            stop = s.key_start + masks[-1].keys
            spans.append(Span(s.batch, s.key_start, stop, a - first, b - first))
            keys = max(keys, stop)
    if masks:
        return PlacedMask(tuple(masks), tuple(spans), mask.batch, last - first, keys)
    never = torch.zeros(mask.batch, 1, keys, dtype=torch.int32, device=mask.device)
    return LifetimeMask(never, last - first, most=1)
