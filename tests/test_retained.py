"""The retained policy and its calibration: laws of the mask, a frozen model, cards, widths."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynmask
from dynmask import cli, sparsify
from dynmask.card import FILE_NAME, MaskCard
from dynmask.masks import LifetimeMask
from dynmask.nn import PairScore, Retention, ValueScore
from dynmask.policies import H2O, Layer, Retained, SnapKV, parse
from dynmask.policies.retained import widths_within
from dynmask.retention import ExactRetention
from dynmask.retrofit import RetainedSettings, retrofit
from dynmask.teaching import Teacher
from tests.policies import POLICIES, score_modules
from tests.stand_in import save_stand_in
from tests.tiny import TINY, tiny_gemma3, tiny_llama, tiny_mistral

SETTINGS = RetainedSettings(
    steps=6, lengths=(40, 61), tokens=120, rows=6, warmup=1, hidden=6, width=20, window=7, sinks=2
)


def documents(count=10, length=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 256, (length,), generator=generator) for _ in range(count)]


def train(model, settings=SETTINGS, **more):
    given = {"policy": "retained", "settings": settings, "progress": False} | more
    return dynmask.calibrate(model, given.pop("documents", documents()), **given)


@pytest.fixture(scope="module")
def card():
    return train(tiny_llama())


def tensors(queries=60, keys=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def same(a, b):
    return a.header == b.header and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


# The policy


def test_a_row_reads_sinks_window_and_the_best_of_the_rest():
    policy, (query, key, value) = POLICIES["retained"], tensors()
    scores = policy.scores(key, value, Layer(0))
    dense = policy(query, key, value, Layer(0)).dense()
    for b, g, q in ((0, 0, 59), (1, 1, 30), (0, 1, 14), (1, 0, 5)):
        pool = range(2, q - 4)
        best = sorted(pool, key=lambda k: (float(scores[b, g, k]), k))[-6:]
        kept = {*range(min(2, q + 1)), *range(max(q - 4, 0), q + 1), *best}
        assert set(dense[b, g, q].nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("layer", [0, 1])
def test_prefix_chunk_and_decode_choose_alike(layer):
    policy, (query, key, value) = POLICIES["retained"], tensors()
    whole = policy(query, key, value, Layer(layer)).dense()
    for first, stop in ((0, 40), (20, 40), (39, 40)):
        part = policy(query[:, :, first:stop], key[:, :, :stop], value[:, :, :stop], Layer(layer))
        assert torch.equal(part.dense(), whole[:, :, first:stop, :stop])


def test_keys_are_scored_as_they_were_before_rotation():
    model = tiny_llama()
    found = {}

    class Spy(Retained):
        def scores(self, key, value, layer):
            scores = super().scores(key, value, layer)
            found[layer.index] = value, scores
            return scores

    card = train(model, replace(SETTINGS, steps=1))
    ids = documents(1)[0][None]
    inputs = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, given, out: inputs.append(out)
    )
    base = card.policy()
    spy = Spy(base.modules, width=20, window=7, sinks=2)
    with torch.no_grad(), dynmask.sparsify(model, spy):
        model(ids)
    hook.remove()
    plain = inputs[0].view(1, 61, 2, 16).transpose(1, 2)
    value, scores = found[0]
    assert base.modules[0] is not None
    torch.testing.assert_close(scores, base.modules[0](plain, value), rtol=0, atol=6e-4)


def test_each_head_has_the_width_that_it_was_given():
    policy = Retained(score_modules(), width=((9, 30), (12, 12)), window=5, sinks=2)
    query, key, value = tensors()
    counts = policy(query, key, value, Layer(0)).dense().sum(-1).amax(-1)
    assert counts.tolist() == [[9, 30]] * 2
    assert policy.retention(1) == ExactRetention((12, 12), 5, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": ()}, "as many widths"),
        ({"windows": (8,)}, "as many widths"),
        ({"modules": (None, None)}, "score module for layer 0"),
        ({"width": 6}, "width"),
        ({"width": ((9, 9),)}, "as many widths"),
        ({"width": 20.0}, "width: expected a whole number.* received 20.0"),
        ({"width": None}, "width: expected a whole number.* received None"),
        ({"width": "20"}, "width: expected a whole number.* received '20'"),
    ],
)
def test_policies_that_do_not_fit_are_refused(settings, message):
    given = {"modules": score_modules(), "width": 20, "window": 5, "sinks": 2} | settings
    with pytest.raises(ValueError, match=message):
        Retained(**given)


@pytest.mark.parametrize(
    ("modules", "width", "message"),
    [
        ((PairScore(2, 16), PairScore(4, 16)), 9, "of 2 kv heads.* one of 4 for layer 1"),
        ((ValueScore(1, 16), ValueScore(2, 16)), 9, "of 2 kv heads.* one of 1 for layer 0"),
        ((PairScore(2, 16),) * 2, ((9, 9), (9, 9, 9)), "each of 2 kv heads, received 3"),
    ],
)
def test_policies_of_other_heads_are_refused_before_the_model_runs(modules, width, message):
    with pytest.raises(ValueError, match=message):
        sparsify(tiny_llama(), Retained(modules, width, window=3, sinks=1))


@given(
    heads=st.integers(1, 5),
    more=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_widths_add_up_to_the_budget_and_capture_the_most(heads, more, seed):
    generator = torch.Generator().manual_seed(seed)
    widths, mass = [4, 8, 16, 40], torch.rand(heads, 4, generator=generator).sort(-1).values
    found = widths_within(4 * heads + more, widths, mass.tolist())
    assert sum(found) == 4 * heads + more and min(found) >= 4
    # concave curves: no key is worth more in another head
    curve = (1 - torch.exp(-torch.tensor(widths) / (5.0 + 20 * torch.rand(heads, 1)))).tolist()
    best = widths_within(4 * heads + more, widths, curve)

    def captured(chosen):
        total = 0.0
        for w, c in zip(chosen, curve, strict=True):
            w = min(w, 40)
            i = next(i for i in range(1, 4) if w <= widths[i])
            share = (w - widths[i - 1]) / (widths[i] - widths[i - 1])
            total += c[i - 1] + share * (c[i] - c[i - 1])
        return total

    for a in range(heads):
        for b in range(heads):
            if a != b and best[a] > 4:
                moved = list(best)
                moved[a], moved[b] = moved[a] - 1, moved[b] + 1
                assert captured(moved) <= captured(best) + 1e-6


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(ValueError, match="at least 4 keys a head"):
        widths_within(7, [4, 8], [[0.1, 0.2], [0.1, 0.2]])


# H2O and SnapKV


def test_h2o_evicts_what_received_the_least():
    """One head, rows one at a time, against the rule written out."""
    query, key, _ = tensors(24, 24)
    query, key = query[:1, :1], key[:1, :1]
    policy = H2O(width=6, recent=0.4, block=1)
    dense = policy(query, key, key, Layer(0)).dense()[0, 0]
    received, held = {}, []
    for q in range(24):
        held = [*held, q]
        assert dense[q].nonzero().flatten().tolist() == held
        weights = (key[0, 0, held] @ query[0, 0, q] * 8**-0.5).softmax(-1)
        for k, weight in zip(held, weights.tolist(), strict=True):
            received[k] = received.get(k, 0.0) + weight
        if len(held) > 5:
            held.remove(min((k for k in held if k < q + 1 - 2), key=lambda k: received[k]))


def test_h2o_never_reads_more_than_its_width():
    policy, (query, key, value) = H2O(width=16, block=5), tensors()
    assert policy(query, key, value, Layer(0)).dense().sum(-1).max() <= 16


def test_snapkv_keeps_what_the_end_of_the_prompt_looked_at():
    query, key, value = tensors(50, 50)
    policy = SnapKV(width=14, last=6, pool=3)
    prompt = policy(query, key, value, Layer(0))
    assert bool(prompt.dense()[..., :50].tril().eq(torch.ones(50, 50).tril().bool()).all())
    more = torch.cat([key, torch.randn(2, 2, 3, 8)], 2)
    mask = policy(query[:, :, :3], more, more, Layer(0)).dense()
    weights = query[:, :, -6:] @ key.repeat_interleave(2, 1).mT * 8**-0.5
    weights = weights.masked_fill(~torch.ones(6, 50).tril(44).bool(), float("-inf")).softmax(-1)
    sums = weights.view(2, 2, -1, 50).sum(2)[..., :44]
    for b in range(2):
        for g in range(2):
            pooled = [float(sums[b, g, max(k - 1, 0) : k + 2].max()) for k in range(44)]
            kept = mask[b, g, 0, :44].nonzero().flatten().tolist()
            assert len(kept) == 8 and mask[b, g, 0, 44:51].all() and not mask[b, g, 0, 51:].any()
            least = min(pooled[k] for k in kept)
            assert all(pooled[k] <= least + 1e-6 for k in range(44) if k not in kept)
    known = SnapKV(width=14, last=6, pool=3, prompts=(50, 50))
    later = torch.cat([query, torch.randn(2, 4, 3, 8)], 2)
    both = known(later, more, more, Layer(0)).dense()
    assert torch.equal(both[:, :, 50:], mask) and torch.equal(both[:, :, :50, :50], prompt.dense())


# Calibration


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("head", ["pair", "value"])
def test_training_lowers_the_loss_and_leaves_the_model(name, head):
    model = TINY[name]().train()
    before = copy.deepcopy(model.state_dict())
    implementation, state = model.config._attn_implementation, torch.get_rng_state()
    settings = replace(SETTINGS, steps=25, lengths=(61,), tokens=600, rows=20, head=head)
    # the same batches and the same rows, with and without learning
    untaught = train(model, replace(settings, learning_rate=1e-9)).header["settings"]["loss"]
    card = train(model, replace(settings, learning_rate=0.03))
    assert card.header["settings"]["loss"] < untaught - (0.03 if head == "pair" else 0.005)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training and model.config._attn_implementation == implementation
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    ids = documents(2, 30)[0][None]
    with torch.no_grad():
        full = model(ids).logits
        with dynmask.sparsify(model, card.policy(width=64)):
            torch.testing.assert_close(model(ids).logits, full, rtol=1e-4, atol=1e-4)
        with dynmask.sparsify(model, card.policy(width=10), measure=True) as run:
            assert not torch.allclose(model(ids).logits, full, atol=1e-3)
    assert 0 < run.summary()["prefill"]["density"] < 1


def test_layers_with_a_window_of_their_own_keep_it():
    model = tiny_gemma3()
    card = train(model, replace(SETTINGS, steps=2))
    assert card.header["windows"] == [8, None, 8, None]
    assert {name.split(".")[1] for name in card.tensors} == {"1", "3"}
    policy = card.policy(budget="per_head")
    assert policy.retention(0) == Retention(8, 8) and policy.retention(1).window == 7
    assert sum(policy.width[1]) + sum(policy.width[3]) == 4 * 20
    with pytest.raises(ValueError, match="windows everywhere"):
        train(tiny_mistral())


def test_figures_are_those_of_the_masks(card):
    model, policy = tiny_llama(), card.policy()
    ids = documents()[-1][None]
    with torch.no_grad(), dynmask.sparsify(model, policy, measure=True) as run:
        model(ids)
    density = torch.tensor(run.summary()["prefill"]["density_per_head"])
    torch.testing.assert_close(torch.tensor(card.density), density, rtol=1e-6, atol=1e-6)
    mass = torch.tensor(card.header["curve"]["mass"])
    assert card.header["curve"]["widths"] == [9, 41]
    assert card.header["data"]["held_out"] == 1 and (mass.diff() >= -1e-9).all()
    kept = torch.tensor(card.kept_mass).view(2, 2, 2).mean(-1)
    assert (mass[..., 0] <= kept).all() and (kept <= mass[..., 1]).all()


def test_a_seed_gives_one_card(card):
    assert same(card, train(tiny_llama()))
    assert not same(card, train(tiny_llama(), seed=1))


def test_an_interrupted_training_goes_on_to_the_same_card(card, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    look, calls = Teacher.look, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 6:  # in the middle of the third step
            raise KeyboardInterrupt
        assert all(p.grad is None for p in self.heads.modules[given[-1].index].parameters())
        look(self, *given)

    monkeypatch.setattr(Teacher, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama(), checkpoint=path)
    monkeypatch.setattr(Teacher, "look", look)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    assert same(card, train(tiny_llama(), checkpoint=path))
    assert same(card, train(tiny_llama(), checkpoint=path))  # finished: nothing is trained again
    with pytest.raises(ValueError, match="of another run"):
        train(tiny_llama(), checkpoint=path, seed=3)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read"):
        train(tiny_llama(), checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"minutes": 0}, "minutes: expected more than 0"),
        ({"minutes": float("nan")}, "minutes"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": (10,)}, "at least 11"),
        ({"late": 1.5}, "late: expected a share"),
        ({"head": "mlp"}, "'pair' or 'value'"),
        ({"width": 8}, "window and sinks"),
        ({"rows": 2.0}, "rows"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"documents": []}, "at least one"),
        ({"documents": documents(3, 39)}, r"at least 40 tokens \(settings.lengths\)"),
        ({"documents": documents(3, 50)}, "at least one of 61 tokens"),
        ({"documents": [torch.full((61,), 256)]}, "token ids"),
        ({"settings": dynmask.DamSettings()}, "RetainedSettings for policy 'retained'"),
        ({"policy": "dam", "settings": SETTINGS}, "DamSettings for policy 'dam'"),
        ({"policy": "dam", "settings": None, "checkpoint": "x"}, "checkpoint"),
        ({"policy": "streaming"}, "'dam', 'retained' or 'gated'"),
        ({"settings": replace(SETTINGS, lengths=(2000,))}, "the model's 1024 positions"),
    ],
)
def test_bad_requests(more, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_llama(), **more)
    with pytest.raises(ValueError, match="RetainedSettings"):
        retrofit(tiny_llama(), documents(), dynmask.DamSettings())  # type: ignore[arg-type]


def test_documents_of_a_length_are_preferred_and_windows_keep_the_first_token():
    from dynmask.retrofit import _Data

    model = tiny_llama()
    given = [torch.full((n,), i + 2) for i, n in enumerate((40, 45, 60, 61, 80, 90))]
    for document in given:
        document[0] = 1
    data = _Data(model, given, SETTINGS, 0)
    assert data.pools == [[0, 1, 2], [3, 4, 5]] and not data.held_out
    batch = data.batch(3, 0)
    assert batch.shape == (3, 40) and bool((batch[:, 0] == 1).all())
    assert set(batch[:, 1].tolist()) == {2, 3, 4}
    assert torch.equal(batch, data.batch(3, 0)) and data.batch(0, 1).shape == (1, 61)


# The card


def test_card_round_trip(card, tmp_path):
    path = card.save_pretrained(tmp_path)
    again = MaskCard.from_pretrained(path)
    assert same(card, again) and "retained" in repr(again)
    ids = documents(1)[0][None]
    model = tiny_llama()
    card.check(model)
    with torch.no_grad():
        with dynmask.sparsify(model, card.policy()):
            first = model(ids).logits
        with dynmask.sparsify(model, parse(f"retained:{tmp_path}")):
            assert torch.equal(first, model(ids).logits)
    policy: Any = parse(f"retained:{tmp_path},width=31,budget=per_head")
    assert sum(map(sum, policy.width)) == 4 * 31
    even: Any = parse(f"retained:{tmp_path},width=31")
    assert even.width == 31
    with pytest.raises(ValueError, match="calibrated on"):
        dynmask.sparsify(tiny_llama(seed=1), policy)
    with pytest.raises(ValueError, match="whose masks depend on the input"):
        card.patterns(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("retained", "expected retained:PATH"),
        ("retained:{},width=x", "expected width as int"),
        ("retained:{},width=8", "width"),
        ("retained:{},width=8,budget=per_head", "at least 9 keys a head"),
        ("retained:{},budget=more", "'even' or 'per_head'"),
        ("retained:{},width=20,tau=3", "options width, budget after a card"),
        ("dam:{}", "received one of 'retained'"),
    ],
)
def test_specs_that_are_refused(card, tmp_path, spec, message):
    card.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse(spec.format(tmp_path))


def spoilt(card):
    """(name, header, tensors) of cards that must not be taken."""
    name = "layers.0.w_in"

    def header(**change):
        new = copy.deepcopy(card.header)
        for path, value in change.items():
            *parents, last = path.split("__")
            place = new
            for parent in parents:
                place = place[parent]
            place[last] = value
        return new, dict(card.tensors)

    yield "hidden", *header(settings__hidden=7)
    yield "a huge hidden", *header(settings__hidden=2**40)
    yield "head", *header(settings__head="pickle")
    yield "width", *header(settings__width=3)
    yield "window", *header(settings__window=-1)
    yield "sinks", *header(settings__sinks=True)
    yield "windows", *header(windows=[None])
    yield "a window", *header(windows=[None, 8])
    yield "a window of text", *header(windows=[None, "8"])
    yield "curve", *header(curve=None)
    yield "curve's order", *header(curve__widths=[41, 9])
    yield "curve's start", *header(curve__widths=[3, 41])
    yield "curve's size", *header(curve__mass=[[[0.1]]] * 2)
    yield "curve's shares", *header(curve__mass=[[[0.1, 2.0]] * 2] * 2)
    yield "layers", *header(model__layers=10**9)
    yield "kept mass", *header(kept_mass=[[0.5]])
    whole = card.tensors[name]
    for what, tensor in {
        "a shape": whole[:, :-1],
        "a dtype": whole.to(torch.int32),
        "NaN": whole * float("nan"),
        "infinity": whole + float("inf"),
        "one NaN": torch.cat([whole[:, :-1], whole[:, -1:] * float("nan")], 1),
    }.items():
        yield what, card.header, dict(card.tensors) | {name: tensor}
    yield "a tensor more", card.header, dict(card.tensors) | {"layers.2.w_in": whole}
    yield "a tensor less", card.header, {n: t for n, t in card.tensors.items() if n != name}


def test_hostile_cards_are_refused(card):
    for what, header, tensors in spoilt(card):
        with pytest.raises(ValueError, match="mask card"):
            MaskCard(header, tensors)
            pytest.fail(what)


def test_a_changed_file_is_refused(card, tmp_path):
    path = card.save_pretrained(tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        MaskCard.from_pretrained(path)


# The command line


def test_calibrate_generate_and_evaluate_on_the_command_line(tmp_path, capsys, monkeypatch):
    model = str(save_stand_in(tmp_path / "model"))
    folder = str(tmp_path / "kept")
    small = ("--lengths", "64", "96", "--tokens", "192", "--steps", "3", "--width", "24")
    small += ("--window", "8", "--sinks", "2", "--documents", "9", "--quiet")
    arguments = ["calibrate", "--model", model, "--policy", "retained", "--out", folder, *small]
    assert cli.main(arguments) == 0
    assert "retained" in capsys.readouterr().out
    assert (tmp_path / "kept" / FILE_NAME).is_file()
    policy = f"retained:{folder},width=20"
    asked = ["generate", "--model", model, "--prompt", "a b c " * 20, "--max-new-tokens", "3"]
    caches = []

    class Cache(dynmask.BoundedCache):
        def __init__(self, run):
            super().__init__(run)
            caches.append(self)

    monkeypatch.setattr(dynmask, "BoundedCache", Cache, raising=False)
    assert cli.main([*asked, "--policy", policy, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(caches) == 1 and caches[0].get_seq_length() > 60
    assert result["policy"] == policy and 0 < result["density_prefill"] < 1
    asked = ["evaluate", "--model", model, "--task", "lines", "--length", "200", "--n", "1"]
    assert cli.main([*asked, "--policy", policy, "--no-timing", "--quiet"]) == 0
    assert "retained:kept,width=20" in capsys.readouterr().out
    assert cli.main([*arguments[: -len(small)], "--tau", "0.2", "--force"]) == 2
    assert "--tau" in capsys.readouterr().err


def test_a_lifetime_mask_says_what_may_be_freed(card):
    """The evicting protocol: mask and scores belong together, nothing is added to the logits."""
    policy, (query, key, value) = POLICIES["retained"], tensors()
    scores = policy.scores(key, value, Layer(0))
    mask = policy.retention(0).mask(scores, 60)
    assert isinstance(mask, LifetimeMask) and policy.bias(scores, Layer(0)) is None
    assert torch.equal(mask.death, policy(query, key, value, Layer(0)).death)
