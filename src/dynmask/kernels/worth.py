"""What keys are worth to some queries: the naive twin of ``kernels/triton/worth.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def key_worth(query: Tensor, key: Tensor, window: Tensor) -> Tensor:
    """The largest probability each key gets from one of some queries, outside that one's window.

    Probabilities are those of full causal attention, scaled by d ** -0.5. What a row of NaN gives
    is 0, and so is what lies in the window of every row.

    Args:
        query: [b, h, r, d], the last r positions of the keys.
        key: [b, g, k, d].
        window: int [b or 1, h], newest keys of each row that are worth nothing to it, its own
            counted.

    Returns:
        Worth: [b, h, k], float32 at least.
    """
    (batch, heads, rows, dim), (groups, keys) = query.shape, key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    members = heads // groups
    position = torch.arange(keys - rows, keys, device=key.device)[:, None]
    k = torch.arange(keys, device=key.device)
    parts = []
    for g, some in enumerate(query.to(dtype).split(members, 1)):  # all at once are gigabytes
        wide = key[:, g : g + 1].to(dtype).mT
        logits = (some.reshape(batch, 1, -1, dim) @ wide * dim**-0.5).view(batch, -1, rows, keys)
        share = logits.masked_fill_(k > position, float("-inf")).softmax(-1).nan_to_num_()
        near = k > position - window[:, g * members : (g + 1) * members, None, None]
        parts.append(share.masked_fill_(near, 0).amax(-2))
    return torch.cat(parts, 1)
