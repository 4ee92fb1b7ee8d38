"""Dynamic-mask sparse attention for long-context language models.

An attention call asks a policy what matters; the policy answers with a mask; the mask is lowered
to a plan; a kernel executes the plan; a model does this in every layer; an evaluation reports
what it cost and what it kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import nn, policies
from .attention import attention

# Not on first use: importing a submodule later would put the module in the function's place.
from .calibrate import DamSettings, calibrate
from .card import MaskCard
from .explain import Explanation, explain
from .gated_settings import Budget, GatedSettings
from .masks import (
    BlockMask,
    LifetimeMask,
    Mask,
    PlacedMask,
    Span,
    StructuralMask,
    spans_left_padded,
    spans_packed,
    spans_right_padded,
)
from .plan import Plan
from .retrofit import RetainedSettings

if TYPE_CHECKING:
    from .integrations.cache import BoundedCache
    from .integrations.convert import convert, load_converted, revert
    from .integrations.gated_cache import GatedCache
    from .integrations.heavy_cache import HeavyHitterCache
    from .integrations.transformers import sparsify

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "BoundedCache",
    "Budget",
    "DamSettings",
    "Explanation",
    "GatedCache",
    "GatedSettings",
    "HeavyHitterCache",
    "LifetimeMask",
    "Mask",
    "MaskCard",
    "PlacedMask",
    "Plan",
    "RetainedSettings",
    "Span",
    "StructuralMask",
    "attention",
    "calibrate",
    "convert",
    "explain",
    "load_converted",
    "nn",
    "policies",
    "revert",
    "spans_left_padded",
    "spans_packed",
    "spans_right_padded",
    "sparsify",
]

_LATER = {
    "BoundedCache": ".integrations.cache",
    "GatedCache": ".integrations.gated_cache",
    "HeavyHitterCache": ".integrations.heavy_cache",
    "convert": ".integrations.convert",
    "load_converted": ".integrations.convert",
    "revert": ".integrations.convert",
    "sparsify": ".integrations.transformers",
}


def __getattr__(name: str) -> object:
    """Load what needs more than torch when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'dynmask' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name], __name__), name)
