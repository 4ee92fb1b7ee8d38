"""Masks by hand: four tokens, every constructor, every refusal."""

import pytest
import torch

from dynmask import (
    BlockMask,
    LifetimeMask,
    PlacedMask,
    Span,
    StructuralMask,
    spans_left_padded,
    spans_packed,
    spans_right_padded,
)
from tests.strategies import generator, index_sets

INF = LifetimeMask.INF


def rows(mask):
    """The first head as strings of 1 and 0, one for each query."""
    return ["".join(str(int(x)) for x in row) for row in mask.dense()[0, 0]]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_lifetimes_by_hand():
    death = ints(3, 2, INF, 3).view(1, 1, 4)  # key 3 dies at its own birth
    assert rows(LifetimeMask(death)) == ["1000", "1100", "1010", "0010"]
    assert rows(LifetimeMask(death, queries=2)) == ["1010", "0010"]


def test_causal_window_and_streaming_by_hand():
    assert rows(LifetimeMask.causal(4)) == ["1000", "1100", "1110", "1111"]
    assert rows(LifetimeMask.window(4, 2)) == ["1000", "1100", "0110", "0011"]
    assert rows(LifetimeMask.streaming(4, 1, 1)) == ["1000", "1100", "1010", "1001"]
    assert rows(LifetimeMask.streaming(3, 2, 1, first_key=1)) == ["100", "110", "101"]


def test_top_two_by_hand():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 2.0]]])
    # query 3: keys 2 and 3 tie for second place, the later one wins
    assert rows(LifetimeMask.top_w(scores, 2)) == ["1000", "1100", "1010", "1001"]
    assert LifetimeMask.top_w(scores, 2).death.tolist() == [[[INF, 2, 3, INF]]]


def test_a_key_that_never_ranks_dies_at_birth():
    assert LifetimeMask.top_w(torch.tensor([[[3.0, 2.0, 1.0]]]), 1).death.tolist() == [
        [[INF, 1, 2]]
    ]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 1), (33, 4), (64, 64), (65, 80), (200, 17)])
def test_top_w_keeps_the_best_of_every_prefix(n, width, ties):
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(1, 2, n, generator=g)
    if ties:
        scores = scores.round()
    dense = LifetimeMask.top_w(scores, width).dense()
    for head in range(2):
        s = scores[0, head].tolist()
        for q in range(n):
            best = sorted(range(q + 1), key=lambda k: (s[k], k), reverse=True)[:width]
            assert sorted(best) == dense[0, head, q].nonzero()[:, 0].tolist()


def test_structural_by_hand():
    mask = StructuralMask(ints(2).view(1, 1, 1), ints(1).view(1, 1, 1), 4)
    assert rows(mask) == ["1000", "0100", "1110", "0101"]
    true_mask = torch.tensor([[[1, 0], [1, 0]]]).bool()  # own keys are added
    mask = StructuralMask(ints(2).view(1, 1, 1), ints(1).view(1, 1, 1), 4, true_mask=true_mask)
    assert rows(mask) == ["1000", "1100", "1110", "0101"]


def test_structural_columns_are_positions_of_the_sequence():
    diagonals, verticals = ints(-1).view(1, 1, 1), ints(0, 3).view(1, 1, 2)
    whole = StructuralMask(diagonals, verticals, 6)
    trimmed = StructuralMask(diagonals, verticals, 4, first_key=2)
    assert torch.equal(trimmed.dense(), whole.dense()[:, :, 2:, 2:])


@pytest.mark.parametrize("length", [0, 30, 80])
@pytest.mark.parametrize("first_key", [0, 1, 17, 29, 60])
@pytest.mark.parametrize("queries", [1, 13, 50])
def test_counted_density_of_a_trimmed_structural_mask(length, first_key, queries):
    g = generator(length + first_key)
    mask = StructuralMask(
        index_sets(g, 2, 2, 60, 9),
        index_sets(g, 2, 2, 110, 12),
        keys=50,
        queries=queries,
        true_mask=torch.rand(2, length, length, generator=g) < 0.3 if length else None,
        first_key=first_key,
    )
    kept = mask.dense().sum((-1, -2))
    assert torch.equal(mask.lower().dense(), mask.dense())
    assert torch.equal(mask.density(), kept / mask.causal_pairs())


def test_union_over_a_group_keeps_what_one_of_its_heads_reads():
    diagonals = ints(0, 1, 0, 2, -1, -1, 0, 3).view(1, 4, 2)
    verticals = ints(-1, 2, -1, 1).view(1, 4, 1)
    mask = StructuralMask(diagonals, verticals, 9)
    dense = mask.dense()
    shared = mask.union_heads(2)
    assert shared.heads == 2
    assert torch.equal(shared.dense()[:, 0], dense[:, 0] | dense[:, 1])
    assert torch.equal(shared.dense()[:, 1], dense[:, 2] | dense[:, 3])


def test_blocks_by_hand():
    index = ints(0, -1, 0, 1).view(1, 1, 2, 2)
    assert rows(BlockMask(index, 2, 2, 4)) == ["1000", "1100", "1110", "1111"]
    index = ints(0, 1).view(1, 1, 2, 1)
    assert rows(BlockMask(index, 2, 2, 4)) == ["1000", "1100", "0010", "0011"]


def test_chosen_blocks_are_causal_and_hold_the_own_block():
    chosen = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    chosen[0, 0, 0, 1] = True  # the future
    assert rows(BlockMask.from_scores(chosen, 2, 2, 4)) == ["1000", "1100", "0010", "0011"]


def test_a_limit_may_differ_by_head():
    diagonals = ints(0, 1, 0, 3).view(1, 2, 2)
    mask = StructuralMask(diagonals, diagonals, 6)
    limit = LifetimeMask((torch.arange(6) + ints(2, 4).view(1, 2, 1)).int())
    limited = mask & limit
    assert torch.equal(limited.dense(), mask.dense() & limit.dense())
    assert torch.equal(limited.lower().dense(), limited.dense())


def test_a_row_reads_its_own_key_even_without_diagonals():
    none = torch.zeros(1, 1, 0, dtype=torch.int32)
    mask = StructuralMask(none, none, 5, 1)
    assert mask.lower().dense().flatten().tolist() == [False] * 4 + [True]


def test_an_endless_window_is_causal():
    assert torch.equal(LifetimeMask.window(9, 2**63).dense(), LifetimeMask.causal(9).dense())


def test_a_single_listed_key_is_packed():
    """A transposed [32, 1] keeps its strides when made contiguous."""
    none = torch.full((1, 1, 1), -1, dtype=torch.int32)
    true_mask = torch.zeros(1, 30, 30, dtype=torch.bool)
    mask = StructuralMask(none, none, 50, true_mask=true_mask, first_key=29)
    assert torch.equal(mask.lower(tile=32).dense(), mask.dense())


def test_memory_follows_the_kept_keys():
    n, width = 16384, 256
    scores = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(0))
    plan = LifetimeMask.top_w(scores, width).lower()
    assert plan.index.numel() <= 2 * (n / plan.tile) * (width + 2 * plan.tile)
    assert int(plan.work().max()) <= n * (width + 2 * plan.tile)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LifetimeMask(torch.zeros(1, 1, 4)), "death: expected an int32 tensor"),
        (lambda: LifetimeMask(torch.zeros(1, 4).int()), "death: expected an int32 tensor"),
        (lambda: LifetimeMask.causal(3, 4), "1 <= queries <= keys"),
        (lambda: LifetimeMask.causal(0), "1 <= queries <= keys"),
        (lambda: LifetimeMask.window(4, -1), "window >= 1, received -1"),
        (lambda: LifetimeMask.streaming(4, -1, 2), "sinks >= 0, received -1"),
        (lambda: LifetimeMask.top_w(torch.zeros(1, 4), 2), r"\[b, heads, keys\]"),
        (lambda: LifetimeMask.top_w(torch.zeros(1, 1, 4), 0), "width >= 1, received 0"),
        (
            lambda: LifetimeMask.top_w(torch.tensor([[[0.0, float("nan")]]]), 1),
            r"received NaN, first at \[b, head, key\] = \[0, 0, 1\]",
        ),
        (
            lambda: StructuralMask(ints(3, 1).view(1, 1, 2), ints(0).view(1, 1, 1), 4),
            "diagonals: expected ascending",
        ),
        (
            lambda: StructuralMask(ints(-5).view(1, 1, 1), ints(0).view(1, 1, 1), 4),
            "diagonals: expected offsets >= 0",
        ),
        (
            lambda: StructuralMask(ints(0).view(1, 1, 1), ints(0, 1).view(1, 2, 1), 4),
            "expected the same",
        ),
        (
            lambda: StructuralMask(
                ints(0).view(1, 1, 1), ints(0).view(1, 1, 1), 4, true_mask=torch.zeros(1, 2, 3) > 0
            ),
            "true_mask: expected bool",
        ),
        (
            lambda: StructuralMask(ints(0).view(1, 1, 1), ints(0).view(1, 1, 1), 4).union_heads(3),
            "divisor",
        ),
        (lambda: BlockMask(ints(0).view(1, 1, 1, 1), 2, 2, 4), "expected 2 query blocks"),
        (lambda: BlockMask(ints(7, 0).view(1, 1, 2, 1), 2, 2, 4), "block numbers from 0 to 1"),
        (lambda: BlockMask(ints(1, 0).view(1, 1, 1, 2), 4, 2, 4), "ascending blocks"),
        (lambda: BlockMask(ints(0).view(1, 1, 1, 1), 0, 2, 4), "block_q >= 1, received 0"),
        (lambda: LifetimeMask.causal(4) | LifetimeMask.causal(5), "the same queries, keys"),
        (
            lambda: LifetimeMask.causal(4).expand(2) | LifetimeMask.causal(4).expand(3),
            "batch rows that agree",
        ),
        (lambda: LifetimeMask.causal(4).dense((3, 3)), "non-empty range"),
        (lambda: LifetimeMask.causal(4).lower((0, 9)), "rows: expected"),
        (lambda: LifetimeMask.causal(4).lower(tile=0), "tile: expected"),
        (lambda: spans_packed([0, 3, 3]), "ascending cumulative lengths"),
        (lambda: spans_left_padded([0, 3], 4), "lengths: expected"),
        (lambda: spans_right_padded([5], 4), "lengths: expected"),
        (
            lambda: PlacedMask([LifetimeMask.causal(3)], [Span(0, 0, 4, 0, 4)], 1, 4, 4),
            "the keys and queries of its span",
        ),
        (lambda: LifetimeMask.window(9, 2.5), "expected a whole number"),
        (lambda: LifetimeMask.window(-3, 2), "1 <= queries <= keys"),
        (lambda: LifetimeMask.causal(4) | 3, "expected two masks"),
        (
            lambda: LifetimeMask.causal(4) & BlockMask(ints(0).view(1, 1, 1, 1), 4, 4, 4),
            "expected a LifetimeMask on the right",
        ),
        (
            lambda: BlockMask.from_scores(torch.ones(1, 1, 2, 1) > 0, 2, 2, 4),
            "2 query blocks, 2 key blocks",
        ),
        (
            lambda: PlacedMask(
                [LifetimeMask.causal(3)] * 2, [Span(0, 0, 3, 0, 3), Span(0, 2, 5, 2, 5)], 1, 5, 5
            ),
            "expected disjoint",
        ),
        (lambda: PlacedMask([], [], 1, 4, 4), "one for each of 0 spans"),
        (
            lambda: PlacedMask([LifetimeMask.causal(4)], [Span(0, 0, 4, 0, 4)], 1, 4, 4).expand(2),
            "for which the sequences were placed",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("block", "tile"), [(64, 128), (48, 32), (16, 64), (64, 64)])
def test_no_tile_straddles_two_query_blocks(block, tile, fused):
    """Some borders lie where a tile begins anyhow, others in the middle of one."""
    keys = 300
    count = -(-keys // block)
    chosen = torch.rand(1, 2, count, count, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = BlockMask.from_scores(chosen, block, block, keys)
    plan = mask.lower(tile=tile, fused=fused)
    assert torch.equal(plan.row // block, (plan.row + plan.rows - 1) // block)
    assert torch.equal(plan.dense(), mask.dense())
