"""BoundedCache in transformers: the outputs of the same policy over a full cache, in O(width)."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

import dynmask  # noqa: E402
from dynmask import BoundedCache, GatedCache, HeavyHitterCache, convert, sparsify  # noqa: E402
from dynmask.integrations.calls import Call  # noqa: E402
from dynmask.integrations.rotary import unrotate_of  # noqa: E402
from dynmask.nn import Retention  # noqa: E402
from dynmask.policies import H2O, Causal, Gated, Streaming  # noqa: E402
from dynmask.policies.gates import Gates  # noqa: E402
from tests.test_transformers import tiny  # noqa: E402
from tests.tiny import TINY, VOCAB, tiny_llama  # noqa: E402

NINE = Retention(9, 3, 1)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Scored:
    """Keeps by a fixed linear score of keys before rotation and values; may add a bias."""

    retention_of: Retention = NINE
    biased: bool = False
    ties: bool = False

    name: ClassVar[str] = "scored"
    causal: ClassVar[bool] = True
    phase: ClassVar[str] = "both"

    def check(self, layers, heads, kv_heads):
        pass

    def retention(self, layer):
        return self.retention_of

    def scores(self, key, value, layer):
        plain = layer.unrotate(key)
        draw = torch.Generator().manual_seed(layer.index)
        weight = torch.randn(2, key.shape[-1], generator=draw).to(plain)
        scores = (plain @ weight[0] + value.to(plain) @ weight[1]).float()
        # equal tokens have equal scores in layer 0, except for what rotating rounds off
        return scores.round(decimals=-1 if self.ties else 3)

    def bias(self, scores, layer):
        return 1 + torch.tanh(scores) if self.biased else None  # 1: sinks of the model see it

    def __call__(self, query, key, value, layer):
        return self.retention(layer.index).mask(self.scores(key, value, layer), query.shape[2])


POLICIES = {
    "streaming": Streaming(sinks=2, window=5),
    "scored": Scored(),
    "ties": Scored(ties=True),
    "biased": Scored(biased=True),
    "paper": Scored(Retention(6), biased=True),
    "per head": Scored(Retention((5, 11), 3, 1)),
}


def prompt(batch=3, length=24, padding=(6, 1, 0), seed=0):
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch]):
        mask[row, :pad] = 0
    return ids * mask, mask


def generate(model, ids, mask, cache=None, new=8, **kwargs):
    """New tokens and their logits, greedy unless said otherwise."""
    more = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **more, **kwargs},
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "mistral", "gpt_oss"])
def model(request):
    return TINY[request.param]()


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("streaming", 7),
        ("scored", None),
        ("ties", 7),
        ("biased", None),
        ("paper", 7),
        ("per head", 7),
    ],
)
def test_generation_equals_that_with_a_full_cache(model, name, chunk):
    ids, mask = prompt()
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    with sparsify(model, POLICIES[name]) as run:
        expected, logits = generate(model, ids, mask, use_cache=False)
        tokens, bounded = generate(model, ids, mask, BoundedCache(run), **more)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(bounded, logits, **CLOSE)


@pytest.mark.parametrize("name", ["scored", "biased"])
def test_a_full_cache_serves_too(model, name):
    ids, mask = prompt()
    with sparsify(model, POLICIES[name]):
        expected, logits = generate(model, ids, mask, use_cache=False)
        tokens, cached = generate(model, ids, mask)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(cached, logits, **CLOSE)


@torch.no_grad()
def test_the_policy_changes_the_outputs(model):
    ids, _ = prompt(padding=())
    plain = model(ids).logits
    full_layers = getattr(model.config, "layer_types", None) or ["full"]
    chooses = model.config.model_type != "mistral" and any("full" in x for x in full_layers)
    for policy, differs in ((POLICIES["scored"], chooses), (POLICIES["streaming"], True)):
        with sparsify(model, policy) as run:
            cache = BoundedCache(run)
            logits = model(ids, past_key_values=cache).logits
            more = model(ids[:, :4], past_key_values=cache).logits
        assert torch.allclose(logits, plain, **CLOSE) != differs
        assert torch.isfinite(more).all()


def test_beam_search_and_sampling():
    model = TINY["gemma3"]()
    ids, mask = prompt()
    with sparsify(model, POLICIES["scored"]) as run:
        for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            torch.manual_seed(0)
            expected = model.generate(ids, attention_mask=mask, max_new_tokens=10, **more)
            torch.manual_seed(0)
            tokens = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=10,
                past_key_values=BoundedCache(run),
                **more,
            )
            assert torch.equal(tokens, expected)


@torch.no_grad()
def test_a_conversation_goes_on():
    model = tiny_llama()
    ids, mask = prompt()
    more = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(5))
    with sparsify(model, POLICIES["biased"]) as run:
        cache = BoundedCache(run)
        first, _ = generate(model, ids, mask, cache)
        ids = torch.cat([ids, first, more], 1)
        mask = torch.cat([mask, torch.ones(3, first.shape[1] + 5, dtype=mask.dtype)], 1)
        fork = copy.deepcopy(cache)
        expected, logits = generate(model, ids, mask, use_cache=False)
        for one in (cache, fork):
            tokens, bounded = generate(model, ids, mask, one)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(bounded, logits, **CLOSE)
            assert one.get_seq_length() == ids.shape[1] + 7


@torch.no_grad()
def test_memory_is_that_of_the_first_width_tokens():
    model = tiny_llama(max_position_embeddings=8192)
    width = 96
    ids = torch.randint(3, VOCAB, (1, 1536), generator=torch.Generator().manual_seed(1))
    with sparsify(model, Scored(Retention(width, 16, 2))) as run:
        cache, sizes = BoundedCache(run), []
        for part in ids.split(64, 1):
            out = model(part, past_key_values=cache)
            sizes.append(cache.nbytes)
        expected = model(ids, use_cache=False).logits[:, -64:]
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert set(sizes[2:]) == {sizes[2]}
    slot = 2 * 16 * 4 + 4 + 4  # key, value, position, score
    assert sizes[-1] == 2 * (2 * width * slot + 4 + 2 * 4)


@torch.no_grad()
def test_reset_reorder_crop():
    model = tiny_llama()
    ids, _ = prompt(batch=2, padding=())
    with sparsify(model, Scored(Retention(30, 4, 1))) as run:
        cache = BoundedCache(run)
        model(ids, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 20
        again = model(ids[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(again, model(ids).logits[:, 20:], **CLOSE)
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(4)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(ids[[1, 0], :6], past_key_values=cache).logits
        expected = model(torch.cat([ids, ids[:, :6]], 1)[[1, 0]]).logits[:, 24:]
        torch.testing.assert_close(swapped, expected, **CLOSE)
        with pytest.raises(ValueError, match="crop: expected at most 30 tokens"):
            model(ids, past_key_values=cache)
            cache.crop(-1)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_where_one_layer_has_evicted_no_layer_forgets():
    model = convert(tiny_llama(), width=30, window=3)
    model.model.layers[1].self_attn.dynmask_score.retention = Retention(9, 3, 1)
    ids, _ = prompt(batch=1, padding=())
    cache = BoundedCache(model)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="crop: expected at most 9 tokens"):
        cache.crop(-2)
    again = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 20:], **CLOSE)


@torch.no_grad()
def test_densities_are_of_the_whole_causal_area():
    model = tiny_llama()
    ids, mask = prompt()
    summaries = []
    for bounded in (False, True):
        with sparsify(model, POLICIES["scored"], measure=True) as run:
            cache = BoundedCache(run) if bounded else DynamicCache(config=model.config)
            generate(model, ids, mask, cache, prefill_chunk_size=9)
        summaries.append(run.summary())
    for phase in ("prefill", "decode"):
        full, own = (s[phase]["density_per_head"] for s in summaries)
        for a, b in zip(full, own, strict=True):
            assert b == pytest.approx(a, rel=1e-5)


# keys before rotation


@dataclass(frozen=True)
class Unrotated(Scored):
    """Keeps what it was given."""

    log: list = None

    def scores(self, key, value, layer):
        self.log.append((layer.index, layer.unrotate(key)))
        return super().scores(key, value, layer)


def true_keys(model, run_model):
    """What each layer's key projection (and norm) gives, in the order of calls."""
    kept, hooks = [], []
    for layer in model.model.layers:
        attention = layer.self_attn
        part = getattr(attention, "k_norm", None) or attention.k_proj

        def keep(module, args, out, index=attention.layer_idx, attention=attention):
            shape = (*out.shape[:2], -1, attention.head_dim)
            out = out if out.dim() == 4 else out.view(shape).transpose(1, 2)
            kept.append((index, out if out.shape[1] == 2 else out.transpose(1, 2)))

        hooks.append(part.register_forward_hook(keep))
    run_model()
    [hook.remove() for hook in hooks]
    return kept


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
ROTARY = {
    "llama": lambda: tiny_llama(),
    "yarn": lambda: tiny_llama(rope_parameters=YARN | {"original_max_position_embeddings": 256}),
    "qwen3": TINY["qwen3"],
    "gemma3": TINY["gemma3"],
    "gpt_oss": TINY["gpt_oss"],
}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("bounded", [True, False])
@torch.no_grad()
def test_unrotate_gives_keys_before_rotation(name, bounded):
    model = ROTARY[name]()
    ids, _ = prompt(batch=2, padding=())
    policy = Unrotated(log=[])
    with sparsify(model, policy) as run:
        cache = BoundedCache(run) if bounded else DynamicCache(config=model.config)

        def forward():
            for first, last in ((0, 1), (1, 20), (20, 21)):
                # positions of the caller's own
                positions = torch.arange(first, last).expand(2, -1) + torch.tensor([[0], [100]])
                model(ids[:, first:last], position_ids=positions, past_key_values=cache)

        kept = true_keys(model, forward)
    assert policy.log
    layers = {index for index, _ in policy.log}
    for layer in layers:
        new = [x for index, x in kept if index == layer]
        given = [x for index, x in policy.log if index == layer]
        assert len(given) == len(new) == 3
        for i in range(3):
            expected = new[i] if bounded else torch.cat(new[: i + 1], 2)
            torch.testing.assert_close(given[i], expected, rtol=1e-4, atol=1e-4)


def test_layers_of_two_rotations_share_no_inverse():
    model = tiny_llama()
    module, memo = model.model.layers[0].self_attn, {}
    key = torch.randn(1, 2, 1, module.head_dim)
    for position in (3, 8, 3):
        ids = torch.tensor([[position]])
        cos, sin = model.model.rotary_emb(key, ids)
        turned = apply_rotary_pos_emb(key, key, cos, sin)[1]
        call = Call(None, (cos, sin), ids)
        for _ in range(2):
            back = unrotate_of(module, call, slice(0, 1), slice(0, 1), 0, memo)(turned)
            torch.testing.assert_close(back, key, **CLOSE)


def test_rotations_that_are_not_understood_are_refused():
    config = transformers.CohereConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.CohereForCausalLM(config).eval()
    with (
        sparsify(model, POLICIES["scored"]),
        pytest.raises(ValueError, match="halves of a head.*CohereAttention"),
    ):
        model(prompt()[0])


@torch.no_grad()
def test_frequencies_that_change_need_a_bounded_cache():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_llama(rope_parameters=rope)
    ids, _ = prompt(padding=())
    with sparsify(model, POLICIES["scored"]) as run:
        out = model(ids, use_cache=True)
        with pytest.raises(ValueError, match="frequencies that stay.*BoundedCache"):
            model(ids[:, :1], past_key_values=out.past_key_values)
        cache = BoundedCache(run)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)


# what cannot be honoured


def test_runs_that_cannot_serve_it():
    model = tiny_llama()
    with (
        sparsify(model, Causal()) as run,
        pytest.raises(ValueError, match="only ever evicts.*received full"),
    ):
        BoundedCache(run)
    with pytest.raises(ValueError, match="received one that was removed"):
        BoundedCache(run)
    with (
        sparsify(model, POLICIES["scored"], measure_rows=3) as run,
        pytest.raises(ValueError, match="measure_rows=0"),
    ):
        BoundedCache(run)
    with pytest.raises(ValueError, match="converted model, received LlamaForCausalLM"):
        BoundedCache(model)
    hybrid = tiny(
        "FalconH1ForCausalLM", "FalconH1Config", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=4,
    )  # fmt: skip
    with (
        sparsify(hybrid, Streaming(sinks=2, window=8)) as run,
        pytest.raises(ValueError, match="nothing else, received LinearAttention.* keep their own"),
    ):
        BoundedCache(run)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["streaming", "converted", "h2o", "gated"])
def test_layers_that_attend_twice_are_refused_with_caches_that_drop_keys(kind):
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 99}
    model = tiny("DiffLlamaForCausalLM", "DiffLlamaConfig", **shape).eval()
    ids = torch.arange(3, 33)[None]
    if kind == "converted":
        run, make = convert(model, width=9, window=3), BoundedCache
    else:
        none = torch.zeros(1, 4, dtype=torch.int32)
        gates = Gates(none + 8, none, none.float())
        policy, make = {
            "streaming": (Streaming(sinks=2, window=8), BoundedCache),
            "h2o": (H2O(width=9), HeavyHitterCache),
            "gated": (Gated(sinks=2, last=5, gates=gates, decode="keep"), GatedCache),
        }[kind]
        run = sparsify(model, policy)
    expected = model(ids, use_cache=False).logits
    with pytest.raises(ValueError, match="attend once in a call, received DiffLlamaAttention"):
        model(ids, past_key_values=make(run))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)  # with transformers' own


@torch.no_grad()
def test_calls_that_cannot_be_honoured():
    model, other = tiny_llama(), tiny_llama(seed=1)
    ids, mask = prompt()
    with sparsify(model, POLICIES["scored"]) as run:
        cache = BoundedCache(run)
        tril = torch.ones(24, 24, dtype=torch.bool).tril().expand(3, 1, -1, -1)
        with pytest.raises(ValueError, match="2-D mask"):
            model(ids, attention_mask=tril, past_key_values=cache)
        cache = BoundedCache(run)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="hides the same tokens as before"):
            model(ids[:, :2], past_key_values=cache)
        cache = BoundedCache(run)
        with sparsify(other, POLICIES["scored"]), pytest.raises(ValueError, match="of another"):
            other(ids, past_key_values=cache)
        cache = BoundedCache(run)
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="attention is not dynmask's"):
            other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="to be in effect"):
        model(ids, past_key_values=cache)
    with sparsify(model, Causal()), pytest.raises(ValueError, match="BoundedLayer"):
        model(ids, past_key_values=cache)


def test_public_names():
    assert dynmask.BoundedCache is BoundedCache
