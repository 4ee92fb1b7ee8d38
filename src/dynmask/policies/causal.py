"""Full attention: the baseline that every other policy is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..masks import LifetimeMask
from .base import AnyModel, Layer, LooksAtNone


@dataclass(frozen=True)
class Causal(AnyModel, LooksAtNone):
    """Every query reads every key up to its own."""

    name: ClassVar[str] = "full"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Plain causal attention."""
        return LifetimeMask.causal(key.shape[2], query.shape[2], device=query.device)
