"""Decoding: one query row a tile; its list is split over programs, the last of which merges.

The naive twin is ``kernels/reference.py``. Query heads that share a list are stacked, so a kept
key is read once for all of them. The grid depends on the capacity of the lists alone and their
lengths are read on the device: lists may change from step to step, inside a CUDA graph too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call, PlanTensors, cdiv, next_power_of_2
from .prefill import _keys_of, _log2_bias, _step

PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H200's 132 multiprocessors."""


@triton.jit
def _decode_kernel(
    Q, K, V, Bias, Out, Lse, PartOut, PartTop, PartSum, Done,
    Index, Count, Batch, Row, Position, Death,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, death_b, death_h,
    o_b, o_h, o_n, lse_b, lse_h,
    keys, tiles, cap, lists, plan_heads, groups, bias_heads, factor,
    MEMBERS: tl.constexpr, PACK: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one row over one part of its list; whoever is done last merges the parts."""
    SUBS: tl.constexpr = (MEMBERS + PACK - 1) // PACK
    work, split = tl.program_id(0), tl.program_id(1)
    sub, own, tile = work % SUBS, work // SUBS % lists, work // SUBS // lists
    batch = tl.load(Batch + tile).to(tl.int64)
    row, position = tl.load(Row + tile).to(tl.int64), tl.load(Position + tile)
    plan_head = own * plan_heads // lists
    kv = (own * groups // lists).to(tl.int64)
    at = plan_head.to(tl.int64) * tiles + tile
    count = tl.load(Count + at) * BLOCK
    share = tl.cdiv(tl.cdiv(count, SPLITS), STEP) * STEP
    begin = split * share
    stop = tl.minimum(begin + share, count)
    line = Index + at * cap

    m = tl.arange(0, PACK)
    member = sub * PACK + m
    ok = member < MEMBERS
    head = (own * MEMBERS + member).to(tl.int64)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q_at = Q + batch * q_b + row * q_n + (head * q_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    k_base = K + batch * k_b + kv * k_h + d[None, :]
    v_base = V + batch * v_b + kv * v_h + dv[None, :]
    bias_base = Bias + batch * bias_b + (own * bias_heads // lists).to(tl.int64) * bias_h
    death_base = Death + batch * death_b + plan_head.to(tl.int64) * death_h
    top = tl.full([PACK], float("-inf"), tl.float32)
    total = tl.zeros([PACK], tl.float32)
    acc = tl.zeros([PACK, DV_PAD], tl.float32)
    for start in tl.range(begin, stop, STEP, num_stages=STAGES):
        columns = start + tl.arange(0, STEP)
        listed = columns < stop
        key = _keys_of(line, columns, start, stop, BLOCK, STEP)
        if BLOCK > 1:  # single keys are listed because the row sees them
            listed &= (key < keys) & (key <= position)
            if RULE == "death":
                dies = tl.load(death_base + key, mask=listed, other=0)
                listed &= position < dies
        bias = 0.0
        if HAS_BIAS:
            bias = _log2_bias(tl.load(bias_base + key, mask=listed, other=0.0).to(tl.float32))
        key = key.to(tl.int64)
        there = listed[:, None]
        k = tl.load(k_base + key[:, None] * k_n, mask=there & (d < D)[None, :], other=0.0)
        v = tl.load(v_base + key[:, None] * v_n, mask=there & (dv < DV)[None, :], other=0.0)
        top, total, acc = _step(
            q, k, v, bias, listed[None, :], top, total, acc, factor, HAS_BIAS, True, UPCAST,
            PRECISION,
        )  # fmt: skip
    if SPLITS > 1:
        # parts of one program lie together: [work, split, PACK]
        part = (work.to(tl.int64) * SPLITS + split) * PACK + m
        tl.store(PartTop + part, top, mask=ok)
        tl.store(PartSum + part, total, mask=ok)
        there = ok[:, None] & (dv < DV)[None, :]
        tl.store(PartOut + part[:, None] * DV + dv[None, :], acc, mask=there)
        tl.debug_barrier()  # all of them are written before it is said
        last = tl.atomic_add(Done + work, 1, sem="acq_rel") == SPLITS - 1
        if last:
            top = tl.full([PACK], float("-inf"), tl.float32)
            total = tl.zeros([PACK], tl.float32)
            acc = tl.zeros([PACK, DV_PAD], tl.float32)
            part = work.to(tl.int64) * SPLITS * PACK + m
            if SPLITS <= 8:  # unrolled, their loads travel together
                for other in tl.static_range(SPLITS):
                    top, total, acc = _add_part(
                        PartOut, PartTop, PartSum, part + other * PACK, ok, dv, top, total, acc, DV
                    )
            else:
                for other in range(SPLITS):
                    top, total, acc = _add_part(
                        PartOut, PartTop, PartSum, part + other * PACK, ok, dv, top, total, acc, DV
                    )
            _finish(
                Out, Lse, batch, head, row, ok, dv, top, total, acc, o_b, o_h, o_n, lse_b, lse_h,
                DV, HAS_LSE,
            )  # fmt: skip
    else:
        _finish(
            Out, Lse, batch, head, row, ok, dv, top, total, acc, o_b, o_h, o_n, lse_b, lse_h,
            DV, HAS_LSE,
        )  # fmt: skip


@triton.jit
def _add_part(PartOut, PartTop, PartSum, part, ok, dv, top, total, acc, DV: tl.constexpr):
    """Merge one more part into a running softmax.

    Parts come from other multiprocessors, and this one's cache may hold older values: hence .cg.
    """
    top_of = tl.load(PartTop + part, mask=ok, other=float("-inf"), cache_modifier=".cg")
    sum_of = tl.load(PartSum + part, mask=ok, other=0.0, cache_modifier=".cg")
    out_at = PartOut + part[:, None] * DV + dv[None, :]
    there = ok[:, None] & (dv < DV)[None, :]
    acc_of = tl.load(out_at, mask=there, other=0.0, cache_modifier=".cg")
    new = tl.maximum(top, top_of)
    safe = tl.where(new == float("-inf"), 0.0, new)
    fade, weight = tl.exp2(top - safe), tl.exp2(top_of - safe)
    acc = acc * fade[:, None] + acc_of * weight[:, None]
    return new, total * fade + sum_of * weight, acc


@triton.jit
def _finish(
    Out, Lse, batch, head, row, ok, dv, top, total, acc, o_b, o_h, o_n, lse_b, lse_h,
    DV: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Write the output and the log-sum-exp of one row's heads."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = acc / total[:, None]
    out_at = Out + batch * o_b + (head * o_h)[:, None] + row * o_n + dv[None, :]
    tl.store(out_at, out.to(Out.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
    if HAS_LSE:
        lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) / 1.4426950408889634)
        tl.store(Lse + batch * lse_b + head * lse_h + row, lse, mask=ok)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: PlanTensors,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    splits: int | None = None,
    step: int = 32,
    warps: int = 4,
    stages: int = 6,
) -> None:
    """Attention of single rows over the keys of a plan with tiles of one row.

    Arguments as in :func:`dynmask.kernels.triton.prefill.prefill`; ``splits`` is the number of
    programs that share a list, chosen from the lists' capacity when None.
    """
    call = Call.of(query, key, value, bias, plan, scale)
    tiles, cap = plan.batch.shape[0], plan.index.shape[-1] * plan.block
    pack = min(max(next_power_of_2(call.members), 16), 64)
    subs = cdiv(call.members, pack)
    if query.element_size() == 4 or max(call.sizes["D"], call.sizes["DV"]) > 128:
        step, stages = min(step, 32), min(stages, 2)
    if plan.block > 1 and plan.block % step and next_power_of_2(plan.block) == plan.block:
        step = max(plan.block, 16)
    if splits is None:
        most = PROGRAMS // (tiles * call.lists * subs)
        splits = max(min(most, cdiv(cap, step), 128), 1)
    work = tiles * call.lists * subs
    rows = work * splits * pack if splits > 1 else 0
    parts, tops, sums = (
        torch.empty(n, dtype=torch.float32, device=query.device)
        for n in (rows * value.shape[-1], rows, rows)
    )
    done = torch.zeros(work if splits > 1 else 0, dtype=torch.int32, device=query.device)
    _decode_kernel[(work, splits)](
        call.query, call.key, call.value, call.bias, out, out if lse is None else lse,
        parts, tops, sums, done,
        plan.index, plan.count, plan.batch, plan.row, plan.position, call.death,
        *call.strides, *out.stride()[:3], *((0, 0) if lse is None else lse.stride()[:2]),
        key.shape[2], tiles, plan.index.shape[-1],
        call.lists, plan.index.shape[0], key.shape[1], call.bias_heads, call.factor,
        MEMBERS=call.members, PACK=pack, STEP=step, SPLITS=splits, BLOCK=plan.block,
        RULE="causal" if plan.death is None else "death", HAS_LSE=lse is not None, STAGES=stages,
        **call.sizes, **call.switches, num_warps=warps,
    )  # fmt: skip
