"""The gated policy: what its gates let through, and budgets chosen by their effect."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynmask
from dynmask import Budget, GatedSettings, LifetimeMask, MaskCard
from dynmask.budgets import Judge, calibrate_gates, choose_gates, digest_of
from dynmask.masks.base import repeat_heads
from dynmask.policies import Gated, parse
from dynmask.policies.base import Layer
from dynmask.policies.gated import Gates
from tests.tiny import tiny_llama, tiny_qwen3

INF = LifetimeMask.INF


def tensors(keys, queries, batch=2, heads=4, groups=2, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(batch, heads, queries, dim, generator=g),
        2 * torch.randn(batch, groups, keys, dim, generator=g),
        torch.randn(batch, groups, keys, dim, generator=g),
    )


def gates_of(window, columns, share=None):
    window = torch.tensor(window, dtype=torch.int32)
    share = torch.zeros(window.shape) if share is None else torch.tensor(share)
    return Gates(window, torch.tensor(columns, dtype=torch.int32), share)


def naive(policy, query, key, window, columns, first_key=0):
    """The rule of one map, key by key: bool [queries, keys]."""
    queries, keys = len(query), len(key)
    last = min(policy.last, queries)
    worth = [0.0] * keys
    for row in range(queries - last, queries):
        q = keys - queries + row
        logits = key[: q + 1] @ query[row] * len(query[row]) ** -0.5
        for k, p in enumerate(logits.softmax(0).tolist()):
            if k <= q - window:
                worth[k] = max(worth[k], p)
    sinks = max(policy.sinks - first_key, 0)
    order = sorted(range(sinks, keys), key=lambda k: -worth[k])
    chosen = {k for k in order[:columns] if worth[k] >= policy.least}
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        q = keys - queries + row
        for k in range(q + 1):
            seen[row, k] = k > q - window or k < sinks or k in chosen
    return seen


@given(
    keys=st.integers(1, 60),
    queries=st.integers(1, 60),
    last=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_map_reads_its_own_window_sinks_and_columns(keys, queries, last, seed):
    queries = min(queries, keys)
    query, key, value = tensors(keys, queries, seed=seed)
    window, columns = [[3, 7, 1, INF if seed % 2 else 2]], [[2, 6, 5, 0]]
    policy = Gated(sinks=2, last=last, least=1e-4, gates=gates_of(window, columns))
    mask = policy(query, key, value, Layer(0))
    found = mask.expand(2).dense()
    assert found.sum(-1).max() <= mask.most <= keys  # the fused lowering sizes its lists by it
    wide = repeat_heads(key, 4)
    for b in range(2):
        for h in range(4):
            expected = naive(policy, query[b, h], wide[b, h], window[0][h], columns[0][h])
            got = found[b, h] if found.shape[1] > 1 else found[b, 0]
            assert torch.equal(got, expected), (b, h)


def test_a_key_that_nobody_looks_at_is_no_column():
    query, key, value = tensors(50, 50)
    few = Gated(sinks=0, window=4, columns=40, least=0.3, last=4)
    seen = few(query, key, value, Layer(0)).dense()
    window = LifetimeMask.window(50, 4).dense()
    extra = (seen & ~window).any(-2).sum(-1)
    assert int(extra.max()) <= 12  # each of four rows gives at most three keys so much
    none = Gated(sinks=0, window=4, columns=40, least=1.0)(query, key, value, Layer(0)).dense()
    assert torch.equal(none, window.expand_as(none))


def test_pooling_reads_the_neighbours_of_what_is_looked_at():
    query, key, value = tensors(60, 60, batch=1, heads=1, groups=1)
    key[0, 0, 20] = 40 * query[0, 0, -1]  # the last row looks at key 20 alone
    alone = Gated(sinks=0, window=4, columns=3, least=0.9, last=1)
    lasting = (alone(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == [20]
    pooled = Gated(sinks=0, window=4, columns=3, least=0.9, last=1, pool=3)
    lasting = (pooled(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == [19, 20, 21]
    key[0, 0, 20], key[0, 0, 56] = 0, 40 * query[0, 0, -1]
    lasting = (pooled(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == []  # in the window already, and so is what lies beside it


def test_columns_grow_with_the_input_by_their_share():
    gates = gates_of([[4, 4]], [[3, 3]], [[0.0, 0.25]])
    assert gates.counts(0, 40) == [3, 13]
    assert gates.counts(0, 8) == [3, 5]
    query, key, value = tensors(40, 40, heads=2)
    mask = Gated(sinks=0, least=0.0, gates=gates)(query, key, value, Layer(0))
    lasting = (mask.death == INF).sum(-1)
    assert lasting.tolist() == [[3, 13], [3, 13]]


def test_sinks_that_a_cache_has_dropped_are_not_other_keys():
    query, key, value = tensors(30, 30)
    mask = Gated(sinks=6, window=3, columns=0)(query, key, value, Layer(0, first_key=4))
    assert (mask.death[..., :2] == INF).all() and (mask.death[..., 2:] < INF).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": torch.zeros(1, 2, dtype=torch.int32)}, "window: expected numbers of at least"),
        ({"columns": torch.zeros(1, 2)}, "columns: expected torch.int32"),
        ({"share": torch.zeros(2, 2)}, "share: expected torch.float32"),
        ({"columns": -torch.ones(1, 2, dtype=torch.int32)}, "columns: expected numbers"),
    ],
)
def test_gates_that_make_no_sense_are_refused(change, message):
    good = {"window": torch.ones(1, 2, dtype=torch.int32), "share": torch.zeros(1, 2)}
    good["columns"] = good["window"].clone()
    with pytest.raises(ValueError, match=message):
        Gates(**{**good, **change})


@pytest.mark.parametrize("field", ["window=0", "pool=2", "least=2", "share=-1", "last=0"])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"gated: expected {field.split('=')[0]}"):
        parse(f"gated:{field}")


def test_gates_of_another_model_are_refused():
    policy = Gated(gates=Gates.full(3, 4))
    with pytest.raises(ValueError, match="gates for 2 layers of 4 heads"):
        dynmask.sparsify(tiny_llama(), policy)


# --------------------------------------------------------------------------------------- choosing


PLACES = [(layer, head) for layer in range(3) for head in range(4)]
OFFERED = (Budget(2), Budget(8), Budget(16, 4))


def linear(prices):
    """A cost that adds up: prices [layer, head] of each budget."""

    def cost(gates):
        total = 0.0
        for layer, head in PLACES:
            window = int(gates.window[layer, head])
            if window != INF:
                number = [b.window for b in OFFERED].index(window)
                total += prices[layer][head][number]
        return total

    return cost


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.floats(0.01, 2))
def test_each_map_gets_a_budget_it_can_afford_and_all_together_stay_within(kinds, allowed):
    """Maps of kind n cost nothing from budget n on, and far too much below."""
    prices = [[[0.0 if i >= kind else 100.0 for i in range(3)] for kind in kinds[4 * n : 4 * n + 4]]
              for n in range(3)]  # fmt: skip
    gates = choose_gates(PLACES, OFFERED, allowed, linear(prices), Gates.full(3, 4))
    expected = [OFFERED[kind].window if kind < 3 else INF for kind in kinds]
    assert gates.window.flatten().tolist() == expected
    assert linear(prices)(gates) <= allowed


def test_few_maps_that_matter_need_few_trials():
    prices = [[[0.0, 0.0, 0.0] for _ in range(4)] for _ in range(3)]
    prices[1][2] = [9.0, 9.0, 9.0]
    trials = []

    def cost(gates):
        trials.append(gates)
        return linear(prices)(gates)

    gates = choose_gates(PLACES, OFFERED, 1.0, cost, Gates.full(3, 4))
    assert int(gates.dense.sum()) == 1 and bool(gates.dense[1, 2])
    assert len(trials) <= 10  # 2 log2(12) at the first budget, one at each of the others


def test_small_costs_add_up_to_what_is_allowed_and_no_further():
    prices = [[[0.3, 0.1, 0.0] for _ in range(4)] for _ in range(3)]
    gates = choose_gates(PLACES, OFFERED, 1.2, linear(prices), Gates.full(3, 4))
    assert linear(prices)(gates) <= 1.2
    assert not gates.dense.any()


# ------------------------------------------------------------------------------- on tiny models


def documents(*lengths):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(2, 200, (n,), generator=g) for n in lengths]


SETTINGS = GatedSettings(
    max_kl=0.05, budgets=(Budget(4), Budget(16), Budget(16, 16)), judged=12, sinks=1, last=8
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def card(model):
    return calibrate_gates(model, documents(90, 120), SETTINGS, progress=False)


def test_the_divergence_of_a_card_is_measured_and_within_what_was_allowed(model, card):
    assert 0 <= card.header["kl"] <= SETTINGS.max_kl
    judge = Judge(model, documents(90, 120), SETTINGS, 0)
    judge.prepare()
    gates = Gates(*(card.tensors[name] for name in ("window", "columns", "share")))
    assert judge.cost(gates) == pytest.approx(card.header["kl"], rel=1e-4, abs=1e-7)
    assert judge.cost(Gates.full(2, 4)) == pytest.approx(0, abs=1e-6)


def test_more_divergence_buys_sparser_masks(model, card):
    def density(some):
        return sum(map(sum, some.header["density"]))

    loose = calibrate_gates(
        model, documents(90, 120), GatedSettings(**{**vars(SETTINGS), "max_kl": 5.0}),
        progress=False,
    )  # fmt: skip
    assert density(loose) < density(card)


def test_a_density_can_be_asked_for_instead(model):
    asked = GatedSettings(**{**vars(SETTINGS), "max_kl": 10.0, "density": 0.4})
    found = calibrate_gates(model, documents(90, 120), asked, progress=False)
    assert sum(map(sum, found.header["density"])) / 8 <= 0.4
    assert found.header["settings"]["allowed"] < 10.0


def test_a_card_is_the_same_policy_after_a_round_trip(model, card, tmp_path):
    card.save_pretrained(tmp_path / "card")
    again = MaskCard.from_pretrained(tmp_path / "card")
    again.check(model)
    first, second = card.policy(), again.policy()
    assert first == second and digest_of(first.gates) == digest_of(second.gates)
    assert digest_of(parse(f"gated:{tmp_path / 'card'}").gates) == digest_of(first.gates)
    with pytest.raises(ValueError, match="expected options among"):
        card.policy(width=3)


def test_documents_and_the_model_are_left_as_they_were(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    given_documents = documents(60)
    model.train()
    calibrate_gates(model, given_documents, SETTINGS, progress=False)
    assert model.training
    model.eval()
    assert torch.equal(given_documents[0], documents(60)[0])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_an_interrupted_calibration_goes_on_with_what_it_measured(
    model, card, tmp_path, monkeypatch
):
    path = tmp_path / "gates.json"
    measured = Judge.cost
    done = []

    def interrupted(self, gates):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(gates)
        return measured(self, gates)

    monkeypatch.setattr(Judge, "cost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_gates(model, documents(90, 120), SETTINGS, checkpoint=path, progress=False)
    assert len(json.loads(path.read_text())["known"]) == 5
    runs = []

    def counted(self, document, rows, policy, predict=Judge._predict):
        runs.append(policy)
        return predict(self, document, rows, policy)

    monkeypatch.setattr(Judge, "cost", measured)
    monkeypatch.setattr(Judge, "_predict", counted)
    again = calibrate_gates(model, documents(90, 120), SETTINGS, checkpoint=path, progress=False)
    assert digest_of(again.policy().gates) == digest_of(card.policy().gates)
    fresh = len(json.loads(path.read_text())["known"]) - 5
    assert len(runs) == 2 + 2 * fresh  # the full model once, and what was not known


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"dynmask_budgets": 1, "known": {}, "identity": 1}']
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(model, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="checkpoint: expected"):
        calibrate_gates(model, documents(60), SETTINGS, checkpoint=path, progress=False)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("given_documents", "settings", "message"),
    [
        ([], None, "documents: expected at least one"),
        ([torch.tensor([1.0, 2.0])], None, "documents"),
        (documents(1), None, "documents"),
        (documents(1025), None, "at most the model's 1024 positions"),
        (documents(60), 3, "GatedSettings"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(model, given_documents, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate_gates(model, given_documents, settings, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"max_kl": 0}, {"max_kl": math.nan}, {"density": 0}, {"density": 2}, {"budgets": ()},
        {"judged": 0}, {"late": 1.5}, {"sinks": -1}, {"budgets": (Budget(0),)}, {"pool": 2},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        GatedSettings(**change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, h: t.update(window=t["window"][:, :3].contiguous()),
        lambda t, h: t.update(window=t["window"] * 0),
        lambda t, h: t.update(columns=t["columns"].float()),
        lambda t, h: t["share"].fill_(math.nan),
        lambda t, h: t.pop("share"),
        lambda t, h: h.update(kl=-1.0),
        lambda t, h: h.update(kl=None),
        lambda t, h: h["settings"].update(last=0),
        lambda t, h: h["settings"].update(budgets="all"),
        lambda t, h: h["settings"].pop("pool"),
    ],
)
def test_damaged_cards_are_refused(card, damage):
    tensors = {name: tensor.clone() for name, tensor in card.tensors.items()}
    header = json.loads(json.dumps(card.header))
    damage(tensors, header)
    with pytest.raises(ValueError, match="mask card|gates"):
        MaskCard(header, tensors)


def test_generation_with_a_card_runs_on_another_architecture():
    model = tiny_qwen3()
    card = dynmask.calibrate(
        model, documents(70), policy="gated", settings=SETTINGS, progress=False
    )
    ids = documents(50)[0][None]
    with dynmask.sparsify(model, card.policy(), measure=True) as run:
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 53
    summary = run.summary()
    assert 0 < summary["prefill"]["density"] <= 1 and 0 < summary["decode"]["density"] <= 1


def test_full_gates_change_nothing():
    model = tiny_llama()
    ids = documents(40)[0][None]
    with torch.no_grad():
        expected = model(ids).logits
        with dynmask.sparsify(model, Gated(gates=Gates.full(2, 4))):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_judged_tokens_can_be_given(model):
    rows = [torch.tensor([89]), torch.tensor([5, 119])]
    found = calibrate_gates(model, documents(90, 120), SETTINGS, judged=rows, progress=False)
    judge = Judge(model, documents(90, 120), SETTINGS, 0, rows)
    judge.prepare()
    assert judge.cost(found.policy().gates) == pytest.approx(found.header["kl"], abs=1e-6)
    for bad in (rows[:1], [rows[0], torch.tensor([120])], [rows[0], torch.tensor([1.0])]):
        with pytest.raises(ValueError, match="judged"):
            calibrate_gates(model, documents(90, 120), SETTINGS, judged=bad, progress=False)
