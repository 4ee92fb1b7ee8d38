"""Selection: when does a key leave the running top w?"""

from __future__ import annotations

import torch
from torch import Tensor

INF = 2**31 - 1


def lifetimes_of_top_w(scores: Tensor, width: int) -> Tensor:
    """First query at which ``width`` keys of the prefix outrank each key.

    Exact for every query, in O(n log n) parallel steps: a wavelet matrix over the ranks answers,
    for every prefix at once, which rank is the ``width``-th best. That threshold never falls,
    so each key's death is one binary search in it. Equal scores: the later key ranks higher.

    Args:
        scores: float [b, heads, keys], no NaN.
        width: keys kept, 1 or more.

    Returns:
        death: int32 [b, heads, keys]; the key's own index when it is never in the top w, ``INF``
        when it outlives the sequence.
    """
    *lead, n = scores.shape
    flat = scores.reshape(-1, n)
    order = flat.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(n, device=scores.device).expand_as(order)
    )
    threshold = kth_best_of_prefixes(rank, width)
    death = torch.searchsorted(threshold, rank, right=True)
    death = torch.maximum(death, torch.arange(n, device=scores.device))
    return death.masked_fill(death >= n, INF).to(torch.int32).reshape(*lead, n)


def kth_best_of_prefixes(rank: Tensor, k: int) -> Tensor:
    """k-th largest rank of every prefix; -1 for prefixes of fewer than k keys.

    Args:
        rank: int64 [rows, n], each row a permutation of 0..n-1.
        k: 1 or more.

    Returns:
        int64 [rows, n]; column q is about the prefix of keys 0..q.
    """
    rows, n = rank.shape
    left = torch.zeros(rows, n, dtype=torch.int64, device=rank.device)
    right = torch.arange(1, n + 1, device=rank.device).expand(rows, n)
    want = torch.full_like(left, k)  # the want-th largest among positions [left, right)
    best = torch.zeros_like(left)
    level = rank
    for bit in reversed(range(max((n - 1).bit_length(), 1))):
        ones = (level >> bit) & 1
        zeros_before = torch.nn.functional.pad((1 - ones).cumsum(-1), (1, 0))
        zeros = zeros_before[:, -1:]
        left0, right0 = zeros_before.gather(-1, left), zeros_before.gather(-1, right)
        left1, right1 = zeros + left - left0, zeros + right - right0
        up = want <= right1 - left1
        best = best + (up.long() << bit)
        want = torch.where(up, want, want - (right1 - left1))
        left, right = torch.where(up, left1, left0), torch.where(up, right1, right0)
        here = torch.arange(n, device=rank.device)
        target = torch.where(ones.bool(), zeros + here - zeros_before[:, :-1], zeros_before[:, :-1])
        level = torch.empty_like(level).scatter_(-1, target, level)
    short = torch.arange(n, device=rank.device) + 1 < k
    return best.masked_fill(short, -1)
