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

from .report import ItemResult, Report, Row

__all__ = ["draw_report", "figure_of", "heads", "heatmap", "pareto", "save_figure"]


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
    """Draw accuracy (perplexity where there is none) against density, one point per row.

    Raises:
        ValueError: if no row has both.
    """
    points: list[tuple[Row, float, float]] = []
    for row in report.rows:
        value = row.accuracy if row.accuracy is not None else row.perplexity
        if row.density is not None and value is not None:
            points.append((row, row.density, value))
    if not points:
        raise ValueError("report: expected rows with a density and a result, received none")
    matplotlib, figure_type = figure_of()
    figure = figure_type(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["tab10"].colors
    policies = list(dict.fromkeys(row.policy for row in report.rows))
    markers = "osD^vP*X"
    answers = report.rows[0].accuracy is not None
    scale = 100 if answers else 1
    for row, density, value in points:
        colour = colours[policies.index(row.policy) % 10]
        marker = markers[report.groups.index(row.group) % len(markers)]
        error = None
        if row.accuracy_interval is not None:
            low, high = row.accuracy_interval
            error = [[scale * max(value - low, 0)], [scale * max(high - value, 0)]]
        axis.errorbar(
            100 * density,
            scale * value,
            yerr=error,
            marker=marker,
            color=colour,
            capsize=2,
            markersize=7,
            elinewidth=1,
            linestyle="",
        )
    _legend(matplotlib, axis, policies, report.groups, colours, markers)
    axis.set_xscale("log")
    axis.set_xlabel("density: kept pairs / causal pairs, prefill, % (log)")
    axis.set_ylabel("right answers, % (bars: 95 %)" if answers else "perplexity")
    if answers:
        axis.set_ylim(-4, 104)
    plain = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(plain)
    low, high = axis.get_xlim()
    # labels between the powers of ten have room on a short axis only
    axis.xaxis.set_minor_formatter(plain if high < 12 * low else matplotlib.ticker.NullFormatter())
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(alpha=0.25)
    axis.set_title(f"{report.task}: quality against density")
    return save_figure(figure, path, report.caption())


def _legend(
    matplotlib: Any,
    axis: Any,
    policies: list[str],
    groups: list[str],
    colours: Sequence[Any],
    markers: str,
) -> None:
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], color=colours[i % 10], marker="o", linestyle="", label=name)
        for i, name in enumerate(policies)
    ]
    if len(groups) > 1:
        handles += [
            line([], [], color="0.4", marker=markers[i % len(markers)], linestyle="", label=group)
            for i, group in enumerate(groups)
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
    bands = _depth_bands(items)
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


def _depth_bands(items: Iterable[ItemResult]) -> list[tuple[float, float]]:
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
    if any(row.density is not None for row in report.rows):
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
