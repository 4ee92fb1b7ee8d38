"""The policies: one idea, one file."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from .base import Layer, Policy
from .causal import Causal
from .dam import Dam
from .elastic import Elastic
from .flexprefill import FlexPrefill
from .gated import Gated
from .h2o import H2O
from .oracle import OracleBlocks, OracleTokens
from .pooled import Pooled
from .quest import Quest
from .retained import Retained
from .snapkv import SnapKV
from .streaming import Streaming
from .vertical_slash import VerticalSlash
from .xattention import XAttention

FIXED = {
    p.name: p
    for p in (
        Causal,
        Streaming,
        Elastic,
        VerticalSlash,
        Pooled,
        FlexPrefill,
        XAttention,
        Quest,
        H2O,
        SnapKV,
        Gated,
        OracleTokens,
        OracleBlocks,
    )
}
"""Policies that need no card, by name."""

FROM_CARD = (Dam.name, Retained.name, Gated.name)
"""Policies that a mask card gives, by name; gated also runs without one."""

NAMES = tuple(dict.fromkeys((*FIXED, *FROM_CARD)))


def parse(spec: str) -> Policy:
    """A policy from its text form: ``name``, ``name:field=value,...`` or ``dam:path-to-card``.

    ``retained:path-to-card`` may be followed by ``,width=512`` and ``,budget=per_head``. ``gated``
    takes either a card or fields.

    Raises:
        ValueError: an unknown name or field, a value of the wrong type or out of range.
    """
    name, _, rest = spec.partition(":")
    if takes_card(spec):
        return _from_card(name, rest)
    if name not in FIXED:
        raise ValueError(f"policy: expected one of {', '.join(NAMES)}, received {name!r}")
    known, values = _numbers(name), {}
    for item in filter(None, rest.split(",")):
        field, _, text = item.partition("=")
        try:
            values[field] = known[field](text)
        except KeyError:
            raise ValueError(
                f"policy {name}: expected fields {', '.join(known) or '(none)'}, received {field!r}"
            ) from None
        except ValueError:
            raise ValueError(
                f"policy {name}: expected {field} as {known[field].__name__}, received {text!r}"
            ) from None
    return FIXED[name](**values)


def takes_card(spec: str) -> bool:
    """Whether the text form of a policy names a card."""
    name, _, rest = spec.partition(":")
    if name not in FROM_CARD or name not in FIXED:
        return name in FROM_CARD
    known = _numbers(name)
    return not all(item.partition("=")[0] in known for item in filter(None, rest.split(",")))


def _numbers(name: str) -> dict[str, type[int] | type[float]]:
    """The fields of a policy that take a number, and which."""
    kind = FIXED[name]
    types = get_type_hints(kind)
    numbers = {f.name: _number(types[f.name]) for f in fields(kind)}
    return {field: number for field, number in numbers.items() if number is not None}


def _number(hint: Any) -> type[int] | type[float] | None:
    """The number that a field takes, alone or beside tables; None where it takes no number."""
    return next((kind for kind in (hint, *get_args(hint)) if kind in (int, float)), None)


def split_card(rest: str) -> tuple[str, dict[str, str]]:
    """Path and options of ``path,option=value,...``; a path may hold commas of its own."""
    path, *items = rest.split(",")
    options: dict[str, str] = {}
    for item in items:
        field, equals, text = item.partition("=")
        if equals and field in ("width", "budget"):
            options[field] = text
        elif options:
            raise ValueError(
                f"policy retained: expected options width and budget, received {item!r}"
            )
        else:
            path += f",{item}"
    return path, options


def _from_card(name: str, rest: str) -> Policy:
    """The policy of a card; what it was calibrated for must be what is asked for."""
    path, texts = split_card(rest) if name == Retained.name else (rest, {})
    if not path:
        raise ValueError(
            f"policy: expected {name}:PATH with the folder of a mask card, received {name!r}; "
            "make one with dynmask calibrate"
        )
    from ..card import MaskCard

    card = MaskCard.from_pretrained(path)
    if card.header["policy"] != name:
        raise ValueError(
            f"policy {name}: expected a card of that policy, received one of "
            f"{card.header['policy']!r}; pass {card.header['policy']}:{path}"
        )
    options: dict[str, int | str] = dict(texts)
    if "width" in options:
        try:
            options["width"] = int(texts["width"])
        except ValueError:
            raise ValueError(
                f"policy {name}: expected width as int, received {texts['width']!r}"
            ) from None
    return card.policy(**options)


__all__ = [
    "FIXED",
    "FROM_CARD",
    "H2O",
    "NAMES",
    "Causal",
    "Dam",
    "Elastic",
    "FlexPrefill",
    "Gated",
    "Layer",
    "OracleBlocks",
    "OracleTokens",
    "Policy",
    "Pooled",
    "Quest",
    "Retained",
    "SnapKV",
    "Streaming",
    "VerticalSlash",
    "XAttention",
    "parse",
    "split_card",
    "takes_card",
]
