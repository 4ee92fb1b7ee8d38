"""Tensors and masks of the GPU cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_cases import GpuCase
from dynmask import BlockMask, LifetimeMask, Mask, Plan, StructuralMask

BLOCK = 128
"""Rows and keys of a block of the "block" case."""

PLANS = 8
"""Plans that decoding goes through in turn: together they are too large for the GPU's cache."""


@dataclass
class Inputs:
    """A case's tensors, the same for every variant.

    ``given`` is what the mask is made from inside our time: scores, a table of chosen blocks, or
    (diagonals, verticals).
    """

    case: GpuCase
    query: Tensor
    key: Tensor
    value: Tensor
    given: tuple[Tensor, ...] = ()
    most: int = 0
    plans: tuple[Plan, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def times(self) -> int:
        """Query heads of one kv head."""
        return self.case.heads // self.case.groups


def inputs(case: GpuCase, device: torch.device, seed: int = 0) -> Inputs:
    """Random tensors of a case, made where they are used."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        shape = (case.batch, heads, rows, case.dim)
        return torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16)

    data = Inputs(
        case,
        normal(case.heads, case.queries),
        normal(case.groups, case.keys),
        normal(case.groups, case.keys),
    )
    if case.mask == "top_w":
        shape = (1, case.groups, case.keys)
        data.given = (torch.randn(shape, generator=g, device=device),)
    elif case.mask == "block":
        data.given = (_chosen(case, device, g),)
        # a policy that chooses a number of blocks knows this bound; here the table is random
        data.most = int(data.given[0].sum(-1).max()) + 1
    elif case.mask == "structural":
        data.given = _patterns(case, device, g)
    elif case.mask == "decode":
        data.plans = tuple(_decode_plan(case, device, g) for _ in range(PLANS))
    return data


def mask_of(data: Inputs) -> Mask:
    """The case's mask from what is given; for "top_w" this is the selection."""
    case = data.case
    if case.mask == "top_w":
        return LifetimeMask.top_w(data.given[0], case.width, check=False)
    if case.mask == "streaming":
        return LifetimeMask.streaming(case.keys, case.sinks, case.width, device=data.device)
    if case.mask == "block":
        return BlockMask.from_scores(data.given[0], BLOCK, BLOCK, case.keys, most=data.most)
    if case.mask == "structural":
        bands = 8 if case.layout == "bands" else None  # a card's policy counts them once
        return StructuralMask(*data.given, keys=case.keys, bands=bands, checked=True)
    return LifetimeMask.causal(case.keys, case.queries, device=data.device)


def _chosen(case: GpuCase, device: torch.device, g: torch.Generator) -> Tensor:
    """bool [1, heads, blocks, blocks]: random blocks strictly in the past, and the own one."""
    blocks = -(-case.keys // BLOCK)
    table = torch.rand(1, case.heads, blocks, blocks, generator=g, device=device) < case.density
    own = torch.eye(blocks, dtype=torch.bool, device=device)
    return table.tril(-1) | own


def _patterns(case: GpuCase, device: torch.device, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ascending int32 [1, heads, n]: offsets of diagonals, positions of verticals."""
    wide = 8 if case.layout == "bands" else 1
    places = -(-case.diagonals // wide)
    start = _distinct(case.heads, places, case.keys // wide, device, g) * wide
    diagonals = (start[..., None] + torch.arange(wide, device=device)).flatten(-2)
    verticals = _distinct(case.heads, case.verticals, case.keys, device, g)
    return diagonals[None].int(), verticals[None].int()


def _distinct(rows: int, n: int, limit: int, device: torch.device, g: torch.Generator) -> Tensor:
    """``n`` different whole numbers below ``limit`` for each row, ascending: int64 [rows, n]."""
    chance = torch.rand(rows, limit, generator=g, device=device)
    return chance.topk(n, dim=-1).indices.sort(-1).values


def _decode_plan(case: GpuCase, device: torch.device, g: torch.Generator) -> Plan:
    """Random kept keys for one query of every batch row, as a plan with tiles of one row."""
    keys = _distinct(case.batch * case.groups, case.width, case.keys, device, g).int()
    index = keys.view(case.batch, case.groups, case.width).transpose(0, 1).contiguous()
    count = torch.full(index.shape[:2], case.width, dtype=torch.int32, device=device)
    row = torch.zeros(case.batch, dtype=torch.int32, device=device)
    return Plan(
        batch=torch.arange(case.batch, dtype=torch.int32, device=device),
        row=row,
        rows=row + 1,
        position=row + case.keys - 1,
        index=index,
        full=count,
        count=count,
        tile=1,
        shape=(case.batch, 1, case.keys),
        even=True,
    )


def decode_mask(data: Inputs) -> Callable[[], Plan]:
    """What makes a plan for decoding from lifetimes, as a running top w leaves them."""
    case = data.case
    g = torch.Generator(data.device).manual_seed(1)
    shape = (case.batch, case.groups, case.keys)
    scores = torch.randn(shape, generator=g, device=data.device)
    mask = LifetimeMask.top_w(scores, case.width, queries=1, check=False)
    fused = data.device.type == "cuda"
    return lambda: mask.lower(fused=fused)
