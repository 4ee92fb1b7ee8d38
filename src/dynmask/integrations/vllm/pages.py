"""Where a paged cache keeps keys and values: the one place that knows cache layouts.

From vLLM 0.26 on every layer's cache is logically ``[pages, kv heads, positions of a page, 2 d]``,
a key's numbers before its value's. What lies behind what in memory is another matter, and changes
with version and device: so everything here goes by strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import bad


@dataclass(frozen=True)
class Pages:
    """One layer's cache.

    Args:
        cache: [pages, g, page, 2 d], any strides whose last is 1.
    """

    cache: Tensor

    @classmethod
    def of(cls, cache: Tensor, kv_heads: int, head_dim: int) -> Pages:
        """The cache of a layer; ValueError for a layout that is not known."""
        fits = cache.dim() == 4 and cache.shape[1] == kv_heads and cache.shape[3] == 2 * head_dim
        if not fits or cache.stride(3) != 1:
            raise bad(
                "vLLM's cache", f"[pages, {kv_heads}, positions, {2 * head_dim}], the last dense",
                f"{tuple(cache.shape)} with strides {cache.stride()}",
                "Use a vLLM version that docs/serving.md names.",
            )  # fmt: skip
        return cls(cache)

    @property
    def size(self) -> int:
        """Positions of a page."""
        return self.cache.shape[2]

    @property
    def step(self) -> int | None:
        """From a slot to the same one of the next page, in positions of one kv head.

        None where pages are no whole number of positions apart.
        """
        page, position = self.cache.stride(0), self.cache.stride(2)
        return None if page % position else page // position

    def slots(self, table: Tensor, first: int, stop: int) -> Tensor:
        """Slots of a request's positions [first, stop): int32 [stop - first].

        Args:
            table: the request's pages, in order, integers [n].
        """
        assert self.step is not None
        position = torch.arange(first, stop, device=table.device)
        page = table[first // self.size : -(-stop // self.size)].long()
        page = page[position // self.size - first // self.size]
        return (page * self.step + position % self.size).int()

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, [1, g, slots, d] each: views, in which slots are rows."""
        assert self.step is not None
        pages, heads, size, dim = self.cache.shape
        rows = (pages - 1) * self.step + size
        shape, dim = (1, heads, rows, dim // 2), dim // 2
        strides = (0, self.cache.stride(1), self.cache.stride(2), 1)
        start = self.cache.storage_offset()
        key = self.cache.as_strided(shape, strides, start)
        return key, self.cache.as_strided(shape, strides, start + dim)

    def gather(self, table: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """A request's keys and values of positions [first, stop): [1, g, n, d] each."""
        skipped = first // self.size
        pages = table[skipped : -(-stop // self.size)].long()
        # not index_select, which on a CPU would first copy the whole cache to make it dense
        both = self.cache.transpose(0, 1)[:, pages].flatten(1, 2)
        start = skipped * self.size
        both = both[None, :, first - start : stop - start]
        dim = both.shape[-1] // 2
        return both[..., :dim], both[..., dim:]

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep new tokens.

        Args:
            slots: place of each token as vLLM counts it, page x page size + position; below 0 for
                padding; [n].
            key, value: [n or more, g, d].
        """
        count, dim = slots.shape[0], key.shape[-1]
        kept = slots >= 0
        own = slots[kept].long()
        page, position = own // self.size, own % self.size
        self.cache[page, :, position, :dim] = key[:count][kept].to(self.cache.dtype)
        self.cache[page, :, position, dim:] = value[:count][kept].to(self.cache.dtype)


class Scores:
    """What keys are worth to a policy that evicts: one number for each slot and kv head.

    A score belongs to a key and is made once, when the key comes. It lies where the key's page
    says, so that a page which is shared or found again brings its scores along.
    """

    def __init__(self, pages: Pages) -> None:
        cache = pages.cache
        shape = cache.shape[1], cache.shape[0], pages.size
        self._table = torch.zeros(shape, dtype=torch.float32, device=cache.device)
        self._size = pages.size

    @property
    def nbytes(self) -> int:
        """Bytes of the table, beside vLLM's cache."""
        return self._table.nbytes

    def write(self, table: Tensor, first: int, scores: Tensor) -> None:
        """Keep scores [1, g, n] of a request's positions from ``first`` on."""
        position = torch.arange(first, first + scores.shape[-1], device=scores.device)
        page = table[position // self._size].long()
        self._table[:, page, position % self._size] = scores[0].float()

    def read(self, table: Tensor, stop: int) -> Tensor:
        """Scores of a request's positions [0, stop): float32 [1, g, stop]."""
        pages = table[: -(-stop // self._size)].long()
        return self._table.index_select(1, pages).flatten(1, 2)[None, :, :stop]


__all__ = ["Pages", "Scores"]
