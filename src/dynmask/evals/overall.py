"""One line for each policy over all groups of a report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .points import is_reference
from .report import Report, Row, paired_difference, proportion_interval

__all__ = ["EVERYTHING", "baseline_of", "overall"]

EVERYTHING = "all groups"
# What is a mean over the groups. Groups of one evaluation have equally many items.
MEANS = (
    "density", "density_decode", "kept_mass", "kept_mass_p5", "kept_mass_decode", "kl", "agreement",
    "widened", "prefill_seconds", "ms_per_token", "selection_seconds",
)  # fmt: skip
MOST = ("peak_memory_bytes", "cache_bytes")


def baseline_of(report: Report) -> str | None:
    """Return the name of the policy that the others were compared with, or None."""
    compared = {row.policy for row in report.rows if row.difference is not None}
    names = dict.fromkeys(row.policy for row in report.rows if row.policy not in compared)
    prints = report.header["settings"].get("policies") or {}
    own = [name for name in names if prints.get(name) == "own attention"]
    full = own or [name for name in names if is_reference(name)]
    return full[0] if full else next(iter(names), None) if compared else None


def overall(report: Report) -> list[Row]:
    """Return one row for each policy over all groups: the report's own where there is one group.

    Accuracy and its difference are those of all items that have a score. Densities, masses,
    divergences, seconds and milliseconds are means of the groups' figures; memory is the largest.
    """
    if len(report.groups) <= 1:
        return list(report.rows)
    base = baseline_of(report)
    names = dict.fromkeys(row.policy for row in report.rows)
    return [_row(report, name, base if name != base else None) for name in names]


def _row(report: Report, name: str, base: str | None) -> Row:
    rows = [row for row in report.rows if row.policy == name]
    answered = [row for row in rows if row.right is not None]
    right = sum(row.right or 0 for row in answered) if answered else None
    n = sum(row.n for row in answered or rows)
    difference = interval = method = None
    mine, theirs = _paired(report, name, base)
    if mine:
        seed = report.header["settings"].get("seed") or 0
        difference, interval, method = paired_difference(mine, theirs, seed)
    values: dict[str, Any] = {key: _mean(getattr(row, key) for row in rows) for key in MEANS}
    values |= {key: _most(getattr(row, key) for row in rows) for key in MOST}
    return Row(
        policy=name,
        group=EVERYTHING,
        n=n,
        causal=all(row.causal for row in rows),
        right=right,
        accuracy=None if right is None else right / n,
        accuracy_interval=None if right is None else proportion_interval(right, n),
        difference=difference,
        difference_interval=interval,
        difference_method=method,
        **values,
    )


def _paired(report: Report, name: str, base: str | None) -> tuple[list[float], list[float]]:
    """Return the scores of a policy and of the baseline on the items that both answered."""
    told: dict[str, dict[tuple[str, int], float]] = {name: {}, base or "": {}}
    for item in report.items:
        if item.policy in told:
            told[item.policy][item.group, item.index] = item.score
    shared = [at for at in told[name] if base is not None and at in told[base]]
    return [told[name][at] for at in shared], [told[base or ""][at] for at in shared]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _most(values: Iterable[int | None]) -> int | None:
    known = _known(values)
    return int(max(known)) if known else None


def _known(values: Iterable[float | None]) -> Sequence[float]:
    return [value for value in values if value is not None]
