"""Converted models: the policy's attention, trained in place, saved, copied and given back."""

import copy
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import dynmask  # noqa: E402
from dynmask import BoundedCache, convert, load_converted, revert, sparsify  # noqa: E402
from dynmask.nn import Retention, ValueScore, collect_retention_loss  # noqa: E402
from tests.test_bounded import CLOSE, generate, prompt  # noqa: E402
from tests.test_transformers import state, tiny  # noqa: E402
from tests.tiny import TINY, tiny_llama  # noqa: E402

SMALL = {"width": 9, "window": 3, "sinks": 1}
MODELS = ["llama", "qwen3", "gemma3", "gpt_oss"]


def scores_of(model):
    return {
        m.layer_idx: m.dynmask_score
        for m in model.modules()
        if getattr(m, "dynmask_score", None) is not None
    }


def converted(name="llama", spread=1.0, **over):
    """A converted tiny model whose scores differ from key to key."""
    model = convert(TINY[name](), **(SMALL | over))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for score in scores_of(model).values():
            score.A.copy_(torch.tensor([0.3, -0.7]))
            weight = score.dt_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=draw) * spread)
    return model


@dataclass(frozen=True, eq=False)
class ByModules:
    """What a converted model computes, as a policy over the model as it was."""

    modules: dict
    name: ClassVar[str] = "by modules"
    causal: ClassVar[bool] = True
    phase: ClassVar[str] = "both"

    def check(self, layers, heads, kv_heads):
        pass

    def retention(self, layer):
        return Retention(SMALL["width"], SMALL["window"], SMALL["sinks"])

    def scores(self, key, value, layer) -> Any:
        if layer.index not in self.modules:
            return torch.zeros(key.shape[:3])
        return self.modules[layer.index](key, value)

    def bias(self, scores, layer):
        return self.modules[layer.index].bias(scores) if layer.index in self.modules else None

    def __call__(self, query, key, value, layer):
        return self.retention(0).mask(self.scores(key, value, layer), query.shape[2])


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("form", ["exp", "linear", "bounded"])
def test_it_computes_biased_attention_over_the_best_keys(name, form):
    model = converted(name, form=form)
    ids, mask = prompt()
    with sparsify(TINY[name](), ByModules(scores_of(model)), impl="reference") as run:
        expected = run.model(ids, attention_mask=mask).logits
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)
    plain = TINY[name]()(ids, attention_mask=mask).logits
    assert not torch.allclose(logits[mask.bool()], plain[mask.bool()], **CLOSE)


@torch.no_grad()
def test_with_room_for_all_keys_it_begins_as_the_model_it_was(name):
    model = TINY[name]()
    ids, mask = prompt()
    expected = model(ids, attention_mask=mask).logits
    # the model's own attention sinks have no bias: it must begin at 0 to change nothing there
    form = "linear" if name == "gpt_oss" else "exp"
    logits = convert(model, width=200, form=form)(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


def test_generation_with_every_cache(name):
    model = converted(name)
    ids, mask = prompt()
    expected, logits = generate(model, ids, mask, use_cache=False)
    for cache in (None, BoundedCache(model)):
        more = {} if cache is None else {"prefill_chunk_size": 7}
        tokens, cached = generate(model, ids, mask, cache, **more)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(cached, logits, **CLOSE)
    assert cache.nbytes < 2 * bytes_of_all(model, ids)


def bytes_of_all(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("form", ["exp", "linear", "bounded"])
def test_repeated_tokens_are_read_alike_by_every_cache(name, form):
    """Equal tokens tie in a first layer, whatever is rounded off where the values are made."""
    model = converted(name, form=form, spread=0.3, width=8, window=0, sinks=0)
    ids = torch.randint(3, 8, (2, 61), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    for size in (1, 5, 17):
        for cache in (BoundedCache(model), DynamicCache(config=model.config)):
            parts = [model(part, past_key_values=cache).logits for part in ids.split(size, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@torch.no_grad()
def test_padded_and_packed_rows_are_as_if_alone(name):
    model = converted(name)
    ids, mask = prompt()
    together = model(ids, attention_mask=mask).logits
    for row, pad in enumerate((6, 1, 0)):
        alone = model(ids[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(together[row, pad:], alone, **CLOSE)
    ids, _ = prompt(padding=())
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(3, -1)
    if name == "gpt_oss":  # its modeling code does not look for packed rows
        with pytest.raises(ValueError, match="one sequence in each row"):
            model(ids, position_ids=positions, use_cache=False)
        return
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :10], model(ids[:, :10]).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 10:], model(ids[:, 10:]).logits, **CLOSE)


# training


def loss_of(model, ids, mask=None):
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids, mask=None):
    model.zero_grad()
    torch.manual_seed(0)
    loss, retention = loss_of(model, ids, mask), collect_retention_loss(model)
    (loss + retention).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads, float(retention.detach())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradients_reach_scores_and_survive_checkpointing(name):
    model = converted(name, spread=0.1, retention_after=4, retention_rows=6).train()
    ids, mask = prompt()
    expected, loss = gradients(model, ids, mask)
    assert loss > 0
    for index in scores_of(model):
        for parameter in ("A", "dt_proj.weight"):
            assert expected[f"model.layers.{index}.self_attn.dynmask_score.{parameter}"].any()
    enable = "activation_checkpointing_enable"  # its name since 5.23
    enable = getattr(model, enable, model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    received, again = gradients(model, ids, mask)
    assert again == pytest.approx(loss, rel=1e-5)
    for n in expected:
        torch.testing.assert_close(received[n], expected[n], rtol=1e-3, atol=1e-5, msg=n)
    assert float(collect_retention_loss(model)) == 0  # nothing is left by the second forward


def test_the_retention_loss_teaches_scores_alone():
    model = converted(spread=0.1, retention_after=4).train()
    ids, _ = prompt(padding=())
    model(ids, use_cache=False)
    collect_retention_loss(model).backward()
    named = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert named and all("dynmask_score" in n for n in named)
    model.eval()
    model(ids)
    assert float(collect_retention_loss(model)) == 0
    silent = converted(retention_weight=0).train()
    silent(ids, use_cache=False)
    assert float(collect_retention_loss(silent)) == 0


def test_the_retention_loss_is_a_mean_at_the_scale_of_the_model(monkeypatch):
    scales = []

    def two(query, key, scores, *, scale, **more):
        scales.append(scale)
        return scores.sum() * 0 + 2

    monkeypatch.setattr("dynmask.integrations.convert.retention_loss_of", two)
    model = convert(TINY["gemma3"](query_pre_attn_scalar=64), **SMALL).train()
    ids, mask = prompt()
    for given in (None, mask):  # the same over sequences of other lengths
        model(ids, attention_mask=given, use_cache=False)
        assert float(collect_retention_loss(model).detach()) == pytest.approx(0.05 * 2 * 2)
    assert set(scales) == {0.125}
    cache = model(ids, use_cache=True).past_key_values
    collect_retention_loss(model)
    model(ids[:, :3], past_key_values=cache)  # not of a sequence from its beginning
    assert float(collect_retention_loss(model)) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_few_steps_lower_the_loss(autocast):
    model = converted(spread=0.1, retention_after=4).train()
    ids, _ = prompt(padding=())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {n: p.clone() for n, p in model.named_parameters() if "dynmask_score" in n}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids)
        losses.append(float(loss.detach()))
        (loss + collect_retention_loss(model)).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = dict(model.named_parameters())
    assert all(not torch.equal(x, after[n]) for n, x in before.items())


# saved, copied, given back


@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = converted(name, width=(9, 12))
    ids, _ = prompt(padding=())
    model.save_pretrained(tmp_path)
    loaded = load_converted(tmp_path)
    assert loaded.config.dynmask == model.config.dynmask
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = load_converted(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for s in scores_of(half).values() for p in s.parameters())
    plain = type(model).from_pretrained(tmp_path)
    assert not scores_of(plain) and plain.config._attn_implementation != "dynmask_layers"


@pytest.fixture
def reports():
    """What transformers says while it loads models; the command line, if it ran, has hushed it."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger, said = logging.getLogger("transformers.modeling_utils"), []

    class Ear(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    ear = Ear()
    logger.addHandler(ear)
    yield said
    logger.removeHandler(ear)
    transformers.logging.set_verbosity(level)


def test_loading_information_is_refused(tmp_path):
    with pytest.raises(ValueError, match="output_loading_info: expected False"):
        load_converted(tmp_path, output_loading_info=True)


def test_only_tensors_that_nobody_reads_are_reported(name, tmp_path, reports):
    model = converted(name)
    model.save_pretrained(tmp_path)
    loaded = load_converted(tmp_path)
    assert not reports and type(loaded) is type(model)
    stranger = {"model.layers.1.self_attn.stranger": torch.ones(3)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | stranger)
    load_converted(tmp_path)
    (report,) = reports
    assert "self_attn.stranger" in report and "dynmask_score" not in report
    type(model).from_pretrained(tmp_path)  # whoever leaves the scores out is told
    assert "self_attn.stranger" in reports[1] and "dynmask_score" in reports[1]
    kept = {n: x for n, x in model.state_dict().items() if n != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    load_converted(tmp_path)
    assert len(reports) == 3 and "norm.weight" in reports[2] and "MISSING" in reports[2]


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="a folder with config.json"):
        load_converted(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not converted.*dynmask.convert"):
        load_converted(tmp_path)
    model = converted()
    kept = {n: x for n, x in model.state_dict().items() if "1.self_attn.dynmask" not in n}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match="expected 4 score tensors, received 2"):
        load_converted(tmp_path)


@torch.no_grad()
def test_copies_are_converted_models_of_their_own():
    model = converted()
    ids, mask = prompt()
    expected = model(ids, attention_mask=mask).logits
    other = copy.deepcopy(model)
    scores_of(other)[0].A.add_(1)
    assert not torch.equal(other(ids, attention_mask=mask).logits, expected)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    revert(other)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="of another"):
        model(ids, past_key_values=BoundedCache(other))


@torch.no_grad()
def test_revert_is_bit_for_bit(name):
    model = TINY[name]()
    ids, mask = prompt()
    before, logits = state(model), model(ids, attention_mask=mask).logits
    convert(model, **SMALL)
    cache = BoundedCache(model)
    assert state(model) != before
    assert not torch.equal(model(ids, attention_mask=mask).logits, logits)
    assert revert(model) is model
    assert state(model) == before
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    assert not hasattr(model.config, "dynmask")
    with pytest.raises(ValueError, match="reverted"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="expected one that dynmask.convert changed"):
        revert(model)


def test_scores_are_parameters_where_the_model_is():
    model = convert(tiny_llama().to(torch.bfloat16), **SMALL, form="bounded")
    names = [n for n, _ in model.named_parameters() if "dynmask_score" in n]
    assert len(names) == 4 and set(names) <= set(model.state_dict())
    for score in scores_of(model).values():
        assert isinstance(score, ValueScore) and score.A.dtype == torch.float32
        assert score.form == "bounded" and not score.training
    trained = convert(tiny_llama().train(), **SMALL)
    assert all(score.training for score in scores_of(trained).values())
    ids, _ = prompt(padding=())
    assert model(ids).logits.dtype == torch.bfloat16
    gemma = convert(TINY["gemma3"](), **SMALL)
    assert sorted(scores_of(gemma)) == [1, 3]  # the others slide


REFUSED = {
    "soft cap": (lambda: tiny("Gemma2ForCausalLM", "Gemma2Config"), {}, "soft cap"),
    "own attention": (lambda: tiny("BloomForCausalLM", "BloomConfig"), {}, "AttentionInterface"),
    "latent attention": (
        lambda: tiny(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", num_key_value_heads=2, kv_lora_rank=8,
            q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        ),
        {},
        "one head dim",
    ),
    "all layers slide": (TINY["mistral"], {}, "layer of full attention"),
    "no room": (tiny_llama, {"width": 4}, r"more than sinks \+ window = 4"),
    "too narrow": (tiny_llama, {"width": 3}, "width: expected"),
    "widths": (tiny_llama, {"width": (9, 9, 9)}, "each of 2 kv heads"),
    "form": (tiny_llama, {"form": "cubic"}, "form: expected one of"),
    "weight": (tiny_llama, {"retention_weight": -1.0}, "retention_weight: expected 0"),
    "infinite": (tiny_llama, {"retention_weight": float("inf")}, "a finite number, received inf"),
    "no number": (tiny_llama, {"retention_weight": "a"}, "a finite number, received 'a'"),
    "fraction": (tiny_llama, {"width": 9.0}, "width: expected a whole number.* received 9.0"),
    "none": (tiny_llama, {"width": None}, "width: expected a whole number.* received None"),
    "rows": (tiny_llama, {"retention_rows": 0}, "retention_rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_left_as_it_is(case):
    make, over, reason = REFUSED[case]
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=reason):
        convert(model, **(SMALL | over))
    assert state(model) == before
    assert not hasattr(model.config, "dynmask")


def test_a_width_that_does_not_fit_is_not_assigned():
    model = converted()
    before = copy.deepcopy(model.config.dynmask), scores_of(model)[1].retention
    for retention, message in ((512, "expected a Retention"), (Retention((9, 9, 9)), "received 3")):
        with pytest.raises(ValueError, match=message):
            scores_of(model)[1].retention = retention
    assert (model.config.dynmask, scores_of(model)[1].retention) == before


def test_one_change_at_a_time():
    model = converted()
    with pytest.raises(ValueError, match="dynmask.revert"):
        convert(model, **SMALL)
    with pytest.raises(ValueError, match="dynmask.revert"):
        sparsify(model, dynmask.policies.Causal())
    second = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="config object of a converted one"):
        second(prompt()[0])
    with (
        sparsify(tiny_llama(), dynmask.policies.Causal()) as run,
        pytest.raises(ValueError, match="one policy at a time"),
    ):
        convert(run.model, **SMALL)
