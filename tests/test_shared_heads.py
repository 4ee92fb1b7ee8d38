"""Attention that is called with a run of heads: DeepSpeed Ulysses, and converted models.

Two ranks hold half of the positions each; around the registered attention, positions are joined
and heads are parted. DeepSpeed does that where it is installed, and a stand-in everywhere.
"""

import os
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dynmask
from dynmask.distributed import Split, gather, share_heads
from dynmask.integrations.checks import attention_modules
from dynmask.nn import collect_retention_loss
from dynmask.policies import Elastic, Gated, Retained, Streaming, VerticalSlash
from dynmask.policies.gates import Gates
from tests.ranks import INF, RANKS, TOLERANCE, found_by
from tests.tiny import tiny_llama

LENGTH, BATCH = 36, 2
CONVERT: dict[str, Any] = {"width": (9, 14), "window": 3, "sinks": 1, "retention_after": 4}


def ids():
    return torch.randint(3, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def gated():
    window = torch.tensor([[2, 30, 7, 4], [3, INF, 5, 6]], dtype=torch.int32)
    columns = torch.tensor([[3, 0, 0, 5], [0, 0, 2, 1]], dtype=torch.int32)
    return Gated(sinks=2, last=5, gates=Gates(window, columns, torch.zeros(2, 4)))


POLICIES = {
    "streaming": Streaming(sinks=2, window=9),
    "vertical_slash": VerticalSlash(verticals=8, slashes=12, last=7, sinks=2, window=4),
    "elastic": Elastic(((1, 5, 9, 2), (3, 3, 8, 20)), 0.1, 2, 1),
    "gated": gated(),
}


# what stands around attention


@contextmanager
def stand_in(model):
    """Each rank computes its heads of all positions, and gives every rank its positions back."""
    name, rank = model.config._attn_implementation, dist.get_rank()
    core = ALL_ATTENTION_FUNCTIONS[name]

    def exchanged(x, joined, parted):
        whole = gather(x, Split(x.shape[joined] * RANKS, RANKS), dim=joined)
        return whole.chunk(RANKS, parted)[rank]

    def attend(module, query, key, value, attention_mask, **more):
        ids = more.pop("position_ids")
        more["position_ids"] = gather(ids, Split(LENGTH, RANKS), dim=1)
        out, _ = core(module, *(exchanged(x, 2, 1) for x in (query, key, value)), None, **more)
        return exchanged(out, 2, 1), None

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def deepspeed(model):
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    name = model.config._attn_implementation
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=name, sequence_parallel_size=RANKS,
        micro_batch_size=BATCH, seq_length_is_variable=True,
    )  # fmt: skip
    assert parallel_state_sp.get_sequence_parallel_world_size() == RANKS
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        parallel_state_sp._release_sequence_parallel_groups()  # it takes one model a process


# what a rank does


def scored(model):
    """Converted, with scores that are alike on all ranks and far from ties."""
    torch.manual_seed(3)
    dynmask.convert(model, **CONVERT)
    for module in model.modules():
        if hasattr(module, "dt_proj"):
            module.A.data = torch.tensor([1.5, -2.0])
    return model


def tensor_cases(cases, folder):
    """A converted model under tp_plan: the logits and tokens of one process."""
    converted = scored(tiny_llama())
    if cases.rank == 0:
        converted.save_pretrained(f"{folder}/converted")
        tiny_llama().save_pretrained(f"{folder}/model")
    dist.barrier()
    split: Any = dynmask.load_converted(
        f"{folder}/converted",
        distributed_config=DistributedConfig(tp_plan="auto"),
        dtype=torch.float32,
    )
    expected = converted(ids(), use_cache=False).logits
    with torch.no_grad(), cases.case("tensor"):
        cases.same(split(ids(), use_cache=False).logits, expected)
        text = [
            model.generate(ids(), max_new_tokens=5, do_sample=False, **more)
            for model in (converted, split)
            for more in ({}, {"past_key_values": dynmask.BoundedCache(model)})
        ]
        assert all(torch.equal(x, text[0]) for x in text)
    with cases.case("tensor drawn"):  # fresh scores are the same on all ranks
        torch.manual_seed(cases.rank)
        plain: Any = AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", distributed_config=DistributedConfig(tp_plan="auto")
        )
        dynmask.convert(plain, **CONVERT)
        own = plain.model.layers[0].self_attn.dynmask_score.dt_proj.weight.detach()
        every = gather(own[None], Split(RANKS, RANKS), dim=0)
        cases.same(every[0], every[1])
    with cases.case("refuses: training"):
        split.train()(ids(), use_cache=False)


def ulysses_cases(cases, _, around):
    split, rank = Split.over(None, LENGTH), cases.rank

    def forward(model, positions=None):
        positions = torch.arange(LENGTH)[None] if positions is None else positions
        return model(
            input_ids=split.take(ids(), rank, 1), position_ids=split.take(positions, rank, 1),
            use_cache=False,
        ).logits  # fmt: skip

    def compare(expected, found, model, *others):
        """Logits of the rank's positions, and all gradients, of a sum of weighted logits."""
        names, weights = zip(*model.named_parameters(), strict=True)
        target = torch.linspace(-1, 1, expected.numel()).view_as(expected) / expected.numel()
        (loss, *extra), (part, *own) = [
            [(x * y).sum(), *z]
            for x, y, z in zip(
                (expected, found), (target, split.take(target, rank, 1)), others, strict=True
            )
        ]
        cases.same(found, split.take(expected, rank, 1))
        truth = torch.autograd.grad(sum([loss, *extra]), weights, retain_graph=True)
        grads = torch.autograd.grad(sum([part, *(x / RANKS for x in own)]), weights)
        for name, grad, wanted in zip(names, grads, truth, strict=True):
            dist.all_reduce(grad)
            assert wanted.abs().sum() > 0, name
            cases.same(grad, wanted)

    model = tiny_llama().train()
    for name, policy in POLICIES.items():
        with cases.case(f"ulysses {name}"), dynmask.sparsify(model, policy) as run:
            expected = model(ids(), use_cache=False).logits
            share_heads(run)
            with around(model):
                compare(expected, forward(model), model, [], [])
    elastic = dynmask.sparsify(model, POLICIES["elastic"])
    with elastic, around(model), cases.case("refuses: heads"):
        forward(model)
    with dynmask.sparsify(model, POLICIES["streaming"]), around(model):
        with cases.case("ulysses without a word"):  # all heads are alike to it
            forward(model)
        with cases.case("refuses: packed"):
            forward(model, torch.arange(LENGTH).remainder(20)[None])
    with dynmask.sparsify(model, retained()) as run, around(model):
        share_heads(run)
        with cases.case("refuses: rotation"):
            forward(model)
        with cases.case("refuses: twice"):
            share_heads(run)
    with cases.case("refuses: plain"):
        share_heads(model)
    scored(model)
    with cases.case("ulysses converted"):
        torch.manual_seed(2)  # the rows of the retention loss
        expected = model(ids(), use_cache=False).logits
        lesson = collect_retention_loss(model)
        with around(model):
            with cases.case("refuses: scores"):
                forward(model)
            share_heads(model)
            torch.manual_seed(2)
            found = forward(model)
            compare(expected, found, model, [lesson], [collect_retention_loss(model)])


def retained():
    from tests.test_distributed import pair_scores

    return Retained(pair_scores(), width=((9, 30), (12, 12)), window=5, sinks=2)


def all_cases(cases, folder):
    tensor_cases(cases, folder)
    ulysses_cases(cases, folder, stand_in)


def deepspeed_cases(cases, folder):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed as package

    package.init_distributed("gloo")
    ulysses_cases(cases, folder, deepspeed)


def right(cases, number):
    results = {k: v for k, v in cases.items() if not k.startswith("refuses")}
    assert len(results) == number
    assert not {k: v for k, v in results.items() if not isinstance(v, float) or v > TOLERANCE}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(all_cases, tmp_path_factory.mktemp("ranks"))


def test_runs_of_heads_are_all_heads(found):
    for cases in found:
        right(cases, len(POLICIES) + 4)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed")
def test_deepspeed_ulysses_is_one_process(tmp_path):
    for cases in found_by(deepspeed_cases, tmp_path):
        right(cases, len(POLICIES) + 2)


REFUSALS = {
    "training": r"no_grad\(\), or scores without gradients, under tp_plan",
    "heads": r"heads: expected attention of 4 heads on this rank, received 2.*share_heads",
    "packed": "position_ids: expected one sequence in each row",
    "rotation": "keys before rotation: expected those of the layer's 18 tokens",
    "twice": "whose heads are not shared yet",
    "plain": "or a converted model, received LlamaForCausalLM",
    "scores": r"attention: expected 2 kv heads on this process, received 1.*share_heads",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_heads_that_are_not_as_expected_are_refused(found, name):
    for cases in found:
        with pytest.raises(ValueError, match=REFUSALS[name]):
            raise ValueError(cases[f"refuses: {name}"])


def test_heads_are_not_shared_without_a_process_group():
    run = dynmask.sparsify(tiny_llama(), Streaming())
    with run, pytest.raises(ValueError, match="init_process_group"):
        share_heads(run)


def test_a_cache_that_was_made_before_heads_were_shared_is_refused():
    from dynmask.integrations.placement import Placement

    with dynmask.sparsify(tiny_llama(), Gated(window=9, columns=0, decode="select")) as run:
        cache, module = dynmask.GatedCache(run), next(iter(attention_modules(run.model)))
        half, where = torch.zeros(1, 1, 20, 16), Placement.dense(1, 20, 20, None)  # a rank's heads
        with pytest.raises(ValueError, match=r"2 kv heads, as when .* after .*share_heads"):
            cache.arrived(module, cache.layers[0], where, True, half, half)
