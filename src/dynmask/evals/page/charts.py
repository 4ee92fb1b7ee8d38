"""Charts of the page as inline SVG: drawn twice, for wide and for narrow screens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..points import MEASURES, Point, frontier
from .colours import MARKS
from .markup import Html, join, tag

__all__ = ["curves", "key", "pareto", "shape"]

SIZES = {"wide-only": (640, 380), "narrow": (350, 330)}
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 34, 44
LETTER = 6.3  # width of a letter of a label
LABEL = 26  # letters of a label
FLOOR = 1e-6  # smaller divergences are drawn as this


def shape(index: int | None, x: float, y: float, r: float = 6.0, **attributes: object) -> Html:
    """Return the mark of a policy at a place; ``None`` is full attention, a star."""
    if index is None:
        corners = [(r * (1.35 if i % 2 == 0 else 0.6), math.pi * (i / 5 - 0.5)) for i in range(10)]
        return _polygon(
            [(x + s * math.cos(a), y + s * math.sin(a)) for s, a in corners], attributes
        )
    kind = index % MARKS
    if kind == 0:
        return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{r:.1f}", **attributes)
    sides, turn = {
        1: (4, 0.25),
        2: (3, -0.5),
        3: (4, 0.0),
        4: (3, 0.5),
        5: (5, -0.5),
        6: (6, 0.0),
        7: (8, 0.125),
    }[kind]
    size = r * (1.2 if sides < 5 else 1.08)
    angles = [math.pi * (2 * i / sides + turn) for i in range(sides)]
    return _polygon([(x + size * math.cos(a), y + size * math.sin(a)) for a in angles], attributes)


def _polygon(corners: Sequence[tuple[float, float]], attributes: Mapping[str, object]) -> Html:
    return tag("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in corners), **attributes)


def key(index: int | None) -> Html:
    """Return a policy's mark for a line of text."""
    mark = shape(index, 0, 0, 6, class_="mark")
    return tag(
        "svg", mark, class_=f"key {colour(index)}", viewBox="-9 -9 18 18", aria_hidden="true"
    )


def colour(index: int | None) -> str:
    """Return the class that gives an element the colour of a policy."""
    return "cf" if index is None else f"c{index % MARKS}"


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels, and the ticks with their words."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Frame:
    """A plot's size and its axes."""

    width: int
    height: int
    x: Axis
    y: Axis

    def grid(self, x_words: str, y_words: str) -> list[Html]:
        """Return lines, ticks and what the axes mean."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for value, words in self.x.ticks:
            at = f"{self.x.place(value):.1f}"
            parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="grid-line"))
            parts.append(_text(words, at, bottom + 16, "middle", "soft"))
        for value, words in self.y.ticks:
            at = self.y.place(value)
            line = {"x1": LEFT, "x2": right, "y1": f"{at:.1f}", "y2": f"{at:.1f}"}
            parts.append(tag("line", class_="grid-line", **line))
            parts.append(_text(words, LEFT - 6, f"{at + 4:.1f}", "end", "soft"))
        middle = f"{(LEFT + right) / 2:.1f}"
        parts.append(_text(x_words, middle, self.height - 6, "middle", "soft"))
        parts.append(_text(y_words, 0, 12, "start", "soft"))
        return parts


def _text(words: str, x: object, y: object, anchor: str, kind: str | None = None) -> Html:
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=kind)


def _linear(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _log(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    scale = _linear(math.log(low), math.log(high), first, last)
    return lambda value: scale(math.log(max(value, low)))


def _density_axis(found: Sequence[Point], width: int) -> Axis:
    """Density in per cent, logarithmic, up to a little more than everything."""
    low = max(min(point.density for point in found), 1e-6)
    low, high = min(low, 0.8) * 0.75, 1.22
    most = 8 if width > 400 else 5
    # As many round numbers as have room: of 1, 2, 3, 5, 7 in a short range, powers in a long one.
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        marks = [m * 10.0**e for e in range(-6, 1) for m in digits]
        ticks = [(value, f"{100 * value:g} %") for value in marks if low <= value <= 1]
        if len(ticks) <= most:
            break
    return Axis(_log(low, high, LEFT, width - RIGHT), ticks)


def _nice(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    raw = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _value_axis(found: Sequence[Point], measure: str, height: int) -> Axis:
    bottom = height - BOTTOM
    if measure == "accuracy":
        ticks = [(float(v), str(v)) for v in (0, 25, 50, 75, 100)]
        return Axis(_linear(-3, 103, bottom, TOP), ticks)
    values = [point.value for point in found]
    if measure == "kl":
        positive = [value for value in values if value > FLOOR]
        low = 10.0 ** math.floor(math.log10(min(positive, default=1e-3)))
        high = 10.0 ** math.ceil(math.log10(max([*positive, 10 * low])) + 1e-9)
        count = round(math.log10(high / low))
        marks = [low * 10.0**i for i in range(0, count + 1, max(1, count // 6))]
        # What is less than the lowest tick lies on it: a logarithm has no place for nothing.
        ticks = [(value, ("≤ " if i == 0 else "") + f"{value:g}") for i, value in enumerate(marks)]
        return Axis(_log(low, high, bottom - 8, TOP + 8), ticks)
    low, high = min(values), max(values)
    pad = 0.12 * (high - low) or 0.05 * high or 1.0
    marks = [(value, f"{value:g}") for value in _nice(low - pad, high + pad)]
    return Axis(_linear(low - pad, high + pad, bottom, TOP), marks)


def pareto(
    found: Sequence[Point], measure: str, order: Mapping[str, int | None], title: str
) -> Html:
    """Return a plot of a measure over density, one point for each policy.

    Args:
        found: the points, all of one group.
        measure: a name of ``dynmask.evals.points.MEASURES``.
        order: a policy's name -> the number of its mark, None for full attention.
        title: what a screen reader says first.
    """
    told = "; ".join(f"{p.policy}: {p.value:.4g} at {100 * p.density:.3g} % density" for p in found)
    return join(_pareto(found, measure, order, f"{title}. {told}", kind) for kind in SIZES)


def _pareto(
    found: Sequence[Point],
    measure: str,
    order: Mapping[str, int | None],
    words: str,
    kind: str,
) -> Html:
    width, height = SIZES[kind]
    frame = Frame(width, height, _density_axis(found, width), _value_axis(found, measure, height))
    quality = MEASURES[measure]
    better = "higher" if quality.better == "higher" else "lower"
    parts = frame.grid(
        "density: share of the pairs that are read (log)", f"{quality.words} ({better} is better)"
    )
    best = [_at(frame, point) for point in frontier(found, quality.better)]
    if len(best) > 1:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in best)
        parts.append(tag("polyline", points=corners, class_="edge"))
    for point in found:
        if order.get(point.policy) is None:
            y = f"{_at(frame, point)[1]:.1f}"
            line = tag("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, class_="full-line")
            parts.append(line)
            break
    parts += [_point(frame, point, order.get(point.policy)) for point in found]
    parts += _labels(frame, found)
    return tag(
        "svg",
        *parts,
        class_=f"plot {kind}",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=words,
    )


def _at(frame: Frame, point: Point) -> tuple[float, float]:
    return frame.x.place(point.density), frame.y.place(point.value)


def _point(frame: Frame, point: Point, index: int | None) -> Html:
    x, y = _at(frame, point)
    parts: list[Html] = []
    if point.low is not None and point.high is not None:
        top, bottom = frame.y.place(point.high), frame.y.place(point.low)
        path = f"M{x - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8"
        parts.append(tag("path", d=path, class_="whisker"))
    parts.append(shape(index, x, y, 6.5, class_="mark"))
    words = f"{point.policy}: {point.value:.4g}, density {100 * point.density:.3g} %"
    return tag("g", tag("title", words), *parts, class_=colour(index))


def short(name: str, most: int = LABEL) -> str:
    """Return a name, cut where it is too long for a label."""
    return name if len(name) <= most else name[: most - 1] + "…"


Box = tuple[float, float, float, float]


def _labels(frame: Frame, found: Sequence[Point]) -> list[Html]:
    """Return names beside their points, left out where there is no room for them."""
    places = [_at(frame, point) for point in found]
    taken: list[Box] = [(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    names = []
    for point, (x, y) in zip(found, places, strict=True):
        words = short(point.policy, LABEL if frame.width > 400 else 18)
        size = LETTER * len(words)
        for dx, dy, anchor in (
            (11, 4, "start"), (-11, 4, "end"), (11, -10, "start"), (-11, -10, "end"),
            (11, 18, "start"), (-11, 18, "end"), (0, -14, "middle"), (0, 24, "middle"),
        ):  # fmt: skip
            left = x + dx - {"start": 0.0, "end": size, "middle": size / 2}[anchor]
            box = (left, y + dy - 11, left + size, y + dy + 3)
            inside = left > LEFT - 8 and box[2] < frame.width and box[1] > TOP - 18
            if inside and box[3] < frame.height - BOTTOM + 8 and not _hits(box, taken):
                taken.append(box)
                names.append(_text(words, f"{x + dx:.1f}", f"{y + dy:.1f}", anchor, "near"))
                break
    return names


def _hits(box: Box, taken: Sequence[Box]) -> bool:
    return any(
        box[0] < right and left < box[2] and box[1] < bottom and top < box[3]
        for left, top, right, bottom in taken
    )


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    order: Mapping[str, int | None],
    words: str,
    x_words: str,
    y_words: str,
) -> Html:
    """Return lines over a logarithmic number of tokens, one for each policy.

    Args:
        lines: a policy's name -> (tokens, value), rising in tokens.
        order: as in :func:`pareto`.
        words: what a screen reader says.
        x_words: what is across.
        y_words: what is up.
    """
    return join(_curves(lines, order, words, x_words, y_words, kind) for kind in SIZES)


def _curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    order: Mapping[str, int | None],
    words: str,
    x_words: str,
    y_words: str,
    kind: str,
) -> Html:
    width, height = SIZES[kind]
    every = [point for line in lines.values() for point in line]
    low, high = min(x for x, _ in every), max(x for x, _ in every)
    x = _log(low / 1.15, high * 1.15, LEFT, width - RIGHT)
    exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    ticks = [(2.0**e, _tokens(2**e)) for e in exponents][:: 1 if width > 400 else 2]
    bottom, top = min(y for _, y in every), max(y for _, y in every)
    pad = 0.1 * (top - bottom) or 0.05 * top or 1.0
    y = _linear(bottom - pad, top + pad, height - BOTTOM, TOP)
    marks = [(value, f"{value:g}") for value in _nice(bottom - pad, top + pad)]
    frame = Frame(width, height, Axis(x, ticks), Axis(y, marks))
    parts = frame.grid(x_words, y_words)
    for name, line in lines.items():
        index = order.get(name)
        corners = [(x(a), y(b)) for a, b in line]
        path = "".join(f"L{a:.1f} {b:.1f}" for a, b in corners)
        drawn = [tag("title", name), tag("path", d="M" + path[1:], class_="curve")]
        drawn += [shape(index, a, b, 4, class_="mark") for a, b in corners]
        parts.append(tag("g", *drawn, class_=colour(index)))
    return tag(
        "svg",
        *parts,
        class_=f"plot {kind}",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=words,
    )


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 else str(count)
