"""Lifetimes of the running top w, fused: the twin of ``kernels/select.py``.

The threshold theta[q], the w-th best rank of the prefix that ends at q, never falls; a key dies
where theta passes its rank. So theta is found at the end of every chunk of queries, from a table
of how many keys of each prefix lie in each bucket of ranks. The keys that die during a chunk have
ranks between its theta before and after. These brackets of ranks are disjoint, so all chunks
together walk over each rank once; inside a bracket a key's death is counted out from the chunk's
new keys. One sort and three launches, O(n log n) work whatever the scores, no host
synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import cdiv, next_power_of_2

CHUNK = 128
"""Queries of one chunk. A bracket holds at most 2 CHUNK keys of the prefix: those that leave the
top w during the chunk, and those that come."""

MOST = 2048
"""Ranks of a bucket and chunks of a step at most: a histogram of more takes minutes to compile."""

INF = tl.constexpr(2**31 - 1)


@triton.jit
def _table_kernel(
    order, rank, table, n, buckets, chunks,
    BUCKET: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Of one bucket of ranks: each key's rank, and how many keys lie in the first c chunks."""
    bucket, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = bucket * BUCKET + tl.arange(0, BUCKET)
    inside = place < n
    position = tl.load(order + row * n + place, mask=inside, other=0).to(tl.int32)
    tl.store(rank + row * n + position, place, mask=inside)
    before = 0
    for part in range(0, chunks, BINS):
        bin = position // CHUNK - part
        here = inside & (bin >= 0) & (bin < BINS)
        count = tl.cumsum(tl.histogram(tl.where(here, bin, 0), BINS), 0)
        count -= tl.sum((here == 0).to(tl.int32), 0)  # the others were counted in the first bin
        at = part + tl.arange(0, BINS)
        line = table + (row * buckets + bucket) * chunks
        tl.store(line + at, before + count, mask=at < chunks)
        before += tl.sum(here.to(tl.int32), 0)


@triton.jit
def _boundary_kernel(
    order, rank, table, border, death, n, width, buckets, chunks,
    BUCKET: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """theta after the last query of each chunk; -1 where the prefix has fewer than width keys.

    The keys of the next chunk that rank below it never live; all others may live for ever.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BUCKETS)
    count = tl.load(table + (row * buckets + at) * chunks + chunk, mask=at < buckets, other=0)
    above = tl.cumsum(count, 0, reverse=True)  # keys of the prefix in this bucket or a higher one
    bucket = tl.max(tl.where(above >= width, at, -1), 0)
    want = width - tl.sum(tl.where(at > bucket, count, 0), 0)  # the want-th best of the bucket
    stop = tl.minimum((chunk + 1) * CHUNK, n)
    place = bucket * BUCKET + tl.arange(0, BUCKET)
    ok = (place >= 0) & (place < n)  # of bucket -1 all places are negative
    position = tl.load(order + row * n + place, mask=ok, other=n)
    present = (position < stop).to(tl.int32)
    hit = (present == 1) & (tl.cumsum(present, 0, reverse=True) == want)
    theta = tl.max(tl.where(hit, place, -1), 0)
    tl.store(border + row * chunks + chunk, theta)
    key = tl.arange(0, CHUNK)
    if chunk == 0:
        tl.store(death + row * n + key, key * 0 + INF, mask=key < n)
    key += (chunk + 1) * CHUNK
    own = tl.load(rank + row * n + key, mask=key < n, other=0)
    tl.store(death + row * n + key, tl.where(own < theta, key, INF), mask=key < n)


@triton.jit
def _death_kernel(
    order, rank, border, death, bracket, n, chunks,
    CHUNK: tl.constexpr, WALK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Deaths during one chunk: of keys whose ranks lie between its theta before and after."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    high = tl.load(border + row * chunks + chunk)
    low = tl.load(border + row * chunks + chunk - 1, mask=chunk > 0, other=0)
    low = tl.maximum(low, 0)
    if high > low:
        first = chunk * CHUNK
        stop = tl.minimum(first + CHUNK, n)
        # Walk over the bracket; the places and ranks of the keys that have come go to a list.
        list_at = bracket + (row * chunks + chunk) * 4 * CHUNK
        found = 0
        for start in range(low, high + 1, WALK):
            place = start + tl.arange(0, WALK)
            position = tl.load(order + row * n + place, mask=place <= high, other=n).to(tl.int32)
            present = (position < stop).to(tl.int32)
            slot = found + tl.cumsum(present, 0) - 1
            tl.store(list_at + slot, position, mask=present == 1)
            tl.store(list_at + 2 * CHUNK + slot, place, mask=present == 1)
            found += tl.sum(present, 0)
        tl.debug_barrier()  # the list is read by other threads than those that wrote it
        # When the chunk ends, width - 1 keys rank above `high`, so width + d keys rank above the
        # one that stands d + 2 from the end of the list. It died when the (d + 1)-th last of the
        # new keys that outrank it came, or was dead when it came itself.
        new = tl.arange(0, CHUNK)
        new_rank = tl.load(rank + row * n + first + new, mask=first + new < n, other=-1)
        for part in range(0, found - 1, ROWS):
            slot = part + tl.arange(0, ROWS)
            position = tl.load(list_at + slot, mask=slot < found - 1, other=0)
            place = tl.load(list_at + 2 * CHUNK + slot, mask=slot < found - 1, other=n)
            outranks = new_rank[None, :] > place[:, None]
            since = tl.cumsum(outranks.to(tl.int32), 1, reverse=True)  # came then or later
            hit = outranks & (since == (found - 1 - slot)[:, None])
            came = tl.max(tl.where(hit, new[None, :], -1), 1)
            end = tl.maximum(position, first + came)
            tl.store(death + row * n + position, end, mask=slot < found - 1)


def lifetimes(scores: Tensor, width: int) -> Tensor:
    """First query at which ``width`` keys of the prefix outrank each key.

    Equal scores: the later key ranks higher; NaN counts as -inf.

    Args:
        scores: floating [b, heads, keys].
        width: keys kept, 1 or more.

    Returns:
        death: int32 [b, heads, keys]; the key's own index when it is never in the top w, the
        largest int32 when it outlives the sequence.
    """
    *lead, n = scores.shape
    flat = scores.reshape(-1, n).float().contiguous()
    inf = float("inf")
    order = flat.nan_to_num(-inf, inf, -inf).sort(dim=-1, stable=True).indices
    rows = flat.shape[0]
    chunks = cdiv(n, CHUNK)
    bucket = min(max(CHUNK, next_power_of_2(cdiv(n, 128))), MOST)
    buckets = cdiv(n, bucket)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=scores.device)

    rank, death = empty(rows, n), empty(rows, n)
    table, border = empty(rows, buckets, chunks), empty(rows, chunks)
    bracket = empty(rows, chunks, 4 * CHUNK)
    bins = min(max(next_power_of_2(chunks), 32), MOST)
    _table_kernel[(buckets, rows)](
        order, rank, table, n, buckets, chunks,
        BUCKET=bucket, CHUNK=CHUNK, BINS=bins, num_warps=4,
    )  # fmt: skip
    _boundary_kernel[(chunks, rows)](
        order, rank, table, border, death, n, width, buckets, chunks,
        BUCKET=bucket, CHUNK=CHUNK, BUCKETS=next_power_of_2(buckets), num_warps=4,
    )  # fmt: skip
    _death_kernel[(chunks, rows)](
        order, rank, border, death, bracket, n, chunks,
        CHUNK=CHUNK, WALK=1024, ROWS=16, num_warps=4,
    )  # fmt: skip
    return death.reshape(*lead, n)
