"""Keys as they were before the rotary embedding."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad
from .calls import Call

RESCALED = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change with the length that was seen."""

_styles: weakref.WeakKeyDictionary[type, Callable[..., Any]] = weakref.WeakKeyDictionary()
_sources: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
_rotaries: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)


def learn_rotaries(model: nn.Module, modules: list[nn.Module]) -> None:
    """Remember which rotary embeddings the attention modules of a model may have."""
    found = [weakref.ref(m) for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
    for module in modules:
        _rotaries[module] = found


def unrotate_of(
    module: nn.Module,
    call: Call,
    rows: slice,
    columns: slice,
    first_key: int,
    memo: dict | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """The inverse of the rotation at a call's positions, for the keys of some of its tokens.

    Args:
        module: the attention module.
        call: what it was called with; new keys are turned back by the very cos and sin.
        rows: batch rows.
        columns: new tokens.
        first_key: position of the first key where no position ids are known.
        memo: of a forward, for a decoded token: its layers of equal rotation share what undoes it.

    Returns:
        From rotated keys [b, g, k, d], the new tokens last, to keys before rotation in float32;
        None where the layer rotates nothing.
    """
    if call.rotary is None or not getattr(module, "use_rope", True):
        return None
    cos, sin = (x[rows if x.shape[0] > 1 else slice(None), columns] for x in call.rotary)

    def unrotate(key: Tensor) -> Tensor:
        if columns.stop is not None and cos.shape[1] != columns.stop - (columns.start or 0):
            raise bad(
                "keys before rotation", f"those of the layer's {cos.shape[1]} tokens",
                f"{columns.stop} queries", "They are not known where others share positions "
                "(DeepSpeed Ulysses): use dynmask.distributed.context_parallel.",
            )  # fmt: skip
        c, s = cos, sin
        past = key.shape[2] - cos.shape[1]
        if past > 0:
            if call.positions is None:
                start = torch.full((1, 1), first_key + past, device=key.device)
            else:
                ids = call.positions
                start = ids[rows if ids.shape[0] > 1 else slice(None), columns][:, :1]
            before = start - torch.arange(past, 0, -1, device=key.device)
            old = _source(module, call)(key, before)
            c, s = (torch.cat([x.to(y), y], 1) for x, y in zip(old, (c, s), strict=True))
        with torch.no_grad():
            wide = torch.promote_types(key.dtype, torch.float32)
            style = _style(module, *call.rotary)  # type: ignore[misc]
            shared = memo if past <= 0 and cos.shape[1] == 1 else None
            kept = None if shared is None else shared.get(("unrotate", style, wide))
            if kept is None or kept[0] is not call.rotary[0]:  # type: ignore[index]
                kept = call.rotary[0], *_inverse(*style(c.to(wide), s.to(wide)))  # type: ignore[index]
                if shared is not None:
                    shared["unrotate", style, wide] = kept
            return _turn(key.to(wide), *kept[1:])

    return unrotate


def _whole(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The usual rotation's cos and sin [b or 1, n, r]: the first r dimensions, in two halves."""
    return cos, sin


def _doubled(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same of [b or 1, n, r / 2], which both halves share."""
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def _inverse(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What turns keys back: [b or 1, 1, n, r] each."""
    # attention scaling and rounding are in both: the sum of the squares takes them out
    square = cos * cos + sin * sin
    return (cos / square)[:, None], (sin / square)[:, None]


def _turn(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [b, g, n, d] whose first r dimensions are turned by what :func:`_inverse` gave."""
    size = cos.shape[-1]
    turned, rest = key[..., :size], key[..., size:]
    low, high = turned.chunk(2, -1)
    back = torch.addcmul(turned * cos, torch.cat([high, -low], -1), sin)
    return torch.cat([back, rest], -1) if rest.shape[-1] else back


def turn_back(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [b, g, n, d] before the usual rotation by cos and sin [b or 1, n, r / 2].

    The first r dimensions were turned, in two halves.
    """
    return _turn(key, *_inverse(*_doubled(cos, sin)))


def _style(module: nn.Module, cos: Tensor, sin: Tensor) -> Callable[..., Any]:
    """How cos and sin are meant: as the one undoes the model's own rotation of a random key."""
    kind = type(module)
    if kind in _styles:
        return _styles[kind]
    apply = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    if apply is not None:
        cos, sin = cos[:1].float(), sin[:1].float()
        dim = int(getattr(module, "head_dim", 0) or cos.shape[-1])
        draw = torch.Generator().manual_seed(0)
        plain = torch.randn(1, 1, cos.shape[1], dim, generator=draw).to(cos.device)
        for part in (plain, plain[..., : cos.shape[-1]]):
            try:
                turned = apply(part, part, cos, sin)[1]
            except (RuntimeError, TypeError):
                continue
            for style in (_whole, _doubled):
                if 2 * cos.shape[-1] > part.shape[-1] and style is _doubled:
                    continue
                back = _turn(turned, *_inverse(*style(cos, sin)))
                if torch.allclose(back, part, rtol=1e-3, atol=1e-3):
                    if bool((sin.abs() > 0.01).any()):  # position 0 alone tells nothing
                        _styles[kind] = style
                    return style
    raise ValueError(
        f"rotary embedding: expected one that turns halves of a head, as Llama's, received that of "
        f"{kind.__name__}; use score heads that look at values alone (head='value')"
    )


def _source(module: nn.Module, call: Call) -> Callable[..., Any]:
    """The rotary embedding that gave a call its cos and sin, for other positions."""
    if module in _sources:
        return _sources[module]
    assert call.rotary is not None
    kinds = getattr(module.config, "layer_types", None)  # type: ignore[union-attr]
    index = module.layer_idx
    given = [()] if not kinds else [(kinds[index],), ()]  # type: ignore[index]
    for reference in _rotaries.get(module, []):
        rotary = reference()
        if rotary is None or call.positions is None:
            continue
        for more in given:
            try:
                cos, sin = rotary(call.rotary[0], call.positions, *more)
            except (RuntimeError, TypeError, AttributeError, KeyError):
                continue
            same = cos.shape == call.rotary[0].shape and torch.allclose(cos, call.rotary[0])
            if not same or not torch.allclose(sin, call.rotary[1]):
                continue
            kind: Any = getattr(rotary, "rope_type", "default")
            kind = kind.get(more[0]) if isinstance(kind, dict) and more else kind
            if kind in RESCALED:
                raise ValueError(
                    f"rotary embedding: expected frequencies that stay, received {kind!r}, which "
                    "turned older keys of this cache otherwise; generate with a BoundedCache, "
                    "whose keys are scored when they come"
                )
            _sources[module] = lambda x, ids, r=reference, m=more: r()(x, ids, *m)  # type: ignore[misc]
            return _sources[module]
    raise ValueError(
        f"rotary embedding: expected the module that gives {type(module).__name__} its cos and "
        "sin, found none that gives the same; generate with a BoundedCache, whose keys are scored "
        "when they come"
    )
