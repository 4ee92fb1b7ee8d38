"""GatedCache: what a gated policy reads over all keys, from those that are still read."""

import copy
import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import dynmask  # noqa: E402
from dynmask import Budget, GatedCache, GatedSettings, cli, sparsify  # noqa: E402
from dynmask.cli.common import policy_label  # noqa: E402
from dynmask.evals.generation import attend, bounded_cache, greedy, needed_cache  # noqa: E402
from dynmask.masks import LifetimeMask, MixedMask  # noqa: E402
from dynmask.policies import Causal, Gated, Pooled, Streaming, parse  # noqa: E402
from dynmask.policies.base import for_prompts_alone  # noqa: E402
from dynmask.policies.gated import Gates  # noqa: E402
from dynmask.ragged import Part, RaggedStore, WholeStore  # noqa: E402
from tests.stand_in import save_stand_in  # noqa: E402
from tests.test_bounded import CLOSE, generate, prompt  # noqa: E402
from tests.tiny import TINY, VOCAB, tiny_llama  # noqa: E402

INF = LifetimeMask.INF


def gates_of(window, columns, share=None):
    window, columns = (torch.tensor(x, dtype=torch.int32) for x in (window, columns))
    share = torch.zeros(window.shape) if share is None else torch.tensor(share)
    return Gates(window, columns, share)


MIXED = gates_of(
    # a dense map beside one that chooses; windows of unlike width; one that chooses by itself
    [[3, 7, INF, 4], [5, 2, 9, 6], [40, 1, 2, 3], [6, 6, INF, INF]],
    [[0, 0, 0, 5], [0, 0, 3, 4], [0, 0, 0, 0], [2, 9, 0, 0]],
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0], [0.0] * 4, [0.0] * 4],
)


def policy_of(layers, decode, **over):
    gates = Gates(*(x[:layers] for x in (MIXED.window, MIXED.columns, MIXED.share)))
    given = {"sinks": 2, "least": 1e-3, "last": 5, "gates": gates, "decode": decode}
    return Gated(**(given | over))


class Remembering:
    """decode='keep' over all keys: for every sequence until when each head reads each key.

    Sequences are told apart by their first keys. The definition, with no cache of its own.
    """

    name: ClassVar[str] = "gated"
    causal: ClassVar[bool] = False
    phase: ClassVar[str] = "both"

    def __init__(self, policy, prompt=0, skipped=()):
        self.policy, self.prompt, self.skipped = policy.choosing(), prompt, skipped
        self.frees = policy.frees
        self.chosen = {}

    def check(self, layers, heads, kv_heads):
        self.policy.check(layers, heads, kv_heads)

    def __call__(self, query, key, value, layer):
        if layer.index in self.skipped:
            return self.policy(query, key, value, layer)
        rows = zip(query, key, value, strict=True)
        return LifetimeMask(torch.stack([self.row(*x, layer) for x in rows]), query.shape[2])

    def row(self, query, key, value, layer):
        (heads, n, _), keys = query.shape, key.shape[1]
        name = layer.index, tuple(key[0, 0].tolist())
        old = self.chosen.get(name) if n < keys else None
        windows = torch.tensor(self.policy.windows(layer.index, heads))[:, None]
        k = torch.arange(keys)
        own = (k + windows).clamp(max=INF).masked_fill(k < self.policy.sinks, INF)
        if old is not None:
            own[:, : old.shape[1]] = old
        if n == 1 < keys and keys > self.prompt:
            return own.int()
        seen = torch.zeros(heads, keys, dtype=torch.long)
        last = torch.full((heads, keys), INF)
        members = heads // len(key)
        for g, free in enumerate(self.frees(layer.index, heads, len(key))):
            some = slice(g * members, (g + 1) * members)
            alive = (own[some] > keys - n).any(0) | (k >= keys - n)
            if not free:
                alive[:] = True
            at = alive.nonzero().flatten()
            part = self.policy.of_heads(range(heads)[some], keys)
            given = query[None, some], key[None, g : g + 1, at], value[None, g : g + 1, at]
            mask = part(*given, layer)
            death = mask.death[0].long().expand(members, -1)
            shift = keys - len(at)
            seen[some, at] = torch.where(death < INF, death, INF)
            for m in range(members):
                if mask.plain and windows[g * members + m] < len(at):
                    stays = torch.full((len(at),), INF)
                elif mask.plain:
                    stays = own[g * members + m, at]
                else:
                    stays = (death[m] + shift).where(death[m] < INF, INF)
                if keys < self.prompt and self.policy.chooses(layer.index, heads)[some][m]:
                    stays = torch.full((len(at),), INF)
                last[g * members + m] = 0
                last[g * members + m, at] = stays
            # what a query of this call reads: lifetimes among the keys that are left
            lives = death < INF
            seen[some, at] = torch.where(lives, death + shift, INF)
        self.chosen[name] = last
        return seen.clamp(max=INF).int()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gpt_oss"])
def model(request):
    return TINY[request.param](layers=4)


def sliding(model):
    kinds = getattr(model.config, "layer_types", None) or []
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


# the law: the outputs of the same policy over all keys


def test_generation_equals_that_with_a_full_cache(model):
    ids, mask = prompt()
    with sparsify(model, policy_of(4, "select")) as run:
        expected, logits = generate(model, ids, mask, new=12)
        cache = GatedCache(run)
        tokens, got = generate(model, ids, mask, cache, new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    assert cache.get_seq_length() == 24 + 11


def test_what_the_prompt_chose_is_kept(model):
    ids, mask = prompt()
    policy = policy_of(4, "keep")
    with sparsify(model, Remembering(policy, skipped=sliding(model))):
        expected, logits = generate(model, ids, mask, new=12)
    with sparsify(model, policy) as run:
        tokens, got = generate(model, ids, mask, GatedCache(run), new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    with sparsify(model, replace(policy, decode="select")):
        _, anew = generate(model, ids, mask, new=12)
    assert not torch.allclose(anew, logits, **CLOSE)  # the choice matters


def test_maps_that_choose_blocks_choose_anew_where_others_keep_their_choice(model):
    """Windows need no choice: beside them blocks alone depend on ``decode``, and do not."""
    ids, mask = prompt()
    window = torch.tensor([[3, 7, 4, 9], [5, 2, 9, 6], [INF, 1, 8, 8], [6, 6, 3, 3]]).int()
    blocks = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1]]).int()
    gates = Gates(window, torch.zeros_like(window), torch.zeros(4, 4), blocks)
    policy = Gated(sinks=1, gates=gates, block=4, query_pool=2, key_pool=2, decode="select")
    with sparsify(model, policy):
        expected, logits = generate(model, ids, mask, new=12)
    with sparsify(model, replace(policy, decode="keep")) as run:
        cache = GatedCache(run)
        tokens, got = generate(model, ids, mask, cache, new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    assert replace(policy, decode="keep").frees(0, 4, 2) == [True, False]


class Beside(Remembering):
    """Columns of the first kv head's maps as above, blocks of the second's chosen anew."""

    def __init__(self, columns, blocks, both, **more):
        super().__init__(columns, **more)
        self.blocks, self.both = blocks, both.choosing()

    def __call__(self, query, key, value, layer):
        if layer.index in self.skipped:
            return self.both(query, key, value, layer)
        kept, chosen = (x(query, key, value, layer) for x in (super().__call__, self.blocks))
        if not isinstance(chosen, MixedMask):
            return kept
        return MixedMask((kept, chosen.parts[1]), chosen.of)


def test_columns_are_kept_in_layers_that_have_maps_of_blocks_as_well(model):
    ids, mask = prompt()
    window, none = torch.full((4, 4), 3).int(), torch.zeros(4, 4)
    columns = torch.tensor([[3, 2, 0, 0]] * 4).int()
    blocks = torch.tensor([[0, 0, 2, 1]] * 4).int()
    given = {"sinks": 1, "last": 5, "least": 0.0, "block": 4, "query_pool": 2, "key_pool": 2}
    both = Gated(gates=Gates(window, columns, none, blocks), decode="keep", **given)
    alone = Gated(gates=Gates(window, columns, none), decode="keep", **given)
    beside = Gated(gates=Gates(window, 0 * columns, none, blocks), **given)
    with sparsify(model, Beside(alone, beside, both, skipped=sliding(model))):
        expected, logits = generate(model, ids, mask, new=12)
    with sparsify(model, both) as run:
        tokens, got = generate(model, ids, mask, GatedCache(run), new=12)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)


SHAPES = {"one kv head": (4, 1), "two": (4, 2), "a kv head each": (4, 4)}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_gates_any_lengths(data):
    """Windows beyond the prompt, no columns, dense maps, one token, turns of any length."""
    heads, kv_heads = SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))]
    window = st.sampled_from([1, 2, 5, 17, 80, INF])
    table = [data.draw(st.lists(window, min_size=4, max_size=4)) for _ in range(2)]
    few = [data.draw(st.lists(st.sampled_from([0, 0, 2, 30]), min_size=4, max_size=4))] * 2
    decode = data.draw(st.sampled_from(["select", "keep"]))
    policy = Gated(
        sinks=data.draw(st.sampled_from([0, 1, 3])),
        least=data.draw(st.sampled_from([1e-9, 1e-2])),  # at 0, keys of no worth are all alike
        last=data.draw(st.sampled_from([1, 4])),
        gates=gates_of(table, few),
        decode=decode,
    )
    parts = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 9, 30]), min_size=2, max_size=7))
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads)
    ids = torch.randint(3, VOCAB, (2, sum(parts)), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = torch.tensor([3, 4])  # what the reference tells sequences apart by
    reference = Remembering(policy) if decode == "keep" else policy
    with sparsify(model, reference):
        cache = DynamicCache(config=model.config)
        expected = [model(x, past_key_values=cache).logits for x in ids.split(parts, 1)]
    with sparsify(model, policy) as run:
        try:
            cache = GatedCache(run)
        except ValueError:
            free = [any(policy.frees(i, heads, kv_heads)) for i in range(2)]
            assert decode == "select" and not any(free)
            return
        got = [model(x, past_key_values=cache).logits for x in ids.split(parts, 1)]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), **CLOSE)


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_a_conversation_goes_on(decode):
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    policy = policy_of(4, decode)
    draw = torch.Generator().manual_seed(5)
    reference = Remembering(policy) if decode == "keep" else policy
    inputs = [ids, *(torch.randint(3, VOCAB, (3, n), generator=draw) for n in (1, 1, 9, 1, 1, 4))]
    logits = {}
    for own in (False, True):
        with sparsify(model, policy if own else reference) as run:
            cache: Any = GatedCache(run) if own else DynamicCache(config=model.config)
            seen, parts = mask, []
            for number, part in enumerate(inputs):
                if number:
                    seen = torch.cat([seen, torch.ones_like(part)], 1)
                if own and number == 4:
                    fork, cache = cache, copy.deepcopy(cache)
                given = {"input_ids": part, "attention_mask": seen, "past_key_values": cache}
                positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
                parts.append(model(**given, position_ids=positions).logits)
            logits[own] = torch.cat(parts, 1)
    visible = seen.bool()
    torch.testing.assert_close(logits[True][visible], logits[False][visible], **CLOSE)
    assert fork.get_seq_length() == 24 + 11  # what happened to its copy did not happen to it


@pytest.mark.parametrize("length", [22, 24])
@pytest.mark.parametrize("announced", [False, True])
@torch.no_grad()
def test_a_prompt_in_chunks_chooses_with_each_or_at_its_end(announced, length):
    """The last chunk of 22 tokens is a single one: known to be of the prompt if that is told."""
    model, (ids, _) = tiny_llama(layers=4), prompt(length=length, padding=())
    policy = policy_of(4, "keep")
    told = length if announced else 0
    with sparsify(model, Remembering(policy, prompt=told)):
        whole: Any = DynamicCache(config=model.config)
        expected, logits = generate(model, ids, None, whole, prefill_chunk_size=7)
    with sparsify(model, policy) as run:
        cache = GatedCache(run, prompt=told)
        tokens, got = generate(model, ids, None, cache, prefill_chunk_size=7)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)


@torch.no_grad()
def test_the_choice_at_the_end_of_chunks_is_that_of_the_last_queries_over_all_keys():
    """In layer 0, whose keys do not depend on the masks, it is the choice of one call."""
    model, (ids, _) = tiny_llama(layers=1), prompt(padding=(), length=26)
    policy = policy_of(1, "keep", gates=gates_of([[4, 4, 6, 6]], [[5, 5, 3, 3]]))
    held = []
    for told, parts in ((26, (26,)), (26, (11, 9, 6)), (0, (11, 9, 6))):
        with sparsify(model, policy) as run:
            cache = GatedCache(run, prompt=told)
            for part in ids.split(parts, 1):
                model(part, past_key_values=cache)
            ragged = cache.layers[0].store.ragged
            order, counts = ragged.live()
            positions = ragged.positions.long().gather(1, order)
            held.append([positions[b, : sum(counts[b])].tolist() for b in range(3)])
    assert held[0] == held[1] != held[2]


def test_beam_search_and_sampling():
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    for decode in ("select", "keep"):
        policy = policy_of(4, decode)
        reference = Remembering(policy) if decode == "keep" else policy
        for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            outputs = []
            for own in (False, True):
                with sparsify(model, policy if own else reference) as run:
                    given = {"past_key_values": GatedCache(run)} if own else {}
                    torch.manual_seed(0)
                    outputs.append(
                        model.generate(ids, attention_mask=mask, max_new_tokens=6, **given, **more)
                    )
            assert torch.equal(*outputs)


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_rows_may_begin_late_where_a_prompt_comes_token_by_token(decode):
    model, (ids, mask) = tiny_llama(layers=4), prompt(length=12, padding=(5, 1, 0))
    policy = policy_of(4, decode, gates=gates_of([[3, 7, INF, 4]] * 4, [[0] * 4] * 4))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with sparsify(model, policy) as run:
        expected = model(ids, **given).logits
        for sizes in ([1] * 12, [3, 1, 1, 2, 1, 4]):
            cache, parts, end = GatedCache(run), [], 0
            for part in ids.split(sizes, 1):
                end += part.shape[1]
                own = {"attention_mask": mask[:, :end], "past_key_values": cache}
                at = positions[:, end - part.shape[1] : end]
                parts.append(model(part, **own, position_ids=at).logits)
            got = torch.cat(parts, 1)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_a_guard_widens_what_stays():
    """All maps are promised everything: what the guard adds for the prompt is kept with it."""
    model, (ids, _) = tiny_llama(layers=4), prompt(length=40, padding=())
    policy = policy_of(4, "keep", guard=0.02, promise=torch.full((4, 4), 0.9))
    more = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    steps = [ids, ids[:, :1], ids[:, 1:2], more, ids[:, :1]]
    with pytest.warns(UserWarning, match="guard"), sparsify(model, policy) as run:
        cache = GatedCache(run)
        got = [model(x, past_key_values=cache).logits for x in steps]
        told = run.summary()["guard"]
    with pytest.warns(UserWarning, match="guard"), sparsify(model, Remembering(policy)):
        whole = DynamicCache(config=model.config)
        expected = [model(x, past_key_values=whole).logits for x in steps]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), **CLOSE)
    assert 0 < told["widened"] <= told["maps"] <= 2 * 3 * 16  # two calls of many tokens, 3 rows
    assert told["maps"] > 3 * 16
    assert all(0 <= x <= 1 for row in told["widened_per_head"] for x in row)


# memory


@torch.no_grad()
def test_dropped_keys_take_no_memory():
    model = tiny_llama(layers=2, max_position_embeddings=4096)
    gates = gates_of([[8, 40, INF, 4], [1, 2, 3, 90]], [[6] * 4] * 2)
    policy = policy_of(2, "keep", gates=gates)
    ids = torch.randint(3, VOCAB, (2, 1500), generator=torch.Generator().manual_seed(1))
    with sparsify(model, policy) as run:
        cache, sizes = GatedCache(run), []
        for part in ids.split([1400, *[1] * 100], 1):
            model(part, past_key_values=cache)
            sizes.append(cache.nbytes)
    tensors = [
        x
        for layer in cache.layers
        for store in (layer.store.ragged, layer.store.whole)
        if store is not None
        for x in store._tensors.values()
    ]
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
    slot = 2 * 16 * 4 + 4 + 2 * 4  # key, value, position, death for each query head of a group
    rings = [40], [2, 90]
    for layer, own in zip(cache.layers, rings, strict=True):
        ragged = layer.store.ragged
        assert all(
            2 <= slots - ring <= 2 + 2 * 6 for slots, ring in zip(ragged.slots, own, strict=True)
        )
        few = 2 * 4 + len(own) * (2 + 4) * 8  # tokens of each row; windows and places
        assert ragged.nbytes == 2 * sum(ragged.slots) * slot + few
    assert len(set(sizes)) == 2  # decoding takes no more, but where the whole head's room ends
    whole = cache.layers[0].store.whole
    assert whole.longest == 1500 <= whole.keys.shape[2] <= 1500 * 17 // 16
    assert cache.layers[1].store.whole is None
    full = 2 * 2 * 2 * 2 * 1500 * 16 * 4  # two tensors of two layers, rows and kv heads, float32
    assert cache.nbytes < 0.4 * full


def naive(positions, death, own):
    """Positions that a query at ``own`` reads."""
    return sorted(p for p, d in zip(positions, death, strict=True) if d > own and p <= own)


@settings(max_examples=20, deadline=None)
@given(
    windows=st.lists(
        st.tuples(st.sampled_from([1, 3, 70, 2**31 - 2]), st.sampled_from([2, 9, 130])),
        min_size=1,
        max_size=3,
    ),
    sinks=st.sampled_from([0, 2, 5]),
    seen=st.lists(st.sampled_from([0, 1, 4, 60]), min_size=1, max_size=3),
    steps=st.sampled_from([1, 20, 150]),
    seed=st.integers(0, 99),
)
def test_slots_are_used_again_and_hold_what_is_read(windows, sinks, seen, steps, seed):
    """Against lists of positions: every query head reads its own, in every row."""
    if not any(seen):
        seen[0] = 1
    draw = torch.Generator().manual_seed(seed)
    heads, members = len(windows), 2
    store = RaggedStore([list(own) for own in windows], sinks)
    table = torch.tensor(windows)
    lives: list[Any] = [None] * len(seen)
    tokens = max(seen) + steps
    key, value = (torch.randn(len(seen), heads, tokens, d, generator=draw) for d in (4, 3))
    parts = []
    for row, count in enumerate(seen):
        k = torch.arange(count)
        own = (k + table[..., None]).clamp(max=INF).masked_fill(k < sinks, INF)
        chosen = torch.rand(heads, members, count, generator=draw)
        later = torch.randint(0, 99, chosen.shape, generator=draw)  # as a guard may have it
        own = torch.where(chosen < 0.4, (own + later).clamp(max=INF), own)
        lives[row] = own.masked_fill(chosen < 0.2, INF).int()
        if count:
            one = slice(row, row + 1)
            k, v = key[one, :, :count], value[one, :, :count]
            at = torch.arange(count)[None, None]
            parts.append(Part([row], range(heads), at, k, v, lives[row][None], count))
    store.fill(len(seen), parts)
    for g, slots in enumerate(store.slots):
        widest, columns = max(windows[g]), []
        for row, count in enumerate(seen):
            ends = lives[row][g].amax(0).tolist()
            columns.append(sum(ends[p] > max(p + widest, count) for p in range(sinks, count)))
        ring = min(widest, max(64, 1 << (max(seen) - 1).bit_length()))
        assert slots == sinks + max(columns) + ring
    for step in range(steps):
        at = torch.tensor([count + step for count in seen])
        pick = at[:, None, None, None].expand(-1, heads, 1, 1)
        store.add(
            key.gather(2, pick.expand(-1, -1, -1, 4)),
            value.gather(2, pick.expand(-1, -1, -1, 3)),
            range(len(seen)),
        )
        k, v, plan = store.read()
        for row in range(len(seen)):
            p = int(at[row])
            new = (p + table).clamp(max=INF) if p >= sinks else torch.full_like(table, INF)
            lives[row] = torch.cat([lives[row], new.int()[..., None]], -1)
            if step not in (0, 7, steps - 1):
                continue
            for g in range(heads):
                for m in range(members):
                    count = int(plan.count[g * members + m, row])
                    slots = plan.index[g * members + m, row, :count].long()
                    held = store.positions[row, slots].tolist()
                    assert sorted(held) == naive(range(p + 1), lives[row][g, m].tolist(), p)
                    assert torch.equal(k[row, 0, slots], key[row, g, held])
                    assert torch.equal(v[row, 0, slots], value[row, g, held])
    assert store.seen == [count + steps for count in seen]
    order, counts = store.live()
    for row, count in enumerate(store.seen):
        first = 0
        for g in range(heads):
            held = store.positions[row, order[row, first : first + counts[row][g]]].tolist()
            ends = lives[row][g].amax(0).tolist()
            assert held == [p for p in range(count) if ends[p] > count]
            first += counts[row][g]


def test_a_row_that_has_no_token_yet_reads_nothing():
    store = RaggedStore([[4], [2]], 1)
    key = torch.randn(2, 2, 3, 4)
    death = torch.full((1, 2, 1, 3), INF, dtype=torch.int32)
    at = torch.arange(3)[None, None]
    store.fill(2, [Part([1], range(2), at, key[1:], key[1:], death, 3)])
    for _ in range(3):
        store.add(key[:, :, :1], key[:, :, :1], [1])
        assert store.read()[2].count.tolist()[0][0] == 0 < store.read()[2].count.min(0).values[1]


def test_few_tokens_copy_the_keys_of_heads_that_keep_all():
    store, copies = WholeStore(), 0
    key = torch.randn(2, 1, 400, 3)
    for start, stop in [(0, 200), *((i, i + 1) for i in range(200, 400))]:
        before = store.keys.data_ptr() if store.seen else 0
        part = key[:, :, start:stop]
        store.extend(part, part, {0: (0, stop - start), 1: (0, stop - start)})
        copies += store.keys.data_ptr() != before
    assert torch.equal(store.held()[0], key) and copies <= 5


# the rows of a batch, going back


@torch.no_grad()
def test_reset_reorder_crop():
    model, (ids, _) = tiny_llama(layers=2), prompt(batch=2, padding=())
    gates = gates_of([[60, 50, INF, 4], [31, 2, 30, 90]], [[6] * 4] * 2)
    policy = policy_of(2, "keep", gates=gates)
    with sparsify(model, policy) as run:
        cache = GatedCache(run)
        first = model(ids[:, :20], past_key_values=cache).logits
        model(ids[:, 20:21], past_key_values=cache)
        cache.crop(-1)
        assert cache.get_seq_length() == 20
        again = model(ids[:, 20:21], past_key_values=cache).logits
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(1)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(ids[[1, 0], 21:22], past_key_values=cache).logits
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="crop: expected at most 31 tokens.*received 42"):
            cache.crop(-1)
        assert {layer.tokens for layer in cache.layers} == {42}  # all layers or none
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        anew = model(ids[:, :20], past_key_values=cache).logits
        torch.testing.assert_close(anew, first)
        cache.crop(-100)
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids[:, :20], past_key_values=cache).logits, first)
    with sparsify(model, Remembering(policy)):
        whole = DynamicCache(config=model.config)
        parts = [model(x, past_key_values=whole).logits for x in ids[:, :22].split([20, 1, 1], 1)]
    torch.testing.assert_close(first, parts[0], **CLOSE)
    torch.testing.assert_close(again, parts[1], **CLOSE)
    torch.testing.assert_close(swapped, parts[2][[1, 0]], **CLOSE)


@torch.no_grad()
def test_a_prefix_may_be_read_in_inference_mode_and_continued_outside():
    model, (ids, _) = tiny_llama(layers=4), prompt(padding=())
    policy = policy_of(4, "select")
    steps = ids.split([10, 1, 1, 5, *[1] * 7], 1)
    with sparsify(model, policy) as run:
        whole = DynamicCache(config=model.config)
        expected = torch.cat([model(x, past_key_values=whole).logits for x in steps], 1)
        cache = GatedCache(run)
        with torch.inference_mode():
            parts = [model(x, past_key_values=cache).logits for x in steps[:2]]
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 4]))
        parts += [model(x, past_key_values=cache).logits for x in steps[2:]]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


# what is reported


@pytest.mark.parametrize("decode", ["select", "keep"])
@torch.no_grad()
def test_densities_are_of_the_whole_causal_area(decode):
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    policy = policy_of(4, decode)
    reference = Remembering(policy) if decode == "keep" else policy
    summaries = []
    for own in (False, True):
        with sparsify(model, policy if own else reference, measure=True) as run:
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
        assert summaries[0][phase]["calls"] == summaries[1][phase]["calls"]


@torch.no_grad()
def test_kept_mass_is_that_of_the_call_that_begins():
    model, (ids, _) = tiny_llama(layers=2), prompt(padding=())
    with sparsify(model, policy_of(2, "keep"), measure_rows=4) as run:
        generate(model, ids, None, GatedCache(run))
        own = run.summary()
    with sparsify(model, policy_of(2, "keep").choosing(), measure_rows=4) as run:
        model(ids)
        assert own["prefill"]["kept_mass"] == pytest.approx(run.summary()["prefill"]["kept_mass"])
    assert own["decode"]["kept_mass"] is None and 0 < own["decode"]["density"] < 1


# what cannot be honoured


def test_runs_that_cannot_serve_it():
    model = tiny_llama()
    with sparsify(model, Streaming()) as run, pytest.raises(ValueError, match="received streaming"):
        GatedCache(run)
    with pytest.raises(ValueError, match="received one that was removed"):
        GatedCache(run)
    with pytest.raises(ValueError, match="the run that sparsify returned"):
        GatedCache(model)
    with (
        sparsify(model, Gated(window=8, columns=4, decode="select")) as run,
        pytest.raises(ValueError, match="any key may be read again.*decode='keep'"),
    ):
        GatedCache(run)
    with sparsify(model, Gated(window=8, columns=0, decode="select")) as run:
        for bad in (-1, 2.0, True):
            with pytest.raises(ValueError, match="prompt: expected a whole number"):
                GatedCache(run, prompt=bad)
        with pytest.raises(ValueError, match="only ever evicts"):
            dynmask.BoundedCache(run)
    mistral = TINY["mistral"]()  # every layer has a window of its own
    with (
        sparsify(mistral, Gated(window=8, columns=0, decode="select")) as run,
        pytest.raises(ValueError, match="sliding windows"),
    ):
        GatedCache(run)


@torch.no_grad()
def test_keep_needs_a_cache_that_remembers():
    model, (ids, mask) = tiny_llama(), prompt()
    with (
        sparsify(model, policy_of(2, "keep")),
        pytest.raises(ValueError, match="GatedCache.*decode='full'"),
    ):
        generate(model, ids, mask)
    for text in ("gated:decode=all", "gated:window=3,decode="):
        with pytest.raises(ValueError, match="'full', 'select' or 'keep'"):
            parse(text)


@torch.no_grad()
def test_calls_that_cannot_be_honoured():
    model, other = tiny_llama(), tiny_llama(seed=1)
    ids, mask = prompt()
    policy = policy_of(2, "keep")
    with sparsify(model, policy) as run:
        cache = GatedCache(run)
        tril = torch.ones(24, 24, dtype=torch.bool).tril().expand(3, 1, -1, -1)
        with pytest.raises(ValueError, match="2-D mask"):
            model(ids, attention_mask=tril, past_key_values=cache)
        cache = GatedCache(run)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="hides the same tokens as before"):
            model(ids[:, :2], past_key_values=cache)
        cache = GatedCache(run)
        model(ids, past_key_values=cache)
        for n in (1, 3):
            fork = copy.deepcopy(cache)
            with pytest.raises(ValueError, match=r"expected \(3, 1\) batch rows and kv heads"):
                model(ids[:2, :n], past_key_values=fork)
            fork = copy.deepcopy(cache)
            with (
                torch.autocast("cpu", dtype=torch.bfloat16),
                pytest.raises(ValueError, match="the same autocast"),
            ):
                model(ids[:, :n], past_key_values=fork)
        cache = GatedCache(run)
        with sparsify(other, policy), pytest.raises(ValueError, match="of another"):
            other(ids, past_key_values=cache)
        cache = GatedCache(run)
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="GatedCache.*attention is not dynmask's"):
            other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="GatedCache: expected the run.*in effect"):
        model(ids, past_key_values=cache)
    with sparsify(model, Causal()), pytest.raises(ValueError, match="GatedLayer"):
        model(ids, past_key_values=cache)


# where users meet it


def test_timed_generations_have_it_and_keep_always_has():
    model, (ids, _) = TINY["llama"](layers=2), prompt(batch=1, padding=())
    for policy, own, needed in (
        (policy_of(2, "select"), True, False),
        (policy_of(2, "keep"), True, True),
        (Gated(window=8, columns=4), False, False),
        (Pooled(block=16), False, False),
    ):
        with attend(model, policy) as active:
            assert isinstance(bounded_cache(active), GatedCache) == own
            assert isinstance(needed_cache(active), GatedCache) == needed
            if own:
                done = greedy(model, ids, 4, cache=bounded_cache(active))
                assert done.cache_bytes and len(done.tokens) == 4
    assert bounded_cache(None) is None and needed_cache(None) is None


def test_generate_and_evaluate_on_the_command_line(tmp_path, capsys, monkeypatch):
    model = str(save_stand_in(tmp_path / "model"))
    policy = "gated:window=8,columns=6,decode=keep"
    caches = []

    class Cache(GatedCache):
        def __init__(self, run):
            super().__init__(run)
            caches.append(self)

    monkeypatch.setattr(dynmask, "GatedCache", Cache, raising=False)
    asked = ["generate", "--model", model, "--prompt", "a b c " * 20, "--max-new-tokens", "3"]
    assert cli.main([*asked, "--policy", policy, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(caches) == 1 and caches[0].get_seq_length() > 60
    assert result["policy"] == policy and 0 < result["density_decode"] < 1
    asked = ["evaluate", "--model", model, "--task", "lines", "--length", "200", "--n", "1"]
    asked += ["--timing-items", "1", "--quiet", "--no-plots", "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--policy", policy]) == 0
    assert policy in capsys.readouterr().out and len(caches) >= 2
    assert policy in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_card_may_be_asked_to_keep(tmp_path):
    model, (ids, mask) = tiny_llama(), prompt()
    cheap = GatedSettings(max_kl=100.0, budgets=(Budget(5, 4),), judged=4, sinks=1)
    card = dynmask.calibrate(
        model, [torch.arange(3, 70)], policy="gated", settings=cheap, progress=False
    )
    card.save_pretrained(tmp_path / "card")
    policy: Any = parse(f"gated:{tmp_path / 'card'},decode=keep")
    assert policy.decode == card.policy(decode="keep").decode == "keep"
    assert parse(f"gated:{tmp_path / 'card'}").decode == card.policy().decode == "full"
    assert policy_label(f"gated:{tmp_path / 'card'},decode=keep") == "gated:card,decode=keep"
    with pytest.raises(ValueError, match="'full', 'select' or 'keep'"):
        parse(f"gated:{tmp_path / 'card'},decode=all")
    with sparsify(model, policy) as run:
        cache = GatedCache(run)
        generate(model, ids, mask, cache)
    assert all(layer.store.whole is None for layer in cache.layers)


def test_public_names():
    assert dynmask.GatedCache is GatedCache


def test_full_chooses_for_prompts_alone():
    """The prompt is that of "select", a decoded token that of the model's own attention."""
    model = tiny_llama().eval()
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(5))
    select = policy_of(model.config.num_hidden_layers, "select")
    full = replace(select, decode="full")
    assert not for_prompts_alone(select) and for_prompts_alone(full)
    assert full.frees(0, 4, 2) == [False, False] and full.choosing() is full
    with torch.no_grad():
        with sparsify(model, select):
            wanted = model(ids[:, :32], use_cache=True)
        with sparsify(model, full):
            found = model(ids[:, :32], use_cache=True)
            assert torch.equal(found.logits, wanted.logits)
            cache = found.past_key_values
            ours = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(32, 40)]
        cache = wanted.past_key_values  # the same keys, under the model's own attention
        own = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(32, 40)]
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(own, 1))
    with sparsify(model, full) as run, pytest.raises(ValueError, match="decode='full', which"):
        dynmask.GatedCache(run)


def test_full_is_an_option_of_the_text_form():
    assert parse("gated:decode=full") == Gated(decode="full") == parse("gated")
    with pytest.raises(ValueError, match="gated"):
        parse("gated:decode=fully")
