"""H2O while tokens are decoded: the rule written out row by row, and the cache that follows it."""

import copy
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import dynmask  # noqa: E402
from dynmask import HeavyHitterCache, attention, cli, sparsify  # noqa: E402
from dynmask.cli.generate import Work  # noqa: E402
from dynmask.evals.generation import attend, bounded_cache, greedy, needed_cache  # noqa: E402
from dynmask.integrations import prefill  # noqa: E402
from dynmask.integrations.heavy_cache import HeavyHitterStore  # noqa: E402
from dynmask.masks import LifetimeMask  # noqa: E402
from dynmask.policies import H2O, Causal, Gated, Layer, Streaming, VerticalSlash  # noqa: E402
from dynmask.policies.base import looks_ahead  # noqa: E402
from tests.stand_in import save_stand_in  # noqa: E402
from tests.test_bounded import CLOSE, generate, prompt  # noqa: E402
from tests.tiny import TINY, VOCAB, tiny_llama  # noqa: E402

SMALL = H2O(width=10, block=3)


class Naive:
    """The rule for one kv head, a row at a time in float64.

    Before a row that needs room for so many, itself counted, keys go until these fit: always the
    one that has received least, among those that are not of the newest.
    """

    def __init__(self, policy):
        self.policy = policy
        self.held, self.received, self.death, self.row = [], {}, [], 0

    def call(self, query, key):
        """query [members, n, d] of new rows, key [all, d]; returns what each row reads."""
        policy, n = self.policy, query.shape[1]
        block = min(policy.block, policy.width // 2)
        decoding, reads = n == 1 and self.row > 0, []
        for one in query.double().unbind(1):
            room = policy.width - (1 if decoding else block - self.row % block)
            while len(self.held) > room:
                old = [k for k in self.held if k < self.row - int(policy.recent * room)]
                least = min(old, key=self.received.__getitem__)
                self.held.remove(least)
                self.death[least] = self.row
            self.held.append(self.row)
            self.death.append(LifetimeMask.INF)
            near = key[self.held].double()
            weights = (one @ near.T * key.shape[-1] ** -0.5).softmax(-1).sum(0)
            for k, weight in zip(self.held, weights.tolist(), strict=True):
                self.received[k] = self.received.get(k, 0.0) + weight
            reads.append(list(self.held))
            self.row += 1
        return reads


class OverAllKeys:
    """H2O as :class:`Naive` has it, over a cache that drops nothing.

    Sequences are told apart by their keys so far.
    """

    name: ClassVar[str] = "h2o"
    causal: ClassVar[bool] = False
    phase: ClassVar[str] = "both"

    def __init__(self, policy, skipped=()):
        self.policy, self.skipped, self.known = policy, skipped, {}

    def check(self, layers, heads, kv_heads):
        pass

    def __call__(self, query, key, value, layer):
        (_, groups, keys, _), n = key.shape, query.shape[2]
        if layer.index in self.skipped:
            alone = n == 1 < keys
            return (Causal() if alone else self.policy)(query, key, value, layer)
        rows = []
        for q, k in zip(query.unflatten(1, (groups, -1)), key, strict=True):
            heads = [Naive(self.policy) for _ in k]
            if n < keys:
                heads = copy.deepcopy(self.known[self.sequence(layer, k[:, :-n])])
            for head, own_q, own_k in zip(heads, q, k, strict=True):
                head.call(own_q, own_k)
            self.known[self.sequence(layer, k)] = heads
            rows.append([head.death for head in heads])
        return LifetimeMask(torch.tensor(rows, dtype=torch.int32), n)

    def sequence(self, layer, key):
        return layer.index, key.numpy().tobytes()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "mistral", "gpt_oss"])
def model(request):
    return TINY[request.param]()


def sliding(model):
    if model.config.model_type == "mistral":
        return range(model.config.num_hidden_layers)
    kinds = getattr(model.config, "layer_types", None) or []
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


# the rule


@settings(derandomize=True)  # sums in float32 and float64 rank alike but for near ties
@given(
    width=st.integers(2, 14),
    block=st.integers(1, 9),
    recent=st.sampled_from([0.0, 0.4, 0.5, 1.0]),
    calls=st.lists(st.one_of(st.just(1), st.integers(1, 25)), min_size=1, max_size=12),
    members=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_prompts_chunks_and_decoded_tokens_follow_the_rule(
    width, block, recent, calls, members, seed
):
    draw = torch.Generator().manual_seed(seed)
    policy, n, groups, dim = H2O(width, recent, block), sum(calls), 2, 5
    query = 2 * torch.randn(2, groups * members, n, dim, generator=draw)
    key, value = torch.randn(2, 2, groups, n, dim, generator=draw)
    store, first = HeavyHitterStore(policy), 0
    rules = [[Naive(policy) for _ in range(groups)] for _ in range(2)]
    store.start(2, key, value)
    for length in calls:
        now = slice(first, first + length)
        live = store.extend(query[:, :, now], key[:, :, now], value[:, :, now])
        first += length
        out = attention(query[:, :, now], live.key, live.value, live.mask)
        for b in range(2):
            for g in range(groups):
                own = slice(g * members, (g + 1) * members)
                rule, q = rules[b][g], query[b, own, now]
                reads = rule.call(q, key[b, g])
                for i, read in enumerate(reads):
                    assert len(read) <= width
                    near, values = key[b, g, read].double(), value[b, g, read].double()
                    weights = (q[:, i].double() @ near.T * dim**-0.5).softmax(-1)
                    expected = (weights @ values).float()
                    torch.testing.assert_close(out[b, own, i], expected, rtol=1e-4, atol=1e-5)
                order = store.positions[b, g].argsort()
                assert store.positions[b, g, order].tolist() == rule.held
                received = torch.tensor([rule.received[k] for k in rule.held])
                torch.testing.assert_close(store.received[b, g, order], received)
                assert torch.equal(store.keys[b, g, order], key[b, g, rule.held])
                assert torch.equal(store.values[b, g, order], value[b, g, rule.held])
    assert store.seen == [n, n]


@pytest.mark.parametrize("policy", [SMALL, H2O(width=16, block=5, recent=0.3), H2O(7, 1.0, 9)])
def test_without_a_cache_a_prompt_is_read_by_the_same_rule(policy):
    draw = torch.Generator().manual_seed(2)
    query, key = torch.randn(1, 2, 40, 8, generator=draw), torch.randn(1, 1, 40, 8, generator=draw)
    dense = policy(query, key, key, dynmask.policies.Layer(0)).dense()[0, 0]
    for row, read in zip(dense, Naive(policy).call(query[0], key[0, 0]), strict=True):
        assert row.nonzero().flatten().tolist() == read


# the outputs of the rule over all keys


@pytest.mark.parametrize("chunk", [None, 2, 7])
def test_generation_is_that_of_the_rule_over_all_keys(model, chunk):
    """Rows padded on the left, grouped heads, layers with windows; a prompt cut anywhere."""
    ids, mask = prompt()
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    # what sliding layers choose in a chunk is another choice, by the same policy without state
    with sparsify(model, OverAllKeys(SMALL, sliding(model))):
        expected, logits = generate(
            model, ids, mask, DynamicCache(config=model.config), new=14, **more
        )
    with sparsify(model, SMALL) as run:
        cache = HeavyHitterCache(run)
        tokens, got = generate(model, ids, mask, cache, new=14, **more)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    assert cache.get_seq_length() == 24 + 13


def test_a_prompt_may_be_cut_anywhere():
    model, (ids, mask) = tiny_llama(), prompt()
    with sparsify(model, SMALL) as run:
        expected, logits = generate(model, ids, mask, HeavyHitterCache(run))
        for chunk in (2, 3, 5, 11):
            tokens, got = generate(
                model, ids, mask, HeavyHitterCache(run), prefill_chunk_size=chunk
            )
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(got, logits, **CLOSE)
        with pytest.raises(AssertionError):  # without what each key has received
            _, got = generate(
                model, ids, mask, DynamicCache(config=model.config), prefill_chunk_size=5
            )
            torch.testing.assert_close(got, logits, **CLOSE)
    assert prefill.exact_in_chunks(SMALL, 24, 5) and not prefill.exact_in_chunks(SMALL, 5, 2)
    assert not prefill.exact_in_chunks(SMALL, 24, 1)  # decoded, token by token
    with sparsify(tiny_llama(), SMALL) as run:
        found = []
        for size in (1, 24):
            cache = prefill.cache_for(run, 24)
            for part in ids.split(size, 1):
                run.model(part, past_key_values=cache)
            found.append(cache.layers[0].store.positions)
        assert not torch.equal(*(held.sort(-1)[0] for held in found))
    assert prefill.default_chunk(SMALL, 9000) == prefill.BOUNDED_CHUNK


@torch.no_grad()
def test_without_a_cache_decoded_tokens_read_every_key():
    model, (ids, _) = tiny_llama(), prompt(padding=())
    with sparsify(model, SMALL):
        out = model(ids, use_cache=True)
        ours = model(ids[:, :1], past_key_values=copy.deepcopy(out.past_key_values)).logits
    own = model(ids[:, :1], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(ours, own, **CLOSE)


def test_beam_search_and_sampling():
    model, (ids, mask) = TINY["gemma3"](), prompt()
    for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for policy in (OverAllKeys(SMALL, sliding(model)), SMALL):
            torch.manual_seed(0)
            with sparsify(model, policy) as run:
                cache = HeavyHitterCache(run) if policy is SMALL else None
                given = {} if cache is None else {"past_key_values": cache}
                found.append(
                    model.generate(ids, attention_mask=mask, max_new_tokens=10, **given, **more)
                )
        assert torch.equal(*found)


@torch.no_grad()
def test_a_conversation_goes_on_and_a_copy_is_a_fork():
    model, (ids, mask) = tiny_llama(), prompt()
    more = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(5))
    found = []
    for policy in (OverAllKeys(SMALL), SMALL):
        with sparsify(model, policy) as run:
            cache = HeavyHitterCache(run) if policy is SMALL else DynamicCache(config=model.config)
            first, _ = generate(model, ids, mask, cache)
            longer = torch.cat([ids, first, more], 1)
            wide = torch.cat([mask, torch.ones(3, longer.shape[1] - 24, dtype=mask.dtype)], 1)
            turns = [generate(model, longer, wide, one) for one in (copy.deepcopy(cache), cache)]
        assert torch.equal(turns[0][0], turns[1][0])
        found.append(turns[0])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], **CLOSE)


@torch.no_grad()
def test_rows_may_come_late():
    """A row whose tokens of a call are all padding holds what it held."""
    model, (ids, _) = tiny_llama(), prompt(padding=())
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :] = 0
    with sparsify(model, SMALL) as run:
        cache = HeavyHitterCache(run)
        model(ids, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
        got = model(ids[:, :6], attention_mask=mask, past_key_values=cache).logits
        alone = model(ids[1:2, :6]).logits
        both = model(torch.cat([ids, ids[:, :6]], 1)[[0, 2]]).logits[:, 24:]
        for _ in range(8):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            more = model(ids[:, 6:7], attention_mask=mask, past_key_values=cache).logits
        own = HeavyHitterCache(run)
        model(ids[1:2, :6], past_key_values=own)
        for _ in range(8):
            last = model(ids[1:2, 6:7], past_key_values=own).logits
    torch.testing.assert_close(got[1:2], alone, **CLOSE)
    torch.testing.assert_close(got[[0, 2]], both, **CLOSE)
    torch.testing.assert_close(more[1:2], last, **CLOSE)


@torch.no_grad()
def test_rows_may_be_reordered_repeated_and_chosen_but_not_cropped():
    model, (ids, mask) = tiny_llama(), prompt()
    with sparsify(model, SMALL) as run:
        cache = HeavyHitterCache(run)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        chosen = torch.cat([mask[[0, 2, 1]], torch.ones(3, 4, dtype=mask.dtype)], 1)
        got = model(ids[:, :4], attention_mask=chosen, past_key_values=cache).logits
        for row, old in enumerate([0, 2, 1]):
            one = ids[old, mask[old].bool()]
            expected = model(torch.cat([one, ids[row, :4]])[None]).logits[:, -4:]
            torch.testing.assert_close(got[row : row + 1], expected, **CLOSE)
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"crop: expected no tokens.*copy\.deepcopy.*assisted"):
            cache.crop(-1)
        cache.crop(0)
        wide = torch.cat([chosen, torch.ones(3, 1, dtype=mask.dtype)], 1)
        a, b = (
            model(ids[:, :1], attention_mask=wide, past_key_values=one).logits
            for one in (before, cache)
        )
        assert torch.equal(a, b)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


# what it costs


@torch.no_grad()
def test_memory_is_that_of_the_width():
    model, policy = tiny_llama(max_position_embeddings=4096), H2O(width=48, block=16)
    ids = torch.randint(3, VOCAB, (1, 600), generator=torch.Generator().manual_seed(1))
    with sparsify(model, policy) as run:
        cache = HeavyHitterCache(run)
        for part in ids.split(100, 1):
            model(part, past_key_values=cache)
            assert cache.nbytes <= 2 * 2 * 48 * (2 * 16 * 4 + 4 + 4)
        for i in range(20):
            model(ids[:, i : i + 1], past_key_values=cache)
    # layers, kv heads, keys; key and value, position, sum
    assert cache.nbytes == 2 * 2 * 48 * (2 * 16 * 4 + 4 + 4)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 9])
def test_densities_are_of_the_whole_causal_area(chunk):
    model, (ids, mask) = tiny_llama(), prompt()
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    summaries = []
    for policy in (OverAllKeys(SMALL), SMALL):
        with sparsify(model, policy, measure=True, measure_rows=5) as run:
            bounded = policy is SMALL
            cache = HeavyHitterCache(run) if bounded else DynamicCache(config=model.config)
            generate(model, ids, mask, cache, new=14, **more)
        summaries.append(run.summary())
    for phase in ("prefill", "decode"):
        full, own = (s[phase]["density_per_head"] for s in summaries)
        for a, b in zip(full, own, strict=True):
            assert b == pytest.approx(a, rel=1e-5)
    full, own = (s["prefill"]["kept_mass"] for s in summaries)
    assert (own == pytest.approx(full, rel=1e-4)) == (chunk is None)
    assert summaries[1]["decode"]["kept_mass"] is None  # evicted keys are not known


# where users meet it


def test_what_does_not_fit_is_refused():
    model, other, (ids, mask) = tiny_llama(), tiny_llama(seed=1), prompt()
    with pytest.raises(ValueError, match="the run that sparsify returned"):
        HeavyHitterCache(model)
    with (
        sparsify(model, Streaming()) as run,
        pytest.raises(ValueError, match="the policy h2o, received streaming"),
    ):
        HeavyHitterCache(run)
    with pytest.raises(ValueError, match="received one that was removed"):
        HeavyHitterCache(run)
    with sparsify(model, SMALL) as run, torch.no_grad():
        with pytest.raises(ValueError, match="BoundedCache"):
            dynmask.BoundedCache(run)
        tril = torch.ones(24, 24, dtype=torch.bool).tril().expand(3, 1, -1, -1)
        with pytest.raises(ValueError, match="2-D mask"):
            model(ids, attention_mask=tril, past_key_values=HeavyHitterCache(run))
        cache = HeavyHitterCache(run)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="hides the same tokens as before"):
            model(ids[:, :2], past_key_values=copy.deepcopy(cache))
        with sparsify(other, SMALL), pytest.raises(ValueError, match="of another"):
            other(ids, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="expected the run that it was made for"):
        model(ids[:, :1], past_key_values=cache)
    with sparsify(model, Causal()), pytest.raises(ValueError, match="HeavyHitterLayer"):
        model(ids[:, :1], past_key_values=cache)
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    hybrid = transformers.Qwen3NextForCausalLM(config).eval()
    with sparsify(hybrid, SMALL) as run:
        assert bounded_cache(run) is None
        for make in (needed_cache, lambda run: prefill.cache_for(run, 100)):
            with pytest.raises(ValueError, match="[Hh]ybrid models"):
                make(run)
    for policy in (SMALL, Gated(decode="keep")):  # not after the prompt, nor by another rule
        with sparsify(hybrid, policy) as run:
            ids, silent = torch.ones(1, 9, dtype=torch.long), SimpleNamespace()
            work = Work(hybrid, run, ids, 0, silent, shown=False)
            with pytest.raises(ValueError, match="[Hh]ybrid models"):
                work.run(max_new_tokens=2)


def test_no_row_of_a_prompt_looks_ahead():
    query, key, value = (torch.randn(1, n, 60, 8) for n in (4, 2, 2))
    policy = H2O(width=16, block=4)
    whole = policy(query, key, value, Layer(0)).dense()
    part = policy(query[:, :, :41], key[:, :, :41], value[:, :, :41], Layer(0)).dense()
    assert torch.equal(whole[..., :41, :41], part) and not whole.all()
    assert not looks_ahead(policy) and looks_ahead(VerticalSlash()) and not looks_ahead(None)


def test_evaluations_decode_by_it():
    model, (ids, _) = tiny_llama(), prompt(batch=1, padding=())
    with attend(model, SMALL, measure=True) as run:
        for make in (bounded_cache, needed_cache, lambda run: prefill.cache_for(run, 24)):
            assert isinstance(make(run), HeavyHitterCache)
        done = greedy(model, ids, 6, cache=needed_cache(run))
        density = run.summary()["decode"]["density"]
    assert done.cache_bytes == 2 * 2 * 10 * (2 * 16 * 4 + 4 + 4)
    assert density == pytest.approx(sum(10 / n for n in range(25, 30)) / 5, abs=0.01)


def test_generate_and_evaluate_on_the_command_line(tmp_path, capsys):
    model = str(save_stand_in(tmp_path / "model"))
    policy = "h2o:width=32,block=8"
    asked = ["generate", "--model", model, "--prompt", "a b c " * 40, "--max-new-tokens", "8"]
    texts = []
    for chunk in ("0", "50"):
        assert cli.main([*asked, "--policy", policy, "--json", "--chunk", chunk]) == 0
        result = json.loads(capsys.readouterr().out)
        texts.append(result["text"])
        assert result["memory"]["cache_bytes"] == 2 * 2 * 32 * (2 * 16 * 4 + 4 + 4)
        most = 32 / result["prompt_tokens"]
        assert 0 < result["density_decode"] < most
    assert texts[0] == texts[1]
    asked = ["evaluate", "--model", model, "--task", "lines", "--length", "300", "--n", "1"]
    asked += ["--timing-items", "1", "--quiet", "--no-plots", "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--policy", policy]) == 0
    row = json.loads((tmp_path / "out" / "lines.json").read_text())["rows"][0]
    assert row["density_decode"] < 32 / 250
    assert row["cache_bytes"] == 2 * 2 * 32 * (2 * 16 * 4 + 4 + 4)


def test_public_name():
    assert dynmask.HeavyHitterCache is HeavyHitterCache
