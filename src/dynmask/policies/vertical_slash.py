"""Vertical-slash: columns and diagonals that the last queries look at (MInference)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..masks import StructuralMask
from .base import AnyModel, Layer, check_field, last_rows
from .weights import line_sums


@dataclass(frozen=True)
class VerticalSlash(AnyModel):
    """Per head, the columns and diagonals with the most attention from the last queries.

    MInference 1.0 (arXiv 2407.02490), section 3.2: the softmax of the last ``last`` queries is
    summed over columns and over diagonals; the best of each are kept for every query. Chosen
    from this input, so a choice depends on later tokens: a prefill policy.

    Args:
        verticals: columns kept per head, the first ``sinks`` among them.
        slashes: diagonals kept per head, the newest ``window`` among them.
        last: queries that are looked at.
        sinks: first columns that are always kept.
        window: nearest diagonals that are always kept.
    """

    verticals: int = 1000
    slashes: int = 6096
    last: int = 64
    sinks: int = 30
    window: int = 100

    name: ClassVar[str] = "vertical_slash"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"

    def __post_init__(self) -> None:
        for field in ("verticals", "slashes", "last", "window"):
            value = getattr(self, field)
            check_field(self.name, field, value, value >= 1, ">= 1")
        check_field(self.name, "sinks", self.sinks, self.sinks >= 0, ">= 0")

    def rows_read(self, queries: int, layer: int) -> list[int]:
        """The last ones."""
        return last_rows(queries, self.last)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> StructuralMask:
        """Columns and diagonals from the softmax of the last queries."""
        keys, last = key.shape[2], min(self.last, query.shape[2])
        columns, diagonals = line_sums(query[:, :, -last:], key)
        columns[..., : max(self.sinks - layer.first_key, 0)] = float("inf")
        diagonals[..., : self.window] = float("inf")
        return StructuralMask(
            diagonals=_best(diagonals, self.slashes),
            verticals=_best(columns, self.verticals),
            keys=keys,
            queries=query.shape[2],
            checked=True,
        )


def _best(score: Tensor, n: int) -> Tensor:
    """Indices of the n best, ascending: int32 [b, h, n]."""
    return score.topk(min(n, score.shape[-1]), -1).indices.sort(-1).values.int()
