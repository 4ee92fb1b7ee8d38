"""StructuralMask: diagonals and verticals per head, and the true mask of the first positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import NO_KEY, WORD, Entries, Plan, Tiles, compact, pack_rows, place, row_words
from .base import Mask, check_index, check_limit, check_same_size, check_sizes, repeat_heads
from .lifetime import LifetimeMask

FUSED_TILE = 64
"""Rows of a tile for the fused kernels: a lone diagonal costs as many keys."""


@dataclass(frozen=True, eq=False)
class StructuralMask(Mask):
    """Index sets instead of an S x S table (DAM, arXiv 2506.11104, section 3).

    Row q (a position) below L reads what its row of the true mask says. Every other row reads k
    where ``q - k`` is a diagonal or ``k`` a vertical. Every row reads its own key.

    Args:
        diagonals: int32 [b or 1, heads, D], offsets ``q - k`` in ascending order, -1 at the end
            as padding.
        verticals: int32 [b or 1, heads, V], positions of columns, likewise.
        keys: keys in the tensor.
        queries: query rows, the last ones of the keys; all of them when None.
        true_mask: bool [heads, L, L] or None.
        first_key: position of the tensor's first key in its sequence (trimmed caches).
        limit: intersection with this lifetime mask.
        bands: most runs of neighbouring diagonals that one head has, where known: the fused
            lowering sizes its lists by it.
        checked: the index sets are known to be in order; looking at them waits for a GPU.
    """

    diagonals: Tensor
    verticals: Tensor
    keys: int
    queries: int = None  # type: ignore[assignment]
    true_mask: Tensor | None = None
    first_key: int = 0
    limit: LifetimeMask | None = None
    bands: int | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        if self.queries is None:
            object.__setattr__(self, "queries", self.keys)
        check_sizes(self.keys, self.queries)
        for name in ("diagonals", "verticals"):
            x = getattr(self, name)
            check_index(name, x, 3, "[b, heads, n]")
            if not self.checked:
                _check_sorted(name, x)
        if self.diagonals.shape[:2] != self.verticals.shape[:2]:
            raise ValueError(
                "diagonals and verticals: expected the same [b, heads], received "
                f"{tuple(self.diagonals.shape[:2])} and {tuple(self.verticals.shape[:2])}"
            )
        m = self.true_mask
        if m is not None and (
            m.dtype != torch.bool
            or m.dim() != 3
            or m.shape[0] != self.heads
            or m.shape[1] != m.shape[2]
        ):
            raise ValueError(
                f"true_mask: expected bool [heads, L, L] with {self.heads} heads, received "
                f"{m.dtype} {tuple(m.shape)}"
            )

    @property
    def batch(self) -> int:
        """Batch rows with patterns of their own."""
        return max(self.diagonals.shape[0], 1 if self.limit is None else self.limit.batch)

    @property
    def heads(self) -> int:
        """Heads with patterns of their own."""
        return self.diagonals.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the index sets."""
        return self.diagonals.device

    @property
    def length(self) -> int:
        """L: positions below it are ruled by the true mask."""
        return 0 if self.true_mask is None else self.true_mask.shape[-1]

    def expand(self, batch: int) -> StructuralMask:
        """The same mask for ``batch`` batch rows."""
        return replace(
            self,
            diagonals=self.diagonals.expand(batch, -1, -1),
            verticals=self.verticals.expand(batch, -1, -1),
        )

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys], straight from the definition."""
        first, last = self._range(rows)
        q = self._positions((first, last))
        k = torch.arange(self.keys, device=self.device)
        causal = k <= q
        diagonal = (
            self._is_diagonal()
            .gather(-1, (q - k).clamp(min=0).flatten().expand(*self.diagonals.shape[:2], -1))
            .unflatten(-1, causal.shape)
        )
        out = causal & (diagonal | self._is_vertical()[:, :, None, :])
        if self.true_mask is not None:
            ruled = max(min(self.length - self.first_key - self.offset, last) - first, 0)
            seen = self._true_rows(q[:ruled, 0])
            seen = torch.nn.functional.pad(seen, (0, self.keys - seen.shape[-1]))
            out[:, :, :ruled] = causal[:ruled] & seen
        if self.limit is not None:
            out = out & self.limit.dense((first, last))
        return out

    def __or__(self, other: Mask) -> Mask:
        """Union: with another structural mask of the same L, the union of the index sets."""
        if not isinstance(other, StructuralMask) or (
            (self.length, self.first_key) != (other.length, other.first_key)
            or self.limit is not None
            or other.limit is not None
        ):
            return super().__or__(other)
        check_same_size(self, other)
        heads = max(self.heads, other.heads)
        true_mask = None
        if self.true_mask is not None and other.true_mask is not None:
            true_mask = (
                repeat_heads(self.true_mask[None], heads)[0]
                | repeat_heads(other.true_mask[None], heads)[0]
            )
        return replace(
            self,
            diagonals=_union(self.diagonals, other.diagonals, heads),
            verticals=_union(self.verticals, other.verticals, heads),
            true_mask=true_mask,
            bands=None,
        )

    def __and__(self, other: LifetimeMask) -> StructuralMask:
        """Intersection with a lifetime mask."""
        check_limit(other)
        check_same_size(self, other)
        if other.heads not in (1, self.heads):
            raise ValueError(
                f"limit: expected 1 or {self.heads} heads, received {other.heads}; "
                "a structural mask is limited for all heads at once or for each of its own"
            )
        return replace(self, limit=other if self.limit is None else self.limit & other)

    def union_heads(self, groups: int) -> StructuralMask:
        """One pattern for each kv head: the union over the query heads of its group.

        What a kv head's group never reads can be dropped from its cache; what one of its heads
        reads cannot.
        """
        members = self.heads // groups
        if groups < 1 or self.heads % groups:
            raise ValueError(
                f"groups: expected a divisor of the {self.heads} heads, received {groups}"
            )
        if members == 1:
            return self

        def member(i: int) -> StructuralMask:
            pick = slice(i, None, members)
            return replace(
                self,
                diagonals=self.diagonals[:, pick],
                verticals=self.verticals[:, pick],
                true_mask=None if self.true_mask is None else self.true_mask[pick],
            )

        if self.limit is not None:
            raise ValueError(
                "limit: expected none while heads are united, received one; unite first, then limit"
            )
        out = member(0)
        for i in range(1, members):
            united = out | member(i)
            assert isinstance(united, StructuralMask)
            out = united
        return out

    def density(self) -> Tensor:
        """Kept pairs over causal pairs: float32 [b, heads], counted without lowering the mask.

        With a ``limit`` the mask is lowered.
        """
        if self.limit is not None:
            return super().density()
        kept = self._pattern_pairs()
        border = min(self.length - self.first_key, self.keys)
        if self.offset < border:
            rows = torch.arange(self.offset, border, device=self.device)
            kept = kept + self._true_rows(rows).tril(self.offset).sum((-1, -2))
        return kept / self.causal_pairs()

    def _pattern_pairs(self) -> Tensor:
        """Pairs of the rows that diagonals and verticals rule: int64 [b, heads].

        A pair on a diagonal r and a column c is the row ``c + r``; it is counted once.
        """
        stop = self.keys
        first = min(max(self.offset, self.length - self.first_key), stop)
        rest = self.diagonals.masked_fill(self.diagonals <= 0, NO_KEY)
        diagonals = torch.nn.functional.pad(rest, (1, 0)).sort(-1).values  # 0 is the own diagonal
        columns = self.verticals - self.first_key
        columns = columns.masked_fill((columns < 0) | (columns >= stop), stop).contiguous()
        below = torch.searchsorted(diagonals, stop - columns)
        both = below - torch.searchsorted(diagonals, first - columns)
        rows = (stop - torch.cat([diagonals, columns], -1).clamp(min=first, max=stop)).sum(-1)
        return rows - both.sum(-1)

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """Tall tiles for few bands of diagonals, low ones for many.

        A band of neighbouring diagonals costs a tile its own rows once more, and a tile costs a
        fixed time (about 1e5 pairs' worth, measured on a CPU): work a row is least at
        ``sqrt(1e5 / bands)`` rows.
        """
        if fused:
            return FUSED_TILE
        d = self.diagonals
        bands = 1 + ((d[..., 1:] - d[..., :-1] > 1) & (d[..., 1:] >= 0)).sum(-1)
        rows = (1e5 / max(float(bands.float().mean()), 1.0)) ** 0.5 if d.numel() else 256
        return min(max(32 * round(rows / 32), 32), 256)

    def list_words(self, tile: int) -> int:
        """Integers in the lists of one tile at most: keys and the bits of each."""
        keys = self._most_offsets(tile) + self.verticals.shape[-1]
        return keys * (1 + -(-tile // WORD))

    def _most_offsets(self, tile: int) -> int:
        """Offsets at which a tile meets a diagonal at most: a band's own, and the tile's rows."""
        lines = self.diagonals.shape[-1] + 1  # one for the own key
        bands = lines if self.bands is None else min(self.bands + 1, lines)
        return min(lines + bands * (tile - 1), self.keys + tile - 1)

    def cuts(self) -> Iterable[int]:
        """Where the true mask ends."""
        return (self.length - self.first_key,)

    def borders(self, first: int, stop: int) -> Iterable[int]:
        """The first position that the true mask no longer rules."""
        return (self.length - self.first_key,)

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Key lists per tile: verticals and broad bands first, single diagonals as boundary."""
        border = self.length - self.first_key
        if tiles.stop - tiles.first == 1 and tiles.first >= border:
            return self._single_row(tiles)
        if tiles.fused and tiles.first >= border:
            return self._lower_fused(tiles)
        if tiles.stop <= border:
            entries = self._true_entries(tiles)
        elif tiles.first >= border:
            entries = self._pattern_entries(tiles)
        else:
            low = tiles.position < border
            entries = _interleave(
                low,
                self._true_entries(_pick(tiles, low)),
                self._pattern_entries(_pick(tiles, ~low)),
            )
        if self.limit is not None:
            death = self.limit.death.expand(self.batch, -1, -1)
            entries = entries.limit(death, tiles)
        return entries.plan(tiles, (self.batch, self.queries, self.keys))

    def _lower_fused(self, tiles: Tiles) -> Plan:
        """Diagonals and verticals of tiles below the true mask, by the fused kernel."""
        table = ops.pattern_table(
            self.diagonals,
            self.verticals,
            self.keys,
            tiles.stop,
            tiles.size,
            self.first_key,
            self._most_offsets(tiles.size),
        )
        index, full, count, bits = ops.pattern_lists(*table, tiles.position, tiles.rows, self.batch)
        plan = tiles.plan(
            index=index,
            full=full,
            count=count,
            shape=(self.batch, self.queries, self.keys),
            bits=bits,
        )
        if self.limit is None:
            return plan
        death = self.limit.death.expand(self.batch, -1, -1)
        return Entries.of(plan, exact=False).limit(death, tiles).plan(tiles, plan.shape)

    def _single_row(self, tiles: Tiles) -> Plan:
        """One query row, as in decoding: its diagonals and verticals are its keys."""
        query = tiles.first
        diagonals = torch.where(self.diagonals < 0, NO_KEY, query - self.diagonals)
        verticals = torch.where(self.verticals < 0, NO_KEY, self.verticals - self.first_key)
        own = torch.full((*diagonals.shape[:2], 1), query, dtype=torch.int32, device=self.device)
        keys = torch.cat([diagonals, verticals, own], -1).expand(self.batch, -1, -1)
        keys = keys.masked_fill((keys < 0) | (keys > query), NO_KEY).sort(-1).values
        listed = keys != NO_KEY
        listed[..., 1:] &= keys[..., 1:] != keys[..., :-1]
        if self.limit is not None:
            death = self.limit.death.expand(self.batch, self.heads, -1)
            listed &= death.gather(-1, keys.clamp(max=self.keys - 1).long()) > query
        slot, fulls, count = compact(listed, cap=keys.shape[-1])
        return tiles.plan(
            index=place(keys, slot, keys.shape[-1], 0).transpose(0, 1).contiguous(),
            full=fulls.T.contiguous(),
            count=count.T.contiguous(),
            shape=(self.batch, self.queries, self.keys),
        )

    def _pattern_entries(self, tiles: Tiles) -> Entries:
        """Diagonals and verticals of tiles that the true mask does not rule."""
        t = len(tiles) // self.batch
        first, every = tiles.position[:t, None], row_words(tiles)[:t, None]
        offset, bits = self._tile_diagonals(tiles)
        keys = first - offset[:, :, None]  # [b, heads, t, cap]
        diagonal = (bits[:, :, None] & every).masked_fill_((keys < 0)[..., None], 0)
        column = (self.verticals - self.first_key)[:, :, None].expand(-1, -1, t, -1)
        rows = torch.arange(tiles.size, device=self.device)
        from_row = pack_rows(rows >= torch.arange(tiles.size + 1, device=self.device)[:, None])
        row = (column - first).clamp(0, tiles.size).masked_fill(column < 0, tiles.size)
        vertical = from_row[row.long()] & every

        def flat(x: Tensor) -> Tensor:
            x = x.expand(self.batch, *x.shape[1:])
            return x.transpose(0, 1).flatten(1, 2)

        return Entries.sort(
            flat(torch.cat([keys, column], 3)), flat(torch.cat([diagonal, vertical], 3))
        )

    def _tile_diagonals(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Offsets at which a tile meets a diagonal, and the bits of its rows that do.

        Seen from the first row of a tile, a diagonal always covers the same offsets, so this is
        worked out once for all tiles. No row meets an offset of the future: it is no diagonal.

        Returns:
            offset: int32 [b, heads, n], first row's position minus the key, descending; padding
                is beyond every position.
            bits: int32 [b, heads, n, ceil(tile / 32)].
        """
        size = tiles.size
        is_diagonal = self._is_diagonal()[..., : tiles.stop]  # longer ones begin further down
        is_diagonal = torch.nn.functional.pad(is_diagonal, (size - 1, size - 1))
        total = torch.nn.functional.pad(is_diagonal.cumsum(-1, dtype=torch.int32), (1, 0))
        some = total[..., size:] != total[..., :-size]
        start = torch.arange(some.shape[-1], device=self.device).flip(-1)
        slot, _, count = compact(some.flip(-1))
        start = place(start, slot, int(count.max()), -1)
        rows = torch.arange(size, device=self.device)
        seen = is_diagonal.gather(-1, (start.clamp(min=0)[..., None] + rows).flatten(-2))
        offset = (start - (size - 1)).masked_fill(start < 0, NO_KEY).int()
        return offset, pack_rows(seen.unflatten(-1, (-1, size)))

    def _true_entries(self, tiles: Tiles) -> Entries:
        """The true mask's keys for tiles below L, the same in every batch row."""
        t = len(tiles) // self.batch
        row = torch.arange(tiles.size, device=self.device)
        query = tiles.position[:t, None] + row
        border = self.length - self.first_key
        seen = self._true_rows(query.clamp(max=border - 1).flatten()).unflatten(1, query.shape)
        keys = torch.arange(seen.shape[-1], dtype=torch.int32, device=self.device)
        seen &= (keys <= query[..., None]) & (row < tiles.rows[:t, None])[..., None]
        words = pack_rows(seen.transpose(-1, -2)).repeat(1, self.batch, 1, 1)
        return Entries.sort(keys.expand(*words.shape[:-1]), words, exact=not tiles.fused)

    def _true_rows(self, query: Tensor) -> Tensor:
        """Rows of the true mask for query rows by key index: bool [heads, rows, keys below L]."""
        assert self.true_mask is not None
        keys = min(max(self.length - self.first_key, 0), self.keys)
        seen = self.true_mask[:, query + self.first_key, self.first_key : self.first_key + keys]
        return seen | (query[:, None] == torch.arange(keys, device=self.device))

    def _is_diagonal(self) -> Tensor:
        """bool [b, heads, keys], by offset; the own key always."""
        out = _table(self.diagonals, self.keys)
        out[..., 0] = True
        return out

    def _is_vertical(self) -> Tensor:
        """bool [b, heads, keys], by key index."""
        return _table(self.verticals - self.first_key, self.keys)


def _pick(tiles: Tiles, chosen: Tensor) -> Tiles:
    """The chosen tiles, bool [t]."""
    names = ("batch", "row", "rows", "position")
    return replace(tiles, **{name: getattr(tiles, name)[chosen] for name in names})


def _interleave(first: Tensor, a: Entries, b: Entries) -> Entries:
    """Entries of all tiles: those of ``a`` where ``first`` (bool [t]) holds, elsewhere of ``b``."""
    cap = max(a.keys.shape[-1], b.keys.shape[-1])
    keys = a.keys.new_full((a.keys.shape[0], len(first), cap), NO_KEY)
    words = a.words.new_zeros(*keys.shape, a.words.shape[-1])
    for chosen, part in ((first, a), (~first, b)):
        n = part.keys.shape[-1]
        keys[:, chosen, :n], words[:, chosen, :n] = part.keys, part.words
    return Entries(keys, words)


def _table(index: Tensor, size: int) -> Tensor:
    """Sets of indices as bool [b, heads, size]; what is out of range is dropped."""
    ok = (index >= 0) & (index < size)
    out = torch.zeros(*index.shape[:2], size + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(-1, index.masked_fill(~ok, size).long(), True)[..., :size]


def _union(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """Union of -1 padded index sets."""
    batch = max(a.shape[0], b.shape[0])
    both = torch.cat([repeat_heads(x, heads).expand(batch, heads, -1) for x in (a, b)], -1).long()
    both = both.masked_fill(both < 0, NO_KEY).sort(-1).values
    both[..., 1:].masked_fill_(both[..., 1:] == both[..., :-1], NO_KEY)
    both = both.sort(-1).values
    return both.masked_fill(both == NO_KEY, -1).int()


def count_bands(diagonals: Tensor) -> int:
    """Most runs of neighbouring offsets in one of the index sets [..., n]."""
    if not diagonals.numel():
        return 0
    new = torch.nn.functional.pad(diagonals[..., 1:] - diagonals[..., :-1] != 1, (1, 0), value=True)
    return int((new & (diagonals >= 0)).sum(-1).max())


def _check_sorted(name: str, x: Tensor) -> None:
    """Ascending, no value twice, -1 only at the end."""
    if x.numel() == 0:
        return
    if int(x.min()) < -1:
        raise ValueError(
            f"{name}: expected offsets >= 0 and -1 as padding, received {int(x.min())}"
        )
    a, b = x[..., :-1], x[..., 1:]
    if not bool(((b == -1) | ((a != -1) & (b > a))).all()):
        raise ValueError(f"{name}: expected ascending values with -1 at the end; sort them first")
