"""GatedCache with kv heads that evict by score: the same outputs as over all keys, memory freed."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from dynmask import GatedCache, LifetimeMask, sparsify  # noqa: E402
from dynmask.integrations.prefill import cache_for, read_chunks  # noqa: E402
from dynmask.policies import Gated  # noqa: E402
from tests.test_bounded import CLOSE, generate, prompt  # noqa: E402
from tests.test_gated_cache import Remembering  # noqa: E402
from tests.test_gated_kept import gates_of, scores_of  # noqa: E402
from tests.tiny import TINY, VOCAB, tiny_llama  # noqa: E402

INF = LifetimeMask.INF

WINDOW = [[3, 3, 6, 6], [5, 5, 4, 9], [4, 4, 2, 2], [INF, 3, 7, 7]]
KEPT = [[4, 4, 2, 2], [0, 0, 3, 3], [5, 5, 5, 5], [0, 2, 9, 9]]
"""Two budgets; a window beside a group that is not alike; two of one width; a dense map in one."""


def policy_of(layers=4, decode="select", dim=16, **over):
    gates = gates_of(WINDOW[:layers], KEPT[:layers])
    given = {"sinks": 2, "last": 5, "gates": gates, "scores": scores_of(layers, dim=dim)}
    return Gated(**(given | {"decode": decode} | over))


@pytest.fixture(scope="module", params=["qwen3", "gpt_oss"])
def model(request):
    """The last has layers with a window of their own: no map of these keeps by score."""
    return TINY[request.param](layers=4)


def policy_for(model, **over):
    policy = policy_of(**over)
    kinds = getattr(model.config, "layer_types", None) or []
    sliding = torch.tensor([kind == "sliding_attention" for kind in kinds] or [False] * 4)
    kept = policy.gates.kept.masked_fill(sliding[:, None], 0)
    return replace(policy, gates=replace(policy.gates, kept=kept))


@pytest.mark.parametrize("decode", ["select", "keep"])
def test_generation_equals_that_with_a_full_cache(model, decode):
    ids, mask = prompt()
    policy = policy_for(model, decode=decode)
    with sparsify(model, replace(policy, decode="select")):
        expected, logits = generate(model, ids, mask, new=12)
    with sparsify(model, policy) as run:
        cache = GatedCache(run)
        tokens, got = generate(model, ids, mask, cache, new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    none = replace(policy.gates, kept=0 * policy.gates.kept)
    with sparsify(model, replace(policy, gates=none, decode="select")):
        _, less = generate(model, ids, mask, new=12)
    assert not torch.allclose(less, logits, **CLOSE)  # what is kept matters
    assert any(layer.store.live for layer in cache.layers if hasattr(layer, "store"))


class Beside(Remembering):
    """Maps with columns as decode='keep' remembers them, beside maps that keep by score."""

    scored = True

    def __init__(self, policy):
        gates = policy.gates
        none = torch.zeros_like(gates.kept)
        super().__init__(replace(policy, gates=replace(gates, kept=none), scores=None))
        window = replace(gates, columns=none)
        self.kept = gates.kept > 0
        self.by_score = replace(policy, gates=window, decode="select")

    def __call__(self, query, key, value, layer):
        remembered = super().__call__(query, key, value, layer)
        mask: Any = self.by_score(query, key, value, layer)
        death = mask.death.expand(len(query), -1, -1)
        death = death.repeat_interleave(query.shape[1] // death.shape[1], 1)
        own = self.kept[layer.index][:, None]
        return LifetimeMask(torch.where(own, death, remembered.death), query.shape[2])


SHAPES = {"one kv head": (4, 1), "two": (4, 2), "a kv head each": (4, 4)}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_gates_any_lengths(data):
    """Maps of all kinds but blocks, in any group, of one width or several; turns of any length."""
    heads, kv_heads = SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))]
    members = heads // kv_heads
    decode = data.draw(st.sampled_from(["select", "keep"]))
    kinds = st.sampled_from([(3, 0, 4), (3, 0, 9), (6, 0, 4), (5, 0, 0), (2, 6, 0), (80, 0, 30)])
    single = data.draw(st.booleans()) and decode == "select"
    table = []
    for _ in range(2):
        if single:  # groups whose maps differ: they keep all keys
            table.append(data.draw(st.lists(kinds, min_size=heads, max_size=heads)))
        else:
            groups = data.draw(st.lists(kinds, min_size=kv_heads, max_size=kv_heads))
            table.append([kind for kind in groups for _ in range(members)])
    window, columns, kept = ([[kind[i] for kind in row] for row in table] for i in range(3))
    policy = Gated(
        sinks=data.draw(st.sampled_from([0, 1, 3])),
        least=1e-9,
        last=4,
        gates=gates_of(window, kept, columns),
        scores=scores_of(2, groups=kv_heads, dim=64 // heads),
        decode=decode,
    )
    parts = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 9, 30]), min_size=2, max_size=7))
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads)
    ids = torch.randint(3, VOCAB, (2, sum(parts)), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = torch.tensor([3, 4])  # what the reference tells sequences apart by
    with sparsify(model, Beside(policy) if decode == "keep" else policy):
        cache = DynamicCache(config=model.config)
        expected = [model(x, past_key_values=cache).logits for x in ids.split(parts, 1)]
    with sparsify(model, policy) as run:
        try:
            cache = GatedCache(run)
        except ValueError:
            some = {x for i in range(2) for x in policy.lives(i, heads, kv_heads)}
            free = [any(policy.frees(i, heads, kv_heads)) for i in range(2)]
            assert decode == "select" and not any(free) and some == {None}
            return
        got = [model(x, past_key_values=cache).logits for x in ids.split(parts, 1)]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), **CLOSE)


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_beside_maps_of_blocks(offload):
    """Of three kv heads one evicts by score, one reads blocks, one has windows."""
    model = tiny_llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    none = [0] * 6
    gates = gates_of(
        [[3, 3, 4, 9, 5, 6]] * 2, [[4, 4, *none[:4]]] * 2, [none] * 2, [[0, 0, 2, 1, 0, 0]] * 2
    )
    sizes = {"block": 4, "query_pool": 2, "key_pool": 2, "sinks": 1}
    policy = Gated(gates=gates, scores=scores_of(2, groups=3, dim=16), decode="select", **sizes)
    ids, mask = prompt(length=40)
    with sparsify(model, policy) as run:
        expected, logits = generate(model, ids, mask, new=6)
        cache = GatedCache(run, offload=offload)
        tokens, got = generate(model, ids, mask, cache, new=6)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    kinds = [(s.ragged, s.live, s.hosted) for s in (layer.store for layer in cache.layers)]
    assert all(
        ragged and live and (hosted is not None) == offload for ragged, live, hosted in kinds
    )


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_whole_chunks_and_single_tokens_are_one(decode):
    """Maps that no query decides for: any cut gives the prompt's outputs, in padded rows too."""
    model, (ids, mask) = tiny_llama(layers=3), prompt(length=30, padding=(5, 1, 0))
    policy = policy_of(3, decode)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with sparsify(model, replace(policy, decode="select")):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    with sparsify(model, policy) as run:
        for sizes in ([30], [1] * 30, [3, 1, 1, 2, 1, 22], [17, 13]):
            cache, parts, end = GatedCache(run), [], 0
            for part in ids.split(sizes, 1):
                end += part.shape[1]
                own = {"attention_mask": mask[:, :end], "past_key_values": cache}
                at = positions[:, end - part.shape[1] : end]
                parts.append(model(part, **own, position_ids=at).logits)
            got = torch.cat(parts, 1)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def test_beam_search_and_sampling():
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    policy = policy_of(4)
    for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        outputs = []
        for own in (False, True):
            with sparsify(model, policy) as run:
                given = {"past_key_values": GatedCache(run)} if own else {}
                torch.manual_seed(0)
                outputs.append(
                    model.generate(ids, attention_mask=mask, max_new_tokens=6, **given, **more)
                )
        assert torch.equal(*outputs)


@torch.no_grad()
def test_evicted_keys_take_no_memory():
    """Each kv head has as many slots as it keeps, in decoding and after each chunk of a prompt."""
    model = tiny_llama(layers=2, max_position_embeddings=4096)
    gates = gates_of([[8, 8, 40, 40], [20, 20, 20, 20]], [[90, 90, 30, 30], [50] * 4])
    policy = policy_of(2, gates=gates)
    ids = torch.randint(3, VOCAB, (2, 900), generator=torch.Generator().manual_seed(1))
    with sparsify(model, policy) as run:
        for told in (0, 900):  # no prompt is held back for them
            cache, sizes = GatedCache(run, prompt=told), []
            for part in ids.split([500, 300, *[1] * 100], 1):
                model(part, past_key_values=cache)
                sizes.append(cache.nbytes)
            assert len(set(sizes)) == 1
            slot = 2 * 16 * 4 + 4 + 4  # key, value, position, score
            slots = [[store.slots for store in layer.store.live] for layer in cache.layers]
            assert slots == [[100, 72], [72]]
            heads = 100 + 72 + 2 * 72
            few = 3 * 2 * 4 + 4 * 4  # tokens of each row in three stores, the widths of four heads
            assert cache.nbytes == 2 * heads * slot + few
        chunked: Any = cache_for(run, 900)
        assert isinstance(chunked, GatedCache)
        read_chunks(model, ids, chunked, 256, policy=policy)
        assert chunked.nbytes == cache.nbytes


@torch.no_grad()
def test_reset_reorder_crop_fork():
    model, (ids, _) = tiny_llama(layers=2), prompt(batch=2, padding=())
    policy = policy_of(2, gates=gates_of([[4] * 4, [9, 9, 30, 30]], [[60] * 4, [18, 18, 9, 9]]))
    with sparsify(model, policy) as run:
        whole: Any = DynamicCache(config=model.config)
        steps = ids[:, :22].split([20, 1, 1], 1)
        expected = [model(x, past_key_values=whole).logits for x in steps]
        cache = GatedCache(run)
        first = model(ids[:, :20], past_key_values=cache).logits
        torch.testing.assert_close(first, expected[0], **CLOSE)
        model(ids[:, 20:21] + 1, past_key_values=cache)
        cache.crop(-1)  # nothing was evicted yet
        assert cache.get_seq_length() == 20
        again = model(ids[:, 20:21], past_key_values=cache).logits
        torch.testing.assert_close(again, expected[1], **CLOSE)
        fork = copy.deepcopy(cache)
        assert fork.policy is cache.policy  # with score heads and card, which nothing changes
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(ids[[1, 0], 21:22], past_key_values=cache).logits
        torch.testing.assert_close(swapped, expected[2][[1, 0]], **CLOSE)
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="crop: expected at most 29 tokens.*received 42"):
            cache.crop(-1)
        assert {layer.tokens for layer in cache.layers} == {42}  # all layers or none
        other = model(ids[:, 21:22], past_key_values=fork).logits
        torch.testing.assert_close(other, expected[2], **CLOSE)
        with pytest.raises(ValueError, match=r"expected \(2, 2\) batch rows and kv heads"):
            model(ids[:1, :3], past_key_values=fork)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids[:, :20], past_key_values=cache).logits, first)


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_densities_are_of_the_whole_causal_area(decode):
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    policy = policy_of(4, decode)
    summaries = []
    for own in (False, True):
        given = policy if own else replace(policy, decode="select")
        with sparsify(model, given, measure=True) as run:
            cache: Any = GatedCache(run) if own else DynamicCache(config=model.config)
            generate(model, ids, mask, cache)
            turn = torch.cat([mask, torch.ones(3, 7 + 5, dtype=mask.dtype)], 1)
            positions = (turn.cumsum(-1) - 1)[:, -5:]
            model(ids[:, :5], attention_mask=turn, position_ids=positions, past_key_values=cache)
        summaries.append(run.summary())
    for phase in ("prefill", "decode"):
        full, own = (s[phase]["density_per_head"] for s in summaries)
        for a, b in zip(full, own, strict=True):
            assert b == pytest.approx(a, rel=1e-5)


@torch.no_grad()
def test_the_guard_widens_the_call_that_begins_and_nothing_is_kept_of_it():
    """Decoded tokens read what the gates say, as over all keys."""
    model, (ids, _) = tiny_llama(layers=2), prompt(length=60, padding=())
    gates = gates_of([[3] * 4] * 2, [[4] * 4] * 2)
    policy = policy_of(2, gates=gates, guard=0.0, promise=torch.full((2, 4), 0.7))
    outputs = []
    for own in (False, True):
        with pytest.warns(UserWarning, match="guard"), sparsify(model, policy) as run:
            cache: Any = GatedCache(run) if own else DynamicCache(config=model.config)
            parts = ids.split([50, *[1] * 10], 1)
            outputs.append(torch.cat([model(x, past_key_values=cache).logits for x in parts], 1))
            assert run.summary()["guard"]["widened"] > 0
    torch.testing.assert_close(*outputs, **CLOSE)
    store = cache.layers[0].store.live[0]
    assert store.slots == 3 + 4 + 2


@torch.no_grad()
def test_the_guard_looks_at_chunks_among_the_keys_that_are_left():
    """Maps that never keep what is promised read all live keys, and no more stay for it."""
    model, (ids, mask) = tiny_llama(layers=2), prompt(length=60, padding=(9, 0, 0))
    gates = gates_of([[3] * 4] * 2, [[4] * 4] * 2)
    policy = policy_of(2, gates=gates, guard=0.0, promise=torch.full((2, 4), 2.0))
    with pytest.warns(UserWarning, match="guard"), sparsify(model, policy, measure=True) as run:
        cache = GatedCache(run)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for first, stop in ((0, 30), (30, 60)):
            run.reset()
            own = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            at = positions[:, first:stop]
            logits = model(ids[:, first:stop], **own, position_ids=at).logits
        summary = run.summary()
    assert summary["guard"]["maps"] == 3 * 2 * 4 == summary["guard"]["dense"]
    before, live = [21, 30, 30], 3 + 4 + 2
    read = sum(30 * live + 30 * 31 // 2 for _ in before)
    causal = sum(30 * old + 30 * 31 // 2 for old in before)
    for layer in summary["prefill"]["density_per_head"]:
        assert layer == pytest.approx([read / causal] * 4, rel=1e-6)
    assert logits.isfinite().all()
    assert {store.slots for layer in cache.layers for store in layer.store.live} == {live}


def test_runs_that_cannot_serve_it():
    model = tiny_llama()
    gates = gates_of([[3, 3, 8, INF]] * 2, [[4, 5, 2, 0]] * 2)
    policy = policy_of(2, gates=gates)
    with (
        sparsify(model, policy) as run,
        pytest.raises(ValueError, match="keep by one score alike"),
    ):
        GatedCache(run)
    with (
        sparsify(model, policy_of(2, "full")) as run,
        pytest.raises(ValueError, match="decode='full'"),
    ):
        GatedCache(run)
