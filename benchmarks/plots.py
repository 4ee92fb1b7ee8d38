"""Picture of the GPU results: ``python benchmarks/plots.py [results] [picture]``.

One panel per mask: time against length, logarithmic both ways. Dense attention, ours with
everything included, selection and lowering alone, and the floor that the device's measured rates
set (kept work over matrix rate, or every tensor once over bandwidth, whichever is longer).
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.headline import rows_of
from dynmask.evals.plots import figure_of, save_figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PICTURE = ROOT / "docs" / "gpu_time.png"

TITLES = {
    "top_w": "exact running top-w",
    "streaming": "sinks and window",
    "block": "key blocks, 5 %",
    "structural": "64 diagonals + 32 verticals",
    "auto": 'plain causal, impl="auto"',
}
DENSE = {
    "cudnn": ("cuDNN", "tab:red"),
    "fa2": ("FlashAttention-2", "tab:orange"),
    "sdpa": ("SDPA", "tab:red"),
    "flex": ("FlexAttention, kernel alone", "tab:green"),
}
STYLES = {"bands": "-", "scattered": "--", "": "-"}

Row = dict[str, Any]
Line = list[tuple[int, float]]


def line_of(rows: list[Row], field: str = "median_s") -> Line:
    """(length, milliseconds) in ascending order, where the field was measured."""
    return sorted((row["keys"], 1e3 * row[field]) for row in rows if row.get(field))


def sum_line(rows: list[Row]) -> Line:
    """Selection and lowering together."""
    both = [{**r, "both": r["selection_s"] + r["lowering_s"]} for r in rows if "selection_s" in r]
    return line_of(both, "both")


def crossover(ours: Line, dense: Line) -> tuple[int, float] | None:
    """Where ours becomes the faster one, by straight lines between lengths that both have."""
    theirs = dict(dense)
    both = [(n, t, theirs[n]) for n, t in ours if n in theirs]
    for (n0, a0, b0), (n1, a1, b1) in pairwise(both):
        before, after = math.log(a0 / b0), math.log(a1 / b1)
        if before > 0 >= after:
            share = before / (before - after)
            n = math.exp(math.log(n0) + share * math.log(n1 / n0))
            return round(n), math.exp(math.log(a0) + share * math.log(a1 / a0))
    return None


def draw_mask(axis: Any, mask: str, rows: list[Row]) -> None:
    """One panel."""
    for name, (_, colour) in DENSE.items():
        points = line_of(_first_layout([r for r in rows if r["variant"] == name]))
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="s", markersize=4)
    mine = [row for row in rows if row["variant"] == "dynmask"]
    for layout in dict.fromkeys(row["layout"] for row in mine):
        own = [row for row in mine if row["layout"] == layout]
        style = STYLES.get(layout, "-")
        _plot(axis, line_of(own), "tab:blue", style, marker="o", label=layout)
        _plot(axis, sum_line(own), "tab:purple", style, marker=".")
        _plot(axis, line_of(own, "floor_s"), "0.4", ":")
    dense = line_of(_first_layout([r for r in rows if r["variant"] == "cudnn"]))
    if mask != "auto":
        _mark_crossover(axis, line_of(_first_layout(mine)), dense)
    _decorate(axis, mask, rows)


def _first_layout(rows: list[Row]) -> list[Row]:
    """Rows of the first layout: dense time does not depend on it."""
    return [row for row in rows if row["layout"] == rows[0]["layout"]]


def _plot(axis: Any, points: Line, colour: str, style: str, **more: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, markersize=5, **more)


def _mark_crossover(axis: Any, ours: Line, dense: Line) -> None:
    """Say from where ours is the faster one, and by how much at the longest length."""
    if not ours or not dense:
        return
    found = crossover(ours, dense)
    if found:
        axis.axvline(found[0], color="0.6", linewidth=0.8)
        axis.annotate(f"crossover\n{found[0]:,}", found, fontsize=7, xytext=(4, -22),
                      textcoords="offset points")  # fmt: skip
    else:
        first = [n for n, t in ours if dict(dense).get(n, 0) > t]
        words = f"faster from {first[0]:,} on" if first else "slower at every length"
        axis.text(0.03, 0.95, words, transform=axis.transAxes, fontsize=7, va="top")
    n, t = ours[-1]
    if n in dict(dense):
        gain = dict(dense)[n] / t
        axis.annotate(f"{gain:.0f}x" if gain >= 10 else f"{gain:.1f}x", (n, t), fontsize=8,
                      xytext=(-4, 7), textcoords="offset points", ha="right")  # fmt: skip


def _decorate(axis: Any, mask: str, rows: list[Row]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row["keys"] for row in rows})
    axis.set_xticks(ticks, [_length(n) for n in ticks], fontsize=7)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.grid(alpha=0.25)
    axis.margins(x=0.12)
    widths = sorted({row["width"] for row in rows} - {0})
    more = f", w {' and '.join(map(str, widths))}" if mask == "top_w" else ""
    axis.set_title(TITLES[mask] + more, fontsize=9)
    if any(row["layout"] for row in rows):
        axis.legend(fontsize=7, loc="lower right", handlelength=3.5)


def _length(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}K" if n >= 1024 else str(n)


def _legend(matplotlib: Any, axis: Any, rows: list[Row]) -> None:
    """What the colours mean, and what decoding reached, which has no length to be drawn over."""
    line = matplotlib.lines.Line2D
    measured = {row["variant"] for row in rows}
    entries = [("dynmask, selection and lowering included", "tab:blue", "-", "o"),
               ("selection and lowering", "tab:purple", "-", "."),
               ("roofline floor", "0.4", ":", "")]  # fmt: skip
    for name, (label, colour) in DENSE.items():
        if name in measured:
            label = "cuDNN (plain causal: SDPA's own choice)" if name == "cudnn" else label
            if name != "sdpa" or "cudnn" not in measured:
                entries.append((label, colour, "-", "s"))
    handles = [
        line([], [], color=colour, linestyle=style, marker=marker, label=label)
        for label, colour, style, marker in entries
    ]
    axis.set_axis_off()
    axis.legend(handles=handles, fontsize=8, loc="upper left", frameon=False)
    axis.text(0.02, 0.08, decode_words(rows), fontsize=8, transform=axis.transAxes)


def decode_words(rows: list[Row]) -> str:
    """Decoding in words."""
    decode = {row["variant"]: row for row in rows if row.get("mask") == "decode"}
    mine = decode.get("dynmask", {})
    if "median_s" not in mine:
        return ""
    words = [
        f"decode, {mine['width']:,} of {mine['keys']:,} keys, lists made beforehand:",
        f"{1e6 * mine['median_s']:.0f} µs, {mine['bandwidth_share']:.0%} of a copy's bandwidth",
    ]
    dense = [decode[n]["median_s"] for n in ("sdpa", "folded") if "median_s" in decode.get(n, {})]
    if dense:
        words.append(f"dense: {1e3 * min(dense):.2f} ms, {min(dense) / mine['median_s']:.0f}x")
    return "\n".join(words)


def draw(rows: list[Row], path: Path) -> Path:
    """All panels into one picture.

    Raises:
        ValueError: nothing was measured.
    """
    timed = [row for row in rows if row.get("mask") and "median_s" in row]
    masks = [mask for mask in TITLES if any(row["mask"] == mask for row in timed)]
    if not masks:
        raise ValueError("rows: expected measured cases, received none; run benchmarks/gpu.py")
    matplotlib, figure_type = figure_of()
    lines = -(-(len(masks) + 1) // 3)
    figure = figure_type(figsize=(12, 3.6 * lines + 0.3), layout="constrained")
    axes = list(figure.subplots(lines, 3, squeeze=False).flat)
    for axis, mask in zip(axes, masks, strict=False):
        draw_mask(axis, mask, [row for row in timed if row["mask"] == mask])
    _legend(matplotlib, axes[len(masks)], timed)
    for axis in axes[len(masks) + 1 :]:
        axis.set_axis_off()
    first = timed[0]
    caption = (
        f"{first['device']['name']}, torch {first['versions']['torch']}, bfloat16, 32 query heads, "
        f"8 kv heads, head dim 128, medians, {first['date'][:10]}"
    )
    return save_figure(figure, path, caption)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(draw(rows_of(source), Path(sys.argv[2]) if len(sys.argv) > 2 else PICTURE))
