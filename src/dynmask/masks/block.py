"""BlockMask: lists of key blocks per head and query block, for choices made from this input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import Plan, Tiles, compact, place
from .base import (
    Mask,
    check_index,
    check_limit,
    check_same_size,
    check_sizes,
    check_whole,
    repeat_heads,
)
from .lifetime import LifetimeMask


@dataclass(frozen=True, eq=False)
class BlockMask(Mask):
    """Query block i reads the listed key blocks, causally.

    Blocks lie on a grid that starts at key 0: query block i holds positions
    ``[i * block_q, (i + 1) * block_q)``. ``index`` has one row for each query block that holds a
    query row; the first of them is block ``(keys - queries) // block_q``.

    Args:
        index: int32 [b or 1, heads, query blocks, cap], ascending block numbers, -1 at the end as
            padding.
        block_q, block_k: positions in a query block and in a key block.
        keys: keys in the tensor.
        queries: query rows, the last ones of the keys; all of them when None.
        limit: intersection with this lifetime mask.
        checked: the lists are known to be in order; looking at them waits for the device.
    """

    index: Tensor
    block_q: int
    block_k: int
    keys: int
    queries: int = None  # type: ignore[assignment]
    limit: LifetimeMask | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        if self.queries is None:
            object.__setattr__(self, "queries", self.keys)
        check_sizes(self.keys, self.queries)
        if self.checked:
            return
        check_index("index", self.index, 4, "[b, heads, query blocks, n]")
        for name in ("block_q", "block_k"):
            check_whole(name, getattr(self, name), 1)
        blocks = (self.keys - 1) // self.block_q - self.first_block + 1
        if self.index.shape[2] != blocks:
            raise ValueError(
                f"index: expected {blocks} query blocks (of {self.block_q}, for the last "
                f"{self.queries} of {self.keys} positions), received {self.index.shape[2]}"
            )
        if self.index.numel() and (
            int(self.index.max()) * self.block_k >= self.keys or int(self.index.min()) < -1
        ):
            raise ValueError(
                f"index: expected block numbers from 0 to {(self.keys - 1) // self.block_k} and "
                f"-1 as padding, received {int(self.index.min())} to {int(self.index.max())}"
            )
        a, b = self.index[..., :-1], self.index[..., 1:]
        if not bool(((b == -1) | ((a != -1) & (b > a))).all()):
            raise ValueError("index: expected ascending blocks with -1 at the end; sort them first")

    @classmethod
    def from_scores(
        cls,
        chosen: Tensor,
        block_q: int,
        block_k: int,
        keys: int,
        queries: int | None = None,
        most: int | None = None,
    ) -> BlockMask:
        """From a table of chosen blocks, bool [b, heads, query blocks, key blocks].

        Blocks in the future are dropped; the own block of a query block is always added. ``most``
        is an upper bound of the blocks in one list, where the caller knows one: on a GPU the
        lists are made that long instead of as long as there are key blocks.
        """
        queries = keys if queries is None else queries
        check_sizes(keys, queries)
        for name, block in (("block_q", block_q), ("block_k", block_k)):
            check_whole(name, block, 1)
        blocks = ((keys - 1) // block_q - (keys - queries) // block_q + 1, -(-keys // block_k))
        if chosen.dtype != torch.bool or chosen.dim() != 4 or chosen.shape[2:] != blocks:
            raise ValueError(
                f"chosen: expected a bool tensor [b, heads, {blocks[0]} query blocks, {blocks[1]} "
                f"key blocks], received {chosen.dtype} {tuple(chosen.shape)}"
            )
        first = (keys - queries) // block_q
        index = block_lists(chosen, block_q, block_k, keys, first, most)
        return cls(index, block_q, block_k, keys, queries, checked=True)

    @property
    def batch(self) -> int:
        """Batch rows with choices of their own."""
        return max(self.index.shape[0], 1 if self.limit is None else self.limit.batch)

    @property
    def heads(self) -> int:
        """Heads with choices of their own."""
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.index.device

    @property
    def first_block(self) -> int:
        """Number of the query block that holds query row 0."""
        return self.offset // self.block_q

    def expand(self, batch: int) -> BlockMask:
        """The same mask for ``batch`` batch rows."""
        return replace(self, index=self.index.expand(batch, -1, -1, -1))

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys], straight from the definition."""
        rows = self._range(rows)
        q = self._positions(rows)
        k = torch.arange(self.keys, device=self.device)
        blocks = -(-self.keys // self.block_k)
        table = torch.zeros(*self.index.shape[:3], blocks + 1, dtype=torch.bool, device=self.device)
        table.scatter_(-1, self.index.masked_fill(self.index < 0, blocks).long(), True)
        listed = table[:, :, q[:, 0] // self.block_q - self.first_block][..., k // self.block_k]
        out = listed & (k <= q)
        return out if self.limit is None else out & self.limit.dense(rows)

    def __or__(self, other: Mask) -> Mask:
        """Union: with a block mask on the same grid, the union of the lists."""
        if not isinstance(other, BlockMask) or (
            (self.block_q, self.block_k) != (other.block_q, other.block_k)
            or self.limit is not None
            or other.limit is not None
        ):
            return super().__or__(other)
        check_same_size(self, other)
        heads, batch = max(self.heads, other.heads), max(self.batch, other.batch)
        both = torch.cat(
            [repeat_heads(m.index, heads).expand(batch, -1, -1, -1) for m in (self, other)], -1
        )
        blocks = -(-self.keys // self.block_k)
        both = both.masked_fill(both < 0, blocks).sort(-1).values
        both[..., 1:].masked_fill_(both[..., 1:] == both[..., :-1], blocks)
        both = both.sort(-1).values
        return replace(self, index=both.masked_fill(both == blocks, -1))

    def __and__(self, other: LifetimeMask) -> BlockMask:
        """Intersection with a lifetime mask."""
        check_limit(other)
        check_same_size(self, other)
        if other.heads not in (1, self.heads):
            raise ValueError(
                f"limit: expected 1 or {self.heads} heads, received {other.heads}; "
                "a block mask is limited for all heads at once or for each of its own"
            )
        return replace(self, limit=other if self.limit is None else self.limit & other)

    def density(self) -> Tensor:
        """Kept pairs over causal pairs, blocks counted whole: float32 [b, heads]."""
        if self.limit is not None:
            return super().density()
        start = self.index.long() * self.block_k
        row = torch.arange(self.index.shape[2], device=self.device)[:, None] + self.first_block
        first = (row * self.block_q).clamp(min=self.offset)
        stop = ((row + 1) * self.block_q).clamp(max=self.keys)

        def triangle(x: Tensor) -> Tensor:  # pairs of one block with the x rows from its start on
            part = x.clamp(min=0, max=self.block_k)
            return part * (part + 1) // 2 + (x - self.block_k).clamp(min=0) * self.block_k

        pairs = triangle(stop - start) - triangle(first - start)
        return pairs.masked_fill(self.index < 0, 0).sum((-1, -2)) / self.causal_pairs()

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """A whole query block where the fused kernels can hold it."""
        return min(self.block_q, 128) if fused else 128

    def backward_tile(self, members: int = 1) -> int:
        """A whole query block, whatever its size."""
        return self.block_q

    def list_words(self, tile: int) -> int:
        """Integers in the list of one tile."""
        return self.index.shape[-1]

    def borders(self, first: int, stop: int) -> Iterable[int]:
        """Where query blocks begin: a tile has one list, so it lies in one query block."""
        return range(first - first % self.block_q + self.block_q, stop, self.block_q)

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Key blocks per tile, those wholly in the past first."""
        if tiles.fused and self.limit is None:
            return self._lower_fused(tiles)
        t = len(tiles) // self.batch
        first = tiles.position[:t].long()
        stop = first + tiles.rows[:t]
        start = self.index[:, :, first // self.block_q - self.first_block].long() * self.block_k
        some = (start >= 0) & (start < stop[:, None])
        full = some & (start + self.block_k - 1 <= first[:, None])
        if self.limit is not None:
            full, some = self._limited(start, full, some, first, stop)
        slot, fulls, count = compact(full, some & ~full)

        def flat(x: Tensor) -> Tensor:
            x = x.expand(self.batch, *x.shape[1:])
            return x.transpose(0, 1).flatten(1, 2).contiguous()

        death = None
        if self.limit is not None:
            death = repeat_heads(self.limit.death, self.heads).expand(self.batch, -1, -1)
        return tiles.plan(
            index=flat(place(start.int(), slot, int(count.max()), 0)),
            full=flat(fulls),
            count=flat(count),
            shape=(self.batch, self.queries, self.keys),
            block=self.block_k,
            death=death,
        )

    def _lower_fused(self, tiles: Tiles) -> Plan:
        """The same by the fused kernel; blocks of the past are the first of an ascending list."""
        index, full, count = ops.block_plan(
            self.index,
            tiles.position,
            tiles.rows,
            self.batch,
            self.block_q,
            self.block_k,
            self.first_block,
        )
        return tiles.plan(
            index=index,
            full=full,
            count=count,
            shape=(self.batch, self.queries, self.keys),
            block=self.block_k,
        )

    def _limited(
        self, start: Tensor, full: Tensor, some: Tensor, first: Tensor, stop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Blocks whole and blocks alive when the limit is taken into account."""
        assert self.limit is not None
        blocks = -(-self.keys // self.block_k)
        death = self.limit.death
        death = torch.nn.functional.pad(death, (0, blocks * self.block_k - self.keys))
        death = death.unflatten(-1, (blocks, self.block_k))
        shape = (*torch.broadcast_shapes(death.shape[:2], start.shape[:2]), *start.shape[2:])
        number = (start.clamp(min=0) // self.block_k).expand(shape).flatten(2)

        def of_block(x: Tensor) -> Tensor:
            return x.expand(*shape[:2], -1).gather(-1, number).view(shape)

        least, most = of_block(death.amin(-1)), of_block(death.amax(-1))
        return full & (least >= stop[:, None]), some & (most > first[:, None])


def block_lists(
    chosen: Tensor, block_q: int, block_k: int, keys: int, first: int, most: int | None = None
) -> Tensor:
    """Lists of chosen blocks, as ``BlockMask.index``: int32 [b, heads, query blocks, cap].

    Args:
        chosen: bool [b, heads, query blocks, key blocks]; the future is dropped, the own block
            added.
        block_q, block_k: positions in a query block and in a key block.
        keys: keys in the tensor.
        first: number of the first query block of the table.
        most: blocks in one list at most, where the caller knows; the lists may be shorter.
    """
    qb = torch.arange(chosen.shape[2], device=chosen.device)[:, None] + first
    kb = torch.arange(chosen.shape[3], device=chosen.device)
    last = ((qb + 1) * block_q).clamp(max=keys) - 1
    past = kb * block_k <= last
    own = past & ((kb + 1) * block_k > qb * block_q)
    if ops.fused(chosen.device):
        cap = kb.numel() if most is None else min(most, kb.numel())
        return ops.block_lists(chosen, block_q, block_k, keys, first, cap)
    chosen = (chosen & past) | own
    slot, _, count = compact(chosen)
    return place(kb.int(), slot, int(count.max()), -1)
