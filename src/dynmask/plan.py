"""Plan: what a kernel executes, the lowered form of a mask.

A plan cuts the query rows into tiles and lists, for every (head, tile), the keys that the tile
reads: first those that every row of the tile sees (no masking needed), then the boundary, where
one element rule decides. Its size follows the kept keys, never rows x keys, and a mask can be
lowered a range of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

WORD = 32
"""Rows of a tile that one int32 of a bit rule describes."""

NO_KEY = 2**31 - 1
"""Padding in key lists: sorts after every key."""


@dataclass(frozen=True)
class Plan:
    """Key lists of every (head, query tile), and one element rule for their boundary.

    Shapes: ``t`` tiles (of all batch rows), ``heads`` is 1, the kv heads or the query heads.

    Attributes:
        batch: int32 [t], batch row of the tile.
        row: int32 [t], first query row.
        rows: int32 [t], query rows of the tile, 1 to ``tile``.
        position: int32 [t], key index of the first row itself (bottom-right aligned).
        index: int32 [heads, t, cap], first key of each entry: the ``full`` entries, then the
            boundary entries, then padding; each part is sorted by key, or by verticals before
            diagonals where the fused lowering of a structural mask wrote it.
        full: int32 [heads, t], entries that every row of the tile sees whole.
        count: int32 [heads, t], entries in all.
        tile: largest number of rows of a tile.
        shape: (batch rows, query rows, keys) of the tensors that the plan is for.
        block: keys of one entry. The last entry may reach past the last key.
        death: int32 [b, heads, keys] or None. Element rule ``k <= q < death[k]``.
        bits: int32 [heads, t, boundary, ceil(tile / 32)] or None. Element rule: bit i of entry j
            says whether row i of the tile sees the j-th boundary key (``block`` is 1).
        even: whether all heads are known to have about equally long lists.

    With neither ``death`` nor ``bits`` the element rule is causal, ``k <= q``.
    """

    batch: Tensor
    row: Tensor
    rows: Tensor
    position: Tensor
    index: Tensor
    full: Tensor
    count: Tensor
    tile: int
    shape: tuple[int, int, int]
    block: int = 1
    death: Tensor | None = None
    bits: Tensor | None = None
    even: bool = False

    @property
    def heads(self) -> int:
        """Heads that have lists of their own: 1, the kv heads or the query heads."""
        return self.index.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles, those of all batch rows together."""
        return self.index.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and their rules; lifetimes belong to the mask."""
        tensors = (self.batch, self.row, self.rows, self.position, self.index, self.full,
                   self.count, self.bits)  # fmt: skip
        return sum(x.nbytes for x in tensors if x is not None)

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.index.device

    def boundary(self, head: int, t: int) -> tuple[Tensor, Tensor]:
        """Keys of a tile's boundary and which of its rows see them.

        Returns:
            keys: int64 [n], may hold keys past the last one (then no row sees them).
            seen: bool [rows of the tile, n].
        """
        full, count = int(self.full[head, t]), int(self.count[head, t])
        rows, position = int(self.rows[t]), int(self.position[t])
        keys = self.index[head, t, full:count].long()
        if self.bits is not None:
            return keys, unpack_rows(self.bits[head, t, : count - full], rows).T
        if self.block > 1:
            keys = (keys[:, None] + torch.arange(self.block, device=self.device)).flatten()
        query = torch.arange(position, position + rows, device=self.device)[:, None]
        seen = (keys <= query) & (keys < self.shape[2])
        if self.death is not None:
            death = self.death[int(self.batch[t]), head]
            seen &= query < death[keys.clamp(max=self.shape[2] - 1)]
        return keys, seen

    def dense(self) -> Tensor:
        """The pairs that the plan computes: bool [b, heads, query rows, keys]."""
        b, queries, keys = self.shape
        out = torch.zeros(b, self.heads, queries, keys, dtype=torch.bool, device=self.device)
        span = torch.arange(self.block, device=self.device)
        for t in range(self.tiles):
            rows = slice(int(self.row[t]), int(self.row[t] + self.rows[t]))
            for head in range(self.heads):
                tile = out[int(self.batch[t]), head, rows]
                whole = self.index[head, t, : int(self.full[head, t])].long()
                tile[:, (whole[:, None] + span).flatten()] = True
                listed, seen = self.boundary(head, t)
                inside = listed < keys
                tile[:, listed[inside]] |= seen[:, inside]
        return out

    def kept(self) -> Tensor:
        """Visible pairs per batch row and head: int64 [b, heads]."""
        total = torch.zeros(self.shape[0], self.heads, dtype=torch.int64, device=self.device)
        pairs = self.full.long() * self.block * self.rows.long()
        if self.bits is not None:
            slot = torch.arange(self.bits.shape[2], device=self.device)
            edge = slot < (self.count - self.full)[..., None]  # padding may be anything
            pairs += count_bits(self.bits).sum(-1).masked_fill(~edge, 0).sum(-1)
        else:
            pairs += self._boundary_pairs()
        return total.index_add_(0, self.batch.long(), pairs.T.contiguous())

    def _boundary_pairs(self) -> Tensor:
        """Visible pairs of each tile's boundary under the interval rules: int64 [heads, t]."""
        slot = torch.arange(self.index.shape[-1], device=self.device)
        edge = (slot >= self.full[..., None]) & (slot < self.count[..., None])
        index = self.index.masked_fill(~edge, self.shape[2])  # padding may be anything
        keys = index[..., None].long() + torch.arange(self.block, device=self.device)
        first = self.position.long()[:, None, None]
        stop = first + self.rows.long()[:, None, None]
        inside = edge[..., None] & (keys < self.shape[2])
        if self.death is not None:
            head = torch.arange(self.heads, device=self.device)[:, None, None, None]
            batch = self.batch.long()[:, None, None]
            death = self.death.expand(-1, self.heads, -1)
            ends = death[batch, head, keys.clamp(max=self.shape[2] - 1)].long()
            stop = torch.minimum(stop, ends)
        rows = (stop - torch.maximum(keys, first)).clamp(min=0)
        return rows.masked_fill(~inside, 0).sum((-1, -2))

    def work(self) -> Tensor:
        """Pairs that a kernel computes, boundary entries whole: int64 [heads]."""
        return (self.count.long() * self.block * self.rows.long()).sum(-1)

    def single_keys(self) -> Plan:
        """Key blocks under the causal rule as single keys; any other plan as it is."""
        if self.block == 1 or self.bits is not None or self.death is not None:
            return self
        span = torch.arange(self.block, dtype=torch.int32, device=self.device)
        index = (self.index[..., None] + span).flatten(-2)
        # of the boundary, which ascends, the keys after the tile's last row are at the end
        full, count, stop = (
            self.full * self.block,
            self.count * self.block,
            self.position + self.rows,
        )
        slot = torch.arange(index.shape[-1], device=self.device)
        late = (slot >= full[..., None]) & (slot < count[..., None]) & (index >= stop[:, None])
        count = count - late.sum(-1, dtype=torch.int32)
        return replace(self, index=index, full=full, count=count, block=1)

    def expand_heads(self, heads: int) -> Plan:
        """The same plan with its lists repeated for ``heads`` heads (grouped order)."""
        if heads == self.heads:
            return self
        times = heads // self.heads

        def repeat(x: Tensor, dim: int) -> Tensor:
            return x.repeat_interleave(times, dim)

        return replace(
            self,
            index=repeat(self.index, 0),
            full=repeat(self.full, 0),
            count=repeat(self.count, 0),
            death=None if self.death is None else repeat(self.death, 1),
            bits=None if self.bits is None else repeat(self.bits, 0),
        )


@dataclass(frozen=True)
class Tiles:
    """How query rows of every batch row are cut into tiles (batch-major).

    ``first`` and ``stop`` are the range of positions that the tiles cover, on the host; ``fused``
    says whether to lower by the fused kernels, ``regular`` whether tile i begins i sizes after
    the first (no border cut one short).
    """

    batch: Tensor
    row: Tensor
    rows: Tensor
    position: Tensor
    size: int
    first: int
    stop: int
    fused: bool = False
    regular: bool = True

    @classmethod
    def cut(
        cls,
        batch: int,
        rows: tuple[int, int],
        offset: int,
        size: int,
        device: torch.device,
        borders: Iterable[int] = (),
        fused: bool = False,
    ) -> Tiles:
        """Cut rows [rows[0], rows[1]) into tiles of at most ``size`` rows.

        Args:
            batch: batch rows.
            rows: range of query rows.
            offset: key index of query row 0.
            size: largest tile.
            device: where the table lives.
            borders: positions that no tile straddles; a tile starts anew at each.
            fused: lower by the fused kernels.
        """
        first, stop = rows[0] + offset, rows[1] + offset
        inside = sorted({x for x in borders if first < x < stop})
        if all((x - first) % size == 0 for x in inside):
            inside = []  # tiles begin there anyhow
        cuts = [first, *inside, stop]
        # made where they live: a copy from the host would wait for the device
        starts = [
            torch.arange(a, b, size, dtype=torch.int32, device=device) for a, b in pairwise(cuts)
        ]
        stops = [(b - x).clamp(max=size) for x, b in zip(starts, cuts[1:], strict=True)]
        position, count = (x[0] if len(x) == 1 else torch.cat(x) for x in (starts, stops))
        number = torch.zeros_like(position)
        if batch > 1:
            each = torch.arange(batch, dtype=torch.int32, device=device)
            number = each[:, None].expand(batch, len(position)).flatten()
            position, count = position.repeat(batch), count.repeat(batch)
        return cls(
            batch=number,
            row=position - offset,
            rows=count,
            position=position,
            size=size,
            first=first,
            stop=stop,
            fused=fused,
            regular=len(cuts) == 2,
        )

    def __len__(self) -> int:
        return self.row.shape[0]

    def plan(
        self,
        index: Tensor,
        full: Tensor,
        count: Tensor,
        shape: tuple[int, int, int],
        **rule: Any,
    ) -> Plan:
        """The plan of these tiles; ``rule`` is block, death, bits and even as in :class:`Plan`."""
        return Plan(
            batch=self.batch,
            row=self.row,
            rows=self.rows,
            position=self.position,
            index=index,
            full=full,
            count=count,
            tile=self.size,
            shape=shape,
            **rule,
        )


def pack_rows(seen: Tensor) -> Tensor:
    """Pack bool [..., rows] into int32 [..., ceil(rows / 32)], row i in bit i % 32 of its word.

    Eight booleans are eight bytes of 0 or 1, read as one integer; one product moves their lowest
    bits side by side into its top byte (no two of its terms meet in a bit, so nothing carries).
    """
    if seen.shape[-1] % WORD:
        seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % WORD))
    eights = seen.reshape(-1).view(torch.int64)
    words = ((eights * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)
    return words.view(*seen.shape[:-1], seen.shape[-1] // WORD)


def unpack_rows(words: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack_rows`: bool [..., rows]."""
    shift = torch.arange(WORD, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shift) & 1).bool().flatten(-2)[..., :rows]


def count_bits(words: Tensor) -> Tensor:
    """Set bits of each int32 word, int64, by adding neighbours in ever wider fields."""
    x = words.long() & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24


def row_words(tiles: Tiles) -> Tensor:
    """The bits of a key that every row of its tile sees: int32 [t, ceil(tile / 32)]."""
    return pack_rows(torch.arange(tiles.size, device=tiles.rows.device) < tiles.rows[:, None])


def compact(
    full: Tensor, partial: Tensor | None = None, cap: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the flagged keys, the full ones first, each part in the order of the flags.

    Args:
        full, partial: bool [..., n], disjoint; ``partial`` None where none is.
        cap: capacity of the lists; their longest when None, which waits for the device.

    Returns:
        slot: int64 [..., n], place of each key in its list; ``cap`` where it is in none.
        full count and total count: int32 [...].
    """
    fulls = count = full.sum(-1, dtype=torch.int32)
    slot, listed = full.cumsum(-1), full
    if partial is not None:
        count = fulls + partial.sum(-1, dtype=torch.int32)
        slot = torch.where(full, slot, fulls[..., None] + partial.cumsum(-1))
        listed = full | partial
    if cap is None:
        cap = int(count.max()) if count.numel() else 0
    return torch.where(listed, slot - 1, cap), fulls, count


def place(values: Tensor, slot: Tensor, cap: int, fill: int) -> Tensor:
    """Scatter ``values`` [..., n] to the slots of :func:`compact`: [..., cap]."""
    out = torch.full((*slot.shape[:-1], cap + 1), fill, dtype=values.dtype, device=values.device)
    return out.scatter_(-1, slot, values.expand(slot.shape))[..., :cap]


@dataclass(frozen=True)
class Entries:
    """Keys of every (head, tile) with the rows that see them: what unions and limits work on.

    Attributes:
        keys: int32 [heads, t, n], ascending, padded with ``NO_KEY``.
        words: int32 [heads, t, n, ceil(tile / 32)], 0 for padding.
        exact: lists are cut to their longest, which waits for the device; else n is a bound.
    """

    keys: Tensor
    words: Tensor
    exact: bool = True

    @classmethod
    def of(cls, plan: Plan, exact: bool = True) -> Entries:
        """Entries of a plan, key blocks spelled out."""
        rows = torch.arange(plan.tile, device=plan.device)
        every = pack_rows(rows < plan.rows[:, None])[:, None]  # [t, 1, words]
        longest = plan.index.shape[-1]
        if exact and plan.count.numel():
            longest = min(max(int(plan.count.max()), 1), longest)
        keys = plan.index[..., :longest]
        slot = torch.arange(longest, device=plan.device)
        listed = (slot < plan.count[..., None]).repeat_interleave(plan.block, -1)
        whole = (slot < plan.full[..., None]).repeat_interleave(plan.block, -1)
        keys = keys.masked_fill(slot >= plan.count[..., None], 0)  # padding may be anything
        if plan.block > 1:
            keys = (keys[..., None] + torch.arange(plan.block, device=plan.device)).flatten(-2)
        words = torch.cat([cls._seen(plan, head, keys[head], slot) for head in range(plan.heads)])
        words = torch.where(whole[..., None], every, words).masked_fill(~listed[..., None], 0)
        return cls.sort(keys.int(), words, exact)

    @staticmethod
    def _seen(plan: Plan, head: int, keys: Tensor, slot: Tensor) -> Tensor:
        """Rows that see each key of one head's lists under the element rule: [1, t, n, words]."""
        if plan.bits is not None:
            edge = (slot - plan.full[head, :, None]).clamp(
                min=0, max=max(plan.bits.shape[2] - 1, 0)
            )
            if not plan.bits.shape[2]:
                return plan.bits.new_zeros(1, *keys.shape, plan.bits.shape[-1])
            wide = edge[..., None].long().expand(-1, -1, plan.bits.shape[-1])
            return plan.bits[head].gather(1, wide)[None]
        query = plan.position[:, None, None] + torch.arange(plan.tile, device=plan.device)
        inside = query < (plan.position + plan.rows)[:, None, None]
        seen = (keys[..., None] <= query) & inside & (keys < plan.shape[2])[..., None]
        if plan.death is not None:
            death = plan.death[plan.batch.long(), head if plan.death.shape[1] > 1 else 0]
            dies = death.gather(-1, keys.clamp(max=plan.shape[2] - 1).long())
            seen &= query < dies[..., None]
        return pack_rows(seen)[None]

    @classmethod
    def sort(cls, keys: Tensor, words: Tensor, exact: bool = True) -> Entries:
        """Sort by key and drop keys that no row sees; a key may stand twice, its rows merge."""
        keys = keys.masked_fill((words == 0).all(-1), NO_KEY)
        keys, order = keys.sort(dim=-1, stable=True)
        if exact:
            cap = max(int((keys != NO_KEY).sum(-1).max()), 1)
            keys, order = keys[..., :cap], order[..., :cap]
        words = words.gather(2, order[..., None].expand(*order.shape, words.shape[-1]))
        twin = ((keys[..., 1:] == keys[..., :-1]) & (keys[..., 1:] != NO_KEY))[..., None]
        if not exact or bool(twin.any()):
            # the second of the two stays; a key without rows is never listed
            words[:, :, 1:] |= words[:, :, :-1].masked_fill(~twin, 0)
            words[:, :, :-1].masked_fill_(twin, 0)
        return cls(keys, words, exact)

    def __or__(self, other: Entries) -> Entries:
        """Keys of either, seen by the rows that see them in either."""
        return Entries.sort(
            torch.cat([self.keys, other.keys], -1),
            torch.cat([self.words, other.words], 2),
            self.exact and other.exact,
        )

    def limit(self, death: Tensor, tiles: Tiles) -> Entries:
        """Only pairs with ``q < death[k]``; ``death`` int32 [b, 1 or heads, keys]."""
        rows = tiles.position[:, None] + torch.arange(tiles.size, device=self.keys.device)
        heads = self.keys.shape[0]
        key = self.keys.clamp(max=death.shape[-1] - 1).long()
        head = torch.arange(heads, device=key.device)[:, None, None]
        ends = death.expand(-1, heads, -1)[tiles.batch.long()[None, :, None], head, key]
        words = self.words & pack_rows(rows[None, :, None, :] < ends[..., None])
        return Entries.sort(self.keys, words, self.exact)

    def plan(self, tiles: Tiles, shape: tuple[int, int, int]) -> Plan:
        """The plan of these entries, with the bit rule for its boundary."""
        every = row_words(tiles)[None, :, None, :]
        some = (self.words != 0).any(-1)
        full = some & (self.words == every).all(-1)
        # no list is longer than all keys up to the last row
        bound = None if self.exact else min(self.keys.shape[-1], max(tiles.stop, 1))
        slot, fulls, count = compact(full, some & ~full, bound)
        cap, width = bound or 0, bound or 0
        if bound is None and count.numel():
            cap, width = int(count.max()), int((count - fulls).max())
        edge = slot - fulls[..., None]
        edge = torch.where((slot < cap) & (edge >= 0), edge, torch.full_like(edge, width))
        bits = torch.stack([place(word, edge, width, 0) for word in self.words.unbind(-1)], -1)
        return tiles.plan(
            index=place(self.keys, slot, cap, 0),
            full=fulls,
            count=count,
            shape=shape,
            bits=bits,
        )
