"""What an attention module was called with beyond what it hands to the attention function."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import bad
from .cache import OwnedCache
from .placement import Placement

TEXT_AND_IMAGE = 4
"""Rows of position ids [4, b, n]: those of the text, then time, height and width of images."""


class Call(NamedTuple):
    """Arguments of one call of an attention module.

    Attributes:
        cache: its cache, or None.
        rotary: (cos, sin), each [b or 1, n, r], or None.
        positions: position ids [b or 1, n] of the new tokens, or None.
    """

    cache: Any
    rotary: tuple[Tensor, Tensor] | None
    positions: Tensor | None


NO_CALL = Call(None, None, None)

_noted = threading.local()


@torch.compiler.disable
def note_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of attention modules; a copy of a model keeps it."""
    given = arguments(module, args, kwargs)
    rotary = given.get("position_embeddings")
    two = isinstance(rotary, tuple | list) and len(rotary) == 2
    _noted.last = (
        weakref.ref(module),
        Call(
            given.get("past_key_values", given.get("past_key_value")),
            tuple(rotary) if two else None,  # type: ignore[arg-type]
            given.get("position_ids"),
        ),
    )


def take_call(module: nn.Module) -> Call:
    """What ``module`` is being called with, in this thread; once.

    Raises:
        ValueError: a layer that asks for attention again in the same call, with a cache that has
            taken its new keys and dropped others.
    """
    owner, call = getattr(_noted, "last", (None, NO_CALL))
    _noted.last = None, NO_CALL
    if owner is None or owner() is not module:
        return NO_CALL
    if call is None:
        raise bad(
            "past_key_values", "a model whose layers attend once in a call",
            f"{type(module).__name__}, which attends again", "A cache that drops keys takes them "
            "once: leave the cache to generate(), and reset() this one.",
        )  # fmt: skip
    if isinstance(call.cache, OwnedCache):
        _noted.last = owner, None
    return call


class Asked(NamedTuple):
    """What a caller of the model says about sequences in its rows.

    Attributes:
        positions: int [b, n], or None where the model counts.
        sequences: ends of packed sequences that were passed, less one.
    """

    positions: Tensor | None
    sequences: int


NOTHING_ASKED = Asked(None, 0)


def note_asked(given: dict[str, Any]) -> None:
    """Remember what a model's forward was called with, for the layers of this thread."""
    positions: Any = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == TEXT_AND_IMAGE:
        positions = positions[0]
    if not (isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1):
        positions = None
    ends = (given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k"))
    sequences = max([x.numel() - 1 for x in ends if isinstance(x, Tensor)], default=0)
    _noted.asked = Asked(positions, sequences)


def check_asked(where: Placement, queries: int) -> None:
    """Raise ValueError where a call reads across sequences that its caller has told apart.

    transformers knows packed sequences by positions that start anew, without a cache and a mask,
    and in models whose code looks for them. Positions are read from their device, where the caller
    passed some: a lower one that is counted on from begins a sequence.
    """
    positions, sequences = getattr(_noted, "asked", NOTHING_ASKED)
    _noted.asked = NOTHING_ASKED  # once a call; and no tensor of the caller's is held
    apart = "one sequence in each row", "several, packed"
    remedy = (
        "Packed ones are told apart by position_ids that start anew, with use_cache=False (or "
        "config.use_cache = False) and no attention_mask, if the model's code looks for them; "
        "pass others one by one, or padded."
    )
    if sequences > len(where.spans):
        raise bad("cu_seq_lens", *apart, remedy)
    if positions is None or positions.shape[1] != queries or positions.is_meta:
        return
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    table = positions.cpu()
    for span in where.spans:
        own = table[min(span.batch, len(table) - 1), span.query_start : span.query_stop]
        step = own.diff()
        if bool(((step[:-1] < 0) & (step[1:] > 0)).any()):
            raise bad("position_ids", *apart, remedy)


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def drop_hook(module: nn.Module, hook: Any) -> None:
    """Take a forward pre-hook off, on a copy of a model too."""
    for number, function in list(module._forward_pre_hooks.items()):
        if function is hook:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
