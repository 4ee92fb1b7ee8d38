"""Blocks that each query block chooses for itself, by what pools tell of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoder import BlockEncoder, block_estimate
from ..masks import BlockMask
from ..summary import BlockSummary
from .weights import WEIGHTS_AT_A_TIME


@dataclass(frozen=True)
class BlockChoice:
    """How the heads of one layer choose blocks.

    Args:
        block: positions in a block, of queries and of keys.
        query_pool, key_pool: positions in a pool, see :func:`dynmask.encoder.block_estimate`.
        encoder: what was trained for this layer; the estimate alone when None.
    """

    block: int
    query_pool: int
    key_pool: int
    encoder: BlockEncoder | None = None

    def mask(
        self,
        query: Tensor,
        key: Tensor,
        heads: list[int],
        window: Tensor,
        sinks: int,
        blocks: Tensor,
    ) -> BlockMask:
        """Sinks and window in whole blocks, and the blocks that promise most attention.

        Args:
            query, key: [b, h, q, d] and [b, g, k, d].
            heads: those that choose blocks, ascending; the others read nothing.
            window: newest keys of each of them, on the host, int64 [b or 1, n].
            sinks: first keys of the tensor that are always read.
            blocks: how many each of them chooses, int64 [b or 1, n].
        """
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        forced = self._forced(keys, queries, window.to(key.device, non_blocking=True), sinks)
        count = blocks.to(key.device, non_blocking=True)
        chosen = forced.expand(batch, -1, -1, -1).clone()
        most = min(int(blocks.max()), forced.shape[-1])
        for own, rows, scores in self._scores(query, key, heads):
            part = chosen[:, own, rows]
            found = scores.masked_fill_(part, float("-inf")).topk(most, -1)
            rank = torch.arange(most, device=key.device)
            good = (rank < count[:, own, None, None]) & (found.values > float("-inf"))
            good |= part.gather(-1, found.indices)
            chosen[:, own, rows] = part.scatter(-1, found.indices, good)
        cap = most + -(-sinks // self.block) + (int(window.max()) - 1) // self.block + 2
        made = BlockMask.from_scores(chosen, self.block, self.block, keys, queries, cap)
        index = made.index.new_full((batch, query.shape[1], *made.index.shape[2:]), -1)
        index[:, heads] = made.index
        return BlockMask(index, self.block, self.block, keys, queries, checked=True)

    def _forced(self, keys: int, queries: int, window: Tensor, sinks: int) -> Tensor:
        """Blocks that are read anyway, own ones too: bool [b or 1, n, query blocks, key blocks]."""
        offset, size = keys - queries, self.block
        qb = torch.arange(offset // size, (keys - 1) // size + 1, device=window.device)[:, None]
        kb = torch.arange(-(-keys // size), device=window.device)
        first_row = (qb * size).clamp(min=offset)
        near = (kb + 1) * size > first_row - window[..., None, None] + 1
        return (near | (kb * size < sinks)) & (kb <= qb)

    def _scores(
        self, query: Tensor, key: Tensor, heads: list[int]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Scores of some heads and query blocks: which of them, and [b, heads, blocks, blocks].

        The heads of a kv head are scored together, and no more query blocks than memory allows.
        """
        members, at = query.shape[1] // key.shape[1], 0
        offset, size = key.shape[2] - query.shape[2], self.block
        blocks = (key.shape[2] - 1) // size - offset // size + 1
        width = -(-key.shape[2] // size)
        for g in range(key.shape[1]):
            some = [head for head in heads if head // members == g]
            if not some:
                continue
            own, at = slice(at, at + len(some)), at + len(some)
            q, summary = query[:, some], BlockSummary.of(key[:, g : g + 1], self.key_pool)
            step = max(1, WEIGHTS_AT_A_TIME // (len(query) * len(some) * width))
            for start in range(0, blocks, step):
                rows = slice(start, min(start + step, blocks))
                number = torch.arange(rows.start, rows.stop, device=query.device)
                yield own, rows, self._score(q, summary, some, number)

    def _score(
        self, query: Tensor, summary: BlockSummary, heads: list[int], number: Tensor
    ) -> Tensor:
        """Logarithm of the attention that blocks are expected to get: [b, heads, n, blocks]."""
        if self.encoder is not None:
            return self.encoder.of_heads(heads)(query, summary, query_blocks=number)
        return block_estimate(
            query, summary, self.block, query_pool=self.query_pool, query_blocks=number
        )
