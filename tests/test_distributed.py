"""Several processes: two ranks are one process, in context and in tensor parallelism.

Both ranks are started once; each compares its own part with one process's result over everything
and writes the largest difference, or the error it met, under the case's name.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import dynmask
from dynmask import LifetimeMask, Mask
from dynmask.distributed import (
    Split,
    context_attention,
    context_parallel,
    gather,
    last_position,
)  # fmt: skip
from dynmask.masks.base import repeat_heads
from dynmask.masks.part import part_of
from dynmask.policies import Causal, Elastic, Gated, Retained, SnapKV, Streaming, VerticalSlash
from dynmask.policies.base import Layer
from dynmask.policies.gates import Gates
from tests.policies import POLICIES
from tests.ranks import (
    BATCH,
    DIM,
    GROUPS,
    HEADS,
    INF,
    LENGTH,
    MASKS,
    RANKS,
    TOLERANCE,
    drawn,
    found_by,
    top_w,
)  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=8)
@given(data=st.data())
def test_a_part_of_a_mask_reads_what_its_rows_read(name, data):
    queries = data.draw(st.sampled_from([LENGTH, 20]))
    mask = MASKS[name](LENGTH, queries)
    first = data.draw(st.integers(0, queries - 1))
    last = data.draw(st.integers(first + 1, queries))
    part = part_of(mask, (first, last))
    assert (part.queries, part.keys) == (last - first, LENGTH - queries + last)
    dense = mask.dense((first, last))
    assert not dense[..., part.keys :].any()
    assert torch.equal(part.dense().expand_as(dense[..., : part.keys]), dense[..., : part.keys])
    q, k, v = (drawn(BATCH, h, n, DIM, seed=h) for h, n in ((4, queries), (2, LENGTH), (2, LENGTH)))
    whole = dynmask.attention(q, k, v, mask, impl="cpu")[:, :, first:last]
    k, v = k[:, :, : part.keys], v[:, :, : part.keys]
    own = dynmask.attention(q[:, :, first:last], k, v, part, impl="cpu")
    assert torch.allclose(own, whole, atol=TOLERANCE)


@given(st.integers(1, 40), st.integers(1, 7), st.booleans())
def test_a_split_gives_every_position_once(length, ranks, balanced):
    split = Split(length, ranks, balanced)
    own = [split.positions(rank) for rank in range(ranks)]
    assert torch.cat(own).sort().values.tolist() == list(range(length))
    assert [len(x) for x in own] == [split.size(rank) for rank in range(ranks)]
    assert all(torch.equal(x, x.sort().values) for x in own)
    if balanced and length % (2 * ranks) == 0:  # as many causal pairs each
        assert len({int((x + 1).sum()) for x in own}) == 1


def test_a_call_without_a_process_group_says_so():
    split, x = Split(8, 2), torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="init_process_group"):
        context_attention(x, x, x, LifetimeMask.causal(8), split)
    with pytest.raises(ValueError, match="process group"):
        Split.over(None, 8)


@pytest.mark.parametrize(("length", "ranks"), [(0, 2), (8, 0), (8.0, 2)])
def test_a_split_refuses_numbers_out_of_range(length, ranks):
    with pytest.raises(ValueError, match="expected a whole number"):
        Split(length, ranks)


class Odd(LifetimeMask.__mro__[1]):  # a mask of nobody
    batch = heads = keys = queries = 1
    device = dense = lower_tiles = expand = __and__ = None


def test_a_mask_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"dynmask\.masks, received Odd"):
        part_of(Odd(), (0, 1))


# policies cut by rank


def pair_scores(layers=2, groups=2, dim=16):
    from dynmask.nn import PairScore

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tuple(PairScore(groups, dim, 4).requires_grad_(False) for _ in range(layers))


def gated_by_score(dim=16):
    """Maps that keep by score: a group alike and one that is not; beside columns."""
    window = torch.tensor([[3, 3, 7, INF], [5, 5, 2, 2]], dtype=torch.int32)
    kept = torch.tensor([[6, 6, 2, 0], [0, 0, 4, 4]], dtype=torch.int32)
    columns = torch.tensor([[0, 0, 0, 0], [3, 2, 0, 0]], dtype=torch.int32)
    gates = Gates(window, columns, torch.zeros(2, 4), kept=kept)
    return Gated(sinks=2, last=5, gates=gates, scores=pair_scores(dim=dim), decode="select")


def gated_by_slashes():
    """Diagonals alone, beside columns, and in a layer of maps of other kinds."""
    window = torch.tensor([[3, 3, 7, INF], [5, 5, 2, 2]], dtype=torch.int32)
    slashes = torch.tensor([[6, 0, 2, 0], [3, 4, 1, 9]], dtype=torch.int32)
    columns = torch.tensor([[0, 4, 3, 0], [3, 0, 0, 0]], dtype=torch.int32)
    gates = Gates(window, columns, torch.zeros(2, 4), slashes=slashes)
    return Gated(sinks=2, last=5, gates=gates, decode="select")


def per_head_policies():
    """Policies with numbers of single heads: 2 layers, 4 heads, 2 kv heads of dim 8."""
    from dynmask.encoder import BlockEncoder

    window = torch.tensor([[2, 30, 7, 4], [3, INF, 5, 6]], dtype=torch.int32)
    columns = torch.tensor([[3, 0, 0, 5], [0, 0, 2, 1]], dtype=torch.int32)
    several = torch.tensor([[2, 0, 1, 3], [1, 2, 0, 0]], dtype=torch.int32)
    none = torch.zeros_like(several)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        coder = BlockEncoder(HEADS, GROUPS, DIM, block=4, rank=3, query_pool=2, key_pool=2)
        torch.nn.init.normal_(coder.of_key)
        torch.nn.init.uniform_(coder.gain)
    blocks = Gates(window.clamp(max=9), none, torch.zeros(2, 4), several)
    sizes: dict[str, Any] = {"block": 4, "query_pool": 2, "key_pool": 2}
    return {
        "elastic": Elastic(((1, 5, 9, 2), (3, 3, 8, 20)), 0.1, 2, 1),
        "retained": Retained(pair_scores(dim=DIM), ((9, 20), (12, 8)), 5, 2),
        "gates": Gated(sinks=2, last=5, gates=Gates(window, columns, torch.zeros(2, 4))),
        "promise": Gated(
            sinks=2, window=3, columns=1, guard=0.05, promise=torch.linspace(0, 1, 8).view(2, 4)
        ),
        "encoders": Gated(sinks=2, gates=blocks, encoders=(coder, None), **sizes),
        "scores": gated_by_score(DIM),
        "slashes": gated_by_slashes(),
    }


@pytest.mark.parametrize("name", per_head_policies())
@pytest.mark.parametrize("layer", [0, 1])
def test_a_policy_cut_by_rank_reads_what_its_heads_read(name, layer):
    policy = per_head_policies()[name]
    q, k, v = (2 * drawn(BATCH, h, 140, DIM, seed=h) for h in (HEADS, GROUPS, GROUPS))
    expected = repeat_heads(policy(q, k, v, Layer(layer)).dense(), HEADS)
    for rank in range(RANKS):
        own, kv = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        mask = policy.of_shard(rank, RANKS)(q[:, own], k[:, kv], v[:, kv], Layer(layer))
        found = repeat_heads(mask.dense(), 2)
        assert torch.equal(
            found.expand(BATCH, -1, -1, -1), expected.expand(BATCH, -1, -1, -1)[:, own]
        )


# what a rank does


def in_context(cases, mask: Any, split, with_bias=False, impl="auto", dtype=torch.float32):
    """Forward and backward of one mask against one process."""
    n, rank = split.length, cases.rank
    shapes = [(BATCH, h, n, DIM) for h in (HEADS, GROUPS, GROUPS)]
    shapes += [(1, GROUPS, n)] if with_bias else []
    tensors = [drawn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    grad = drawn(BATCH, HEADS, n, DIM, seed=9).to(dtype)
    truth = [x.clone().requires_grad_() for x in tensors]
    made: Any = mask if isinstance(mask, Mask) else mask(truth[1], truth[2])
    q, k, v, *bias = truth
    more: dict[str, Any] = {"bias": bias[0] if bias else None}
    expected, norm = dynmask.attention(q, k, v, made, **more, return_lse=True, impl=impl)
    expected.backward(grad)
    own = [split.take(x, rank).clone().requires_grad_() for x in tensors]
    q, k, v, *bias = own
    more["bias"] = bias[0] if bias else None
    out, lse = context_attention(q, k, v, mask, split, **more, return_lse=True, impl=impl)
    out.backward(split.take(grad, rank))
    cases.same(out, split.take(expected, rank))
    cases.same(lse, split.take(norm, rank))
    for x, y in zip(own, truth, strict=True):
        assert x.grad is not None
        cases.same(x.grad, split.take(y.grad, rank))
    with torch.no_grad():
        cases.same(context_attention(q, k, v, mask, split, **more), out)


def context_cases(cases):
    for balanced in (False, True):
        split = Split.over(None, LENGTH, balanced)
        for name, make in MASKS.items():
            with cases.case(f"{name} {balanced}"):
                in_context(cases, make(LENGTH, LENGTH), split, impl="cpu")
        with cases.case(f"bias {balanced}"):
            in_context(cases, top_w(LENGTH, LENGTH), split, with_bias=True)
        with cases.case(f"made {balanced}"):
            in_context(cases, lambda k, v: LifetimeMask.top_w(v.sum(-1), 5), split)
        with cases.case(f"double {balanced}"):
            in_context(cases, top_w(LENGTH, LENGTH), split, dtype=torch.float64)
            assert max(cases.differences) < 1e-12
    for length in (1, 2, 3):
        with cases.case(f"length {length}"):
            in_context(cases, LifetimeMask.causal(length), Split.over(None, length))
    split = Split.over(None, 5)
    with cases.case("gather"):
        x = drawn(3, 5).requires_grad_()
        own = split.take(x.detach(), cases.rank, 1).requires_grad_()
        found = gather(own, split, dim=-1)
        cases.same(found, x)
        (found * (cases.rank + 1)).sum().backward()
        cases.same(own.grad, torch.full_like(own, 3.0))
    bad_calls(cases, split)


def bad_calls(cases, split):
    rank, mask = cases.rank, LifetimeMask.causal(5)
    q = torch.zeros(1, 2, split.size(rank), 4)
    wrong = torch.zeros(1, 2, split.size(rank), 4 + rank)
    with cases.case("refuses: dims"):
        context_attention(wrong, wrong, wrong, mask, split)
    with cases.case("refuses: positions"):
        part = q if rank == 0 else q[:, :, :1]
        context_attention(part, part, part, mask, split)
    with cases.case("refuses: mask"):
        context_attention(q, q, q, LifetimeMask.causal(6 - rank), split)
    with cases.case("refuses: gradient"):
        context_attention(q, q.clone().requires_grad_(rank == 0), q, mask, split)
    with cases.case("refuses: dtype"):
        x = q.double() if rank else q
        context_attention(x, x, x, mask, split)
    with cases.case("refuses: ranks"):
        context_attention(q, q, q, mask, Split(5, 3))
    with cases.case("refuses: bias"):
        bias = torch.zeros(1, 1, split.size(rank)) if rank else None
        context_attention(q, q, q, mask, split, bias)


MODELS = {
    "full": Causal(),
    "streaming": Streaming(sinks=2, window=9),
    "vertical_slash": VerticalSlash(verticals=8, slashes=12, last=7, sinks=2, window=4),
    "snapkv": SnapKV(width=14, last=6, pool=3),
    "gated": Gated(sinks=2, window=5, columns=6, last=7, soft=True),
    "gated_blocks": Gated(
        sinks=2, window=5, columns=0, blocks=1, block=4, query_pool=2, key_pool=2
    ),
    "gated_slashes": gated_by_slashes(),
}


def model_cases(cases):
    """context_parallel: logits and gradients of a whole model."""
    from tests.tiny import tiny_llama, tiny_mistral

    ids = torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    rank = cases.rank
    retained = Retained(pair_scores(), width=((9, 30), (12, 12)), window=5, sinks=2)

    def forward(model, split, **more):
        return model(
            input_ids=split.take(ids, rank, 1),
            position_ids=split.positions(rank)[None],
            **({"use_cache": False} | more),
        ).logits

    models = {"": tiny_llama(), "mistral ": tiny_mistral()}
    scored = {"retained": retained, "gated_scores": gated_by_score()}
    for kind, model in models.items():
        for name, policy in (MODELS | scored).items():
            if kind and (name in ("streaming", "snapkv") or name.startswith("gated_")):
                continue
            split = Split.over(None, LENGTH, balanced=name not in ("streaming", "snapkv"))
            with cases.case(f"model {kind}{name}"), dynmask.sparsify(model, policy) as run:
                weight = model.model.layers[0].self_attn.k_proj.weight
                expected = model(ids, use_cache=False).logits
                (truth,) = torch.autograd.grad(expected.square().mean(), weight)
                with context_parallel(run, split):
                    found = forward(model, split)
                    loss = found.square().sum() / expected.numel()
                    (grad,) = torch.autograd.grad(loss, weight)
                dist.all_reduce(grad)
                cases.same(found, split.take(expected, rank, 1))
                cases.same(grad, truth)
    decoded_cases(cases, models, MODELS | scored, ids, forward)
    model, split = models[""], Split.over(None, LENGTH)
    with dynmask.sparsify(model, Streaming(sinks=2, window=9)) as run:
        with cases.case("refuses: padding"), context_parallel(run, split):
            mask = torch.ones(2, split.size(rank), dtype=torch.long)
            mask[0, :3] = rank
            forward(model, split, attention_mask=mask)
        with cases.case("refuses: tokens"), context_parallel(run, split):
            model(ids[:, :9], use_cache=False)
        with cases.case("refuses: cache"), context_parallel(run, split):
            forward(model, split, past_key_values=dynmask.BoundedCache(run), use_cache=True)
        model.config.num_hidden_layers += 1  # as if one had no attention
        with cases.case("refuses: hybrid"), context_parallel(run, split):
            pass
        model.config.num_hidden_layers -= 1
        twice = context_parallel(run, split), context_parallel(run, split)
        with cases.case("refuses: twice"), twice[0], twice[1]:
            pass


@torch.no_grad()
def decoded_cases(cases, models, policies, ids, forward):
    """The tokens that follow a prompt which was read in parallel, and the cache they come from."""
    for name, policy in policies.items():
        model = models["mistral " if name == "streaming" else ""]
        split = Split.over(None, LENGTH, balanced=name != "gated")
        with cases.case(f"decoded {name}"), dynmask.sparsify(model, policy) as run:
            kept, cache = (DynamicCache(config=model.config) for _ in range(2))
            more = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
            expected = model.generate(ids, past_key_values=kept, **more).sequences
            with context_parallel(run, split, cache=cache):
                logits = forward(model, split, logits_to_keep=1)
            token = last_position(logits, split).argmax(-1)
            more["max_new_tokens"] -= 1
            whole = torch.cat([ids, token], 1)
            found = model.generate(whole, past_key_values=cache, **more).sequences
            assert torch.equal(found, expected)
            for own, other in zip(cache.layers, kept.layers, strict=True):
                cases.same(own.keys, other.keys)
                cases.same(own.values, other.values)
    model, split = models[""], Split.over(None, LENGTH)
    cache = DynamicCache(config=model.config)
    with dynmask.sparsify(model, Causal()) as run:
        if cases.rank == 0:  # a rank may leave the others alone with what follows
            with context_parallel(run, split, cache=cache):
                forward(model, split)
        else:
            with context_parallel(run, split):
                forward(model, split)
        with cases.case("decoded on one rank"):
            assert cache.get_seq_length() == (0 if cases.rank else LENGTH)
        if cases.rank:
            cache.update(*[torch.zeros(1, 2, 1, 16)] * 2, 0)
        for what, other in {"kind": StaticCache(model.config, 64), "tokens": cache}.items():
            with cases.case(f"refuses: cache {what}"), context_parallel(run, split, cache=other):
                pass


def tensor_cases(cases, folder):
    """tp_plan="auto": a policy's numbers of single heads are those of the rank's heads."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from dynmask.card import MaskCard
    from dynmask.fingerprints import describe_model

    one: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    split: Any = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
    )
    ids = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(ids)
    ones[0, :5] = 0
    with cases.case("tensor card"):
        assert describe_model(split) == describe_model(one)
    window = torch.tensor([[2, 30, 7, 4], [3, INF, 5, 6]], dtype=torch.int32)
    columns = torch.tensor([[3, 0, 0, 5], [0, 0, 2, 1]], dtype=torch.int32)
    keep = Gated(sinks=2, last=5, gates=Gates(window, columns, torch.zeros(2, 4)), decode="keep")
    width = ((9, 20), (12, 8))
    policies = {
        "full": (Causal(), None),
        "dam": (MaskCard.from_pretrained(f"{folder}/card").policy(), None),
        "dam_group": (MaskCard.from_pretrained(f"{folder}/card").policy(share_group=True), None),
        "elastic": (Elastic(((1, 5, 9, 2), (3, 3, 8, 20)), 0.1, 2, 1), None),
        "gated": (keep, dynmask.GatedCache),
        "gated_scores": (gated_by_score(), dynmask.GatedCache),
        "gated_slashes": (gated_by_slashes(), None),
        "retained": (Retained(pair_scores(), width, 5, 2), dynmask.BoundedCache),
    }
    for name, (policy, cache) in policies.items():
        with cases.case(f"tensor {name}"):
            results = []
            for model in (one, split):
                with torch.no_grad(), dynmask.sparsify(model, policy, measure=True) as run:
                    logits = model(ids, attention_mask=ones, use_cache=False).logits
                    density = run.summary()["prefill"]["density_per_head"]
                    own = {} if cache is None else {"past_key_values": cache(run)}
                    tokens = model.generate(
                        ids, attention_mask=ones, max_new_tokens=4, do_sample=False, **own
                    )
                results.append((logits[ones.bool()], tokens, density))
            (expected, text, all_heads), (found, same_text, own_heads) = results
            cases.same(found, expected)
            assert torch.equal(text, same_text)
            at = slice(2 * cases.rank, 2 * cases.rank + 2)
            for layer, own in zip(all_heads, own_heads, strict=True):
                assert own == pytest.approx(layer[at])
    with cases.case("tensor whole attention"), torch.no_grad():
        results = []
        for more in ({}, {"distributed_config": DistributedConfig(tp_plan="auto")}):
            olmo: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/olmo", **more)
            with dynmask.sparsify(olmo, policies["elastic"][0]) as run:
                results.append(olmo(ids).logits)
                assert run.shard == (0, 1)
        cases.same(results[1], results[0])
    with cases.case("refuses: scores of all values"):
        dynmask.sparsify(split, POLICIES["retained"])


def tiny_olmo2():
    """Its plan splits the weights of attention and gathers the heads again."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from tests.tiny import tiny_llama

    llama = tiny_llama().config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "initializer_range", "pad_token_id")
    shape = {name: getattr(llama, name) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Olmo2ForCausalLM(Olmo2Config(**shape, eos_token_id=None))


def all_cases(cases, folder):
    context_cases(cases)
    model_cases(cases)
    tensor_cases(cases, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found: a list of dictionaries from cases to differences or errors."""
    from dynmask.calibrate import DamSettings, calibrate
    from tests.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_llama()
    model.save_pretrained(folder / "model")
    tiny_olmo2().save_pretrained(folder / "olmo")
    texts = [
        torch.randint(2, 256, (12,), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    settings = DamSettings(length=12, min_support=4)
    calibrate(model, texts, settings=settings, progress=False).save_pretrained(folder / "card")
    return found_by(all_cases, folder)


def test_two_ranks_are_one_process(found):
    for cases in found:
        results = {k: v for k, v in cases.items() if not k.startswith("refuses")}
        assert len(results) == 65
        wrong = {k: v for k, v in results.items() if not isinstance(v, float) or v > TOLERANCE}
        assert not wrong


REFUSALS = {
    "dims": (r"ranks: query sizes.*\[1, 2, 4\].*", r"ranks: query sizes.*\[1, 2, 5\]"),
    "positions": ("fit on all of them, received a refusal by rank 1", r"query: expected .*3 pos"),
    "mask": ("mask: expected one of 5 queries", "a refusal by rank 0"),
    "gradient": ("ranks: key bytes a number",) * 2,
    "dtype": ("ranks: key bytes a number",) * 2,
    "ranks": (r"split: expected one for the 2 ranks.*Split\.over",) * 2,
    "bias": ("ranks: bias sizes",) * 2,
    "padding": ("without padding, received padded", "a refusal by rank 0"),
    "tokens": ("18 positions of rank 0.*9 queries", "19 positions of rank 1.*9 queries"),
    "cache": ("and no cache",) * 2,
    "cache kind": ("cache: expected an empty DynamicCache, received StaticCache",) * 2,
    "cache tokens": ("cache: expected an empty DynamicCache, received one with tokens",) * 2,
    "hybrid": ("model: expected attention in each of 3 layers, received attention in 2",) * 2,
    "twice": ("run: expected one in effect, not in a context yet",) * 2,
    "scores of all values": ("PairScore.*received ValueScore",) * 2,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_ranks_that_disagree_all_refuse(found, name):
    for cases, message in zip(found, REFUSALS[name], strict=True):
        error = cases[f"refuses: {name}"]
        assert isinstance(error, str) and error.startswith("ValueError"), error
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)
