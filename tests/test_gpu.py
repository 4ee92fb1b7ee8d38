"""The laws again where a GPU is: tensor-operation kernels, masks and plans on CUDA."""

import pytest
import torch

from dynmask import BlockMask, LifetimeMask, StructuralMask, attention
from dynmask.masks.base import repeat_heads
from tests.policies import POLICIES

pytestmark = pytest.mark.gpu

SDPA = torch.nn.functional.scaled_dot_product_attention
B, HEADS, GROUPS, DIM = 2, 8, 2, 64


def tensors(keys, queries, dtype):
    g = torch.Generator("cuda").manual_seed(keys)
    return (
        torch.randn(B, HEADS, queries, DIM, generator=g, device="cuda").to(dtype),
        torch.randn(B, GROUPS, keys, DIM, generator=g, device="cuda").to(dtype),
        torch.randn(B, GROUPS, keys, DIM, generator=g, device="cuda").to(dtype),
    )


def mask_of(kind, keys, queries):
    g = torch.Generator("cuda").manual_seed(7)
    if kind == "top_w":
        scores = torch.randn(B, GROUPS, keys, generator=g, device="cuda").round(decimals=1)
        return LifetimeMask.top_w(scores, 1 + keys // 9, queries)
    if kind == "window":
        return LifetimeMask.streaming(keys, 4, 1 + keys // 9, queries, device="cuda").expand(B)
    if kind == "structural":
        d = torch.arange(0, keys, 37, device="cuda").int().expand(1, HEADS, -1).contiguous()
        true_mask = torch.rand(HEADS, 100, 100, generator=g, device="cuda") < 0.1
        return StructuralMask(d, d[..., :5].contiguous(), keys, queries, true_mask).expand(B)
    blocks = (keys - 1) // 64 - (keys - queries) // 64 + 1, -(-keys // 64)
    chosen = torch.rand(B, HEADS, *blocks, generator=g, device="cuda") < 0.2
    return BlockMask.from_scores(chosen, 64, 64, keys, queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (333, 333), (1000, 77), (1000, 1)])
@pytest.mark.parametrize("kind", ["top_w", "window", "structural", "block"])
def test_the_error_is_no_larger_than_sdpas(kind, size, dtype):
    query, key, value = tensors(*size, dtype)
    mask = mask_of(kind, *size)
    plan = mask.lower()
    visible = mask.dense()
    assert torch.equal(plan.dense(), visible)
    truth = attention(*(x.double() for x in (query, key, value)), mask, impl="reference")
    visible = repeat_heads(visible, HEADS)
    theirs = SDPA(query, repeat_heads(key, HEADS), repeat_heads(value, HEADS), attn_mask=visible)
    theirs = theirs.masked_fill(~visible.any(-1)[..., None], 0)
    ours = attention(query, key, value, mask, impl="cpu")
    error, bound = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= 2 * bound + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_policies_choose_on_the_gpu_what_they_choose_on_the_cpu(policy):
    from dynmask.policies import Layer

    query, key, value = tensors(200, 200, torch.float32)
    there = policy(query, key, value, Layer(0)).dense().cpu()
    here = policy(query.cpu(), key.cpu(), value.cpu(), Layer(0)).dense()
    # two devices may break a near tie differently
    assert (there != here).float().mean() < 1e-3


def test_selection_is_the_same_on_both_devices():
    scores = torch.randn(B, GROUPS, 5000, generator=torch.Generator().manual_seed(0)).round(
        decimals=2
    )
    there = LifetimeMask.top_w(scores.cuda(), 64)
    assert torch.equal(there.death.cpu(), LifetimeMask.top_w(scores, 64).death)


def test_the_reference_model_answers_alike_on_the_gpu():
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import dynmask

    path = Path(__file__).parent.parent / "models" / "dynmask-reference"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    ids = torch.randint(3, 4000, (2, 600), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        plain = model(ids).logits
        with dynmask.sparsify(model, dynmask.policies.Causal(), impl="cpu"):
            ours = model(ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
