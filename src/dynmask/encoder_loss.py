"""What an encoder of blocks learns from: what losing a key block does to the output of a head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .block_grid import BlockGrid
from .encoder import BlockEncoder
from .masks.base import check_whole
from .retention import LATE_ROWS, at_least_float32, draw_rows
from .summary import NUMBERS_AT_A_TIME, in_blocks


def block_effects(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    query_blocks: Tensor,
    scale: float | None = None,
    *,
    first_key: int = 0,
) -> tuple[Tensor, Tensor]:
    """What losing a key block does to a head's output, and how much attention the block gets.

    For row i and key block j the effect is ``p_ij |v_ij - o_i|``: the row's attention to the block
    times the distance of what the block adds on average from the row's output. (Without the block
    the output moves by ``1 / (1 - p_ij)`` times that.) Mass on
    values like the output is worth nothing. Rows of a block are averaged.

    Args:
        query: [b, h, q, d], the last q positions of the keys, rotated.
        key, value: [b, g, k, d].
        block: positions in a block, of queries and of keys.
        query_blocks: int64 [n], counted from the block of the first query.
        scale: of the logits, ``d ** -0.5`` when None.
        first_key: position of the first key.

    Returns:
        Effects and masses, float32 (float64 for float64 queries), both
        [b, h, n, key blocks]; 0 in the future. No gradient. Memory beside them is O(keys).
    """
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [b, g, k, d] like key {tuple(key.shape)}, received "
            f"{tuple(value.shape)}"
        )
    effects, masses = _block_maps(query, key, value, block, query_blocks, scale, first_key)
    return effects, masses


def block_masses(
    query: Tensor,
    key: Tensor,
    block: int,
    query_blocks: Tensor,
    scale: float | None = None,
    *,
    first_key: int = 0,
) -> Tensor:
    """How much attention each key block gets, the masses of :func:`block_effects` alone."""
    return _block_maps(query, key, None, block, query_blocks, scale, first_key)[0]


def _block_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block: int,
    query_blocks: Tensor,
    scale: float | None,
    first_key: int,
) -> list[Tensor]:
    """Effects, where there are values, and masses: [b, h, n, key blocks] each."""
    grid = BlockGrid.of(query, key, block, first_key, block)
    (batch, heads, queries, dim), groups = query.shape, key.shape[1]
    members = heads // groups
    factor = dim**-0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        position = grid.rows(query_blocks)  # [n, block], some before the first or after the last
        held = (position >= grid.start) & (position < grid.stop)
        row = (position - grid.start).clamp(0, queries - 1)
        share = held / held.sum(-1, keepdim=True)
        query = query.view(batch, groups, members, queries, dim)
        shape = batch, groups, members, len(row), grid.key_blocks
        wide = torch.promote_types(query.dtype, torch.float32)
        count = 1 if value is None else 2
        totals = [torch.zeros(shape, dtype=wide, device=query.device) for _ in range(count)]
        padded = grid.key_blocks * block
        # a row has its logits, and what each block adds to its output
        most = batch * padded * max(1, 0 if value is None else -(-value.shape[-1] // block))
        step = max(1, NUMBERS_AT_A_TIME // (most * members))
        for g in range(groups):
            k = in_blocks(at_least_float32(key[:, g : g + 1]), first_key, block).flatten(2, 3)
            v = (
                None
                if value is None
                else in_blocks(at_least_float32(value[:, g : g + 1]), first_key, block)
            )
            for i in range(len(row)):
                for a in range(0, block, step):
                    own = slice(a, a + step)
                    some = at_least_float32(query[:, g].index_select(2, row[i, own]))
                    hidden = ~grid.reads(position[i, own])
                    found = _row_effects(some, k, v, hidden, factor, block)
                    weight = share[i, own, None].to(wide)
                    for total, x in zip(totals, found, strict=True):
                        total[:, g, :, i] += (x * weight).masked_fill(weight == 0, 0).sum(2)
        return [total.flatten(1, 2) for total in totals]


def encoder_loss(scores: Tensor, effects: Tensor) -> Tensor:
    """How badly scores foretell effects: the cross-entropy between the two, in nats.

    Over the key blocks that are to be chosen from: the first and the own block are read anyway, and
    what is hidden (-inf) cannot be. Effects are normalised over them, and so is the softmax.

    Args:
        scores: [b, h, n, key blocks], -inf in the future, so that the own block is the last.
        effects: [b, h, n, key blocks], 0 or more.

    Returns:
        Scalar, float32 (float64 for float64 scores): the mean over query blocks, heads and batch
        with two key blocks or more to choose from; 0 with a graph where that is none.
    """
    if scores.shape != effects.shape:
        raise ValueError(
            f"effects: expected the shape of scores {tuple(scores.shape)}, received "
            f"{tuple(effects.shape)}"
        )
    scores = at_least_float32(scores)
    with torch.no_grad():
        judged = scores > float("-inf")
        judged[..., :-1] &= judged[..., 1:]  # the own block is the last that is visible
        judged[..., -1:] = False
        judged[..., :1] = False
        worth = effects.detach().to(scores.dtype).masked_fill(~judged, 0)
        total = worth.sum(-1, keepdim=True)
        some = (total > 0) & (judged.sum(-1, keepdim=True) > 1)
        worth = (worth / total).masked_fill(~some, 0)
    # of rows where nothing is judged, whatever is finite: they weigh nothing
    logits = scores.masked_fill(~judged, float("-inf")).masked_fill(~some, 0)
    expected = logits.log_softmax(-1).masked_fill(~judged, 0)
    return -(worth * expected).sum() / some.sum().clamp(min=1)


def encoder_loss_of(
    encoder: BlockEncoder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_blocks: int = 16,
    late: float = 0.25,
    teacher: Literal["effect", "mass"] = "effect",
    scale: float | None = None,
    first_key: int = 0,
) -> Tensor:
    """The loss of an encoder on some query blocks of one layer, drawn anew at each call.

    They come from torch's default generator of the tensors' device, and nothing waits for it. The
    gradient reaches the encoder alone.

    Args:
        encoder: what learns.
        query: [b, h, q, d], the last q positions of the keys, rotated.
        key, value: [b, g, k, d].
        query_blocks: query blocks drawn, the same for all of the batch and all heads.
        late: share of them from the last 256 positions, the rest from all others.
        teacher: what a block is worth: what losing it does to the output, or its attention.
        scale: of the logits, ``d ** -0.5`` when None.
        first_key: position of the first key.

    Returns:
        Scalar as :func:`encoder_loss`; 0 with a graph where the sequence is too short for two
        blocks between the first and the own.
    """
    check_whole("query_blocks", query_blocks, 1)
    if teacher not in ("effect", "mass"):
        raise ValueError(f"teacher: expected 'effect' or 'mass', received {teacher!r}")
    if not 0 <= late <= 1:
        raise ValueError(f"late: expected a share from 0 to 1, received {late}")
    query, key, value = query.detach(), key.detach(), value.detach()
    grid = BlockGrid.of(query, key, encoder.block, first_key, encoder.query_pool)
    first = max(0, 3 - grid.before)
    if first >= grid.query_blocks:
        return sum((p.sum() for p in encoder.parameters()), torch.zeros((), device=key.device)) * 0
    near = -(-LATE_ROWS // encoder.block)
    drawn = draw_rows(first, grid.query_blocks, query_blocks, late, query.device, near)
    some = encoder.block, drawn, scale
    if teacher == "mass":
        worth = block_masses(query, key, *some, first_key=first_key)
    else:
        worth, _ = block_effects(query, key, value, *some, first_key=first_key)
    scores = encoder(query, key, first_key, scale=scale, query_blocks=drawn)
    return encoder_loss(scores, worth)


def _row_effects(
    query: Tensor, key: Tensor, value: Tensor | None, hidden: Tensor, scale: float, block: int
) -> list[Tensor]:
    """Effects, where there are values, and masses of rows of one kv head: [b, m, rows, blocks].

    query [b, m, rows, d], key [b, 1, k, d], value [b, 1, key blocks, block, d].
    """
    batch, members, rows, _ = query.shape
    logits = (query.flatten(1, 2) @ key[:, 0].mT).unflatten(1, (members, rows)) * scale
    share = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
    share = share.view(batch, members * rows, -1, block).transpose(1, 2)
    mass = share.sum(-1)
    if value is None:
        return [mass.mT.unflatten(1, (members, rows))]
    added = share @ value[:, 0]  # [b, key blocks, rows, d]
    added = added.masked_fill((mass == 0)[..., None], 0)  # whatever lies in the future
    output = added.sum(1, keepdim=True)
    effect = (added - mass[..., None] * output).norm(dim=-1)
    return [x.mT.unflatten(1, (members, rows)) for x in (effect, mass)]
