"""What tests of several processes share: masks of every kind, the cases of a rank, its start."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from dynmask import BlockMask, LifetimeMask, PlacedMask, StructuralMask, spans_left_padded
from dynmask.masks import MixedMask, UnionMask

RANKS, LENGTH, BATCH, HEADS, GROUPS, DIM = 2, 37, 2, 4, 2, 8
TOLERANCE = 2e-5
INF = LifetimeMask.INF


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# masks of every kind, over all positions or the last of them


def structural(keys, queries, limit=None):
    diagonals = torch.tensor([[0, 1, 5, -1], [2, 3, 4, 30], [1, -1, -1, -1], [7, 9, 11, -1]]).int()
    verticals = torch.tensor([[0, 3], [1, 35], [2, -1], [0, 20]]).int()
    true_mask = drawn(HEADS, 9, 9, seed=3) > 0
    return StructuralMask(
        diagonals[None], verticals[None], keys, queries, true_mask=true_mask, limit=limit
    )


def blocks(keys, queries, limit=None):
    first = (keys - queries) // 8
    chosen = drawn(BATCH, HEADS, (keys - 1) // 8 - first + 1, -(-keys // 4), seed=4) > 0.3
    return replace(BlockMask.from_scores(chosen, 8, 4, keys, queries), limit=limit)


def placed(keys, queries):
    lengths = [29, keys]
    spans = tuple(spans_left_padded(lengths, keys, queries))
    masks = []
    for length, span in zip(lengths, spans, strict=True):
        rows = span.query_stop - span.query_start
        scores = drawn(1, HEADS, length, seed=length)
        masks.append(LifetimeMask.top_w(scores, 6, rows))
    return PlacedMask(tuple(masks), spans, BATCH, queries, keys)


def top_w(keys, queries):
    return LifetimeMask.top_w(drawn(BATCH, GROUPS, keys, seed=5), 7, queries)


def mixed(keys, queries):
    return MixedMask((blocks(keys, queries), LifetimeMask.window(keys, 5, queries)), (0, 1, 1, 0))


MASKS = {
    "causal": lambda n, q: LifetimeMask.causal(n, q),
    "streaming": lambda n, q: LifetimeMask.streaming(n, 2, 9, q),
    "top_w": top_w,
    "empty_rows": lambda n, q: LifetimeMask(drawn(1, HEADS, n).gt(0).int() * n, q),
    "structural": structural,
    "structural_limit": lambda n, q: structural(n, q, LifetimeMask.window(n, 11, q)),
    "block": blocks,
    "block_limit": lambda n, q: blocks(n, q, LifetimeMask.window(n, 6, q)),
    "union": lambda n, q: UnionMask((structural(n, q), blocks(n, q))),
    "mixed": mixed,
    "placed": placed,
}


class Cases:
    """The cases of one rank and what came of them."""

    def __init__(self, rank):
        self.rank, self.found = rank, {}

    @contextmanager
    def case(self, name):
        self.differences = []
        try:
            yield
            self.found[name] = max(self.differences, default=0.0)
        except Exception as error:
            self.found[name] = f"{type(error).__name__}: {error}"

    def same(self, own, expected):
        assert own.shape == expected.shape, (own.shape, expected.shape)
        assert own.dtype == expected.dtype
        wrong = torch.isfinite(own) != torch.isfinite(expected)
        assert not wrong.any()
        apart = (own.detach() - expected.detach()).abs().nan_to_num(0)  # -inf less -inf
        self.differences.append(float(apart.max()) if apart.numel() else 0.0)


def rank_main(rank, folder, work):
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in environment.items()})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),  # a rank alone with an error is not waited for long
    )
    cases = Cases(rank)
    work(cases, folder)
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(cases.found, file)
    dist.destroy_process_group()


def found_by(work, folder):
    """What each rank found: a list of dictionaries from cases to differences or errors.

    ``work`` is called with the cases and the folder on every rank.
    """
    spawn(rank_main, (str(folder), work), nprocs=RANKS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
