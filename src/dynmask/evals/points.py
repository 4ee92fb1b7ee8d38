"""Points of a Pareto plot: what a policy reads, and how well it does with it.

Rows of a report and rows of ``benchmarks/results`` give the same points, so that one curve can be
drawn from either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MEASURES", "Point", "frontier", "is_reference", "points"]


@dataclass(frozen=True)
class Measure:
    """A quality that can be drawn: where rows keep it, its words, and which way is better."""

    field: str
    title: str
    words: str
    better: str  # "higher" or "lower"
    interval: str | None = None
    scale: float = 1.0


MEASURES = {
    "accuracy": Measure(
        "accuracy", "Right answers", "right answers, %", "higher", "accuracy_interval", 100.0
    ),
    "kl": Measure("kl", "Divergence from full attention", "KL(full || policy), nats", "lower"),
    "perplexity": Measure("perplexity", "Perplexity", "perplexity", "lower"),
}
# Policies that read whatever the model itself would: what the others are held against.
REFERENCES = ("full", "causal")


@dataclass(frozen=True)
class Point:
    """One policy on one group of items.

    ``density`` is a share of the causal pairs. ``value`` and the ends of its 95 % interval are in
    the units of the measure's words. Points of one policy with several widths are one curve.
    """

    policy: str
    group: str
    density: float
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    width: int | None = None

    @property
    def reference(self) -> bool:
        """Whether this is the model with its full attention."""
        return is_reference(self.policy)


def is_reference(policy: str) -> bool:
    """Whether a policy's name in tables is that of full attention."""
    return policy.partition(":")[0] in REFERENCES


def points(rows: Iterable[Any], measure: str = "accuracy") -> list[Point]:
    """Return the points of the rows that have a density and the measure, in their order.

    Args:
        rows: rows of a report, or mappings as in ``benchmarks/results``, whose group may be told
            by ``group``, by ``task`` and ``length``, and a width of the policy by ``width``.
        measure: a name of ``MEASURES``.

    Raises:
        ValueError: on an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(
            f"measure: expected one of {sorted(MEASURES)}, received {measure!r}; pass one of them"
        )
    kind = MEASURES[measure]
    found = []
    for row in rows:
        tell = row.get if isinstance(row, Mapping) else lambda name, row=row: _told(row, name)
        density, value = tell("density"), tell(kind.field)
        if is_reference(str(tell("policy"))):
            density = 1.0 if density is None else density
            value = 0.0 if measure == "kl" else value
        if density is None or value is None:
            continue
        low, high = (tell(kind.interval) if kind.interval else None) or (None, None)
        found.append(
            Point(
                policy=str(tell("policy")),
                group=_group(tell),
                density=float(density),
                value=kind.scale * float(value),
                low=None if low is None else kind.scale * float(low),
                high=None if high is None else kind.scale * float(high),
                n=tell("n"),
                width=tell("width"),
            )
        )
    return found


def frontier(found: Sequence[Point], better: str) -> list[Point]:
    """Return the points that no other one beats, by density: at most as dense, at least as good."""
    sign = 1 if better == "higher" else -1
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.density, -sign * point.value)):
        if not best or sign * point.value > sign * best[-1].value:
            best.append(point)
    return best


def _told(row: Any, name: str) -> Any:
    return getattr(row, name, None)


def _group(tell: Any) -> str:
    length = tell("length")
    size = tell("group") or (f"{length:,} tokens" if length else None)
    return ", ".join(str(part) for part in (tell("task"), size) if part) or "all"
