"""UnionMask: a union of masks of different kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import WORD, Entries, Plan, Tiles
from .base import Mask, check_limit, repeat_heads
from .block import BlockMask
from .lifetime import LifetimeMask


@dataclass(frozen=True, eq=False)
class UnionMask(Mask):
    """A pair is visible when one of ``parts`` lets it through. Built by ``a | b``."""

    parts: tuple[Mask, ...]

    @property
    def keys(self) -> int:  # type: ignore[override]
        """Keys in the tensor."""
        return self.parts[0].keys

    @property
    def queries(self) -> int:  # type: ignore[override]
        """Query rows."""
        return self.parts[0].queries

    @property
    def batch(self) -> int:
        """Batch rows with choices of their own."""
        return max(p.batch for p in self.parts)

    @property
    def heads(self) -> int:
        """Heads with choices of their own."""
        return max(p.heads for p in self.parts)

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.parts[0].device

    def expand(self, batch: int) -> UnionMask:
        """The same mask for ``batch`` batch rows."""
        return UnionMask(tuple(p.expand(batch) for p in self.parts))

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys], the union of the parts' meanings."""
        out = repeat_heads(self.parts[0].dense(rows), self.heads)
        for part in self.parts[1:]:
            out = out | repeat_heads(part.dense(rows), self.heads)
        return out

    def __and__(self, other: LifetimeMask) -> UnionMask:
        """Intersection with a lifetime mask, part by part."""
        check_limit(other)
        return UnionMask(tuple(p & other for p in self.parts))

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """The smallest tile that a part prefers."""
        return min(p.preferred_tile(fused, members) for p in self.parts)

    def list_words(self, tile: int) -> int:
        """Integers in the lists of one tile at most: keys and the bits of each."""
        keys = 0
        for part in self.parts:
            keys += part.list_words(tile) * (part.block_k if isinstance(part, BlockMask) else 1)
        return min(keys, self.keys) * (1 + -(-tile // WORD))

    def cuts(self) -> Iterable[int]:
        """Where the rule of a part changes."""
        return [x for part in self.parts for x in part.cuts()]

    def borders(self, first: int, stop: int) -> Iterable[int]:
        """The borders of every part."""
        return [x for part in self.parts for x in part.borders(first, stop)]

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Merge the parts' key lists tile by tile."""
        merged: Entries | None = None
        for part in self.parts:
            plan = part.expand(self.batch).lower_tiles(tiles)
            entries = Entries.of(plan.expand_heads(self.heads), exact=not tiles.fused)
            merged = entries if merged is None else merged | entries
        assert merged is not None
        return merged.plan(tiles, (self.batch, self.queries, self.keys))
