"""The transformers adapter: equal to the built-in attention, exact per sequence, traceless."""

import contextlib
import copy
import gc
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from dynmask.integrations.calls import check_asked, note_asked  # noqa: E402
from dynmask.integrations.convert import convert  # noqa: E402
from dynmask.integrations.placement import Placement, linear_mask  # noqa: E402
from dynmask.integrations.tally import sampled_rows  # noqa: E402
from dynmask.integrations.transformers import sparsify  # noqa: E402
from dynmask.masks import LifetimeMask, Span, StructuralMask  # noqa: E402
from dynmask.policies import Causal, Gated, Pooled, Streaming  # noqa: E402
from tests.tiny import TINY, VOCAB, WINDOW, tiny_gemma3, tiny_llama, tiny_mistral  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 7},
    "static chunked": {"cache_implementation": "static", "prefill_chunk_size": 7},
}
STREAMING = Streaming(sinks=2, window=5)


@dataclass(frozen=True)
class Columns:
    """Positions 0, 3 and 8, offsets 0 to 2, and all of the first 4 rows: wants true positions."""

    name: ClassVar[str] = "columns"
    causal: ClassVar[bool] = True
    phase: ClassVar[str] = "both"

    def check(self, layers, heads, kv_heads):
        pass

    def __call__(self, query, key, value, layer):
        heads = query.shape[1]
        return StructuralMask(
            diagonals=torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, heads, -1),
            verticals=torch.tensor([0, 3, 8], dtype=torch.int32).expand(1, heads, -1),
            keys=key.shape[2],
            queries=query.shape[2],
            true_mask=torch.ones(4, 4, dtype=torch.bool).tril().expand(heads, -1, -1),
            first_key=layer.first_key,
        )


@dataclass(frozen=True)
class FirstOnly:
    """Only asked for prompts; every query reads itself and its sequence's first key."""

    asked: list
    name: ClassVar[str] = "first only"
    causal: ClassVar[bool] = True
    phase: ClassVar[str] = "prefill"

    def check(self, layers, heads, kv_heads):
        pass

    def __call__(self, query, key, value, layer):
        self.asked.append((layer.index, query.shape[2], key.shape[2]))
        return LifetimeMask.streaming(key.shape[2], 1, 1, query.shape[2], layer.first_key)


def prompt(batch=3, length=20, padding=(6, 1, 0), seed=0):
    """Token ids and a left-padded attention mask."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch]):
        mask[row, :pad] = 0
    return ids * mask, mask


def generate(model, ids, mask, new=6, **kwargs):
    """New tokens [b, new] and their logits [new, b, vocabulary], greedy."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


@pytest.fixture(scope="module", params=TINY)
def model(request):
    return TINY[request.param]()


def visible(length, window=None, sinks=STREAMING.sinks, recent=STREAMING.window):
    """Dense streaming mask [length, length], within a model's window if it has one."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    mask = (k <= q) & ((k < sinks) | (q - k < recent))
    return mask if window is None else mask & (q - k < window)


def dense_logits(model, ids, **kinds):
    """Logits of the built-in attention under explicit masks, one for each kind of layer."""
    masks = {}
    for kind, mask in kinds.items():
        mask = mask[None, None]
        if model.config._attn_implementation == "eager":
            low = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape).masked_fill(~mask, low)
        masks[kind] = mask.expand(len(ids), -1, -1, -1)
    hybrid = model.config.model_type in ("gemma3_text", "gpt_oss", "qwen3")
    return model(ids, attention_mask=masks if hybrid else masks["full_attention"]).logits


def streaming_logits(model, ids):
    """Reference for STREAMING: masks written down, each layer within its own window."""
    full, sliding = visible(ids.shape[1]), visible(ids.shape[1], WINDOW)
    if model.config.model_type == "mistral":
        full = sliding
    kinds = {"full_attention": full, "sliding_attention": sliding}
    return dense_logits(model, ids, **kinds)


# the causal policy is the built-in attention


@torch.no_grad()
def test_causal_prefill_equals_builtin(model):
    ids, mask = prompt()
    expected = model(ids, attention_mask=mask).logits
    bare = model(ids).logits
    with sparsify(model, Causal()):
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], **CLOSE
        )
        torch.testing.assert_close(model(ids).logits, bare, **CLOSE)


@pytest.mark.parametrize("cache", CACHES)
def test_causal_generation_equals_builtin(model, cache):
    ids, mask = prompt()
    expected, logits = generate(model, ids, mask, **CACHES[cache])
    with sparsify(model, Causal()):
        tokens, sparse = generate(model, ids, mask, **CACHES[cache])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(sparse, logits, **CLOSE)


def test_causal_beam_search_equals_builtin():
    model = tiny_mistral()
    ids, mask = prompt()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3)
    with sparsify(model, Causal()):
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3), expected
        )


@torch.no_grad()
def test_bfloat16():
    model = tiny_llama().to(torch.bfloat16)
    ids, mask = prompt()
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    with sparsify(model, Causal()):
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected.float()).abs().mean()
    assert error < 0.02 * expected.float().abs().mean()


def test_compiled_forward_equals_eager():
    model = tiny_llama(layers=1)
    ids, mask = prompt()
    with sparsify(model, STREAMING), torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, expected, **CLOSE)
    torch.compiler.reset()


# sparse policies: every sequence as if it were alone


@torch.no_grad()
def test_streaming_equals_dense_masks_within_sliding_windows(model):
    ids, _ = prompt(padding=())
    expected = streaming_logits(model, ids)
    causal = model(ids).logits
    with sparsify(model, STREAMING):
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not torch.allclose(logits, causal, **CLOSE)


POLICIES = {"streaming": STREAMING, "columns": Columns(), "pooled": Pooled(block=4, top_p=0.6)}


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_padded_batch_equals_each_sequence_alone(model, policy):
    ids, mask = prompt()
    with sparsify(model, POLICIES[policy]):
        together = model(ids, attention_mask=mask).logits
        right = model(ids.flip(-1), attention_mask=mask.flip(-1)).logits
        for row, pad in enumerate((6, 1, 0)):
            alone = model(ids[row : row + 1, pad:]).logits[0]
            torch.testing.assert_close(together[row, pad:], alone, **CLOSE)
            alone = model(ids[row : row + 1, pad:].flip(-1)).logits[0]
            torch.testing.assert_close(right[row, : 20 - pad], alone, **CLOSE)


@pytest.mark.parametrize(
    ("policy", "cache"), [("streaming", "static chunked"), ("columns", "dynamic")]
)
def test_padded_generation_equals_each_sequence_alone(model, policy, cache):
    ids, mask = prompt()
    with sparsify(model, POLICIES[policy]):
        tokens, logits = generate(model, ids, mask, **CACHES[cache])
        for row, pad in enumerate((6, 1, 0)):
            one = slice(row, row + 1)
            alone, own = generate(model, ids[one, pad:], None, use_cache=False)
            assert torch.equal(tokens[one], alone)
            torch.testing.assert_close(logits[:, one], own, **CLOSE)


@torch.no_grad()
def in_pieces(model, ids, mask, cuts, cache):
    """Logits of a forward in pieces, the cache carried along."""
    parts, done = [], 0
    for stop in (*sorted(set(cuts)), ids.shape[1]):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, done:stop], attention_mask=seen, past_key_values=cache)
        parts.append(out.logits)
        done = stop
    return torch.cat(parts, 1)


CAUSAL_MODELS = {name: TINY[name]() for name in ("gemma3", "gpt_oss")}


@pytest.mark.parametrize("name", CAUSAL_MODELS)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 19)),
    static=st.booleans(),
    columns=st.booleans(),
    padded=st.booleans(),
)
def test_prefill_is_chunked_prefill_is_decode(name, cuts, static, columns, padded):
    model = CAUSAL_MODELS[name]
    ids, mask = prompt() if padded else (prompt()[0], None)
    with sparsify(model, Columns() if columns else STREAMING), torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache = (
            StaticCache(config=model.config, max_cache_len=24)
            if static
            else DynamicCache(config=model.config)
        )
        pieces = in_pieces(model, ids, mask, cuts, cache)
    tokens = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(pieces[tokens], whole[tokens], **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_packed_equals_separate(model, policy, monkeypatch):
    # never by way of a mask of queries x keys
    monkeypatch.setattr(Placement, "from_bool", None)
    ids, _ = prompt(batch=2, padding=())
    lengths = [(9, 1, 10), (4, 12, 4)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with sparsify(model, POLICIES[policy]):
        if model.config.model_type == "gpt_oss":  # its modeling code does not look for packed rows
            with pytest.raises(ValueError, match="one sequence in each row"):
                model(ids, position_ids=positions, use_cache=False)
            return
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for row, parts in enumerate(lengths):
            start = 0
            for n in parts:
                alone = model(ids[row : row + 1, start : start + n]).logits[0]
                torch.testing.assert_close(packed[row, start : start + n], alone, **CLOSE)
                start += n


SEVERAL = torch.cat([torch.arange(8), torch.arange(12)])[None]


def packable(converted, stack, config_type="llama"):
    """A tiny model under a policy that reads few keys."""
    model = TINY[config_type]()
    if converted:
        return convert(model, width=8, window=2, sinks=1).eval()
    stack.enter_context(sparsify(model, STREAMING))
    return model


@pytest.mark.parametrize("converted", [False, True])
@torch.no_grad()
def test_packed_rows_are_refused_where_transformers_reads_across_them(converted):
    ids, mask = prompt(batch=2, padding=(6, 0))
    ones = torch.ones_like(mask)
    with contextlib.ExitStack() as stack:
        model = packable(converted, stack)

        def refused(what="position_ids", rows=2, **given):
            with pytest.raises(ValueError, match=f"{what}: expected one sequence in each row"):
                model(ids[:rows], **given)

        beside = [{}, {"use_cache": True}, {"attention_mask": ones, "use_cache": False},
                  {"attention_mask": mask}, {"past_key_values": DynamicCache(config=model.config)},
                  {"past_key_values": StaticCache(config=model.config, max_cache_len=24),
                   "attention_mask": torch.nn.functional.pad(ones, (0, 4))}]  # fmt: skip
        for given in beside:
            refused(position_ids=SEVERAL, **given)
        refused(position_ids=torch.stack([torch.arange(20), SEVERAL[0]]))
        ends = torch.tensor([0, 8, 20], dtype=torch.int32)
        refused("cu_seq_lens", rows=1, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)
        refused("cu_seq_lens", 1, cu_seq_lens_k=ends, position_ids=torch.arange(20)[None])
        model(ids)  # what was asked of an earlier call is forgotten
        ids = ids[:1]
        packed = model(
            ids, position_ids=SEVERAL, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False
        ).logits
        torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]).logits, **CLOSE)
        model.config.use_cache = False
        torch.testing.assert_close(model(ids, position_ids=SEVERAL).logits, packed)


@pytest.mark.parametrize("converted", [False, True])
@torch.no_grad()
def test_packed_rows_are_refused_by_models_that_do_not_look_for_them(converted):
    ids, _ = prompt(batch=2, padding=())
    with contextlib.ExitStack() as stack:
        model = packable(converted, stack, "gpt_oss")
        with pytest.raises(ValueError, match="if the model's code looks for them"):
            model(ids, position_ids=SEVERAL, use_cache=False)


@pytest.mark.parametrize("converted", [False, True])
@torch.no_grad()
def test_other_positions_are_not_taken_for_packed_ones(converted):
    ids, mask = prompt(batch=2, padding=(6, 0))
    with contextlib.ExitStack() as stack:
        model = packable(converted, stack)
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        plain = model(ids, attention_mask=mask, position_ids=counted).logits[:, 6:]
        ones = counted.masked_fill(mask == 0, 1)
        found = model(ids, attention_mask=mask, position_ids=ones).logits[:, 6:]
        torch.testing.assert_close(found, plain, **CLOSE)
        room = StaticCache(config=model.config, max_cache_len=30)
        longer = torch.nn.functional.pad(mask, (0, 10))
        found = model(ids, attention_mask=longer, position_ids=ones, past_key_values=room).logits
        torch.testing.assert_close(found[:, 6:], plain, **CLOSE)
        behind = torch.cat([torch.arange(15), torch.zeros(5, dtype=torch.long)])[None]
        found = model(ids, position_ids=behind).logits[:, :15]  # padding that no mask tells of
        torch.testing.assert_close(found, model(ids[:, :15]).logits, **CLOSE)
        for positions in (2 * torch.arange(20), torch.arange(20) // 2, torch.zeros(20).long()):
            model(ids, position_ids=positions[None])
        model(ids, cu_seq_lens_q=torch.tensor([0, 20]))
        model(ids[:, -1:], position_ids=torch.tensor([[3]]))
        if not converted:
            blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in (8, 12))).bool()
            model(ids, attention_mask=blocks.expand(2, 1, -1, -1), position_ids=SEVERAL)


def test_positions_of_text_beside_those_of_images_are_looked_at():
    note_asked({"position_ids": SEVERAL.expand(4, 2, -1)})
    with pytest.raises(ValueError, match="several, packed"):
        check_asked(Placement.dense(2, 20, 20, None), 20)
    note_asked({"position_ids": SEVERAL.expand(3, 2, -1)})
    check_asked(Placement.dense(2, 20, 20, None), 20)


@torch.no_grad()
def test_positions_of_a_caller_are_not_held_after_the_call():
    model, positions = tiny_llama(), torch.arange(20)[None]
    held = weakref.ref(positions)
    with sparsify(model, STREAMING):
        model(prompt(padding=())[0], position_ids=positions)
        del positions
        gc.collect()
        assert held() is None


def test_packed_rows_train_under_gradient_checkpointing():
    model = convert(tiny_llama(), width=8, window=2, sinks=1).train()
    ids, _ = prompt(batch=2, padding=())
    plain = model(ids, position_ids=SEVERAL, use_cache=False).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(model(ids, position_ids=SEVERAL).logits, plain, **CLOSE)


@torch.no_grad()
def test_four_dimensional_bool_mask_is_read_as_spans():
    model = tiny_llama()
    ids, _ = prompt(batch=2, padding=())
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in (8, 12))).bool()
    with sparsify(model, STREAMING):
        packed = model(ids, attention_mask=blocks.expand(2, 1, -1, -1)).logits
        separate = torch.cat(
            [
                model(ids[:, :8], position_ids=torch.arange(8)[None]).logits,
                model(ids[:, 8:], position_ids=torch.arange(8, 20)[None]).logits,
            ],
            1,
        )
    torch.testing.assert_close(packed, separate, **CLOSE)


def test_prefill_policy_is_not_asked_while_decoding():
    model = tiny_llama()
    ids, mask = prompt(batch=1, padding=())
    policy = FirstOnly([])
    with sparsify(model, policy, measure_rows=2) as run:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            in_pieces(model, ids, mask, (16, 17, 18, 19), cache)
    assert policy.asked == [(0, 16, 16), (1, 16, 16)]
    summary = run.summary()
    assert (summary["prefill"]["calls"], summary["decode"]["calls"]) == (2, 8)
    assert summary["decode"]["density"] == 1.0
    assert summary["decode"]["kept_mass"] == pytest.approx(1, abs=1e-5)


def test_one_causal_mask_serves_all_layers_that_read_every_key(monkeypatch):
    made, asked = [], []
    causal, biased = LifetimeMask.causal.__func__, Gated.biased

    def counted(cls, *args, **kwargs):
        made.append(args)
        return causal(cls, *args, **kwargs)

    def heard(self, query, key, value, layer):
        asked.append((layer.index, key.shape[2]))
        return biased(self, query, key, value, layer)

    monkeypatch.setattr(LifetimeMask, "causal", classmethod(counted))
    monkeypatch.setattr(Gated, "biased", heard)
    model = tiny_llama(layers=3)
    ids, _ = prompt(batch=1, padding=())
    full = model(ids).logits
    with sparsify(model, Gated(sinks=1, window=3, columns=0, dense_up_to=ids.shape[1])) as run:
        short = model(ids).logits
        assert (made, asked) == ([(ids.shape[1], ids.shape[1])], [])
        model(torch.cat([ids, ids[:, :1]], 1))
    assert asked == [(layer, ids.shape[1] + 1) for layer in range(3)]
    assert run.summary()["prefill"]["calls"] == 6
    torch.testing.assert_close(short, full, **CLOSE)


def test_placement_is_read_once_for_each_mask(monkeypatch):
    read = []
    original = Placement.from_linear.__func__
    monkeypatch.setattr(
        Placement,
        "from_linear",
        classmethod(lambda cls, *args: read.append(1) or original(cls, *args)),
    )
    ids, mask = prompt()
    for model, masks in ((tiny_llama(layers=3), 1), (tiny_gemma3(), 2)):
        with sparsify(model, STREAMING):
            for _ in range(2):
                read.clear()
                model(ids, attention_mask=mask)
                assert len(read) == masks


# gradients


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients_equal_those_under_dense_masks(name):
    model = TINY[name]().train()
    ids, _ = prompt(padding=())

    def gradients(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(streaming_logits(model, ids))
    for checkpointing in (False, True):
        if checkpointing:
            enable = "activation_checkpointing_enable"  # its name since 5.23
            getattr(model, enable, model.gradient_checkpointing_enable)()
        with sparsify(model, STREAMING):
            received = gradients(model(ids, use_cache=False).logits)
        assert received.keys() == expected.keys()
        for n in expected:
            torch.testing.assert_close(received[n], expected[n], rtol=1e-3, atol=1e-3, msg=n)


# nothing is left behind


def state(model):
    """Everything that an adapter could leave on a model."""
    return [
        (
            name,
            sorted(vars(m)),
            len(m._forward_pre_hooks),
            len(m._forward_pre_hooks_with_kwargs),
            len(m._forward_hooks),
            m.training,
        )
        for name, m in model.named_modules()
    ], [
        (name, m.config._attn_implementation)
        for name, m in model.named_modules()
        if hasattr(m, "config")
    ]


@torch.no_grad()
def test_removal_is_bit_for_bit(model):
    ids, mask = prompt()
    before, logits = state(model), model(ids, attention_mask=mask).logits
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    run = sparsify(model, STREAMING)
    assert state(model) != before
    assert not torch.equal(model(ids, attention_mask=mask).logits, logits)
    run.remove()
    run.remove()
    with pytest.raises(RuntimeError, match="stop"), sparsify(model, STREAMING):
        raise RuntimeError("stop")
    assert state(model) == before
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)


def test_layers_with_configurations_of_their_own_are_restored():
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"
    before = state(model)
    asked = FirstOnly([])
    with sparsify(model, asked):
        model(prompt()[0])
    assert [index for index, *_ in asked.asked] == [0, 1]
    assert state(model) == before
    assert attention.config._attn_implementation == "eager"


def test_a_refused_policy_changes_nothing():
    class Picky(Columns):
        def check(self, layers, heads, kv_heads):
            raise ValueError(f"{layers} {heads} {kv_heads}")

    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="2 4 2"):
        sparsify(model, Picky())
    assert state(model) == before


def test_two_runs_in_two_threads_do_not_mix():
    models = [tiny_llama(seed=1), tiny_llama(seed=1)]
    policies = [STREAMING, Streaming(sinks=0, window=2)]
    ids, mask = prompt()
    expected = []
    for m, policy in zip(models, policies, strict=True):
        with sparsify(m, policy):
            expected.append(generate(m, ids, mask))
    received = [None, None]
    barrier = threading.Barrier(2)

    def work(i):
        with sparsify(models[i], policies[i]):
            barrier.wait()
            received[i] = generate(models[i], ids, mask)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for (tokens, logits), (own, exact) in zip(received, expected, strict=True):
        assert torch.equal(tokens, own)
        assert torch.equal(logits, exact)
    assert not torch.equal(expected[0][1], expected[1][1])


# measurements


@torch.no_grad()
def test_summary_counts_pairs_over_the_causal_area():
    model = tiny_gemma3()
    ids, mask = prompt(batch=2, padding=(4, 0))
    with sparsify(model, STREAMING, measure=True) as run:
        in_pieces(model, ids, mask, (12, 19), DynamicCache(config=model.config))
        chunked = run.summary()
        run.reset()
        assert run.summary()["prefill"] == {
            "density": None,
            "kept_mass": None,
            "kept_mass_p5": None,
            "density_per_head": [None] * 4,
            "kept_mass_per_head": None,
            "calls": 0,
        }
    for phase, rows in (("prefill", slice(0, -1)), ("decode", slice(-1, None))):
        for layer, window in enumerate((WINDOW, None) * 2):
            kept = pairs = 0
            for length in (16, 20):
                kept += int(visible(length, window)[rows].sum())
                pairs += int(torch.ones(length, length).tril()[rows].sum())
            per_head = chunked[phase]["density_per_head"][layer]
            assert per_head == pytest.approx([kept / pairs] * 4, rel=1e-5)
        assert chunked[phase]["kept_mass"] is None
    assert chunked["decode"]["calls"] == 4


@torch.no_grad()
def test_kept_mass_is_the_share_of_the_models_own_attention():
    model = tiny_mistral(attn="eager", layers=1)
    ids, _ = prompt(batch=1, padding=())
    maps = model(ids, output_attentions=True).attentions[0][0]
    with sparsify(model, STREAMING, measure_rows=5) as run:
        model(ids)
    rows = sampled_rows(20, 5)
    assert rows == [3, 7, 11, 15, 19]
    share = (maps * visible(20, WINDOW)).sum(-1)[:, rows]
    summary = run.summary()["prefill"]
    assert summary["kept_mass_per_head"][0] == pytest.approx(share.mean(-1).tolist(), rel=1e-4)
    assert summary["kept_mass"] == pytest.approx(float(share.mean()), rel=1e-4)
    assert summary["kept_mass_p5"] == pytest.approx(float(share.min()), rel=1e-4)
    assert summary["density"] < 1


def test_nothing_is_measured_unless_asked_for():
    model = tiny_llama()
    for policy in (STREAMING, Causal()):
        with sparsify(model, policy) as run:
            model(*prompt())
        summary = run.summary()
        assert summary["prefill"]["density"] is None
        assert summary["prefill"]["calls"] == 2
        assert sum(summary["impl"].values()) == 2


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@torch.no_grad()
def test_impl_is_passed_through(impl):
    model = tiny_llama()
    ids, _ = prompt(padding=())
    expected = model(ids).logits
    with sparsify(model, Causal(), impl=impl) as run:
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    assert run.summary()["impl"] == {impl: 2}


# what cannot be honoured


class EvictingLayer(DynamicLayer):
    pass


class EvictingCache(DynamicCache):
    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = EvictingLayer
        self.layers = [EvictingLayer()]


def continue_after_right_padding(model):
    ids, mask = prompt(batch=2, padding=(3, 0))
    generate(model, ids.flip(-1), mask.flip(-1), new=2)


def read_both_ways(model):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[:4, :4] = True
    model(prompt()[0], attention_mask=mask.expand(3, 1, -1, -1))


def dilated(model):
    q, k = torch.arange(20)[:, None], torch.arange(20)
    model(prompt()[0], attention_mask=((k <= q) & ((q - k) % 2 == 0)).expand(3, 1, -1, -1))


def hidden_column(model):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[6:, 5] = False
    model(prompt()[0], attention_mask=mask.expand(3, 1, -1, -1))


def hole(model):
    ids, mask = prompt()
    mask[0, 10] = 0
    model(ids, attention_mask=mask)


def stale_attention_mask(model):
    ids, mask = prompt()
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], attention_mask=mask[:, :4], past_key_values=cache)


CALLS = {
    "output_attentions": (lambda m: m(prompt()[0], output_attentions=True), "attention maps"),
    "output_attentions in generate": (
        lambda m: generate(m, *prompt(), output_attentions=True),
        "attention maps",
    ),
    "output_attentions of the decoder": (
        lambda m: m.model(prompt()[0], output_attentions=True),
        "attention maps",
    ),
    "unknown cache": (
        lambda m: m(prompt()[0], past_key_values=EvictingCache()),
        "EvictingLayer.*DynamicCache",
    ),
    "unknown cache by position": (
        lambda m: m(prompt()[0], None, None, EvictingCache()),
        "EvictingLayer",
    ),
    "hole": (hole, r"rows \[0\].*pad on the left"),
    "continue after right padding": (continue_after_right_padding, "pad on the left"),
    "both ways": (read_both_ways, "causal attention within each sequence"),
    "dilated": (dilated, "causal attention within each sequence"),
    "hidden column": (hidden_column, "not one unbroken run"),
    "additive mask": (
        lambda m: m(prompt()[0], attention_mask=torch.zeros(3, 1, 20, 20)),
        "additive == 0",
    ),
    "attention mask of the new tokens only": (stale_attention_mask, "17 too few"),
}


@pytest.fixture(scope="module")
def sparse_llama():
    model = tiny_llama()
    with sparsify(model, STREAMING):
        yield model


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_cannot_be_honoured(sparse_llama, call):
    do, remedy = CALLS[call]
    with pytest.raises(ValueError, match=f"expected.*received.*{remedy}|{remedy}"):
        do(sparse_llama)


def test_dropout_in_training_is_refused():
    model = tiny_llama(attention_dropout=0.1)
    ids, _ = prompt()
    with sparsify(model, STREAMING):
        model(ids)
        model.train()
        with pytest.raises(ValueError, match=r"attention_dropout: expected 0, received 0\.1"):
            model(ids)


def test_a_mask_of_another_size_is_refused():
    class Short(Columns):
        def __call__(self, query, key, value, layer):
            return LifetimeMask.causal(key.shape[2] - 1)

    with (
        sparsify(tiny_llama(), Short()) as run,
        pytest.raises(ValueError, match="columns: expected a mask of 20 queries x 20 keys"),
    ):
        run.model(prompt()[0])


def tiny(kind, config, **over):
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return getattr(transformers, kind)(getattr(transformers, config)(**(shape | over)))


MODELS = {
    "soft cap": (lambda: tiny("Gemma2ForCausalLM", "Gemma2Config"), "soft cap"),
    "bidirectional": (lambda: tiny("LlamaModel", "LlamaConfig", is_causal=False), "directions"),
    "encoder": (lambda: tiny("BertModel", "BertConfig"), "decoder"),
    "encoder-decoder": (
        lambda: tiny("T5Model", "T5Config", d_model=16, num_layers=1, num_heads=2, d_kv=8),
        "decoder-only",
    ),
    "own attention": (lambda: tiny("BloomForCausalLM", "BloomConfig"), "AttentionInterface"),
    "no transformers model": (lambda: torch.nn.Linear(1, 1), "PreTrainedModel"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_sparsified(name):
    make, reason = MODELS[name]
    with pytest.raises(ValueError, match=f"expected.*received.*{reason}|{reason}"):
        sparsify(make(), STREAMING)


def test_settings_are_checked_before_anything_changes():
    model = tiny_llama()
    before = state(model)
    for policy, over, reason in (
        (STREAMING, {"impl": "flash"}, "impl: expected one of"),
        (STREAMING, {"measure_rows": -1}, "measure_rows: expected 0"),
        (Streaming, {}, "policy: expected a policy"),
        ("streaming", {}, "policy: expected a policy"),
    ):
        with pytest.raises(ValueError, match=reason):
            sparsify(model, policy, **over)
    with sparsify(model, STREAMING), pytest.raises(ValueError, match="one policy at a time"):
        sparsify(model, STREAMING)
    assert state(model) == before


def test_a_policy_with_a_card_has_the_card_checked():
    class Card:
        def check(self, model):
            raise ValueError(f"card for {type(model).__name__}")

    class Carded(Columns):
        card = Card()

    with pytest.raises(ValueError, match="card for LlamaForCausalLM"):
        sparsify(tiny_llama(), Carded())


# placements


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_linear_and_bool_masks_tell_the_same_spans(data):
    keys = data.draw(st.integers(2, 14), "keys")
    past = data.draw(st.integers(0, keys - 1), "past")
    window = data.draw(st.none() | st.integers(2, 6), "window")
    pads = data.draw(st.lists(st.integers(0, keys - 1), min_size=1, max_size=3), "padding")
    queries = keys - past
    mask = torch.arange(keys) >= torch.tensor(pads)[:, None]
    table = linear_mask(len(pads), queries, keys, past, 0, mask, window, "cpu")
    linear = Placement.from_linear(table, queries, keys)
    assert linear.spans == tuple(
        Span(row, pad, keys, max(pad - past, 0), queries) for row, pad in enumerate(pads)
    )
    assert linear.first_keys == (0,) * len(pads)
    assert linear.window == window

    q, k = torch.arange(past, keys)[:, None], torch.arange(keys)
    dense = ((k <= q) & mask[:, None, None, :]) & (q >= torch.tensor(pads).view(-1, 1, 1, 1))
    assert Placement.from_bool(dense, len(pads), queries, keys, None).spans == linear.spans
    if past == 0 and window is not None:
        slid = dense & (q - k < window)
        again = Placement.from_bool(slid, len(pads), queries, keys, window)
        assert again.spans == linear.spans
        assert again.window == (window if keys - min(pads) > window else None)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_known_without_padding_is_what_the_mask_says(data):
    first = data.draw(st.integers(0, 3), "dropped")
    past = data.draw(st.integers(0, 9), "past")
    queries = data.draw(st.integers(1, 5), "queries")
    room = data.draw(st.integers(0, 3), "unused slots")
    window = data.draw(st.none() | st.integers(2, 6), "window")
    keys = past + queries + room
    table = linear_mask(2, queries, keys, first + past, first, None, window, "cpu")
    known = Placement.from_linear(table, queries, keys)
    assert known == Placement.from_linear(table.clone(), queries, keys)
    with pytest.raises(ValueError, match=f"expected at least {keys + 1} "):
        Placement.from_linear(table, keys + 1 - past, keys)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mask_without_padding_says_what_one_with_padding_would(data):
    """What it is made of on the short way, number by number, and a slice of it when it is read."""
    batch = data.draw(st.integers(1, 3), "batch")
    first = data.draw(st.integers(0, 3), "dropped")
    past = data.draw(st.integers(0, 9), "past")
    queries = data.draw(st.integers(1, 5), "queries")
    room = data.draw(st.integers(0, 3), "unused slots")
    window = data.draw(st.none() | st.integers(2, 6), "window")
    used = past + queries
    size = batch, queries, used + room, first + past, first
    ones = torch.ones(batch, first + used, dtype=torch.long)
    short = linear_mask(*size, None, window, "cpu")
    # an offset on the device is not looked at: the way of padded rows
    general = linear_mask(*size[:3], torch.tensor(first + past), first, ones, window, "cpu")
    assert short.shape == general.shape == (batch, 1, 4, used + room)
    assert short.dtype == general.dtype == torch.int32
    assert torch.equal(short[:, :, :3, :used], general[:, :, :3, :used])
    assert short[:, :, 3].eq(-1).all() and general[:, :, 3].eq(used).all()
    for keys in range(used, used + room + 1):
        expected = Placement.from_linear(general[..., :keys], queries, keys)
        assert Placement.from_linear(short[..., :keys], queries, keys) == expected
        assert Placement.from_linear(short, queries, keys) == expected


def test_an_attention_mask_of_ones_is_as_none():
    """So that its placement is not read from the device; one zero, or a token too few, is seen."""
    size = 2, 3, 9, 4, 0
    none = linear_mask(*size, None, None, "cpu")
    ones = torch.ones(2, 7, dtype=torch.long)
    for mask in (ones, torch.ones(2, 12).bool()):
        table = linear_mask(*size, mask, None, "cpu")
        assert torch.equal(table, none)
        assert Placement.from_linear(table.fill_(-1), 3, 9).spans == (
            Span(0, 0, 7, 0, 3),
            Span(1, 0, 7, 0, 3),
        )
    padded = ones.clone()
    padded[1, 0] = 0
    assert Placement.from_linear(linear_mask(*size, padded, None, "cpu"), 3, 9).spans == (
        Span(0, 0, 7, 0, 3),
        Span(1, 1, 7, 0, 3),
    )
    with pytest.raises(ValueError, match="received 1 too few"):
        Placement.from_linear(linear_mask(*size, ones[:, 1:], None, "cpu"), 3, 9)


def test_a_mask_without_padding_need_not_be_read():
    """On a GPU reading it waits for all that was asked for before."""
    table = linear_mask(2, 9, 9, 0, 0, None, None, "cpu")
    table.fill_(-1)
    assert Placement.from_linear(table, 9, 9) == Placement.dense(2, 9, 9, None)


def test_trimmed_keys_keep_their_positions():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]).bool()
    # tokens 3 to 6 are left; the query is token 6
    table = linear_mask(2, 1, 4, 6, 3, mask, 4, "cpu")
    where = Placement.from_linear(table, 1, 4)
    assert where.spans == (Span(0, 0, 4, 0, 1), Span(1, 2, 4, 0, 1))
    assert where.first_keys == (1, 0)
    assert where.window == 4
    assert where.has_past


def test_another_model_with_the_same_config_object_is_refused():
    first = tiny_llama()
    second = type(first)(first.config).eval()
    ids = torch.randint(3, VOCAB, (1, 9))
    plain = second(ids).logits
    with sparsify(first, STREAMING):
        with pytest.raises(ValueError, match="another model with the same config object"):
            second(ids)
        first(ids)
    assert torch.equal(second(ids).logits, plain)


def test_a_removed_run_is_not_entered_again():
    run = sparsify(tiny_llama(), STREAMING)
    run.remove()
    with pytest.raises(ValueError, match="received one that was removed"), run:
        pass
