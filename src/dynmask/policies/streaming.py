"""StreamingLLM: sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import LifetimeMask
from ..retention import Retention
from .base import AnyModel, Layer, LooksAtNone, check_field


@dataclass(frozen=True)
class Streaming(AnyModel, LooksAtNone):
    """The first ``sinks`` keys and the ``window`` newest (arXiv 2309.17453).

    Args:
        sinks: keys at the start of the sequence that are always read.
        window: newest keys that a query reads, its own counted.
    """

    sinks: int = 64
    window: int = 1024

    name: ClassVar[str] = "streaming"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        check_field(self.name, "sinks", self.sinks, self.sinks >= 0, ">= 0")
        check_field(self.name, "window", self.window, self.window >= 1, ">= 1")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Sinks and window, the same for every head."""
        return LifetimeMask.streaming(
            key.shape[2], self.sinks, self.window, query.shape[2], layer.first_key, query.device
        )

    def retention(self, layer: int) -> Retention:
        """The same of every layer; nothing is left to choose by score."""
        return Retention(self.sinks + self.window, self.window, self.sinks)

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """All keys alike: float32 [b, g, n]."""
        return torch.zeros(key.shape[:3], device=key.device)

    def bias(self, scores: Tensor, layer: Layer) -> None:
        """Nothing is added to the logits."""
        return None
