"""The laws for the Triton kernels, which run on CPU tensors in Triton's interpreter.

Small shapes and odd sizes; ``test_gpu.py`` runs the compiled kernels. Whatever the code allocates
without writing holds NaN, or the largest integer: see ``nothing_unwritten_is_read``.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask import (
    BlockMask,
    LifetimeMask,
    PlacedMask,
    StructuralMask,
    attention,
    spans_left_padded,
    spans_packed,
)
from dynmask.attention import DENSE_KEYS, choose
from dynmask.kernels import ops
from dynmask.kernels.cpu import merge
from dynmask.kernels.select import lifetimes_of_top_w
from dynmask.kernels.worth import key_worth
from dynmask.masks.base import repeat_heads
from dynmask.policies.kept import kept_mass, sampled_rows
from tests.conftest import INTERPRETED
from tests.strategies import (
    GROUPS,
    HEADS,
    block,
    generator,
    lifetime,
    masks,
    poison,
    structural,
    tensors,
)

pytestmark = pytest.mark.skipif(
    not ops.interpreting(), reason="needs triton and TRITON_INTERPRET=1, which a GPU forbids"
)

SDPA = torch.nn.functional.scaled_dot_product_attention
KEYS = 70
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, scope="module")
def nothing_unwritten_is_read():
    """PyTorch fills new memory with NaN, or the largest integer, in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut(kind, keys=KEYS, queries=KEYS, b=1):
    """One mask of each kind, small, with empty rows and unread keys where the kind allows them."""
    g = generator(5)
    if kind == "causal":
        return lifetime(g, keys, queries, b, 1, 3).expand(b)
    if kind == "any lifetimes":
        death = lifetime(g, keys, queries, b, GROUPS, 0).death
        death[:, 0, :3] = 0  # the first rows of one head see nothing, the last ones of the other
        death[:, 1] = death[:, 1].clamp(max=keys - 9)
        death[:, 1, -9:] = 0
        return LifetimeMask(death, queries)
    if kind == "top-w":
        return lifetime(g, keys, queries, b, GROUPS, 1)
    if kind == "structural":
        return structural(g, keys, queries, b, HEADS, 0)
    if kind == "true mask":
        return structural(g, keys, queries, b, GROUPS, 33)
    if kind == "blocks":
        return block(g, keys, queries, b, GROUPS, 32, 16)
    if kind == "odd blocks":
        return block(g, keys, queries, b, 1, 23, 11)
    if kind == "limited":
        return block(g, keys, queries, b, HEADS, 32, 16) & LifetimeMask.window(keys, 19, queries)
    if kind == "united":
        return cut("top-w", keys, queries, b) | cut("structural", keys, queries, b)
    own = (31, 20) if b == 1 else (31, keys)
    spans = spans_packed([0, 31, 51]) if b == 1 else spans_left_padded(own, keys, queries)
    rows = [s.query_stop - s.query_start for s in spans]
    masks = [cut(kind, n, r) for kind, n, r in zip(("top-w", "structural"), own, rows, strict=True)]
    return PlacedMask(masks, spans, b, queries, keys)


KINDS = [
    "causal",
    "any lifetimes",
    "top-w",
    "structural",
    "true mask",
    "blocks",
    "odd blocks",
    "limited",
    "united",
    "placed",
]


def agree(mask, args, bias=None, scale=None, plan=None, rtol=2e-5):
    """Output and log-sum-exp of the Triton kernels are the reference's in float64."""
    wide = [x.double() for x in args]
    truth, norm = attention(*wide, mask, bias, scale, return_lse=True, impl="reference")
    what = mask if plan is None else plan
    out, lse = attention(*args, what, bias, scale, return_lse=True, impl="triton")
    assert out.dtype == args[0].dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=rtol / 10)
    torch.testing.assert_close(lse.double(), norm, rtol=rtol, atol=rtol / 10)
    return out, lse


def plan_tensors(plan):
    from dynmask.kernels.triton.call import PlanTensors

    return PlanTensors(*(getattr(plan, name) for name in PlanTensors._fields)).contiguous()


# Selection


SCORES = {
    "ties": lambda x: x.round(decimals=1),
    "ascending": lambda x: x.sort(-1).values,
    "descending": lambda x: x.sort(-1, descending=True).values,
    "constant": lambda x: x * 0,
    "infinities": lambda x: torch.where(x > 1, INF, torch.where(x < -1, -INF, x)),
    "NaN": lambda x: torch.where(x.abs() < 0.5, NAN, x),
    "all NaN": lambda x: x * NAN,
}


def check_selection(scores, width):
    truth = lifetimes_of_top_w(scores.float().nan_to_num(-INF, INF, -INF), width)
    death = ops.lifetimes(scores, width)
    assert death.dtype == torch.int32
    assert torch.equal(death, truth)


@pytest.mark.parametrize("kind", SCORES)
def test_selection_is_that_of_tensor_operations(kind):
    """Three chunks of queries; NaN ranks lowest, as -inf does."""
    scores = SCORES[kind](torch.randn(1, 2, 301, generator=generator(1)))
    for width in (1, 40):
        check_selection(scores, width)


@INTERPRETED
@given(
    st.sampled_from([1, 2, 31, 127, 128, 129, 256, 390]),
    st.integers(1, 390),
    st.sampled_from(sorted(SCORES)),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)
def test_selection_at_any_size(keys, width, kind, dtype, seed):
    scores = SCORES[kind](torch.randn(2, 1, keys, generator=generator(seed)))
    check_selection(scores.to(dtype), min(width, keys))


@INTERPRETED
@given(st.integers(1, 40), st.integers(0, 99))
def test_selection_in_many_buckets_and_steps(width, seed):
    """As at a million keys: more chunks than a step has bins, small buckets of ranks."""
    from dynmask.kernels.triton import select

    scores = torch.randn(1, 2, 700, generator=generator(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", 16)
        patch.setattr(select, "MOST", 32)
        death = select.lifetimes(scores, width)
    assert torch.equal(death, lifetimes_of_top_w(scores, width))


def test_selection_reads_scores_of_any_layout():
    scores = torch.randn(1, 140, 4, generator=generator(2)).transpose(1, 2)[:, ::2]
    check_selection(scores, 7)


# Lowering


def check_lowering(mask, rows, tile):
    plan = mask.lower(rows, tile, fused=True)
    dense = torch.zeros_like(mask.dense())
    dense[:, :, slice(*rows)] = mask.dense(rows)
    assert torch.equal(plan.dense(), dense)
    assert (plan.full >= 0).all() and (plan.full <= plan.count).all()
    assert not plan.count.numel() or int(plan.count.max()) <= plan.index.shape[-1]
    for head in range(plan.heads):
        for t in range(plan.tiles):
            full, count = int(plan.full[head, t]), int(plan.count[head, t])
            listed = plan.index[head, t, :count].tolist()
            assert len(set(listed)) == count
            assert all(0 <= k < mask.keys for k in listed)
            position, stop = int(plan.position[t]), int(plan.position[t] + plan.rows[t])
            assert all(k + plan.block - 1 <= position for k in listed[:full])
            assert all(k < stop for k in listed)


@INTERPRETED
@given(masks(most=100), st.sampled_from([1, 7, 16, 64, 128]), st.data())
def test_a_fused_plan_means_what_its_mask_means(mask, tile, data):
    first = data.draw(st.integers(0, mask.queries - 1))
    last = data.draw(st.integers(first + 1, min(mask.queries, first + 6 * tile)))
    check_lowering(mask, (first, last), tile)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_plans_of_every_kind(kind):
    for tile, rows in ((64, (0, KEYS)), (16, (37, 69)), (1, (33, 36)), (1, (69, 70))):
        check_lowering(cut(kind), rows, tile)


@pytest.mark.parametrize(("span", "ladder", "step"), [(4096, 16, 1024), (16, 16, 32), (8, 2, 16)])
def test_lists_are_filtered_from_those_of_longer_segments(span, ladder, step, monkeypatch):
    """Over one level, two, and many; in steps of fewer keys than a list has."""
    from dynmask.kernels.triton import lower

    for name, value in (("SPAN", span), ("LADDER", ladder), ("BLOCK", step)):
        monkeypatch.setattr(lower, name, value)
    death = torch.randint(0, 120, (2, GROUPS, 100), generator=generator(4)).int()
    check_lowering(LifetimeMask(death), (3, 100), 4)


def test_more_keys_may_end_in_a_tile_than_a_running_top_w_ends():
    death = torch.randint(290, 310, (1, 2, 400), generator=generator(4)).int()
    death[:, 1, ::2] = LifetimeMask.INF
    check_lowering(LifetimeMask(death), (256, 400), 64)


def test_a_bound_that_is_too_small_loses_keys_and_adds_none():
    death = torch.randint(60, 200, (1, 2, 200), generator=generator(5)).int()
    plan = LifetimeMask(death, most=9).lower((0, 200), 16, fused=True)
    assert not (plan.dense() & ~LifetimeMask(death).dense()).any()
    assert int(plan.count.max()) == plan.index.shape[-1] == 25


@pytest.mark.parametrize("most", [None, 4])
def test_block_lists_are_those_of_tensor_operations(most, monkeypatch):
    chosen = torch.rand(2, GROUPS, 4, 8, generator=generator(6)) < 0.3
    if most:  # the own blocks alone, four of 7 keys where a block of 17 rows meets the most
        chosen = torch.zeros_like(chosen)
    there = BlockMask.from_scores(chosen, 17, 7, 55, 45)
    monkeypatch.setattr(ops, "fused", lambda device: True)
    here = BlockMask.from_scores(chosen, 17, 7, 55, 45, most)
    assert here.index.shape[-1] == (most or 8)
    longest = there.index.shape[-1]
    assert torch.equal(here.index[..., :longest], there.index)
    assert (here.index[..., longest:] == -1).all()


# Attention


@INTERPRETED
@given(
    masks(most=KEYS), st.sampled_from([None, 1, GROUPS, HEADS]), st.booleans(), st.integers(0, 99)
)
def test_the_triton_kernels_agree_with_the_reference(mask, bias_heads, shared, seed):
    args = tensors(mask, seed, torch.float32)
    bias = None
    if bias_heads:
        shape = (1 if shared else mask.batch, bias_heads, mask.keys)
        bias = torch.randn(shape, generator=generator(seed))
    out, _ = agree(mask, args, bias)
    assert torch.equal(attention(*args, mask, bias, impl="triton"), out)


@pytest.mark.parametrize("queries", [KEYS, 23, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_with_any_number_of_queries(kind, queries):
    """Two batch rows, a bias of the kv heads, NaN in whatever no row reads."""
    mask = cut(kind, queries=queries, b=2)
    query, key, value = tensors(mask, 3, torch.float32)
    bias = torch.randn(2, GROUPS, KEYS, generator=generator(8))
    poison(mask, key, value)
    out, lse = agree(mask, (query, key, value), bias)
    empty = repeat_heads(~mask.dense().any(-1), HEADS).expand(out.shape[:3])
    assert (out[empty] == 0).all() and (lse[empty] == -INF).all()
    assert out.isfinite().all() and lse[~empty].isfinite().all()
    assert kind != "any lifetimes" or empty.any()


@pytest.mark.parametrize("queries", [KEYS, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_reads_a_fused_plan_stops_at_its_counts(kind, queries):
    """Lists are as long as a bound and hold anything after their counts."""
    mask = cut(kind, queries=queries, b=2)
    plan = mask.lower(fused=True)
    assert int(plan.kept().sum()) == int(mask.dense().expand(2, -1, -1, -1).sum())
    query, key, value = tensors(mask, 3, torch.float64)
    truth = attention(query, key, value, mask, impl="reference")
    for impl in ("cpu", "reference"):
        torch.testing.assert_close(attention(query, key, value, plan, impl=impl), truth)


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("kind", ["causal", "lifetimes", "structural", "blocks"])
def test_keys_that_every_row_sees_need_no_mask(kind, dim):
    """Long enough lists for steps without an element rule: 140 keys and 9 rows."""
    keys, queries = 140, 9
    if kind == "causal":
        mask = LifetimeMask.causal(keys, queries)
    elif kind == "lifetimes":
        mask = LifetimeMask.streaming(keys, 90, 5, queries)
    elif kind == "structural":
        some = torch.arange(0, keys, 2, dtype=torch.int32).expand(1, GROUPS, -1)
        mask = StructuralMask(some[..., :9].contiguous(), some.contiguous(), keys, queries)
    else:
        chosen = torch.ones(1, GROUPS, 1, 9, dtype=torch.bool)
        mask = BlockMask.from_scores(chosen, 16, 16, keys, queries)
    plan = mask.lower(fused=True)
    assert int(plan.full.max()) * plan.block >= 64
    args = tensors(mask, 13, torch.float32, dim)
    agree(mask, args)
    agree(mask, args, torch.randn(1, HEADS, keys, generator=generator(13)))


SHAPES = [  # head dim, value dim, heads, kv heads
    (1, 1, 1, 1),
    (3, 17, 2, 2),
    (16, 16, 8, 1),
    (64, 64, 6, 2),
    (80, 80, 4, 4),
    (96, 40, 7, 1),
    (128, 128, 4, 2),
    (192, 128, 2, 1),
    (256, 256, 2, 2),
]


@pytest.mark.parametrize("queries", [21, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_head_dims_and_groups(shape, queries):
    dim, wide, heads, groups = shape
    death = torch.randint(0, 60, (1, groups, 37), generator=generator(9)).int()
    mask = LifetimeMask(death, queries)
    agree(mask, tensors(mask, 1, torch.float32, dim, heads, groups, wide))


@pytest.mark.parametrize("heads", [3, 8, 24])
def test_any_number_of_query_heads_shares_a_list(heads):
    """More heads than one program stacks, and numbers that are no power of two."""
    mask = lifetime(generator(2), 40, 9, 1, 1, 0)
    agree(mask, tensors(mask, 2, torch.float32, 16, heads, 1))
    mask = replace(mask, queries=1)
    agree(mask, tensors(mask, 2, torch.float32, 16, 3 * heads, 1))


@pytest.mark.parametrize("tile", [1, 5, 16, 33, 70])
@pytest.mark.parametrize("kind", ["any lifetimes", "structural", "odd blocks", "placed"])
def test_plans_with_tiles_of_any_height(kind, tile):
    mask = cut(kind)
    rows = (0 if tile > 9 else mask.queries - 5 * tile, mask.queries)
    args = tensors(mask, 4, torch.float32)
    for fused in (False, True):
        out = attention(*args, mask.lower(rows, tile, fused), impl="triton")
        truth = torch.zeros_like(out)
        truth[:, :, slice(*rows)] = attention(*args, mask, impl="reference")[:, :, slice(*rows)]
        torch.testing.assert_close(out, truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("block_k", [16, 24, 32, 64, 100, 128])
def test_key_blocks_of_any_size(block_k):
    mask = block(generator(4), 150, 40, 1, GROUPS, 32, block_k, 0.7)
    agree(mask, tensors(mask, 4, torch.float32))
    mask = block(generator(4), 150, 1, 1, GROUPS, 32, block_k, 0.7)
    agree(mask, tensors(mask, 4, torch.float32))


@pytest.mark.parametrize("queries", [KEYS, 1])
def test_tensors_of_any_layout(queries):
    """[b, n, h, d] as models make them, every second element, and one row for the whole batch."""
    mask = cut("top-w", queries=queries, b=2)
    query, key, value = tensors(mask, 5, torch.float32)
    bias = torch.randn(1, KEYS, 1, generator=generator(5)).mT
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    agree(mask, moved, bias)
    agree(mask, [query, key[:1].expand(2, -1, -1, -1), value.mT.contiguous().mT], bias)
    gaps = [torch.stack([x, x * NAN], -1).flatten(-2)[..., ::2] for x in (query, key, value)]
    agree(mask, gaps, torch.randn(2, HEADS, 2 * KEYS, generator=generator(5))[..., ::2])


@pytest.mark.parametrize("queries", [30, 1])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale, queries):
    mask = lifetime(generator(3), 30, queries, 1, GROUPS, 0)
    args = tensors(mask, 6, torch.float32)
    agree(mask, args, scale=scale)
    agree(mask, args, torch.randn(1, HEADS, 30, generator=generator(6)), scale)


@pytest.mark.parametrize("queries", [40, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["top-w", "structural", "blocks"])
def test_the_error_is_no_larger_than_sdpas(kind, dtype, queries):
    """As in ``test_laws.py``. The bias is in the tensors' dtype, as a layer would make it."""
    mask = cut(kind, queries=queries)
    query, key, value = tensors(mask, 7, dtype, dim=32)
    bias = torch.randn(1, GROUPS, KEYS, generator=generator(7)).to(dtype)
    visible = repeat_heads(mask.dense(), HEADS)
    for more in (None, bias):
        wide = [x.double() for x in (query, key, value)]
        truth = attention(*wide, mask, more, impl="reference")
        add = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -INF)
        if more is not None:
            add = add + repeat_heads(more, HEADS)[:, :, None]
        theirs = SDPA(query, repeat_heads(key, HEADS), repeat_heads(value, HEADS), attn_mask=add)
        theirs = theirs.masked_fill(~visible.any(-1)[..., None], 0)
        ours = attention(query, key, value, mask, more, impl="triton")
        assert ours.dtype == dtype
        error, bound = ((x.double() - truth).norm() for x in (ours, theirs))
        assert error <= 2 * bound + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("queries", [KEYS, 1])
@pytest.mark.parametrize("kind", ["any lifetimes", "structural", "blocks", "united"])
def test_a_masked_key_changes_nothing_bit_for_bit(kind, queries):
    mask = cut(kind, queries=queries)
    query, key, value = tensors(mask, 8, torch.float32)
    seen = repeat_heads(mask.dense(), HEADS)
    before = attention(query, key, value, mask, impl="triton")
    # of all keys the one that most rows and heads do not see, yet some do
    blind = (~seen).sum((0, 1, 2)) * seen.any(2).any(1)[0]
    k = int(blind.argmax())
    key[:, :, k], value[:, :, k] = 1e4, -1e4
    after = attention(query, key, value, mask, impl="triton")
    unseen = ~seen[:, :, :, k]
    assert unseen.any() and torch.equal(before[unseen], after[unseen])
    assert not seen[:, :, :, k].any() or not torch.equal(before, after)


@pytest.mark.parametrize("queries", [40, 1])
@pytest.mark.parametrize("kind", ["any lifetimes", "structural", "blocks", "limited", "placed"])
def test_what_stands_after_the_end_of_a_list_is_not_read(kind, queries):
    """The padding of every list names key 0, which no row reads, with all bits set."""
    mask = cut(kind, 51 if kind == "placed" else KEYS, 51 if kind == "placed" else queries)
    if kind == "placed":
        mask = replace(mask, masks=[without_key_0(m) for m in mask.masks])
    else:
        mask = without_key_0(mask)
    query, key, value = tensors(mask, 9, torch.float32)
    poison(mask, key, value)
    assert key[:, :, 0].isnan().all()
    plan = mask.lower(fused=True)
    slot = torch.arange(plan.index.shape[-1])
    plan = replace(plan, index=plan.index.masked_fill(slot >= plan.count[..., None], 0))
    if plan.bits is not None:
        edge = torch.arange(plan.bits.shape[2])
        past = edge >= (plan.count - plan.full)[..., None]
        plan = replace(plan, bits=plan.bits.masked_fill(past[..., None], -1))
    agree(mask, (query, key, value), plan=plan)


def without_key_0(mask):
    death = torch.full((1, 1, mask.keys), LifetimeMask.INF, dtype=torch.int32)
    death[..., 0] = 0
    return mask & LifetimeMask(death, mask.queries)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_the_tiles_is_written_and_no_other(kind):
    from dynmask.kernels.triton.decode import decode
    from dynmask.kernels.triton.prefill import prefill

    mask = cut(kind)
    query, key, value = tensors(mask, 10, torch.float32)
    truth, norm = attention(query, key, value, mask, return_lse=True, impl="triton")
    for run, tile, rows in ((prefill, 32, (3, 66)), (decode, 1, (40, 43))):
        plan = mask.lower(rows, tile, fused=True)
        out, lse = torch.full_like(truth, NAN), torch.full_like(norm, NAN)
        run(query, key, value, None, plan_tensors(plan), 8**-0.5, out, lse)
        written = torch.zeros(mask.queries, dtype=torch.bool)
        for first, n in zip(plan.row.tolist(), plan.rows.tolist(), strict=True):
            written[first : first + n] = True
        assert kind == "placed" or written.sum() == rows[1] - rows[0]
        assert out[:, :, ~written].isnan().all() and lse[:, :, ~written].isnan().all()
        torch.testing.assert_close(out[:, :, written], truth[:, :, written])
        torch.testing.assert_close(lse[:, :, written], norm[:, :, written])


@pytest.mark.parametrize("shape", [(1, 16, 1), (64, 64, 2), (256, 32, 3)])
def test_how_the_kernel_is_compiled_changes_no_answer(shape):
    from dynmask.kernels.triton.prefill import Config, prefill

    mask = cut("structural", queries=40)
    query, key, value = tensors(mask, 11, torch.float32)
    truth, norm = attention(query, key, value, mask, return_lse=True, impl="reference")
    out, lse = torch.full_like(truth, NAN), torch.full_like(norm, NAN)
    plan = plan_tensors(mask.lower(tile=16, fused=True))
    config = Config(shape[0], shape[1], 4, shape[2])
    prefill(query, key, value, None, plan, 8**-0.5, out, lse, config)
    torch.testing.assert_close(out, truth, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, norm, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("splits", [*range(1, 8), 11])
def test_decoding_in_any_number_of_splits(splits):
    """More splits than keys, lists of no key, key blocks and several batch rows too."""
    from dynmask.kernels.triton.decode import decode

    death = torch.zeros(2, GROUPS, 90, dtype=torch.int32)
    death[0, 0] = 90  # 90 keys, 3 keys, and two lists of none
    death[0, 1, [4, 40, 89]] = 90
    blocks = block(generator(3), 90, 1, 2, HEADS, 16, 24)
    for mask in (LifetimeMask(death, 1), blocks):
        query, key, value = tensors(mask, 12, torch.float32)
        poison(mask, key, value)
        truth, norm = attention(query, key, value, mask, return_lse=True, impl="reference")
        out, lse = torch.full_like(truth, NAN), torch.full_like(norm, NAN)
        plan = plan_tensors(mask.lower(fused=True))
        decode(query, key, value, None, plan, 8**-0.5, out, lse, splits=splits, step=16)
        torch.testing.assert_close(out, truth, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(lse, norm, rtol=2e-5, atol=2e-6)


def test_prefix_chunks_and_tokens_agree_for_lifetimes():
    g, n, width = generator(14), 61, 9
    scores = torch.randn(1, GROUPS, n, generator=g).round(decimals=1)  # with ties
    whole = LifetimeMask.top_w(scores, width)
    query, key, value = tensors(whole, 14, torch.float32)
    full = attention(query, key, value, whole, impl="triton")
    for first, last in ((0, 45), (42, 45), (44, 45), (60, 61)):
        mask = LifetimeMask.top_w(scores[..., :last], width, queries=last - first)
        args = (query[:, :, first:last], key[:, :, :last], value[:, :, :last])
        part = attention(*args, mask, impl="triton")
        torch.testing.assert_close(part, full[:, :, first:last], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("queries", [KEYS, 1])
def test_disjoint_masks_merge_by_log_sum_exp(queries):
    first = torch.rand(1, GROUPS, KEYS, generator=generator(15)) < 0.5
    life = (torch.arange(KEYS) + 12).int().expand(1, GROUPS, KEYS)
    death = [torch.where(m, life, torch.zeros_like(life)) for m in (first, ~first)]
    parts = [LifetimeMask(d, queries) for d in death]
    args = tensors(parts[0], 15, torch.float32)
    (a, la), (b, lb) = (attention(*args, m, return_lse=True, impl="triton") for m in parts)
    out, lse = merge(a, la, b, lb)
    truth, norm = attention(*args, parts[0] | parts[1], return_lse=True, impl="reference")
    torch.testing.assert_close(out, truth, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, norm, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("queries", [KEYS, 1])
@pytest.mark.parametrize("kind", ["causal", "top-w", "structural"])
def test_keys_biased_to_minus_infinity_are_as_if_masked(kind, queries):
    mask = cut(kind, queries=queries)
    args = tensors(mask, 16, torch.float32)
    bias = torch.zeros(1, GROUPS, KEYS)
    bias[:, 0, : KEYS // 2], bias[:, 1] = -INF, -INF
    out, lse = agree(mask, args, bias)
    assert (out[:, GROUPS:] == 0).all() and (lse[:, GROUPS:] == -INF).all()


@pytest.mark.parametrize("queries", [KEYS, 1])
def test_a_finite_bias_stays_finite(queries):
    """The most negative number is a usual way to say "no": among equals it hides nobody."""
    mask = cut("top-w", queries=queries)
    query, key, value = tensors(mask, 6, torch.float32)
    bias = torch.full((1, 1, KEYS), torch.finfo(torch.float32).min)
    out = attention(query, key, value, mask, bias, scale=0.0, impl="triton")
    mean = attention(query, key, value, mask, scale=0.0, impl="reference")
    torch.testing.assert_close(out, mean)


@pytest.mark.parametrize("scale", [1e-46, 1e-300, -1e-300])
def test_a_scale_that_float32_cannot_hold_is_zero(scale):
    mask = cut("any lifetimes")
    args = tensors(mask, 6, torch.float32)
    out = attention(*args, mask, scale=scale, impl="triton")
    torch.testing.assert_close(out, attention(*args, mask, scale=0.0, impl="reference"))


@pytest.mark.parametrize("queries", [KEYS, 1])
def test_lists_without_any_block_give_zero(queries):
    blocks = -(-KEYS // 16) if queries > 1 else 1
    mask = BlockMask(torch.empty(1, 1, blocks, 0, dtype=torch.int32), 16, 16, KEYS, queries)
    out, lse = attention(*tensors(mask, 6, torch.float32), mask, return_lse=True, impl="triton")
    assert (out == 0).all() and (lse == -INF).all()


def test_tiles_are_those_that_the_fused_kernels_prefer():
    for kind in ("structural", "blocks", "top-w"):
        mask = cut(kind, keys=300, queries=300)
        assert mask.lower(fused=True).tile == mask.preferred_tile(fused=True)


def test_logits_of_any_size_do_not_overflow():
    for queries in (40, 1):
        mask = lifetime(generator(6), 40, queries, 1, GROUPS, 2)
        query, key, value = tensors(mask, 17, torch.float32)
        agree(mask, (query * 10, key * 4, value), rtol=2e-4)  # their exponentials would


def test_long_inputs_are_lowered_a_range_at_a_time(monkeypatch):
    module = __import__("sys").modules["dynmask.attention"]
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 27)
    monkeypatch.setattr(module, "LIST_BYTES", 1)
    for kind in ("top-w", "true mask", "odd blocks", "placed"):
        mask = cut(kind)
        agree(mask, tensors(mask, 18, torch.float32))


def test_lists_may_be_even_or_not():
    """Heads with the longest lists start first, unless a constructor knows that all are alike."""
    death = (torch.arange(50) + torch.tensor([2, 50])[:, None]).int()[None]
    args = tensors(LifetimeMask(death), 19, torch.float32)
    for most in (None, 50):
        mask = LifetimeMask(death, most=most)
        assert mask.lower(fused=True).even == (most is not None)
        agree(mask, args)


# The operators, and what is refused


def test_the_operators_keep_what_they_promise():
    """Schemas, shapes while tracing and AOT dispatch of every operator."""
    opcheck, op = torch.library.opcheck, torch.ops.dynmask
    g = generator(20)
    opcheck(op.lifetimes.default, (torch.randn(1, 2, 20, generator=g), 5))
    opcheck(op.lifetimes.default, (torch.randn(1, 20, 2, generator=g).transpose(1, 2), 5))
    death = torch.randint(0, 40, (2, 2, 30), generator=g).int()
    for first, tile in ((4, 16), (27, 1), (29, 1)):
        opcheck(op.alive_lists.default, (death, first, 30, tile, 30))
    chosen = torch.rand(1, 2, 3, 3, generator=g) < 0.5
    opcheck(op.block_lists.default, (chosen, 16, 16, 40, 0, 3))
    blocks, patterns = block(g, 40, 40, 2, 2, 16, 16), structural(g, 40, 40, 1, 2, 0)
    plan = blocks.lower(fused=True)
    args = (plan.position, plan.rows, 2)
    opcheck(op.block_plan.default, (blocks.index, *args, 16, 16, 0))
    plan = patterns.lower(tile=16, fused=True)
    offset = torch.tensor([[[20, 3, 0, -15]]]).int().expand(1, 2, -1).contiguous()
    words = torch.tensor([1, 7, 2**15, 2**15]).int().expand(1, 2, -1)[..., None].contiguous()
    found = torch.full((1, 2), 4, dtype=torch.int32)
    columns = patterns._is_vertical().to(torch.uint8)
    tables = (offset, words, found - 3, found, patterns.verticals, columns)
    opcheck(op.pattern_lists.default, (*tables, plan.position, plan.rows, 1))
    opcheck(op.pattern_table.default, (patterns.diagonals, patterns.verticals, 40, 40, 16, 0, 55))
    for mask in (LifetimeMask(death), LifetimeMask(death, 1), blocks, patterns):
        query, key, value = tensors(mask, 20, torch.float32)
        plan = plan_tensors(mask.lower(fused=True))
        lists, rule = plan[:9], plan[9:]
        out, lse = torch.zeros_like(query), torch.zeros(query.shape[:3])
        for norm in (None, lse):
            opcheck(op.attend.default, (query, key, value, None, *lists, *rule, 0.3, out, norm))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("queries", [20, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_selection_and_attention_are_traced_as_one_graph(fused, queries, monkeypatch):
    if fused:  # top_w by the operator as well, as on a GPU
        monkeypatch.setattr(ops, "fused", lambda device: True)

    def run(query, key, value, scores):
        mask = LifetimeMask.top_w(scores, 5, queries, check=False)
        return attention(query, key, value, mask, impl="triton")

    args = tensors(lifetime(generator(0), 20, queries, 1, 1, 3), 21, torch.float32)
    scores = torch.randn(1, GROUPS, 20, generator=generator(21))
    torch._dynamo.reset()
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*args, scores)
    assert torch.equal(out, run(*args, scores))


def x(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (x(1, 2, 4, 8, dtype=torch.float64), "expected float16, bfloat16 or float32, received"),
        (x(1, 2, 4, 257), "expected head dims up to 256, received 257 and 257"),
    ],
)
def test_refusals(tensor, message):
    with pytest.raises(ValueError, match=f'impl="triton": {message}'):
        attention(tensor, tensor, tensor, LifetimeMask.causal(4), impl="triton")


def test_what_is_missing_is_named(monkeypatch):
    y = x(1, 2, 4, 8)
    monkeypatch.setattr(ops, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="expected tensors on a GPU, received them on cpu"):
        attention(y, y, y, LifetimeMask.causal(4), impl="triton")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'dynmask\[triton\]'"):
        attention(y, y, y, LifetimeMask.causal(4), impl="triton")


def on_gpu(dtype=torch.float16, requires_grad=False, dim=64):
    """As much of a tensor on a GPU as a choice looks at."""
    return SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, requires_grad=requires_grad, shape=(1, 1, 1, dim)
    )


def test_auto_takes_the_triton_kernels_where_they_can_run(monkeypatch):
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    n = 2 * DENSE_KEYS
    window, causal = LifetimeMask.window(n, 9), LifetimeMask.causal(n)

    def chosen(query, mask, *others, bias=None, lse=False):
        return choose(query, mask, bias, lse, others).impl

    assert chosen(on_gpu(), window) == "triton"
    assert chosen(on_gpu(), window.lower(), lse=True) == "triton"
    assert chosen(on_gpu(), LifetimeMask.window(n, 9, 1)) == "triton"
    assert chosen(on_gpu(), causal) == "sdpa"
    assert chosen(on_gpu(), LifetimeMask.causal(n, 1)) == "sdpa"
    assert chosen(on_gpu(), causal, bias=on_gpu()) == "triton"
    assert chosen(on_gpu(), LifetimeMask.causal(n, n - 1)) == "triton"
    assert chosen(on_gpu(), LifetimeMask.window(DENSE_KEYS, 9)) == "sdpa"
    assert chosen(on_gpu(), LifetimeMask.window(DENSE_KEYS, 9), lse=True) == "triton"
    assert chosen(on_gpu(), LifetimeMask.window(DENSE_KEYS, 9, 1)) == "triton"
    assert chosen(on_gpu(torch.float64), window) == "cpu"
    assert chosen(on_gpu(), window, on_gpu(dim=257)) == "cpu"
    assert chosen(on_gpu(), window.lower(tile=257)) == "cpu"
    assert chosen(x(1), window) == "cpu"
    for position in range(3):
        group = [on_gpu(requires_grad=position == i) for i in range(3)]
        assert chosen(group[0], window, group[1], bias=group[2]) == "triton"
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert chosen(on_gpu(), window) == "cpu"


@INTERPRETED
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    members=st.integers(1, 5),
    rows=st.integers(1, 70) | st.integers(127, 200),
    more=st.integers(0, 140),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_worth_is_that_of_tensor_operations(
    batch, groups, members, rows, more, shared, dtype, seed
):
    g, heads, keys = torch.Generator().manual_seed(seed), groups * members, rows + more
    query = 3 * torch.randn(batch, rows, heads, 24, generator=g).to(dtype).transpose(1, 2)
    key = torch.randn(batch, groups, keys, 24, generator=g).to(dtype)
    window = torch.randint(1, keys + 9, (1 if shared else batch, heads), generator=g)
    found = ops.key_worth(query, key, window)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, key_worth(query, key, window), atol=2e-6, rtol=1e-5)


def test_worth_in_many_chunks_and_to_rows_of_nan(monkeypatch):
    monkeypatch.setattr("dynmask.kernels.triton.worth.PROGRAMS", 10**6)
    query, key = torch.randn(1, 2, 130, 16), torch.randn(1, 1, 1100, 16)
    query[0, 0, 3] = float("nan")
    window = torch.tensor([[1, 700]])
    found = ops.key_worth(query, key, window)
    torch.testing.assert_close(found, key_worth(query, key, window), atol=2e-6, rtol=1e-5)
    assert (found[0, 1, 1100 - 700 :] == 0).all(), "what is in every row's window is worth nothing"


@INTERPRETED
@given(
    groups=st.integers(1, 3),
    members=st.integers(1, 5),
    lifetimes=st.sampled_from(["one", "groups", "heads"]),
    queries=st.integers(1, 90),
    more=st.integers(0, 140),
    window=st.sampled_from([None, 1, 60]),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_kept_mass_is_that_of_tensor_operations(
    groups, members, lifetimes, queries, more, window, shared, dtype, seed
):
    g, heads, keys = torch.Generator().manual_seed(seed), groups * members, queries + more
    query = 3 * torch.randn(2, queries, heads, 24, generator=g).to(dtype).transpose(1, 2)
    key = torch.randn(2, groups, keys, 24, generator=g).to(dtype)
    size = (1 if shared else 2, {"one": 1, "groups": groups, "heads": heads}[lifetimes], keys)
    mask = LifetimeMask(torch.randint(keys + 50, size, generator=g).int(), queries).expand(2)
    rows = sampled_rows(queries, 17)
    position = torch.tensor(rows, dtype=torch.int32) + mask.offset
    found = ops.kept_share(
        query[:, :, rows], key, position, mask.death, 0.3, min(window or keys, keys)
    )
    exact = kept_mass(query, key, mask, rows, 0.3, window)
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)
