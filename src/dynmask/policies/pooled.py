"""Pooled blocks: mean-pooled queries and keys, the smallest set of blocks with mass top_p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import BlockMask
from ..masks.base import repeat_heads
from .base import AnyModel, Layer, check_field
from .weights import block_means


@dataclass(frozen=True)
class Pooled(AnyModel):
    """Blocks whose mean key best fits the mean query (the block estimate of FlexPrefill,
    arXiv 2502.20766, and MoBA, arXiv 2502.13189).

    Per head and query block, key blocks are taken in the order of their estimated attention until
    their share reaches ``top_p``; the first and the own block are always read. A query block's
    mean looks at later rows of the block: a prefill policy.

    Args:
        block: positions in a block, of queries and of keys.
        top_p: estimated share of attention to keep, above 0, at most 1.
    """

    block: int = 64
    top_p: float = 0.95

    name: ClassVar[str] = "pooled"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")
        check_field(self.name, "top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")

    @property
    def grid(self) -> int:
        """Blocks choose for themselves: see :class:`dynmask.policies.base.Gridded`."""
        return self.block

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> BlockMask:
        """Choose key blocks for every query block and head."""
        keys, queries = key.shape[2], query.shape[2]
        heads = query.shape[1]
        pooled_q = block_means(query, keys - queries, self.block)
        pooled_k = repeat_heads(block_means(key, 0, self.block), heads)
        first = (keys - queries) // self.block
        logits = pooled_q @ pooled_k.mT * query.shape[-1] ** -0.5
        qb = torch.arange(first, first + logits.shape[2], device=query.device)[:, None]
        future = torch.arange(logits.shape[3], device=query.device) > qb
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        chosen = _smallest_set(weights, self.top_p)
        chosen[..., 0] = True
        return BlockMask.from_scores(chosen, self.block, self.block, keys, queries)


def _smallest_set(weights: Tensor, share: float) -> Tensor:
    """The fewest entries of each row whose sum reaches ``share``: bool, like ``weights``."""
    value, order = weights.sort(-1, descending=True)
    before = value.cumsum(-1) - value
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, before < share)
