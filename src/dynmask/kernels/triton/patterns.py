"""Lowering diagonals and verticals on the device: the twin of ``StructuralMask.lower_tiles``.

Seen from the first row of a tile, a diagonal always covers the same offsets: a table of offsets,
made once a call, becomes the key list of every tile by one subtraction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import cdiv, next_power_of_2

MARKS, LINES, WORDS_AT_A_TIME = 256, 1024, 128
"""Indices, candidates and offsets that a program looks at in one step."""


@triton.jit
def _mark_kernel(
    diagonal, vertical, marks, column, diagonals, verticals, keys, first_key, BLOCK: tl.constexpr
):
    """Mark the offsets of diagonals, the own key's too, and the positions of verticals."""
    line = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    away = tl.load(diagonal + line * diagonals + slot, mask=slot < diagonals, other=-1)
    away = tl.where(slot == diagonals, 0, away)
    ok = (away >= 0) & (away < keys)
    tl.store(marks + line * 2 * keys + away, (slot * 0 + 1).to(tl.uint8), mask=ok)
    key = tl.load(vertical + line * verticals + slot, mask=slot < verticals, other=-1)
    key = tl.where(key < 0, -1, key - first_key)
    tl.store(column + line * verticals + slot, key, mask=slot < verticals)
    ok = (key >= 0) & (key < keys)
    tl.store(marks + line * 2 * keys + keys + key, (slot * 0 + 1).to(tl.uint8), mask=ok)


@triton.jit
def _line_of(diagonal, number, shift, lines, none):
    """The number-th diagonal in ascending order, the own key's the first; ``none`` outside."""
    there = (number >= 0) & (number < lines)
    listed = there & (number >= shift)
    away = tl.load(diagonal + number - shift, mask=listed, other=0)
    return tl.where(there, away, none)


@triton.jit
def _offset_kernel(diagonal, offset, whole, found, diagonals, stop, size, cap, BLOCK: tl.constexpr):
    """Offsets at which a tile of ``size`` rows meets a diagonal of one head."""
    line = tl.program_id(0).to(tl.int64)
    diagonal += line * diagonals
    offset += line * cap
    own = tl.load(diagonal, mask=diagonals > 0, other=-1) == 0
    shift = 1 - own.to(tl.int32)
    lines = shift
    for start in range(0, diagonals, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        away = tl.load(diagonal + slot, mask=slot < diagonals, other=-1)
        lines += tl.sum(((away >= 0) & (away < stop)).to(tl.int32), 0)
    # A line that ends a run of ``size`` lines is met by every row.
    wholes = 0
    for start in range(0, lines, BLOCK):
        number = lines - 1 - start - tl.arange(0, BLOCK)
        here = _line_of(diagonal, number, shift, lines, -1)
        ahead = _line_of(diagonal, number + size - 1, shift, lines, -2)
        every = (number >= 0) & (ahead == here + size - 1)
        at = wholes + tl.cumsum(every.to(tl.int32), 0) - 1
        tl.store(offset + at, here, mask=every & (at < cap))
        wholes += tl.sum(every.to(tl.int32), 0)
    # A line is met at offsets (line - size, line]; those down to the next line count for that one.
    some = wholes
    for start in range(0, lines * size, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        number, row = lines - 1 - candidate // size, candidate % size
        here = _line_of(diagonal, number, shift, lines, -1)
        below = _line_of(diagonal, number - 1, shift, lines, -size)
        ahead = _line_of(diagonal, number + size - 1, shift, lines, -2)
        met = (number >= 0) & (here - row > below)
        met &= (row > 0) | (ahead != here + size - 1)
        at = some + tl.cumsum(met.to(tl.int32), 0) - 1
        tl.store(offset + at, here - row, mask=met & (at < cap))
        some += tl.sum(met.to(tl.int32), 0)
    tl.store(whole + line, tl.minimum(wholes, cap))  # a bound that is too small loses keys, no more
    tl.store(found + line, tl.minimum(some, cap))


@triton.jit
def _row_words_kernel(
    marks, offset, found, words, keys, cap, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """The rows of a tile that meet a diagonal at each offset: row i where offset + i is one."""
    line = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = slot < tl.load(found + line)
    away = tl.load(offset + line * cap + slot, mask=there, other=0)
    for word in tl.static_range(WORDS):
        bits = slot * 0
        for i in range(32):
            at = away + word * 32 + i
            ok = there & (at >= 0) & (at < keys)
            mark = tl.load(marks + line * 2 * keys + at, mask=ok, other=0).to(tl.int32)
            bits |= mark << i
        tl.store(words + (line * cap + slot) * WORDS + word, bits, mask=there)


def pattern_table(
    diagonals: Tensor, verticals: Tensor, keys: int, stop: int, size: int, first_key: int, cap: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where a tile of ``size`` rows meets the diagonals of each head, seen from its first row.

    Args:
        diagonals: int32 [b or 1, heads, n], ascending, -1 at the end.
        verticals: int32 [b or 1, heads, m], likewise.
        keys: keys of the tensor.
        stop: position after the last row; longer diagonals begin further down.
        size: rows of a tile.
        first_key: position of the tensor's first key in its sequence.
        cap: offsets of a head at most.

    Returns:
        offset: int32 [b or 1, heads, cap], first row's position minus the key; unwritten after
            ``found``. words: int32 [b or 1, heads, cap, words of a tile], rows that meet it.
        wholes, found: int32 [b or 1, heads], offsets that every row meets, which come first, and
            all of them.
        vertical: int32 [b or 1, heads, m], key indices; negative padding.
        is_vertical: uint8 [b or 1, heads, keys] (a view), the same set.
    """
    b, heads, n = diagonals.shape
    m, width = verticals.shape[-1], cdiv(size, 32)
    diagonals, verticals = diagonals.contiguous(), verticals.contiguous()
    device = diagonals.device
    marks = torch.zeros(b, heads, 2, keys, dtype=torch.uint8, device=device)
    offset, words, wholes, found, vertical = (
        torch.empty(b, heads, *shape, dtype=torch.int32, device=device)
        for shape in ((cap,), (cap, width), (), (), (m,))
    )
    _mark_kernel[(cdiv(max(n + 1, m), MARKS), b * heads)](
        diagonals, verticals, marks, vertical, n, m, keys, first_key, BLOCK=MARKS, num_warps=4
    )
    _offset_kernel[(b * heads,)](
        diagonals, offset, wholes, found, n, stop, size, cap, BLOCK=LINES, num_warps=4
    )
    _row_words_kernel[(cdiv(cap, WORDS_AT_A_TIME), b * heads)](
        marks, offset, found, words, keys, cap, WORDS=width, BLOCK=WORDS_AT_A_TIME, num_warps=4
    )
    return offset, words, wholes, found, vertical, marks[:, :, 1]


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
    offset, words, whole_at, found_at, vertical, is_vertical, index, full, count, bits,
    position, rows, offsets, verticals, heads, each, pattern_batch, keys, mark_stride, cap,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Diagonals and verticals of one tile; a key on both is listed as the vertical that it is."""
    t, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(position + t)
    size = tl.load(rows + t)
    line = head.to(tl.int64) + pattern_batch * (t // each) * heads
    out = head.to(tl.int64) * tl.num_programs(0) + t
    wholes = tl.load(whole_at + line)
    found = tl.load(found_at + line)
    fulls = 0
    for start in range(0, verticals, BLOCK_V):
        slot = start + tl.arange(0, BLOCK_V)
        key = tl.load(vertical + line * verticals + slot, mask=slot < verticals, other=-1)
        every = (key >= 0) & (key <= begin)
        at = fulls + tl.cumsum(every.to(tl.int32), 0) - 1
        tl.store(index + out * cap + at, key, mask=every)
        fulls += tl.sum(every.to(tl.int32), 0)
    for start in range(0, wholes, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        away = tl.load(offset + line * offsets + slot, mask=slot < wholes, other=2147483647)
        key = begin - away
        every = (slot < wholes) & (key >= 0)
        every &= tl.load(is_vertical + line * mark_stride + key, mask=every, other=1) == 0
        at = fulls + tl.cumsum(every.to(tl.int32), 0) - 1
        tl.store(index + out * cap + at, key, mask=every)
        fulls += tl.sum(every.to(tl.int32), 0)
    edges = 0
    for start in range(0, verticals, BLOCK_V):
        slot = start + tl.arange(0, BLOCK_V)
        key = tl.load(vertical + line * verticals + slot, mask=slot < verticals, other=-1)
        edge = (key > begin) & (key < begin + size)
        at = edges + tl.cumsum(edge.to(tl.int32), 0) - 1
        tl.store(index + out * cap + fulls + at, key, mask=edge)
        for word in tl.static_range(WORDS):
            seen = _words_from(key - begin, size, word)
            tl.store(bits + (out * cap + at) * WORDS + word, seen, mask=edge)
        edges += tl.sum(edge.to(tl.int32), 0)
    for start in range(wholes, found, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        away = tl.load(offset + line * offsets + slot, mask=slot < found, other=2147483647)
        key = begin - away
        listed = (slot < found) & (key >= 0) & (key < keys)
        listed &= tl.load(is_vertical + line * mark_stride + key, mask=listed, other=1) == 0
        edge = slot < 0
        for word in tl.static_range(WORDS):
            own = tl.load(words + (line * offsets + slot) * WORDS + word, mask=listed, other=0)
            edge |= (own & _words_from(0, size, word)) != 0
        at = edges + tl.cumsum(edge.to(tl.int32), 0) - 1
        tl.store(index + out * cap + fulls + at, key, mask=edge)
        for word in tl.static_range(WORDS):
            own = tl.load(words + (line * offsets + slot) * WORDS + word, mask=edge, other=0)
            own &= _words_from(0, size, word)
            tl.store(bits + (out * cap + at) * WORDS + word, own, mask=edge)
        edges += tl.sum(edge.to(tl.int32), 0)
    tl.store(full + out, fulls)
    tl.store(count + out, fulls + edges)


def pattern_lists(
    offset: Tensor,
    words: Tensor,
    wholes: Tensor,
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
            diagonal: where every row of a tile does first; padding is beyond every position.
        words: int32 [b or 1, heads, n, words of a tile], the rows that do.
        wholes: int32 [b or 1, heads], offsets of the first part.
        found: int32 [b or 1, heads], offsets of each head.
        vertical: int32 [b or 1, heads, m], key indices of the columns; negative padding.
        is_vertical: uint8 [b or 1, heads, keys], 1 for the same set.
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
        offset, words, wholes, found, vertical, is_vertical, index, full, count, bits,
        position, rows, offsets, verticals, heads, t // batch, int(patterns > 1), keys,
        is_vertical.stride(1), cap,
        WORDS=width, BLOCK=max(min(next_power_of_2(max(offsets, 1)), 1024), 32),
        BLOCK_V=max(min(next_power_of_2(max(verticals, 1)), 1024), 32), num_warps=4,
    )  # fmt: skip
    return index, full, count, bits
