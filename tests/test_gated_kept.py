"""Maps of the gated policy that keep by a learned score: the mask, and what cannot be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynmask
from dynmask import LifetimeMask, sparsify
from dynmask.masks import MixedMask
from dynmask.masks.base import repeat_heads
from dynmask.nn import PairScore, Retention, ValueScore
from dynmask.policies import Gated, Layer, Retained
from dynmask.policies.gates import Gates
from dynmask.policies.guard import widened
from dynmask.policies.kept import kept_mass, sampled_rows
from tests.tiny import tiny_llama, tiny_mistral

INF = LifetimeMask.INF


def scores_of(layers=1, groups=2, dim=8, seed=0) -> tuple[Any, ...]:
    """Score modules whose scores differ from key to key."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = [PairScore(groups, dim, 4).requires_grad_(False) for _ in range(layers)]
    for module in made:
        module.w_out.mul_(30)
    return tuple(made)


def gates_of(window, kept, columns=None, blocks=None):
    window, kept = (torch.tensor(x, dtype=torch.int32) for x in (window, kept))
    none = torch.zeros_like(window)
    columns, blocks = (
        none if x is None else torch.tensor(x, dtype=torch.int32) for x in (columns, blocks)
    )
    return Gates(window, columns, torch.zeros(window.shape), blocks, kept)


def tensors(keys, queries, groups=2, members=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (2, groups * members, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8)
    return [2 * torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


def naive(scores, window, kept, sinks, queries):
    """The rule of one map, query by query: bool [queries, keys]."""
    keys = len(scores)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        q = keys - queries + row
        pool = range(sinks, max(q - window + 1, sinks))  # what has left the window
        best = sorted(pool, key=lambda k: (float(scores[k]), k))[max(len(pool) - kept, 0) :]
        for k in (*range(min(sinks, q + 1)), *range(max(q - window + 1, 0), q + 1), *best):
            seen[row, k] = True
    return seen


@settings(deadline=None)
@given(
    keys=st.integers(1, 50),
    queries=st.integers(1, 50),
    sinks=st.sampled_from([0, 1, 3]),
    kept=st.lists(st.sampled_from([0, 1, 4, 60]), min_size=4, max_size=4),
    window=st.lists(st.sampled_from([1, 3, 9, INF]), min_size=4, max_size=4),
    shape=st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_map_reads_what_the_retention_of_its_kv_head_keeps(
    keys, queries, sinks, kept, window, shape, wide, seed
):
    """Dense maps, windows and maps that keep by score in one layer, in any group."""
    (groups, members), queries = shape, min(queries, keys)
    dtype = torch.float64 if wide else torch.float32
    query, key, value = tensors(keys, queries, groups, members, seed, dtype)
    policy = Gated(sinks=sinks, gates=gates_of([window], [kept]), scores=scores_of(groups=groups))
    policy.check(1, 4, groups)
    mask: Any = policy(query, key, value, Layer(0))
    dense = repeat_heads(mask.expand(2).dense(), 4)
    scores = policy.score(key, value, Layer(0)) if any(kept) else torch.zeros(2, groups, keys)
    assert int(dense.sum(-1).max()) <= mask.most <= keys
    for b in range(2):
        for h in range(4):
            own = scores[b, h // members]
            assert torch.equal(dense[b, h], naive(own, window[h], kept[h], sinks, queries)), (b, h)
            if window[h] < INF:
                width = sinks + window[h] + kept[h]
                rule = Retention(width, window[h], sinks).mask(own[None, None], queries)
                assert torch.equal(dense[b, h], rule.dense()[0, 0])


def test_scores_are_those_of_the_retained_policy():
    """All maps alike are that policy, and the mask has one head for each kv head."""
    query, key, value = tensors(60, 60)
    scores = scores_of()
    gated = Gated(sinks=2, gates=gates_of([[5] * 4], [[6] * 4]), scores=scores)
    mask: Any = gated(query, key, value, Layer(0, unrotate=lambda x: x.flip(-1)))
    own = Retained(scores, width=13, window=5, sinks=2)
    expected = own(query, key, value, Layer(0, unrotate=lambda x: x.flip(-1)))
    assert torch.equal(mask.death, expected.death)
    rotated: Any = gated(query, key, value, Layer(0))
    assert not torch.equal(mask.death, rotated.death)
    given: Any = gated(query, key, 0 * value, Layer(0, scores=gated.score(key, value, Layer(0))))
    assert torch.equal(given.death, rotated.death)  # scores that are known are not made again


def test_kinds_of_maps_beside_each_other_stay_what_they_are():
    query, key, value = tensors(70, 70, groups=4, members=2)
    sizes = {"block": 8, "query_pool": 4, "key_pool": 4, "sinks": 2, "last": 5}
    window = [[5, 5, 9, 9, 4, INF, 3, 3]]
    columns, blocks = [[0, 0, 6, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 2, 0, 0, 0]]
    kept = [[7, 7, 0, 3, 0, 0, 0, 11]]
    scores = scores_of(groups=4)
    both: Any = Gated(gates=gates_of(window, kept, columns, blocks), scores=scores, **sizes)
    none = [[0] * 8]
    others: Any = Gated(gates=gates_of(window, none, columns, blocks), **sizes)
    alone: Any = Gated(gates=gates_of(window, kept), scores=scores, **sizes)
    mask, without = both(query, key, value, Layer(0)), others(query, key, value, Layer(0))
    scored = alone(query, key, value, Layer(0)).dense()
    assert isinstance(mask, MixedMask)
    for h in range(8):
        expected = scored if kept[0][h] else without.dense()
        assert torch.equal(mask.dense()[:, h], expected[:, h]), h


def test_kept_keys_have_no_bias():
    query, key, value = tensors(60, 60)
    gates = gates_of([[3, 4, 5, 5]], [[0, 6, 7, 7]], [[5, 0, 0, 0]])
    policy = Gated(sinks=1, last=5, gates=gates, scores=scores_of(), soft=True)
    mask, bias = policy.biased(query, key, value, Layer(0))
    assert bias is not None and bool(bias[:, 0].any()) and not bias[:, 1:].any()
    assert torch.equal(
        mask.dense(), replace(policy, soft=False)(query, key, value, Layer(0)).dense()
    )


@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_chunks_and_tokens_read_what_the_whole_prompt_does(cuts, seed):
    gates = gates_of([[3, 3, 8, INF]], [[5, 5, 2, 0]])
    policy = Gated(sinks=1, gates=gates, scores=scores_of(), decode="select")
    query, key, value = tensors(sum(cuts), sum(cuts), seed=seed)
    whole = policy(query, key, value, Layer(0))
    whole_dense = repeat_heads(whole.dense().expand(2, -1, -1, -1), 4)
    first = 0
    for n in cuts:
        stop = first + n
        part: Any = policy(query[:, :, first:stop], key[:, :, :stop], value[:, :, :stop], Layer(0))
        dense = repeat_heads(part.dense().expand(2, -1, -1, -1), 4)
        assert torch.equal(dense, whole_dense[:, :, first:stop, :stop])
        first = stop


def test_the_guard_widens_what_is_kept_until_the_map_is_dense():
    query, key, value = tensors(120, 120)
    query[:, 1:] = 0  # attention spread evenly
    gates = gates_of([[4, 4, 4, 4]], [[3, 3, 3, 9]])
    plain = Gated(sinks=1, gates=gates, scores=scores_of())
    rows = sampled_rows(120, 16)
    before = kept_mass(query, key, plain(query, key, value, Layer(0)), rows).mean(-1)
    heard = []
    promise = torch.tensor([[0.0, 0.25, 0.99, 0.4]])
    policy = replace(plain, guard=0.0, promise=promise)
    layer = Layer(0, tell=lambda what, maps: heard.append(maps))
    mask = policy(query, key, value, layer)
    after = kept_mass(query, key, mask, rows).mean(-1)
    (factor,) = heard
    assert (factor[:, 0] == 1).all() and (factor[:, 2] == 0).all()
    assert bool((factor[:, 1] > 1).all() and (factor[:, 1] < 9).all())
    assert torch.equal(after[:, 0], before[:, 0]) and (after >= promise - 1e-6).all()
    for b in range(2):  # so many times the window and the kept keys, for each row alone
        for h in (0, 1, 3):
            times = int(factor[b, h])
            if times:
                kept = int(gates.kept[0, h])
                scores = policy.score(key, value, Layer(0))[b, h // 2]
                wide = naive(scores, 4 * times, kept * times, 1, 120)
                assert torch.equal(mask.dense()[b, h], wide)
    names = ("window", "columns", "blocks", "kept", "slashes")
    tables = (getattr(gates, name)[0].long() for name in names)
    _, columns, _, kept, _ = widened(factor, 120, 2, *tables)
    assert not columns.any()  # nothing is chosen for maps that keep
    assert torch.equal(kept, (gates.kept * factor.clamp(min=1)).clamp(max=120))


def test_parts_of_the_heads_are_the_same_maps():
    gates = gates_of([[3, 3, 8, 8], [2] * 4], [[5, 5, 2, 2], [0] * 4])
    policy = Gated(sinks=1, gates=gates, scores=(*scores_of(), None), decode="select")
    query, key, value = tensors(40, 40)
    every = repeat_heads(policy(query, key, value, Layer(0)).dense(), 4)
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        part = policy.of_shard(rank, 2)
        part.check(2, 2, 1)
        one = slice(rank, rank + 1)
        mask: Any = part(query[:, own], key[:, one], value[:, one], Layer(0))
        assert torch.equal(repeat_heads(mask.dense(), 2), every[:, own])
        assert part.scores[1] is None  # no module where no map keeps by score
        alone = policy.of_heads(range(4)[own], layer=1)
        assert alone.scores == (None, None)  # nor of a layer that is not asked about


def test_which_kv_heads_live_by_their_scores():
    gates = gates_of(
        [[3, 3, 8, 8, 5, 5, INF, INF]], [[5, 5, 2, 3, 0, 4, 6, 6]]
    )  # alike; two widths; one of them a window; dense whatever it keeps
    policy = Gated(gates=gates, scores=scores_of(groups=4), decode="select")
    assert policy.lives(0, 8, 4) == [(3, 5), None, None, None]
    assert policy.frees(0, 8, 4) == [False] * 4
    assert replace(policy, decode="keep").lives(0, 8, 4) == policy.lives(0, 8, 4)
    assert replace(policy, decode="full").lives(0, 8, 4) == [None] * 4
    assert replace(policy, dense_up_to=9).lives(0, 8, 4) == [None] * 4
    assert policy.reads_blocks(0, 8, 4) == [False] * 4 and all(policy.chooses(0, 8)[:4])


def test_a_call_without_scores_says_so():
    window = torch.tensor([[3, 3]], dtype=torch.int32)
    gates = Gates(window, 0 * window, torch.zeros(1, 2), kept=window)
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="expected a score module for maps.*received none"):
        Gated(gates=gates)(x, x, x, Layer(0))


def test_what_cannot_be_is_refused():
    for more in ({"columns": [[2, 0]]}, {"blocks": [[2, 0]]}):
        with pytest.raises(ValueError, match="expected columns, blocks or kept of a map"):
            gates_of([[3, 3]], [[1, 0]], **more)
    with pytest.raises(ValueError, match="no share of maps that keep by score"):
        replace(gates_of([[3, 3]], [[1, 0]]), share=torch.full((1, 2), 0.1))
    gates = gates_of([[3] * 4] * 2, [[0] * 4, [5] * 4])
    model = tiny_llama()
    pair, short = scores_of(2, dim=16), scores_of(1, dim=16)
    value = ValueScore(2, 16)
    for scores, message in (
        (None, "a score module for layer 1, whose maps keep by score, received none"),
        ((None, None), "a score module for layer 1"),
        (short, "a score module or None for each of 2 layers, received 1"),
        ((None, value), "PairScore.*received ValueScore"),
        (scores_of(2, groups=4, dim=16), "scores of 2 kv heads in layer 0, received 4"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsify(model, Gated(gates=gates, scores=scores))
    ids = torch.arange(3, 40)[None]
    mistral = tiny_mistral()
    with sparsify(mistral, Gated(gates=gates, scores=pair)), pytest.raises(ValueError, match="own"):
        mistral(ids)
    with pytest.raises(ValueError, match="all keys of layer 1"):
        Gated(gates=gates, scores=scores_of(2))(*tensors(9, 9), Layer(1, first_key=3))


@torch.no_grad()
def test_a_model_reads_what_the_retained_policy_reads():
    """Rotation taken off, in prefill and decoding: under the adapter as under ``Retained``."""
    model = tiny_llama()
    scores = scores_of(2, dim=16)
    gates = gates_of([[5] * 4] * 2, [[6] * 4] * 2)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    policies = (
        Gated(sinks=2, gates=gates, scores=scores, decode="select"),
        Retained(scores, width=13, window=5, sinks=2),
    )
    logits = []
    for policy in policies:
        with sparsify(model, policy):
            first = model(ids[:, :30], use_cache=True)
            parts, cache = [first.logits], first.past_key_values
            parts += [model(x, past_key_values=cache).logits for x in ids[:, 30:].split(1, 1)]
        logits.append(torch.cat(parts, 1))
    assert torch.equal(*logits)
    with sparsify(model, replace(policies[0], scores=scores_of(2, dim=16, seed=7))):
        assert not torch.allclose(model(ids[:, :30]).logits, logits[0][:, :30], atol=1e-4)


@torch.no_grad()
def test_pictures_and_measurements_are_of_the_same_masks():
    """Who looks on wraps the policy: keys are turned back for it all the same."""
    from dynmask.evals.gallery import record_masks
    from dynmask.judge import _Meter

    model, ids = tiny_llama(), torch.arange(3, 60)[None]
    gates = gates_of([[5] * 4] * 2, [[6] * 4] * 2)
    policy = Gated(sinks=2, gates=gates, scores=scores_of(2, dim=16))
    masks: dict[int, Any] = {}

    class Heard(Gated):
        def __call__(self, query, key, value, layer):
            masks[layer.index] = super().__call__(query, key, value, layer)
            return masks[layer.index]

    with sparsify(model, Heard(sinks=2, gates=gates, scores=policy.scores)):
        model(ids)
    pictures, _ = record_masks(model, ids, policy)
    meter = _Meter(policy, 2)
    with sparsify(model, meter):
        model(ids)
    for layer, picture in enumerate(pictures):
        dense = masks[layer].dense()[0, :, -1]
        assert torch.equal(picture.last, dense)
        density = masks[layer].density()[0].double().repeat_interleave(2)
        torch.testing.assert_close(meter.density[layer][0][0], density)
    assert dynmask.policies.base.looks_before_rotation(meter)
