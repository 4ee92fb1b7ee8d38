"""Summaries of keys as a cache carries them along, so that no call pools all keys again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .errors import bad
from .slots import FEWEST_SLOTS, Rows
from .summary import BlockSummary


class PooledKeys(Rows):
    """Pools of the keys of some kv heads, in one size or several, for each batch row.

    A pool is made of its own keys and of nothing else: one that new keys fall into is made anew
    from all of its keys, which are remembered until it is full. So the pools do not depend on how
    the keys came: they are those of :meth:`BlockSummary.of` over all of them, made of the same
    sums in the same order, whatever the chunks.

    Args:
        heads: kv heads of a store, those that are pooled, ascending.
        sizes: positions in a pool; each size divides the next.
    """

    def __init__(self, heads: Sequence[int], sizes: Sequence[int]) -> None:
        if any(wide % size for size, wide in pairwise(sizes)):
            raise bad("pools", "sizes that divide the next", list(sizes))
        self.heads = list(heads)
        self.sizes = tuple(sizes)
        super().__init__()

    def extend(self, key: Tensor, runs: dict[int, tuple[int, int]]) -> None:
        """Pool new keys.

        Args:
            key: [b, g, n, d], of the new tokens and all heads of the store.
            runs: for each batch row that has some its tokens, from and to; the rest is padding.
        """
        batch, _, n, _ = key.shape
        with torch.no_grad():
            self._start(key)
            before = list(self.seen)
            for row, (start, stop) in runs.items():
                self.seen[row] += stop - start
            self._reserve(max(self.seen))
            if len(runs) == batch and set(runs.values()) == {(0, n)} and len(set(before)) == 1:
                self._add(slice(0, batch), self._own(key), before[0])
                return
            for row, (start, stop) in runs.items():
                one = slice(row, row + 1)
                self._add(one, self._own(key[one, :, start:stop]), before[row])

    def of(self, rows: slice, heads: slice) -> BlockSummary | None:
        """The summary of rows that have seen equally many tokens: of some heads of the store.

        Views of what is kept; None where one of the heads, side by side, is not pooled.
        """
        wanted = list(range(heads.start, heads.stop))
        if not set(wanted) <= set(self.heads):
            return None
        first = self.heads.index(wanted[0])
        own, made = slice(first, first + len(wanted)), None
        for number in reversed(range(len(self.sizes))):
            made = replace(self._held(rows, own, number, 0, self.seen[rows.start]), wider=made)
        return made

    def crop(self, tokens: int, read: Callable[[int, int, int], Tensor]) -> None:
        """Forget the newest ``tokens`` tokens of every row.

        ``read(row, start, stop)`` gives keys [g, stop - start, d] of the store that are kept.
        """
        with torch.no_grad():
            self.seen = [max(seen - tokens, 0) for seen in self.seen]
            for row, seen in enumerate(self.seen):
                start = seen - seen % self.sizes[-1]
                if start < seen:
                    key = self._own(read(row, start, seen)[None])
                    self._add(slice(row, row + 1), key, start)

    def _own(self, key: Tensor) -> Tensor:
        """Of keys of the whole store those of the heads that are pooled."""
        return key if len(self.heads) == key.shape[1] else key[:, self.heads]

    def _add(self, rows: slice, key: Tensor, before: int) -> None:
        """Pool keys [r, g, n, d] of rows that had ``before`` tokens."""
        size = self.sizes[0]
        start, stop = before - before % size, before + key.shape[2]
        kept = self._tensors["open"]
        part = torch.cat([kept[rows, :, : before - start], key], 2)
        left = stop % size
        kept[rows, :, :left] = part[:, :, part.shape[2] - left :]
        self._write(rows, 0, BlockSummary.of(part, size, start))
        for number, wide in enumerate(self.sizes[1:], 1):
            fine = self._held(rows, slice(None), 0, start - start % wide, stop)
            self._write(rows, number, fine.coarser(wide))

    def _write(self, rows: slice, number: int, made: BlockSummary) -> None:
        """Put pools where they belong."""
        first = made.start // self.sizes[number]
        own = slice(first, first + len(made.count))
        self._tensors[f"mean{number}"][rows, :, own] = made.mean
        self._tensors[f"spread{number}"][rows, :, own] = made.spread

    def _held(self, rows: slice, heads: slice, number: int, start: int, stop: int) -> BlockSummary:
        """Pools of one size, of the keys from ``start``, where one begins, to ``stop``."""
        size = self.sizes[number]
        own = slice(start // size, -(-stop // size))
        mean, spread = (
            self._tensors[f"{name}{number}"][rows, heads, own] for name in ("mean", "spread")
        )
        count = mean.new_full((mean.shape[2],), size)
        count[-1:] = (stop - 1) % size + 1
        return BlockSummary(count, mean, spread, size, start, stop)

    def _start(self, key: Tensor) -> None:
        """No pools yet."""
        if self._tensors:
            return
        self.seen = [0] * len(key)
        shape, wide = (len(key), len(self.heads)), torch.promote_types(key.dtype, torch.float32)
        with torch.inference_mode(False):
            self._tensors["open"] = key.new_zeros(
                *shape, self.sizes[0], key.shape[3], requires_grad=False
            )
            for number in range(len(self.sizes)):
                for name in ("mean", "spread"):
                    self._tensors[f"{name}{number}"] = key.new_zeros(
                        *shape, 0, key.shape[3], dtype=wide, requires_grad=False
                    )

    def _reserve(self, tokens: int) -> None:
        """Room for the pools of so many tokens a row, and for some more."""
        for number, size in enumerate(self.sizes):
            need = -(-tokens // size)
            for name in (f"mean{number}", f"spread{number}"):
                old = self._tensors[name]
                if need <= old.shape[2]:
                    continue
                room = need + max(FEWEST_SLOTS // size, need // 16, 1)
                with torch.inference_mode(False):
                    new = old.new_zeros(*old.shape[:2], room, old.shape[3])
                    new[:, :, : old.shape[2]] = old
                    self._tensors[name] = new


__all__ = ["PooledKeys"]
