"""The vLLM plugin without vLLM: paged keys are read as keys that lie together would be."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynmask import policies
from dynmask.fingerprints import fingerprint
from dynmask.integrations.asking import ask, compute
from dynmask.integrations.vllm import checks
from dynmask.integrations.vllm import layer as paged_layer
from dynmask.integrations.vllm.batch import Batch, Request
from dynmask.integrations.vllm.layer import PagedLayer, decodes_whole, reads_all, whole_up_to
from dynmask.integrations.vllm.pages import Pages, Scores
from dynmask.integrations.vllm.settings import Settings
from dynmask.policies import Gated, Layer, SnapKV, Streaming
from dynmask.policies.gates import Gates
from tests.policies import POLICIES, score_modules

PAGES, SIZE, HEADS, GROUPS, DIM = 40, 16, 4, 2, 8

# physical order of a cache's logical dimensions [page, kv head, position, number]
LAYOUTS = {
    "head-major": (0, 1, 2, 3),
    "position-major": (0, 2, 1, 3),
    "kv-head-first": (1, 0, 2, 3),
}

# tokens that each request has seen before this step, and new ones: a prompt, a decoded token, a
# chunk, a decoded token right after a page's end, a first token
REQUESTS = ((0, 50), (70, 1), (33, 40), (SIZE * 5, 1), (0, 1))

STATELESS = sorted(POLICIES.keys() - {"snapkv"})


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def empty_cache(layout="head-major"):
    """A cache full of NaN in a physical order, with other layers' memory between its pages."""
    order = LAYOUTS[layout]
    sizes = [(PAGES, GROUPS, SIZE, 2 * DIM)[i] for i in order]
    wide = torch.full((sizes[0], 2, *sizes[1:]), float("nan"))[:, 1]  # every second layer's
    back = [order.index(i) for i in range(4)]
    return wide.permute(back)


class Step:
    """Queries, keys and values of some requests, the keys in pages and lying together."""

    def __init__(self, layout="head-major", requests=REQUESTS, dtype=torch.float32, heads=HEADS):
        g = draw()
        lengths = [before + new for before, new in requests]
        order = torch.randperm(PAGES - 1, generator=g) + 1  # page 0 is vLLM's own
        need = [-(-n // SIZE) for n in lengths]
        table = torch.zeros(len(requests), max(need) + 2, dtype=torch.int32)
        for row, pages in enumerate(order[: sum(need)].split(need)):
            table[row, : len(pages)] = pages.int()
        starts = [0]
        for _, new in requests:
            starts.append(starts[-1] + new)
        self.batch = Batch(starts, lengths, table)
        self.keys = [torch.randn(1, GROUPS, n, DIM, generator=g).to(dtype) for n in lengths]
        self.values = [torch.randn(1, GROUPS, n, DIM, generator=g).to(dtype) for n in lengths]
        self.query = torch.randn(starts[-1], heads, DIM, generator=g).to(dtype)
        self.cache = empty_cache(layout).to(dtype)
        pages = Pages(self.cache)
        for row, n in enumerate(lengths):
            place = torch.arange(n)
            slots = table[row, place // SIZE].long() * SIZE + place % SIZE
            k, v = (x[row][0].transpose(0, 1) for x in (self.keys, self.values))
            pages.write(torch.cat([slots, torch.tensor([-1])]), *(self._padded(x) for x in (k, v)))

    @staticmethod
    def _padded(x):
        return torch.cat([x, torch.full_like(x[:1], float("nan"))])

    def new(self, whole):
        """The step's own keys or values [tokens, g, d], as vLLM hands them over."""
        parts = [
            x[0, :, r.before :].transpose(0, 1) for x, r in zip(whole, self.batch, strict=True)
        ]
        return torch.cat(parts)

    def paged(self, policy, window=None, s_aux=None, impl="auto", index=0, phase="both"):
        """Attention of the step by the plugin's layer."""
        own = PagedLayer(
            policy, index, self.query.shape[1], GROUPS, DIM, DIM**-0.5, window, s_aux, impl,
            phase=phase,
        )  # fmt: skip
        self._score_the_past(own)
        out = torch.full_like(self.query, float("nan"))
        rest = self.query, self.new(self.keys), self.new(self.values), out
        own.attend(self.cache, self.batch, *rest)
        return out

    def _score_the_past(self, own):
        """What earlier steps have left: scores of the keys before this one."""
        past = [(row, r.before) for row, r in enumerate(self.batch) if r.before]
        for row, n in past:
            earlier = Batch([0, n], [n], self.batch.table[row : row + 1])
            own.note_scores(Pages(self.cache), earlier)

    def together(self, policy, window=None, s_aux=None, impl="auto", index=0):
        """The same by what the transformers adapter calls, each sequence alone."""
        out = torch.empty_like(self.query)
        for r, k, v in zip(self.batch, self.keys, self.values, strict=True):
            first = 0 if window is None else max(r.before - window + 1, 0)
            q = self.query[r.start : r.stop].transpose(0, 1)[None]
            k, v = k[:, :, first:], v[:, :, first:]
            mask, bias = ask(policy, Layer(index, first), r.phase, q, k, v, window, {})
            found = compute(q, k, v, mask, bias, DIM**-0.5, s_aux, impl)
            out[r.start : r.stop] = found[0].transpose(0, 1)
        return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STATELESS)
def test_pages_are_read_as_keys_that_lie_together(name, layout):
    step = Step(layout)
    torch.testing.assert_close(step.paged(POLICIES[name]), step.together(POLICIES[name]))


@pytest.mark.parametrize("name", ["full", "streaming", "gated", "retained", "pooled"])
@pytest.mark.parametrize("window", [20, 1000])
def test_windows_and_sinks_of_the_model_are_honoured(name, window):
    step, s_aux = Step(), torch.randn(HEADS, generator=draw(3))
    own = POLICIES[name], window, s_aux
    torch.testing.assert_close(step.paged(*own), step.together(*own))


@pytest.mark.parametrize(
    "policy",
    [
        Gated(columns=0, blocks=2, block=8, window=9, decode="select"),
        Gated(columns=6, window=5, last=7, soft=True, decode="select"),
        Gated(columns=6, window=5, dense_up_to=75, decode="select"),
        Gated(columns=6, window=5, last=7),
    ],
)
def test_blocks_soft_columns_and_dense_inputs(policy):
    step = Step("position-major")
    torch.testing.assert_close(step.paged(policy), step.together(policy))


def gated_by_score(**over):
    """Maps that keep by score beside one that chooses columns, in the first of two layers."""
    window, kept = torch.tensor([[5, 5, 4, 9]] * 2).int(), torch.tensor([[6, 6, 0, 3], [0] * 4])
    columns = torch.tensor([[0, 0, 5, 0]] * 2).int()
    gates = Gates(window, columns, torch.zeros(2, 4), kept=kept.int())
    given = {"sinks": 2, "last": 7, "scores": (score_modules()[0], None), "decode": "select"}
    return Gated(gates=gates, **(given | over))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decode", ["select", "full"])
def test_gates_that_keep_by_score_read_scores_from_pages(layout, decode):
    step, policy = Step(layout), gated_by_score(decode=decode)
    torch.testing.assert_close(step.paged(policy), step.together(policy))
    own = PagedLayer(policy, 0, HEADS, GROUPS, DIM, DIM**-0.5)
    step._score_the_past(own)
    pages = Pages(step.cache)
    own.note_scores(pages, step.batch)
    for r, k, v in zip(step.batch, step.keys, step.values, strict=True):  # each key's, once
        found = own._scores.read(step.batch.table[r.number], r.keys)
        torch.testing.assert_close(found, policy.score(k, v, Layer(0)), rtol=0, atol=1.1e-3)
    with pytest.raises(ValueError, match="no maps that keep by score in layer 0"):
        step.paged(policy, window=20)
    assert checks.by_learned_scores(policy) and checks.reads_keys(policy)
    assert not decodes_whole(policy, "prefill") and decodes_whole(Gated(), "prefill")


def test_gates_that_keep_by_score_have_keys_turned_back():
    """Of the step's keys alone, from the position of the first on."""
    step, policy, asked = Step(requests=((40, 20), (30, 1))), gated_by_score(), []

    def unrotate(first):
        asked.append(first)
        return lambda key: key + 1

    own = PagedLayer(policy, 0, HEADS, GROUPS, DIM, DIM**-0.5, unrotate=unrotate)
    step._score_the_past(own)
    own.note_scores(Pages(step.cache), step.batch)
    assert asked == [0, 0, 40, 30]
    out = torch.empty_like(step.query)
    own.attend(step.cache, step.batch, step.query, None, None, out)
    for r, k, v in zip(step.batch, step.keys, step.values, strict=True):
        scores = policy.score(k + 1, v, Layer(0))
        found = own._scores.read(step.batch.table[r.number], r.keys)
        torch.testing.assert_close(found, scores, rtol=0, atol=1.1e-3)
        q = step.query[r.start : r.stop].transpose(0, 1)[None]
        mask, _ = policy.biased(q, k, v, Layer(0, scores=scores))  # by these, not by rotated keys
        expected = compute(q, k, v, mask, None, DIM**-0.5, None, "auto")[0].transpose(0, 1)
        torch.testing.assert_close(out[r.start : r.stop], expected)


@pytest.mark.parametrize("policy", ["streaming", "gated", "retained"])
def test_the_decoding_kernel_reads_pages_as_they_lie(policy):
    pytest.importorskip("triton")
    step = Step("position-major", ((70, 1), (SIZE * 5, 1), (20, 1)))
    found = step.paged(POLICIES[policy], impl="triton")
    torch.testing.assert_close(found, step.together(POLICIES[policy]))


def test_decoded_tokens_gather_no_keys_where_nobody_looks(monkeypatch):
    step = Step(requests=((70, 1), (40, 1)))
    expected = step.together(Streaming(3, 9))
    monkeypatch.setattr(Pages, "gather", None)
    torch.testing.assert_close(step.paged(Streaming(3, 9)), expected)


def test_all_layers_share_the_lists_of_a_step(monkeypatch):
    step = Step(requests=((70, 1), (40, 1)))
    first = step.paged(Streaming(3, 9))
    monkeypatch.setattr(paged_layer, "paged", None)
    assert torch.equal(step.paged(Streaming(3, 9)), first)


@pytest.mark.parametrize("policy", [Streaming(2, 30), policies.Causal()])
def test_layers_of_one_step_may_have_windows_of_their_own(policy):
    step = Step(requests=((0, 50), (70, 1)))
    for window in (10, 25, None):  # the second finds what the first has left
        expected = step.together(policy, window)
        torch.testing.assert_close(step.paged(policy, window), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_choose_for_themselves_share_none():
    step = Step(requests=((70, 1), (40, 1)))
    for index in (0, 1):
        found = step.paged(POLICIES["retained"], index=index)
        torch.testing.assert_close(found, step.together(POLICIES["retained"], index=index))


def test_a_first_token_is_a_prompt_and_padding_is_no_request():
    batch = Batch([0, 1, 2, 9, 9], [1, 5, 7, 3], torch.zeros(4, 1))
    assert [r.phase for r in batch] == ["prefill", "decode", "prefill"]
    assert [r.before for r in batch] == [0, 4, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_are_rows_of_the_flat_views(layout):
    step = Step(layout)
    pages = Pages.of(step.cache, GROUPS, DIM)
    for r, key, value in zip(step.batch, step.keys, step.values, strict=True):
        table = step.batch.table[r.number]
        for first, stop in ((0, r.keys), (r.keys - 1, r.keys), (r.keys // 2, r.keys)):
            slots = pages.slots(table, first, stop).long()
            gathered = pages.gather(table, first, stop)
            for own, flat, x in zip(gathered, pages.flat(), (key, value), strict=True):
                assert torch.equal(own, x[:, :, first:stop])
                assert torch.equal(flat[:, :, slots], x[:, :, first:stop])


def test_pages_that_are_no_whole_number_of_positions_apart_are_gathered():
    step = Step()
    wide = torch.full((PAGES, GROUPS * SIZE * 2 * DIM + 3), float("nan"))
    odd = wide[:, :-3].unflatten(1, (GROUPS, SIZE, 2 * DIM))
    odd.copy_(step.cache)
    step.cache = odd
    assert Pages(odd).step is None
    torch.testing.assert_close(step.paged(POLICIES["gated"]), step.together(POLICIES["gated"]))


def test_scores_come_along_with_pages_of_a_shared_prefix():
    policy, step = POLICIES["retained"], Step(requests=((0, 48), (32, 30)))
    step.batch.table[1, :2] = step.batch.table[0, :2]  # two pages that the first request wrote
    for whole in (step.keys, step.values):
        whole[1][:, :, :32] = whole[0][:, :, :32]
    pages = Pages(step.cache)
    for r, k, v in zip(step.batch, step.keys, step.values, strict=True):
        place = torch.arange(r.keys)
        slots = step.batch.table[r.number, place // SIZE].long() * SIZE + place % SIZE
        pages.write(slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
    own = PagedLayer(policy, 0, HEADS, GROUPS, DIM, DIM**-0.5)
    out = torch.empty_like(step.query)
    own.attend(step.cache, step.batch, step.query, None, None, out)
    torch.testing.assert_close(out, step.together(policy))


def test_scores_lie_where_their_pages_say():
    cache = empty_cache()
    scores, table = Scores(Pages(cache)), torch.tensor([7, 3, 9], dtype=torch.int32)
    x = torch.randn(1, GROUPS, 40, generator=draw())
    scores.write(table, 0, x[..., :20])
    scores.write(table, 20, x[..., 20:])
    assert torch.equal(scores.read(table, 40), x)
    other = torch.tensor([7, 30], dtype=torch.int32)
    assert torch.equal(scores.read(other, 16), x[..., :16])
    assert scores.nbytes * 2 * DIM == cache.numel() * 4


def test_padding_is_written_nowhere():
    cache = torch.zeros(PAGES, GROUPS, SIZE, 2 * DIM)
    rows = torch.ones(3, GROUPS, DIM)
    Pages(cache).write(torch.tensor([-1, 5, -1]), rows, rows)
    assert cache.sum() == cache[0, :, 5].sum() == GROUPS * 2 * DIM


@pytest.mark.parametrize(
    "shape",
    [
        (2, PAGES, SIZE, GROUPS, DIM),
        (PAGES, SIZE, GROUPS, 2 * DIM),
        (PAGES, GROUPS, SIZE, DIM),
    ],
)
def test_layouts_that_are_not_known_are_refused(shape):
    with pytest.raises(ValueError, match="vLLM's cache: expected"):
        Pages.of(torch.zeros(shape), GROUPS, DIM)


@pytest.mark.parametrize(
    "policy, keys, known",
    [
        (policies.Causal(), 10**6, True),
        (Streaming(4, 60), 64, True),
        (Streaming(4, 60), 65, False),
        (Gated(dense_up_to=2048, window=8), 2048, True),
        (Gated(dense_up_to=2048, window=8), 2049, False),
        (Gated(window=100, dense_up_to=0), 100, True),
        (POLICIES["retained"], 13, True),
        (POLICIES["retained"], 14, False),
    ],
)
def test_what_is_read_whole_is_known_before_anybody_is_asked(policy, keys, known):
    request = Request(0, 0, keys, keys)
    assert reads_all(policy, request, whole_up_to(policy, 0, HEADS)) == known
    if known and keys < 10**4:
        q, k = torch.randn(1, HEADS, keys, DIM), torch.randn(1, GROUPS, keys, DIM)
        mask, _ = ask(policy, Layer(0), "prefill", q, k, k, None, {})
        assert bool(mask.dense().eq(torch.ones(keys, keys).tril().bool()).all())


def test_prefill_policies_read_whole_while_decoding():
    decoded = Request(0, 0, 1, 10**6)
    assert POLICIES["h2o"].phase == "prefill"
    for policy in (POLICIES["h2o"], Gated(window=8)):
        assert reads_all(policy, decoded, whole_up_to(policy, 0, HEADS))
        assert decodes_whole(policy, "both")
    chunk = Request(0, 0, 500, 10**3)
    assert not reads_all(POLICIES["pooled"], chunk, whole_up_to(POLICIES["pooled"], 0, HEADS))


def test_any_policy_may_be_for_prompts_alone():
    decoded, chunk = Request(0, 0, 1, 10**6), Request(0, 0, 500, 10**6)
    assert reads_all(POLICIES["gated"], decoded, 0, "prefill")
    assert not reads_all(POLICIES["gated"], decoded, 0, "both")
    assert not reads_all(POLICIES["gated"], chunk, 0, "prefill")


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", ["full", "streaming", "gated", "retained", "pooled", "quest"])
def test_decoded_tokens_read_every_key_where_a_policy_is_for_prompts_alone(name, window):
    step = Step()
    found = step.paged(POLICIES[name], window, phase="prefill")
    asked, every = (step.together(p, window) for p in (POLICIES[name], policies.Causal()))
    for request in step.batch:
        rows = slice(request.start, request.stop)
        expected = every if request.phase == "decode" else asked
        torch.testing.assert_close(found[rows], expected[rows])


def test_nothing_is_gathered_for_decoded_tokens_that_read_every_key(monkeypatch):
    step = Step(requests=((70, 1), (SIZE * 5, 1)))
    expected = step.together(policies.Causal())
    monkeypatch.setattr(Pages, "gather", None)
    for policy in (POLICIES["gated"], POLICIES["quest"]):
        torch.testing.assert_close(step.paged(policy, phase="prefill"), expected)
    torch.testing.assert_close(step.paged(POLICIES["h2o"]), expected)


@pytest.mark.parametrize(
    "name, phase, whole",
    [
        ("full", "both", True),
        ("gated", "both", False),
        ("gated", "prefill", True),
        ("h2o", "both", True),
        ("streaming", "both", False),
        ("retained", "prefill", False),  # scores of decoded tokens are kept beside the cache
    ],
)
def test_which_steps_of_decoded_tokens_are_plain_attention(name, phase, whole):
    assert decodes_whole(POLICIES[name], phase) == whole


def test_layers_of_one_step_that_read_otherwise_are_told_apart():
    batch = Batch([0, 50], [50], torch.zeros(1, 8, dtype=torch.int32))
    for window, known in ((100, True), (8, False), (100, True)):
        own = PagedLayer(Gated(window=window), 0, HEADS, GROUPS, DIM, 1.0)
        assert own.reads_all(batch) is known


# what is asked for


def test_settings_of_the_environment_and_of_the_configuration():
    environment = {"DYNMASK_POLICY": "streaming", "DYNMASK_IMPL": "cpu"}
    assert Settings.of(None, environment) == Settings("streaming", "cpu")
    given = {"dynmask": {"policy": "gated:window=8"}}
    assert Settings.of(given, environment) == Settings("gated:window=8")
    given["dynmask"]["phase"] = "prefill"
    assert Settings.of(given, environment) == Settings("gated:window=8", phase="prefill")
    assert Settings.of(None, environment | {"DYNMASK_PHASE": "prefill"}).phase == "prefill"
    assert Settings.of({"other": 1}, {}) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dynmask": {"card": "a", "policy": "b"}}, "a card or a policy"),
        ({"dynmask": {"crad": "a"}}, "texts named card, policy, impl"),
        ({"dynmask": "a"}, "texts named"),
        ({"dynmask": {"policy": 3}}, "texts named"),
        ({"dynmask": {"policy": "streaming", "impl": "gpu"}}, "one of auto"),
        ({"dynmask": {"policy": "streaming", "phase": "decode"}}, "one of both, prefill"),
        ({"dynmask": {"phase": "prefill"}}, "a card or a policy beside the rest"),
    ],
)
def test_settings_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(given, {"DYNMASK_POLICY": "streaming"})


@pytest.mark.parametrize("name", ["DYNMASK_PHASE", "DYNMASK_IMPL"])
def test_a_wrong_variable_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: expected one of"):
        Settings.of(None, {"DYNMASK_POLICY": "streaming", name: "decode"})


def test_a_hostile_card_is_refused_when_it_is_named(tmp_path):
    (tmp_path / "mask_card.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="card"):
        Settings.of(None, {"DYNMASK_CARD": str(tmp_path)})


# what is refused


def config(**over):
    own = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SimpleNamespace(model_type="llama", **own | over)


def engine(**over):
    own = {
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
    }
    return SimpleNamespace(**own | over)


@pytest.mark.parametrize(
    "policy, message",
    [
        (Gated(decode="keep"), "'full' or 'select' under vLLM"),
        (SnapKV(), "several sequences at a time"),
        (Streaming, "one of dynmask.policies"),
    ],
)
def test_policies_that_need_another_engine(policy, message):
    with pytest.raises(ValueError, match=message):
        checks.check_policy(policy, config())


def test_a_card_of_another_model_is_refused_by_its_shape():
    own = {"architecture": "llama", "layers": 2, "heads": 4, "kv_heads": 2}
    checks.check_policy(Streaming(), config(), own)
    for name, value in (("architecture", "qwen3"), ("layers", 3), ("heads", 8), ("kv_heads", 4)):
        with pytest.raises(ValueError, match=f"calibrated on .{name} {value}"):
            checks.check_policy(Streaming(), config(), own | {name: value})


@pytest.mark.parametrize(
    "over, message",
    [
        ({"speculative_config": object()}, "no speculative decoding"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "kv-cache-dtype"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2)},
            "decode_context_parallel_size 1",
        ),
        ({"kv_transfer_config": object()}, "no transfer of cache pages"),
    ],
)
def test_engines_that_a_policy_does_not_understand(over, message):
    checks.check_engine(engine(), POLICIES["retained"])
    with pytest.raises(ValueError, match=message):
        checks.check_engine(engine(**over), POLICIES["retained"])


@pytest.mark.parametrize(
    "given, message",
    [
        (("encoder_only", None, None, None, False), "that of a decoder"),
        (("decoder", [0.5], None, None, False), "without a bias of distance"),
        (("decoder", None, 30.0, None, False), "no soft cap"),
        (("decoder", None, None, "layers.0", True), "a cache of the layer's own"),
    ],
)
def test_layers_with_another_attention(given, message):
    checks.check_layer("decoder", None, 0, "layers.0", False)
    with pytest.raises(ValueError, match=message):
        checks.check_layer(*given)


def test_ranks_must_share_the_kv_heads():
    assert checks.shard(Streaming(), 1, 2, 4) == Streaming()
    with pytest.raises(ValueError, match="divides 2 kv heads"):
        checks.shard(Streaming(), 0, 4, 2)


@pytest.mark.parametrize(
    "name, index",
    [("model.layers.3.self_attn.attn", 3), ("language_model.model.layers.17.self_attn.attn", 17)],
)
def test_the_number_of_a_layer(name, index):
    assert checks.layer_index(name) == index


@pytest.mark.parametrize("name", ["model.self_attn", "blocks.1.layers.2.attn"])
def test_a_name_without_one_number_is_refused(name):
    with pytest.raises(ValueError, match="a name with one number"):
        checks.layer_index(name)


def test_chunks_are_worth_a_word_where_they_change_a_choice():
    assert checks.note_on_chunks(Streaming(), True, True) is None
    assert checks.note_on_chunks(Gated(), False, False) is None
    said = checks.note_on_chunks(Gated(), True, False)
    assert "--no-enable-chunked-prefill" in said and "prefix-caching" not in said


# files


def test_the_files_of_a_model_tell_its_fingerprint(tmp_path):
    pytest.importorskip("transformers")
    from dynmask.integrations.checkpoint import checkpoint_folder, fingerprint_of_files
    from tests.tiny import tiny_llama

    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "one")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="100KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    for name in ("one", "half"):
        assert fingerprint_of_files(tmp_path / name) == fingerprint(model)
    other = tiny_llama(tie_word_embeddings=True, seed=1)
    other.save_pretrained(tmp_path / "other")
    assert fingerprint_of_files(tmp_path / "other") != fingerprint(model)
    next((tmp_path / "half").glob("*.safetensors")).unlink()
    assert fingerprint_of_files(tmp_path / "half") is None
    assert checkpoint_folder(str(tmp_path / "one")) == tmp_path / "one"


def test_the_scores_of_a_converted_model_come_from_its_files(tmp_path):
    pytest.importorskip("transformers")
    import dynmask
    from dynmask.integrations.vllm.converted import OwnScores
    from tests.tiny import WINDOW, tiny_gemma3

    model = dynmask.convert(tiny_gemma3(), width=20, window=8)  # every second layer slides
    for layer in model.model.layers[1::2]:
        torch.nn.init.normal_(layer.self_attn.dynmask_score.A, generator=draw())
    model.save_pretrained(tmp_path)
    policy = OwnScores.of_folder(tmp_path, 2, 16)
    checks.check_policy(policy, config(num_hidden_layers=4))
    value = torch.randn(1, 2, 30, 16, generator=draw())
    score = model.model.layers[3].self_attn.dynmask_score
    found = policy.scores(value, value, Layer(3))
    torch.testing.assert_close(found, score(None, value).detach())
    assert torch.equal(policy.bias(found, Layer(3)), score.bias(found))
    assert policy.retention(3) == score.retention
    query = torch.randn(1, 4, 30, 16, generator=draw())
    mask, bias = ask(policy, Layer(2), "prefill", query, value, value, WINDOW, {})
    assert bias is None and bool(mask.dense().sum(-1).max() == WINDOW)
    assert checks.by_learned_scores(policy) and not checks.reads_keys(policy)
    with pytest.raises(ValueError, match="values of all kv heads"):
        checks.shard(policy, 0, 2, 2)
    with pytest.raises(ValueError, match="scores of 2 kv heads, head dim 8"):
        OwnScores.of_folder(tmp_path, 2, 8)


def test_the_plugin_is_an_entry_point_and_imports_nothing_of_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import dynmask.integrations.vllm as plugin\n"
        "import dynmask.integrations.vllm.layer, dynmask.integrations.vllm.checks\n"
        "import dynmask.integrations.vllm.converted\n"
        "assert callable(plugin.register)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = points["dynmask"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
