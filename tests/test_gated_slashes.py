"""Maps of the gated policy that choose diagonals: the mask, decoding, cards, what cannot be."""

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import dynmask
from dynmask import Budget, GatedCache, GatedSettings, LifetimeMask, MaskCard, sparsify
from dynmask.budgets import BUDGETS, WITH_SLASHES, calibrate_gates, choose_gates, offered
from dynmask.encoder import block_estimate
from dynmask.gated_settings import reads
from dynmask.masks import MixedMask, StructuralMask
from dynmask.masks.base import repeat_heads
from dynmask.policies import Gated, Layer, VerticalSlash, parse
from dynmask.policies.base import grid_of
from dynmask.policies.gates import Gates
from dynmask.policies.guard import widened
from dynmask.policies.kept import kept_mass, sampled_rows
from tests.stand_in import save_stand_in
from tests.test_bounded import CLOSE, generate, prompt
from tests.test_gated import BLOCK, documents, naive_blocks, tensors
from tests.test_gated import naive as naive_columns
from tests.test_gated_cache import Beside
from tests.test_gated_kept import naive as naive_kept
from tests.test_gated_kept import scores_of
from tests.tiny import TINY, VOCAB, copied, tiny_llama

INF = LifetimeMask.INF


def gates_of(window, slashes, columns=None, blocks=None, kept=None):
    tables = (window, columns, blocks, kept, slashes)
    window, columns, blocks, kept, slashes = (
        torch.tensor([[0] * len(row) for row in window] if x is None else x, dtype=torch.int32)
        for x in tables
    )
    return Gates(window, columns, torch.zeros(window.shape), blocks, kept, slashes)


def chosen_diagonals(query, key, window, slashes, last):
    """The rule of one map, pair by pair: the offsets that it reads beyond its window."""
    (queries, dim), keys = query.shape, len(key)
    worth = [0.0] * keys
    for row in range(max(queries - last, 0), queries):
        q = keys - queries + row
        weights = (key[: q + 1].double() @ query[row].double() * dim**-0.5).softmax(0).tolist()
        for k, weight in enumerate(weights):
            worth[q - k] += weight
    best = sorted(range(window, keys), key=lambda r: -worth[r])
    return set(best[:slashes])


def naive(policy, query, key, window, columns, slashes, first_key=0):
    """The union of sinks, window, columns and diagonals of one map: bool [queries, keys]."""
    queries, keys = len(query), len(key)
    if window + slashes >= keys:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    seen = naive_columns(policy, query, key, window, columns, first_key)
    lines = chosen_diagonals(query, key, window, slashes, policy.last)
    for row in range(queries):
        for k in range(keys - queries + row + 1):
            seen[row, k] |= keys - queries + row - k in lines
    return seen


KINDS = {  # window, columns, blocks, kept, slashes
    "dense": (INF, 0, 0, 0, 0),
    "window": (5, 0, 0, 0, 0),
    "columns": (3, 6, 0, 0, 0),
    "blocks": (7, 0, 2, 0, 0),
    "kept": (4, 0, 0, 5, 0),
    "slashes": (4, 0, 0, 0, 3),
    "vertical slash": (2, 5, 0, 0, 7),
    "many": (1, 2, 0, 0, 30),
}


@settings(max_examples=30)
@given(
    keys=st.integers(1, 70),
    queries=st.integers(1, 70),
    sinks=st.sampled_from([0, 1, 3]),
    last=st.integers(1, 9),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_maps_of_all_kinds_read_what_each_alone_would(
    keys, queries, sinks, last, kinds, groups, seed
):
    queries = min(queries, keys)
    query, key, value = tensors(keys, queries, groups=groups, seed=seed)
    window, columns, blocks, kept, slashes = zip(*(KINDS[kind] for kind in kinds), strict=True)
    gates = gates_of([window], [slashes], [columns], [blocks], [kept])
    scores = scores_of(groups=groups) if any(kept) else None
    policy = Gated(sinks=sinks, last=last, least=1e-4, gates=gates, scores=scores, **BLOCK)
    policy.check(1, 4, groups)
    mask = policy(query, key, value, Layer(0))
    found = repeat_heads(mask.expand(2).dense(), 4)
    wide = repeat_heads(key, 4)
    estimate = block_estimate(query, key, **BLOCK)
    known = policy.score(key, value, Layer(0)) if any(kept) else torch.zeros(2, groups, keys)
    for b, h in itertools.product(range(2), range(4)):
        if blocks[h]:
            args = keys, queries, window[h], sinks, blocks[h]
            expected = naive_blocks(estimate[b, h], *args)
        elif kept[h]:
            own = known[b, h * groups // 4]
            expected = naive_kept(own, window[h], kept[h], sinks, queries)
        else:
            args = window[h], columns[h], slashes[h]
            expected = naive(policy, query[b, h], wide[b, h], *args)
        assert torch.equal(found[b, h], expected), (b, h)
    torch.testing.assert_close(mask.density(), mask.dense().sum((-1, -2)) / mask.causal_pairs())
    out = dynmask.attention(query, key, value, mask)
    torch.testing.assert_close(out, dynmask.attention(query, key, value, mask, impl="reference"))
    if isinstance(mask, MixedMask):  # of heads of other kinds no more than their own keys
        own_keys = torch.eye(keys, dtype=torch.bool)[keys - queries :]
        for number, part in enumerate(mask.parts):
            others = [head for head in range(4) if mask.of[head] != number]
            assert not (part.dense()[:, others] & ~own_keys).any()


def test_lists_are_as_long_as_the_longest_and_a_layer_of_diagonals_alone_is_structural():
    query, key, value = tensors(90, 40)
    gates = gates_of([[30, 3, 5, 4]], [[1, 9, 2, 20]], [[0, 4, 0, 2]])
    mask: Any = Gated(sinks=2, least=0.0, gates=gates)(query, key, value, Layer(0))
    assert isinstance(mask, StructuralMask)
    assert (mask.diagonals >= 0).sum(-1).tolist() == [[31, 12, 7, 24]] * 2
    assert (mask.verticals >= 0).sum(-1).tolist() == [[2, 6, 2, 4]] * 2
    assert mask.diagonals.shape[-1] == 31 and mask.verticals.shape[-1] == 6
    for own in mask.diagonals.flatten(0, 1):
        runs = 1 + int((own[own >= 0].diff() > 1).sum())
        assert mask.bands is not None and runs <= mask.bands
    again = replace(mask, checked=False)  # in the order that a mask demands
    assert torch.equal(again.dense(), mask.dense())


@pytest.mark.parametrize("queries", [1, 9])
def test_kernels_read_what_the_mask_says(queries):
    """Their lists are sized by how many bands of diagonals there are at most."""
    pytest.importorskip("triton")
    query, key, value = tensors(90, queries)
    gates = gates_of([[30, 1, 1, 4]], [[1, 9, 14, 0]], [[0, 4, 0, 2]])
    mask = Gated(sinks=1, last=9, gates=gates)(query, key, value, Layer(0))
    assert int(mask.lower(fused=True).kept().sum()) == int(mask.dense().sum())
    truth = dynmask.attention(query, key, value, mask, impl="reference")
    out = dynmask.attention(query, key, value, mask, impl="triton")
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)


def test_diagonals_are_those_of_vertical_slash():
    query, key, value = tensors(80, 60)
    own: Any = Gated(sinks=0, window=5, columns=0, slashes=9, last=7)
    other = VerticalSlash(verticals=1, slashes=14, last=7, sinks=0, window=5)
    found, expected = (x(query, key, value, Layer(0)) for x in (own, other))
    assert torch.equal(found.diagonals, expected.diagonals)


@pytest.mark.parametrize("at_once", [1, 2 * 2 * 80 * 7, 2 * 4 * 80 * 60])
def test_few_weights_at_a_time_are_the_same_sums(at_once, monkeypatch):
    """A row of a kv head's maps at least; some rows of one; all of two kv heads."""
    from dynmask.policies import weights

    query, key, _ = tensors(80, 60, groups=2)
    whole = weights.causal_weights(query, repeat_heads(key, 4))
    monkeypatch.setattr(weights, "WEIGHTS_AT_A_TIME", at_once)
    columns, diagonals = weights.line_sums(query, key)
    torch.testing.assert_close(columns, whole.sum(-2))
    by_offset = [
        sum(whole[..., row, 20 + row - r] for row in range(60) if 20 + row >= r) for r in range(80)
    ]
    torch.testing.assert_close(diagonals, torch.stack(by_offset, -1))


def test_a_diagonal_that_gets_no_attention_is_not_read():
    query, key, value = tensors(60, 60)
    key *= 0
    query[..., 0], key[:, :, 20, 0] = 1e3, 1e3  # the last three rows look at key 20 alone
    mask: Any = Gated(sinks=0, window=4, columns=0, slashes=9, last=3)(query, key, value, Layer(0))
    listed = sorted(mask.diagonals[0, 0].tolist())
    assert [x for x in listed if x >= 4] == [37, 38, 39]
    key[:, :, 10:50:10, 0] = 1e3
    apart: Any = Gated(sinks=0, window=4, columns=0, slashes=4, last=1)(query, key, value, Layer(0))
    assert apart.diagonals[0, 0].tolist() == [0, 1, 2, 3, 19, 29, 39, 49] and apart.bands == 5


def test_sinks_that_a_cache_has_dropped_are_no_verticals():
    query, key, value = tensors(40, 30)
    policy = Gated(sinks=6, window=3, columns=4, slashes=5, last=4, least=1e-4)
    for first_key in (0, 4, 6, 9):
        found = policy(query, key, value, Layer(0, first_key=first_key)).dense()
        for b, h in itertools.product(range(2), range(4)):
            expected = naive(policy, query[b, h], key[b, h // 2], 3, 4, 5, first_key)
            assert torch.equal(found[b, h], expected)


def test_short_inputs_are_dense():
    query, key, value = tensors(20, 20)
    for window, slashes, dense in ((3, 17, True), (3, 16, False), (1, 99, True)):
        own = Gated(window=window, columns=2, slashes=slashes)
        assert own(query, key, value, Layer(0)).is_causal is dense
    gates = gates_of([[3, 3, 3, 3]], [[99, 99, 99, 2]])  # lifetimes for those that are dense
    mask: Any = Gated(sinks=0, gates=gates)(query, key, value, Layer(0))
    assert isinstance(mask, MixedMask) and mask.of == (0, 0, 0, 1)
    assert mask.dense()[:, :3].all(0).equal(torch.ones(3, 20, 20, dtype=torch.bool).tril())
    whole = Gated(window=3, slashes=4, dense_up_to=20)
    assert whole(query, key, value, Layer(0)).is_causal


@pytest.mark.parametrize("seed", range(3))
def test_the_guard_widens_windows_columns_and_diagonals_each_row_alone(seed):
    query, key, value = tensors(80, 50, seed=seed)
    gates = gates_of([[4, 4, 2, 9]], [[3, 2, 4, 0]], [[0, 3, 0, 2]])
    promise = torch.tensor([[0.5, 0.9, 1.0, 0.7]])
    heard: list[Any] = []
    policy = Gated(sinks=1, last=8, least=0.0, gates=gates, guard=0.1, promise=promise)
    layer = Layer(0, tell=lambda what, maps: heard.append(maps))
    mask, rows = policy(query, key, value, layer), sampled_rows(50, 16)
    (factor,) = heard
    for b, h in itertools.product(range(2), range(4)):
        for step in (1, 2, 4, 8, 0):
            window, columns, slashes = (
                int(x[0, h]) for x in (gates.window, gates.columns, gates.slashes)
            )
            if step > 1:
                window, columns = window * step, max(window, columns) * step
            one = replace(
                policy, guard=None, promise=None, gates=None, window=window if step else INF,
                columns=columns, slashes=slashes * max(step, 1),
            )  # fmt: skip
            part = [x[b : b + 1, n : n + 1] for x, n in ((query, h), (key, h // 2))]
            found = one(*part, part[1], Layer(0))
            mass = kept_mass(*part, found, rows).mean()
            if step == 0 or mass >= promise[0, h] - 0.1:
                break
        assert int(factor[b, h]) == step
        assert torch.equal(mask.dense()[b, h], found.dense()[0, 0])
    dense = [h for h in range(4) if not factor[:, h].any()]
    assert dense or seed == 1
    assert all(mask.of[h] == 0 for h in dense)  # lifetimes, not all diagonals
    assert mask.parts[1].diagonals.shape[-1] <= 80  # nor where one row of a head is dense
    names = ("window", "columns", "blocks", "kept", "slashes")
    times = torch.tensor([[1, 2, 8, 0], [4, 0, 1, 8]])
    wide = widened(times, 30, 5, *(getattr(gates, name)[0].long() for name in names))
    assert wide[4].tolist() == [[3, 4, 30, 0], [12, 2, 4, 0]]


def test_parts_of_the_heads_are_the_same_maps():
    gates = gates_of([[3, 3, 8, 8], [2] * 4], [[5, 0, 2, 2], [0] * 4], [[4, 4, 0, 0], [0] * 4])
    policy = Gated(sinks=1, gates=gates, last=6)
    query, key, value = tensors(60, 60)
    every = policy(query, key, value, Layer(0)).dense()
    for rank in range(2):
        own, one = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        part = policy.of_shard(rank, 2)
        part.check(2, 2, 1)
        mask = part(query[:, own], key[:, one], value[:, one], Layer(0))
        assert torch.equal(mask.dense(), every[:, own])


def test_what_choosing_diagonals_means_for_a_kv_head():
    gates = gates_of([[3, 3, 8, 8, 5, 5]], [[5, 0, 0, 0, 0, 0]], [[0, 0, 0, 2, 0, 0]])
    policy = Gated(gates=gates)
    assert policy.chooses(0, 6) == [True, False, False, True, False, False]
    for decode, frees in (("full", [False] * 3), ("select", [False, False, True]),
                          ("keep", [False, True, True])):  # fmt: skip
        assert replace(policy, decode=decode).frees(0, 6, 3) == frees
    blocks = gates_of([[3] * 4], [[5, 0, 0, 0]], blocks=[[0, 2, 2, 0]])
    assert Gated(gates=blocks).reads_blocks(0, 4, 2) == [False, True]
    assert policy.rows_read(400, 0) == list(range(400 - 256, 400)) and grid_of(policy) == 0
    assert grid_of(Gated(columns=0, slashes=3)) == 0
    assert grid_of(Gated(gates=replace(blocks, slashes=0 * blocks.slashes))) == 64
    assert grid_of(Gated(gates=blocks)) == 0


# decoding


@pytest.fixture(scope="module")
def model():
    """With sliding windows in some layers, and attention sinks of its own."""
    return TINY["gpt_oss"](layers=4)


def sliding(model):
    kinds = getattr(model.config, "layer_types", None) or []
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def test_diagonals_are_chosen_anew_where_others_keep_their_choice(model):
    """Windows need no choice: beside them nothing depends on ``decode`` then."""
    ids, mask = prompt()
    window = [[3, 7, 4, 9], [5, 2, 9, 6], [INF, 1, 8, 8], [6, 6, 3, 3]]
    slashes = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 2, 0, 3], [1, 2, 3, 4]]
    policy = Gated(sinks=1, last=5, gates=gates_of(window, slashes), decode="select")
    with sparsify(model, policy):
        expected, logits = generate(model, ids, mask, new=12)
    for decode in ("select", "keep"):
        with sparsify(model, replace(policy, decode=decode)) as run:
            tokens, got = generate(model, ids, mask, GatedCache(run), new=12)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(got, logits, **CLOSE)
    less = replace(policy, gates=gates_of(window, [[0] * 4] * 4))
    with sparsify(model, less):
        _, other = generate(model, ids, mask, new=12)
    assert not torch.allclose(other, logits, **CLOSE)  # diagonals matter


def test_columns_are_kept_in_layers_that_have_maps_of_diagonals_as_well(model):
    ids, mask = prompt()
    window, columns, slashes = [[3] * 4] * 4, [[3, 2, 0, 0]] * 4, [[0, 0, 2, 4]] * 4
    given = {"sinks": 1, "last": 5, "least": 0.0, "decode": "keep"}
    both = Gated(gates=gates_of(window, slashes, columns), **given)
    alone = Gated(gates=gates_of(window, [[0] * 4] * 4, columns), **given)
    beside = Gated(gates=gates_of(window, slashes), **given | {"decode": "select"})
    with sparsify(model, Beside(alone, beside, both, skipped=sliding(model))):
        expected, logits = generate(model, ids, mask, new=12)
    with sparsify(model, both) as run:
        cache = GatedCache(run)
        tokens, got = generate(model, ids, mask, cache, new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    stores = [layer.store for layer in cache.layers if hasattr(layer, "store")]
    assert any(store is not None and store.ragged is not None for store in stores)


MAPS = [kind for name, kind in KINDS.items() if name not in ("dense", "many")]


@settings(max_examples=15)
@given(data=st.data())
@torch.no_grad()
def test_any_gates_any_lengths(data):
    """A cache that drops keys is a cache that does not, in chunks and token by token."""
    heads, groups = 4, data.draw(st.sampled_from([1, 2, 4]))
    rows = [data.draw(st.lists(st.sampled_from(MAPS), min_size=4, max_size=4)) for _ in range(2)]
    rows[0][data.draw(st.integers(0, 3))] = KINDS["vertical slash"]
    window, columns, blocks, kept, slashes = (
        [[kind[i] for kind in row] for row in rows] for i in range(5)
    )
    policy = Gated(
        sinks=data.draw(st.sampled_from([0, 2])),
        least=1e-9,
        last=4,
        gates=gates_of(window, slashes, columns, blocks, kept),
        scores=scores_of(2, groups=groups, dim=16),
        decode="select",
        **BLOCK,
    )
    parts = data.draw(st.lists(st.sampled_from([1, 1, 2, 9, 30]), min_size=2, max_size=5))
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=groups)
    ids = torch.randint(3, VOCAB, (2, sum(parts)), generator=torch.Generator().manual_seed(3))
    with sparsify(model, policy) as run:
        logits = []
        for cache in (DynamicCache(config=model.config), try_cache(run)):
            if cache is None:
                return
            logits.append([model(x, past_key_values=cache).logits for x in ids.split(parts, 1)])
    torch.testing.assert_close(*(torch.cat(x, 1) for x in logits), **CLOSE)


def try_cache(run):
    """A GatedCache; None where a policy has nothing that it could free."""
    try:
        return GatedCache(run)
    except ValueError as error:
        assert "any key may be read again" in str(error)
        return None


@torch.no_grad()
def test_padded_batches_are_each_sequence_alone():
    model, (ids, mask) = tiny_llama(), prompt()
    gates = gates_of([[3, 3, 5, 5], [4] * 4], [[4, 0, 2, 3], [2, 3, 4, 5]], [[3, 2, 0, 1], [0] * 4])
    with sparsify(model, Gated(sinks=1, last=5, gates=gates)):
        together = model(ids, attention_mask=mask).logits
        for row, own in enumerate(mask.bool()):
            alone = model(ids[row : row + 1, own]).logits[0]
            torch.testing.assert_close(together[row, own], alone, rtol=1e-4, atol=1e-5)


# calibration and cards

OFFERED = (Budget(3, 5), Budget(3, 5, slashes=4), Budget(8, 30))
SETTINGS = GatedSettings(max_kl=50.0, budgets=OFFERED[1:], judged=12, sinks=1, last=8)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def card(llama):
    return calibrate_gates(llama, documents(90, 120), SETTINGS, progress=False)


def test_diagonals_are_offered_in_the_order_of_what_is_read():
    assert [b for b in WITH_SLASHES if not b.slashes] == list(BUDGETS)
    assert {b.slashes for b in WITH_SLASHES} == {0, 128, 512, 2048}
    assert all(b.columns and not b.share for b in WITH_SLASHES if b.slashes)
    every = offered(blocks=True, kept=True, slashes=True)
    assert {name for b in every for name, x in asdict(b).items() if x and name != "share"} == {
        "window", "columns", "blocks", "kept", "slashes",
    }  # fmt: skip
    for some in (WITH_SLASHES, every):
        for first, second in itertools.pairwise(some):
            assert reads(first) <= reads(second)
    assert reads(Budget(3, 4, slashes=5)) == 12


def test_maps_that_need_diagonals_get_them():
    """Maps of an odd head can afford nothing that has none."""

    def cost(gates, most):
        short = (gates.slashes < 4) & ~gates.dense
        return 100.0 * int(short[:, 1::2].sum())

    places = [(layer, head) for layer in range(3) for head in range(4)]
    gates = choose_gates(places, OFFERED, 1.0, cost, Gates.full(3, 4))
    assert gates.slashes.tolist() == [[0, 4, 0, 4]] * 3
    assert gates.columns.tolist() == [[5] * 4] * 3 and gates.window.tolist() == [[3] * 4] * 3


def test_a_card_reads_its_diagonals_after_a_round_trip(llama, card, tmp_path):
    assert (card.tensors["slashes"] == 4).all() and (card.tensors["columns"] == 5).all()
    card.save_pretrained(tmp_path / "card")
    again = MaskCard.from_pretrained(tmp_path / "card")
    again.check(llama)
    policy: Any = again.policy()
    assert policy.slashed and torch.equal(policy.gates.slashes, card.tensors["slashes"])
    query, key, value = tensors(90, 90, dim=16)
    assert isinstance(replace(policy, guard=None)(query, key, value, Layer(0)), StructuralMask)
    assert parse(f"gated:{tmp_path / 'card'},decode=select").slashed
    from dynmask.judge import Judge

    judge = Judge(llama, documents(90, 120), SETTINGS, 0)
    judge.prepare()
    kl = card.header["kl"]
    assert judge.cost(policy.gates) == pytest.approx(kl, abs=1e-6) and kl > 0
    none = replace(policy.gates, slashes=0 * policy.gates.slashes)
    assert judge.cost(none) != pytest.approx(kl, rel=1e-3)


def test_cards_without_diagonals_have_no_table_of_them(llama, card):
    plain = calibrate_gates(
        llama, documents(60), replace(SETTINGS, budgets=OFFERED[::2]), progress=False
    )
    assert "slashes" not in plain.tensors
    assert not plain.policy().slashed and not plain.policy().gates.slashes.any()
    header = json.loads(json.dumps(plain.header))
    for budget in header["settings"]["budgets"]:
        budget.pop("slashes")  # of a time that knew none
    assert not MaskCard(header, plain.tensors).policy().slashed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: t.pop("slashes"), "missing .'slashes'"),
        (lambda h, t: t.update(slashes=-t["slashes"]), "slashes: expected numbers of at least 0"),
        (lambda h, t: t.update(slashes=t["slashes"].float()), "slashes"),
        (lambda h, t: t.update(slashes=t["slashes"][:, :2].clone()), "slashes"),
        (
            lambda h, t: t.update(columns=0 * t["columns"], blocks=t["blocks"] + 1),
            "expected slashes, blocks or kept of a map, received slashes and blocks",
        ),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=0), "unknown .'slashes'"),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=4.0), "whole numbers of keys"),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=True), "whole numbers of keys"),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=-1), "slashes: expected numbers"),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=[1]), "whole numbers of keys"),
        (lambda h, t: h["settings"]["budgets"][0].update(slashes=2**40), "settings of a gated"),
        (lambda h, t: h["settings"].update(soft=True), "settings.soft"),
    ],
)
def test_a_card_that_is_none_is_refused(card, change, message):
    header, tensors = copied(card)
    change(header, tensors)
    with pytest.raises(ValueError, match=message):
        MaskCard(header, tensors)


def test_the_command_offers_diagonals(tmp_path, capsys):
    from dynmask import cli

    model, out = str(tmp_path / "model"), str(tmp_path / "gated")
    save_stand_in(tmp_path / "model")
    call = ["calibrate", "--model", model, "--quiet", "--lengths", "140", "--documents", "1"]
    gated = [*call, "--policy", "gated", "--judged", "8", "--max-kl", "50"]
    assert cli.main([*gated, "--slashes", "--blocks", "--out", out]) == 0
    made = MaskCard.from_pretrained(out)
    budgets = offered(blocks=True, slashes=True)
    assert made.header["settings"]["budgets"] == [asdict(b) for b in budgets]
    some = made.tensors | {"slashes": torch.full_like(made.tensors["slashes"], 7)}
    some["blocks"] = 0 * some["blocks"]
    MaskCard(made.header, some).save_pretrained(tmp_path / "some")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "some")]) == 0
    shown = capsys.readouterr().out
    window, columns = (int(some[name][0, 0]) for name in ("window", "columns"))
    assert f"{window}+{columns}+7d" in shown and "diagonals (d)" in shown
    assert cli.main([*gated, "--slashes", "--soft", "--out", str(tmp_path / "soft")]) == 2
    assert "without blocks and diagonals" in capsys.readouterr().err
    dam = ["calibrate", "--model", model, "--slashes", "--out", str(tmp_path / "dam")]
    assert cli.main(dam) == 2
    assert "--slashes: expected with another --policy than dam" in capsys.readouterr().err


# what cannot be


def test_what_cannot_be_is_refused():
    for more in ({"blocks": [[2, 0]]}, {"kept": [[2, 0]]}):
        with pytest.raises(ValueError, match="expected slashes, blocks or kept of a map"):
            gates_of([[3, 3]], [[1, 0]], **more)
    gates = gates_of([[3] * 4], [[1, 0, 0, 0]])
    for own in ({"gates": gates}, {"slashes": 2}):
        with pytest.raises(ValueError, match="gated: soft: expected maps that read windows"):
            Gated(soft=True, **own)
    with pytest.raises(ValueError, match="slashes or blocks, received slashes=1 and blocks=2"):
        Gated(columns=0, slashes=1, blocks=2)
    with pytest.raises(ValueError, match="expected slashes >= 0, received -1"):
        parse("gated:slashes=-1")
    alone: Any = parse("gated:slashes=256")
    assert alone == Gated(slashes=256) and alone.slashed and alone.columns == Gated().columns
    query, key, value = tensors(600, 5)
    mask: Any = replace(alone, window=64)(query, key, value, Layer(0))
    assert (mask.diagonals >= 0).sum(-1).tolist() == [[64 + 256] * 4] * 2


def test_the_vllm_plugin_refuses_them_before_a_model_is_there():
    pytest.importorskip("transformers")
    from dynmask.integrations.vllm import checks

    config = tiny_llama().config
    policy = Gated(gates=gates_of([[3] * 4] * 2, [[1, 0, 0, 0]] * 2))
    for own in (policy, Gated(slashes=9)):
        with pytest.raises(ValueError, match="gated: slashes: expected maps without diagonals"):
            checks.check_policy(own, config)
    checks.check_policy(replace(policy, gates=gates_of([[3] * 4] * 2, [[0] * 4] * 2)), config)
