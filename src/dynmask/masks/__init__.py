"""The masks: what is allowed."""

from .base import Mask
from .block import BlockMask
from .lifetime import LifetimeMask
from .mixed import MixedMask
from .placed import PlacedMask, Span, spans_left_padded, spans_packed, spans_right_padded
from .structural import StructuralMask
from .union import UnionMask

__all__ = [
    "BlockMask",
    "LifetimeMask",
    "Mask",
    "MixedMask",
    "PlacedMask",
    "Span",
    "StructuralMask",
    "UnionMask",
    "spans_left_padded",
    "spans_packed",
    "spans_right_padded",
]
