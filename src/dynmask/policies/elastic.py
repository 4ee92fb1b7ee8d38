"""Elastic windows: every head has a span of its own, and it may grow with the text (MoA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import LifetimeMask
from .base import Layer, LooksAtNone, check_field, own_heads

PerHead = float | tuple[tuple[float, ...], ...]
"""One number for all heads, or for each layer one for each head (query heads or kv heads)."""


@dataclass(frozen=True)
class Elastic(LooksAtNone):
    """Sinks and a span of ``alpha + beta N`` newest keys per head (MoA, arXiv 2406.14909).

    The paper's N is the length of the input, known before it is read. Here it is ``length``, or,
    when that is 0, the number of keys up to the row itself: so a row reads the same keys in
    prefill, in chunks and while decoding, and since no span grows by more than a key a row, a
    key that has left a span never returns: a lifetime mask. The paper chooses the spans by the
    loss that hiding keys causes; its published plans have the form of ``alpha`` and ``beta``.

    Args:
        alpha: keys of the span at N = 0; may be negative.
        beta: keys of the span for each key of N, from 0 to 1.
        sinks: keys at the start of the sequence that are always read, besides the span.
        least: keys that a span has at least, the row's own counted.
        length: N; 0 for as many keys as the row has before it, its own counted.
    """

    alpha: PerHead = 0.0
    beta: PerHead = 0.5
    sinks: int = 64
    least: int = 64
    length: int = 0

    name: ClassVar[str] = "elastic"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        for value in _numbers(self.alpha):
            check_field(self.name, "alpha", value, abs(value) < 2**31, "finite")
        for value in _numbers(self.beta):
            check_field(self.name, "beta", value, 0 <= value <= 1, "in [0, 1]")
        check_field(self.name, "sinks", self.sinks, self.sinks >= 0, ">= 0")
        check_field(self.name, "least", self.least, self.least >= 1, ">= 1")
        check_field(self.name, "length", self.length, self.length >= 0, ">= 0")
        object.__setattr__(self, "_spans", {})

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError unless the spans are for a model of this shape."""
        for name, table in (("alpha", self.alpha), ("beta", self.beta)):
            if not isinstance(table, tuple):
                continue
            counts = {len(row) for row in table}
            if len(table) != layers or not counts <= {heads, kv_heads}:
                raise ValueError(
                    f"elastic: expected {name} for {layers} layers of {heads} heads or {kv_heads} "
                    f"kv heads, received {len(table)} layers of {sorted(counts)}; give one number, "
                    "or one for every layer and head"
                )
        for index in range(layers):
            self._plan(index)

    def of_shard(self, rank: int, ranks: int) -> Elastic:
        """The policy of the heads that a rank holds under tensor parallelism."""

        def own(table: PerHead) -> PerHead:
            if not isinstance(table, tuple):
                return table
            return tuple(own_heads(row, rank, ranks) for row in table)

        return replace(self, alpha=own(self.alpha), beta=own(self.beta))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """A key dies at the first row whose span begins after it."""
        keys, queries, first = key.shape[2], query.shape[2], layer.first_key
        alpha, beta = self._of(layer.index, key.device)
        k = torch.arange(keys, device=key.device)
        count = k + first + 1  # keys of the sequence up to each row, its own counted
        span = (alpha + beta * (self.length or count)).floor().clamp(min=self.least)
        begin = (count - span).long().cummax(-1).values - first  # index of the span's first key
        begin, k = (x.expand(len(alpha), keys).contiguous() for x in (begin, k))
        death = torch.searchsorted(begin, k, right=True).int()
        sinks = max(self.sinks - first, 0)
        death[:, :sinks] = LifetimeMask.INF
        return LifetimeMask(death[None], queries, most=min(keys, sinks + self._widest(layer, keys)))

    def _widest(self, layer: Layer, keys: int) -> int:
        """Keys of the longest span of a layer, that of its last row."""
        count = self.length or layer.first_key + keys
        spans = (a + b * count for a, b in self._plan(layer.index))
        return max(self.least, *(math.floor(span) for span in spans))

    def _of(self, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Alpha and beta of a layer, float64 [heads, 1]; copied to a device once."""
        spans: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = self._spans  # type: ignore[attr-defined]
        if (index, device) not in spans:
            plan = torch.tensor(self._plan(index), dtype=torch.float64, device=device)
            spans[index, device] = plan[:, :1], plan[:, 1:]
        return spans[index, device]

    def _plan(self, index: int) -> list[tuple[float, float]]:
        """Alpha and beta of a layer's heads; one pair where all are alike."""
        rows: list[tuple[float, ...]] = []
        for name, table in (("alpha", self.alpha), ("beta", self.beta)):
            if isinstance(table, tuple) and not 0 <= index < len(table):
                raise ValueError(
                    f"elastic: expected {name} for layer {index}, received it for layers 0 to "
                    f"{len(table) - 1}"
                )
            rows.append(table[index] if isinstance(table, tuple) else (table,))
        heads = max(len(row) for row in rows)
        if any(len(row) not in (1, heads) for row in rows):
            raise ValueError(
                f"elastic: expected alpha and beta for the same heads of layer {index}, received "
                f"{len(rows[0])} and {len(rows[1])}"
            )
        alpha, beta = (row * (heads // len(row)) for row in rows)
        return list(zip(alpha, beta, strict=True))


def _numbers(table: PerHead) -> tuple[float, ...]:
    """All numbers of a table."""
    return tuple(x for row in table for x in row) if isinstance(table, tuple) else (table,)
