"""The oracle: readable, any device and dtype, differentiable; every kernel must agree with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks.base import repeat_heads


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible pairs, straight from the definition.

    Computes in float32 (float64 for float64 inputs). A row that sees no key gives 0, and -inf as
    its log-sum-exp. Keys that no row sees are not read: they may hold NaN.

    Args:
        query: [b, h, q, d].
        key: [b, g, k, d], g divides h; query head i reads kv head ``i // (h / g)``.
        value: [b, g, k, dv].
        visible: bool [b or 1, 1 or g or h, q, k].
        bias: [b or 1, 1 or g or h, k], added to the scaled logits of each key.
        scale: of the logits, ``d ** -0.5`` when None.

    Returns:
        out [b, h, q, dv] in the dtype of ``query``; lse float32 (float64) [b, h, q].
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[1]
    q, k, v = (
        query.to(dtype),
        repeat_heads(key, heads).to(dtype),
        repeat_heads(value, heads).to(dtype),
    )
    visible = repeat_heads(visible, heads)
    unread = ~visible.any(-2)[..., None]  # [b, h, k, 1]
    k, v = k.masked_fill(unread, 0), v.masked_fill(unread, 0)

    logits = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + repeat_heads(bias, heads).to(dtype)[:, :, None, :]
    logits = logits.masked_fill(~visible, float("-inf"))
    # The largest logit is taken off first: a log-sum-exp beside a large bias holds no fractions.
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top.masked_fill(top == float("-inf"), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0  # a row without a key gives 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return (weights @ v / total).to(query.dtype), lse
