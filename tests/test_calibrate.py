"""Calibration: DAM's arithmetic by hand, capture against eager attention, the model untouched."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from dynmask.amplify import AMPLIFIERS, amplify
from dynmask.calibrate import DamSettings, calibrate, dam_patterns, pattern_scores
from dynmask.capture import mean_attention
from tests.tiny import TINY, tiny_llama, tiny_mistral

LENGTH = 24
SETTINGS = DamSettings(length=LENGTH, min_support=4)


def documents(count: int = 3, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 256, (length,), generator=generator) for _ in range(count)]


def softmax_map(heads: int, length: int, seed: int = 0) -> Tensor:
    """A random causal attention map [h, L, L]."""
    logits = 3 * torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def tiny_gemma2():
    """Scores under a soft cap; nothing in TINY has one."""
    llama = tiny_llama().config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(llama, name) for name in (*names, "head_dim", "initializer_range")}
    config = Gemma2Config(
        **shape,
        vocab_size=256,
        num_hidden_layers=2,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


# Amplifiers

QUARTERS = torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
SPREAD = (7 / 72) ** 0.5


@pytest.mark.parametrize(
    ("name", "lam", "expected"),
    [
        # Causal values 1, 3/4, 1/4; the future pair is at eps = 1/16 and sets the zero.
        ("box_cox", 0.5, [2 * (1 - 1 / 4), 2 * (0.75**0.5 - 1 / 4), 2 * (1 / 2 - 1 / 4)]),
        ("box_cox", 2.0, [(1 - 1 / 256) / 2, (9 / 16 - 1 / 256) / 2, (1 / 16 - 1 / 256) / 2]),
        ("box_cox", 0.0, [2.7725887, 2.4849066, 1.3862944]),  # ln 16, ln 12, ln 4
        ("log", 0.5, [2.7725887, 2.4849066, 1.3862944]),
        ("sqrt", 0.5, [3 / 4, 0.75**0.5 - 1 / 4, 1 / 4]),
        ("yeo_johnson", 2.0, [(4 - 289 / 256) / 2, (49 / 16 - 289 / 256) / 2, 0.21679688]),
        ("yeo_johnson", 0.0, [0.6325226, 0.4989912, 0.1625189]),  # ln(1 + x) - ln(17 / 16)
        ("min_max", 0.5, [5 / 4, 11 / 12, 1 / 4]),  # (x - 1/4) / (3/4), shifted by 1/4
        # The three causal values have variance 7/72.
        ("z_score", 0.5, [15 / 16 / SPREAD, 11 / 16 / SPREAD, 3 / 16 / SPREAD]),
        ("arcsinh", 0.5, [0.8189143, 0.6306879, 0.1850068]),
    ],
)
def test_amplifiers_by_hand(name: str, lam: float, expected: list[float]):
    score = amplify(QUARTERS, name, lam, eps=1 / 16)[0]
    assert score[0, 1] == 0
    found = torch.stack([score[0, 0], score[1, 0], score[1, 1]])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@given(name=st.sampled_from(sorted(AMPLIFIERS)), lam=st.floats(-1, 2), seed=st.integers(0, 99))
def test_amplifiers_keep_the_order(name: str, lam: float, seed: int):
    mean = softmax_map(2, 5, seed).double()
    score = amplify(mean, name, lam)
    assert score.isfinite().all() and (score >= 0).all()
    for head in range(2):
        order = mean[head].flatten().argsort()
        assert (score[head].flatten()[order].diff() >= -1e-9).all()


@given(tau=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_box_cox_threshold_in_terms_of_attention(tau: float, seed: int):
    """With lam 0.5 the rule is: mean attention of at least (tau / 2)^2, but for eps."""
    mean = softmax_map(2, 8, seed).double()
    settings = DamSettings(length=8, tau=tau, min_support=1, eps=1e-12)
    true_mask = dam_patterns(mean, settings)[2]
    clear = ((mean / (tau / 2) ** 2) - 1).abs() > 1e-4
    assert torch.equal(true_mask[clear], (mean >= (tau / 2) ** 2)[clear])


# Patterns


def test_gamma_by_hand():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()[None]
    diagonals, verticals = pattern_scores(mask)
    assert diagonals[0].tolist() == [3 / 4, 3 / 3, 0 / 2, 1 / 1]
    assert verticals[0].tolist() == [3 / 4, 2 / 3, 2 / 2, 0 / 1]


@given(st.integers(1, 9), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
def test_gamma_is_the_filled_share_of_the_dense_pattern(length, heads, fill, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(heads, length, length, generator=generator) < fill).tril()
    q, k = torch.arange(length)[:, None], torch.arange(length)
    diagonals, verticals = pattern_scores(mask)
    for n in range(length):
        for found, pattern in ((diagonals, q - k == n), (verticals, (k == n) & (q >= k))):
            naive = (mask & pattern).sum((-2, -1)).double() / pattern.sum()
            assert torch.equal(found[:, n], naive)


def test_mu_is_included_and_counts_exactly():
    """Four of five cells are a share of 0.8, which mu = 0.8 keeps; three are not."""
    mean = torch.zeros(2, 5, 5)
    mean[0, :4].fill_diagonal_(1)
    mean[1, :3].fill_diagonal_(1)
    diagonals, _, _ = dam_patterns(mean, DamSettings(length=5, min_support=1))
    assert diagonals[:, 0].tolist() == [True, False]


def test_minimum_support_drops_accidents():
    """Two sink columns also fill the last two diagonals; a band of three the last verticals."""
    length = 16
    mean = torch.zeros(2, length, length)
    mean[0, :, :2] = 0.5
    mean[1] = torch.ones(length, length).triu(-2) / 3
    paper = DamSettings(length=length, min_support=1)
    diagonals, verticals, _ = dam_patterns(mean.tril(), paper)
    assert diagonals[0].nonzero().flatten().tolist() == [14, 15]
    assert verticals[0].nonzero().flatten().tolist() == [0, 1]
    assert diagonals[1].nonzero().flatten().tolist() == [0, 1, 2]
    assert verticals[1].nonzero().flatten().tolist() == [13, 14, 15]
    supported = DamSettings(length=length, min_support=4)
    diagonals, verticals, _ = dam_patterns(mean.tril(), supported)
    assert diagonals[0].nonzero().flatten().tolist() == []
    assert verticals[0].nonzero().flatten().tolist() == [0, 1]
    assert diagonals[1].nonzero().flatten().tolist() == [0, 1, 2]
    assert verticals[1].nonzero().flatten().tolist() == []


# Capture


@pytest.mark.parametrize("name", [*TINY, "gemma2"])
def test_mean_attention_is_the_mean_of_eager_attention(name: str):
    model = tiny_gemma2() if name == "gemma2" else TINY[name]()
    windows = torch.stack(documents())
    captured = mean_attention(model, windows, batch=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(windows, output_attentions=True).attentions
    assert sorted(captured) == list(range(len(maps)))
    for layer, reference in enumerate(maps):
        torch.testing.assert_close(captured[layer], reference.mean(0), atol=1e-6, rtol=1e-5)


def test_bfloat16_models_are_captured_in_float32():
    captured = mean_attention(tiny_llama().bfloat16(), torch.stack(documents()))
    for mean in captured.values():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.sum(-1), torch.ones(4, LENGTH), atol=1e-5, rtol=0)


def test_sliding_layers_keep_their_window():
    model = tiny_mistral()
    captured = mean_attention(model, torch.stack(documents()))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    visible = (distance >= 0) & (distance < model.config.sliding_window)
    for mean in captured.values():
        assert torch.equal(mean[0] > 0, visible)


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_model_is_left_as_it_was(name: str):
    model = TINY[name]()
    model.train()
    model.get_submodule("model.layers.0").eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.config)
    implementation = model.config._attn_implementation
    ids = torch.stack(documents(1))
    with torch.no_grad():
        logits = model(ids).logits
        calibrate(model, documents(), settings=SETTINGS, progress=False)
        assert torch.equal(model(ids).logits, logits)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config.to_dict()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.train()
    ids = torch.stack(documents(1))
    with torch.no_grad():
        logits = model(ids).logits
    calls = []

    def interrupt(*args):
        calls.append(model.training or torch.is_grad_enabled())
        if len(calls) == 2:  # in the second document, after layer 0 was captured
            raise error

    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        calibrate(model, documents(), settings=SETTINGS, progress=False)
    handle.remove()
    assert calls == [False, False]
    assert model.training and model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert list(tmp_path.iterdir()) == []


def test_the_capture_serves_calibration_only():
    model = tiny_llama()
    mean_attention(model, torch.stack(documents(1)))
    model.set_attn_implementation("dynmask_capture")
    with pytest.raises(RuntimeError, match=r"serves dynmask\.calibrate only"):
        model(torch.stack(documents(1)))


def test_attention_that_bypasses_the_interface_is_an_error():
    model = tiny_llama()
    del model.model.layers[1]
    with pytest.raises(ValueError, match=r"from each of its 2 layers, received none from layer 1"):
        calibrate(model, documents(), settings=SETTINGS, progress=False)


def test_attention_that_is_not_finite_is_an_error():
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.q_proj.weight").fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity in layer 1"):
        calibrate(model, documents(), settings=SETTINGS, progress=False)


# The card


def test_the_card_says_what_was_found():
    model = tiny_llama()
    card = calibrate(model, documents(), settings=SETTINGS, progress=False)
    card.check(model)
    means = mean_attention(model, torch.stack(documents()))
    causal = LENGTH * (LENGTH + 1) / 2
    for layer, mean in means.items():
        diagonals, verticals, true_mask = dam_patterns(mean, SETTINGS)
        kept_diagonals, kept_verticals, kept_mask = card.patterns(layer)
        assert torch.equal(kept_mask, true_mask)
        true_mask |= torch.eye(LENGTH, dtype=torch.bool)
        for head in range(4):
            for kept, keep in ((kept_diagonals, diagonals), (kept_verticals, verticals)):
                indices = [i for i in kept[head].tolist() if i >= 0]
                assert indices == keep[head].nonzero().flatten().tolist()
            share = (true_mask[head].sum() / causal).item()
            assert card.header["true_density"][layer][head] == pytest.approx(share)
            mass = (mean[head] * true_mask[head]).sum(-1).mean().item()  # rows sum to 1
            assert card.header["true_kept_mass"][layer][head] == pytest.approx(mass, abs=1e-6)


def test_density_and_kept_mass_are_those_of_the_applied_mask():
    from dynmask.masks import StructuralMask

    model = tiny_llama()
    card = calibrate(model, documents(), settings=SETTINGS, progress=False)
    means = mean_attention(model, torch.stack(documents()))
    for layer, mean in means.items():
        diagonals, verticals, _ = card.patterns(layer)
        mask = StructuralMask(diagonals=diagonals[None], verticals=verticals[None], keys=LENGTH)
        assert card.density[layer] == pytest.approx(mask.density()[0].tolist())
        mass = (mean * mask.dense()[0]).sum(-1).mean(-1)
        assert card.kept_mass[layer] == pytest.approx(mass.tolist(), abs=1e-6)
    assert max(map(max, card.density)) < 1 and len(set(map(tuple, card.density))) > 1


def test_sinks_do_not_count_as_attention():
    """gpt-oss rows sum to less than 1; a mask that keeps everything keeps all that goes to keys."""
    everything = DamSettings(length=LENGTH, min_support=1, tau=1e-6, eps=1e-20)
    card = calibrate(TINY["gpt_oss"](), documents(), settings=everything, progress=False)
    full = torch.tensor(card.header["true_kept_mass"])
    torch.testing.assert_close(full, torch.ones_like(full), atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_card(tmp_path):
    texts = documents(3, length=3 * LENGTH)

    def content(seed: int) -> bytes:
        card = calibrate(tiny_llama(), texts, settings=SETTINGS, seed=seed, progress=False)
        return card.save_pretrained(tmp_path / str(seed)).read_bytes()

    assert content(0) == content(0)
    assert content(0) != content(1)


def test_a_longer_document_gives_a_window_of_itself():
    from dynmask.documents import windows_of

    model, texts = tiny_llama(), documents(2, length=200)
    windows = {seed: windows_of(model, texts, LENGTH, seed) for seed in range(5)}
    assert len({tuple(w[0].tolist()) for w in windows.values()}) > 1
    for w in windows.values():
        for window, text in zip(w, texts, strict=True):
            assert (text.unfold(0, LENGTH, 1) == window).all(-1).any()
    # The first tokens of a sequence draw attention as such: they stay in front.
    texts[0][0] = model.config.bos_token_id
    marked = windows_of(model, texts, LENGTH, 0)
    assert marked[0, 0] == model.config.bos_token_id
    assert torch.equal(marked[0, 1:], windows[0][0, 1:])


def test_progress_is_shown_on_request(capsys):
    calibrate(tiny_llama(), documents(), settings=SETTINGS, progress=False)
    assert capsys.readouterr().err == ""
    calibrate(tiny_llama(), documents(), settings=SETTINGS)
    assert "3/3" in capsys.readouterr().err


# Bad input, before the model runs


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "documents: expected at least one, received an empty set"),
        (
            [*documents(2), documents(1, 23)[0]],
            r"documents\[2\]: expected at least 24.*received 23",
        ),
        ([torch.full((30,), 256)], r"documents\[0\]: expected token ids in \[0, 256\)"),
        ([torch.full((30,), -1)], r"documents\[0\]: expected token ids"),
        ([torch.zeros(2, 30).long()], r"a 1-D tensor of token ids, received \[2, 30\]"),
        ([list(range(30))], "a 1-D tensor of token ids, received list"),
        ([torch.rand(30)], r"expected whole numbers, received torch\.float32"),
    ],
)
def test_bad_documents(texts, message: str, monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        calibrate(model, texts, settings=SETTINGS, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 1}, "settings.length: expected at least 2"),
        ({"length": 32.0}, "settings.length: expected a whole number, received 32.0"),
        ({"tau": 0.0}, "settings.tau: expected more than 0"),
        ({"tau": float("nan")}, "settings.tau: expected a finite number"),
        ({"mu": 1.1}, r"settings.mu: expected a share in \(0, 1\]"),
        ({"mu": 0}, "settings.mu"),
        ({"lam": float("inf")}, "settings.lam: expected a finite number"),
        ({"eps": 0.0}, "settings.eps"),
        ({"amplifier": "cube"}, "settings.amplifier: expected one of box_cox.*received cube"),
        ({"min_support": 0}, "settings.min_support: expected 1 to length"),
        ({"length": 32}, r"expected 1 to length \(32\), received 64.*lower min_support"),
    ],
)
def test_bad_settings(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DamSettings(**fields)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"policy": "streaming"},
            "policy: expected 'dam', 'retained' or 'gated', received 'streaming'",
        ),
        ({"batch": 0}, "batch: expected a whole number of at least 1"),
        ({"settings": DamSettings(length=2048)}, "at most the model's 1024 positions"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_llama(), documents(), **({"settings": SETTINGS} | kwargs), progress=False)


def test_a_model_that_is_not_from_transformers():
    with pytest.raises(ValueError, match="expected a transformers model, received Linear"):
        calibrate(torch.nn.Linear(2, 2), documents(), settings=SETTINGS, progress=False)
    module = torch.nn.Module()
    module.config = tiny_llama().config
    with pytest.raises(ValueError, match="a transformers PreTrainedModel, received Module"):
        calibrate(module, documents(), settings=SETTINGS, progress=False)


MEASURE = """
import re, torch
from dynmask.calibrate import DamSettings, calibrate
from tests.tiny import tiny_llama

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(2)
model = tiny_llama(layers=28, hidden_size=192, num_attention_heads=24, num_key_value_heads=8)
texts = [torch.randint(2, 256, (512,)) for _ in range(4)]
model(texts[0][None])
before = peak()
card = calibrate(model, texts, settings=DamSettings(), batch=4, progress=False)
assert card.layers == 28 and len(card.density[0]) == 24
print(peak() - before)
"""


@pytest.mark.slow
def test_28_layers_of_24_heads_calibrate_in_4_gb():
    """Peak resident memory above that of the loaded model, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=900
    )
    extra = int(done.stdout)
    sums = 28 * 24 * 512 * 512 * 4
    print(f"peak beside the model: {extra / 2**20:.0f} MiB, of which sums {sums / 2**20:.0f}")
    assert sums < extra < 4 * 10**9
