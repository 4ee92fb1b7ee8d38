"""Backward: gradients of attention over the pairs of a plan, from the saved log-sum-exp.

The naive twin is autograd through ``kernels/reference.py``. Weights are computed again from the
log-sum-exp, so memory follows the tensors. Two kernels: one holds query rows and walks over their
key list, as the forward does; one holds a chunk of a list and walks over the query rows of its
tile. The second is given large tiles, for each of its programs adds its sums to memory once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .call import Call, PlanTensors, cdiv, next_power_of_2
from .prefill import Config as RowConfig
from .prefill import _keys_of, _log2_bias, _words_of


@triton.jit
def _product(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _add_product(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, with a rounded to the type of b as the forward rounds its weights."""
    if UPCAST:
        a = a.to(b.dtype).to(tl.float32)
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def _log2_norm(lse):
    """A log-sum-exp in the unit of exp2; infinity for rows without keys, whose weights are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def _row_step(
    q, slope, k, v, bias, seen, norm, delta, acc, factor,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys k, v [n, d] give the gradient of rows q; ``slope`` is that of their output."""
    logits = _product(q, tl.trans(k), UPCAST, PRECISION) * factor
    if HAS_BIAS:
        logits += bias[None, :]
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    weights = tl.exp2(logits - norm[:, None])
    change = weights * (_product(slope, tl.trans(v), UPCAST, PRECISION) - delta[:, None])
    return _add_product(change, k, acc, UPCAST, PRECISION)


@triton.jit
def _row_kernel(
    Q, K, V, Bias, Out, Slope, Lse, LseSlope, QueryGrad, Delta,
    Index, Full, Count, Batch, Row, Rows, Position, Death, Bits,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, death_b, death_h,
    o_b, o_h, o_n, s_b, s_h, s_n, qg_b, qg_h, qg_n, lse_b, lse_h,
    keys, tiles, cap, edge_cap, lists, plan_heads, groups, bias_heads, factor, scale,
    MEMBERS: tl.constexpr, PACK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    STEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LSE_SLOPE: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of query rows of one tile, and delta: what each row's logits all lose.

    As in prefill, but a tile of many rows is given to PARTS programs.
    """
    SUBS: tl.constexpr = (MEMBERS + PACK - 1) // PACK
    part = tl.program_id(0) % PARTS
    sub = tl.program_id(0) // PARTS % SUBS
    work = tl.program_id(0) // PARTS // SUBS
    tile = tiles - 1 - work % tiles  # late tiles have the longest lists: they start first
    own = work // tiles
    batch = tl.load(Batch + tile).to(tl.int64)
    row, rows, first = tl.load(Row + tile), tl.load(Rows + tile), tl.load(Position + tile)
    plan_head = own * plan_heads // lists
    kv = (own * groups // lists).to(tl.int64)
    at = plan_head.to(tl.int64) * tiles + tile
    full, count = tl.load(Full + at) * BLOCK, tl.load(Count + at) * BLOCK
    line = Index + at * cap

    if part * PART >= rows:
        return
    m = tl.arange(0, PART * PACK)
    p = part * PART + m % PART
    head = own * MEMBERS + sub * PACK + m // PART
    ok = (p < rows) & (sub * PACK + m // PART < MEMBERS)
    position = first + p
    where = row + p
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    head = head.to(tl.int64)
    if WIDE:
        where = where.to(tl.int64)
    whole = full // STEP * STEP
    key = _keys_of(line, tl.arange(0, STEP), 0, whole, BLOCK, STEP)
    there_q, there_v = ok[:, None] & (d < D)[None, :], ok[:, None] & (dv < DV)[None, :]
    q_at = Q + batch * q_b + (head * q_h + where * q_n)[:, None] + d[None, :]
    q = tl.load(q_at, mask=there_q, other=0.0)
    s_at = Slope + batch * s_b + (head * s_h + where * s_n)[:, None] + dv[None, :]
    slope = tl.load(s_at, mask=there_v, other=0.0)
    o_at = Out + batch * o_b + (head * o_h + where * o_n)[:, None] + dv[None, :]
    out = tl.load(o_at, mask=there_v, other=0.0)
    delta = tl.sum(out.to(tl.float32) * slope.to(tl.float32), 1)
    lse_at = batch * lse_b + head * lse_h + where
    norm = _log2_norm(tl.load(Lse + lse_at, mask=ok, other=float("-inf")))
    if HAS_LSE_SLOPE:
        delta -= tl.load(LseSlope + lse_at, mask=ok, other=0.0)
    tl.store(Delta + lse_at, delta, mask=ok)
    k_base = K + batch * k_b + kv * k_h + d[None, :]
    v_base = V + batch * v_b + kv * v_h + dv[None, :]
    bias_base = Bias + batch * bias_b + (own * bias_heads // lists).to(tl.int64) * bias_h
    death_base = Death + batch * death_b + plan_head.to(tl.int64) * death_h
    bits_base = Bits + at * edge_cap * WORDS

    acc = tl.zeros([PART * PACK, D_PAD], tl.float32)
    for start in tl.range(whole, count, STEP, num_stages=EDGE_STAGES):
        columns = start + tl.arange(0, STEP)
        edge_key = _keys_of(line, columns, start, count, BLOCK, STEP)
        listed = columns < count
        if BLOCK > 1:  # what no row reads is not loaded: it may hold NaN
            listed &= (edge_key < keys) & (edge_key < first + rows)
        if RULE == "bits":
            word = _words_of(bits_base, columns, full, count, p, WORDS)
            seen = ((word >> (p % 32)[:, None]) & 1) != 0
        else:
            seen = edge_key[None, :] <= position[:, None]
        if RULE == "death":
            dies = tl.load(death_base + edge_key, mask=listed, other=0)
            seen &= position[:, None] < dies[None, :]
            if BLOCK > 1:
                listed &= (dies > first) & (dies > edge_key)
        seen &= listed[None, :]
        bias = 0.0
        if HAS_BIAS:
            edge_bias = tl.load(bias_base + edge_key, mask=listed, other=0.0)
            bias = _log2_bias(edge_bias.to(tl.float32))
        at_key = edge_key[:, None]
        if WIDE:
            at_key = at_key.to(tl.int64)
        there = listed[:, None]
        k = tl.load(k_base + at_key * k_n, mask=there & (d < D)[None, :], other=0.0)
        v = tl.load(v_base + at_key * v_n, mask=there & (dv < DV)[None, :], other=0.0)
        acc = _row_step(
            q, slope, k, v, bias, seen, norm, delta, acc, factor, HAS_BIAS, True, UPCAST,
            PRECISION,
        )  # fmt: skip
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
        acc = _row_step(
            q, slope, k, v, bias, ok[:, None], norm, delta, acc, factor, HAS_BIAS, False, UPCAST,
            PRECISION,
        )  # fmt: skip
        key = following
    qg_at = QueryGrad + batch * qg_b + (head * qg_h + where * qg_n)[:, None] + d[None, :]
    tl.store(qg_at, (acc * scale).to(QueryGrad.dtype.element_ty), mask=there_q)


@triton.jit
def _key_steps(
    k, v, bias, key, dies, listed, edge, word_line, q_base, s_base, lse_base, delta_base,
    q_h, q_n, s_h, s_n, lse_h, row, first, low, high, begin, stop, steps, d, dv, factor,
    key_acc, value_acc, bias_acc,
    STEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, RULE: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add what steps [begin, stop) of query rows give the gradients of keys k, v [n, d].

    ``steps`` of them make up one query head, then the next one's follow.
    """
    for turn in tl.range(begin, stop, num_stages=STAGES):
        member = (turn // steps).to(tl.int64)
        position = low + turn % steps * STEP + tl.arange(0, STEP)
        ok = position < high  # rows past the end weigh nothing: their norm is infinite
        where = row + position - first
        if WIDE:
            where = where.to(tl.int64)
        there_q, there_s = ok[:, None], ok[:, None]
        if D != D_PAD:
            there_q &= (d < D)[None, :]
        if DV != DV_PAD:
            there_s &= (dv < DV)[None, :]
        q_at = q_base + member * q_h + (where * q_n)[:, None] + d[None, :]
        q = tl.load(q_at, mask=there_q, other=0.0)
        s_at = s_base + member * s_h + (where * s_n)[:, None] + dv[None, :]
        slope = tl.load(s_at, mask=there_s, other=0.0)
        lse = tl.load(lse_base + member * lse_h + where, mask=ok, other=float("-inf"))
        delta = tl.load(delta_base + member * lse_h + where, mask=ok, other=0.0)
        logits = _product(k, tl.trans(q), UPCAST, PRECISION) * factor
        if HAS_BIAS:
            logits += bias[:, None]
        if MASKED:
            if RULE == "bits":
                p = position - first
                at = word_line[:, None] + (p // 32)[None, :]
                boundary = listed & (edge >= 0)  # a key of the full part is seen by every row
                word = tl.load(at, mask=boundary[:, None] & ok[None, :], other=-1)
                seen = ((word >> (p % 32)[None, :]) & 1) != 0
            else:
                seen = key[:, None] <= position[None, :]
            if RULE == "death":
                seen &= position[None, :] < dies[:, None]
            seen &= listed[:, None]
            logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(logits - _log2_norm(lse)[None, :])
        value_acc = _add_product(weights, slope, value_acc, UPCAST, PRECISION)
        change = _product(v, tl.trans(slope), UPCAST, PRECISION) - delta[None, :]
        change = weights * change
        key_acc = _add_product(change, q, key_acc, UPCAST, PRECISION)
        if HAS_BIAS:
            bias_acc += tl.sum(change, 1)
    return key_acc, value_acc, bias_acc


@triton.jit
def _add_to(at, value, mask, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, tl.load(at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _key_kernel(
    Q, K, V, Bias, Slope, Lse, Delta, KeyGrad, ValueGrad, BiasGrad,
    Index, Full, Count, Batch, Row, Rows, Position, Death, Bits,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, death_b, death_h,
    s_b, s_h, s_n, lse_b, lse_h,
    keys, tiles, cap, edge_cap, lists, plan_heads, groups, bias_heads, factor, scale,
    chunks, tile_first, tile_stride, owns, own_first, own_stride,
    MEMBERS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RULE: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of a tile's list, added to those of the other tiles."""
    chunk, work = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    own = own_first + work % owns * own_stride
    tile = tile_first + work // owns * tile_stride
    plan_head = own * plan_heads // lists
    at = plan_head.to(tl.int64) * tiles + tile
    full, count = tl.load(Full + at) * BLOCK, tl.load(Count + at) * BLOCK
    start = chunk * CHUNK
    if start >= count:
        return
    batch = tl.load(Batch + tile).to(tl.int64)
    row, rows, first = tl.load(Row + tile), tl.load(Rows + tile), tl.load(Position + tile)
    kv = (own * groups // lists).to(tl.int64)
    columns = start + tl.arange(0, CHUNK)
    listed = columns < count
    key = tl.load(Index + at * cap + columns // BLOCK, mask=listed, other=0) + columns % BLOCK
    if BLOCK > 1:  # what no row reads is not loaded: it may hold NaN
        listed &= (key < keys) & (key < first + rows)
    dies = key
    low, high = first, first + rows
    if RULE == "death":
        death_base = Death + batch * death_b + plan_head.to(tl.int64) * death_h
        dies = tl.load(death_base + key, mask=listed, other=0)
        listed &= (dies > first) & (dies > key)
        high = tl.minimum(high, tl.max(tl.where(listed, dies, 0), 0))
    if RULE != "bits":  # rows that see a key of this chunk
        low = tl.maximum(low, tl.min(tl.where(listed, key, 2147483647), 0))
    if low >= high:  # no row: `turn // steps` below, which loads may be issued ahead of, is sound
        return
    at_key = key.to(tl.int64) if WIDE else key
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    there_k, there_v = listed[:, None] & (d < D)[None, :], listed[:, None] & (dv < DV)[None, :]
    k_at = K + batch * k_b + kv * k_h + (at_key * k_n)[:, None] + d[None, :]
    k = tl.load(k_at, mask=there_k, other=0.0)
    v_at = V + batch * v_b + kv * v_h + (at_key * v_n)[:, None] + dv[None, :]
    v = tl.load(v_at, mask=there_v, other=0.0)
    bias = tl.zeros([CHUNK], tl.float32)
    if HAS_BIAS:
        bias_base = Bias + batch * bias_b + (own * bias_heads // lists).to(tl.int64) * bias_h
        bias = _log2_bias(tl.load(bias_base + key, mask=listed, other=0.0).to(tl.float32))
    edge = columns - full
    word_line = Bits + (at * edge_cap + tl.maximum(edge, 0)) * WORDS
    head = (own * MEMBERS).to(tl.int64)
    q_base = Q + batch * q_b + head * q_h
    s_base = Slope + batch * s_b + head * s_h
    lse_at = batch * lse_b + head * lse_h

    key_acc = tl.zeros([CHUNK, D_PAD], tl.float32)
    value_acc = tl.zeros([CHUNK, DV_PAD], tl.float32)
    bias_acc = tl.zeros([CHUNK], tl.float32)
    steps = tl.cdiv(high - low, STEP)
    turns = steps * MEMBERS
    masked = tl.where(start + CHUNK > full, turns, 0)  # all of them, or none
    key_acc, value_acc, bias_acc = _key_steps(
        k, v, bias, key, dies, listed, edge, word_line, q_base, s_base, Lse + lse_at,
        Delta + lse_at, q_h, q_n, s_h, s_n, lse_h, row, first, low, high, 0, masked, steps, d, dv,
        factor, key_acc, value_acc, bias_acc,
        STEP, D, DV, D_PAD, DV_PAD, RULE, WORDS, HAS_BIAS, True, WIDE, UPCAST, PRECISION, STAGES,
    )  # fmt: skip
    key_acc, value_acc, bias_acc = _key_steps(
        k, v, bias, key, dies, listed, edge, word_line, q_base, s_base, Lse + lse_at,
        Delta + lse_at, q_h, q_n, s_h, s_n, lse_h, row, first, low, high, masked, turns, steps, d,
        dv, factor, key_acc, value_acc, bias_acc,
        STEP, D, DV, D_PAD, DV_PAD, RULE, WORDS, HAS_BIAS, False, WIDE, UPCAST, PRECISION, STAGES,
    )  # fmt: skip
    line = (batch * groups + kv) * keys
    key_at = KeyGrad + line * D + (at_key * D)[:, None] + d[None, :]
    _add_to(key_at, key_acc * scale, there_k, ATOMIC)
    value_at = ValueGrad + line * DV + (at_key * DV)[:, None] + dv[None, :]
    _add_to(value_at, value_acc, there_v, ATOMIC)
    if HAS_BIAS:
        _add_to(BiasGrad + (batch * lists + own) * keys + key, bias_acc, listed, ATOMIC)


@dataclass(frozen=True)
class KeyConfig:
    """How the kernel that holds keys is compiled.

    Attributes:
        chunk: keys of a program.
        step: query rows of a step.
        warps: warps of a program.
        stages: steps in the load pipeline.
        registers: most registers of a thread, None for as many as it likes.
    """

    chunk: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


def row_config_of(dim: int, size: int, rows: int) -> RowConfig:
    """How to compile the kernel that holds rows, as measured (``benchmarks/tune_backward.py``).

    Args:
        dim: the larger head dim.
        size: bytes of an element.
        rows: of all heads that share a tile's list.
    """
    if size == 4:
        return RowConfig(32, 32, 4, 1) if dim <= 128 else RowConfig(16, 16, 4, 1)
    if dim > 128:
        return RowConfig(64, 32, 8, 2)
    return RowConfig(64, 64, 4, 2) if rows < 128 else RowConfig(128, 32, 8, 3, 128)


def key_config_of(dim: int, size: int, bias: bool) -> KeyConfig:
    """The same for the kernel that holds keys: the sums of a bias's gradient take registers."""
    if size == 4:
        return KeyConfig(32, 32, 4, 1) if dim <= 128 else KeyConfig(16, 16, 4, 1)
    if dim > 128:
        return KeyConfig(64, 32, 8, 2)
    return KeyConfig(64, 64, 4, 1 if bias else 2)


def _switches(plan: PlanTensors, call: Call) -> dict[str, object]:
    """Compile-time facts of a plan and a call.

    Products of float32 are three of the matrix units': as plain ones they spill hundreds of
    registers.
    """
    rule = "bits" if plan.bits is not None else "causal" if plan.death is None else "death"
    words = 1 if plan.bits is None else plan.bits.shape[3]
    switches = {**call.sizes, **call.switches, "BLOCK": plan.block, "RULE": rule, "WORDS": words}
    if call.query.element_size() == 4:
        switches["PRECISION"] = "tf32x3"
    return switches


def _lists(plan: PlanTensors, call: Call) -> tuple[Tensor, ...]:
    """The tensors of a plan, in the kernels' order."""
    bits = plan.index if plan.bits is None else plan.bits
    return (
        plan.index, plan.full, plan.count, plan.batch, plan.row, plan.rows, plan.position,
        call.death, bits,
    )  # fmt: skip


def _sizes(plan: PlanTensors, call: Call) -> tuple[int | float, ...]:
    """Numbers that follow from a plan and a call, in the kernels' order."""
    return (
        call.key.shape[2], plan.batch.shape[0], plan.index.shape[-1],
        0 if plan.bits is None else plan.bits.shape[2], call.lists, plan.index.shape[0],
        call.key.shape[1], call.bias_heads, call.factor,
    )  # fmt: skip


def rows_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: PlanTensors,
    scale: float,
    out: Tensor,
    out_grad: Tensor,
    lse: Tensor,
    lse_grad: Tensor | None,
    query_grad: Tensor,
    delta: Tensor,
    config: RowConfig | None = None,
) -> None:
    """Gradient of the query rows of a plan, written into ``query_grad``.

    Args:
        query, key, value, bias, plan, scale: as in the forward; tiles of at most 256 rows.
        out, lse: its results, [b, h, q, dv] and float32 [b, h, q], ``lse`` contiguous.
        out_grad, lse_grad: their gradients; ``lse_grad`` contiguous float32 or None.
        query_grad: [b, h, q, d]; rows of the plan's tiles are overwritten.
        delta: contiguous float32 [b, h, q], likewise: sum of ``out * out_grad`` less
            ``lse_grad``, which :func:`keys_backward` needs.
        config: how to compile; defaults when None.
    """
    call = Call.of(query, key, value, bias, plan, scale)
    tile = max(next_power_of_2(plan.tile), 16)
    switches = _switches(plan, call)
    dim = max(call.sizes["D"], call.sizes["DV"])
    config = config or row_config_of(dim, query.element_size(), tile * call.members)
    part = min(tile, config.rows)
    pack = min(config.rows // part, next_power_of_2(call.members))
    stages = config.stages
    wide = any(call.wide(x) for x in (out, out_grad, query_grad))
    _row_kernel[(tile // part * cdiv(call.members, pack) * call.lists * plan.batch.shape[0],)](
        call.query, call.key, call.value, call.bias, out, out_grad, lse,
        lse if lse_grad is None else lse_grad, query_grad, delta, *_lists(plan, call),
        *call.strides, *out.stride()[:3], *out_grad.stride()[:3], *query_grad.stride()[:3],
        *lse.stride()[:2], *_sizes(plan, call), scale,
        MEMBERS=call.members, PACK=pack, PARTS=tile // part, PART=part, STEP=config.step,
        HAS_LSE_SLOPE=lse_grad is not None, WIDE=wide, STAGES=stages,
        EDGE_STAGES=stages if switches["RULE"] == "bits" else 1,
        **switches, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip


def keys_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: PlanTensors,
    scale: float,
    out_grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
    bias_grad: Tensor | None,
    launches: int = 0,
    config: KeyConfig | None = None,
) -> None:
    """Add the gradients of the keys of a plan to ``key_grad``, ``value_grad``, ``bias_grad``.

    Args:
        query, key, value, bias, plan, scale, out_grad, lse: as in :func:`rows_backward`; tiles of
            any number of rows.
        delta: what it wrote, for every row of this plan.
        key_grad: contiguous float32 [b, g, k, d].
        value_grad: contiguous float32 [b, g, k, dv].
        bias_grad: contiguous float32 [b, lists, k], a bias being given; ``lists`` is the largest
            of the heads of key, plan and bias.
        launches: 0 adds in any order. Else the tiles are given to so many launches, every
            ``launches``-th to the same, which must share no key; sums are then the same bits every
            time.
        config: how to compile; defaults when None.
    """
    call = Call.of(query, key, value, bias, plan, scale)
    dim = max(call.sizes["D"], call.sizes["DV"])
    config = config or key_config_of(dim, query.element_size(), bias is not None)
    tiles, groups = plan.batch.shape[0], key.shape[1]
    chunks = cdiv(plan.index.shape[-1] * plan.block, config.chunk)
    if not chunks:
        return
    wide = any(call.wide(x) for x in (out_grad, key_grad, value_grad))
    sharing = call.lists // groups if launches else 1  # lists whose keys are the same kv head's
    owns = call.lists // sharing
    # late tiles have the longest lists: they start first
    parts = [(first, launches) for first in range(launches)] if launches else [(tiles - 1, -1)]
    for tile_first, stride in parts:
        for own_first in range(sharing):
            _key_kernel[(chunks * owns * (tiles // max(stride, 1)),)](
                call.query, call.key, call.value, call.bias, out_grad, lse, delta, key_grad,
                value_grad, key_grad if bias_grad is None else bias_grad, *_lists(plan, call),
                *call.strides, *out_grad.stride()[:3], *lse.stride()[:2], *_sizes(plan, call),
                call.factor / math.log2(math.e), chunks, tile_first, stride, owns, own_first,
                sharing,
                MEMBERS=call.members, CHUNK=config.chunk, STEP=config.step, WIDE=wide,
                STAGES=config.stages, ATOMIC=not launches, **_switches(plan, call),
                num_warps=config.warps, maxnreg=config.registers,
            )  # fmt: skip
