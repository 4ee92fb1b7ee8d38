"""Pictures of evaluations. matplotlib is imported when the first one is drawn.

Every picture says which model, how many items, which device and which seed it stands for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .points import MEASURES, Point, frontier, is_reference, points
from .report import ItemResult, Report

__all__ = [
    "depth_bands",
    "draw_report",
    "figure_of",
    "heads",
    "heatmap",
    "pareto",
    "pareto_of",
    "save_figure",
]


def figure_of() -> tuple[Any, Any]:
    """Return matplotlib and its class of figures that draw to files, without a screen.

    Raises:
        RuntimeError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(
            "pictures: expected matplotlib, found none; install it with "
            "pip install 'dynmask[plot]' or leave the pictures out with --no-plots"
        ) from error
    from matplotlib.figure import Figure

    return matplotlib, Figure


def save_figure(figure: Any, path: str | os.PathLike[str], caption: str) -> Path:
    """Write ``figure`` with ``caption`` at its foot, through a temporary file, and return it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        figure.savefig(temporary, dpi=130)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def heads(
    panels: Mapping[str, tuple[list[Any], list[Any] | None]],
    path: str | os.PathLike[str],
    *,
    caption: str,
) -> Path:
    """Draw bars of density per layer and head, with the kept attention mass as dots.

    Args:
        panels: a policy's name -> (density, kept mass or None), both layers x heads.
        path: the file to write.
        caption: model, n, device and seed.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not panels:
        raise ValueError("panels: expected the densities of at least one policy, received none")
    matplotlib, figure_type = figure_of()
    widest = max(sum(len(layer or ()) for layer in density) for density, _ in panels.values())
    figure = figure_type(
        figsize=(max(7.0, min(0.16 * widest + 3, 24)), 1.9 * len(panels) + 0.8),
        layout="constrained",
    )
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    colours = matplotlib.colormaps["tab10"].colors
    for axis, (name, (density, mass)) in zip(axes, panels.items(), strict=True):
        start = 0
        ticks, labels = [], []
        for layer, values in enumerate(density):
            if values is None:
                continue
            places = [start + head for head in range(len(values))]
            axis.bar(places, [100 * v for v in values], color=colours[layer % 10], width=0.85)
            if mass is not None and mass[layer] is not None:
                axis.plot(places, [100 * v for v in mass[layer]], "k.", markersize=4)
            ticks.append(start + (len(values) - 1) / 2)
            labels.append(str(layer))
            start += len(values) + 1
        axis.set_xticks(ticks, labels, fontsize=7)
        axis.set_ylim(0, 105)
        axis.set_ylabel("%")
        dots = "; dots: attention mass kept" if mass is not None else ""
        axis.set_title(f"{name}: bars: density per head{dots}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("layer (one bar per head)")
    return save_figure(figure, path, caption)


def pareto(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draw accuracy, divergence and perplexity, what there is of them, against density.

    Raises:
        ValueError: if no row has a density and one of them.
    """
    title = f"{report.task}: quality against density"
    return pareto_of(report.rows, path, title=title, caption=report.caption())


def pareto_of(
    rows: Iterable[Any], path: str | os.PathLike[str], *, title: str, caption: str
) -> Path:
    """Draw quality against density from rows of reports or of ``benchmarks/results``.

    One panel for each measure, one colour for each policy, one marker for each group; full
    attention is a star. After ten policies colours come again, with the next marker. A thin line
    joins the widths of a policy; a dotted one joins what no other policy beats, where all points
    are of one group.

    Args:
        rows: rows of a report, or mappings as in result files; those without a density or without
            any measure are left out.
        path: the file to write.
        title: the heading.
        caption: model, n, device and seed.

    Raises:
        ValueError: if nothing can be drawn.
    """
    several = list(rows)
    panels = {measure: points(several, measure) for measure in MEASURES}
    # full attention alone says nothing about divergence from full attention
    panels = {
        measure: found
        for measure, found in panels.items()
        if found and (measure != "kl" or not all(point.reference for point in found))
    }
    if not panels:
        raise ValueError(
            "rows: expected some with a density and a result, received none; take rows of a "
            "report or of a result file that has accuracy, kl or perplexity"
        )
    matplotlib, figure_type = figure_of()
    figure = figure_type(figsize=(4.6 * len(panels) + 2.6, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    every = [point for found in panels.values() for point in found]
    policies = list(dict.fromkeys(point.policy for point in every))
    groups = list(dict.fromkeys(point.group for point in every))
    colours = matplotlib.colormaps["tab10"].colors
    style = {
        (name, group): (
            "black" if is_reference(name) else colours[i % 10],
            "*" if is_reference(name) else MARKERS[(j + i // 10) % len(MARKERS)],
        )
        for i, name in enumerate(policies)
        for j, group in enumerate(groups)
    }
    for axis, (measure, found) in zip(axes, panels.items(), strict=True):
        _pareto_panel(matplotlib, axis, measure, found, style)
    _legend(matplotlib, axes[-1], policies, groups, style)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path, caption)


MARKERS = "osD^vPX"


def _pareto_panel(
    matplotlib: Any,
    axis: Any,
    measure: str,
    found: Sequence[Point],
    style: Mapping[tuple[str, str], tuple[Any, str]],
) -> None:
    kind = MEASURES[measure]
    floor = 0.5 * min((p.value for p in found if p.value > 0), default=1e-6)
    for point in found:
        colour, marker = style[point.policy, point.group]
        value = max(point.value, floor) if measure == "kl" else point.value
        error = None
        if point.low is not None and point.high is not None:
            error = [[max(value - point.low, 0)], [max(point.high - value, 0)]]
        axis.errorbar(
            100 * point.density, value, yerr=error, marker=marker, color=colour, capsize=2,
            markersize=10 if point.reference else 7, elinewidth=1, linestyle="",
        )  # fmt: skip
    curves = [(frontier(found, kind.better), "0.5", ":")]
    if len({point.group for point in found}) > 1:
        curves = []
    for at, (colour, _) in style.items():
        own = [point for point in found if (point.policy, point.group) == at]
        curves.append((sorted(own, key=lambda point: point.width or 0), colour, "-"))
    for curve, colour, line in curves:
        heights = [max(p.value, floor) if measure == "kl" else p.value for p in curve]
        densities = [100 * p.density for p in curve]
        axis.plot(densities, heights, line, color=colour, linewidth=1, alpha=0.7, zorder=0)
    axis.set_xscale("log")
    axis.set_xlabel("density: kept pairs / causal pairs, prefill, % (log)")
    axis.set_ylabel(kind.words + (" (bars: 95 %)" if kind.interval else ""))
    if measure == "accuracy":
        axis.set_ylim(-4, 104)
    if measure == "kl":
        axis.set_yscale("log")
        axis.set_ylabel(f"{kind.words} (log; 0 at the foot)")
    plain = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(plain)
    low, high = axis.get_xlim()
    # labels between the powers of ten have room on a short axis only
    axis.xaxis.set_minor_formatter(plain if high < 12 * low else matplotlib.ticker.NullFormatter())
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(alpha=0.25)


def _legend(
    matplotlib: Any,
    axis: Any,
    policies: list[str],
    groups: list[str],
    style: Mapping[tuple[str, str], tuple[Any, str]],
) -> None:
    line = matplotlib.lines.Line2D
    handles = []
    for name in policies:
        colour, marker = style[name, groups[0]]
        handles.append(line([], [], color=colour, marker=marker, linestyle="", label=name))
    if len(groups) > 1:
        handles += [
            line([], [], color="0.4", marker=MARKERS[j % len(MARKERS)], linestyle="", label=group)
            for j, group in enumerate(groups)
        ]
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def heatmap(report: Report, path: str | os.PathLike[str]) -> Path:
    """Draw the share of right answers over depth and length, one panel per policy.

    All panels share one colour scale and the cells carry their numbers.

    Raises:
        ValueError: if no item says at which depth its evidence stands.
    """
    items = [item for item in report.items if isinstance(item.meta.get("depth"), int | float)]
    if not items:
        raise ValueError(
            "report: expected items with a depth, received none; this picture is for tasks such "
            "as needle, whose items say where the evidence stands"
        )
    _, figure_type = figure_of()
    bands = depth_bands(items)
    groups = list(dict.fromkeys(item.group for item in items))
    policies = list(dict.fromkeys(item.policy for item in items))
    columns = min(3, len(policies))
    lines = -(-len(policies) // columns)
    figure = figure_type(
        figsize=(columns * max(2.6, 0.8 * len(groups) + 1.6), lines * (0.34 * len(bands) + 1.0)),
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    image = None
    for axis in axes.flat[len(policies) :]:
        axis.set_axis_off()
    for axis, policy in zip(axes.flat, policies, strict=False):
        cells = torch.full((len(bands), len(groups)), torch.nan)
        for row, (low, high) in enumerate(bands):
            for column, group in enumerate(groups):
                scores = [
                    item.score
                    for item in items
                    if item.policy == policy
                    and item.group == group
                    and low <= item.meta["depth"] <= high
                ]
                if scores:
                    cells[row, column] = 100 * sum(scores) / len(scores)
        image = axis.imshow(cells.numpy(), vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for row in range(len(bands)):
            for column in range(len(groups)):
                value = float(cells[row, column])
                if value == value:
                    colour = "white" if value < 15 or value > 85 else "black"
                    axis.text(
                        column,
                        row,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=colour,
                    )
        axis.set_xticks(range(len(groups)), groups, fontsize=7)
        labels = [f"{50 * (low + high):.0f}" for low, high in bands]
        axis.set_yticks(range(len(bands)), labels, fontsize=7)
        axis.set_ylabel("depth, %", fontsize=8)
        axis.set_title(policy, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.7, label="right answers, %")
    return save_figure(figure, path, report.caption())


def depth_bands(items: Iterable[ItemResult]) -> list[tuple[float, float]]:
    """Return the depths asked for, or ten equal bands when they are drawn at random."""
    depths = sorted({round(float(item.meta["depth"]), 4) for item in items})
    if len(depths) <= 12:
        return [(depth - 1e-4, depth + 1e-4) for depth in depths]
    edges = [band / 10 for band in range(11)]
    # A depth on an edge belongs to the band that it begins; the last band is closed.
    return [(a, b - 1e-9 if b < 1 else 1.0) for a, b in pairwise(edges)]


def draw_report(report: Report, directory: str | os.PathLike[str]) -> list[Path]:
    """Draw what the report holds into ``directory`` and return the files.

    Quality against density; the depth x length map, when items say their depth; bars of density
    and kept mass per head, when they were measured.
    """
    folder = Path(directory)
    written: list[Path] = []
    if any(points(report.rows, measure) for measure in ("accuracy", "perplexity")):
        written.append(pareto(report, folder / f"{report.task}-pareto.png"))
    if any(isinstance(item.meta.get("depth"), int | float) for item in report.items):
        written.append(heatmap(report, folder / f"{report.task}-heatmap.png"))
    group = report.groups[-1] if report.groups else None
    panels = {
        row.policy: (row.density_per_head, row.kept_mass_per_head)
        for row in report.rows
        if row.group == group and row.density_per_head is not None
    }
    if panels:
        written.append(
            heads(
                panels,
                folder / f"{report.task}-heads.png",
                caption=f"{group}, {report.caption()}",
            )
        )
    return written
