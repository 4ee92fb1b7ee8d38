"""The policies: one idea, one file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

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

_FIELD = re.compile(r"[a-z_]+")

NAMES = tuple(dict.fromkeys((*FIXED, *FROM_CARD)))


def parse(spec: str) -> Policy:
    """A policy from its text form: ``name``, ``name:field=value,...`` or ``dam:path-to-card``.

    A path to a card may be followed by the options of its policy (``CARD_OPTIONS``):
    ``retained:path-to-card,width=512,budget=per_head``, ``gated:path-to-card,decode=keep`` and
    ``gated:path-to-card,soft=true,guard=none``. ``gated`` takes either a card or fields.

    Raises:
        ValueError: an unknown name or field, a value of the wrong type or out of range.
    """
    name, _, rest = spec.partition(":")
    if takes_card(spec):
        return _from_card(name, rest)
    if name not in FIXED:
        raise ValueError(f"policy: expected one of {', '.join(NAMES)}, received {name!r}")
    known, values = _settings(name), {}
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
    known, items = _settings(name), [item for item in rest.split(",") if item]
    if all(item.partition("=")[0] in known for item in items):
        return False
    # a field that is misspelt is no path, unless there is such a path
    fields_alone = all(_FIELD.fullmatch(item.partition("=")[0]) and "=" in item for item in items)
    return not fields_alone or Path(rest).exists()


def _settings(name: str) -> dict[str, Callable[[str], Any]]:
    """The fields of a policy that its text form may set, and how they are read."""
    kind = FIXED[name]
    types = get_type_hints(kind)
    kinds = {f.name: _kind(types[f.name]) for f in fields(kind)}
    return {field: found for field, found in kinds.items() if found is not None}


def _kind(hint: Any) -> Callable[[str], Any] | None:
    """How a field is read: words, a switch, a number (alone or beside tables); None for others."""
    if get_origin(hint) is Literal:
        return str
    if hint is bool:
        return _switch
    return next((kind for kind in (hint, *get_args(hint)) if kind in (int, float)), None)


def _switch(text: str) -> bool:
    """True or false, as text."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _share(text: str) -> float | None:
    """A share, or none, as text; whether it is one, the policy says."""
    return None if text == "none" else float(text)


_switch.__name__ = "true or false"  # what errors call it
_share.__name__ = "a share or none"

CARD_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    Retained.name: {"width": int, "budget": str},
    Gated.name: {
        "decode": str, "dense_up_to": int, "guard": _share, "soft": _switch, "strength": float,
    },
}  # fmt: skip
"""What may follow the path of a card in the text form of its policy, and how it is read."""


def split_card(rest: str, name: str = Retained.name) -> tuple[str, dict[str, str]]:
    """Path and options of ``path,option=value,...``; a path may hold commas of its own."""
    path, *items = rest.split(",")
    options: dict[str, str] = {}
    known = CARD_OPTIONS.get(name, {})
    for item in items:
        field, equals, text = item.partition("=")
        if equals and field in options:
            raise ValueError(
                f"policy {name}: expected {field} once after a card, received it as "
                f"{options[field]!r} and {text!r}; leave one of them out"
            )
        if equals and field in known:
            options[field] = text
            continue
        card = equals and Path(path).exists() and not Path(f"{path},{item}").exists()
        if options or card:
            raise ValueError(
                f"policy {name}: expected options {', '.join(known) or '(none)'} after a card, "
                f"received {item!r}; correct it, or leave it out"
            )
        path += f",{item}"
    return path, options


def _from_card(name: str, rest: str) -> Policy:
    """The policy of a card; what it was calibrated for must be what is asked for."""
    path, texts = split_card(rest, name)
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
    options: dict[str, Any] = {}
    for field, text in texts.items():
        read = CARD_OPTIONS[name][field]
        try:
            options[field] = read(text)
        except ValueError:
            raise ValueError(
                f"policy {name}: expected {field} as {read.__name__}, received {text!r}"
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
