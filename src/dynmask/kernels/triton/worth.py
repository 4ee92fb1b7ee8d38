"""Attention of a few queries over all keys, fused: what keys are worth to them, what a mask keeps.

The twins of ``kernels/worth.py`` and of ``policies/kept.py``. Keys are read in chunks that need not
know of each other: once for the sum of every row's softmax, and, for the worth, once more for the
largest probability of every key. No weights are written to memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import INTERPRETED, cdiv, next_power_of_2

ROWS = 64
"""Query rows of a step at most; heads of fewer rows are stacked up to 16."""

LEAST_ROWS = 16
STEP = 64
"""Keys of a step."""

MOST_CHUNK = 4096
"""Keys of a program at most; fewer where there would be too few programs."""

PROGRAMS = 1024


@triton.jit
def _logits(
    q, k_base, k_n, key, position, factor, keys, d,
    D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits [rows, n] of keys in the unit of exp2; -inf where a row must not look."""
    at = key.to(tl.int64) if WIDE else key
    there = (key < keys)[:, None] & (d < D)[None, :]
    k = tl.load(k_base + at[:, None] * k_n + d[None, :], mask=there, other=0.0)
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    return tl.where(key[None, :] <= position[:, None], logits, float("-inf"))


@triton.jit
def _rows(
    Q, q_b, q_h, q_n, batch, group, pack, part, queries, keys, members, d,
    D: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Rows of a step, PACK heads of TILE rows: q, position, head, and whether they are there."""
    m = tl.arange(0, PACK * TILE)
    member, row = pack * PACK + m // TILE, part * TILE + m % TILE
    ok = (member < members) & (row < queries)
    head = group * members + member
    q_at = Q + batch * q_b + (head.to(tl.int64) * q_h + row * q_n)[:, None] + d[None, :]
    q = tl.load(q_at, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    return q, keys - queries + row, head, ok


@triton.jit
def _sum_kernel(
    Q, K, Top, Sum, q_b, q_h, q_n, k_b, k_h, k_n,
    queries, keys, groups, members, parts, packs, chunks, chunk, factor,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Largest logit of each row in one chunk of keys, and the sum of exp2 relative to it."""
    part, pack = tl.program_id(0) % parts, tl.program_id(0) // parts % packs
    group = tl.program_id(0) // parts // packs
    number, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D_PAD)
    q, position, head, ok = _rows(
        Q, q_b, q_h, q_n, batch, group, pack, part, queries, keys, members, d, D, TILE, PACK
    )
    k_base = K + batch * k_b + group.to(tl.int64) * k_h
    top = tl.full([PACK * TILE], float("-inf"), tl.float32)
    total = tl.zeros([PACK * TILE], tl.float32)
    for start in range(number * chunk, min((number + 1) * chunk, keys), STEP):
        key = start + tl.arange(0, STEP)
        logits = _logits(q, k_base, k_n, key, position, factor, keys, d, D, UPCAST, PRECISION, WIDE)
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        top = new
    row = position - (keys - queries)
    at = ((batch * groups * members + head) * chunks + number) * queries + row
    tl.store(Top + at, top, mask=ok)
    tl.store(Sum + at, total, mask=ok)


@triton.jit
def _kept_kernel(
    Q, K, Position, Death, Top, Sum, Kept, q_b, q_h, q_n, k_b, k_h, k_n, death_b, death_h,
    queries, keys, groups, members, parts, packs, chunks, chunk, shared, window, factor,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As _sum_kernel, of rows at any positions, and the part of the sum that keys alive make up.

    ``shared`` query heads have the same lifetimes. Keys ``window`` or more before a row are not
    looked at.
    """
    part, pack = tl.program_id(0) % parts, tl.program_id(0) // parts % packs
    group = tl.program_id(0) // parts // packs
    number, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D_PAD)
    q, last, head, ok = _rows(
        Q, q_b, q_h, q_n, batch, group, pack, part, queries, keys, members, d, D, TILE, PACK
    )
    row = last - (keys - queries)
    position = tl.load(Position + row, mask=ok, other=0)
    k_base = K + batch * k_b + group.to(tl.int64) * k_h
    own = Death + batch * death_b + (head // shared).to(tl.int64) * death_h
    top = tl.full([PACK * TILE], float("-inf"), tl.float32)
    total = tl.zeros([PACK * TILE], tl.float32)
    kept = tl.zeros([PACK * TILE], tl.float32)
    for start in range(number * chunk, min((number + 1) * chunk, keys), STEP):
        key = start + tl.arange(0, STEP)
        logits = _logits(q, k_base, k_n, key, position, factor, keys, d, D, UPCAST, PRECISION, WIDE)
        logits = tl.where(key[None, :] > (position - window)[:, None], logits, float("-inf"))
        there = ok[:, None] & (key < keys)[None, :]
        dies = tl.load(own[:, None] + key[None, :], mask=there, other=0)
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights, fade = tl.exp2(logits - safe[:, None]), tl.exp2(top - safe)
        total = total * fade + tl.sum(weights, 1)
        alive = tl.where(position[:, None] < dies, weights, 0.0)
        kept = kept * fade + tl.sum(alive, 1)
        top = new
    at = ((batch * groups * members + head) * chunks + number) * queries + row
    tl.store(Top + at, top, mask=ok)
    tl.store(Sum + at, total, mask=ok)
    tl.store(Kept + at, kept, mask=ok)


@triton.jit
def _worth_kernel(
    Q, K, Norm, Window, Worth, q_b, q_h, q_n, k_b, k_h, k_n, window_b,
    queries, keys, groups, members, parts, packs, chunk, factor,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Largest probability of each key of a chunk, over the rows whose window it is not in."""
    pack, group = tl.program_id(0) % packs, tl.program_id(0) // packs
    number, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D_PAD)
    k_base = K + batch * k_b + group.to(tl.int64) * k_h
    own = tl.arange(0, PACK * TILE) // TILE
    for part in range(0, parts):
        q, position, head, ok = _rows(
            Q, q_b, q_h, q_n, batch, group, pack, part, queries, keys, members, d, D, TILE, PACK
        )
        line = (batch * groups * members + head) * queries + position - (keys - queries)
        norm = tl.load(Norm + line, mask=ok, other=float("inf"))
        window = tl.load(Window + batch * window_b + head, mask=ok, other=0)
        for start in range(number * chunk, min((number + 1) * chunk, keys), STEP):
            key = start + tl.arange(0, STEP)
            logits = _logits(
                q, k_base, k_n, key, position, factor, keys, d, D, UPCAST, PRECISION, WIDE
            )
            share = tl.exp2(logits - norm[:, None])
            far = ok[:, None] & (key[None, :] <= (position - window)[:, None])
            share = tl.where(far & (share == share), share, 0.0)
            for u in tl.static_range(PACK):
                best = tl.max(tl.where((own == u)[:, None], share, 0.0), 0)
                member = pack * PACK + u
                one = batch * groups * members + group * members + member
                there = (key < keys) & (member < members)
                at = Worth + one * keys + key
                if parts > 1:  # the keys of a chunk are this program's alone
                    best = tl.maximum(best, tl.load(at, mask=there & (part > 0), other=0.0))
                tl.store(at, best, mask=there)


class _Launch:
    """How few queries [b, h, r, d] and keys [b, g, k, d] are cut into programs."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        (batch, heads, rows, dim), (groups, keys) = query.shape, key.shape[1:3]
        self.query, self.key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        members = heads // groups
        tile = min(next_power_of_2(rows), ROWS)
        pack = max(LEAST_ROWS // tile, 1)
        parts, packs = cdiv(rows, tile), cdiv(members, pack)
        chunk = min(cdiv(keys * batch * groups * packs, PROGRAMS), MOST_CHUNK)
        chunk = cdiv(max(chunk, 4 * STEP), STEP) * STEP
        self.chunks = cdiv(keys, chunk)
        self.of_rows = (parts * packs * groups, self.chunks, batch)
        self.of_keys = (packs * groups, self.chunks, batch)
        self.strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        self.sizes = (rows, keys, groups, members, parts, packs)
        self.chunk, self.factor = chunk, scale * math.log2(math.e)
        self.switches = {
            "D": dim, "D_PAD": max(next_power_of_2(dim), 16), "TILE": tile, "PACK": pack,
            "STEP": STEP, "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
            "WIDE": self.key.stride(2) * (keys - 1) + dim >= 2**31,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32", "num_warps": 4,
        }  # fmt: skip

    def parts(self, count: int) -> list[Tensor]:
        """Room for so many numbers of every row and chunk: [b, h, chunks, r] each."""
        batch, heads, rows, _ = self.query.shape
        shape = (batch, heads, self.chunks, rows)
        return [torch.empty(shape, device=self.key.device) for _ in range(count)]


def key_worth(query: Tensor, key: Tensor, window: Tensor) -> Tensor:
    """As :func:`dynmask.kernels.worth.key_worth`, float32."""
    launch = _Launch(query, key, query.shape[-1] ** -0.5)
    window = window.to(key.device, torch.int32, non_blocking=True).contiguous()
    top, total = launch.parts(2)
    _sum_kernel[launch.of_rows](
        launch.query, launch.key, top, total, *launch.strides, *launch.sizes, launch.chunks,
        launch.chunk, launch.factor, **launch.switches,
    )  # fmt: skip
    # a chunk that a row does not see has a sum of 0, and its log is -inf
    norm = ((top + total.log2()) * math.log(2)).logsumexp(2) * math.log2(math.e)
    out = torch.empty(*query.shape[:2], key.shape[2], device=key.device)
    _worth_kernel[launch.of_keys](
        launch.query, launch.key, norm, window, out, *launch.strides,
        window.stride(0) if len(window) > 1 else 0, *launch.sizes, launch.chunk, launch.factor,
        **launch.switches,
    )  # fmt: skip
    return out


def kept_share(
    query: Tensor, key: Tensor, position: Tensor, death: Tensor, scale: float, window: int
) -> Tensor:
    """Share of the attention of a few queries that lies on keys which are alive to them.

    Args:
        query: [b, h, r, d].
        key: [b, g, k, d].
        position: int32 [r], of the queries among the keys.
        death: int32 [b or 1, heads, k], a key is alive to the positions before it.
        scale: of the logits.
        window: keys that the model itself reads at most, the newest.

    Returns:
        float32 [b, h, r], from 0 to 1.
    """
    launch = _Launch(query, key, scale)
    death = death if death.stride(-1) == 1 else death.contiguous()
    top, total, kept = launch.parts(3)
    _kept_kernel[launch.of_rows](
        launch.query, launch.key, position, death, top, total, kept, *launch.strides,
        death.stride(0) if len(death) > 1 else 0, death.stride(1), *launch.sizes, launch.chunks,
        launch.chunk, query.shape[1] // death.shape[1], window, launch.factor, **launch.switches,
    )  # fmt: skip
    weight = (top - top.amax(2, keepdim=True)).exp2()
    return (kept * weight).sum(2) / (total * weight).sum(2)
