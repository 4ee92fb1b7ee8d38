"""Blocks that each query block chooses for itself, by what pools tell of queries and keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoder import BlockEncoder, block_estimate
from ..masks import BlockMask
from ..masks.block import block_lists
from ..summary import NUMBERS_AT_A_TIME, BlockSummary

Pools = Callable[[slice], BlockSummary | None]
"""Of some kv heads side by side, what is known of all their keys."""


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
        pools: Pools | None = None,
    ) -> BlockMask:
        """Sinks and window in whole blocks, and the blocks that promise most attention.

        Args:
            query, key: [b, h, q, d] and [b, g, k, d]; with ``pools`` the keys are not looked at.
            heads: those that choose blocks, ascending; the others read nothing.
            window: newest keys of each of them, on the host, int64 [b or 1, n].
            sinks: first keys of the tensor that are always read.
            blocks: how many each of them chooses, int64 [b or 1, n].
            pools: what is known of the keys already, see :class:`dynmask.policies.Layer`.
        """
        (batch, every, queries, _), keys, size = query.shape, key.shape[2], self.block
        offset, width = keys - queries, -(-keys // size)
        first, stop = offset // size, (keys - 1) // size + 1
        near, count = (x.to(key.device, non_blocking=True) for x in (window, blocks))
        most = min(int(blocks.max()), width)
        cap = min(most + -(-sinks // size) + (int(window.max()) - 1) // size + 2, width)
        index = query.new_full((batch, every, stop - first, cap), -1, dtype=torch.int32)
        longest = 0
        for own, rows, scores in self._scores(query, key, heads, pools):
            qb = torch.arange(first + rows.start, first + rows.stop, device=key.device)
            chosen = self._forced(qb, offset, width, near[:, own], sinks)
            chosen = chosen.expand(batch, -1, -1, -1).clone()
            found = scores.masked_fill_(chosen, float("-inf")).topk(most, -1)
            rank = torch.arange(most, device=key.device)
            good = (rank < count[:, own, None, None]) & (found.values > float("-inf"))
            good |= chosen.gather(-1, found.indices)
            chosen.scatter_(-1, found.indices, good)
            lists = block_lists(chosen, size, size, keys, first + rows.start, cap)
            longest = max(longest, lists.shape[-1])
            index[:, heads[own], rows.start : rows.stop, : lists.shape[-1]] = lists
        index = index[..., :longest].contiguous()  # as kernels walk through it
        return BlockMask(index, size, size, keys, queries, checked=True)

    def _forced(self, qb: Tensor, offset: int, width: int, window: Tensor, sinks: int) -> Tensor:
        """Blocks that are read anyway, own ones too: bool [b or 1, n, query blocks, key blocks].

        Args:
            qb: numbers of the query blocks.
            offset: position of the first query.
            width: key blocks.
            window: int64 [b or 1, n].
            sinks: first keys that are always read.
        """
        size, qb = self.block, qb[:, None]
        kb = torch.arange(width, device=window.device)
        first_row = (qb * size).clamp(min=offset)
        near = (kb + 1) * size > first_row - window[..., None, None] + 1
        return (near | (kb * size < sinks)) & (kb <= qb)

    def _scores(
        self, query: Tensor, key: Tensor, heads: list[int], pools: Pools | None
    ) -> Iterator[tuple[slice, range, Tensor]]:
        """Scores of some heads and query blocks: which of them, and [b, heads, blocks, blocks].

        No more kv heads, and no more query blocks, than memory allows.
        """
        members, keys, size = query.shape[1] // key.shape[1], key.shape[2], self.block
        width = -(-keys // size)
        blocks = (keys - 1) // size - (keys - query.shape[2]) // size + 1
        for own, groups in head_runs(heads, members, 1 if pools is None else len(heads)):
            some = heads[own]
            summary = None if pools is None else pools(groups)
            if summary is None:
                summary = BlockSummary.of(key[:, groups], self.key_pool)
            q = query[:, some]
            step = max(1, NUMBERS_AT_A_TIME // (len(query) * len(some) * width))
            for start in range(0, blocks, step):
                rows = range(start, min(start + step, blocks))
                yield own, rows, self._score(q, summary, some, rows)

    def _score(self, query: Tensor, summary: BlockSummary, heads: list[int], rows: range) -> Tensor:
        """Logarithm of the attention that blocks are expected to get: [b, heads, n, blocks]."""
        if self.encoder is not None:
            return self.encoder.of_heads(heads)(query, summary, query_blocks=rows)
        return block_estimate(
            query, summary, self.block, query_pool=self.query_pool, query_blocks=rows
        )


def head_runs(heads: list[int], members: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Runs of ``heads`` whose kv heads lie side by side and have equally many of them each.

    Args:
        heads: query heads, ascending.
        members: query heads of a kv head.
        most: kv heads of a run at most.

    Returns:
        Which of the heads, and their kv heads.
    """
    counts = Counter(head // members for head in heads)
    runs: list[list[int]] = []
    for g in counts:  # ascending, as the heads are
        last = runs[-1] if runs else []
        if g - 1 in last and counts[g] == counts[g - 1] and len(last) < most:
            last.append(g)
        else:
            runs.append([g])
    at = 0
    for run in runs:
        stop = at + counts[run[0]] * len(run)
        yield slice(at, stop), slice(run[0], run[-1] + 1)
        at = stop
