"""The laws again where a GPU is: compiled Triton kernels, masks and plans on CUDA."""

from dataclasses import fields, replace

import pytest
import torch

from dynmask import (
    BlockMask,
    LifetimeMask,
    PlacedMask,
    StructuralMask,
    attention,
    spans_left_padded,
    spans_packed,
    spans_right_padded,
)
from dynmask.attention import choose
from dynmask.kernels.reference import reference_attention
from dynmask.masks.base import repeat_heads
from tests.policies import POLICIES
from tests.strategies import poison

pytestmark = pytest.mark.gpu

SDPA = torch.nn.functional.scaled_dot_product_attention
B, HEADS, GROUPS, DIM = 2, 8, 2, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (333, 333), (1000, 77), (1000, 1)]
KINDS = [
    "causal",
    "top_w",
    "window",
    "structural",
    "block",
    "limited",
    "united",
    "left_padded",
    "packed",
]
CASES = [(k, s) for k in KINDS for s in SIZES if k != "packed" or s[0] == s[1] > 1]


@pytest.fixture(autouse=True)
def stop_when_the_device_is_lost():
    """A failed assertion on the device fails every later call too: end where it came first."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is lost: {str(error).splitlines()[0]}", returncode=3)


def tensors(keys, queries, dtype, heads=HEADS, groups=GROUPS, dim=DIM):
    g = torch.Generator("cuda").manual_seed(keys)
    return (
        torch.randn(B, heads, queries, dim, generator=g, device="cuda").to(dtype),
        torch.randn(B, groups, keys, dim, generator=g, device="cuda").to(dtype),
        torch.randn(B, groups, keys, dim, generator=g, device="cuda").to(dtype),
    )


def mask_of(kind, keys, queries, b=B, heads=HEADS, groups=GROUPS):
    g = torch.Generator("cuda").manual_seed(7)
    if kind == "causal":
        return LifetimeMask.causal(keys, queries, device="cuda").expand(b)
    if kind == "top_w":
        scores = torch.randn(b, groups, keys, generator=g, device="cuda").round(decimals=1)
        return LifetimeMask.top_w(scores, 1 + keys // 9, queries)
    if kind == "window":
        return LifetimeMask.streaming(keys, 4, 1 + keys // 9, queries, device="cuda").expand(b)
    if kind == "structural":
        d = torch.arange(0, keys, 37, device="cuda").int().expand(1, heads, -1).contiguous()
        true_mask = torch.rand(heads, 100, 100, generator=g, device="cuda") < 0.1
        return StructuralMask(d, d[..., :5].contiguous(), keys, queries, true_mask).expand(b)
    if kind == "block":
        blocks = (keys - 1) // 64 - (keys - queries) // 64 + 1, -(-keys // 64)
        chosen = torch.rand(b, heads, *blocks, generator=g, device="cuda") < 0.2
        return BlockMask.from_scores(chosen, 64, 64, keys, queries)
    if kind == "limited":
        window = LifetimeMask.window(keys, 1 + keys // 3, queries, device="cuda")
        return mask_of("block", keys, queries, b) & window
    if kind == "united":
        return mask_of("top_w", keys, queries, b) | mask_of("structural", keys, queries, b)
    if kind == "packed":  # all in the first batch row, with a rest that belongs to no sequence
        ends = [0, keys // 5, keys // 5 + keys // 2]
        spans = spans_packed(ends)
    else:
        spans = spans_left_padded([max(keys // 2, 1), keys], keys, queries)
    own = [
        mask_of(kind, s.key_stop - s.key_start, s.query_stop - s.query_start, 1)
        for kind, s in zip(("top_w", "window"), spans, strict=True)
    ]
    return PlacedMask(own, spans, b, queries, keys)


def check_error(args, mask, bias, impl, factor=2):
    """Error against float64 on the same rounded inputs, bounded by SDPA's own in that dtype."""
    query, key, value = args
    dtype, heads = query.dtype, query.shape[1]
    wide = [x.double() for x in args]
    more = None if bias is None else bias.double()
    truth, norm = attention(*wide, mask, more, return_lse=True, impl="reference")
    visible = repeat_heads(mask.dense(), heads)
    add = visible
    if bias is not None:
        add = repeat_heads(bias, heads)[:, :, None].to(dtype).masked_fill(~visible, float("-inf"))
    theirs = SDPA(query, repeat_heads(key, heads), repeat_heads(value, heads), attn_mask=add)
    theirs = theirs.masked_fill(~visible.any(-1)[..., None], 0)
    ours, lse = attention(*args, mask, bias, return_lse=True, impl=impl)
    assert ours.dtype == dtype and lse.dtype == torch.float32
    error, bound = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= factor * bound + torch.finfo(dtype).eps * truth.norm()
    torch.testing.assert_close(lse.double(), norm, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_the_error_is_no_larger_than_sdpas(kind, size, dtype, impl):
    check_error(tensors(*size, dtype), mask_of(kind, *size), None, impl)


SHAPES = [  # head dim, query heads, kv heads, dtype
    (64, 4, 4, torch.bfloat16),
    (80, 8, 2, torch.float16),
    (96, 14, 2, torch.bfloat16),
    (128, 8, 2, torch.bfloat16),
    (128, 7, 1, torch.float32),
    (256, 4, 4, torch.bfloat16),
    (256, 4, 1, torch.float32),
]


@pytest.mark.parametrize("size", [(333, 333), (1000, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_head_dims_groups_and_biases(shape, size):
    """The bias in the tensors' dtype, as a layer would make it; NaN in what no row reads."""
    dim, heads, groups, dtype = shape
    query, key, value = tensors(*size, dtype, heads, groups, dim)
    mask = mask_of("top_w", *size, groups=groups)
    bias = torch.randn(B, groups, size[0], device="cuda").to(dtype)
    check_error((query, key, value), mask, bias, "triton")
    before = attention(query, key, value, mask, bias, impl="triton")
    poison(mask, key, value)
    assert torch.equal(attention(query, key, value, mask, bias, impl="triton"), before)


@pytest.mark.parametrize("size", [(333, 333), (1000, 1)])
@pytest.mark.parametrize("kind", ["structural", "block"])
def test_biases_under_every_rule(kind, size):
    bias = torch.randn(B, HEADS, size[0], device="cuda").bfloat16()
    check_error(tensors(*size, torch.bfloat16), mask_of(kind, *size), bias, "triton")


def on_cpu(plan):
    """The same plan on the CPU, where looking at it tile by tile waits for nobody."""
    moved = {f.name: getattr(plan, f.name) for f in fields(plan)}
    return replace(plan, **{n: x.cpu() for n, x in moved.items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_fused_plans_mean_what_their_masks_mean(kind, size):
    mask = mask_of(kind, *size)
    for fused in (True, False):
        assert torch.equal(on_cpu(mask.lower(fused=fused)).dense(), mask.dense().cpu())


@pytest.mark.parametrize("tile", [128, 16])
def test_long_fused_lists_are_those_of_tensor_operations(tile):
    mask = mask_of("top_w", 9001, 8765)
    fused, plain = (mask.lower(tile=tile, fused=x) for x in (True, False))
    assert torch.equal(fused.full, plain.full) and torch.equal(fused.count, plain.count)
    n = plain.index.shape[-1]
    listed = torch.arange(n, device="cuda") < plain.count[..., None]
    index = [x.index[..., :n].masked_fill(~listed, 0) for x in (fused, plain)]
    assert torch.equal(*index)


@pytest.mark.parametrize("keys", [5_000, 70_000])
def test_selection_is_the_same_on_both_devices(keys):
    scores = torch.randn(B, GROUPS, keys, generator=torch.Generator().manual_seed(0))
    for there in (scores.round(decimals=2), scores.sort(-1).values):
        for width in (64, keys // 3):
            death = LifetimeMask.top_w(there.cuda(), width).death
            assert torch.equal(death.cpu(), LifetimeMask.top_w(there, width).death)


def test_nan_scores_rank_lowest():
    scores = torch.randn(1, 1, 3000, device="cuda")
    scores[..., ::7] = float("nan")
    lowest = scores.nan_to_num(float("-inf"))
    death = LifetimeMask.top_w(scores, 50).death
    assert torch.equal(death, LifetimeMask.top_w(lowest, 50).death)


@pytest.mark.parametrize("queries", [70, 1])
def test_offsets_beyond_31_bits(queries):
    """[b, n, h, d] tensors of 4.5 GB: the last keys of a head lie past 2^31 elements."""
    keys, groups, dim = 2_200_000, 8, 128
    g = torch.Generator("cuda").manual_seed(1)
    cache = torch.randn(
        1, keys, groups, dim, generator=g, device="cuda", dtype=torch.bfloat16
    ).transpose(1, 2)
    assert (keys - 1) * cache.stride(2) > 2**31
    query = torch.randn(1, 2 * groups, queries, dim, generator=g, device="cuda").bfloat16()
    kept = torch.rand(keys, generator=g, device="cuda") < 1e-4
    kept[-40:-3] = True
    death = torch.where(kept, LifetimeMask.INF, 0).int()[None, None]
    out = attention(query, cache, cache, LifetimeMask(death, queries), impl="triton")
    k = kept.nonzero()[:, 0]
    visible = k <= torch.arange(keys - queries, keys, device="cuda")[:, None]
    few = cache[:, :, k].double()
    truth, _ = reference_attention(query.double(), few, few, visible[None, None])
    error = (out.double() - truth).norm() / truth.norm()
    assert error < 1e-2


@pytest.mark.parametrize("kind", ["top_w", "block"])
def test_a_captured_step_reads_the_lists_that_it_finds(kind):
    """Lists, keys and queries change in place between replays of one CUDA graph."""
    keys, dtype = 1000, torch.bfloat16
    query, key, value = tensors(keys, 1, dtype)

    def draw(seed):
        g = torch.Generator("cuda").manual_seed(seed)
        if kind == "top_w":
            scores = torch.randn(B, GROUPS, keys, generator=g, device="cuda")
            return LifetimeMask.top_w(scores, 99, 1)
        chosen = torch.rand(B, GROUPS, 1, 16, generator=g, device="cuda") < 0.3
        return BlockMask.from_scores(chosen, 64, 64, keys, 1)

    plan = draw(0).lower(fused=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before the capture
        attention(query, key, value, plan, impl="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, key, value, plan, impl="triton")
    for seed in range(3):
        mask = draw(seed)
        lists = mask.lower(fused=True)
        for name in ("index", "full", "count"):
            getattr(plan, name).copy_(getattr(lists, name))
        for x in (query, key, value):
            x.normal_()
        graph.replay()
        truth = attention(*(x.double() for x in (query, key, value)), mask, impl="reference")
        torch.testing.assert_close(out.double(), truth, rtol=2e-2, atol=2e-2)


def test_a_captured_training_step_of_a_layer_gives_the_gradients_of_an_eager_one():
    """Selection, forward, retention loss on rows drawn anew, and every gradient, in one graph."""
    from dynmask.nn import DynamicMaskAttention, collect_retention_loss

    torch.manual_seed(0)
    layer = DynamicMaskAttention(64, 4, 2, 32, width=96, window=32, form="bounded").cuda()
    x, slope = torch.randn(2, 700, 64, device="cuda"), torch.randn(2, 700, 64, device="cuda")

    def step():
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            out, _ = layer(x)
        loss = collect_retention_loss(layer)
        ((out.float() * slope).sum() + loss).backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = [p.grad for p in layer.parameters()]
    losses = []
    for seed in range(3):
        x.normal_()
        torch.manual_seed(seed)
        graph.replay()
        found = [g.clone() for g in captured]
        losses.append(float(loss))
        torch.manual_seed(seed)
        torch.testing.assert_close(step(), loss)
        for got, p in zip(found, layer.parameters(), strict=True):
            assert (got - p.grad).norm() < 1e-2 * p.grad.norm()
    assert len(set(losses)) == 3


@pytest.mark.parametrize("queries", [700, 1])
def test_selection_lowering_and_attention_are_one_graph(queries):
    def run(query, key, value, scores):
        return attention(query, key, value, LifetimeMask.top_w(scores, 64, queries))

    args = (*tensors(700, queries, torch.bfloat16), torch.randn(B, GROUPS, 700, device="cuda"))
    out = torch.compile(run, fullgraph=True)(*args)
    torch.testing.assert_close(out, run(*args))


@pytest.mark.parametrize("queries", [2000, 77, 1])
def test_nothing_waits_for_the_device(queries):
    args = tensors(2000, queries, torch.bfloat16)
    scores = torch.randn(B, GROUPS, 2000, device="cuda")
    bias = torch.randn(B, GROUPS, 2000, device="cuda")

    def run():
        mask = LifetimeMask.top_w(scores, 99, queries)
        return attention(*args, mask, bias, return_lse=True)

    out, lse = without_waiting(run)
    assert out.isfinite().all() and lse.isfinite().all()


def without_waiting(run):
    """The result of a call during which PyTorch refuses to wait for the device."""
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["united", "limited", "structural", "causal and windowed"])
def test_masks_of_several_parts_are_lowered_without_waiting(kind):
    query, key, value = tensors(700, 700, torch.bfloat16)
    scores = torch.randn(B, GROUPS, 700, device="cuda")
    chosen = torch.rand(B, GROUPS, 11, 11, device="cuda") < 0.2
    index = torch.tensor([0, 1, 2, 9, 80], dtype=torch.int32, device="cuda").expand(B, GROUPS, -1)
    pattern = StructuralMask(index, index, 700, bands=3, checked=True)
    window = LifetimeMask.window(700, 90, device="cuda")
    parts = (LifetimeMask.causal(700, device="cuda"), window)
    placed = PlacedMask(parts, spans_right_padded([700, 700], 700), B, 700, 700)
    made = {
        "united": lambda: (
            LifetimeMask.top_w(scores, 9) | BlockMask.from_scores(chosen, 64, 64, 700)
        ),
        "limited": lambda: pattern & window,
        "structural": lambda: pattern,
        "causal and windowed": lambda: placed,
    }[kind]
    out = without_waiting(lambda: attention(query, key, value, made(), impl="triton"))
    truth = attention(query, key, value, made(), impl="reference")
    torch.testing.assert_close(out, truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_policies_choose_on_the_gpu_what_they_choose_on_the_cpu(policy):
    from dynmask.policies import Layer

    query, key, value = tensors(200, 200, torch.float32, dim=8)  # that of the score modules
    there = policy(query, key, value, Layer(0)).dense().cpu()
    here = policy(query.cpu(), key.cpu(), value.cpu(), Layer(0)).dense()
    # two devices may break a near tie differently
    assert (there != here).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [700, 77, 1])
def test_a_layer_of_gates_of_all_kinds(queries, dtype):
    from dynmask.policies import Gated, Layer
    from dynmask.policies.gates import Gates
    from tests.policies import score_modules

    def table(*numbers):
        return torch.tensor([numbers], dtype=torch.int32)

    # dense, a window, columns, diagonals, both, blocks, kept by score twice: HEADS maps
    window = table(LifetimeMask.INF, 40, 30, 20, 9, 64, 50, 50)
    columns, slashes = table(0, 0, 60, 0, 33, 0, 0, 0), table(0, 0, 0, 25, 70, 0, 0, 0)
    blocks, kept = table(0, 0, 0, 0, 0, 2, 0, 0), table(0, 0, 0, 0, 0, 0, 90, 90)
    share = torch.zeros(1, HEADS)
    gates = Gates(window, columns, share, blocks, kept, slashes)
    policy = Gated(gates=gates, scores=(score_modules()[0],), decode="select")
    policy.check(1, HEADS, GROUPS)
    query, key, value = tensors(700, queries, dtype, dim=8)  # that of the score modules
    mask = policy(query, key, value, Layer(0))
    out = attention(query, key, value, mask, impl="triton")
    truth = attention(query.double(), key.double(), value.double(), mask, impl="reference")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        here = policy(query.cpu(), key.cpu(), value.cpu(), Layer(0)).dense()
        assert (mask.dense().cpu() != here).float().mean() < 1e-3  # near ties


@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_the_reference_model_answers_alike_on_the_gpu(impl):
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import dynmask

    path = Path(__file__).parent.parent / "models" / "dynmask-reference"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    ids = torch.randint(3, 4000, (2, 600), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        plain = model(ids).logits
        with dynmask.sparsify(model, dynmask.policies.Causal(), impl=impl):
            ours = model(ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


# Gradients


def gradients(impl, args, mask, bias, slope, deterministic=None):
    leaves = [x.detach().clone().requires_grad_() for x in (*args, bias) if x is not None]
    out = attention(*leaves[:3], mask, *leaves[3:], impl=impl, deterministic=deterministic)
    return torch.autograd.grad(out, leaves, slope.to(out.dtype))


def check_gradients(args, mask, bias=None, deterministic=None):
    """Against float64 on the same rounded inputs; weights and their slopes are rounded too."""
    dtype = args[0].dtype
    g = torch.Generator("cuda").manual_seed(3)
    shape = (*args[0].shape[:3], args[2].shape[-1])
    slope = torch.randn(shape, generator=g, device="cuda").to(dtype)
    wide = [x.double() for x in args]
    more = None if bias is None else bias.double()
    truth = gradients("reference", wide, mask, more, slope)
    ours = gradients("triton", args, mask, bias, slope, deterministic)
    for mine, exact in zip(ours, truth, strict=True):
        eps = max(torch.finfo(dtype).eps, 1e-5)
        assert mine.isfinite().all()
        # a lone key's weight is 1 whatever the logits are: their slopes are what rounding leaves
        lone = eps * float(wide[2].norm() * slope.double().norm()) if mask.keys == 1 else 0.0
        assert (mine.double() - exact).norm() <= 2 * eps * exact.norm() + 1e-6 + lone
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_gradients_are_the_references(kind, size, dtype):
    mask = mask_of(kind, *size)
    check_gradients(tensors(*size, dtype), mask)
    query, key, value = tensors(*size, dtype)
    chosen = choose(query.requires_grad_(), mask, None, False, (key, value)).impl
    assert chosen == "triton" or mask.is_causal


@pytest.mark.parametrize("size", [(333, 333), (1000, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_head_dims_groups_and_biases(shape, size):
    """The bias is float32 beside any dtype, and so is its gradient; NaN in what no row reads."""
    dim, heads, groups, dtype = shape
    query, key, value = tensors(*size, dtype, heads, groups, dim)
    mask = mask_of("top_w", *size, groups=groups)
    poison(mask, key, value)
    for bias_heads in {1, groups, heads}:
        bias = torch.randn(B, bias_heads, size[0], device="cuda")
        assert check_gradients((query, key, value), mask, bias)[3].dtype == torch.float32


@pytest.mark.parametrize("kind", ["top_w", "structural", "block", "left_padded"])
def test_deterministic_gradients_are_the_same_bits(kind):
    args, mask = tensors(333, 333, torch.bfloat16), mask_of(kind, 333, 333)
    bias = torch.randn(B, HEADS, 333, device="cuda")
    first, second = (check_gradients(args, mask, bias, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("keys", [1, 17, 64, 100])
def test_gradients_where_half_of_the_only_block_lies_beyond_the_keys(keys):
    """A program whose keys no row reads has no rows to walk over either."""
    for groups in (1, HEADS):
        bias = torch.randn(B, groups, keys, device="cuda")
        args = tensors(keys, keys, torch.bfloat16, HEADS, groups, 64)
        check_gradients(args, LifetimeMask.causal(keys, device="cuda"), bias)


@pytest.mark.parametrize("kind", ["causal", "top_w", "window"])
def test_gradients_of_many_rows(kind):
    """Several tiles of the kernel that holds keys, and chunks that skip rows."""
    args, mask = tensors(3000, 2900, torch.bfloat16), mask_of(kind, 3000, 2900)
    check_gradients(args, mask)


def test_training_memory_follows_the_tensors():
    """No N x N: 32,768 tokens need a few copies of the tensors."""
    n = 32768
    leaves = [
        torch.randn(1, h, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (8, 2, 2)
    ]
    mask = LifetimeMask.window(n, 256, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*leaves, mask).float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * sum(2 * x.numel() for x in leaves)
