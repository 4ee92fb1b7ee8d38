"""PlacedMask: masks of single sequences, placed in packed or padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.ops import fused as is_fused
from ..plan import Entries, Plan, Tiles
from .base import Mask, check_sizes, repeat_heads
from .lifetime import LifetimeMask


@dataclass(frozen=True)
class Span:
    """Where one sequence lies: a batch row, its keys and its query rows (half-open ranges)."""

    batch: int
    key_start: int
    key_stop: int
    query_start: int
    query_stop: int

    @property
    def keys(self) -> slice:
        """Slice of the key axis."""
        return slice(self.key_start, self.key_stop)

    @property
    def queries(self) -> slice:
        """Slice of the query axis."""
        return slice(self.query_start, self.query_stop)


def spans_left_padded(lengths: Sequence[int], keys: int, queries: int | None = None) -> list[Span]:
    """Spans of a left-padded batch: sequence i fills the last ``lengths[i]`` of ``keys``."""
    queries = keys if queries is None else queries
    _check_lengths(lengths, keys)
    return [Span(i, keys - n, keys, max(queries - n, 0), queries) for i, n in enumerate(lengths)]


def spans_right_padded(lengths: Sequence[int], keys: int) -> list[Span]:
    """Spans of a right-padded batch: sequence i fills the first ``lengths[i]`` of ``keys``."""
    _check_lengths(lengths, keys)
    return [Span(i, 0, n, 0, n) for i, n in enumerate(lengths)]


def spans_packed(cu_seqlens: Sequence[int] | Tensor) -> list[Span]:
    """Spans of sequences laid end to end in one batch row, from their cumulative lengths."""
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() != 1:
        raise ValueError(
            "cu_seqlens: expected cumulative lengths [sequences + 1], received a tensor "
            f"{list(cu_seqlens.shape)}; for lengths 3 and 5 pass [0, 3, 8]"
        )
    ends = [int(x) for x in cu_seqlens]
    if len(ends) < 2 or ends[0] != 0 or any(b <= a for a, b in pairwise(ends)):
        raise ValueError(
            "cu_seqlens: expected ascending cumulative lengths that start at 0, received "
            f"{ends[:8]}; for lengths 3 and 5 pass [0, 3, 8]"
        )
    return [Span(0, a, b, a, b) for a, b in pairwise(ends)]


def _check_lengths(lengths: Sequence[int], keys: int) -> None:
    if not lengths or any(not 1 <= n <= keys for n in lengths):
        raise ValueError(
            f"lengths: expected one length from 1 to {keys} for each batch row, received "
            f"{list(lengths)}; leave out sequences without tokens"
        )


def _check_disjoint(spans: Sequence[Span]) -> None:
    """Raise ValueError where two sequences share a key or a query row."""
    order = sorted(spans, key=lambda s: (s.batch, s.key_start))
    for a, b in pairwise(order):
        if a.batch == b.batch and (a.key_stop > b.key_start or a.query_stop > b.query_start):
            raise ValueError(f"spans: expected disjoint ones, received {a} and {b}")


@dataclass(frozen=True, eq=False)
class PlacedMask(Mask):
    """One mask per sequence and where each sequence lies; nothing else is visible.

    A mask knows nothing of padding: it is about its own sequence, so a padded or packed batch is
    each sequence alone by construction. Query rows outside every span see no key.

    Args:
        masks: one for each span, of batch 1, as large as the span.
        spans: disjoint.
        batch: batch rows of the tensors.
        queries, keys: query rows and keys of the tensors.
    """

    masks: tuple[Mask, ...]
    spans: tuple[Span, ...]
    batch: int  # type: ignore[assignment]
    queries: int
    keys: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        object.__setattr__(self, "spans", tuple(self.spans))
        if not self.masks or len(self.masks) != len(self.spans):
            raise ValueError(
                f"masks: expected one for each of {len(self.spans)} spans (at least one), "
                f"received {len(self.masks)}"
            )
        for mask, s in zip(self.masks, self.spans, strict=True):
            check_sizes(self.keys, self.queries)
            if self.heads % mask.heads:
                raise ValueError(
                    f"masks: expected heads that divide the most of them, {self.heads}, "
                    f"received {mask.heads}"
                )
            size = (s.key_stop - s.key_start, s.query_stop - s.query_start)
            inside = (
                0 <= s.batch < self.batch
                and 0 <= s.key_start < s.key_stop <= self.keys
                and 0 <= s.query_start < s.query_stop <= self.queries
            )
            if not inside or mask.batch != 1 or (mask.keys, mask.queries) != size:
                raise ValueError(
                    f"masks: expected a mask of batch 1 with the keys and queries of its span "
                    f"{s} inside {self.batch} x {self.queries} x {self.keys}, received batch "
                    f"{mask.batch}, {mask.queries} queries, {mask.keys} keys"
                )

        _check_disjoint(self.spans)

    @property
    def heads(self) -> int:
        """The most heads that one of the masks has."""
        return max(m.heads for m in self.masks)

    @property
    def device(self) -> torch.device:
        """Device of the masks."""
        return self.masks[0].device

    def expand(self, batch: int) -> PlacedMask:
        """The mask itself: it is about given batch rows."""
        if batch != self.batch:
            raise ValueError(
                f"batch: expected {self.batch} batch rows, for which the sequences were placed, "
                f"received {batch}"
            )
        return self

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys]."""
        first, last = self._range(rows)
        out = torch.zeros(
            self.batch, self.heads, last - first, self.keys, dtype=torch.bool, device=self.device
        )
        for mask, s in zip(self.masks, self.spans, strict=True):
            a, b = max(first, s.query_start), min(last, s.query_stop)
            if a < b:
                own = mask.dense((a - s.query_start, b - s.query_start))
                out[s.batch, :, a - first : b - first, s.keys] = repeat_heads(own, self.heads)[0]
        return out

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """The smallest tile that a sequence's mask prefers."""
        return min(mask.preferred_tile(fused, members) for mask in self.masks)

    def backward_tile(self, members: int = 1) -> int:
        """The smallest tile that a sequence's mask prefers there."""
        return min(mask.backward_tile(members) for mask in self.masks)

    def list_words(self, tile: int) -> int:
        """Integers in the lists of one tile at most."""
        return max(mask.list_words(tile) for mask in self.masks)

    def density(self) -> Tensor:
        """Kept pairs over the causal pairs of the sequences: float32 [batch, heads]."""
        kept = torch.zeros(self.batch, self.heads, device=self.device)
        pairs = torch.zeros(self.batch, 1, device=self.device)
        for mask, s in zip(self.masks, self.spans, strict=True):
            kept[s.batch] += repeat_heads(mask.density(), self.heads)[0] * mask.causal_pairs()
            pairs[s.batch] += mask.causal_pairs()
        return kept / pairs.clamp(min=1)

    def __and__(self, other: LifetimeMask) -> PlacedMask:
        """Not defined: limit the sequences' own masks."""
        raise ValueError(
            "placed masks: expected limits on each sequence's own mask, received one for the "
            "whole tensor; write PlacedMask([m & limit for m in masks], ...)"
        )

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Not defined for tiles of the whole tensor: sequences begin at different rows."""
        raise ValueError(
            "placed masks: expected to be lowered a range of rows at a time, received tiles; "
            "unite the sequences' own masks before placing them"
        )

    def lower(
        self,
        rows: tuple[int, int] | None = None,
        tile: int | None = None,
        fused: bool | None = None,
    ) -> Plan:
        """Lower every sequence's rows in the range and join the plans."""
        first, last = self._range(rows)
        plans = []
        for mask, s in zip(self.masks, self.spans, strict=True):
            a, b = max(first, s.query_start), min(last, s.query_stop)
            if a < b:
                own = mask.lower((a - s.query_start, b - s.query_start), tile, fused)
                plans.append((own.expand_heads(self.heads), s))
        if not plans:
            return self._nothing()
        if len({plan.block for plan, _ in plans}) > 1:
            plans = [(plan.single_keys(), s) for plan, s in plans]
        if len({p.block for p, _ in plans}) > 1 or any(p.bits is not None for p, _ in plans):
            exact = not (is_fused(self.device) if fused is None else fused)
            plans = [(_as_bits(plan, exact), s) for plan, s in plans]
        return self._join(plans)

    def _join(self, plans: list[tuple[Plan, Span]]) -> Plan:
        """One plan from plans of single sequences: shift rows and keys, pad the lists."""
        tile = max(plan.tile for plan, _ in plans)
        index, bits = [], []
        cap = max(plan.index.shape[-1] for plan, _ in plans)
        edge = max((p.bits.shape[2] for p, _ in plans if p.bits is not None), default=0)
        for plan, s in plans:
            own = plan.index + s.key_start
            index.append(torch.nn.functional.pad(own, (0, cap - own.shape[-1])))
            if plan.bits is not None:
                words = -(-tile // 32) - plan.bits.shape[-1]
                pad = (0, words, 0, edge - plan.bits.shape[2])
                bits.append(torch.nn.functional.pad(plan.bits, pad))
        first = plans[0][0]
        return replace(
            first,
            batch=torch.cat([torch.full_like(p.batch, s.batch) for p, s in plans]),
            row=torch.cat([p.row + s.query_start for p, s in plans]),
            rows=torch.cat([p.rows for p, _ in plans]),
            position=torch.cat([p.position + s.key_start for p, s in plans]),
            index=torch.cat(index, 1),
            full=torch.cat([p.full for p, _ in plans], 1),
            count=torch.cat([p.count for p, _ in plans], 1),
            tile=tile,
            shape=(self.batch, self.queries, self.keys),
            death=None if bits else self._death(plans),
            bits=torch.cat(bits, 1) if bits else None,
        )

    def _death(self, plans: list[tuple[Plan, Span]]) -> Tensor:
        """Lifetimes in the tensor's own key indices: a sequence's keys die at its end."""
        death = torch.zeros(
            self.batch, self.heads, self.keys, dtype=torch.int32, device=self.device
        )
        for plan, s in plans:
            end = torch.full((self.heads, s.key_stop - s.key_start), s.key_stop, device=self.device)
            if plan.death is not None:
                # compare before adding, an endless life must not overflow
                own = plan.death[0].long() + s.key_start
                end = torch.minimum(own.expand_as(end), end)
            death[s.batch, :, s.keys] = end.int()
        return death

    def _nothing(self) -> Plan:
        """The plan of a range of rows that lies in no sequence: no tiles."""
        none = torch.zeros(0, dtype=torch.int32, device=self.device)
        counts = none.expand(self.heads, 0)
        shape = (self.batch, self.queries, self.keys)
        return Plan(none, none, none, none, counts[..., None], counts, counts, 1, shape)


def _as_bits(plan: Plan, exact: bool) -> Plan:
    """The same plan with single keys and the bit rule."""
    if plan.bits is not None:
        return plan
    tiles = Tiles(plan.batch, plan.row, plan.rows, plan.position, plan.tile, 0, plan.shape[2])
    return Entries.of(plan, exact).plan(tiles, plan.shape)
