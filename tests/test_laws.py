"""The laws: what holds for every mask, every kernel, every size."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask import LifetimeMask, PlacedMask, attention, spans_left_padded, spans_packed
from dynmask.kernels.cpu import merge
from dynmask.masks.base import repeat_heads
from dynmask.policies import Layer
from tests.strategies import (
    GROUPS,
    HEADS,
    generator,
    masks,
    placed_masks,
    simple_masks,
    sizes,
    tensors,
)

SDPA = torch.nn.functional.scaled_dot_product_attention
KERNELS = ["cpu", "reference"]


@given(masks(), st.sampled_from([None, 1, 7, 32, 50, 128]))
def test_a_plan_means_what_its_mask_means(mask, tile):
    plan = mask.lower(tile=tile) if not isinstance(mask, PlacedMask) or tile else mask.lower()
    assert torch.equal(plan.dense(), mask.dense())


@given(masks(), st.data())
def test_a_range_of_rows_is_those_rows(mask, data):
    first = data.draw(st.integers(0, mask.queries - 1))
    last = data.draw(st.integers(first + 1, mask.queries))
    rows = mask.dense()[:, :, first:last]
    assert torch.equal(mask.dense((first, last)), rows)
    lowered = mask.lower((first, last)).dense()
    assert torch.equal(lowered[:, :, first:last], rows)
    assert int(lowered.sum()) == int(rows.sum())


@given(masks())
def test_full_entries_need_no_mask_and_lists_name_no_key_twice(mask):
    plan = mask.lower()
    for head in range(plan.heads):
        for t in range(plan.tiles):
            full, count = int(plan.full[head, t]), int(plan.count[head, t])
            listed = plan.index[head, t, :count].tolist()
            assert len(set(listed)) == count
            assert listed[:full] == sorted(listed[:full])
            assert listed[full:] == sorted(listed[full:])


@given(simple_masks())
def test_density_is_kept_pairs_over_causal_pairs(mask):
    kept = mask.dense().sum((-1, -2)) / mask.causal_pairs()
    torch.testing.assert_close(mask.density().double(), kept.double(), rtol=1e-6, atol=1e-7)


@given(masks())
def test_a_plan_counts_its_pairs(mask):
    if not isinstance(mask, PlacedMask):
        assert torch.equal(mask.lower().kept(), mask.dense().sum((-1, -2)))
        kept = mask.dense().sum((-1, -2)) / mask.causal_pairs()
        torch.testing.assert_close(mask.density().double(), kept.double(), rtol=1e-6, atol=1e-7)
    else:
        assert int(mask.lower().kept().sum()) == int(mask.dense().sum())


@given(simple_masks())
def test_no_mask_sees_the_future(mask):
    q = torch.arange(mask.offset, mask.keys)[:, None]
    assert not (mask.dense() & (torch.arange(mask.keys) > q)).any()


@given(st.data())
def test_union_and_limit_are_or_and_and(data):
    a = data.draw(simple_masks())
    b = data.draw(simple_masks(a.batch, (a.keys, a.queries)))
    heads = max(a.heads, b.heads)
    both = repeat_heads(a.dense(), heads) | repeat_heads(b.dense(), heads)
    assert torch.equal(repeat_heads((a | b).dense(), heads), both)
    window = LifetimeMask.window(a.keys, data.draw(st.integers(1, a.keys)), a.queries)
    assert torch.equal((a & window).dense(), a.dense() & window.dense())
    assert torch.equal(((a | b) & window).dense(), (a | b).dense() & window.dense())


@given(masks(), st.integers(0, 99), st.booleans())
def test_the_cpu_kernel_agrees_with_the_reference(mask, seed, biased):
    query, key, value = tensors(mask, seed)
    bias = torch.randn(mask.batch, GROUPS, mask.keys, dtype=torch.float64) if biased else None
    args = (query, key, value, mask, bias)
    out, lse = attention(*args, return_lse=True, impl="cpu")
    truth, norm = attention(*args, return_lse=True, impl="reference")
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, norm, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attention(*args, impl="cpu"), truth, rtol=1e-10, atol=1e-12)


@given(masks())
def test_a_plan_gives_what_its_mask_gives(mask):
    query, key, value = tensors(mask)
    truth = attention(query, key, value, mask, impl="reference")
    for impl in KERNELS:
        out = attention(query, key, value, mask.lower(), impl=impl)
        torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", [*KERNELS, "sdpa"])
@given(sizes(), st.sampled_from([torch.float32, torch.float64]))
def test_the_all_true_mask_is_sdpa(impl, size, dtype):
    keys, queries = size
    mask = LifetimeMask.causal(keys, queries).expand(2)
    query, key, value = tensors(mask, dtype=dtype)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    truth = SDPA(query, repeat_heads(key, HEADS), repeat_heads(value, HEADS), attn_mask=visible)
    torch.testing.assert_close(attention(query, key, value, mask, impl=impl), truth)


@pytest.mark.parametrize("impl", KERNELS)
@given(simple_masks(), st.integers(0, 10**6))
def test_a_masked_key_changes_nothing_bit_for_bit(impl, mask, pick):
    query, key, value = tensors(mask, dtype=torch.float32)
    seen = repeat_heads(mask.dense().expand(mask.batch, -1, -1, -1), HEADS)
    k = pick % mask.keys
    blind = ~seen[:, :, :, k]  # rows that must not notice
    before = attention(query, key, value, mask, impl=impl)
    key[:, :, k], value[:, :, k] = 1e4, -1e4
    after = attention(query, key, value, mask, impl=impl)
    assert torch.equal(before[blind], after[blind])


@pytest.mark.parametrize("impl", KERNELS)
@given(masks())
def test_keys_that_no_row_reads_may_hold_nan(impl, mask):
    query, key, value = tensors(mask)
    truth = attention(query, key, value, mask, impl=impl)
    read = repeat_heads(mask.dense().any(-2), HEADS).view(mask.batch, GROUPS, -1, mask.keys).any(2)
    key[~read], value[~read] = float("nan"), float("nan")
    assert torch.equal(attention(query, key, value, mask, impl=impl), truth)


@given(masks())
def test_rows_that_see_nothing_give_zero(mask):
    query, key, value = tensors(mask)
    empty = repeat_heads(~mask.dense().any(-1), HEADS)
    for impl in KERNELS:
        out, lse = attention(query, key, value, mask, return_lse=True, impl=impl)
        assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
        assert out.isfinite().all() and lse[~empty].isfinite().all()


@pytest.mark.parametrize("impl", KERNELS)
@given(simple_masks(), st.sampled_from([1, 2, 4]))
def test_grouped_heads_are_repeated_heads(impl, mask, groups):
    if mask.heads not in (1, HEADS):
        groups = mask.heads
    query, key, value = tensors(mask, groups=groups)
    grouped = attention(query, key, value, mask, impl=impl)
    key, value = (
        key.repeat_interleave(HEADS // groups, 1),
        value.repeat_interleave(HEADS // groups, 1),
    )
    wide = attention(query, key, value, _for_all_heads(mask), impl=impl)
    torch.testing.assert_close(grouped, wide, rtol=1e-10, atol=1e-12)


def _for_all_heads(mask):
    """A mask whose heads fit tensors with as many kv heads as query heads."""
    if mask.heads in (1, HEADS):
        return mask
    plan = mask.lower()
    return plan.expand_heads(HEADS)


@pytest.mark.parametrize("impl", KERNELS)
@given(placed_masks())
def test_a_batch_with_padding_is_each_sequence_alone(impl, mask):
    query, key, value = tensors(mask)
    out = attention(query, key, value, mask, impl=impl)
    covered = torch.zeros(mask.batch, mask.queries, dtype=torch.bool)
    for own, s in zip(mask.masks, mask.spans, strict=True):
        b = slice(s.batch, s.batch + 1)
        alone = attention(
            query[b, :, s.queries], key[b, :, s.keys], value[b, :, s.keys], own, impl=impl
        )
        torch.testing.assert_close(out[b, :, s.queries], alone, rtol=1e-10, atol=1e-12)
        covered[s.batch, s.queries] = True
    assert (out.transpose(1, 2)[~covered] == 0).all()


@pytest.mark.parametrize("impl", KERNELS)
@given(st.integers(1, 90), st.integers(0, 99), st.integers(1, 30))
def test_prefix_chunks_and_tokens_agree_for_lifetimes(impl, n, seed, width):
    g = generator(seed)
    scores = torch.randn(1, GROUPS, n, generator=g).round(decimals=1)  # with ties
    whole = LifetimeMask.top_w(scores, width)
    query, key, value = tensors(whole, seed)
    full = attention(query, key, value, whole, impl=impl)
    cut = int(torch.randint(1, n + 1, (), generator=g))
    for first, last in ((0, cut), (max(cut - 3, 0), cut), (cut - 1, cut)):
        mask = LifetimeMask.top_w(scores[..., :last], width, queries=last - first)
        part = attention(
            query[:, :, first:last], key[:, :, :last], value[:, :, :last], mask, impl=impl
        )
        torch.testing.assert_close(part, full[:, :, first:last], rtol=1e-10, atol=1e-12)


@given(st.integers(2, 120), st.integers(1, 60), st.integers(0, 99))
def test_disjoint_masks_merge_by_log_sum_exp(n, width, seed):
    g = generator(seed)
    first = torch.rand(1, GROUPS, n, generator=g) < 0.5
    k = torch.arange(n)
    life = (k + width).clamp(max=n).int().expand(1, GROUPS, n)
    parts = [LifetimeMask(torch.where(m, life, torch.zeros_like(life))) for m in (first, ~first)]
    query, key, value = tensors(parts[0], seed)
    (a, la), (b, lb) = (attention(query, key, value, m, return_lse=True) for m in parts)
    out, lse = merge(a, la, b, lb)
    truth, norm = attention(query, key, value, parts[0] | parts[1], return_lse=True)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, norm, rtol=1e-10, atol=1e-12)


@given(masks(), st.booleans())
def test_gradients_are_the_references(mask, biased):
    grads = []
    bias = torch.randn(mask.batch, GROUPS, mask.keys, dtype=torch.float64) if biased else None
    weight = torch.randn(mask.batch, HEADS, mask.queries, 8, dtype=torch.float64)
    for impl in KERNELS:
        leaves = [x.clone().requires_grad_() for x in (*tensors(mask), bias) if x is not None]
        out = attention(*leaves[:3], mask, *leaves[3:], impl=impl)
        (out * weight).sum().backward()
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(simple_masks(), st.integers(0, 99))
def test_the_error_is_no_larger_than_sdpas(dtype, mask, seed):
    """Against float64 on the same rounded inputs. Factor 2: we round the output once, as SDPA
    does, and may add in another order."""
    query, key, value = tensors(mask, seed, dtype, dim=16)
    truth = attention(*(x.double() for x in (query, key, value)), mask, impl="reference")
    visible = repeat_heads(mask.dense().expand(mask.batch, -1, -1, -1), HEADS)
    theirs = SDPA(query, repeat_heads(key, HEADS), repeat_heads(value, HEADS), attn_mask=visible)
    theirs = theirs.masked_fill(~visible.any(-1)[..., None], 0)
    ours = attention(query, key, value, mask, impl="cpu")
    assert ours.dtype == dtype
    error, bound = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= 2 * bound + torch.finfo(dtype).eps * truth.norm()


def test_long_lists_are_computed_in_pieces(monkeypatch):
    monkeypatch.setattr("dynmask.kernels.cpu.KEYS_AT_A_TIME", 16)
    death = torch.randint(0, 120, (2, GROUPS, 100), generator=generator(3)).int()
    for mask in (LifetimeMask(death), LifetimeMask.window(100, 60).expand(2)):
        query, key, value = tensors(mask)
        truth = attention(query, key, value, mask, return_lse=True, impl="reference")
        torch.testing.assert_close(
            attention(query, key, value, mask, return_lse=True, impl="cpu"),
            truth,
            rtol=1e-10,
            atol=1e-12,
        )


def test_long_inputs_are_lowered_a_range_at_a_time(monkeypatch):
    module = sys.modules["dynmask.attention"]
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 32)
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", HEADS * 100 * 13)
    scores = torch.randn(1, GROUPS, 100, generator=generator(5))
    mask = LifetimeMask.top_w(scores, 10, queries=77)
    query, key, value = tensors(mask)
    whole = attention(query, key, value, mask.lower(), impl="reference")
    for impl in KERNELS:
        out = attention(query, key, value, mask, impl=impl)
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-12)


def test_packed_and_left_padded_spans_describe_the_usual_layouts():
    packed = spans_packed(torch.tensor([0, 3, 8]))
    assert [(s.key_start, s.key_stop) for s in packed] == [(0, 3), (3, 8)]
    with pytest.raises(ValueError, match=r"cu_seqlens: expected .* received a tensor \[1, 8\]"):
        spans_packed(torch.arange(8)[None])
    left = spans_left_padded([2, 5], 5, queries=3)
    assert [(s.key_start, s.query_start, s.query_stop) for s in left] == [(3, 1, 3), (0, 0, 3)]


@pytest.mark.parametrize("name", ["full", "streaming"])
def test_causal_policies_choose_alike_for_prefix_and_whole(name):
    from tests.policies import POLICIES

    policy = POLICIES[name]
    assert policy.causal
    query, key, value = tensors(LifetimeMask.causal(60))
    whole = policy(query, key, value, Layer(0)).dense()
    part = policy(query[:, :, 20:40], key[:, :, :40], value[:, :, :40], Layer(0)).dense()
    assert torch.equal(part, whole[:, :, 20:40, :40])
