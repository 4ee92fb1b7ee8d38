"""Scores of keys by learned modules, the same for a key in prefill, in chunks and in decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Layer

DECIMALS = 3
"""Of a score. Scores are logarithms of shares: a thousandth is no difference, and far above what
float32 rounds off."""


def score_keys(module: nn.Module, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
    """Scores [b, g, n] of keys as the layer rotated them; turned back where they are looked at."""
    back = layer.unrotate if getattr(module, "reads_keys", True) else None
    return module(key if back is None else back(key), value)


class ScoreModules:
    """The score module of each layer, on whatever device its keys are.

    Args:
        modules: one for each layer, ``(key [b, g, n, d], value [b, g, n, dv])`` to float32
            [b, g, n]; None where a layer has none.
    """

    def __init__(self, modules: Sequence[nn.Module | None]) -> None:
        self._modules = tuple(modules)
        self._placed: dict[tuple[int, torch.device], nn.Module | None] = {}

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key: float32 [b, g, n]; key [b, g, n, d] as the layer rotated it.

        ``layer.unrotate`` takes the rotation off; without it keys are taken as they are. Equal
        tokens have equal scores in the first layer, but for what rotating and the sizes of
        matrix products round off, which is not the same in prefill and decoding. Scores are
        rounded, so that they tie and the later key wins in both. All are 0 without a module.
        """
        module = self._on(layer.index, key.device)
        if module is None:
            return torch.zeros(key.shape[:3], device=key.device)
        with torch.no_grad():
            scores = score_keys(module, key, value, layer)
        return scores.round(decimals=DECIMALS)

    def _on(self, index: int, device: torch.device) -> nn.Module | None:
        """A layer's module on a device; made once for each."""
        if (index, device) not in self._placed:
            module = self._modules[index]
            if module is not None and any(p.device != device for p in module.parameters()):
                module = copy.deepcopy(module).to(device)
            self._placed[index, device] = module
        return self._placed[index, device]
