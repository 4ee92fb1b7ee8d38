"""What a sparsified model's masks let through, and how much attention lies there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..masks import Mask

PHASES = ("prefill", "decode")


def sampled_rows(queries: int, count: int) -> list[int]:
    """``count`` rows spread evenly over ``queries``, the last one included."""
    count = min(count, queries)
    return [(i + 1) * queries // count - 1 for i in range(count)]


def kept_mass(
    query: Tensor, key: Tensor, mask: Mask, rows: list[int], scale: float, window: int | None
) -> Tensor:
    """Share of the model's own attention that lies on the keys which ``mask`` keeps.

    The attention is computed in float32 for the given rows alone, over the keys that the model
    itself reads (causal, within its sliding window).

    Args:
        query: [b, h, q, d].
        key: [b, g, k, d].
        mask: mask of these queries and keys.
        rows: query rows.
        scale: factor on the logits.
        window: the model's sliding window, or None.

    Returns:
        float32 [b, h, len(rows)], each between 0 and 1.
    """
    groups = key.shape[1]
    shares = []
    for row in rows:
        own = mask.offset + row
        first = 0 if window is None else max(own + 1 - window, 0)
        near = key[:, :, first : own + 1].float()
        logits = torch.einsum(
            "bgrd,bgkd->bgrk", query[:, :, row].float().unflatten(1, (groups, -1)), near
        )
        true = (logits * scale).softmax(-1).flatten(1, 2)
        kept = mask.dense((row, row + 1))[:, :, 0, first : own + 1]
        kept = kept.repeat_interleave(true.shape[1] // kept.shape[1], 1)
        shares.append((true * kept).sum(-1))
    return torch.stack(shares, -1)


class Tally:
    """Densities and kept mass, summed per phase, layer and head without reading the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.impl: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._pairs: Counter[tuple[str, int]] = Counter()
        self._mass: dict[tuple[str, int], list[Tensor]] = {}

    def count(self, phase: str, impl: str) -> None:
        """One attention call."""
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
        kept = share.sum(0) * mask.causal_pairs()
        place = phase, layer
        self._kept[place] = kept + self._kept[place].to(kept) if place in self._kept else kept
        self._pairs[place] += batch * (mask.causal_pairs() + mask.queries * first_key)

    def add_mass(self, phase: str, layer: int, shares: Tensor) -> None:
        """Kept shares [b, h, rows] of one call."""
        self._mass.setdefault((phase, layer), []).append(shares.transpose(1, 2).flatten(0, 1))

    def summary(self, layers: int) -> dict[str, Any]:
        """Densities and kept mass as plain numbers; see ``Run.summary``."""
        out: dict[str, Any] = {phase: self._phase(phase, layers) for phase in PHASES}
        out["impl"] = dict(self.impl)
        return out

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
