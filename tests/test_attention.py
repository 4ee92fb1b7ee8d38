"""attention() by hand and its refusals."""

import math
from dataclasses import replace

import pytest
import torch

from dynmask import LifetimeMask, attention
from dynmask.attention import choose
from dynmask.kernels.cpu import cpu_attention, gather_rows
from dynmask.kernels.reference import reference_attention
from dynmask.masks.base import repeat_heads
from dynmask.plan import Tiles

T = torch.tensor


def test_four_tokens_by_hand():
    """All logits are 0, so each row is the mean of the values it may read."""
    query = key = torch.zeros(1, 1, 4, 2)
    value = T([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
    mask = LifetimeMask.window(4, 2)
    for impl in ("cpu", "reference"):
        out, lse = attention(query, key, value, mask, return_lse=True, impl=impl)
        torch.testing.assert_close(out.flatten(), T([1.0, 1.5, 2.5, 3.5]))
        torch.testing.assert_close(lse.flatten(), T([1.0, 2.0, 2.0, 2.0]).log())


def test_bias_and_scale_by_hand():
    query = T([[[[2.0]]]])
    key = T([[[[0.0], [1.0]]]])
    value = T([[[[0.0], [1.0]]]])
    bias = T([[[0.5, 0.0]]])
    for impl in ("cpu", "reference"):
        out = attention(query, key, value, LifetimeMask.causal(2, 1), bias, 3.0, impl=impl)
        assert math.isclose(out.item(), 1 / (1 + math.exp(0.5 - 6)), rel_tol=1e-6)


def test_a_query_head_reads_the_kv_head_of_its_group():
    query, key = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 1, 2)
    value = T([10.0, 20.0]).view(1, 2, 1, 1)
    for impl in ("cpu", "reference", "sdpa"):
        out = attention(query, key, value, LifetimeMask.causal(1), impl=impl)
        assert out.flatten().tolist() == [10, 10, 20, 20]


def test_auto_takes_sdpa_for_plain_causal_masks_only(monkeypatch):
    ran = []
    module = __import__("sys").modules["dynmask.attention"]
    for name in ("_sdpa", "cpu_attention"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, n=name, f=original, **kw: (ran.append(n), f(*a, **kw))[1]
        )
    x = torch.randn(1, 2, 8, 4)
    attention(x, x, x, LifetimeMask.causal(8))
    attention(x, x, x, LifetimeMask.window(8, 3))
    attention(x, x, x, LifetimeMask.causal(8), return_lse=True)
    attention(x, x, x, LifetimeMask.causal(8), bias=torch.zeros(1, 1, 8))
    assert ran == ["_sdpa", "cpu_attention", "cpu_attention", "cpu_attention"]
    ran.clear()
    attention(x, x, x, LifetimeMask.window(8, 99))  # these leave nothing out, and know it
    attention(x, x, x, LifetimeMask.top_w(torch.randn(1, 2, 8), 8))
    assert ran == ["_sdpa", "_sdpa"]


def test_auto_takes_sdpa_for_plain_causal_chunks_on_the_cpu():
    for queries in (1, 3, 8):
        mask = LifetimeMask.causal(8, queries)
        assert choose(torch.randn(1, 2, queries, 4), mask, None, False).impl == "sdpa"


def test_keys_biased_to_minus_infinity_are_as_if_masked():
    query, key, value = (
        torch.randn(1, 2, 50, 8),
        torch.randn(1, 1, 4200, 8),
        torch.randn(1, 1, 4200, 8),
    )
    bias = torch.zeros(1, 1, 4200)
    bias[..., :2100] = float("-inf")
    mask = LifetimeMask.causal(4200, 50)
    out = attention(query, key, value, mask, bias, impl="cpu")
    torch.testing.assert_close(out, attention(query, key, value, mask, bias, impl="reference"))
    bias[:] = float("-inf")
    for impl in ("cpu", "reference"):
        out, lse = attention(query, key, value, mask, bias, return_lse=True, impl=impl)
        assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("queries", [9, 1])
def test_autocast_changes_nothing(queries):
    mask = LifetimeMask.window(9, 4, queries)
    query, key = torch.randn(1, 2, queries, 8), torch.randn(1, 2, 9, 8)
    for impl in ("cpu", "reference"):
        plain = attention(query, key, key, mask, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(query, key, key, mask, impl=impl), plain)


def test_decoding_reads_the_bias_and_no_key_beyond_its_lists():
    """Lists of one row are padded to the longest: the padding is key 0, which nobody reads."""
    death = T([[0, 9, 9, 9, 9], [0, 2, 3, 4, 9]]).int()[None]
    mask = LifetimeMask(death, 1)
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    bias = torch.randn(1, 2, 5)
    truth = attention(query, key, value, mask, bias, impl="reference")
    key[:, :, 0], value[:, :, 0] = float("nan"), float("nan")
    torch.testing.assert_close(attention(query, key, value, mask, bias, impl="cpu"), truth)
    assert not torch.allclose(attention(query, key, value, mask, impl="cpu"), truth)


def test_decoding_gives_0_where_a_list_is_empty_or_biased_away():
    death = T([[9, 9, 9, 9, 9], [0, 0, 0, 0, 0], [9, 0, 9, 0, 0]]).int()[None]
    mask = LifetimeMask(death, 1)
    query, key, value = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    bias = torch.zeros(2, 3, 5)
    bias[:, 2] = float("-inf")
    key[:, 1], value[:, 1] = float("nan"), float("nan")
    out, lse = attention(query, key, value, mask, bias, impl="cpu", return_lse=True)
    assert not out[:, 1:].any() and torch.isneginf(lse[:, 1:]).all()
    whole = attention(query, key, value, LifetimeMask.causal(5, 1), impl="sdpa")
    torch.testing.assert_close(out[:, 0], whole[:, 0])
    plan = mask.expand(2).lower(tile=1)
    listed = torch.arange(plan.index.shape[-1]) < plan.count[..., None]
    plan = replace(plan, index=plan.index.masked_fill(~listed, 10**6))  # padding is anything
    again = torch.empty_like(out)
    cpu_attention(query, key, value, plan, bias, 8**-0.5, again, None)
    torch.testing.assert_close(again, out)


LAYOUTS = {
    "plain": lambda: torch.randn(2, 3, 7, 8),
    "part of a store": lambda: torch.randn(2, 3, 20, 8)[:, :, 4:11],
    "part of each row": lambda: torch.randn(2, 3, 9, 11)[:, :, 1:8, 2:10],
    "tokens first": lambda: torch.randn(2, 7, 3, 8).transpose(1, 2),
    "of a joint projection": lambda: torch.randn(2, 7, 9, 8)[:, :, 3:6].transpose(1, 2),
    "shared": lambda: torch.randn(1, 1, 7, 8).expand(2, 3, 7, 8),
    "one key": lambda: torch.randn(1, 1, 1, 8).expand(2, 3, 7, 8),
    "columns first": lambda: torch.randn(2, 3, 8, 7).transpose(2, 3),
    "numbers": lambda: torch.randn(2, 3, 7),
    "bfloat16": lambda: torch.randn(2, 3, 7, 8).bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_taken_from_any_layout(layout):
    x = LAYOUTS[layout]()
    batch, head = torch.randint(2, (5, 1, 1)), torch.randint(3, (4, 1))
    key = torch.randint(7, (5, 4, 6))
    assert torch.equal(gather_rows(x, batch, head, key), x[batch, head, key])


def test_values_may_be_wider_than_keys():
    mask = LifetimeMask.window(9, 4)
    query, key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 6)
    out = attention(query, key, value, mask)
    torch.testing.assert_close(out, attention(query, key, value, mask, impl="reference"))
    assert out.shape == (1, 2, 9, 6)


def test_the_reference_scales_by_default_and_computes_halves_in_float32():
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    visible = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
    torch.testing.assert_close(reference_attention(query, key, key, visible)[0], truth)
    half = [x.bfloat16() for x in (query, key, key)]
    out, lse = reference_attention(*half, visible)
    wide, norm = reference_attention(*(x.float() for x in half), visible)
    assert torch.equal(out, wide.bfloat16()) and torch.equal(lse, norm)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_gradient_comes_from_keys_that_no_row_reads(impl):
    """They may hold NaN, and 0 times NaN is NaN."""
    death = T([0, 9, 2, 0, 9, 9]).int().view(1, 1, 6)
    query, key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    key[:, :, [0, 2, 3]], value[:, :, [0, 2, 3]] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    attention(*leaves, LifetimeMask(death), impl=impl).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (key.grad[:, :, [0, 2, 3]] == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_bias_may_be_shared_by_the_batch(impl, heads):
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bias, mask = torch.randn(1, heads, 9), LifetimeMask.window(9, 4)
    out = attention(query, key, value, mask, bias, impl=impl)
    same = attention(query, key, value, mask, bias.repeat(2, 1, 1), impl=impl)
    torch.testing.assert_close(out, same)


@pytest.mark.parametrize("queries", [40, 17, 1])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_sdpa_computes_what_the_mask_says(queries, heads, monkeypatch):
    """Plain causal or written out, a range of rows at a time; rows that see no key give 0."""
    monkeypatch.setattr(__import__("sys").modules["dynmask.attention"], "ROWS_AT_A_TIME", 16)
    g = torch.Generator().manual_seed(queries)
    query, key, value = (
        torch.randn(2, h, n, 8, generator=g) for h, n in ((4, queries), (2, 40), (2, 40))
    )
    death = torch.randint(0, 60, (2, heads, 40), generator=g).int()
    death[0, 0] = 0  # rows that are all empty
    masks = [
        LifetimeMask(death, queries),
        LifetimeMask.top_w(torch.randn(2, heads, 40, generator=g), 5, queries),
    ]
    for mask in (*masks, LifetimeMask.window(40, 7, queries), LifetimeMask.causal(40, queries)):
        out = attention(query, key, value, mask, scale=0.7, impl="sdpa")
        truth = attention(query, key, value, mask, scale=0.7, impl="reference")
        torch.testing.assert_close(out, truth)
        empty = repeat_heads(~mask.dense().any(-1), 4).expand(2, -1, -1)
        assert (out[empty] == 0).all()


def test_sdpa_may_give_anything_for_rows_without_keys(monkeypatch):
    """What it gives for them depends on the backend."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def careless(*args, attn_mask, **kwargs):
        out = sdpa(*args, attn_mask=attn_mask, **kwargs)
        return out.masked_fill(~attn_mask.any(-1, keepdim=True), float("nan"))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", careless)
    mask = LifetimeMask(T([0, 9, 9, 9]).int().view(1, 1, 4))
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    out = attention(query, key, key, mask, impl="sdpa")
    torch.testing.assert_close(out, attention(query, key, key, mask, impl="reference"))


@pytest.mark.parametrize("queries", [9, 4])
def test_what_lifetimes_know_of_themselves_is_true(queries):
    """``is_causal`` chooses the kernel and ``most`` sizes the lists: neither is looked up again."""
    g = torch.Generator().manual_seed(1)
    causal = LifetimeMask.causal(9, queries).dense()
    scores = torch.randn(1, 2, 9, generator=g)
    known = [LifetimeMask.streaming(9, s, w, queries) for s in (0, 2) for w in (1, 6, 7, 8, 9, 12)]
    known += [LifetimeMask.top_w(scores, w, queries) for w in (1, 3, 8, 9, 12)]
    unknown = LifetimeMask(torch.randint(0, 12, (1, 2, 9), generator=g).int(), queries)

    def is_whole(mask):
        return bool((mask.dense() == causal).all())

    def longest(mask):
        return int(mask.dense().sum(-1).max())

    for a in known:
        assert (a.is_causal, a.most, a.queries) == (is_whole(a), longest(a), queries)
        for b in (*known, unknown):
            for one, other in ((a, b), (b, a)):
                both, either = one & other, one | other
                assert both.is_causal == is_whole(both) and longest(both) <= both.most <= 9
                assert either.is_causal == (a.is_causal or b.is_causal)
                assert is_whole(either) or not either.is_causal
                assert (either.most is None) == (b is unknown)
                assert either.most is None or longest(either) <= either.most <= 9


@pytest.mark.parametrize("borders", [(), (5, 12), (9, 13, 30), (3, 20, 99), (9, 11), (21,)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_tiles_cover_each_row_once_and_straddle_no_border(borders, size):
    tiles = Tiles.cut(2, (2, 18), 3, size, torch.device("cpu"), borders)
    first = tiles.position.tolist()
    each = len(tiles) // 2
    stop = [p + n for p, n in zip(first, tiles.rows.tolist(), strict=True)]
    covered = [q for a, b in zip(first, stop, strict=True) for q in range(a, b)]
    assert covered == [*range(5, 21)] * 2 and (tiles.first, tiles.stop) == (5, 21)
    assert torch.equal(tiles.row + 3, tiles.position) and bool((tiles.rows > 0).all())
    assert tiles.batch.tolist() == [0] * each + [1] * each
    assert int(tiles.rows.max()) <= size
    assert not any(a < x < b for a, b in zip(first, stop, strict=True) for x in borders)
    assert tiles.regular == (first[:each] == [*range(5, 21, size)])


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


MASK = LifetimeMask.causal(4)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((x(2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {}, "query: expected a floating"),
        ((x(1, 2, 4, 8).int(), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {}, "query: expected"),
        (([1], x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {}, "received list"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8).double(), x(1, 2, 4, 8), MASK), {}, "key: expected"),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8, device="meta"), x(1, 2, 4, 8), MASK),
            {},
            "on cpu like query, received",
        ),
        ((x(1, 2, 4, 8), x(1, 2, 4, 6), x(1, 2, 4, 8), MASK), {}, "key: expected"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 5, 8), MASK), {}, "value: expected"),
        ((x(1, 3, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {}, "multiple of the 2 kv heads"),
        ((x(1, 2, 4, 8), x(1, 2, 5, 8), x(1, 2, 5, 8), MASK), {}, "mask_or_plan: expected one"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), None), {}, "received NoneType"),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), LifetimeMask.causal(4).expand(3)),
            {},
            "mask_or_plan: expected one for 1 batch rows",
        ),
        (
            (x(2, 2, 4, 8), x(2, 2, 4, 8), x(2, 2, 4, 8), LifetimeMask.causal(4).lower()),
            {},
            "mask_or_plan: expected one for 2 batch rows",
        ),
        (
            (x(1, 4, 4, 8), x(1, 4, 4, 8), x(1, 4, 4, 8), LifetimeMask(x(1, 3, 4).int())),
            {},
            r"expected 1, 4 \(kv\) or 4 \(query\) heads, received 3",
        ),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), LifetimeMask.causal(4, device="meta")),
            {},
            "received on meta",
        ),
        ((x(0, 2, 4, 8), x(0, 2, 4, 8), x(0, 2, 4, 8), MASK), {}, "expected no empty dimension"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {"bias": x(1, 2, 5)}, "bias: exp"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {"impl": "fast"}, "impl: expected"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {"bias": [0]}, "received list"),
        ((x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK), {"scale": "a"}, "scale: expected"),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK),
            {"scale": float("nan")},
            "finite number",
        ),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), LifetimeMask.window(4, 2)),
            {"impl": "sdpa", "return_lse": True},
            "expected a mask, no bias",
        ),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK),
            {"impl": "sdpa", "bias": x(1, 1, 4)},
            "expected a mask, no bias",
        ),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK.lower()),
            {"impl": "sdpa"},
            "expected a mask, no bias",
        ),
        ((x(1, 2, 4, 8), x(2, 2, 4, 8), x(2, 2, 4, 8), MASK), {}, r"key: expected \[1, kv"),
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), LifetimeMask.causal(4, 2)),
            {},
            "received 1 batch rows, 2 queries and 4 keys",
        ),
    ],
)
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attention(*args, **kwargs)


@pytest.mark.parametrize(
    "bias",
    [x(2, 4), x(1, 2, 4, 4), x(3, 2, 4), x(1, 3, 4), x(1, 2, 4, device="meta"), x(1, 2, 4).int()],
)
def test_a_bias_that_does_not_fit_is_refused(bias):
    with pytest.raises(ValueError, match="bias: expected floating"):
        attention(x(1, 4, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), MASK, bias)
