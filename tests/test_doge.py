"""Doge models of transformers: the same logits as their eager attention, without its mask."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DogeConfig, DogeForCausalLM, DynamicCache

from dynmask.integrations.cache import BoundedCache
from dynmask.integrations.doge import run_doge
from tests.tiny import tiny_llama

WIDTH, VOCAB = 12, 256


def make_doge(*, seed=0, width=WIDTH, **over):
    """Scores far from ties: random A above 0, a wide dt_proj."""
    config = DogeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, keep_window_size=width,
        initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation="eager", **over,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DogeForCausalLM(config).eval()
        for layer in model.model.layers:
            torch.nn.init.uniform_(layer.self_attn.A, 0.2, 0.5)
            torch.nn.init.normal_(layer.self_attn.dt_proj.weight, std=0.3)
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            if layer.self_attn.dt_proj.bias is not None:
                torch.nn.init.normal_(layer.self_attn.dt_proj.bias)
    return model


def tokens(batch, n, seed=1):
    """No token twice in a row of the batch: in layer 0 its scores would tie."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCAB - 2, generator=generator)[:n] + 2 for _ in range(batch)]
    return torch.stack(rows)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, WIDTH, WIDTH + 1, 90])
@pytest.mark.parametrize("over", [{}, {"attention_bias": True}, {"is_moe": True}])
def test_logits_are_those_of_eager(n, over):
    if "is_moe" in over:
        over = over | {"num_experts": 16, "num_experts_per_tok": 2}
    model, ids = make_doge(**over), tokens(2, n)
    with torch.no_grad():
        expected = model(ids).logits
        with run_doge(model):
            close(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)  # given back as it was


def test_scores_that_hardly_differ_are_told_apart_as_by_eager():
    with run_doge(make_doge(width=1)) as run:
        scores = torch.tensor([[[1 + 1e-6, 1.0]]])
        assert run.policy.retention(0).mask(scores).dense()[0, 0, 1].tolist() == [True, False]


def test_logits_are_far_from_those_of_full_attention():
    """What the test above would not notice if few keys mattered."""
    ids = tokens(2, 90)
    narrow, wide = make_doge(), make_doge(width=1000)
    with torch.no_grad(), run_doge(narrow), run_doge(wide):
        assert (narrow(ids).logits - wide(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_eager_and_each_sequence_alone(side):
    model, lengths, n = make_doge(), [60, 33, 7], 60
    ids, mask = tokens(3, n), torch.zeros(3, n, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, n - length :] = 1
    mask = mask if side == "left" else mask.flip(-1)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    more = {"attention_mask": mask, "position_ids": position}
    seen = mask.bool()
    with torch.no_grad():
        expected = model(ids, **more).logits
        with run_doge(model):
            found = model(ids, **more).logits
            for row in range(3):
                alone = model(ids[row : row + 1, seen[row]]).logits[0]
                close(found[row, seen[row]], alone)
        close(found[seen], expected[seen])


def test_packed_sequences_are_eager():
    model, ids = make_doge(), tokens(1, 70)
    position = torch.cat([torch.arange(40), torch.arange(30)])[None]
    more = {"position_ids": position, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **more).logits
        assert (expected - model(ids, use_cache=False).logits).abs().max() > 0.1
        with run_doge(model):
            close(model(ids, **more).logits, expected)


@pytest.mark.parametrize("window", [8, WIDTH, 100])
def test_a_sliding_window_within_the_width_or_never_filled(window):
    model, ids = make_doge(sliding_window=window), tokens(1, 90)
    with torch.no_grad():
        expected = model(ids).logits
        with run_doge(model):
            close(model(ids).logits, expected)


def test_a_sliding_window_wider_than_the_width_is_refused():
    model = make_doge(sliding_window=20)
    with torch.no_grad(), run_doge(model):
        model(tokens(1, 20))
        with pytest.raises(ValueError, match="keep_window_size"):
            model(tokens(1, 21))


@pytest.mark.parametrize("chunks", [[50], [20, 1, 1, 28], [1] * 20])
def test_a_cache_continues_as_eager_does(chunks):
    model, ids = make_doge(), tokens(2, sum(chunks))
    with torch.no_grad():
        expected = model(ids).logits
        cache, parts, first = DynamicCache(config=model.config), [], 0
        with run_doge(model):
            for size in chunks:
                part = ids[:, first : first + size]
                parts.append(model(part, past_key_values=cache, use_cache=True).logits)
                first += size
    close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_that_of_eager(beams):
    model, ids = make_doge(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11], ids[1, :11] = 0, 0
    more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    more["no_repeat_ngram_size"] = 1  # no ties
    expected = model.generate(ids, **more)
    with run_doge(model):
        assert torch.equal(model.generate(ids, **more), expected)


def test_a_static_cache_gives_the_same():
    model, ids = make_doge(), tokens(1, 30)
    more = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    more["no_repeat_ngram_size"] = 1
    expected = model.generate(ids, **more)
    with run_doge(model):
        assert torch.equal(model.generate(ids, cache_implementation="static", **more), expected)


def test_a_bounded_cache_of_the_width_gives_the_same():
    model, ids = make_doge(), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :11], ids[1, :11] = 0, 0
    more = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    more["no_repeat_ngram_size"] = 1
    expected = model.generate(ids, **more)
    with run_doge(model) as run:
        cache = BoundedCache(run)
        assert torch.equal(model.generate(ids, past_key_values=cache, **more), expected)
        assert [layer.store.slots for layer in cache.layers] == [WIDTH, WIDTH]
    with pytest.raises(ValueError, match="in effect"):
        BoundedCache(run)


def test_a_bounded_cache_beside_a_sliding_window_is_refused():
    model = make_doge(sliding_window=8)
    with torch.no_grad(), run_doge(model) as run, pytest.raises(ValueError, match="sliding_window"):
        model(tokens(1, 5), past_key_values=BoundedCache(run))


def test_gradients_are_those_of_eager():
    model, ids = make_doge().train(), tokens(2, 40)
    grads = []
    for own in (copy.deepcopy(model), model):
        if own is model:
            run_doge(own)
        own(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in own.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(layer.self_attn.A.grad.any() for layer in model.model.layers)


class Largest(TorchDispatchMode):
    """The most numbers that one tensor holds."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_holds_a_number_for_every_pair(padded):
    n = 1600
    model, ids = make_doge(), torch.randint(2, VOCAB, (1, n))
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[:, :300] = 0
    with torch.no_grad(), Largest() as largest, run_doge(model):
        model(ids, attention_mask=mask, logits_to_keep=1)
    assert largest.most < n * n / 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Doge family"):
        run_doge(tiny_llama())
    model, ids = make_doge(), tokens(1, 5)
    with pytest.raises(ValueError, match="impl"):
        run_doge(model, impl="fast")
    run = run_doge(model)
    with pytest.raises(ValueError, match="one policy at a time"):
        run_doge(model)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    run.remove()
    run.remove()
    with pytest.raises(ValueError, match="removed"):
        run.__enter__()
    assert model(ids, output_attentions=True).attentions[0].shape == (1, 4, 5, 5)
