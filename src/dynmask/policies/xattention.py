"""XAttention: blocks ranked by sums along the antidiagonals of their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import BlockMask
from .base import AnyModel, Layer, check_field
from .weights import block_sums, future, row_ranges, smallest_set


@dataclass(frozen=True)
class XAttention(AnyModel):
    """Blocks by antidiagonal scores (XAttention, arXiv 2503.16428).

    Logits are summed along the antidiagonal of every ``stride x stride`` square, as one product
    of ``stride`` neighbouring keys with as many queries in reverse; every column and diagonal of
    the square meets it. A causal softmax over squares, summed over a block, is what the block is
    worth. Per head and query block, key blocks are taken, the first and the own before all
    others, until they carry ``threshold`` of the row's sum.

    Args:
        stride: side of a square; divides ``block``.
        threshold: share to keep, above 0, at most 1.
        block: positions in a block, of queries and of keys.
    """

    stride: int = 8
    threshold: float = 0.9
    block: int = 128

    name: ClassVar[str] = "xattention"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")
        divides = self.stride >= 1 and self.block % self.stride == 0
        check_field(self.name, "stride", self.stride, divides, f"a divisor of block {self.block}")
        in_range = 0 < self.threshold <= 1
        check_field(self.name, "threshold", self.threshold, in_range, "in (0, 1]")

    @property
    def grid(self) -> int:
        """Blocks choose for themselves: see :class:`dynmask.policies.base.Gridded`."""
        return self.block

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> BlockMask:
        """Choose key blocks for every query block and head."""
        keys, queries = key.shape[2], query.shape[2]
        worth = self._worth(query, key)
        number = torch.arange(worth.shape[3], device=key.device)
        own = number == number[-worth.shape[2] :, None]
        forced = (own | (number == 0)).expand_as(worth)
        chosen = smallest_set(worth, self.threshold, forced)
        return BlockMask.from_scores(chosen, self.block, self.block, keys, queries)

    def _worth(self, query: Tensor, key: Tensor) -> Tensor:
        """What each block is worth: float32 [b, h, query blocks, key blocks]."""
        (batch, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
        s, block, first = self.stride, self.block, keys - queries
        begin = first // block * block
        past = -keys % block
        rows = torch.nn.functional.pad(query * (dim**-0.5 / s), (0, 0, first - begin, past))
        rows = rows.unflatten(2, (-1, s)).flip(3).flatten(3)  # [b, h, squares, s * d]
        columns = torch.nn.functional.pad(key, (0, 0, 0, past)).unflatten(2, (-1, s)).flatten(3)
        each = block // s
        square = torch.arange(columns.shape[2], device=key.device)
        filled = (square * s + s > first)[begin // s :] & (square * s < keys)[begin // s :]
        parts = []
        for start, stop in row_ranges(rows.shape[2], batch * heads * len(square), each):
            end = begin // s + stop
            part = rows[:, :, start:stop].reshape(batch, groups, -1, s * dim)
            logits = (part @ columns[:, :, :end].mT).float().view(batch, heads, stop - start, end)
            hidden = future(stop - start, end, key.device)
            weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1).nan_to_num_()
            weights *= filled[start:stop, None]  # rows of padding weigh nothing
            mass = block_sums(block_sums(weights, each).mT, each).mT
            parts.append(torch.nn.functional.pad(mass, (0, (len(square) - end) // each)))
        return torch.cat(parts, 2)
