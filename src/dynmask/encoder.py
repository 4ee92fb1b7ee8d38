"""The lightweight encoder of the context-aware generator: one score per pair of blocks.

Queries and keys are pooled, and what a query block finds in a key block is estimated from the pools
alone: without training from the mean and the spread of keys (``block_estimate``), with training
from a small linear map on top (``BlockEncoder``, taught by ``dynmask.encoder_loss``). Nothing here
is N x N.

Blocks lie on a grid that starts at position 0. The first query block and the first key block of a
table are those that hold the first query and the first key.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .block_grid import BlockGrid, check_pools
from .masks.base import check_whole
from .summary import NUMBERS_AT_A_TIME, BlockSummary, held_of, in_blocks


def block_estimate(
    query: Tensor,
    key: Tensor | BlockSummary,
    block: int = 64,
    scale: float | None = None,
    *,
    first_key: int = 0,
    query_pool: int = 8,
    key_pool: int = 8,
    query_blocks: Tensor | range | None = None,
) -> Tensor:
    """How much attention each query block pays to each key block, estimated from pools.

    If logits of a pool's keys are normal, the logarithm of the sum of their exponentials is
    ``q mean scale + 0.5 scale^2 sum_d q_d^2 var_d + log n``, with q the mean of a pool of
    queries. The key pools of a block add up. A softmax over the key blocks makes shares of it for
    each query pool, and the shares of a block's query pools are averaged. Measured on the
    reference model: pools of 8 find what whole blocks hide, on both sides; without the variance
    most of that gain is lost, with the best query pool instead of the softmax a third.

    Beside the result about 256 MB are held at a time, at any length: query blocks are taken some at
    a time, and a range of them looks only at key pools that begin before its end.

    Args:
        query: [b, h, q, d], the last q positions of the keys, rotated as attention takes it.
        key: [b, g, k, d], rotated, or a summary of all keys, in blocks of ``key_pool`` or any other
            size that divides ``block``.
        block: positions in a block, of queries and of keys.
        scale: of the logits, ``d ** -0.5`` when None.
        first_key: position of the first key; a summary knows its own.
        query_pool, key_pool: positions in a pool; they divide ``block``.
        query_blocks: those wanted, counted from the block of the first query, int64 [n] or a range
            of step 1; all when None. Blocks in a tensor look at all key pools: where they lie is
            not known without waiting for the device.

    Returns:
        The logarithm of the estimated attention, its sum 1 in every row: float32 (float64 for
        float64 queries) [b, h, query blocks, key blocks], -inf where the key block begins after
        the query block.
    """
    grid = BlockGrid.of(query, key, block, first_key, query_pool)
    summary = _summary(key, key_pool, block, first_key)
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def score(pools: Tensor, stop: int) -> Tensor:
        return _estimate(pools, summary, factor, block, stop)

    return _shares(query, grid, query_blocks, block // summary.block, score)


class BlockEncoder(nn.Module):
    """Scores of key blocks for query blocks: the estimate from pools, and what was learned on top.

    Each query pool and each key block is mapped to a few numbers, by a linear map of its own for
    every head and kv head, and their product is added to the estimate for that pool, before the
    softmax. Mean and deviation of the keys, and the mean of the queries, are brought to unit size
    first: models differ by orders of magnitude there. Untrained, the map of the keys is 0 and the
    scores are those of :func:`block_estimate`. Float32 whatever autocast says (float64 for float64
    queries).

    Args:
        heads, kv_heads: query heads h and kv heads g of the layer.
        head_dim: dimensions of a query and of a key.
        block: positions in a block, of queries and of keys.
        rank: numbers that a pool is mapped to.
        query_pool, key_pool: positions in a pool, as in :func:`block_estimate`.

    Attributes:
        gain: [h], factor of the estimate, 1 at the start.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        rank: int = 16,
        query_pool: int = 8,
        key_pool: int = 8,
    ) -> None:
        super().__init__()
        for name, size in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            check_whole(name, size, 1)
        check_whole("rank", rank, 1)
        if heads % kv_heads:
            raise ValueError(f"heads: expected a multiple of {kv_heads} kv heads, received {heads}")
        check_pools(block, query_pool, key_pool)
        self.block, self.query_pool, self.key_pool = block, query_pool, key_pool
        self.gain = nn.Parameter(torch.empty(heads))
        self.of_query = nn.Parameter(torch.empty(heads, head_dim + 1, rank))
        self.of_key = nn.Parameter(torch.empty(kv_heads, 2 * head_dim, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: nothing is added to the estimate."""
        nn.init.ones_(self.gain)
        nn.init.normal_(self.of_query, std=self.of_query.shape[1] ** -0.5)
        nn.init.zeros_(self.of_key)

    def of_heads(self, heads: Sequence[int]) -> BlockEncoder:
        """The encoder of some query heads, equally many of each of their kv heads.

        It computes with the same parameters, and nothing is learned through it.
        """
        members = len(self.gain) // len(self.of_key)
        groups = list(dict.fromkeys(head // members for head in heads))
        part = copy.copy(self)
        part._parameters = {}
        for name, index in (("gain", list(heads)), ("of_query", list(heads)), ("of_key", groups)):
            setattr(part, name, nn.Parameter(getattr(self, name).detach()[index], False))
        return part

    def summary(self, key: Tensor, first_key: int = 0) -> BlockSummary:
        """What :meth:`forward` takes instead of keys; it can be updated with later ones."""
        return BlockSummary.of(key, self.key_pool, first_key)

    def forward(
        self,
        query: Tensor,
        key: Tensor | BlockSummary,
        first_key: int = 0,
        *,
        scale: float | None = None,
        query_blocks: Tensor | range | None = None,
    ) -> Tensor:
        """Scores [b, h, query blocks, key blocks]; arguments as in :func:`block_estimate`."""
        grid = BlockGrid.of(query, key, self.block, first_key, self.query_pool)
        with torch.autocast(query.device.type, enabled=False):
            summary = _summary(key, self.key_pool, self.block, first_key)
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            keys = self._keys(summary)

            def score(pools: Tensor, stop: int) -> Tensor:
                found = _estimate(pools, summary, factor, self.block, stop)
                found = found * self.gain.to(found.dtype)[:, None, None, None]
                return found + self._learned(pools, keys[:, :, :stop])

            return _shares(query, grid, query_blocks, self.block // summary.block, score)

    def _keys(self, summary: BlockSummary) -> Tensor:
        """Key blocks mapped: [b, g, key blocks, rank]."""
        whole = summary.coarser(self.block)
        variance = whole.variance
        size = (whole.mean.square() + variance).mean(-1, keepdim=True) + math.ulp(1.0)
        x = torch.cat([whole.mean, variance.sqrt()], -1) * size.rsqrt()
        return x @ self.of_key.to(x.dtype)

    def _learned(self, pools: Tensor, keys: Tensor) -> Tensor:
        """Products of mapped query pools [b, h, n, pools, d] and key blocks."""
        batch, heads, blocks, count, _ = pools.shape
        size = pools.square().mean(-1, keepdim=True) + math.ulp(1.0)
        x = nn.functional.pad(pools * size.rsqrt(), (0, 1), value=1.0).flatten(
            2, 3
        ) @ self.of_query.to(pools.dtype)
        x = x.reshape(batch, keys.shape[1], -1, x.shape[-1])
        out = x @ keys.mT * keys.shape[-1] ** -0.5
        return out.view(batch, heads, blocks, count, -1)

    def extra_repr(self) -> str:
        """Shown by print."""
        (heads, inputs, rank), kv_heads = self.of_query.shape, self.of_key.shape[0]
        return (
            f"heads={heads}, kv_heads={kv_heads}, head_dim={inputs - 1}, block={self.block}, "
            f"rank={rank}, query_pool={self.query_pool}, key_pool={self.key_pool}"
        )


def _shares(
    query: Tensor,
    grid: BlockGrid,
    query_blocks: Tensor | range | None,
    size: int,
    score: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Logarithm of each query block's mean share: [b, h, n, key blocks].

    Args:
        query: [b, h, q, d].
        grid: where queries and keys lie.
        query_blocks: those wanted, all when None.
        size: key pools of a key block.
        score: of query pools [b, h, n, pools, d] and so many of the first key blocks.
    """
    wanted = range(grid.query_blocks) if query_blocks is None else query_blocks
    if isinstance(wanted, range):
        grid.check(wanted)
    (batch, heads, _, dim), pools = query.shape, grid.block // grid.pool
    step = batch * heads * pools * max(grid.key_blocks * size, dim)
    step = max(1, NUMBERS_AT_A_TIME // step)
    parts = []
    for first in range(0, len(wanted), step):
        some = wanted[first : first + step]
        stop = grid.reach(some)
        found, rows = _query_pools(query, grid, some)
        part = _together(score(found, stop), rows, grid.future(some, stop, query.device))
        after = 0, grid.key_blocks - stop
        parts.append(nn.functional.pad(part, after, value=float("-inf")) if after[1] else part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _estimate(pools: Tensor, summary: BlockSummary, scale: float, block: int, stop: int) -> Tensor:
    """Log-sum-exp over each of the first ``stop`` key blocks, for query pools [b, h, n, pools, d].

    Key blocks are taken some at a time where a single query block has many pools.
    """
    batch, heads, blocks, count, dim = pools.shape
    x = pools.reshape(batch, summary.mean.shape[1], -1, dim) * scale
    x = x.to(summary.mean.dtype)
    size = block // summary.block
    front = summary.start // summary.block % size
    step = max(1, NUMBERS_AT_A_TIME // (x.shape[:3].numel() * size))
    parts = []
    for first in range(0, stop, step):
        last = min(first + step, stop)
        own = slice(max(first * size - front, 0), last * size - front)
        parts.append(_log_sums(x, summary, own, front if first == 0 else 0, size))
    found = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return found.view(batch, heads, blocks, count, -1)


def _log_sums(x: Tensor, summary: BlockSummary, own: slice, front: int, size: int) -> Tensor:
    """Log-sum-exp over blocks of ``size`` key pools ``own``, after ``front`` that are missing.

    x [b, g, n, d]; the result is [b, g, n, blocks].
    """
    mean, spread, count = summary.mean[:, :, own], summary.spread[:, :, own], summary.count[own]
    # of many pools and few queries, dividing products costs less than dividing spreads
    logits = (x.square() @ spread.mT) * (0.5 / count)
    logits = logits + x @ mean.mT + count.log()
    back = -(front + logits.shape[-1]) % size
    if front or back:
        logits = nn.functional.pad(logits, (front, back), value=float("-inf"))
    return logits.unflatten(-1, (-1, size)).logsumexp(-1)


def _together(scores: Tensor, rows: Tensor, future: Tensor) -> Tensor:
    """Logarithm of the mean share over the rows of a block: [b, h, n, key blocks].

    scores [b, h, n, pools, key blocks]; rows [n, pools] in each pool; future [n, key blocks].
    """
    share = scores.masked_fill(future[:, None], float("-inf")).log_softmax(-1)
    weight = rows / rows.sum(-1, keepdim=True)
    share = share + weight.to(share.dtype).log()[..., None]
    # where all are -inf, logsumexp has no gradient
    return share.masked_fill(future[:, None], 0).logsumexp(3).masked_fill(future, float("-inf"))


def _query_pools(
    query: Tensor, grid: BlockGrid, query_blocks: Tensor | range
) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each pool [b, h, n, pools, d], and how many there are [n, pools].

    Of a single block only pools that have rows: a decoded token has one.
    """
    if isinstance(query_blocks, range):
        size = grid.block if len(query_blocks) > 1 else grid.pool
        first = (query_blocks.start + grid.start // grid.block) * grid.block
        start = max(first, grid.start)
        stop = min(first + len(query_blocks) * grid.block, grid.stop)
        own = slice(start - grid.start, stop - grid.start)
        rows = in_blocks(query[:, :, own], start, size)
        held = held_of(start, stop, size, query.device)
        if len(query_blocks) == 1:
            rows, held = rows.flatten(2, 3)[:, :, None], held.flatten()[None]
    else:
        position = grid.rows(query_blocks)
        row = (position - grid.start).clamp(0, query.shape[2] - 1)
        rows = query.index_select(2, row.flatten()).unflatten(2, row.shape)
        held = (position >= grid.start) & (position < grid.stop)
        rows = rows.masked_fill(~held[..., None], 0)
    pools = -1, grid.pool
    count = held.unflatten(1, pools).sum(-1)
    wide = torch.promote_types(query.dtype, torch.float32)
    mean = rows.unflatten(3, pools).sum(4, dtype=wide) / count.clamp(min=1)[..., None]
    return mean, count


def _summary(key: Tensor | BlockSummary, pool: int, block: int, first_key: int) -> BlockSummary:
    """The summary of keys, or the one given."""
    if not isinstance(key, BlockSummary):
        return BlockSummary.of(key, pool, first_key)
    check_pools(block, key.block)
    return key
