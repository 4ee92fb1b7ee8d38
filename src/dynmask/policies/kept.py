"""How much of the model's own attention a mask keeps, on a few query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..masks import LifetimeMask, Mask
from .weights import WEIGHTS_AT_A_TIME


def sampled_rows(queries: int, count: int) -> list[int]:
    """``count`` rows spread evenly over ``queries``, the last one included."""
    count = min(count, queries)
    return [(i + 1) * queries // count - 1 for i in range(count)]


def kept_mass(
    query: Tensor,
    key: Tensor,
    mask: Mask,
    rows: list[int],
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Share of the model's own attention that lies on the keys which ``mask`` keeps.

    The attention is computed in float32 for the given rows alone, over the keys that the model
    itself reads (causal, within its sliding window). Memory is O(rows x keys) for one kv head.

    Args:
        query: [b, h, q, d].
        key: [b, g, k, d].
        mask: mask of these queries and keys.
        rows: query rows.
        scale: factor on the logits, ``d ** -0.5`` when None.
        window: the model's sliding window, or None.

    Returns:
        float32 [b, h, len(rows)], each between 0 and 1.
    """
    (batch, heads, _, dim), (groups, keys) = query.shape, key.shape[1:3]
    members = heads // groups
    factor = dim**-0.5 if scale is None else scale
    if isinstance(mask, LifetimeMask) and ops.fused_rows(query):
        position = torch.tensor(rows, dtype=torch.int32) + mask.offset
        return ops.kept_share(
            query[:, :, rows], key, position.to(key.device, non_blocking=True), mask.death,
            factor, min(window or keys, keys),
        )  # fmt: skip
    few = max(1, WEIGHTS_AT_A_TIME // (batch * heads * keys))
    shares = []
    for start in range(0, len(rows), few):
        some = rows[start : start + few]
        kept = torch.cat([mask.dense((row, row + 1)) for row in some], 2)
        kept = kept.repeat_interleave(heads // kept.shape[1], 1)
        picked = query[:, :, some]
        hidden = _hidden(torch.tensor(some) + mask.offset, keys, window).to(key.device)
        parts = []
        for g in range(groups):  # all kv heads at once would copy every key in float32
            own = slice(g * members, (g + 1) * members)
            logits = picked[:, own].float().flatten(1, 2) @ key[:, g].float().mT * factor
            logits = logits.unflatten(1, (members, len(some))).masked_fill(hidden, float("-inf"))
            parts.append(logits.softmax(-1).masked_fill(~kept[:, own], 0).sum(-1))
        shares.append(torch.cat(parts, 1))
    return torch.cat(shares, -1)


def _hidden(position: Tensor, keys: int, window: int | None) -> Tensor:
    """Which keys the model itself does not read at these positions: bool [rows, keys]."""
    k, q = torch.arange(keys), position[:, None]
    return (k > q) if window is None else (k > q) | (k <= q - window)
