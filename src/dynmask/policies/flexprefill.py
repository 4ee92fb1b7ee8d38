"""FlexPrefill: each head reads the blocks it seems to want, or columns and diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import BlockMask
from ..masks.base import repeat_heads
from .base import AnyModel, Layer, check_field
from .weights import block_means, block_sums, causal_weights, diagonal_sums, smallest_set


@dataclass(frozen=True)
class FlexPrefill(AnyModel):
    """A kind of mask and a budget for every head, from this input (arXiv 2502.20766).

    The last block of queries is attended in full. Where its attention over key blocks is close
    to the estimate from pooled queries and keys (square root of the Jensen-Shannon divergence
    below ``tau``), the head is query-aware: of all pairs of a query block and a key block, it
    reads the fewest whose estimated attention reaches ``gamma``. Every other head reads columns
    and diagonals: as many as carry ``gamma`` of the last block's attention.

    As in the authors' code, lines lie on blocks: n columns make ``n // block + 1`` blocks of
    columns, those with the largest sums, and likewise diagonals, where a diagonal counts for the
    pairs of blocks that are ``offset // block`` apart. The best ``min_budget`` of both, the first
    key block and the own one are read by every head.

    Args:
        gamma: share of attention to keep, above 0, at most 1.
        tau: distance below which a head is query-aware; 0 for never.
        min_budget: keys of columns, and of diagonals, that a head reads at least.
        block: positions in a block, of queries and of keys.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    block: int = 128

    name: ClassVar[str] = "flexprefill"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        check_field(self.name, "gamma", self.gamma, 0 < self.gamma <= 1, "in (0, 1]")
        check_field(self.name, "tau", self.tau, self.tau >= 0, ">= 0")
        check_field(self.name, "min_budget", self.min_budget, self.min_budget >= 0, ">= 0")
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> BlockMask:
        """Choose key blocks for every query block and head."""
        keys, queries = key.shape[2], query.shape[2]
        columns, diagonals = self._lines(query[:, :, -self.block :], key)
        means = repeat_heads(block_means(key, 0, self.block), query.shape[1])
        estimate = _softmax(query[:, :, -self.block :].float().mean(2, keepdim=True), means)
        aware = distance(estimate[:, :, 0], block_sums(columns, self.block)) < self.tau
        column, diagonal = (self._blocks(x, aware) for x in (columns, diagonals))

        first = (keys - queries) // self.block
        kb = torch.arange(means.shape[2], device=key.device)
        apart = kb[first:, None] - kb
        chosen = column[:, :, None] | diagonal[..., apart.clamp(min=0)]
        pooled = _softmax(block_means(query, keys - queries, self.block), means, apart < 0)
        seems = smallest_set(pooled.flatten(-2), self.gamma).view_as(chosen)
        chosen |= seems & aware[..., None, None]
        return BlockMask.from_scores(chosen, self.block, self.block, keys, queries)

    def _lines(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the last rows to each column and to each diagonal: [b, h, keys]."""
        members = query.shape[1] // key.shape[1]
        columns, diagonals = [], []
        for group, rows in enumerate(query.split(members, 1)):  # all heads at once are gigabytes
            weights = causal_weights(rows, key[:, group : group + 1])
            columns.append(weights.mean(-2))
            diagonals.append(diagonal_sums(weights) / weights.shape[2])
        return torch.cat(columns, 1), torch.cat(diagonals, 1)

    def _blocks(self, lines: Tensor, aware: Tensor) -> Tensor:
        """Blocks of lines that a head reads, the first among them: bool [b, h, blocks]."""
        needed = (lines.sort(-1, descending=True).values.cumsum(-1) < self.gamma).sum(-1) + 1
        least = max(-(-self.min_budget // self.block), 1)
        count = (needed // self.block + 1).masked_fill(aware, least).clamp(min=least)
        sums = block_sums(lines, self.block)
        sums[..., 0] = float("inf")
        order = sums.sort(dim=-1, descending=True, stable=True).indices
        best = torch.arange(sums.shape[-1], device=sums.device) < count[..., None]
        return torch.zeros_like(best).scatter_(-1, order, best)


def _softmax(query: Tensor, key: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Attention of pooled queries over pooled keys, [b, h, query blocks, key blocks]."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    logits = logits if hidden is None else logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).nan_to_num()


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions [..., n], in nats."""
    middle = (p + q) / 2
    twice = torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, middle)
    return (twice.sum(-1) / 2).clamp(min=0).sqrt()
