"""A report as a page: one HTML file that is complete by itself and works offline.

Everything is inside the file: style, pictures (inline SVG and PNG), one small script without which
it reads just as well. What comes from prompts, answers or names is escaped where it is written
(:mod:`.markup`), and the page's own policy lets a browser load and run nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..overall import EVERYTHING, baseline_of, overall
from ..points import MEASURES, is_reference, points
from ..report import Report, Row, atomic_write
from .charts import curves, pareto
from .markup import Html, join, tag
from .prompts import reading_section
from .style import SCRIPT, policy, sheet
from .tables import (
    Order,
    answers,
    density_level,
    depths,
    facts,
    head_maps,
    headline,
    legend,
    mass_level,
    positions,
    share_level,
)

__all__ = ["page", "reports_of", "write_page"]


def write_page(reports: Report | Sequence[Report], path: str | os.PathLike[str]) -> Path:
    """Write the page of one report, or of several, and return its path.

    The file is written beside its place and moved there, so no reader sees half of it. A report
    that was saved is read by ``Report.load``.

    Raises:
        ValueError: if there is no report, or none of them has a finished row.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    several = [reports] if isinstance(reports, Report) else list(reports)
    atomic_write(target, page(several))
    return target


def reports_of(folder: str | os.PathLike[str], newest: Report) -> list[Report]:
    """Return a report and the other ones that its folder holds, by name of the task.

    Files that are no report are left out.
    """
    found = {newest.task: newest}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            report = Report.load(path)
        except ValueError:
            continue
        found.setdefault(report.task, report)
    return [newest, *(found[name] for name in sorted(found) if name != newest.task)]


def page(reports: Sequence[Report]) -> str:
    """Return the page as text; arguments and errors are those of :func:`write_page`."""
    found = [report for report in reports if report.rows]
    if not found:
        raise ValueError(
            "reports: expected at least one with a finished row, received none; run an evaluation"
        )
    models = dict.fromkeys(str(report.header["model"]["name"]) for report in found)
    tasks = " · ".join(report.task for report in found)
    on = ", ".join(models)
    title = f"{tasks} on {on}"
    sections = [_report(report, f"r{index}") for index, report in enumerate(found)]
    links = [tag("a", report.task, href=f"#r{index}") for index, report in enumerate(found)]
    nav = tag("nav", *links, aria_label="tasks") if len(found) > 1 else None
    body = tag(
        "main",
        tag("header", tag("h1", "Evaluation of ", tag("bdi", on)), nav),
        *sections,
        tag("footer", "Written by dynmask evaluate. This file is complete and loads nothing."),
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(sheet())),
    ]
    whole = tag(
        "html", tag("head", *head), tag("body", body, tag("script", Html(SCRIPT))), lang="en"
    )
    return f"<!doctype html>\n{whole}\n"


def _report(report: Report, anchor: str) -> Html:
    """Return the section of one report."""
    order = _order(report)
    rows = overall(report)
    base = baseline_of(report)
    parts = [
        tag("h2", report.task, id=anchor),
        tag("p", report.caption(sum(_counts(report))), class_="soft"),
        None if report.complete else tag("p", "Interrupted: only what was finished.", class_="bad"),
        _lead(rows, base),
        tag("div", headline(rows, order, base, _title(report, rows)), _notes(rows), class_="card"),
        _charts(report, rows, order),
        _groups(report, order, base),
        _reading(report, order),
        _heads(report, order),
        _depths(report, order),
        _answers(report, order),
        _run(report),
    ]
    return tag("section", *parts)


def _order(report: Report) -> Order:
    """Return which mark every policy has; full attention has its own."""
    base = baseline_of(report)
    order: dict[str, int | None] = {}
    for name in dict.fromkeys(row.policy for row in report.rows):
        full = is_reference(name) and (name == base or base is None)
        order[name] = None if full else sum(mark is not None for mark in order.values())
    return order


def _counts(report: Report) -> list[int]:
    """Return how many items each group has."""
    return [max(row.n for row in report.rows if row.group == group) for group in report.groups]


def _title(report: Report, rows: Sequence[Row]) -> str:
    if rows and rows[0].group == EVERYTHING:
        return f"{report.task}, all {len(report.groups)} groups together"
    return f"{report.task}, {report.groups[0]}"


def _lead(rows: Sequence[Row], base: str | None) -> Html | None:
    """Return in words how sparse one can be before answers are lost, and how sure that is."""
    full = next((row for row in rows if row.policy == base), None)
    others = [row for row in rows if row is not full and row.accuracy is not None]
    if full is None or full.right is None or not others:
        return None
    equal = [row for row in others if (row.right or 0) >= full.right and row.density is not None]
    words: list[object] = [f"Full attention answers {full.right:g} of {full.n}. "]
    if equal:
        best = min(equal, key=lambda row: row.density or 0)
        words += [
            "The sparsest policy that answers no fewer is ",
            tag("strong", tag("bdi", best.policy)),
            f", which reads {100 * (best.density or 0):.3g} % of the pairs. ",
        ]
    else:
        words.append("Every other policy answers fewer. ")
    spans = [row.difference_interval for row in others if row.difference_interval]
    if spans:
        half = min((high - low) / 2 for low, high in spans)
        words.append(
            f"With {full.n} items, less than ±{100 * half:.0f} points cannot be told apart."
        )
    return tag("p", *words, class_="lead")


def _notes(rows: Sequence[Row]) -> Html:
    notes = [
        "Density: pairs of query and key that are read, of all causal pairs. Attention kept: the "
        "share of the model's own attention that lies on them, on sampled rows. KL: how far next-"
        "token distributions are from those of full attention, "
        + ("at every position." if rows[0].buckets else "up to the first token that differs.")
    ]
    if any(row.difference_interval for row in rows):
        notes.append("Intervals are 95 %; differences are paired, on the same items.")
    if any(not row.causal for row in rows):
        notes.append("* chooses its mask with a view of later tokens of the prompt.")
    if rows[0].group == EVERYTHING:
        notes.append("Over groups: all items for answers, means for the rest, the most for memory.")
    return tag("p", " ".join(notes), class_="note")


def _charts(report: Report, rows: Sequence[Row], order: Order) -> Html:
    figures = []
    for measure in MEASURES:
        found = points(rows, measure)
        if len(found) > 1 and any(not point.reference for point in found):
            words = f"{MEASURES[measure].title} over density"
            drawn = pareto(found, measure, order, words)
            caption = tag("figcaption", _caption(measure))
            figures.append(tag("figure", tag("h4", words), drawn, caption, class_="card"))
    if report.rows[0].buckets:
        figures.append(_positions(report, order))
    grid = tag("div", *figures, class_="grid") if figures else None
    table = tag("div", positions(report, order), class_="card") if report.rows[0].buckets else None
    return join([tag("h3", "Quality against density") if figures else None, grid, table])


def _caption(measure: str) -> str:
    words = "The star and the dashed line are full attention; dotted: what no other policy beats."
    return words + (" Bars: 95 %." if measure == "accuracy" else "")


def _positions(report: Report, order: Order) -> Html:
    lines = {
        row.policy: [((b.start + b.stop) / 2, b.perplexity) for b in row.buckets]
        for row in report.rows
    }
    words = "Perplexity by position in the text"
    drawn = curves(lines, order, words, "position, tokens (log)", "perplexity (lower is better)")
    caption = tag("figcaption", "A mask that loses what is far away stops falling with position.")
    return tag("figure", tag("h4", words), drawn, caption, class_="card")


def _groups(report: Report, order: Order, base: str | None) -> Html | None:
    """Return a fold for each group, where there are several."""
    if len(report.groups) < 2:
        return None
    folds = [
        tag(
            "details",
            tag("summary", group),
            headline(
                [row for row in report.rows if row.group == group],
                order,
                base,
                f"{report.task}, {group}",
            ),
            class_="card",
        )
        for group in report.groups
    ]
    return join([tag("h3", "Group by group"), *folds])


def _reading(report: Report, order: Order) -> Html | None:
    if not report.reading or not report.reading["policies"]:
        return None
    title = tag("h3", "What is read of a prompt")
    return join([title, reading_section(report.reading, order)])


def _heads(report: Report, order: Order) -> Html | None:
    last = report.groups[-1]
    rows = [row for row in report.rows if row.group == last and order.get(row.policy) is not None]
    if not any(row.density_per_head for row in rows):
        return None
    words = tag(
        "p",
        f"Each cell is one head, mean over the items of {last}. ",
        legend("Density", density_level),
        legend("Attention kept", mass_level),
        class_="soft",
    )
    return join([tag("h3", "Head by head"), words, head_maps(rows, order)])


def _depths(report: Report, order: Order) -> Html | None:
    from ..plots import depth_bands

    items = [item for item in report.items if isinstance(item.meta.get("depth"), int | float)]
    if not items:
        return None
    words = tag(
        "p",
        "Where in the context the evidence stands: 0 % is the start, 100 % the end. ",
        legend("Right answers", share_level),
        class_="soft",
    )
    return join([tag("h3", "Depth"), words, depths(report, order, depth_bands(items))])


def _answers(report: Report, order: Order) -> Html | None:
    if not report.items:
        return None
    return join([tag("h3", "Answers, right and wrong"), answers(report, order)])


def _run(report: Report) -> Html:
    """Return how it was measured."""
    head = report.header
    device, model, settings = head["device"], head["model"], head["settings"]
    count = device["threads"]
    threads = f", {count} thread{'s' * (count != 1)}" if device["type"] == "cpu" else ""
    versions = ", ".join(f"{name} {value}" for name, value in head["versions"].items() if value)
    own = {"task", "task_settings", "policies"}
    asked, prints = settings.get("task_settings") or {}, settings.get("policies") or {}
    pairs = [
        ("command", tag("code", head["command"]) if head.get("command") else None),
        ("model", f"{model['name']} ({model.get('architecture')}, {model.get('parameters'):,} "
                  "parameters)" if model.get("parameters") else model["name"]),
        ("fingerprint", tag("code", model["fingerprint"]) if model.get("fingerprint") else None),
        ("device", f"{device['name']}{threads}"),
        ("numbers", head["dtype"]),
        ("versions", versions),
        ("commit", tag("code", head["commit"]) if head.get("commit") else None),
        ("date", head["date"]),
        *[(name, _value(value)) for name, value in settings.items() if name not in own],
        *[(f"task: {name}", _value(value)) for name, value in asked.items()],
        *[(f"policy: {name}", tag("code", value)) for name, value in prints.items()],
    ]  # fmt: skip
    return join([tag("h3", "The run"), tag("div", facts(pairs), class_="card")])


def _value(value: object) -> object:
    """Return a setting as it reads best; None is left out."""
    return ", ".join(map(str, value)) or None if isinstance(value, list | tuple) else value
