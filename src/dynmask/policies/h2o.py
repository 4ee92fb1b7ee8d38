"""H2O: keys that have received the most attention so far, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import LifetimeMask
from .base import AnyModel, Layer, check_field


@dataclass(frozen=True)
class H2O(AnyModel):
    """Heavy hitters (arXiv 2306.14048, section 4): evict what has received the least attention.

    Each key's received attention is summed over the rows so far, over the keys that are still
    there, per kv head (summed over the query heads of its group). Rows are taken ``block`` at a
    time: at the end of a block the keys with the smallest sums go, except the newest. Sums need
    the queries of all earlier rows, so the policy serves whole prefills; a call that continues a
    sequence starts from its newest keys.

    Args:
        width: keys that a row reads at most, per kv head.
        recent: share of the width that belongs to the newest keys.
        block: rows between two evictions, at most half of the width.
    """

    width: int = 512
    recent: float = 0.5
    block: int = 64

    name: ClassVar[str] = "h2o"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        check_field(self.name, "width", self.width, self.width >= 2, ">= 2")
        check_field(self.name, "recent", self.recent, 0 <= self.recent <= 1, "in [0, 1]")
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The row at which each key is evicted, a block of rows at a time: O(N w)."""
        (batch, groups, keys, dim), queries = key.shape, query.shape[2]
        first, device = keys - queries, key.device
        block = min(self.block, self.width // 2)
        room = self.width - block  # so that the last row of a block reads no more than the width
        # One column more: where entries that stand for no key are written.
        death = torch.full((batch, groups, keys + 1), LifetimeMask.INF, dtype=torch.int32)
        death = death.to(device)
        held = torch.arange(first - room, first, device=device).clamp(min=-1)
        held = held.expand(batch, groups, room)  # positions, -1 for none
        death[..., : max(first - room, 0)] = first
        received = torch.zeros(batch, groups, room, device=device)
        query = query.reshape(batch, groups, -1, queries, dim)
        for start in range(first, keys, block):
            stop = min(start + block, keys)
            own = torch.arange(start, stop, device=device).expand(batch, groups, -1)
            position = torch.cat([held, own], -1)
            near = key.gather(2, position.clamp(min=0)[..., None].expand(-1, -1, -1, dim))
            rows = query[:, :, :, start - first : stop - first].float()
            logits = rows @ near.float().mT[:, :, None] * dim**-0.5
            hidden = (position < 0)[:, :, None] | (position[:, :, None] > own[..., None])
            weights = logits.masked_fill(hidden[:, :, None], float("-inf")).softmax(-1)
            received = torch.nn.functional.pad(received, (0, stop - start)) + weights.sum((2, 3))
            worth = received.masked_fill(position >= stop - int(self.recent * room), float("inf"))
            worth = worth.masked_fill(position < 0, -1.0)
            kept = worth.topk(room).indices
            gone = torch.ones_like(position, dtype=torch.bool).scatter_(-1, kept, False)
            where = position.masked_fill(~gone | (position < 0), keys)
            death.scatter_(-1, where, torch.full_like(where, stop, dtype=torch.int32))
            held, received = position.gather(-1, kept), received.gather(-1, kept)
        return LifetimeMask(death[..., :keys], queries, most=min(self.width, keys))
