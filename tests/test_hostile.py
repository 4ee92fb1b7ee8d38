"""What hostile and unlucky users found: each test states the law that was broken."""

import copy
import itertools
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dynmask import BoundedCache, load_converted, sparsify  # noqa: E402
from dynmask.cache import KeyStore  # noqa: E402
from dynmask.card import MaskCard  # noqa: E402
from dynmask.integrations.doge import run_doge  # noqa: E402
from dynmask.nn import DynamicMaskAttention, Retention, collect_retention_loss  # noqa: E402
from dynmask.policies import Layer, Retained, Streaming  # noqa: E402
from dynmask.scores import PairScore, ValueScore  # noqa: E402
from dynmask.teaching import Training  # noqa: E402
from tests.test_bounded import prompt  # noqa: E402
from tests.test_cache import tensors  # noqa: E402
from tests.test_convert import converted, scores_of  # noqa: E402
from tests.test_doge import make_doge, tokens  # noqa: E402
from tests.test_retained import SETTINGS, train  # noqa: E402
from tests.tiny import VOCAB, tiny_llama  # noqa: E402

# a law of every cache: token by token, in chunks and in one forward the same keys are read


@pytest.mark.parametrize("full_cache", [False, True])
@torch.no_grad()
def test_repeated_tokens_are_retained_alike_by_prefill_and_decode(full_cache):
    """Equal tokens tie, and the later key wins, whatever is rounded off on the way."""
    model = tiny_llama(layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Retained((PairScore(2, 16, 6),), width=24, window=7, sinks=2)
    ids = torch.randint(3, 23, (1, 120), generator=torch.Generator().manual_seed(1))
    with sparsify(model, policy) as run:
        expected = model(ids, use_cache=False).logits
        for cuts in ([0, 17, 18, 19, 90, 120], range(121)):
            cache = transformers.DynamicCache() if full_cache else BoundedCache(run)
            parts = [
                model(ids[:, a:b], past_key_values=cache).logits
                for a, b in itertools.pairwise(cuts)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prefix_may_be_read_in_inference_mode_and_continued_outside():
    model, (ids, _) = converted(), prompt(padding=())
    expected = model(ids, use_cache=False).logits
    cache = BoundedCache(model)
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 4]))
    parts = [model(part, past_key_values=cache).logits for part in ids[:, 10:].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 10:], rtol=1e-4, atol=1e-4)


def test_a_store_of_another_dtype_is_refused_before_it_changes():
    store = KeyStore(Retention(6, 2, 1))
    q, k, v, s = tensors(1, 2, 1, 9)
    store.attend(q, k, v, s)
    for n in (1, 3):
        part = (x[:, :, :n] for x in (q.float(), k.float(), v.float(), s))
        with pytest.raises(ValueError, match="float64.*as in the store.*the same autocast"):
            store.attend(*part)
    assert store.seen == [9]


@torch.no_grad()
def test_a_width_beyond_all_positions_keeps_every_key():
    model, (ids, _) = tiny_llama(), prompt(padding=())
    expected = model(ids).logits
    with sparsify(model, Streaming(sinks=1, window=2**33)) as run:
        cache = BoundedCache(run)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_from_which_more_is_taken_than_there_is_is_empty():
    model, (ids, _) = converted(width=50), prompt(padding=())
    cache = BoundedCache(model)
    model(ids, past_key_values=cache)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


# converted models


def test_a_pickled_converted_model_runs_in_a_new_process():
    model, (ids, _) = converted(), prompt(padding=())
    with torch.no_grad():
        content = pickle.dumps((model, ids, model(ids).logits))
    code = (  # reads what this test wrote: people pickle models, dynmask reads no pickle
        "import pickle, sys, torch\n"
        "model, ids, logits = pickle.load(sys.stdin.buffer)\n"
        "assert torch.equal(model(ids).logits, logits)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=content, capture_output=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr[-500:].decode()


@torch.no_grad()
def test_a_width_assigned_while_training_is_saved(tmp_path):
    model, (ids, _) = converted(), prompt(padding=())
    before = model(ids).logits
    scores_of(model)[0].retention = Retention((12, 16), 3, 1)
    other = copy.deepcopy(model)
    scores_of(other)[1].retention = Retention(11, 2, 0)
    for number, one in enumerate((model, other)):
        one.save_pretrained(tmp_path / str(number))
        loaded = load_converted(tmp_path / str(number))
        assert not torch.equal(one(ids).logits, before)
        assert torch.equal(loaded(ids).logits, one(ids).logits)
        assert loaded.config.dynmask == one.config.dynmask
    assert not torch.equal(model(ids).logits, other(ids).logits)


@torch.no_grad()
def test_a_width_assigned_while_a_cache_is_filled_is_refused():
    model, (ids, _) = converted(), prompt(padding=())
    cache = BoundedCache(model)
    model(ids, past_key_values=cache)
    scores_of(model)[1].retention = Retention(12, 3, 1)
    with pytest.raises(ValueError, match="as when it was filled.*make a new cache"):
        model(ids[:, :1], past_key_values=cache)


def test_the_retention_loss_teaches_whatever_part_of_a_score_is_trained():
    model = converted(spread=0.1, retention_after=4).train()
    for score in scores_of(model).values():
        score.A.requires_grad_(False)
    model(prompt(padding=())[0], use_cache=False)
    collect_retention_loss(model).backward()
    assert all(s.dt_proj.weight.grad.any() for s in scores_of(model).values())


# the layer


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_layer_trains_as_the_layer_does():
    torch.manual_seed(0)
    layer = DynamicMaskAttention(24, 4, 2, 6, width=9, window=3, sinks=2, retention_weight=0)
    torch.nn.init.ones_(layer.score.A)
    x, grads = torch.randn(2, 40, 24), []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        call(x)[0].square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# score heads of a frozen model


def tiny_cohere():
    """Neighbouring dimensions are rotated, which cannot be undone."""
    config = transformers.CohereConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.CohereForCausalLM(config).eval()


def test_heads_that_look_at_values_alone_need_no_keys_before_rotation():
    """The remedy that the refusal of an unknown rotation names."""
    model = tiny_cohere()
    with pytest.raises(ValueError, match="head='value'"):
        train(model)
    card = train(model, replace(SETTINGS, head="value"))
    with sparsify(model, card.policy()), torch.no_grad():
        assert torch.isfinite(model(prompt()[0]).logits).all()

    def never(key):
        raise AssertionError("keys are turned back for values alone")

    score = ValueScore(1, 16, "bounded")
    policy = Retained((score,), width=9, window=3, sinks=1)
    key = value = torch.randn(1, 1, 5, 16)
    assert policy.scores(key, value, Layer(0, unrotate=never)).shape == (1, 1, 5)


@pytest.mark.parametrize("place", ["file/checkpoint", "none/\0/checkpoint"])
def test_a_checkpoint_that_cannot_be_written_is_noticed_before_the_training(
    place, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("a file is no folder")
    monkeypatch.setattr(Training, "_train", lambda *given: pytest.fail("trained first"))
    with pytest.raises((OSError, ValueError)):
        train(tiny_llama(), checkpoint=tmp_path / place)


@pytest.mark.parametrize("change", [{"width": 2**31}, {"hidden": 2**16 + 1}])
def test_sizes_that_no_card_can_hold_are_refused_before_the_training(change):
    with pytest.raises(ValueError, match=rf"settings.{next(iter(change))}: expected at most"):
        replace(SETTINGS, **change)


def test_ctrl_c_while_parameters_change_leaves_a_checkpoint_of_a_whole_step(tmp_path, monkeypatch):
    """Stopped at any moment, a training goes on to the card of one that was not."""
    expected = train(tiny_llama())
    path, step, calls = tmp_path / "run.safetensors", torch.optim.AdamW.step, []

    def interrupted(self, *given, **more):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_llama(), checkpoint=path)
        assert len(calls) == 3
        card = train(tiny_llama(), checkpoint=path)
        assert len(calls) == SETTINGS.steps
    assert card.header == expected.header
    assert all(torch.equal(card.tensors[n], t) for n, t in expected.tensors.items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["./card", "../card"])
def test_a_mistyped_folder_of_a_card_is_told_as_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist here"):
        MaskCard.from_pretrained(name)


# Doge


@torch.no_grad()
def test_a_copy_of_a_running_doge_never_computes_with_the_originals_weights():
    model, ids = make_doge(), tokens(1, 30)
    with run_doge(model):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        with pytest.raises(ValueError, match="one of a copy"):
            other(ids)
    with pytest.raises(ValueError, match="one of a copy"):
        other(ids)
