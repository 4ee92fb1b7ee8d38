"""Tables of the page: the headline, maps of numbers per head, depths, and every answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..report import ItemResult, Report, Row
from .charts import key
from .colours import LEVELS
from .markup import EMPTY, Html, join, tag

__all__ = ["answers", "depths", "head_maps", "headline", "positions"]

Order = Mapping[str, int | None]

SHOWN = 200  # items of a group whose answers are shown
BESIDE = 6  # heads up to which two maps have room beside two others
WIDE = 16  # heads whose numbers have room in their cells
SAID = 160  # letters of an answer that are shown


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in per cent, with a second digit where it is small."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.01:
        digits = 2
    return f"{100 * value:.{digits}f} %"


def number(value: float | None) -> str:
    """Return a number with three significant digits."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def seconds(value: float | None) -> str:
    """Return a duration."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def size(value: float | None) -> str:
    """Return bytes in MiB or GiB."""
    if value is None:
        return "–"
    if value >= 2**30:
        return f"{value / 2**30:.1f} GiB"
    return f"{value / 2**20:,.{0 if value >= 100 * 2**20 else 1}f} MiB"


def name(policy: str, order: Order, looks_ahead: bool = False) -> Html:
    """Return a policy's mark and name, with a note where it looks at later tokens."""
    star = tag("abbr", " *", title="chooses its mask with a view of later tokens of the prompt")
    words = tag("bdi", *breakable(policy), star if looks_ahead else None, class_="name")
    return tag("span", key(order.get(policy)), words, class_="who")


def breakable(text: str) -> list[object]:
    """Return a name in parts between which a line may end."""
    parts: list[object] = []
    for part in re.split(r"(?<=[:,=_/-])", text):
        parts += [part, tag("wbr")]
    return parts[:-1]


def bar(share: float | None) -> Html:
    """Return a bar of a share, for the eye alone."""
    if share is None:
        return EMPTY
    width = f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"
    return tag("span", tag("i", style=width), class_="bar", aria_hidden="true")


def sub(words: object) -> Html | None:
    """Return a small second line of a cell."""
    return tag("span", words, class_="sub") if words else None


# ------------------------------------------------------------------------------- the headline


def headline(rows: Sequence[Row], order: Order, base: str | None, title: str) -> Html:
    """Return the table of what every policy answered, read and cost."""
    full = next((row for row in rows if row.policy == base), None)
    columns = [column for column in COLUMNS if any(column[1](row) for row in rows)]
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics or ())
    head = [tag("th", "policy", scope="col", class_="text")]
    head += [tag("th", title, scope="col") for title, _, _ in columns]
    head += [tag("th", metric, scope="col") for metric in metrics]
    body = []
    for row in rows:
        cells = [tag("th", name(row.policy, order, not row.causal), scope="row")]
        cells += [tag("td", render(row, full)) for _, _, render in columns]
        cells += [tag("td", number((row.metrics or {}).get(metric))) for metric in metrics]
        body.append(tag("tr", *cells, class_=_class_of(order, row.policy)))
    return scroll(
        tag(
            "table",
            tag("caption", title),
            tag("thead", tag("tr", *head)),
            tag("tbody", *body),
            class_="wide stick",
        ),
        title,
    )


def _class_of(order: Order, policy: str) -> str:
    from .charts import colour

    return colour(order.get(policy))


def scroll(table: Html, words: str) -> Html:
    """Return a table that scrolls by itself where the screen is narrower; the keyboard too."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=words)


def _right(row: Row, full: Row | None) -> Html:
    low, high = row.accuracy_interval or (None, None)
    count = (
        f"{row.right:g} of {row.n}"
        if row.right == round(row.right or 0, 2)
        else (f"{row.right:.1f} of {row.n}")
    )
    interval = f", {100 * low:.0f}–{100 * high:.0f} %" if low is not None and high else ""
    return join([percent(row.accuracy, 0), sub(f"{count}{interval}"), bar(row.accuracy)])


def _difference(row: Row, full: Row | None) -> Html | str:
    if row.difference is None or row.difference_interval is None:
        return "baseline" if full is not None and row.policy == full.policy else "–"
    low, high = row.difference_interval
    words, kind = "too few to tell", None
    if low > 0:
        words, kind = "better than full", "good"
    elif high < 0:
        words, kind = "worse than full", "bad"
    elif high - low <= 0.04:
        words, kind = "within 2 points", "good"
    points = f"{100 * row.difference:+.1f}".replace("-", "−").removesuffix(".0")
    interval = f"[{100 * low:+.0f}, {100 * high:+.0f}]".replace("-", "−")
    return join([f"{points} points", sub(interval), tag("span", words, class_=_classes(kind))])


def _classes(kind: str | None) -> str:
    return f"chip {kind}" if kind else "chip soft"


def _density(row: Row, full: Row | None) -> Html:
    decode = f"decode {percent(row.density_decode)}" if row.density_decode is not None else None
    return join([percent(row.density), sub(decode), bar(row.density)])


def _mass(row: Row, full: Row | None) -> Html:
    low = f"5th pct. {percent(row.kept_mass_p5, 0)}" if row.kept_mass_p5 is not None else None
    return join([percent(row.kept_mass), sub(low), bar(row.kept_mass)])


def _kl(row: Row, full: Row | None) -> Html:
    same = f"agrees {percent(row.agreement, 0)}" if row.agreement is not None else None
    return join([number(row.kl), sub(same)])


def _cost(field: str, show: Callable[[float | None], str]) -> Callable[[Row, Row | None], Html]:
    """Return what renders a cost and how it compares with full attention's."""

    def render(row: Row, full: Row | None) -> Html:
        value = getattr(row, field)
        base = getattr(full, field) if full is not None and full is not row else None
        words = None
        if value and base:
            ratio = base / value
            words = (
                f"{ratio:.2g}× less"
                if ratio >= 1.05
                else (f"{1 / ratio:.2g}× more" if ratio <= 1 / 1.05 else "as full")
            )
        return join([show(value), sub(words)])

    return render


def _memory(row: Row, full: Row | None) -> Html:
    cache = f"cache {size(row.cache_bytes)}" if row.cache_bytes is not None else None
    return join([_cost("peak_memory_bytes", size)(row, full), sub(cache)])


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


Column = tuple[str, Callable[[Row], Any], Callable[[Row, Row | None], Html | str]]

COLUMNS: tuple[Column, ...] = (
    ("right answers", lambda r: r.accuracy is not None, _right),
    ("difference to full", lambda r: r.difference is not None, _difference),
    ("perplexity", lambda r: r.perplexity is not None, lambda r, full: number(r.perplexity)),
    ("density", lambda r: r.density is not None, _density),
    ("attention kept", lambda r: r.kept_mass is not None, _mass),
    ("KL, nats", lambda r: r.kl is not None, _kl),
    ("maps widened", lambda r: r.widened is not None, lambda r, full: percent(r.widened)),
    ("prefill", lambda r: r.prefill_seconds is not None, _cost("prefill_seconds", seconds)),
    ("per token", lambda r: r.ms_per_token is not None, _cost("ms_per_token", _milliseconds)),
    ("peak memory", lambda r: r.peak_memory_bytes is not None, _memory),
)


def positions(report: Report, order: Order) -> Html:
    """Return the table of perplexity by position."""
    buckets = report.rows[0].buckets
    head = [tag("th", "policy", scope="col", class_="text")]
    head += [tag("th", f"{b.start:,}–{b.stop:,}", scope="col") for b in buckets]
    body = [
        tag(
            "tr",
            tag("th", name(row.policy, order, not row.causal), scope="row"),
            *[tag("td", number(bucket.perplexity)) for bucket in row.buckets],
        )
        for row in report.rows
    ]
    title = "Perplexity of the tokens at these positions"
    parts = [tag("caption", title), tag("thead", tag("tr", *head)), tag("tbody", *body)]
    return scroll(tag("table", *parts, class_="wide stick"), title)


# ---------------------------------------------------------------------- numbers per layer x head


def density_level(value: float) -> int:
    """Return the step of a density: the root, since densities are small."""
    return round((LEVELS - 1) * math.sqrt(min(max(value, 0.0), 1.0)))


def mass_level(value: float) -> int:
    """Return the step of a kept mass: the root of what is lost, since little is."""
    return round((LEVELS - 1) * (1 - math.sqrt(1 - min(max(value, 0.0), 1.0))))


def share_level(value: float) -> int:
    """Return the step of a share of right answers."""
    return round((LEVELS - 1) * min(max(value, 0.0), 1.0))


def cell(value: float | None, level: Callable[[float], int], words: str, shown: bool) -> Html:
    """Return a cell of a heat map; its number is there for everybody, seen or not."""
    if value is None:
        return tag("td", tag("span", "not measured", class_="seen-not"), class_="none", title=words)
    said = f"{100 * value:.0f}" if value >= 0.095 or value == 0 else f"{100 * value:.1f}"
    inner = said if shown else tag("span", said, class_="seen-not")
    return tag("td", inner, class_=f"v{level(value)}", title=f"{words}: {percent(value)}")


def head_map(
    values: Sequence[Sequence[float] | None], title: str, level: Callable[[float], int]
) -> Html:
    """Return a heat map of layers x heads, whose cells are numbers in per cent."""
    heads = max((len(layer) for layer in values if layer), default=0)
    shown = heads <= WIDE
    head = [tag("th", "layer", scope="col")]
    head += [tag("th", _every(h, heads), scope="col") for h in range(heads)]
    body = []
    for index, layer in enumerate(values):
        cells = [
            cell(layer[h] if layer and h < len(layer) else None, level, f"layer {index}, head {h}",
                 shown)
            for h in range(heads)
        ]  # fmt: skip
        body.append(tag("tr", tag("th", str(index), scope="row"), *cells))
    return scroll(
        tag(
            "table",
            tag("caption", title),
            tag("thead", tag("tr", *head)),
            tag("tbody", *body),
            class_="heat" if shown else "heat small",
        ),
        title,
    )


def _every(index: int, count: int) -> str:
    """Return the number of a head, every fourth one where there are many."""
    return str(index) if count <= WIDE or index % 4 == 0 else ""


def legend(words: str, level: Callable[[float], int]) -> Html:
    """Return what the colours of a heat map stand for."""
    starts = [next(v for v in range(1001) if level(v / 1000) >= step) for step in range(LEVELS)]
    boxes = [
        tag("i", class_=f"v{step}", title=f"from {start / 10:g} %")
        for step, start in enumerate(starts)
    ]
    bar = tag("span", *boxes, class_="legend", aria_hidden="true")
    return tag("span", f"{words} 0 %", bar, "100 %", class_="scale")


def head_maps(rows: Sequence[Row], order: Order) -> Html:
    """Return heat maps of density and of kept attention for every policy that has them."""
    cards = []
    for row in rows:
        maps = [
            (row.density_per_head, "density, %", density_level),
            (row.kept_mass_per_head, "attention kept, %", mass_level),
        ]
        parts = [head_map(values, title, level) for values, title, level in maps if values]
        if parts:
            grid = tag("div", *parts, class_="maps")
            cards.append(tag("div", tag("h4", name(row.policy, order)), grid, class_="card"))
    few = all(len(layer or ()) <= BESIDE for row in rows for layer in row.density_per_head or ())
    return tag("div", *cards, class_="grid" if few else None)


# --------------------------------------------------------------------------------------- depths


def depths(report: Report, order: Order, bands: Sequence[tuple[float, float]]) -> Html:
    """Return, for every policy, right answers over the depth of the evidence and the group."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for item in report.items:
        depth = item.meta.get("depth")
        if not isinstance(depth, int | float):
            continue
        for index, (low, high) in enumerate(bands):
            if low <= depth <= high:
                found.setdefault((item.policy, item.group, index), []).append(item.score)
                break
    groups = [group for group in report.groups if any(at[1] == group for at in found)]
    cards = []
    for policy in dict.fromkeys(row.policy for row in report.rows):
        head = [tag("th", "depth", scope="col")]
        head += [tag("th", group, scope="col") for group in groups]
        body = []
        for index, (low, high) in enumerate(bands):
            middle = f"{50 * (max(low, 0.0) + min(high, 1.0)):.0f} %"
            row = [tag("th", middle, scope="row")]
            for group in groups:
                scores = found.get((policy, group, index))
                value = sum(scores) / len(scores) if scores else None
                row.append(cell(value, share_level, f"depth {middle}, {group}", True))
            body.append(tag("tr", *row))
        parts = [tag("caption", "right answers, %"), tag("thead", tag("tr", *head))]
        table = tag("table", *parts, tag("tbody", *body), class_="heat")
        cards.append(
            tag("div", tag("h4", name(policy, order)), scroll(table, f"depths of {policy}"))
        )
    return tag("div", tag("div", *cards, class_="maps"), class_="card")


# -------------------------------------------------------------------------------------- answers


def answers(report: Report, order: Order) -> Html:
    """Return every item's expected answer and what each policy said, a fold for each group."""
    policies = list(dict.fromkeys(row.policy for row in report.rows))
    folds = []
    for group in report.groups:
        table: dict[int, dict[str, ItemResult]] = {}
        for item in report.items:
            if item.group == group:
                table.setdefault(item.index, {})[item.policy] = item
        if table:
            folds.append(_fold(group, table, policies, order, opened=len(report.groups) == 1))
    return join(folds)


def _fold(
    group: str,
    table: Mapping[int, Mapping[str, ItemResult]],
    policies: Sequence[str],
    order: Order,
    opened: bool,
) -> Html:
    differ = {index for index, said in table.items() if len({i.score for i in said.values()}) > 1}
    # Where not all fit, those over which policies part are worth more than the others.
    first = sorted(table, key=lambda index: (index not in differ, index))[:SHOWN]
    head = [tag("th", "item", scope="col"), tag("th", "expected", scope="col", class_="text")]
    head += [tag("th", name(p, order), scope="col", class_="text") for p in policies]
    body = [
        tag(
            "tr",
            tag("th", _about(index, next(iter(table[index].values()))), scope="row"),
            tag("td", _expected(next(iter(table[index].values()))), class_="answer"),
            *[_said(table[index].get(p)) for p in policies],
            class_=None if index in differ else "same",
        )
        for index in sorted(first)
    ]
    caption = f"{len(differ)} of {len(table)} items are answered differently"
    if len(first) < len(table):
        caption += f"; {len(first)} are shown, the JSON report has all"
    box = tag("label", tag("input", type="checkbox"), "only where policies differ", class_="pick")
    parts = [tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body)]
    whole = scroll(tag("table", *parts, class_="wide stick"), f"answers, {group}")
    inner = tag("div", box, whole, class_="items")
    return tag("details", tag("summary", group), inner, class_="card", open=opened)


def _about(index: int, item: ItemResult) -> Html:
    depth = item.meta.get("depth")
    words = [str(item.meta[k]) for k in ("task", "kind", "template") if item.meta.get(k)]
    if isinstance(depth, int | float):
        words.append(f"depth {100 * depth:.0f} %")
    return join([f"#{index}", sub(", ".join(words))])


def _expected(item: ItemResult) -> Html:
    return tag("bdi", cut(", ".join(item.answers)))


def _said(item: ItemResult | None) -> Html:
    if item is None:
        return tag("td", "–")
    if item.score >= 1:
        mark, words, kind = "✓", "right", "good"
    elif item.score <= 0:
        mark, words, kind = "✗", "wrong", "bad"
    else:
        mark, words, kind = f"{100 * item.score:.0f} %", "in part", "soft"
    sign = tag("span", mark, " ", words, class_=kind)
    said = tag("bdi", cut(item.text.strip()) or "(nothing)", class_="said")
    return tag("td", sign, said, class_="answer")


def cut(text: str) -> str:
    """Return a text, shortened where it is long."""
    return text if len(text) <= SAID else text[: SAID - 1] + "…"


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Return a list of names and values."""
    parts = [join([tag("dt", key), tag("dd", value)]) for key, value in pairs if value is not None]
    return tag("dl", *parts)
