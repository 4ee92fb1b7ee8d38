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
