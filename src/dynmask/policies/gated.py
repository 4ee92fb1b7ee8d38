"""Gated: every attention map (layer x head) has a gate that says what it reads, and how much."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..masks import LifetimeMask
from .base import Layer, check_field
from .weights import causal_weights


@dataclass(frozen=True, eq=False)
class Gates:
    """What each attention map reads besides the sinks: one number per map, [layers, heads].

    Attributes:
        window: int32, newest keys, the query's own counted; ``LifetimeMask.INF`` is a dense map.
        columns: int32, keys that are chosen from the input, at most.
        share: float32, so many columns more for each key of the input (length-elastic).
    """

    window: Tensor
    columns: Tensor
    share: Tensor

    def __post_init__(self) -> None:
        for item in fields(self):
            x = getattr(self, item.name)
            kind = torch.float32 if item.name == "share" else torch.int32
            ok = isinstance(x, Tensor) and x.dtype == kind and x.dim() == 2
            if not ok or x.shape != self.window.shape:
                got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"gates.{item.name}: expected {kind} [layers, heads], the same for all, "
                    f"received {got}"
                )
            least = 1 if item.name == "window" else 0
            if not bool((x >= least).all()):
                raise ValueError(
                    f"gates.{item.name}: expected numbers of at least {least}, received "
                    f"{x.min().item()}"
                )

    @classmethod
    def full(cls, layers: int, heads: int) -> Gates:
        """Every map dense."""
        window = torch.full((layers, heads), LifetimeMask.INF, dtype=torch.int32)
        return cls(window, torch.zeros_like(window), torch.zeros(layers, heads))

    @property
    def dense(self) -> Tensor:
        """Which maps are dense: bool [layers, heads]."""
        return self.window == LifetimeMask.INF

    def replaced(self, maps: Tensor, window: int, columns: int = 0, share: float = 0.0) -> Gates:
        """The same gates, but these numbers where ``maps`` (bool [layers, heads]) is True."""
        return Gates(
            torch.where(maps, torch.tensor(window, dtype=torch.int32), self.window),
            torch.where(maps, torch.tensor(columns, dtype=torch.int32), self.columns),
            torch.where(maps, torch.tensor(share), self.share),
        )

    def counts(self, layer: int, keys: int) -> list[int]:
        """Columns of each head of a layer where there are so many keys."""
        both = zip(self.columns[layer].tolist(), self.share[layer].tolist(), strict=True)
        return [min(int(count + share * keys), keys) for count, share in both]


@dataclass(frozen=True)
class Gated:
    """Sinks, a window, and the columns that the newest queries look at, each as wide as the gate
    of the map allows.

    A key's worth is the largest probability it gets from one of the last queries of a call (the
    question, in a prompt; the query itself, while decoding). The most worthy keys outside sinks
    and window are columns: every later query reads them. Maps whose worth lies in their window
    get none, for a key below ``least`` is not worth reading (the zero-shot gate). With ``gates``,
    window and columns differ from map to map: ``dynmask calibrate --policy gated`` chooses them
    by what they cost the model's output.

    Args:
        sinks: first keys that are always read.
        window: newest keys of every map, without gates.
        columns: most keys that a map chooses, without gates.
        share: so many columns more for each key of the input, without gates.
        least: worth of a column, at least.
        last: queries that are looked at.
        pool: neighbours whose worth a key takes over, itself counted, odd: what follows a key
            that is found is what is asked for.
        gates: numbers for each map; they replace window, columns and share.
    """

    sinks: int = 4
    window: int = 128
    columns: int = 512
    share: float = 0.0
    least: float = 1e-3
    last: int = 64
    pool: int = 1
    gates: Gates | None = field(default=None, compare=False)

    name: ClassVar[str] = "gated"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("columns", 0), ("last", 1)):
            value = getattr(self, name)
            check_field(self.name, name, value, value >= least, f">= {least}")
        check_field(self.name, "share", self.share, 0 <= self.share <= 1, "in [0, 1]")
        check_field(self.name, "least", self.least, 0 <= self.least <= 1, "in [0, 1]")
        odd = self.pool >= 1 and self.pool % 2 == 1
        check_field(self.name, "pool", self.pool, odd, "odd and >= 1")

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Gates must be those of a model of this shape."""
        if self.gates is not None and tuple(self.gates.window.shape) != (layers, heads):
            raise ValueError(
                f"gated: expected gates for {layers} layers of {heads} heads, received "
                f"{tuple(self.gates.window.shape)}; calibrate this model"
            )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """Window, sinks and columns of each head, as deaths [b, h, keys]."""
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        window, counts = self._budgets(layer.index, heads, keys)
        if min(window) >= keys:
            return LifetimeMask.causal(keys, queries, device=key.device)
        k = torch.arange(keys, device=key.device)
        width = torch.tensor(window).to(key.device, non_blocking=True)[:, None]
        death = (k + width).clamp(max=LifetimeMask.INF)  # [h, keys] int64: the sum may pass INF
        death[:, : max(self.sinks - layer.first_key, 0)] = LifetimeMask.INF
        death = death.int().expand(batch, -1, -1)
        most = max(counts)
        if most:
            death = death.clone()  # every batch row has columns of its own
            chosen, worth = self._columns(query, key, width, layer.first_key, most)
            limit = torch.tensor(counts).to(key.device, non_blocking=True)[:, None]
            keep = (torch.arange(most, device=key.device) < limit) & (worth >= self.least)
            old = death.gather(-1, chosen)
            death.scatter_(-1, chosen, old.masked_fill(keep, LifetimeMask.INF))
        reads = max(w + c for w, c in zip(window, counts, strict=True)) + self.sinks
        return LifetimeMask(death, queries, most=min(keys, reads))

    def _budgets(self, layer: int, heads: int, keys: int) -> tuple[list[int], list[int]]:
        """Window and columns of each head."""
        if self.gates is not None:
            return self.gates.window[layer].tolist(), self.gates.counts(layer, keys)
        return [self.window] * heads, [min(int(self.columns + self.share * keys), keys)] * heads

    def _columns(
        self, query: Tensor, key: Tensor, width: Tensor, first_key: int, most: int
    ) -> tuple[Tensor, Tensor]:
        """The ``most`` keys of the largest worth, best first, and their worth: [b, h, most].

        What sinks and the last row's window hold is worth nothing here: it is read anyway.
        """
        rows, keys = query[:, :, -self.last :], key.shape[2]
        last, members = rows.shape[2], query.shape[1] // key.shape[1]
        position = torch.arange(keys - last, keys, device=key.device)[:, None]
        k = torch.arange(keys, device=key.device)
        parts = []
        for g, some in enumerate(rows.split(members, 1)):  # all heads at once are gigabytes
            share = causal_weights(some, key[:, g : g + 1])
            own = width[g * members : (g + 1) * members, :, None]
            near = k > position - own  # in the window of that row
            parts.append(share.masked_fill_(near, 0).amax(-2))
        worth = torch.cat(parts, 1)
        if self.pool > 1:
            worth = torch.nn.functional.max_pool1d(worth, self.pool, 1, self.pool // 2)
        worth[..., : max(self.sinks - first_key, 0)] = 0
        if self.pool > 1:  # what spread into the newest row's window is read anyway
            worth.masked_fill_(k > keys - 1 - width, 0)
        found = worth.topk(most, -1)
        return found.indices, found.values
