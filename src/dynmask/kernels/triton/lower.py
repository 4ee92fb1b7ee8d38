"""Lowering on the device: key lists from lifetimes, block lists from scores.

Lists have a capacity that follows from the mask alone, so nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import cdiv, next_power_of_2

SPAN = 4096
"""Positions of the segments whose lists the tiles' lists are filtered from."""

LADDER = 16
"""Segments of one level that are filtered from one segment of the level above."""

BLOCK = 512
"""Keys that a program looks at in one step."""


@triton.jit
def _segment_kernel(
    death, counts, index, ends, death_batch, death_head, first, stop, span, segments, blocks, cap,
    heads, BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Keys that a query of a segment reads, one block of keys a program: count, then write."""
    block, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = first + segment * span
    end = tl.minimum(begin + span, stop)
    key = block * BLOCK + tl.arange(0, BLOCK)
    base = death + (row // heads).to(tl.int64) * death_batch + (row % heads) * death_head
    dies = tl.load(base + key, mask=key < end, other=-1)
    seen = ((dies > begin) & (dies > key)).to(tl.int32)
    at = (row.to(tl.int64) * segments + segment) * blocks + block
    if WRITE:
        before = tl.load(counts + at - 1, mask=block > 0, other=0)
        slot = before + tl.cumsum(seen, 0) - 1
        line = (row.to(tl.int64) * segments + segment) * cap
        tl.store(index + line + slot, key, mask=(seen == 1) & (slot < cap))
        tl.store(ends + line + slot, dies, mask=(seen == 1) & (slot < cap))
    else:
        tl.store(counts + at, tl.sum(seen, 0))


@triton.jit
def _filter_kernel(
    parent, parent_ends, parent_count, index, ends, full, count,
    first, stop, span, segments, count_stride, ratio, parents, parent_cap, cap, heads,
    FINAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Those keys of a segment's list that a query of a smaller segment reads.

    The keys' deaths lie beside them: looking each up by its key would read a sector for a number.
    With FINAL the smaller segment is a tile: keys that every row sees come first.
    """
    segment, row = tl.program_id(0), tl.program_id(1)
    begin = first + segment * span
    end = tl.minimum(begin + span, stop)
    wide = row.to(tl.int64)
    above = wide * parents + segment // ratio
    line = above * parent_cap
    length = tl.minimum(tl.load(parent_count + above * count_stride), parent_cap)
    if FINAL:
        # lists of one head lie together, those of all batch rows: [heads, b * segments, cap]
        place = (row % heads).to(tl.int64) * (tl.num_programs(1) // heads) + row // heads
        place = place * segments + segment
    else:
        place = wide * segments + segment
    fulls = 0
    if FINAL:
        for start in range(0, length, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            key = tl.load(parent + line + slot, mask=slot < length, other=2147483647)
            dies = tl.load(parent_ends + line + slot, mask=slot < length, other=-1)
            fulls += tl.sum(((key <= begin) & (dies >= end)).to(tl.int32), 0)
    whole = 0
    some = fulls
    for start in range(0, length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(parent + line + slot, mask=slot < length, other=2147483647)
        dies = tl.load(parent_ends + line + slot, mask=slot < length, other=-1)
        seen = (key < end) & (dies > begin)  # who dies before it lives is in no list above
        if FINAL:
            every = seen & (key <= begin) & (dies >= end)
            # both counts in one scan: those of the boundary in the upper half of the word
            both = tl.where(every, 1, tl.where(seen, 65536, 0))
            before = tl.cumsum(both, 0) - both
            at = tl.where(every, whole + (before & 65535), some + (before >> 16))
            both = tl.sum(both, 0)
            whole += both & 65535
            some += both >> 16
        else:
            at = some + tl.cumsum(seen.to(tl.int32), 0) - 1
            some += tl.sum(seen.to(tl.int32), 0)
            tl.store(ends + place * cap + at, dies, mask=seen & (at < cap))
        tl.store(index + place * cap + at, key, mask=seen & (at < cap))
    tl.store(count + place, tl.minimum(some, cap))  # a bound that is too small loses keys, no more
    if FINAL:
        tl.store(full + place, tl.minimum(fulls, cap))


def alive_lists(
    death: Tensor, first: int, stop: int, tile: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Key lists of tiles under lifetimes, the keys that every row of a tile sees first.

    From coarse to fine: the keys that a segment of many tiles reads, then among those the keys of
    ever smaller segments, then of each tile. A key is looked at a few times, not once a tile.

    Args:
        death: int32 [b, heads, keys].
        first, stop: positions of the query rows; tiles begin at ``first``.
        tile: positions of a tile.
        most: keys that one query reads at most.

    Returns:
        index: int32 [heads, b * tiles, cap]; full and count: int32 [heads, b * tiles].
    """
    batch, heads, _ = death.shape
    death = death if death.stride(-1) == 1 else death.contiguous()
    rows = batch * heads
    levels = [tile]
    while levels[-1] * LADDER < stop - first:
        levels.append(levels[-1] * (LADDER if len(levels) > 1 else max(SPAN // tile, 2)))
    common = (death.stride(0), death.stride(1), first, stop)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=death.device)

    span = levels[-1]
    segments, cap = cdiv(stop - first, span), min(most + span, stop)
    blocks = cdiv(stop, BLOCK)
    counts = empty(rows, segments, blocks)
    parent, ends = (empty(rows, segments, cap) for _ in range(2))
    for write in (False, True):
        _segment_kernel[(blocks, segments, rows)](
            death, counts, parent, ends, *common, span, segments, blocks, cap, heads,
            BLOCK=BLOCK, WRITE=write, num_warps=4,
        )  # fmt: skip
        if not write:
            counts = counts.cumsum(-1, dtype=torch.int32)
    count, stride = counts[..., -1], blocks
    if tile == 1 and stop - first == 1:  # every key that the only row reads is seen by every row
        count = count.reshape(batch, heads).T.contiguous()
        index = parent.view(batch, heads, cap).transpose(0, 1).contiguous()
        return index, count, count.clone()
    full = count
    for finer in reversed(levels[:-1] or levels):
        final, ratio, parents = finer == tile, span // finer, segments
        span, parent_cap = finer, cap
        segments, cap = cdiv(stop - first, span), min(most + span, stop)
        shape = (heads, batch * segments) if final else (rows, segments)
        index, full, found = empty(*shape, cap), empty(*shape), empty(*shape)
        dies = index if final else empty(*shape, cap)
        _filter_kernel[(segments, rows)](
            parent, ends, count, index, dies, full, found, first, stop, span, segments, stride,
            ratio, parents, parent_cap, cap, heads, FINAL=final, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        parent, ends, count, stride = index, dies, found, 1
    return parent, full, count


@triton.jit
def _block_kernel(
    chosen, index, first_block, keys, key_blocks, cap,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers of the chosen blocks of the past and of the own ones, ascending, then -1."""
    qb, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = first_block + qb
    last = tl.minimum((number + 1) * BLOCK_Q, keys) - 1
    line = row * tl.num_programs(0) + qb
    found = 0
    for start in range(0, key_blocks, BLOCK):
        kb = start + tl.arange(0, BLOCK)
        pick = tl.load(chosen + line * key_blocks + kb, mask=kb < key_blocks, other=0) != 0
        past = (kb < key_blocks) & (kb * BLOCK_K <= last)
        keep = past & (pick | ((kb + 1) * BLOCK_K > number * BLOCK_Q))
        slot = found + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index + line * cap + slot, kb, mask=keep & (slot < cap))
        found += tl.sum(keep.to(tl.int32), 0)
    for start in range(0, cap, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(index + line * cap + slot, slot * 0 - 1, mask=(slot >= found) & (slot < cap))


def block_lists(
    chosen: Tensor, block_q: int, block_k: int, keys: int, first_block: int, cap: int
) -> Tensor:
    """Lists of the chosen key blocks: int32 [b, heads, query blocks, cap], -1 at the end.

    Blocks in the future are dropped, the own block of a query block is added.

    Args:
        chosen: bool [b, heads, query blocks, key blocks].
        block_q, block_k: positions in a query block and in a key block.
        keys: keys of the tensor.
        first_block: number of the first query block.
        cap: blocks in a list at most.
    """
    b, heads, blocks, key_blocks = chosen.shape
    index = torch.empty(b, heads, blocks, cap, dtype=torch.int32, device=chosen.device)
    _block_kernel[(blocks, b * heads)](
        chosen.contiguous().view(torch.uint8), index, first_block, keys, key_blocks, cap,
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK=min(1024, next_power_of_2(key_blocks)),
        num_warps=4,
    )  # fmt: skip
    return index


@triton.jit
def _block_plan_kernel(
    numbers, index, full, count, position, rows, block_batch, block_head, first_block,
    each, cap, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First keys of a tile's blocks; blocks wholly in the past are the first of the list."""
    t, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(position + t)
    end = begin + tl.load(rows + t)
    line = numbers + (t // each).to(tl.int64) * block_batch + head.to(tl.int64) * block_head
    line += (begin // BLOCK_Q - first_block).to(tl.int64) * cap
    out = head.to(tl.int64) * tl.num_programs(0) + t
    fulls, found = 0, 0
    for start in range(0, cap, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        number = tl.load(line + slot, mask=slot < cap, other=-1)
        key = number * BLOCK_K
        some = (number >= 0) & (key < end)
        tl.store(index + out * cap + slot, tl.where(some, key, 0), mask=slot < cap)
        fulls += tl.sum((some & (key + BLOCK_K - 1 <= begin)).to(tl.int32), 0)
        found += tl.sum(some.to(tl.int32), 0)
    tl.store(full + out, fulls)
    tl.store(count + out, found)


def block_plan(
    blocks: Tensor,
    position: Tensor,
    rows: Tensor,
    batch: int,
    block_q: int,
    block_k: int,
    first_block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of tiles that each lie in one query block.

    Args:
        blocks: int32 [b or 1, heads, query blocks, n], ascending, -1 at the end.
        position, rows: int32 [t], of the tiles of ``batch`` batch rows, batch-major.
        batch: batch rows.
        block_q, block_k: positions in a query block and in a key block.
        first_block: number of the first query block.

    Returns:
        index: int32 [heads, t, n], first key of each entry; full and count: int32 [heads, t].
    """
    heads, _, cap = blocks.shape[1:]
    t = position.shape[0]
    blocks = blocks if blocks.stride(-1) == 1 and blocks.stride(-2) == cap else blocks.contiguous()
    index = torch.empty(heads, t, cap, dtype=torch.int32, device=blocks.device)
    full, count = (index.new_empty(heads, t) for _ in range(2))
    _block_plan_kernel[(t, heads)](
        blocks, index, full, count, position, rows, blocks.stride(0), blocks.stride(1),
        first_block, t // batch, cap, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK=min(1024, next_power_of_2(max(cap, 1))), num_warps=4,
    )  # fmt: skip
    return index, full, count
