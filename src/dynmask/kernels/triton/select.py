"""Lifetimes of the running top w, fused: the twin of ``kernels/select.py``.

The threshold theta[q], the w-th best rank of the prefix that ends at q, never falls. So it is
found first at the end of every chunk of queries, from a table of how many keys of each prefix lie
in each bucket of ranks; then inside the chunks, whose brackets of ranks [theta before, theta
after] are disjoint: all chunks together walk over each rank once. A key dies where theta passes
its rank. One sort and four launches, O(n log n) work whatever the scores, no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128
"""Queries of one chunk. A bracket holds at most 2 CHUNK keys of the prefix: those that leave the
top w during the chunk, and those that come."""

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
    # what is past the end is counted in the last bin, which no chunk needs
    bin = tl.where(inside, position // CHUNK, BINS - 1)
    count = tl.cumsum(tl.histogram(bin, BINS), 0)
    at = tl.arange(0, BINS)
    tl.store(table + (row * buckets + bucket) * chunks + at, count, mask=at < chunks)


@triton.jit
def _boundary_kernel(
    order, table, border, n, width, buckets, chunks,
    BUCKET: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """theta after the last query of each chunk; -1 where the prefix has fewer than width keys."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BUCKETS)
    count = tl.load(table + (row * buckets + at) * chunks + chunk, mask=at < buckets, other=0)
    above = tl.cumsum(count, 0, reverse=True)  # keys of the prefix in this bucket or a higher one
    bucket = tl.max(tl.where(above >= width, at, -1), 0)
    want = width - tl.sum(tl.where(at > bucket, count, 0), 0)  # the want-th best of the bucket
    stop = tl.minimum((chunk + 1) * CHUNK, n)
    place = bucket * BUCKET + tl.arange(0, BUCKET)
    ok = (place < n) & (bucket >= 0)
    position = tl.load(order + row * n + place, mask=ok, other=n)
    present = (position < stop).to(tl.int32)
    hit = (present == 1) & (tl.cumsum(present, 0, reverse=True) == want)
    theta = tl.max(tl.where(hit, place, -1), 0)
    tl.store(border + row * chunks + chunk, theta)


@triton.jit
def _threshold_kernel(
    order, rank, border, theta, bracket, n, chunks,
    CHUNK: tl.constexpr, WALK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """theta of every query of a chunk, from the keys whose ranks lie in the chunk's bracket."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    high = tl.load(border + row * chunks + chunk)
    low = tl.load(border + row * chunks + chunk - 1, mask=chunk > 0, other=0)
    low = tl.maximum(low, 0)
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
    item = tl.arange(0, 2 * CHUNK)
    position = tl.load(list_at + item, mask=item < found, other=n)
    place = tl.load(list_at + 2 * CHUNK + item, mask=item < found, other=-1)
    # width - 1 keys rank above `high` when the chunk ends; those of them that come later than a
    # query leave its w-th best that much deeper in the bracket.
    new = tl.arange(0, CHUNK)
    above = tl.load(rank + row * n + first + new, mask=first + new < n, other=-1) > high
    for part in range(0, CHUNK, ROWS):
        query = part + tl.arange(0, ROWS)
        later = (new[None, :] > query[:, None]) & above[None, :]
        depth = 1 + tl.sum(later.to(tl.int32), 1)
        present = (position[None, :] <= first + query[:, None]).to(tl.int32)
        order_here = tl.cumsum(present, 1, reverse=True)
        hit = (present == 1) & (order_here == depth[:, None]) & (high >= 0)
        best = tl.max(tl.where(hit, place[None, :], -1), 1)
        tl.store(theta + row * n + first + query, best, mask=first + query < n)


@triton.jit
def _death_kernel(
    rank, border, theta, death, n, chunks,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First query whose theta is above the key's rank: a search over chunks, then inside one."""
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = key < n
    own = tl.load(rank + row * n + key, mask=inside, other=n)
    low = key * 0
    high = low + chunks
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        ok = inside & (middle < chunks)
        passed = tl.load(border + row * chunks + middle, mask=ok, other=n) > own
        passed |= middle >= chunks
        high = tl.where(passed, middle, high)
        low = tl.where(passed, low, tl.minimum(middle + 1, high))
    never = high >= chunks
    low = high * CHUNK
    high = low + CHUNK
    for _ in tl.static_range(INNER):
        middle = (low + high) // 2
        ok = inside & (middle < n) & (never == 0)
        passed = tl.load(theta + row * n + middle, mask=ok, other=n) > own
        high = tl.where(passed, middle, high)
        low = tl.where(passed, low, tl.minimum(middle + 1, high))
    end = tl.where(never, INF, tl.maximum(high, key))
    tl.store(death + row * n + key, end, mask=inside)


def lifetimes(scores: Tensor, width: int) -> Tensor:
    """First query at which ``width`` keys of the prefix outrank each key.

    Equal scores: the later key ranks higher; NaN ranks lowest.

    Args:
        scores: floating [b, heads, keys].
        width: keys kept, 1 or more.

    Returns:
        death: int32 [b, heads, keys]; the key's own index when it is never in the top w, the
        largest int32 when it outlives the sequence.
    """
    *lead, n = scores.shape
    flat = scores.reshape(-1, n).float()
    flat = flat.masked_fill(flat.isnan(), float("-inf"))
    order = flat.sort(dim=-1, stable=True).indices
    rows, device = flat.shape[0], scores.device
    chunks = triton.cdiv(n, CHUNK)
    bucket = max(CHUNK, triton.next_power_of_2(triton.cdiv(n, 256)))
    buckets = triton.cdiv(n, bucket)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    rank, theta, death = empty(rows, n), empty(rows, n), empty(rows, n)
    table, border = empty(rows, buckets, chunks), empty(rows, chunks)
    bracket = empty(rows, chunks, 4 * CHUNK)
    sizes = {"BUCKET": bucket, "CHUNK": CHUNK}
    bins = max(triton.next_power_of_2(chunks + 1), 32)
    _table_kernel[(buckets, rows)](
        order, rank, table, n, buckets, chunks, BINS=bins, num_warps=4, **sizes
    )
    _boundary_kernel[(chunks, rows)](
        order, table, border, n, width, buckets, chunks,
        BUCKETS=triton.next_power_of_2(buckets), num_warps=4, **sizes,
    )  # fmt: skip
    _threshold_kernel[(chunks, rows)](
        order, rank, border, theta, bracket, n, chunks,
        CHUNK=CHUNK, WALK=1024, ROWS=32, num_warps=4,
    )  # fmt: skip
    block = 1024
    _death_kernel[(triton.cdiv(n, block), rows)](
        rank, border, theta, death, n, chunks,
        CHUNK=CHUNK, STEPS=chunks.bit_length() + 1, INNER=CHUNK.bit_length(), BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return death.reshape(*lead, n)
