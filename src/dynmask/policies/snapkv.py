"""SnapKV: a prompt is read in full, then only what its last queries looked at stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import LifetimeMask
from .base import AnyModel, Layer, check_field


@dataclass(frozen=True)
class SnapKV(AnyModel):
    """Keys that the end of the prompt attends to, smoothed (SnapKV, arXiv 2404.14469, section 4).

    The softmax of the prompt's last ``last`` queries is summed over them, per kv head (also over
    the query heads of its group) and max-pooled over ``pool`` neighbours; the best keys and the
    last ``last`` are read from then on, with whatever comes after the prompt. Prefill is dense.
    The call that begins a sequence is its prompt; later calls recall what it chose, so one
    sequence (or a batch of equally long ones) runs at a time.

    Args:
        width: keys of the prompt that stay, per kv head.
        last: queries at the end of the prompt that are looked at; their keys stay.
        pool: neighbours that a key's sum is the largest of; odd.
        prompts: for a call that holds prompt and continuation, the prompt's tokens in each batch
            row; empty: the whole first call is the prompt.
    """

    width: int = 512
    last: int = 64
    pool: int = 7
    prompts: tuple[int, ...] = ()

    name: ClassVar[str] = "snapkv"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        check_field(self.name, "last", self.last, self.last >= 1, ">= 1")
        check_field(self.name, "width", self.width, self.width >= self.last, f">= {self.last}")
        odd = self.pool >= 1 and self.pool % 2 == 1
        check_field(self.name, "pool", self.pool, odd, "odd and >= 1")
        object.__setattr__(self, "_chosen", {})

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Keys that are not chosen die where the prompt ends."""
        batch, groups, keys, _ = key.shape
        queries = query.shape[2]
        memory: dict[int, Tensor] = self._chosen  # type: ignore[attr-defined]
        death = memory.get(layer.index)
        if (
            death is None
            or queries == keys
            or death.shape[:2] != (batch, groups)
            or death.shape[2] > keys - queries
        ):
            ends = self.prompts or (keys,) * batch
            rows = [self._choose(query[b], key[b], end, keys) for b, end in enumerate(ends)]
            memory[layer.index] = death = torch.stack(rows)
        later = death.new_full((batch, groups, keys - death.shape[2]), LifetimeMask.INF)
        return LifetimeMask(torch.cat([death, later], -1), queries)

    def _choose(self, query: Tensor, key: Tensor, end: int, keys: int) -> Tensor:
        """Deaths int32 [g, keys] of one sequence whose prompt has ``end`` tokens."""
        groups, first = key.shape[0], keys - query.shape[1]
        death = torch.full((groups, keys), LifetimeMask.INF, dtype=torch.int32, device=key.device)
        last = min(self.last, end - first)
        old, extra = end - last, self.width - self.last
        if extra >= old:
            return death
        rows = query[:, end - last - first : end - first].reshape(groups, -1, query.shape[-1])
        logits = rows.float() @ key[:, :end].float().mT * query.shape[-1] ** -0.5
        row = torch.arange(old, end, device=key.device).repeat(rows.shape[1] // last)[:, None]
        hidden = torch.arange(end, device=key.device) > row
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1)[:, :old]
        pooled = torch.nn.functional.max_pool1d(weights, self.pool, 1, self.pool // 2)
        stays = torch.zeros_like(pooled, dtype=torch.bool)
        stays.scatter_(-1, pooled.topk(extra).indices, True)
        death[:, :old] = torch.where(stays, death[:, :old], end)
        return death
