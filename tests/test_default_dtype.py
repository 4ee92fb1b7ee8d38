"""Servers build models under another default dtype; what a card holds must not take it on."""

from pathlib import Path

import pytest
import torch

import dynmask
from dynmask.budgets import GatedSettings
from dynmask.encoder_training import encoder_of
from dynmask.nn import collect_retention_loss
from dynmask.policies.gated import Gates

MODELS = Path(__file__).parent.parent / "models"
WIDE = {"heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request):
    """Another default dtype while a test runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_gates_are_the_same_numbers(default):
    gates = Gates.full(2, 4)
    wide = gates.replaced(gates.dense, window=8, columns=3, share=0.1)
    assert gates.share.dtype == wide.share.dtype == torch.float32
    assert torch.equal(wide.share, torch.full((2, 4), 0.1, dtype=torch.float32))


@pytest.mark.parametrize(
    "name",
    ["dynmask-reference-gated", "dynmask-reference-64k-gated", "dynmask-reference-retained"],
)
def test_a_card_is_the_same_policy(name, default):
    policy = dynmask.MaskCard.from_pretrained(MODELS / name).policy()
    torch.set_default_dtype(torch.float32)
    usual = dynmask.MaskCard.from_pretrained(MODELS / name).policy()
    if name.endswith("gated"):
        assert policy.promise.dtype == torch.float32
        assert torch.equal(policy.promise, usual.promise)
        assert torch.equal(policy.gates.share, usual.gates.share)
        return
    for ours, theirs in zip(policy.modules, usual.modules, strict=True):
        for name, parameter in ours.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, theirs.get_parameter(name))


def test_an_encoder_is_float32(default):
    encoder = encoder_of(GatedSettings(), WIDE)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_no_retention_loss_is_a_float32_zero(default):
    loss = collect_retention_loss(torch.nn.Linear(2, 2))
    assert loss.dtype == torch.float32 and loss == 0
