"""Prefill: one program per (query tile, heads that share its list), over the keys of that list.

The naive twin is ``kernels/reference.py``. Keys that every row of the tile sees come first and
need no mask; the boundary is computed under the plan's element rule. Key lists are gathered;
key blocks are read as they lie. Query heads that share a list are stacked into one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call, PlanTensors, cdiv, next_power_of_2


@triton.jit
def _step(
    q, k, v, bias, seen, top, total, acc, factor,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys k, v [n, d] to the running softmax of rows q: their top logit, sum and output."""
    if UPCAST:
        logits = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision=PRECISION)
    else:
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        logits = logits * factor + bias[None, :]
        if MASKED:
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(logits - safe[:, None])
    else:
        if MASKED:
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1) * factor)
        safe = new
        if MASKED:
            safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(logits * factor - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    if UPCAST:
        weights = weights.to(v.dtype).to(tl.float32)
        acc = tl.dot(weights, v.to(tl.float32), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return new, total, acc


@triton.jit
def _log2_bias(bias):
    """A bias in the unit of exp2; finite ones stay finite."""
    scaled = tl.minimum(tl.maximum(bias * 1.4426950408889634, -3.4e38), 3.4e38)
    return tl.where(tl.abs(bias) < float("inf"), scaled, bias)


@triton.jit
def _keys_of(line, columns, start, stop, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Key of each column below ``stop`` of a list of entries of BLOCK keys."""
    if BLOCK % STEP == 0:  # a step lies in one entry
        entry = tl.load(line + start // BLOCK, mask=start < stop, other=0)
        return entry + start % BLOCK + tl.arange(0, STEP)
    if BLOCK == 1:
        return tl.load(line + columns, mask=columns < stop, other=0)
    return tl.load(line + columns // BLOCK, mask=columns < stop, other=0) + columns % BLOCK


@triton.jit
def _words_of(bits, columns, full, count, p, WORDS: tl.constexpr):
    """The word that holds a row's bit, of each row p and boundary key."""
    edge = columns - full
    there = (columns < count) & (edge >= 0)  # a key of the full part is seen by every row
    at = bits + (edge * WORDS)[None, :] + (p // 32)[:, None]
    return tl.load(at, mask=there[None, :], other=-1)


@triton.jit
def _boundary_step(
    q, key, word, listed, k_base, v_base, bias_base, death_base, k_n, v_n,
    position, first, rows, p, d, dv, keys, top, total, acc, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the boundary, under the element rule."""
    if BLOCK > 1:  # what no row reads is not loaded: it may hold NaN
        listed &= (key < keys) & (key < first + rows)
    if RULE == "bits":
        seen = ((word >> (p % 32)[:, None]) & 1) != 0
    else:
        seen = key[None, :] <= position[:, None]
    if RULE == "death":
        dies = tl.load(death_base + key, mask=listed, other=0)
        seen &= position[:, None] < dies[None, :]
        if BLOCK > 1:
            listed &= (dies > first) & (dies > key)
    seen &= listed[None, :]
    bias = 0.0
    if HAS_BIAS:
        bias = _log2_bias(tl.load(bias_base + key, mask=listed, other=0.0).to(tl.float32))
    if WIDE:
        key = key.to(tl.int64)
    there = listed[:, None]
    k = tl.load(k_base + key[:, None] * k_n, mask=there & (d < D)[None, :], other=0.0)
    v = tl.load(v_base + key[:, None] * v_n, mask=there & (dv < DV)[None, :], other=0.0)
    return _step(q, k, v, bias, seen, top, total, acc, factor, HAS_BIAS, True, UPCAST, PRECISION)


@triton.jit
def _prefill_kernel(
    Q, K, V, Bias, Out, Lse, Index, Full, Count, Batch, Row, Rows, Position, Death, Bits, Order,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, death_b, death_h,
    o_b, o_h, o_n, lse_b, lse_h,
    keys, tiles, cap, edge_cap, lists, plan_heads, groups, bias_heads, factor,
    MEMBERS: tl.constexpr, PACK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RULE: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr, ORDERED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    SUBS: tl.constexpr = (MEMBERS + PACK - 1) // PACK
    sub = tl.program_id(0) % SUBS
    work = tl.program_id(0) // SUBS
    tile = tiles - 1 - work % tiles  # late tiles have the longest lists: they start first
    own = work // tiles
    if ORDERED:
        own = tl.load(Order + own)
    batch = tl.load(Batch + tile).to(tl.int64)
    row, rows, first = tl.load(Row + tile), tl.load(Rows + tile), tl.load(Position + tile)
    plan_head = own * plan_heads // lists
    kv = (own * groups // lists).to(tl.int64)
    at = plan_head.to(tl.int64) * tiles + tile
    full, count = tl.load(Full + at) * BLOCK, tl.load(Count + at) * BLOCK
    line = Index + at * cap

    m = tl.arange(0, TILE * PACK)
    p = m % TILE
    head = own * MEMBERS + sub * PACK + m // TILE
    ok = (p < rows) & (sub * PACK + m // TILE < MEMBERS)
    position = first + p
    where = row + p
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    if WIDE:
        where, head = where.to(tl.int64), head.to(tl.int64)
    whole = full // STEP * STEP
    key = _keys_of(line, tl.arange(0, STEP), 0, whole, BLOCK, STEP)
    q_at = Q + batch * q_b + (head.to(tl.int64) * q_h + where * q_n)[:, None] + d[None, :]
    q = tl.load(q_at, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    k_base = K + batch * k_b + kv * k_h + d[None, :]
    v_base = V + batch * v_b + kv * v_h + dv[None, :]
    bias_base = Bias + batch * bias_b + (own * bias_heads // lists).to(tl.int64) * bias_h
    death_base = Death + batch * death_b + plan_head.to(tl.int64) * death_h
    bits_base = Bits + at * edge_cap * WORDS

    top = tl.full([TILE * PACK], float("-inf"), tl.float32)
    total = tl.zeros([TILE * PACK], tl.float32)
    acc = tl.zeros([TILE * PACK, DV_PAD], tl.float32)
    # The boundary comes first: its loads travel together with those of the queries. Under the bit
    # rule it is long, and its keys and words are loaded one step ahead, as below.
    if RULE == "bits":
        columns = whole + tl.arange(0, STEP)
        edge_key = _keys_of(line, columns, whole, count, BLOCK, STEP)
        word = _words_of(bits_base, columns, full, count, p, WORDS)
    for start in tl.range(whole, count, STEP, num_stages=EDGE_STAGES):
        columns = start + tl.arange(0, STEP)
        if RULE == "bits":
            next_key = _keys_of(line, columns + STEP, start + STEP, count, BLOCK, STEP)
            next_word = _words_of(bits_base, columns + STEP, full, count, p, WORDS)
        else:
            edge_key = _keys_of(line, columns, start, count, BLOCK, STEP)
            word = start
        top, total, acc = _boundary_step(
            q, edge_key, word, columns < count, k_base, v_base, bias_base, death_base, k_n, v_n,
            position, first, rows, p, d, dv, keys, top, total, acc, factor,
            D, DV, BLOCK, RULE, HAS_BIAS, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        if RULE == "bits":
            edge_key, word = next_key, next_word
    every = ok[:, None]
    for start in tl.range(0, whole, STEP, num_stages=STAGES):
        # Keys are loaded one step ahead: then the loads of K and V hang on no load of their step.
        ahead = start + STEP
        following = _keys_of(line, ahead + tl.arange(0, STEP), ahead, whole, BLOCK, STEP)
        bias = 0.0
        if HAS_BIAS:
            bias = _log2_bias(tl.load(bias_base + key).to(tl.float32))
        at_key = key[:, None]
        if WIDE:
            at_key = at_key.to(tl.int64)
        if D == D_PAD:
            k = tl.load(k_base + at_key * k_n)
        else:
            k = tl.load(k_base + at_key * k_n, mask=(d < D)[None, :], other=0.0)
        if DV == DV_PAD:
            v = tl.load(v_base + at_key * v_n)
        else:
            v = tl.load(v_base + at_key * v_n, mask=(dv < DV)[None, :], other=0.0)
        top, total, acc = _step(
            q, k, v, bias, every, top, total, acc, factor, HAS_BIAS, False, UPCAST, PRECISION
        )
        key = following
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    o_at = Out + batch * o_b + (head.to(tl.int64) * o_h + where * o_n)[:, None] + dv[None, :]
    tl.store(o_at, acc.to(Out.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
    if HAS_LSE:
        lse = (top + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634
        lse = tl.where(empty, float("-inf"), lse)
        tl.store(Lse + batch * lse_b + head.to(tl.int64) * lse_h + where, lse, mask=ok)


@dataclass(frozen=True)
class Config:
    """How the kernel is compiled.

    Attributes:
        rows: query rows of a program, those of stacked heads counted.
        step: keys of a step.
        warps: warps of a program.
        stages: steps in the load pipeline.
        registers: most registers of a thread, None for as many as it likes. Two programs to a
            multiprocessor hide each other's softmax; that takes 128 of them at 8 warps.
    """

    rows: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


def config_of(dim: int, size: int, tile: int, rule: str) -> Config:
    """What was fastest on an H100 (``docs/performance.md``).

    Args:
        dim: the larger head dim.
        size: bytes of an element.
        tile: rows of a tile.
        rule: the element rule; under "bits" nearly all keys are boundary.
    """
    if size == 4:
        return Config(64, 32, 4, 2) if dim <= 128 else Config(32, 16, 4, 2)
    if dim > 128:
        return Config(64, 32, 4, 2)
    if rule == "bits" and tile <= 64:
        return Config(64, 32, 4, 2, 168)
    return Config(128, 64, 8, 2, 128)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: PlanTensors,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    config: Config | None = None,
) -> None:
    """Attention over the pairs of a plan, written into ``out`` (and ``lse``).

    Args:
        query: [b, h, q, d], any strides whose last is 1.
        key, value: [b, g, k, d] and [b, g, k, dv], likewise.
        bias: [b, 1 or g or h, k] or None.
        plan: lists of 1, g or h heads; tiles of at most 256 rows.
        scale: of the logits.
        out: [b, h, q, dv]; rows of the plan's tiles are overwritten.
        lse: float32 [b, h, q] or None, likewise.
        config: how to compile; measured defaults when None.
    """
    call = Call.of(query, key, value, bias, plan, scale)
    tile = max(next_power_of_2(plan.tile), 16)
    rule = "bits" if plan.bits is not None else "causal" if plan.death is None else "death"
    dim = max(call.sizes["D"], call.sizes["DV"])
    config = config or config_of(dim, query.element_size(), tile, rule)
    pack = max(min(config.rows // tile, next_power_of_2(call.members)), 1)
    step = config.step
    if plan.block > 1 and plan.block % step and next_power_of_2(plan.block) == plan.block:
        step = max(plan.block, 16)
    order = None
    if not plan.even and call.lists > 1:
        work = plan.count.sum(-1, dtype=torch.int32).argsort(descending=True, stable=True)
        times = call.lists // plan.count.shape[0]
        work = work[:, None] * times + torch.arange(times, device=work.device)
        order = work.flatten().int()
    bits = plan.bits
    subs = cdiv(call.members, pack)
    tiles = plan.batch.shape[0]
    _prefill_kernel[(subs * call.lists * tiles,)](
        call.query, call.key, call.value, call.bias, out, out if lse is None else lse,
        plan.index, plan.full, plan.count, plan.batch, plan.row, plan.rows, plan.position,
        call.death, plan.index if bits is None else bits, plan.index if order is None else order,
        *call.strides, *out.stride()[:3], *((0, 0) if lse is None else lse.stride()[:2]),
        key.shape[2], tiles, plan.index.shape[-1], 0 if bits is None else bits.shape[2],
        call.lists, plan.index.shape[0], key.shape[1], call.bias_heads, call.factor,
        MEMBERS=call.members, PACK=pack, TILE=tile, STEP=step, BLOCK=plan.block, RULE=rule,
        WORDS=1 if bits is None else bits.shape[3], HAS_LSE=lse is not None,
        ORDERED=order is not None, WIDE=call.wide(out), STAGES=config.stages,
        EDGE_STAGES=config.stages if rule == "bits" else 1,
        **call.sizes, **call.switches, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
