"""Gradients of attention: those of the reference in float64, for every mask and both kernels."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask import BlockMask, LifetimeMask, attention
from dynmask.attention import DENSE_KEYS, choose
from dynmask.kernels import ops
from dynmask.masks.base import repeat_heads
from tests.conftest import INTERPRETED
from tests.strategies import GROUPS, HEADS, generator, lifetime, masks, poison, tensors
from tests.test_triton import KEYS, KINDS, cut, on_gpu, plan_tensors

NAN, INF = float("nan"), float("inf")
needs_interpreter = pytest.mark.skipif(
    not ops.interpreting(), reason="needs triton and TRITON_INTERPRET=1, which a GPU forbids"
)
IMPLS = ["cpu", pytest.param("triton", marks=needs_interpreter)]
ATTENTION = sys.modules["dynmask.attention"]


@pytest.fixture(autouse=True)
def nothing_unwritten_is_read():
    """PyTorch fills new memory with NaN in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(impl, mask, args, bias, slopes, deterministic=None, scale=None):
    """Gradients of query, key, value and bias for given slopes of the output and its lse."""
    leaves = [x.detach().clone().requires_grad_() for x in args]
    more = None if bias is None else bias.detach().clone().requires_grad_()
    out, lse = attention(
        *leaves, mask, more, scale, return_lse=True, impl=impl, deterministic=deterministic
    )
    total = (out * slopes[0].to(out.dtype)).sum()
    if slopes[1] is not None:  # the lse of a row without keys is a constant
        total = total + (lse.masked_fill(lse == -INF, 0) * slopes[1].to(lse.dtype)).sum()
    total.backward()
    return [x.grad for x in (*leaves, more) if x is not None]


def slopes_of(mask, seed, wide=8, heads=HEADS):
    g = generator(seed)
    shape = (mask.batch, heads, mask.queries)
    return (
        torch.randn(*shape, wide, generator=g, dtype=torch.float64),
        torch.randn(shape, generator=g, dtype=torch.float64),
    )


def agree(impl, mask, args, bias=None, slopes=None, plan=None, rtol=None, **more):
    """Gradients are the reference's in float64, in the types and shapes of the inputs."""
    slopes = slopes_of(mask, 1) if slopes is None else slopes
    wide = None if bias is None else bias.double()
    truth = gradients("reference", mask, [x.double() for x in args], wide, slopes, **more)
    ours = gradients(impl, mask if plan is None else plan, args, bias, slopes, **more)
    inputs = [x for x in (*args, bias) if x is not None]
    for mine, exact, x in zip(ours, truth, inputs, strict=True):
        assert mine.dtype == x.dtype and mine.shape == x.shape
        near = (1e3 if x.dtype == torch.float64 else 50) * torch.finfo(x.dtype).eps
        near = near if rtol is None else rtol
        unit = max(float(exact.abs().max()), 1e-3)
        torch.testing.assert_close(mine.double(), exact, rtol=near, atol=near * unit)
    return ours


def precise(impl):
    return torch.float64 if impl == "cpu" else torch.float32


# Against the reference


@given(masks(), st.sampled_from([None, 1, GROUPS, HEADS]), st.booleans(), st.integers(0, 99))
def test_the_cpu_kernels_gradients_are_the_references(mask, bias_heads, shared, seed):
    bias = None
    if bias_heads:
        shape = (1 if shared else mask.batch, bias_heads, mask.keys)
        bias = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    agree("cpu", mask, tensors(mask, seed), bias, slopes_of(mask, seed))


@needs_interpreter
@INTERPRETED
@given(masks(most=40), st.sampled_from([None, 1, GROUPS, HEADS]), st.integers(0, 99))
def test_the_triton_kernels_gradients_are_the_references(mask, bias_heads, seed):
    bias = None
    if bias_heads:
        bias = torch.randn(mask.batch, bias_heads, mask.keys, generator=generator(seed))
    agree("triton", mask, tensors(mask, seed, torch.float32), bias, slopes_of(mask, seed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_with_any_number_of_queries(kind, impl):
    """Two batch rows, a bias of the kv heads, NaN in whatever no row reads."""
    for queries in (KEYS, 23, 1) if impl == "cpu" else (23,):
        mask = cut(kind, queries=queries, b=2)
        query, key, value = tensors(mask, 3, precise(impl))
        bias = torch.randn(2, GROUPS, KEYS, generator=generator(8)).to(query.dtype)
        poison(mask, key, value)
        grads = agree(impl, mask, (query, key, value), bias)
        empty = repeat_heads(~mask.dense().any(-1), HEADS).expand(2, -1, -1)
        assert (grads[0][empty] == 0).all()
        assert (grads[1][key.isnan()] == 0).all() and (grads[2][value.isnan()] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, HEADS), (2, 1), (1, GROUPS), (2, HEADS)])
def test_the_gradient_of_a_bias_has_its_shape(shape, impl):
    for heads in (1, GROUPS, HEADS) if impl == "cpu" else (3 - shape[0],):
        mask = lifetime(generator(heads), 40, 40, 2, heads, 0)
        bias = torch.randn(*shape, 40, generator=generator(2)).to(precise(impl))
        agree(impl, mask, tensors(mask, 2, precise(impl)), bias)


@pytest.mark.parametrize("impl", IMPLS)
def test_either_result_alone_has_gradients(impl):
    mask = cut("top-w", queries=30)
    args = tensors(mask, 4, precise(impl))
    agree(impl, mask, args, slopes=(slopes_of(mask, 1)[0], None))
    leaves = [[x.clone().requires_grad_() for x in args] for _ in range(2)]
    for run, (query, key, value) in zip((impl, "reference"), leaves, strict=True):
        attention(query, key, value, mask, return_lse=True, impl=run)[1].sum().backward()
        assert run == "reference" or (value.grad == 0).all()
    for mine, exact in zip(leaves[0][:2], leaves[1][:2], strict=True):
        torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-4, atol=1e-6)


SHAPES = [  # head dim, value dim, heads, kv heads
    (1, 1, 1, 1),
    (3, 17, 2, 2),
    (64, 64, 6, 2),
    (96, 40, 7, 1),
    (128, 128, 4, 2),
    (256, 256, 2, 2),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_head_dims_and_groups(shape, impl):
    dim, wide, heads, groups = shape
    death = torch.randint(0, 60, (1, groups, 37), generator=generator(9)).int()
    mask = LifetimeMask(death, 21)
    args = tensors(mask, 1, precise(impl), dim, heads, groups, wide)
    agree(impl, mask, args, slopes=slopes_of(mask, 1, wide, heads))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tile", [1, 33])
@pytest.mark.parametrize("kind", ["any lifetimes", "structural", "odd blocks", "placed"])
def test_plans_with_tiles_of_any_height(kind, tile, impl):
    """A plan is executed as it is; rows that it leaves out have no gradient."""
    mask = cut(kind)
    rows = (0 if tile > 9 else mask.queries - 5 * tile, mask.queries)
    args = tensors(mask, 4, precise(impl))
    slopes = [x.clone() for x in slopes_of(mask, 4)]
    for x in slopes:
        x[:, :, : rows[0]] = 0
    grads = agree(impl, mask, args, slopes=slopes, plan=mask.lower(rows, tile, impl != "cpu"))
    assert (grads[0][:, :, : rows[0]] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0, 1e-300])
def test_any_scale(scale, impl):
    mask = lifetime(generator(3), 30, 30, 1, GROUPS, 0)
    args = tensors(mask, 6, precise(impl))
    bias = torch.randn(1, HEADS, 30, generator=generator(6)).to(precise(impl))
    agree(impl, mask, args, bias, scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_of_any_layout(impl):
    """[b, n, h, d] as models make them, a key shared by the batch, and slopes without strides."""
    mask = cut("top-w", queries=40, b=2)
    args = tensors(mask, 5, precise(impl))
    bias = torch.randn(1, KEYS, 1, generator=generator(5)).mT.to(precise(impl))
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in args]
    leaves[1] = leaves[1][:1].detach().requires_grad_()
    plain = [x.detach().clone().requires_grad_() for x in leaves]
    for run, (query, key, value) in zip((impl, "reference"), (leaves, plain), strict=True):
        moved = (x.transpose(1, 2) for x in (query, key.expand(2, -1, -1, -1), value))
        attention(*moved, mask, bias, impl=run).sum().backward()
    for mine, exact in zip(leaves, plain, strict=True):
        torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["top-w", "structural"])
def test_half_precision_errs_no_more_than_the_reference(kind, dtype, impl):
    """Against float64 on the same rounded inputs. The reference computes in float32 and rounds
    each gradient once; fused kernels round the weights and their slopes as well. The bias beside
    them is float32 and so is its gradient."""
    mask = cut(kind, queries=40)
    args = tensors(mask, 7, dtype, dim=32)
    bias = torch.randn(1, GROUPS, KEYS, generator=generator(7))
    slopes = (slopes_of(mask, 7, 32)[0].to(dtype), None)
    truth = gradients("reference", mask, [x.double() for x in args], bias.double(), slopes)
    ours = gradients(impl, mask, args, bias, slopes)
    for mine, exact, x in zip(ours, truth, (*args, bias), strict=True):
        assert mine.dtype == x.dtype
        error = (mine.double() - exact).norm() / exact.norm()
        assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_large_biases_and_biases_of_minus_infinity(impl):
    """Rows whose keys are all at minus infinity have no gradient; nothing becomes NaN."""
    mask = cut("top-w")
    args = tensors(mask, 6, torch.float32)
    bias = torch.zeros(1, GROUPS, KEYS)
    bias[:, 0, : KEYS // 2], bias[:, 1] = -INF, -INF
    leaves = [x.clone().requires_grad_() for x in args]
    out, lse = attention(*leaves, mask, bias, return_lse=True, impl=impl)
    (out.sum() + lse.masked_fill(lse == -INF, 0).sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (leaves[0].grad[:, GROUPS:] == 0).all() and leaves[0].grad[:, 0].any()
    # a number beside 1e4 has a thousandth as its last digit in float32
    bias = 1e4 * (torch.arange(KEYS) % 3 - 1.0).expand(1, 1, -1)
    agree(impl, mask, args, bias.contiguous(), rtol=5e-3)


# How the work is cut


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["top-w", "true mask", "odd blocks", "placed"])
def test_backward_lowers_a_range_of_rows_at_a_time(kind, impl, monkeypatch):
    monkeypatch.setattr(ATTENTION, "ROWS_AT_A_TIME", 27)
    monkeypatch.setattr(ATTENTION, "LIST_BYTES", 1)
    mask = cut(kind)
    agree(impl, mask, tensors(mask, 18, precise(impl)))


@needs_interpreter
@pytest.mark.parametrize("kind", ["top-w", "placed", "structural"])
def test_short_lists_are_kept_for_the_backward(kind, monkeypatch):
    """Their tiles are the forward's; kept or made again, the gradients are the same bits."""
    mask, lowered = cut(kind), []
    lower = ATTENTION._plans
    monkeypatch.setattr(ATTENTION, "_plans", lambda *a: lowered.append(a) or lower(*a))
    args = tensors(mask, 5, torch.float32)
    slopes = slopes_of(mask, 5)
    found = []
    for share in (1e9, 0.0):
        monkeypatch.setattr(ATTENTION, "KEPT_SHARE", share)
        lowered.clear()
        found.append(gradients("triton", mask, args, None, slopes))
        found.append(len(lowered))
    kept, few, again, more = found
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert more == few + 1


def test_long_lists_are_computed_in_pieces(monkeypatch):
    monkeypatch.setattr("dynmask.kernels.cpu.KEYS_AT_A_TIME", 16)
    death = torch.randint(0, 120, (2, GROUPS, 100), generator=generator(3)).int()
    for mask in (LifetimeMask(death), LifetimeMask.window(100, 60).expand(2)):
        bias = torch.randn(2, HEADS, 100, generator=generator(3), dtype=torch.float64)
        agree("cpu", mask, tensors(mask), bias)


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_sums_are_the_references(kind):
    """Lists of every query head, several to a kv head: each launch adds to a key once."""
    mask = cut(kind, b=2)
    args = tensors(mask, 12, torch.float32)
    bias = torch.randn(2, HEADS, KEYS, generator=generator(12))
    first = agree("triton", mask, args, bias, deterministic=True)
    if kind == "top-w":
        again = gradients("triton", mask, args, bias, slopes_of(mask, 1), deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_interpreter
def test_who_asks_for_determinism_gets_launches_that_share_no_key(monkeypatch):
    from dynmask.kernels.triton import backward

    seen = []
    run = backward.keys_backward
    monkeypatch.setattr(
        backward, "keys_backward", lambda *a: (seen.append((a[4].batch.shape[0], a[12])), run(*a))
    )
    monkeypatch.setattr("dynmask.masks.lifetime.BACKWARD_TILE", 16)
    mask = LifetimeMask.window(40, 9).expand(2)
    args = [x.requires_grad_() for x in tensors(mask, 1, torch.float32)]

    def launches(mask, **more):
        seen.clear()
        attention(*args, mask, impl="triton", **more).sum().backward()
        return seen[0]

    assert launches(mask, deterministic=False) == (6, 0)
    assert launches(mask, deterministic=True) == (6, 3)
    assert launches(mask) == (6, 3)  # as PyTorch says, in this file
    assert launches(mask.lower(tile=20, fused=True)) == (4, 4)
    torch.use_deterministic_algorithms(False)
    assert launches(mask) == (6, 0)


@needs_interpreter
@pytest.mark.parametrize("kind", ["any lifetimes", "top-w", "placed"])
@pytest.mark.parametrize("tile", [16, 100])
def test_tiles_of_the_keys_kernel_may_have_any_height(tile, kind, monkeypatch):
    """Chunks of a list whose keys are born late or die early walk over some of the rows."""
    monkeypatch.setattr("dynmask.masks.lifetime.BACKWARD_TILE", tile)
    mask = cut(kind, keys=90, queries=90) if kind != "placed" else cut(kind)
    agree("triton", mask, tensors(mask, 13, torch.float32))


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("top-w", (16, 16, 1)), ("structural", (64, 32, 2)), ("blocks", (128, 64, 3))],
)
def test_how_the_kernels_are_compiled_changes_no_answer(kind, shape):
    from dynmask.kernels.triton.backward import KeyConfig, RowConfig, keys_backward, rows_backward

    mask = cut(kind, queries=40)
    query, key, value = tensors(mask, 11, torch.float32)
    slopes = slopes_of(mask, 11)
    truth = gradients("reference", mask, (query, key, value), None, slopes)
    out, lse = attention(query, key, value, mask, return_lse=True, impl="triton")
    slope, lse_slope = (x.float() for x in slopes)
    grads = [torch.full_like(query, NAN), torch.zeros_like(key), torch.zeros_like(value)]
    delta = torch.full_like(lse, NAN)
    plan = plan_tensors(mask.lower(tile=16, fused=True))
    a, step, stages = shape
    rows_backward(
        query, key, value, None, plan, 8**-0.5, out, slope, lse, lse_slope, grads[0], delta,
        RowConfig(a, step, 4, stages),
    )  # fmt: skip
    keys_backward(
        query, key, value, None, plan, 8**-0.5, slope, lse, delta, *grads[1:], None, 0,
        KeyConfig(a, step, 4, stages),
    )  # fmt: skip
    for mine, exact in zip(grads, truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_without_any_block_have_no_gradient(impl):
    index = torch.empty(1, 1, -(-KEYS // 16), 0, dtype=torch.int32)
    mask = BlockMask(index, 16, 16, KEYS, KEYS)
    args = [x.requires_grad_() for x in tensors(mask, 6, torch.float32)]
    attention(*args, mask, impl=impl).sum().backward()
    assert all((x.grad == 0).all() for x in args)


@needs_interpreter
@pytest.mark.parametrize("kind", ["any lifetimes", "structural", "limited"])
def test_what_stands_after_the_end_of_a_list_is_not_read(kind):
    """The padding of every list names key 0, which no row reads, with all bits set."""
    from tests.test_triton import without_key_0

    mask = without_key_0(cut(kind))
    query, key, value = tensors(mask, 9, torch.float32)
    poison(mask, key, value)
    plan = mask.lower(fused=True)
    slot = torch.arange(plan.index.shape[-1])
    plan = replace(plan, index=plan.index.masked_fill(slot >= plan.count[..., None], 0))
    if plan.bits is not None:
        edge = torch.arange(plan.bits.shape[2])
        past = edge >= (plan.count - plan.full)[..., None]
        plan = replace(plan, bits=plan.bits.masked_fill(past[..., None], -1))
    agree("triton", mask, (query, key, value), plan=plan)


# What attention() promises


@pytest.mark.parametrize("heads", [1, GROUPS])
def test_the_cpu_kernels_derivatives_are_those_of_differences(heads):
    mask = lifetime(generator(heads), 7, 5, 1, heads, 0)
    args = [x.requires_grad_() for x in tensors(mask, dim=3)]
    bias = torch.randn(1, heads, 7, generator=generator(1), dtype=torch.float64).requires_grad_()

    def run(*tensors):
        out, lse = attention(*tensors[:3], mask, tensors[3], return_lse=True, impl="cpu")
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(run, (*args, bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_asks_for_a_gradient_gets_one(impl):
    mask = cut("top-w")
    whole = gradients(impl, mask, tensors(mask, 2, torch.float32), None, slopes_of(mask, 1))
    for i in range(3):
        args = list(tensors(mask, 2, torch.float32))
        args[i].requires_grad_()
        out, lse = attention(*args, mask, return_lse=True, impl=impl)
        slope, lse_slope = (x.float() for x in slopes_of(mask, 1))
        ((out * slope).sum() + (lse * lse_slope).sum()).backward()
        assert [x.grad is not None for x in args] == [i == j for j in range(3)]
        assert torch.equal(args[i].grad, whole[i])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_results_are_those_without_gradients(impl):
    mask = cut("structural")
    args = tensors(mask, 2, torch.float32)
    plain = attention(*args, mask, return_lse=True, impl=impl)
    leaves = [x.clone().requires_grad_() for x in args]
    recorded = attention(*leaves, mask, return_lse=True, impl=impl)
    torch.testing.assert_close(recorded, plain)
    assert attention(*leaves, mask, impl=impl).requires_grad
    with torch.no_grad():
        assert not attention(*leaves, mask, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    mask = LifetimeMask.window(8, 3)
    args = [x.requires_grad_() for x in tensors(mask, 2, torch.float32)]
    out = attention(*args, mask, impl=impl)
    with pytest.raises(ValueError, match="expected to be differentiated once"):
        torch.autograd.grad(out.sum(), args[0], create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_around_the_backward_changes_nothing(impl):
    mask = LifetimeMask.window(9, 4)
    args = tensors(mask, 2, torch.float32)
    plain = gradients(impl, mask, args, None, slopes_of(mask, 1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(impl, mask, args, None, slopes_of(mask, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_auto_differentiates_on_a_gpu_by_the_triton_kernels(monkeypatch):
    """SDPA's gradient of a row without keys is NaN: short calls that want one do not take it."""
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    for keys in (DENSE_KEYS, 2 * DENSE_KEYS):
        window = LifetimeMask.window(keys, 9)
        for position in range(3):
            group = [on_gpu(requires_grad=position == i) for i in range(3)]
            assert choose(group[0], window, None, False, tuple(group[1:])).impl == "triton"
            assert choose(group[0], window, group[1], False, (group[2],)).impl == "triton"
    causal = LifetimeMask.causal(DENSE_KEYS)
    assert choose(on_gpu(requires_grad=True), causal, None, False).impl == "sdpa"


@needs_interpreter
def test_the_operators_keep_what_they_promise():
    """Schemas, shapes while tracing and AOT dispatch."""
    opcheck, op = torch.library.opcheck, torch.ops.dynmask
    death = torch.randint(0, 40, (2, 2, 30), generator=generator(20)).int()
    mask = LifetimeMask(death)
    query, key, value = tensors(mask, 20, torch.float32)
    plan = plan_tensors(mask.lower(fused=True))
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[:3])
    for bias, norm in ((None, None), (torch.zeros(2, 1, 30), lse)):
        common = (query, key, value, bias, *plan, 0.3)
        results = (torch.zeros_like(query), torch.zeros_like(lse))
        opcheck(op.attend_rows_backward.default, (*common, out, out, lse, norm, *results))
        results = [torch.zeros_like(x) for x in (key, value)]
        more = None if bias is None else torch.zeros(2, 2, 30)
        opcheck(op.attend_keys_backward.default, (*common, out, lse, lse, *results, more, 0))


@needs_interpreter
@pytest.mark.filterwarnings("ignore")
def test_training_is_traced_as_one_graph():
    mask = LifetimeMask.window(20, 5)

    def run(query, key, value):
        return attention(query, key, value, mask, impl="triton")

    args = tensors(mask, 21, torch.float32)
    grads = []
    torch._dynamo.reset()
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in args]
        call(*leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth)
