"""Lowering on the device: key lists from lifetimes, block lists from scores, patterns from offsets.

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

BLOCK = 1024
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
            edge = seen & (every == 0)
            at = tl.where(
                every,
                whole + tl.cumsum(every.to(tl.int32), 0),
                some + tl.cumsum(edge.to(tl.int32), 0),
            )
            whole += tl.sum(every.to(tl.int32), 0)
            some += tl.sum(edge.to(tl.int32), 0)
        else:
            at = some + tl.cumsum(seen.to(tl.int32), 0)
            some += tl.sum(seen.to(tl.int32), 0)
            tl.store(ends + place * cap + at - 1, dies, mask=seen & (at <= cap))
        tl.store(index + place * cap + at - 1, key, mask=seen & (at <= cap))
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


@triton.jit
def _words_from(row, size, word):
    """Bits of rows [row, size) in a word: the rows of a tile that see a vertical from row on."""
    low = tl.minimum(tl.maximum(row - word * 32, 0), 32)
    high = tl.minimum(tl.maximum(size - word * 32, 0), 32)
    below_high = tl.where(high == 32, -1, (1 << tl.minimum(high, 31)) - 1)
    below_low = tl.where(low == 32, -1, (1 << tl.minimum(low, 31)) - 1)
    return below_high & ~below_low


@triton.jit
def _pattern_kernel(
    offset, words, found_at, vertical, is_vertical, index, full, count, bits, position, rows,
    offsets, verticals, heads, each, pattern_batch, keys, cap, edge_cap,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Diagonals and verticals of one tile; a key on both is listed as the vertical that it is."""
    t, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(position + t)
    size = tl.load(rows + t)
    line = head.to(tl.int64) + pattern_batch * (t // each) * heads
    out = head.to(tl.int64) * tl.num_programs(0) + t
    there = tl.load(found_at + line)
    fulls = 0
    found = 0
    for write in tl.static_range(2):
        whole = 0
        edge_count = 0
        for start in range(0, verticals, BLOCK_V):
            slot = start + tl.arange(0, BLOCK_V)
            key = tl.load(vertical + line * verticals + slot, mask=slot < verticals, other=-1)
            listed = (key >= 0) & (key < begin + size)
            every = listed & (key <= begin)
            edge = listed & (key > begin)
            if write:
                at = whole + tl.cumsum(every.to(tl.int32), 0) - 1
                tl.store(index + out * cap + at, key, mask=every)
                at = edge_count + tl.cumsum(edge.to(tl.int32), 0) - 1
                tl.store(index + out * cap + fulls + at, key, mask=edge)
                for word in tl.static_range(WORDS):
                    seen = _words_from(key - begin, size, word)
                    tl.store(bits + (out * edge_cap + at) * WORDS + word, seen, mask=edge)
            whole += tl.sum(every.to(tl.int32), 0)
            edge_count += tl.sum(edge.to(tl.int32), 0)
        for start in range(0, there, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            away = tl.load(offset + line * offsets + slot, mask=slot < there, other=2147483647)
            key = begin - away
            listed = (slot < there) & (key >= 0) & (key < keys)
            listed &= tl.load(is_vertical + line * keys + key, mask=listed, other=1) == 0
            some = slot < 0
            every = listed
            for word in tl.static_range(WORDS):
                own = tl.load(words + (line * offsets + slot) * WORDS + word, mask=listed, other=0)
                valid = _words_from(0, size, word)
                some |= (own & valid) != 0
                every &= (own & valid) == valid
            edge = listed & some & (every == 0)
            if write:
                at = whole + tl.cumsum(every.to(tl.int32), 0) - 1
                tl.store(index + out * cap + at, key, mask=every)
                at = edge_count + tl.cumsum(edge.to(tl.int32), 0) - 1
                tl.store(index + out * cap + fulls + at, key, mask=edge)
                for word in tl.static_range(WORDS):
                    own = tl.load(
                        words + (line * offsets + slot) * WORDS + word, mask=edge, other=0
                    )
                    own &= _words_from(0, size, word)
                    tl.store(bits + (out * edge_cap + at) * WORDS + word, own, mask=edge)
            whole += tl.sum(every.to(tl.int32), 0)
            edge_count += tl.sum(edge.to(tl.int32), 0)
        fulls = whole
        found = whole + edge_count
    tl.store(full + out, fulls)
    tl.store(count + out, found)


def pattern_lists(
    offset: Tensor,
    words: Tensor,
    found: Tensor,
    vertical: Tensor,
    is_vertical: Tensor,
    position: Tensor,
    rows: Tensor,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key lists of tiles under diagonals and verticals, with the bit rule for their boundary.

    Args:
        offset: int32 [b or 1, heads, n], first row's position minus the key, where a tile meets a
            diagonal; padding is beyond every position.
        words: int32 [b or 1, heads, n, words of a tile], the rows that do.
        found: int32 [b or 1, heads], offsets of each head.
        vertical: int32 [b or 1, heads, m], key indices of the columns; negative padding.
        is_vertical: bool [b or 1, heads, keys], the same set.
        position, rows: int32 [t], of the tiles of ``batch`` batch rows, batch-major.
        batch: batch rows.

    Returns:
        index: int32 [heads, t, n + m]; full and count: int32 [heads, t];
        bits: int32 [heads, t, n + m, words of a tile].
    """
    patterns, heads, offsets = offset.shape
    verticals, keys, t = vertical.shape[-1], is_vertical.shape[-1], position.shape[0]
    cap, width = offsets + verticals, words.shape[-1]
    index = torch.empty(heads, t, cap, dtype=torch.int32, device=offset.device)
    full, count = (index.new_empty(heads, t) for _ in range(2))
    bits = torch.empty(heads, t, cap, width, dtype=torch.int32, device=offset.device)
    _pattern_kernel[(t, heads)](
        offset.contiguous(), words.contiguous(), found.contiguous(), vertical.contiguous(),
        is_vertical.contiguous().view(torch.uint8), index, full, count, bits, position, rows,
        offsets, verticals, heads, t // batch, int(patterns > 1), keys, cap, cap,
        WORDS=width, BLOCK=max(min(next_power_of_2(max(offsets, 1)), 1024), 32),
        BLOCK_V=max(min(next_power_of_2(max(verticals, 1)), 1024), 32), num_warps=4,
    )  # fmt: skip
    return index, full, count, bits
