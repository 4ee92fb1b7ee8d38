"""What a sparsified model's masks let through, and how much attention lies there."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..masks import Mask
from ..policies.guard import DENSE
from ..policies.kept import kept_mass, sampled_rows

PHASES = ("prefill", "decode")

NOT_LOOKED_AT = -1
"""Stands for the factor of a map that a guard has not looked at."""


class Tally:
    """Densities and kept mass, summed per phase, layer and head without reading the device.

    Threads may count at the same time; nothing is lost.
    """

    def __init__(self) -> None:
        self._warned = False
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        with self._lock:
            self.impl: Counter[str] = Counter()
            self._calls: Counter[str] = Counter()
            self._kept: dict[tuple[str, int], Tensor] = {}
            self._pairs: Counter[tuple[str, int]] = Counter()
            self._mass: dict[tuple[str, int], list[Tensor]] = {}
            self._factors: dict[int, list[Tensor]] = {}

    def count(self, phase: str, impl: str) -> None:
        """One attention call."""
        with self._lock:
            self._calls[phase] += 1
            self.impl[impl] += 1

    def add_density(
        self, phase: str, layer: int, mask: Mask, heads: int, batch: int, first_key: int
    ) -> None:
        """Count the pairs of one mask, made for ``batch`` sequences.

        The causal area is that of the whole sequence: keys that a sliding cache has dropped
        (``first_key`` of them) are pairs which causal attention would have computed.
        """
        share = mask.density().double()
        share = share.repeat_interleave(heads // share.shape[1], 1).expand(batch, -1)
        pairs = batch * (mask.causal_pairs() + mask.queries * first_key)
        self.add_kept(phase, layer, share.sum(0) * mask.causal_pairs(), pairs)

    def add_kept(self, phase: str, layer: int, kept: Tensor, pairs: int) -> None:
        """Count pairs that each head has read, float64 [h], out of ``pairs`` causal ones."""
        place = phase, layer
        with self._lock:
            self._kept[place] = kept + self._kept[place].to(kept) if place in self._kept else kept
            self._pairs[place] += pairs

    def add_mass(self, phase: str, layer: int, shares: Tensor) -> None:
        """Kept shares [b, h, rows] of one call."""
        rows = shares.transpose(1, 2).flatten(0, 1)
        with self._lock:
            self._mass.setdefault((phase, layer), []).append(rows)

    def add_widened(self, layer: int, factor: Tensor) -> None:
        """What the guard of a policy did: factors of one call [b, h], 1 for maps left alone,
        ``NOT_LOOKED_AT`` for maps of which it was not asked.

        The first time that it did something is warned of.
        """
        wide = (factor != 1) & (factor != NOT_LOOKED_AT)
        with self._lock:
            self._factors.setdefault(layer, []).append(factor)
            first = not self._warned and bool(wide.any())
            self._warned = self._warned or first
        if first:
            heads = ", ".join(map(str, wide.any(0).nonzero().flatten().tolist()))
            warnings.warn(
                f"guard: the masks of layer {layer}, heads {heads}, keep less of the attention "
                "than their card promises; they are widened for this call. Said once a run; "
                "run.summary()['guard'] counts on. Calibrate with documents like these.",
                stacklevel=2,
            )

    def summary(self, layers: int) -> dict[str, Any]:
        """Densities and kept mass as plain numbers; see ``Run.summary``."""
        with self._lock:
            out: dict[str, Any] = {phase: self._phase(phase, layers) for phase in PHASES}
            out["impl"] = dict(self.impl)
            if self._factors:
                out["guard"] = self._guard(layers)
            return out

    def _guard(self, layers: int) -> dict[str, Any]:
        """What the guard did, as plain numbers."""
        found = {layer: torch.cat(factors) for layer, factors in self._factors.items()}
        asked = {layer: factor != NOT_LOOKED_AT for layer, factor in found.items()}
        wide = {layer: asked[layer] & (factor != 1) for layer, factor in found.items()}
        maps, widened = (sum(int(x.sum()) for x in some.values()) for some in (asked, wide))
        return {
            "maps": maps,
            "widened": widened,
            "share": widened / maps,
            "dense": sum(int((factor == DENSE).sum()) for factor in found.values()),
            "widened_per_head": [
                (wide[i].sum(0) / asked[i].sum(0).clamp(min=1)).tolist() if i in found else None
                for i in range(layers)
            ],
        }

    def _phase(self, phase: str, layers: int) -> dict[str, Any]:
        counted = [i for i in range(layers) if (phase, i) in self._kept]
        density: list[Any] = [None] * layers
        kept = pairs = 0.0
        for i in counted:
            per_head = self._kept[phase, i].cpu()
            density[i] = (per_head / self._pairs[phase, i]).tolist()
            kept += float(per_head.sum())
            pairs += self._pairs[phase, i] * len(per_head)
        shares = {
            i: torch.cat(self._mass[phase, i]).cpu()
            for i in range(layers)
            if (phase, i) in self._mass
        }
        every = torch.cat([x.flatten() for x in shares.values()]) if shares else None
        per_head = [shares[i].mean(0).tolist() if i in shares else None for i in range(layers)]
        return {
            "density": kept / pairs if pairs else None,
            "kept_mass": None if every is None else float(every.mean()),
            "kept_mass_p5": None if every is None else _percentile(every, 5),
            "density_per_head": density,
            "kept_mass_per_head": per_head if shares else None,
            "calls": self._calls[phase],
        }


def _percentile(values: Tensor, percent: int) -> float:
    """Nearest-rank percentile; torch.quantile refuses more than 16 million values."""
    rank = max(-(-len(values) * percent // 100), 1)
    return float(values.kthvalue(rank).values)


__all__ = ["NOT_LOOKED_AT", "PHASES", "Tally", "kept_mass", "sampled_rows"]
