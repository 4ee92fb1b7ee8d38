"""Oracles: the true best keys or blocks of every row; bounds on what any choice can keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import BlockMask
from .base import AnyModel, Layer, check_field
from .weights import block_sums, causal_weights, future, row_ranges, smallest_set


@dataclass(frozen=True)
class OracleTokens(AnyModel):
    """Every row of every head reads the keys that it attends to most.

    A bound, not a method: all attention is computed to know them, a range of rows at a time.
    The mask is a block mask with blocks of one key and one row, lists as long as the longest:
    without ``top_k`` a head that attends everywhere makes them O(N^2).

    Args:
        top_k: keys of a row at most; 0 for any number.
        top_p: share of attention at which a row has enough, above 0; from 1 on it never has.
    """

    top_k: int = 64
    top_p: float = 1.0

    name: ClassVar[str] = "oracle_tokens"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        _check(self.name, self.top_k, self.top_p)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> BlockMask:
        """The keys of every row, by their true weights."""
        keys, queries = key.shape[2], query.shape[2]
        key = key.to(torch.promote_types(key.dtype, torch.float32))  # once for all ranges
        parts = []
        for first, last in row_ranges(queries, query.shape[0] * query.shape[1] * keys):
            stop = keys - queries + last
            parts.append(self._rows(query[:, :, first:last], key[:, :, :stop]))
        most = max(part.shape[-1] for part in parts)
        pad = torch.nn.functional.pad
        index = torch.cat([pad(x, (0, most - x.shape[-1]), value=-1) for x in parts], 2)
        return BlockMask(index, 1, 1, keys, queries, checked=True)

    def _rows(self, query: Tensor, key: Tensor) -> Tensor:
        """Keys of the last rows: int32 [b, h, rows, n], ascending, -1 at the end."""
        rows, keys = query.shape[2], key.shape[2]
        weights = causal_weights(query, key)
        weights.masked_fill_(future(rows, keys, key.device), -1)  # after keys that weigh nothing
        weight, order = weights.topk(min(self.top_k or keys, keys), -1)
        keep = weight >= 0
        if self.top_p < 1:
            before = torch.nn.functional.pad(weight.cumsum(-1)[..., :-1], (1, 0))
            keep &= before < self.top_p
            longest = int(keep.sum(-1).max())  # waits for the device: lists are cut to this
            keep, order = keep[..., :longest], order[..., :longest]
        order = order.int().masked_fill_(~keep, keys).sort(-1).values
        return order.masked_fill_(order == keys, -1)


@dataclass(frozen=True)
class OracleBlocks(AnyModel):
    """Every query block of every head reads the key blocks that it attends to most.

    A bound, not a method: all attention is computed to know them, a range of rows at a time. The
    own block is always read and counts as the first.

    Args:
        top_k: blocks of a query block at most; 0 for any number.
        top_p: share of attention at which a query block has enough, above 0; from 1 on it never
            has.
        block: positions in a block, of queries and of keys.
    """

    top_k: int = 0
    top_p: float = 0.95
    block: int = 64

    name: ClassVar[str] = "oracle_blocks"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        _check(self.name, self.top_k, self.top_p)
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")

    @property
    def grid(self) -> int:
        """Blocks choose for themselves: see :class:`dynmask.policies.base.Gridded`."""
        return self.block

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> BlockMask:
        """The blocks of every query block, by their true share of attention."""
        keys, queries = key.shape[2], query.shape[2]
        mass = self._mass(query, key)
        number = torch.arange(mass.shape[3], device=key.device)
        own = (number == number[-mass.shape[2] :, None]).expand_as(mass)
        chosen = smallest_set(mass, self.top_p, own, self.top_k)
        most = self.top_k or None
        return BlockMask.from_scores(chosen, self.block, self.block, keys, queries, most)

    def _mass(self, query: Tensor, key: Tensor) -> Tensor:
        """True attention between blocks: [b, h, query blocks, key blocks], rows added up."""
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        offset, blocks = keys - queries, -(-keys // self.block)
        pad = torch.nn.functional.pad
        parts = []
        for first, last in row_ranges(queries, batch * heads * keys, self.block, offset):
            stop = offset + last
            mass = causal_weights(query[:, :, first:last], key[:, :, :stop])
            mass = block_sums(mass, self.block)
            mass = pad(mass, (0, blocks - mass.shape[-1], (offset + first) % self.block, 0))
            parts.append(block_sums(mass.mT, self.block).mT)
        return torch.cat(parts, 2)


def _check(name: str, top_k: int, top_p: float) -> None:
    check_field(name, "top_k", top_k, top_k >= 0, ">= 0")
    check_field(name, "top_p", top_p, top_p > 0, "> 0")
