"""Quest: while decoding, the pages of keys whose best possible logit is highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import BlockMask, LifetimeMask
from .base import AnyModel, Layer, check_field


@dataclass(frozen=True)
class Quest(AnyModel):
    """Query-aware pages of the cache (Quest, arXiv 2406.10774).

    No key of a page has a larger logit than ``sum_d max(q_d min_d, q_d max_d)``, with the
    smallest and the largest value of its keys in each dimension. A query that is alone, as in
    decoding, reads the pages with the largest bounds; each query head has pages of its own, and
    the page being written is one of them. Several queries at a time, as in prefill, and the
    first layers read everything. The bounds are made anew from all keys at every step: what is
    measured here is which pages are read, not what it takes to keep their bounds.

    Args:
        budget: keys in the pages that a head reads; whole pages count.
        page: keys in a page; pages are counted from the first key that the cache holds.
        dense_layers: layers at the input that read every key.
    """

    budget: int = 1024
    page: int = 16
    dense_layers: int = 2

    name: ClassVar[str] = "quest"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        check_field(self.name, "page", self.page, self.page >= 1, ">= 1")
        fits = self.budget >= self.page
        check_field(self.name, "budget", self.budget, fits, f">= {self.page}, the keys of a page")
        check_field(self.name, "dense_layers", self.dense_layers, self.dense_layers >= 0, ">= 0")

    @property
    def grid(self) -> int:
        """Pages are ranked whole: see :class:`dynmask.policies.base.Gridded`."""
        return self.page

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layer: Layer
    ) -> BlockMask | LifetimeMask:
        """The pages of a single query; plain causal attention for several."""
        keys, queries = key.shape[2], query.shape[2]
        own, count = (keys - 1) // self.page, self.budget // self.page
        if queries > 1 or layer.index < self.dense_layers or own < count:
            return LifetimeMask.causal(keys, queries, device=key.device)
        best = self._bounds(query, key, own).topk(count - 1, -1).indices
        index = torch.nn.functional.pad(best.sort(-1).values, (0, 1), value=own)
        return BlockMask(index.int()[:, :, None], 1, self.page, keys, 1, checked=True)

    def _bounds(self, query: Tensor, key: Tensor, pages: int) -> Tensor:
        """Largest logit that the first ``pages`` pages allow: float32 [b, h, pages]."""
        batch, heads, _, dim = query.shape
        held = key[:, :, : pages * self.page].unflatten(2, (pages, self.page))
        least, most = held.amin(3).float(), held.amax(3).float()
        rows = query.float().reshape(batch, key.shape[1], -1, dim)
        bounds = rows.clamp(min=0) @ most.mT + rows.clamp(max=0) @ least.mT
        return bounds.reshape(batch, heads, pages).nan_to_num(float("-inf"))
