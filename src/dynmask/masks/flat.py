"""A mask as tensors and a line of JSON, and back: what a PyTorch operator can be called with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import bad
from .base import Mask
from .block import BlockMask
from .lifetime import LifetimeMask
from .mixed import MixedMask
from .placed import PlacedMask, Span
from .structural import StructuralMask
from .union import UnionMask

Dims = tuple[int | None, int | None]
"""Which dimensions of a mask's tensor are its batch rows and its heads."""

BOTH: Dims = (0, 1)
HEADS_FIRST: Dims = (None, 0)


def flatten(mask: Mask) -> tuple[list[Tensor], str]:
    """The tensors of a mask, and what else it is, as JSON.

    The heads of a mask can be cut by cutting its tensors along :func:`dims_of`; dimensions of
    size 1 stand for all.

    Raises:
        ValueError: a mask of another kind.
    """
    tensors: list[Tensor] = []
    return tensors, json.dumps(_form(mask, tensors))


def dims_of(form: str) -> list[Dims]:
    """Batch and head dimensions of each tensor that :func:`flatten` returned."""
    return list(_dims(json.loads(form), True))


def has_batch(form: str) -> bool:
    """Whether batch rows can be told apart by tensors; packed and padded masks name them."""
    return '"placed"' not in form


def unflatten(tensors: list[Tensor], form: str) -> Mask:
    """The mask that :func:`flatten` took apart, or some of its heads."""
    return _mask(json.loads(form), iter(tensors))


def _form(mask: Mask | None, tensors: list[Tensor]) -> Any:
    if mask is None:
        return None
    size = {"keys": mask.keys, "queries": mask.queries}
    if isinstance(mask, LifetimeMask):
        tensors.append(mask.death)
        return {"kind": "lifetime", **size, "plain": mask.plain, "most": mask.most}
    if isinstance(mask, StructuralMask):
        tensors += [mask.diagonals, mask.verticals]
        true = mask.true_mask is not None
        tensors += [mask.true_mask] if mask.true_mask is not None else []
        more = {"first_key": mask.first_key, "bands": mask.bands, "true_mask": true}
        return {"kind": "structural", **size, **more, "limit": _form(mask.limit, tensors)}
    if isinstance(mask, BlockMask):
        tensors.append(mask.index)
        more = {"block_q": mask.block_q, "block_k": mask.block_k}
        return {"kind": "block", **size, **more, "limit": _form(mask.limit, tensors)}
    if isinstance(mask, MixedMask):
        tensors.append(torch.tensor(mask.of, dtype=torch.int32, device=mask.device))
        return {"kind": "mixed", "parts": [_form(part, tensors) for part in mask.parts]}
    if isinstance(mask, UnionMask):
        return {"kind": "union", "parts": [_form(part, tensors) for part in mask.parts]}
    if isinstance(mask, PlacedMask):
        spans = [
            (s.batch, s.key_start, s.key_stop, s.query_start, s.query_stop) for s in mask.spans
        ]
        parts = [_form(part, tensors) for part in mask.masks]
        return {"kind": "placed", **size, "batch": mask.batch, "spans": spans, "parts": parts}
    raise bad(
        "mask", "a mask of dynmask.masks", type(mask).__name__,
        "Build it of LifetimeMask, StructuralMask and BlockMask.",
    )  # fmt: skip


def _dims(form: Any, batch: bool) -> Iterator[Dims]:
    """In the order of ``_form``; a placed mask's parts are single batch rows."""
    if form is None:
        return
    kind = form["kind"]
    plain = BOTH if batch else (None, 1)
    if kind in ("lifetime", "block", "structural"):
        yield plain
    if kind == "structural":
        yield plain
        if form["true_mask"]:
            yield HEADS_FIRST
    if kind == "mixed":
        yield HEADS_FIRST
    yield from _dims(form.get("limit"), batch)
    for part in form.get("parts", ()):
        yield from _dims(part, batch and kind != "placed")


def _mask(form: Any, tensors: Iterator[Tensor]) -> Any:
    if form is None:
        return None
    kind = form["kind"]
    if kind == "lifetime":
        return LifetimeMask(next(tensors), form["queries"], form["plain"], form["most"])
    if kind == "structural":
        diagonals, verticals = next(tensors), next(tensors)
        true_mask = next(tensors) if form["true_mask"] else None
        return StructuralMask(
            diagonals, verticals, form["keys"], form["queries"], true_mask, form["first_key"],
            _mask(form["limit"], tensors), form["bands"], checked=True,
        )  # fmt: skip
    if kind == "block":
        return BlockMask(
            next(tensors), form["block_q"], form["block_k"], form["keys"], form["queries"],
            _mask(form["limit"], tensors), checked=True,
        )  # fmt: skip
    if kind == "mixed":
        of = tuple(next(tensors).tolist())
        return MixedMask(tuple(_mask(part, tensors) for part in form["parts"]), of)
    parts = tuple(_mask(part, tensors) for part in form["parts"])
    if kind == "union":
        return UnionMask(parts)
    spans = tuple(Span(*numbers) for numbers in form["spans"])
    return PlacedMask(parts, spans, form["batch"], form["queries"], form["keys"])


__all__ = ["dims_of", "flatten", "has_batch", "unflatten"]
