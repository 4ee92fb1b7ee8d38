"""What every policy reads of one prompt, as pictures with the tokens they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..reading import BINS
from .markup import Html, join, tag
from .pixels import image
from .tables import Order, name, percent, scroll

__all__ = ["reading_section"]

STRIPS = {"prefill": "last token of the prompt", "decode": "first decoded token"}
ALL = 0.9999  # a larger share is everything


def reading_section(reading: Mapping[str, Any], order: Order) -> Html:
    """Return the section about the prompt.

    Args:
        reading: what ``dynmask.evals.reading.reading`` returned.
        order: a policy's name -> the number of its mark.

    Raises:
        ValueError: if a picture in it is broken.
    """
    tokens = int(reading["tokens"])
    places = reading["answers"]
    marked = "; the red line is where the answer stands" if places else ""
    intro = tag(
        "p",
        tag("bdi", reading["source"]),
        f", {tokens:,} tokens. A strip shows which tokens the last one of the prompt reads, over "
        f"all layers and heads{marked}. A square is one attention map: queries down, keys across, "
        "the stronger the blue the more of the pairs are read, grey where nothing can be.",
        class_="soft",
    )
    cards = [_policy(policy, places, tokens, order) for policy in reading["policies"]]
    prompt = tag(
        "details",
        tag("summary", "The prompt"),
        tag("pre", tag("bdi", reading["prompt"])),
        class_="card",
    )
    return join([intro, *cards, prompt])


def _policy(
    policy: Mapping[str, Any], places: Sequence[Mapping[str, Any]], tokens: int, order: Order
) -> Html:
    who = policy["policy"]
    read = [f"{percent(policy['density'])} of the pairs of the prefill"]
    if policy["kept_mass"] is not None:
        read.append(f"{percent(policy['kept_mass'])} of the attention kept")
    parts = [tag("h4", name(who, order)), tag("p", "; ".join(read), class_="note")]
    dense = all(one["density"] > ALL for one in policy["maps"])
    for phase, words in STRIPS.items():
        if policy.get(phase) and policy[phase]["share"] < ALL and not _same(policy, phase):
            parts.append(_strip(policy[phase], f"{who}: {words}", words, places, tokens))
    if dense:
        parts.append(tag("p", "The prefill of this prompt reads everything.", class_="note"))
    if policy.get("keeps"):
        parts.append(tag("p", "A decoded token reads what the prompt chose.", class_="note"))
    elif not policy.get("decode") or policy["decode"]["share"] > ALL:
        parts.append(tag("p", "Decoding reads everything.", class_="note"))
    if not dense:
        thumbs = [_thumb(who, one, tokens) for one in policy["maps"]]
        parts.append(tag("div", *thumbs, class_="thumbs"))
        if policy["ranges"]:
            parts.append(_ranges(policy["ranges"]))
    return tag("div", *parts, class_="card")


def _same(policy: Mapping[str, Any], phase: str) -> bool:
    """Whether a decoded token reads (nearly) as many keys as the prompt's last one: one strip."""
    both = policy["prefill"], policy["decode"]
    if phase != "decode" or None in both:
        return False
    return abs(both[0]["share"] - both[1]["share"]) < 0.01 * max(both[0]["share"], 1e-9)


def _strip(
    strip: Mapping[str, Any],
    alt: str,
    words: str,
    places: Sequence[Mapping[str, Any]],
    tokens: int,
) -> Html:
    bins = min(BINS, tokens)
    seen = f"{percent(strip['share'])} of its pairs"
    if strip["answer"] is not None:
        seen += f"; {percent(strip['answer'], 0)} of the maps read the answer"
    lines = [_here(place, tokens) for place in places]
    picture = image(strip["strip"], 1, bins, f"{alt} reads {seen}")
    marks = [0, tokens // 4, tokens // 2, 3 * tokens // 4, tokens - 1]
    ticks = tag("div", *[tag("span", f"{mark:,}") for mark in marks], class_="ticks")
    caption = tag("figcaption", f"{words}: {seen}")
    return tag("figure", tag("div", *lines, picture, class_="strip"), ticks, caption)


def _here(place: Mapping[str, Any], tokens: int) -> Html:
    at = (int(place["start"]) + int(place["end"])) / 2 / tokens
    words = tag("b", "answer")
    kind = "here late" if at > 0.85 else "here"
    return tag("span", words, class_=kind, style=f"left:{100 * at:.2f}%", aria_hidden="true")


def _thumb(who: str, one: Mapping[str, Any], tokens: int) -> Html:
    where = f"layer {one['layer']}, head {one['head']}"
    density = percent(one["density"])
    rows, columns = (int(side) for side in one["side"])
    alt = f"{who}, {where}: {density} of the pairs among {tokens:,} tokens are read"
    caption = tag("figcaption", where, tag("br"), density)
    return tag("figure", image(one["pixels"], rows, columns, alt), caption)


def _ranges(ranges: Sequence[Mapping[str, Any]]) -> Html:
    head = [tag("th", "tokens", scope="col", class_="text"), tag("th", "maps", scope="col")]
    head.append(tag("th", "text", scope="col", class_="text"))
    body = [
        tag(
            "tr",
            tag("th", f"{one['start']:,}–{one['end'] - 1:,}", scope="row"),
            tag("td", percent(one["share"], 0)),
            tag("td", tag("bdi", tag("code", one["text"])), class_="answer"),
        )
        for one in ranges
    ]
    title = "The longest ranges that most maps read from the last token"
    parts = [tag("caption", title), tag("thead", tag("tr", *head)), tag("tbody", *body)]
    table = scroll(tag("table", *parts), title)
    return tag("details", tag("summary", "Most read tokens"), table)
