"""The policies: one idea, one file."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

from .base import Layer, Policy
from .causal import Causal
from .dam import Dam
from .pooled import Pooled
from .streaming import Streaming
from .vertical_slash import VerticalSlash

FIXED = {p.name: p for p in (Causal, Streaming, VerticalSlash, Pooled)}
"""Policies that need no card, by name."""

NAMES = (*FIXED, Dam.name)


def parse(spec: str) -> Policy:
    """A policy from its text form: ``name``, ``name:field=value,...`` or ``dam:path-to-card``.

    Raises:
        ValueError: an unknown name or field, a value of the wrong type or out of range.
    """
    name, _, rest = spec.partition(":")
    if name == Dam.name:
        if not rest:
            raise ValueError(
                "policy: expected dam:PATH with the folder of a mask card, received 'dam'; "
                "make one with dynmask calibrate"
            )
        from ..card import MaskCard

        return MaskCard.from_pretrained(rest).policy()
    if name not in FIXED:
        raise ValueError(f"policy: expected one of {', '.join(NAMES)}, received {name!r}")
    kind = FIXED[name]
    types = get_type_hints(kind)
    known = {f.name: types[f.name] for f in fields(kind)}
    values = {}
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
    return kind(**values)


__all__ = [
    "FIXED",
    "NAMES",
    "Causal",
    "Dam",
    "Layer",
    "Policy",
    "Pooled",
    "Streaming",
    "VerticalSlash",
    "parse",
]
