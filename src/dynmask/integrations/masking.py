"""The mask function: what transformers' mask interface asks for, in O(keys) where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import placement


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function: positions where the pattern is known, else the booleans of sdpa."""
    if "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(
            "attention: expected causal attention, received a bidirectional mask; "
            "sparsify decoders only"
        )
    sliding = (
        local_size is not None
        and local_size == getattr(config, "sliding_window", None)
        and local_size != getattr(config, "attention_chunk_size", None)
    )
    # Without the leave to skip a mask something lies on top of the plain pattern, except that
    # compiled decoding never gets that leave.
    plain = (allow_is_causal_skip or q_length == 1) and not use_vmap
    size = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if plain and (mask_function is causal_mask_function or sliding):
        window = local_size if sliding else None
        return placement.linear_mask(*size, attention_mask, window, device)
    alone = attention_mask is None and q_length == kv_length and isinstance(q_offset, int)
    if alone and not use_vmap and (q_offset, kv_offset) == (0, 0):
        joined = _packed(mask_function, batch_size, q_length, device)
        if joined is not None:
            window = local_size if sliding else None
            return placement.linear_mask(*size, None, window, device, joined)
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert mask is not None
    return mask


def _packed(
    mask_function: Callable, batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """Which neighbours share a sequence, bool [b, length - 1]; None if not packed.

    Index-based mask functions are compositions of transformers' own (causal, sliding, packed,
    blocks read both ways). Two diagonals tell them apart: a packed row does not read its left
    neighbour where a sequence begins, a block reads its right one.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    left = torch.arange(length - 1, device=device)[None, :]
    joined = mask_function(row, head, left + 1, left)
    ahead = mask_function(row, head, left, left + 1)
    if bool(ahead.any()) or bool(joined.all()):
        return None
    return joined.expand(batch, -1)
