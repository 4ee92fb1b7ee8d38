"""Calibration and cards of gates that keep by score."""

import copy
import itertools
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynmask
from dynmask import Budget, GatedCache, GatedSettings, LifetimeMask, MaskCard
from dynmask.budgets import BUDGETS, WITH_KEPT, calibrate_gates, choose_gates, offered
from dynmask.gated_settings import reads
from dynmask.judge import Judge
from dynmask.policies import parse
from dynmask.policies.gates import Gates
from tests.stand_in import save_stand_in
from tests.test_gated import documents
from tests.test_retained import train
from tests.tiny import copied, tiny_llama

INF = LifetimeMask.INF
OFFERED = (Budget(3, kept=4), Budget(3, 5), Budget(6, kept=9), Budget(8, 30))
SETTINGS = GatedSettings(max_kl=50.0, budgets=OFFERED, judged=12, sinks=1, last=8)
PLACES = [(layer, head) for layer in range(3) for head in range(4)]


@given(
    st.lists(st.integers(0, 4), min_size=12, max_size=12),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([1, 2, 4]),
)
def test_kept_budgets_are_given_to_whole_groups_of_scored_layers(kinds, scored, members):
    """Maps of kind n cost nothing from budget n on, and far too much below."""

    def cost(gates, most):
        def number(layer, head):
            row = [int(getattr(gates, name)[layer, head]) for name in ("window", "columns", "kept")]
            return (
                4 if row[0] == INF else [[b.window, b.columns, b.kept] for b in OFFERED].index(row)
            )

        return sum(100.0 * (number(*p) < k) for p, k in zip(PLACES, kinds, strict=True))

    gates = choose_gates(PLACES, OFFERED, 1.0, cost, Gates.full(3, 4), members, scored)
    left = dict(zip(PLACES, kinds, strict=True))
    expected: dict[tuple[int, int], int] = {}
    for number, budget in enumerate(OFFERED):
        for place in PLACES:
            layer, head = place
            group = [(layer, head // members * members + m) for m in range(members)]
            unit = group if budget.kept else [place]
            alone = all(p in left and left[p] <= number for p in unit)
            if alone and (not budget.kept or scored[layer]):
                expected |= dict.fromkeys(unit, number)
                for p in unit:
                    left.pop(p)
    for layer, head in PLACES:
        number = expected.get((layer, head))
        own = Budget(INF) if number is None else OFFERED[number]
        assert int(gates.window[layer, head]) == own.window
        assert int(gates.columns[layer, head]) == own.columns
        assert int(gates.kept[layer, head]) == own.kept
    assert cost(gates, math.inf) == 0


def test_kept_keys_are_offered_before_columns_that_read_as_many():
    assert [b for b in WITH_KEPT if not b.kept] == list(BUDGETS)
    for first, second in itertools.pairwise(WITH_KEPT):
        assert reads(first) < reads(second) or (reads(first) == reads(second) and not second.kept)
    assert offered() == BUDGETS and sum(b.kept > 0 for b in WITH_KEPT) >= 2
    assert {b.blocks > 0 for b in offered(blocks=True, kept=True)} == {False, True}
    assert GatedSettings(budgets=WITH_KEPT).keeps and not GatedSettings().keeps
    with pytest.raises(ValueError, match="columns, blocks or kept of a map"):
        GatedSettings(budgets=(Budget(4, 4, kept=4),))
    with pytest.raises(ValueError, match="whole numbers of keys"):
        GatedSettings(budgets=(Budget(4, kept=4.0),))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def retained(model):
    return train(model)


@pytest.fixture(scope="module")
def card(model, retained):
    return calibrate_gates(model, documents(90, 120), SETTINGS, scores=retained, progress=False)


def test_a_card_keeps_where_it_can_afford_it_and_costs_what_it_says(model, retained, card):
    assert (card.tensors["kept"] == 4).all()  # nearly everything is allowed
    told = {name: x for name, x in card.header["scores"].items() if name != "origin"}
    assert told == {"head": "pair", "hidden": 6, "layers": [True, True]}
    judge = Judge(model, documents(90, 120), SETTINGS, 0)
    judge.scores = retained.policy().modules
    judge.prepare()
    kl = card.header["kl"]
    assert judge.cost(card.policy().gates) == pytest.approx(kl, abs=1e-6) and kl > 0
    wide = (OFFERED[0], Budget(40, kept=40))
    some = replace(SETTINGS, max_kl=0.7 * kl, budgets=wide)  # not all can have the first
    fewer = calibrate_gates(model, documents(90, 120), some, scores=retained, progress=False)
    kept = fewer.policy().gates.kept
    assert fewer.header["kl"] <= 0.7 * kl and 4 in kept and 40 in kept
    assert torch.equal(kept[:, ::2], kept[:, 1::2])  # whole groups
    none = replace(SETTINGS, max_kl=1e-9)
    dense = calibrate_gates(model, documents(90), none, scores=retained, progress=False)
    assert not {"kept", "scores.0.w_in"} & dense.tensors.keys() and "scores" not in dense.header


@torch.no_grad()
def test_the_policy_of_a_card_evicts_by_its_scores(model, retained, card, tmp_path):
    card.save_pretrained(tmp_path / "card")
    again = MaskCard.from_pretrained(tmp_path / "card")
    again.check(model)
    policy: Any = again.policy(decode="select")
    for ours, theirs in zip(policy.scores, retained.policy().modules, strict=True):
        state = theirs.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in ours.state_dict().items())
        assert not any(p.requires_grad for p in ours.parameters())
    assert parse(f"gated:{tmp_path / 'card'},decode=keep").scored
    ids = documents(100)[0][None]
    with dynmask.sparsify(model, policy) as run:
        cache = GatedCache(run)
        model(ids, past_key_values=cache)
    slots = [[store.slots for store in layer.store.live] for layer in cache.layers]
    assert slots == [[1 + 3 + 4]] * 2
    promised = torch.tensor(again.header["least_mass"])
    assert torch.equal(policy.promise, promised) and (promised <= 1).all()


@pytest.mark.parametrize("folder", ["my heads", None])
def test_a_card_tells_which_card_its_score_heads_are_of(model, retained, tmp_path, folder, capsys):
    from dynmask import cli

    origin = retained
    if folder is not None:  # the name of the folder, whose path is nobody's business
        retained.save_pretrained(tmp_path / "secret" / folder)
        origin = MaskCard.from_pretrained(tmp_path / "secret" / folder)
    made = calibrate_gates(model, documents(60), SETTINGS, scores=origin, progress=False)
    made.save_pretrained(tmp_path / "made")
    again = MaskCard.from_pretrained(tmp_path / "made")
    data = retained.header["data"]
    assert again.header["scores"]["origin"] == {
        "name": folder, "sha256": retained.digest, "version": dynmask.__version__,
        "documents": data["documents"], "tokens": data["tokens"],
    }  # fmt: skip
    assert cli.main(["inspect", str(tmp_path / "made")]) == 0
    readme = (tmp_path / "made" / "README.md").read_text()
    for text in (readme, capsys.readouterr().out):
        assert (folder or "a retained card without a name") in text and retained.digest in text
        assert "secret" not in text and str(tmp_path) not in text
    assert made.digest == again.digest != retained.digest


def test_layers_without_a_module_are_left_to_other_budgets(model, retained):
    header, tensors = copy.deepcopy(retained.header), dict(retained.tensors)
    header["windows"] = [64, None]
    tensors = {name: x for name, x in tensors.items() if not name.startswith("layers.0.")}
    some = calibrate_gates(
        model, documents(90), SETTINGS, scores=MaskCard(header, tensors), progress=False
    )
    assert some.header["scores"]["layers"] == [False, True]
    gates = some.policy().gates
    assert gates.kept.tolist() == [[0] * 4, [4] * 4] and gates.columns.tolist()[0] == [5] * 4
    assert some.policy().scores[0] is None
    with dynmask.sparsify(model, some.policy()):
        pass


def test_the_card_holds_the_modules_of_layers_that_keep(model, retained, monkeypatch):
    from dynmask import budgets

    some = torch.tensor([[False] * 4, [True] * 4])
    gates = Gates.full(2, 4).replaced(some, window=3, kept=4)
    monkeypatch.setattr(budgets, "choose_gates", lambda *_: gates)
    made = calibrate_gates(model, documents(60), SETTINGS, scores=retained, progress=False)
    assert made.header["scores"]["layers"] == [False, True]
    scores = {name for name in made.tensors if name.startswith("scores")}
    assert scores == {f"scores.1.{name}" for name in ("w_in", "b_in", "w_out")}


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_answers_may_be_judged_by_what_decoding_leaves(model, retained, decode):
    """Token by token under the policy, which costs more than an answer that reads every key."""
    texts, answer, rows = documents(90, 120), [6, 7], [torch.arange(82, 90), torch.arange(112, 120)]
    some = torch.ones(2, 4, dtype=torch.bool)
    gates = Gates.full(2, 4).replaced(some, window=3, kept=4)
    # beside columns, which the prompt chose or each token chooses
    gates = gates.replaced(torch.tensor([[False, False, True, True]] * 2), window=3, columns=2)
    costs = {}
    for way in ("full", decode):
        judge = Judge(model, texts, replace(SETTINGS, decode=way), 0, rows, answer)
        judge.scores = retained.policy().modules
        judge.prepare()
        costs[way] = judge.cost(gates)
    policy = replace(judge.policy(gates), decode=decode)
    means = []
    for text, own, count in zip(texts, rows, answer, strict=True):
        with dynmask.sparsify(model, policy) as run:
            cache = GatedCache(run)
            parts = [text[None, :-count], *text[None, -count:].split(1, 1)]
            found = torch.cat([model(x, past_key_values=cache).logits for x in parts], 1)
        found, full = (x[0, own].log_softmax(-1) for x in (found, model(text[None]).logits))
        means.append(float((full.exp() * (full - found)).sum(-1).mean()))
    assert costs[decode] == pytest.approx(max(means), rel=1e-3)
    assert costs[decode] > costs["full"] * 1.1
    with pytest.raises(ValueError, match="settings.decode: expected 'full', 'select' or 'keep'"):
        replace(SETTINGS, decode="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soft: expected decode='full' or 'select'"):
        GatedSettings(soft=True, decode="keep")


@pytest.mark.parametrize("decode", ["select", "keep"])
def test_a_card_decodes_by_default_only_as_something_was_judged(model, decode):
    """A way of decoding goes into a card with decoded tokens, or not at all."""
    cheap = replace(SETTINGS, budgets=(Budget(5, 4),), decode=decode)
    given = {"model": model, "documents": documents(60, 60), "progress": False}
    given |= {"judged": [torch.tensor([50, 59])] * 2}
    for decoded in (None, [0, 0]):
        with pytest.raises(ValueError, match=rf"settings.decode: .*received '{decode}' and docum"):
            calibrate_gates(settings=cheap, decoded=decoded, **given)
    with pytest.raises(ValueError, match="Pass decoded to dynmask.budgets.calibrate_gates"):
        dynmask.calibrate(model, documents(60), policy="gated", settings=cheap, progress=False)
    made = calibrate_gates(settings=cheap, decoded=[0, 4], **given)
    assert made.policy().decode == decode and made.header["decoded"] == 4
    unjudged = calibrate_gates(settings=replace(cheap, decode="full"), **given)
    assert unjudged.policy().decode == "full"
    assert unjudged.policy(decode=decode).decode == decode


def test_score_heads_that_are_of_no_use_are_refused_before_the_model_runs(model, retained):
    given = {"model": model, "documents": documents(60), "progress": False}
    value = train(model, replace(_retained_settings(), head="value", steps=1))
    dam = dynmask.calibrate(
        model,
        documents(40),
        settings=dynmask.DamSettings(length=40, min_support=40),
        progress=False,
    )
    for scores, wanted, message in (
        (None, SETTINGS, "scores: expected a retained card of this model.*received none"),
        (retained, replace(SETTINGS, budgets=BUDGETS), "WITH_KEPT"),
        (dam, SETTINGS, "scores: expected a card of policy 'retained', received one of 'dam'"),
        (retained.tensors, SETTINGS, "scores: expected a card of policy 'retained'"),
        (value, SETTINGS, "head='pair'.*received head='value'"),
        (train(tiny_llama(seed=3)), SETTINGS, "the model that it was calibrated on .fingerprint"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_gates(settings=wanted, scores=scores, **given)


def test_a_card_decodes_as_it_was_judged_unless_it_is_told(card):
    settings = card.header["settings"] | {"decode": "keep"}
    judged = dynmask.MaskCard(card.header | {"settings": settings}, card.tensors)
    assert judged.policy().decode == "keep"
    assert judged.policy(decode="full").decode == card.policy(decode="full").decode == "full"
    assert judged.policy(soft=True, decode="select").soft  # which keep rules out
    with pytest.raises(ValueError, match="soft: expected decode='full' or 'select'"):
        judged.policy(soft=True, decode="keep")


def _retained_settings():
    from tests.test_retained import SETTINGS as OWN

    return OWN


def test_an_interrupted_calibration_goes_on_with_the_same_scores_alone(model, retained, tmp_path):
    path = tmp_path / "trials.json"
    given = {"checkpoint": path, "progress": False}
    first = calibrate_gates(model, documents(60), SETTINGS, scores=retained, **given)
    again = calibrate_gates(model, documents(60), SETTINGS, scores=retained, **given)
    assert torch.equal(first.tensors["kept"], again.tensors["kept"])
    tensors = {name: x + 1 for name, x in retained.tensors.items()}
    other = MaskCard(retained.header, tensors)
    with pytest.raises(ValueError, match="one of the same model, documents, settings and seed"):
        calibrate_gates(model, documents(60), SETTINGS, scores=other, **given)


def test_cards_of_a_time_before_scores_keep_nothing_by_them(card):
    header = json.loads(json.dumps(card.header))
    header["scores"].pop("origin")
    before = MaskCard(header, card.tensors)
    assert before.policy().scored and "score heads" not in before._summary()
    header.pop("scores")
    for budget in header["settings"]["budgets"]:
        budget.pop("kept")
    tensors = {name: x for name, x in card.tensors.items() if "." not in name and name != "kept"}
    old = MaskCard(header, tensors).policy()
    assert old.scores is None and not old.scored


def _unfit(name):
    def change(header, tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.pop("scores"), "unknown .'kept', 'scores.0.b_in'"),
        (lambda h, t: h.update(scores=[1]), "a JSON object 'scores'"),
        (lambda h, t: h["scores"].update(head="value"), "scores.head 'pair', received value"),
        (lambda h, t: h["scores"].update(head=["pair"]), "scores.head 'pair'"),
        (lambda h, t: h.pop("trials"), "a number of trials, received None"),  # which all have
        (lambda h, t: h.update(trials=1.5), "a number of trials, received 1.5"),
        (lambda h, t: h["scores"].update(hidden=0), "scores.hidden from 1"),
        (lambda h, t: h["scores"].update(hidden=2**40), "scores.hidden from 1"),
        (lambda h, t: h["scores"].update(hidden=True), "scores.hidden from 1"),
        (lambda h, t: h["scores"].update(hidden=7), "scores.0.w_in.*received"),
        (lambda h, t: h["scores"].update(origin=None), "a JSON object 'origin'"),
        (lambda h, t: h["scores"].update(origin={}), "a name in scores.origin"),
        (lambda h, t: h["scores"]["origin"].update(name=["a"]), "a name in scores.origin"),
        (lambda h, t: h["scores"]["origin"].update(sha256=1), "scores.origin.sha256 as text"),
        (lambda h, t: h["scores"]["origin"].pop("version"), "scores.origin.version as text"),
        (lambda h, t: h["scores"]["origin"].update(tokens=0), "scores.origin.tokens of at least 1"),
        (lambda h, t: h["scores"]["origin"].update(documents=True), "origin.documents of at least"),
        (lambda h, t: h["scores"].update(layers=[True]), "scores.layers as 2 times"),
        (lambda h, t: h["scores"].update(layers=[1, 1]), "scores.layers as 2 times"),
        (lambda h, t: h["scores"].update(layers=[True, False]), "unknown .'scores.1.b_in'"),
        (lambda h, t: t.pop("kept"), "missing .'kept'"),
        (lambda h, t: t.pop("scores.1.w_out"), "missing .'scores.1.w_out'"),
        (lambda h, t: t.update({"scores.2.w_in": t["scores.0.w_in"]}), "unknown .'scores.2.w_in'"),
        (lambda h, t: t.update(kept=t["kept"].float()), "kept"),
        (lambda h, t: t.update(kept=-t["kept"]), "kept: expected numbers of at least 0"),
        (lambda h, t: t["scores.0.w_in"].view(-1)[3:4].fill_(math.nan), "scores.0.w_in finite"),
        (lambda h, t: t["columns"].fill_(3), "expected columns, blocks or kept"),
        (lambda h, t: t["share"].fill_(0.1), "no share of maps that keep by score"),
        (_unfit("scores.0.w_in"), "scores.0.w_in"),
        (
            lambda h, t: (
                h["scores"].update(layers=[True, False]),
                [t.pop(name) for name in list(t) if name.startswith("scores.1.")],
            ),
            "scores of layer 1, whose maps keep by score",
        ),
    ],
)
def test_a_card_that_is_none_is_refused(card, change, message):
    header, tensors = copied(card)
    change(header, tensors)
    with pytest.raises(ValueError, match=message):
        MaskCard(header, tensors)


def test_the_command_takes_a_card_of_score_heads(tmp_path, capsys):
    from dynmask import cli

    model, kept, out = (str(tmp_path / name) for name in ("model", "kept", "gated"))
    save_stand_in(tmp_path / "model")
    call = ["calibrate", "--model", model, "--quiet", "--lengths", "140"]
    few = ["--steps", "2", "--tokens", "192", "--documents", "10"]
    assert cli.main([*call, "--policy", "retained", "--out", kept, *few]) == 0
    gated = [*call, "--policy", "gated", "--documents", "1", "--judged", "8", "--max-kl", "50"]
    assert cli.main([*gated, "--scores", kept, "--out", out]) == 0
    budgets = MaskCard.from_pretrained(out).header["settings"]["budgets"]
    assert budgets == [asdict(b) for b in WITH_KEPT]
    capsys.readouterr()
    assert cli.main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "keys kept by score (s)" in shown and "128+1024s" in shown
    assert cli.main([*gated, "--scores", out, "--out", str(tmp_path / "other")]) == 2
    assert "a card of policy 'retained', received one of 'gated'" in capsys.readouterr().err
    assert cli.main([*gated, "--decode", "select", "--out", str(tmp_path / "other")]) == 2
    assert "--decode: expected with --decoded" in capsys.readouterr().err
    judged = [*gated, "--scores", kept, "--decoded", "--decode", "select", "--force", "--out", out]
    capsys.readouterr()
    assert cli.main(judged) == 0
    said = capsys.readouterr().err
    assert f"use it with --policy gated:{out}\n" in said
    assert parse(f"gated:{out}").decode == "select"
    assert "documents of 140 tokens are short: they chose nothing" in said
    assert MaskCard.from_pretrained(out).header["settings"]["decode"] == "select"
    other = ["calibrate", "--model", model, "--scores", kept, "--out", str(tmp_path / "dam")]
    assert cli.main(other) == 2
    assert "--scores: expected with another --policy than dam" in capsys.readouterr().err
