"""attention() by hand and its refusals."""

import math

import pytest
import torch

from dynmask import LifetimeMask, attention

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


def test_values_may_be_wider_than_keys():
    mask = LifetimeMask.window(9, 4)
    query, key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 6)
    out = attention(query, key, value, mask)
    torch.testing.assert_close(out, attention(query, key, value, mask, impl="reference"))
    assert out.shape == (1, 2, 9, 6)


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
        (
            (x(1, 2, 4, 8), x(1, 2, 4, 8), x(1, 2, 4, 8), LifetimeMask.window(4, 2)),
            {"impl": "sdpa", "return_lse": True},
            "expected a mask, no bias",
        ),
    ],
)
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attention(*args, **kwargs)
