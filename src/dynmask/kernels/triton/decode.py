"""Decoding: one query row a tile; its list is split over programs, whose results are merged.

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
def _split_kernel(
    Q, K, V, Bias, PartOut, PartTop, PartSum, Index, Count, Batch, Row, Position, Death,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, death_b, death_h,
    keys, tiles, cap, lists, plan_heads, groups, bias_heads, factor,
    MEMBERS: tl.constexpr, PACK: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one row over one part of its list."""
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
    part = ((tile.to(tl.int64) * lists + own) * MEMBERS + member) * SPLITS + split
    tl.store(PartTop + part, top, mask=ok)
    tl.store(PartSum + part, total, mask=ok)
    out_at = PartOut + part[:, None] * DV + dv[None, :]
    tl.store(out_at, acc, mask=ok[:, None] & (dv < DV)[None, :])


@triton.jit
def _merge_kernel(
    PartOut, PartTop, PartSum, Out, Lse, Batch, Row, o_b, o_h, o_n, lse_b, lse_h, heads,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row and head."""
    work = tl.program_id(0)
    tile, head = work // heads, (work % heads).to(tl.int64)
    batch, row = tl.load(Batch + tile).to(tl.int64), tl.load(Row + tile).to(tl.int64)
    split, dv = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    at = work.to(tl.int64) * SPLITS + split
    top = tl.load(PartTop + at, mask=split < SPLITS, other=float("-inf"))
    total = tl.load(PartSum + at, mask=split < SPLITS, other=0.0)
    best = tl.max(top, 0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp2(top - safe)
    total = tl.sum(total * weight, 0)
    part = tl.load(
        PartOut + at[:, None] * DV + dv[None, :],
        mask=(split < SPLITS)[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    empty = total == 0.0
    out = tl.sum(part * weight[:, None], 0) / tl.where(empty, 1.0, total)
    out_at = Out + batch * o_b + head * o_h + row * o_n + dv
    tl.store(out_at, out.to(Out.dtype.element_ty), mask=dv < DV)
    if HAS_LSE:
        lse = (safe + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634
        lse = tl.where(empty, float("-inf"), lse)
        tl.store(Lse + batch * lse_b + head * lse_h + row, lse)


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
    step: int = 64,
    warps: int = 4,
    stages: int = 4,
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
    shape = (tiles, call.lists * call.members, splits)
    parts = torch.empty(*shape, value.shape[-1], dtype=torch.float32, device=query.device)
    tops, sums = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    _split_kernel[(tiles * call.lists * subs, splits)](
        call.query, call.key, call.value, call.bias, parts, tops, sums,
        plan.index, plan.count, plan.batch, plan.row, plan.position, call.death,
        *call.strides, key.shape[2], tiles, plan.index.shape[-1],
        call.lists, plan.index.shape[0], key.shape[1], call.bias_heads, call.factor,
        MEMBERS=call.members, PACK=pack, STEP=step, SPLITS=splits, BLOCK=plan.block,
        RULE="causal" if plan.death is None else "death", STAGES=stages,
        **call.sizes, **call.switches, num_warps=warps,
    )  # fmt: skip
    _merge_kernel[(tiles * call.lists * call.members,)](
        parts, tops, sums, out, out if lse is None else lse, plan.batch, plan.row,
        *out.stride()[:3], *((0, 0) if lse is None else lse.stride()[:2]),
        call.lists * call.members, SPLITS=splits, SPLITS_PAD=next_power_of_2(splits),
        DV=call.sizes["DV"], DV_PAD=call.sizes["DV_PAD"], HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
