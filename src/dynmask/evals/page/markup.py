"""Markup that cannot be broken into: every string is escaped, unless it was built here.

Prompts, answers, file names and names of policies come from outside and may hold anything.
``tag`` escapes whatever is not already :class:`Html`, so a text can never become an element.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["EMPTY", "Html", "join", "plain", "tag"]

# Controls that a browser may not show, and marks that reorder the text around them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
REORDERING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
VOID = (
    "br",
    "wbr",
    "img",
    "input",
    "meta",
    "rect",
    "circle",
    "path",
    "line",
    "polygon",
    "polyline",
)
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9:-]*")


class Html(str):
    """A string that is markup already."""

    __slots__ = ()


EMPTY = Html("")


def plain(text: object) -> str:
    """Return a text in which every character can be seen and encoded.

    Control characters become their pictures (U+2400 and on), marks that turn the direction of
    writing become their names, lone surrogates become question marks.
    """
    seen = str(text).replace("\r\n", "\n").replace("\r", "\n")
    seen = CONTROL.sub(lambda hit: _picture(ord(hit[0])), seen)
    seen = REORDERING.sub(lambda hit: f"[U+{ord(hit[0]):04X}]", seen)
    return seen.encode("utf-8", "replace").decode("utf-8")


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"


def escaped(text: object) -> Html:
    """Return ``text`` as markup that shows it."""
    return text if isinstance(text, Html) else Html(html.escape(plain(text), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Return the parts one after the other, escaped where they are not markup."""
    return Html(escaped(between).join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element.

    A child or an attribute of ``None`` is left out, ``True`` is an attribute without a value.
    Underscores in names of attributes stand for hyphens, and one at the end is dropped
    (``class_``).

    Raises:
        ValueError: on a name that is no name of an element or attribute.
    """
    words = [_name(name)]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = _name(key.rstrip("_").replace("_", "-"))
        text = html.escape(plain(value), quote=True)
        words.append(word if value is True else f'{word}="{text}"')
    start = f"<{' '.join(words)}>"
    if name in VOID and not children:
        return Html(start[:-1] + "/>")
    return Html(f"{start}{join(children)}</{name}>")


def _name(word: str) -> str:
    if not NAME.fullmatch(word):
        raise ValueError(f"tag: expected a name of letters, received {word!r}; names are constants")
    return word
