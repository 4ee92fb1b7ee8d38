"""MixedMask: heads of different kinds in one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Entries, Plan, Tiles
from .base import Mask, check_limit, check_same_size, repeat_heads
from .lifetime import LifetimeMask
from .union import UnionMask


@dataclass(frozen=True, eq=False)
class MixedMask(UnionMask):
    """Head i reads by the part ``of[i]`` and by no other.

    The kernels run each part by itself, in the form that suits its kind, and each head's output is
    taken from its own part: lists of keys and of key blocks need not become one. What a part says
    of heads that are not its own is never read; a part that lets them read nothing costs least.

    Args:
        parts: masks of the same queries and keys, each for all heads (or one for a group alike).
        of: for each head the number of its part.
    """

    of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or not self.of:
            raise ValueError("mixed masks: expected parts and a part for each head, received none")
        for part in self.parts:
            check_same_size(self.parts[0], part)
            if len(self.of) % part.heads or isinstance(part, MixedMask):
                raise ValueError(
                    f"mixed masks: expected parts whose heads divide {len(self.of)}, not mixed "
                    f"themselves, received a {type(part).__name__} of {part.heads}"
                )
        if not all(0 <= number < len(self.parts) for number in self.of):
            raise ValueError(
                f"mixed masks: expected numbers of {len(self.parts)} parts, received {self.of}"
            )

    @property
    def heads(self) -> int:
        """Heads with choices of their own."""
        return len(self.of)

    def own(self, number: int) -> Tensor:
        """Which heads are those of a part: bool [heads], on the mask's device."""
        chosen = torch.tensor([number == other for other in self.of])
        return chosen.to(self.device, non_blocking=True)

    def pick(self, results: list[Tensor]) -> Tensor:
        """Of each part's result [b, heads, ...] its own heads: [b, heads, ...]."""
        out = repeat_heads(results[0], self.heads)
        for number, other in enumerate(results[1:], 1):
            own = self.own(number).view(-1, *[1] * (other.dim() - 2))
            out = torch.where(own, repeat_heads(other, self.heads), out)
        return out

    def expand(self, batch: int) -> MixedMask:
        """The same mask for ``batch`` batch rows."""
        return MixedMask(tuple(p.expand(batch) for p in self.parts), self.of)

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys], each head by its part's meaning."""
        return self.pick([part.dense(rows) for part in self.parts])

    def density(self) -> Tensor:
        """Kept pairs over causal pairs: float32 [b, heads]."""
        found = [part.density().expand(self.batch, -1) for part in self.parts]
        return self.pick(found)

    def __and__(self, other: LifetimeMask) -> MixedMask:
        """Intersection with a lifetime mask, part by part."""
        check_limit(other)
        return MixedMask(tuple(p & other for p in self.parts), self.of)  # type: ignore[operator]

    def __or__(self, other: Mask) -> Mask:
        """Union."""
        check_same_size(self, other)
        return UnionMask((self, other))

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """One plan of all parts, for where they cannot be run one by one."""
        merged: Entries | None = None
        for number, part in enumerate(self.parts):
            plan = part.expand(self.batch).lower_tiles(tiles).expand_heads(self.heads)
            entries = Entries.of(plan, exact=not tiles.fused)
            other = ~self.own(number)[:, None, None, None]
            entries = Entries(entries.keys, entries.words.masked_fill(other, 0), entries.exact)
            merged = entries if merged is None else merged | entries
        assert merged is not None
        if len(self.parts) == 1:
            merged = Entries.sort(merged.keys, merged.words, merged.exact)
        return merged.plan(tiles, (self.batch, self.queries, self.keys))
