"""Table and plot of what the needle recipe measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def name_of(row: Row) -> str:
    """Return how a row's line is called: the variant, and how many keys it read."""
    keys = "all keys" if row["width"] is None else f"w {row['width']:,}"
    return f"{row['variant']}, {keys}"


def groups_of(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of each way of training: (start, minutes or steps)."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        effort = f"{row['steps']:,} steps" if row.get("steps") else f"{row['minutes']:g} minutes"
        found.setdefault((row.get("start") or "nothing", effort), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """Return a markdown table for each way of training: right answers at each length."""
    parts = []
    for (start, effort), some in groups_of(rows).items():
        lengths = sorted({row["length"] for row in some})
        cells = {(name_of(row), row["length"]): row for row in some}
        lines = [
            f"Trained on from {start}, {effort}:",
            "",
            "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
            "|" + "---|" * (1 + len(lengths)),
        ]
        for name in dict.fromkeys(map(name_of, some)):
            found = [cells.get((name, n)) for n in lengths]
            shown = [f"{row['accuracy']:.1%} of {row['n']}" if row else "-" for row in found]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(rows: list[Row], path: Path) -> None:
    """Draw right answers with Wilson intervals, a panel for each way of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = groups_of(rows)
    figure, axes = pyplot.subplots(
        1, max(1, len(groups)), figsize=(6 * max(1, len(groups)), 4.5), squeeze=False
    )
    for axis, ((start, effort), some) in zip(axes.flat, groups.items(), strict=False):
        lengths = sorted({row["length"] for row in some})
        (_bars if len(lengths) < 3 else _lines)(axis, some, lengths)
        axis.set_title(f"from {start}, {effort}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    device = ", ".join(sorted({row["device"]["name"] for row in rows if "device" in row}))
    figure.suptitle(f"A fact in real text: right answers, 95 % intervals, {device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _ends(rows: list[Row]) -> list[list[float]]:
    """Return how far the interval of each row reaches down and up, in percent."""
    return [
        [max(0.0, 100 * (r["accuracy"] - r["interval"][0])) for r in rows],
        [max(0.0, 100 * (r["interval"][1] - r["accuracy"])) for r in rows],
    ]


def _short(length: int) -> str:
    return f"{length // 1024}K" if length < 2**20 else f"{length // 2**20}M"


def _lines(axis: Any, some: list[Row], lengths: list[int]) -> None:
    """Right answers over length."""
    for index, name in enumerate(dict.fromkeys(map(name_of, some))):
        own = sorted((r for r in some if name_of(r) == name), key=lambda r: r["length"])
        x = [row["length"] * 1.04**index for row in own]  # beside each other
        y = [100 * row["accuracy"] for row in own]
        axis.errorbar(x, y, _ends(own), marker="o", capsize=2, label=name, alpha=0.85)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_short(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("%")
    axis.set_ylim(-4, 104)


def _bars(axis: Any, some: list[Row], lengths: list[int]) -> None:
    """A bar for each variant and length, the variants below each other."""
    variants = list(dict.fromkeys(row["variant"] for row in some))
    kinds = list(dict.fromkeys((row["width"], row["length"]) for row in some))
    thick = 0.8 / len(kinds)
    for index, (width, length) in enumerate(kinds):
        own = [r for r in some if (r["width"], r["length"]) == (width, length)]
        y = [variants.index(row["variant"]) + (index + 0.5) * thick - 0.4 for row in own]
        keys = "all keys" if width is None else f"w {width:,}"
        right = [100 * row["accuracy"] for row in own]
        axis.barh(
            y, right, thick, xerr=_ends(own), label=f"{_short(length)}, {keys}",
            error_kw={"lw": 0.8, "capsize": 2},
        )  # fmt: skip
    axis.set_yticks(range(len(variants)), variants)
    axis.invert_yaxis()
    axis.set_xlabel("%")
    axis.set_xlim(0, 104)
