"""The gated policy: what its gates let through, and budgets chosen by their effect."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import dynmask
from dynmask import BlockMask, Budget, GatedSettings, LifetimeMask, MaskCard
from dynmask.budgets import WITH_BLOCKS, calibrate_gates, choose_gates
from dynmask.cli.common import policy_label
from dynmask.encoder import block_estimate
from dynmask.judge import Judge, digest_of, measure
from dynmask.masks import MixedMask
from dynmask.masks.base import repeat_heads
from dynmask.policies import Gated, parse
from dynmask.policies.base import Layer
from dynmask.policies.blocks import block_lists
from dynmask.policies.gated import spread
from dynmask.policies.gates import Gates
from dynmask.policies.kept import kept_mass, sampled_rows
from tests.tiny import copied, tiny_llama, tiny_qwen3

INF = LifetimeMask.INF


def tensors(keys, queries, batch=2, heads=4, groups=2, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(batch, heads, queries, dim, generator=g),
        2 * torch.randn(batch, groups, keys, dim, generator=g),
        torch.randn(batch, groups, keys, dim, generator=g),
    )


def gates_of(window, columns, share=None, blocks=None):
    window = torch.tensor(window, dtype=torch.int32)
    share = torch.zeros(window.shape) if share is None else torch.tensor(share)
    blocks = torch.zeros(window.shape).int() if blocks is None else torch.tensor(blocks).int()
    return Gates(window, torch.tensor(columns, dtype=torch.int32), share, blocks)


def naive(policy, query, key, window, columns, first_key=0):
    """The rule of one map, key by key: bool [queries, keys]."""
    queries, keys = len(query), len(key)
    last = min(policy.last, queries)
    worth = [0.0] * keys
    for row in range(queries - last, queries):
        q = keys - queries + row
        logits = key[: q + 1] @ query[row] * len(query[row]) ** -0.5
        for k, p in enumerate(logits.softmax(0).tolist()):
            if k <= q - window:
                worth[k] = max(worth[k], p)
    sinks = max(policy.sinks - first_key, 0)
    order = sorted(range(sinks, keys), key=lambda k: -worth[k])
    chosen = {k for k in order[:columns] if worth[k] >= policy.least}
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        q = keys - queries + row
        for k in range(q + 1):
            seen[row, k] = k > q - window or k < sinks or k in chosen
    return seen


@given(
    keys=st.integers(1, 60),
    queries=st.integers(1, 60),
    last=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_map_reads_its_own_window_sinks_and_columns(keys, queries, last, seed):
    queries = min(queries, keys)
    query, key, value = tensors(keys, queries, seed=seed)
    window, columns = [[3, 7, 1, INF if seed % 2 else 2]], [[2, 6, 5, 0]]
    policy = Gated(sinks=2, last=last, least=1e-4, gates=gates_of(window, columns))
    mask = policy(query, key, value, Layer(0))
    found = mask.expand(2).dense()
    assert found.sum(-1).max() <= mask.most <= keys  # the fused lowering sizes its lists by it
    wide = repeat_heads(key, 4)
    for b in range(2):
        for h in range(4):
            expected = naive(policy, query[b, h], wide[b, h], window[0][h], columns[0][h])
            got = found[b, h] if found.shape[1] > 1 else found[b, 0]
            assert torch.equal(got, expected), (b, h)


def test_a_key_that_nobody_looks_at_is_no_column():
    query, key, value = tensors(50, 50)
    few = Gated(sinks=0, window=4, columns=40, least=0.3, last=4)
    seen = few(query, key, value, Layer(0)).dense()
    window = LifetimeMask.window(50, 4).dense()
    extra = (seen & ~window).any(-2).sum(-1)
    assert int(extra.max()) <= 12  # each of four rows gives at most three keys so much
    none = Gated(sinks=0, window=4, columns=40, least=1.0)(query, key, value, Layer(0)).dense()
    assert torch.equal(none, window.expand_as(none))


def test_pooling_reads_the_neighbours_of_what_is_looked_at():
    query, key, value = tensors(60, 60, batch=1, heads=1, groups=1)
    key[0, 0, 20] = 40 * query[0, 0, -1]  # the last row looks at key 20 alone
    alone = Gated(sinks=0, window=4, columns=3, least=0.9, last=1)
    lasting = (alone(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == [20]
    pooled = Gated(sinks=0, window=4, columns=3, least=0.9, last=1, pool=3)
    lasting = (pooled(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == [19, 20, 21]
    key[0, 0, 20], key[0, 0, 56] = 0, 40 * query[0, 0, -1]
    lasting = (pooled(query, key, value, Layer(0)).death[0, 0] == INF).nonzero().flatten()
    assert lasting.tolist() == []  # in the window already, and so is what lies beside it


def test_columns_grow_with_the_input_by_their_share():
    gates = gates_of([[4, 4]], [[3, 3]], [[0.0, 0.25]])
    assert gates.of(0, 40, 8)[1].tolist() == [3, 13]
    assert gates.of(0, 8, 8)[1].tolist() == [3, 5]
    query, key, value = tensors(40, 40, heads=2)
    mask = Gated(sinks=0, least=0.0, gates=gates)(query, key, value, Layer(0))
    lasting = (mask.death == INF).sum(-1)
    assert lasting.tolist() == [[3, 13], [3, 13]]


def test_sinks_that_a_cache_has_dropped_are_not_other_keys():
    query, key, value = tensors(30, 30)
    mask = Gated(sinks=6, window=3, columns=0)(query, key, value, Layer(0, first_key=4))
    assert (mask.death[..., :2] == INF).all() and (mask.death[..., 2:] < INF).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": torch.zeros(1, 2, dtype=torch.int32)}, "window: expected numbers of at least"),
        ({"columns": torch.zeros(1, 2)}, "columns: expected torch.int32"),
        ({"share": torch.zeros(2, 2)}, "share: expected torch.float32"),
        ({"columns": -torch.ones(1, 2, dtype=torch.int32)}, "columns: expected numbers"),
    ],
)
def test_gates_that_make_no_sense_are_refused(change, message):
    good = {"window": torch.ones(1, 2, dtype=torch.int32), "share": torch.zeros(1, 2)}
    good["columns"] = good["window"].clone()
    with pytest.raises(ValueError, match=message):
        Gates(**{**good, **change})


@pytest.mark.parametrize("field", ["window=0", "pool=2", "least=2", "share=-1", "last=0"])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"gated: expected {field.split('=')[0]}"):
        parse(f"gated:{field}")


def test_gates_of_another_model_are_refused():
    policy = Gated(gates=Gates.full(3, 4))
    with pytest.raises(ValueError, match="gates for 2 layers of 4 heads"):
        dynmask.sparsify(tiny_llama(), policy)


@pytest.mark.parametrize("spec", ["gated:colums=3", "gated:columns=3,windw=9"])
def test_a_misspelt_field_is_told_as_one_and_a_path_as_a_path(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="policy gated: expected fields sinks, window, .* receiv"):
        parse(spec)
    (tmp_path / spec.partition(":")[2]).write_text("a file of this name is a card, if a bad one")
    for there in (spec, "gated:runs/colums=3", "gated:cards"):
        with pytest.raises(ValueError, match="mask card: expected"):
            parse(there)


# ---------------------------------------------------------------------------------- blocks of keys

BLOCK = {"block": 8, "query_pool": 4, "key_pool": 2}


def naive_blocks(scores, keys, queries, window, sinks, blocks):
    """The rule of one map that chooses blocks, by scores [blocks, blocks]: bool [queries, keys]."""
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for q in range(keys - queries, keys):
        number = q // 8
        first = max(number * 8, keys - queries)  # the block's first row that is there
        anyway = {k // 8 for k in range(first + 1) if k > first - window or k < sinks} | {number}
        rest = [j for j in range(number + 1) if j not in anyway]
        row = scores[number - (keys - queries) // 8]
        chosen = sorted(rest, key=lambda j: -float(row[j]))[:blocks]
        for k in range(q + 1):
            seen[q - keys + queries, k] = k // 8 in anyway or k // 8 in chosen
    return seen


@given(
    keys=st.integers(1, 90),
    queries=st.integers(1, 90),
    sinks=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_maps_of_several_kinds_read_what_each_alone_would(keys, queries, sinks, seed):
    queries = min(queries, keys)
    query, key, value = tensors(keys, queries, seed=seed)
    kinds = [([3, 7, 1, 9], [2, 0, 0, 5], [0, 2, 3, 0]), ([3, 7, 1, 9], [0] * 4, [1, 2, 3, 1])]
    window, columns, blocks = kinds[seed % 2]
    gates = gates_of([window], [columns], blocks=[blocks])
    policy = Gated(sinks=sinks, last=5, least=1e-4, gates=gates, **BLOCK)
    mask = policy(query, key, value, Layer(0))
    found = repeat_heads(mask.expand(2).dense(), 4)
    scores = block_estimate(query, key, **BLOCK)
    wide = repeat_heads(key, 4)
    for b in range(2):
        for h in range(4):
            if blocks[h]:
                args = keys, queries, window[h], sinks, blocks[h]
                expected = naive_blocks(scores[b, h], *args)
            else:
                expected = naive(policy, query[b, h], wide[b, h], window[h], columns[h])
            assert torch.equal(found[b, h], expected), (b, h)
    out = dynmask.attention(query, key, value, mask)
    torch.testing.assert_close(out, dynmask.attention(query, key, value, mask, impl="reference"))
    if isinstance(mask, MixedMask):  # nothing is computed for heads of the other kind
        for number, part in enumerate(mask.parts):
            others = [head for head in range(4) if mask.of[head] != number]
            assert not part.dense()[:, others].any()


def test_a_layer_of_blocks_alone_is_a_block_mask_and_one_that_reads_all_is_causal():
    query, key, value = tensors(90, 90)
    gates = gates_of([[9, 9, 5, 5]], [[0] * 4], blocks=[[2, 3, 2, 1]])
    mask = Gated(sinks=2, gates=gates, **BLOCK)(query, key, value, Layer(0))
    assert isinstance(mask, BlockMask) and int((mask.index >= 0).sum(-1).max()) == 6
    every = gates_of([[9, 9, 5, 90]], [[0] * 4], blocks=[[11, 12, 99, 0]])
    assert Gated(sinks=2, gates=every, **BLOCK)(query, key, value, Layer(0)).is_causal
    alike = Gated(sinks=2, window=9, columns=0, blocks=2, **BLOCK)(query, key, value, Layer(0))
    assert torch.equal(alike.dense()[:, 0], mask.dense()[:, 0])


@pytest.mark.parametrize("window", [1, 2, 8, 9, 16, 17, 30])
@pytest.mark.parametrize("queries", [1, 7, 83, 90])
def test_no_list_of_blocks_is_longer_than_it_is_said_to_be(window, queries, monkeypatch):
    """On a GPU lists have the length that is announced, and what is beyond is lost."""
    said, real = [], block_lists

    def spy(*given):
        said.append(given[-1])
        return real(*given)

    monkeypatch.setattr("dynmask.policies.blocks.block_lists", spy)
    query, key, value = tensors(90, queries)
    policy = Gated(sinks=9, window=window, columns=0, blocks=3, **BLOCK)
    mask = policy(query, key, value, Layer(0))
    longest = int((mask.index >= 0).sum(-1).max())
    assert longest <= said[0] <= longest + 2


def test_blocks_grow_with_the_input_by_their_share():
    gates = gates_of([[4, 4]], [[0, 3]], [[0.1, 0.1]], [[2, 0]])
    assert [x.tolist() for x in gates.of(0, 160, 8)] == [[4, 4], [0, 19], [4, 0], [0, 0], [0, 0]]
    assert [x.tolist() for x in gates.of(0, 8, 8)] == [[4, 4], [0, 3], [1, 0], [0, 0], [0, 0]]


def test_few_scores_at_a_time_choose_the_same_blocks(monkeypatch):
    query, key, value = tensors(90, 85)
    gates = gates_of([[9, 9, 5, 5]], [[0, 4, 0, 0]], blocks=[[2, 0, 2, 1]])
    policy = Gated(sinks=2, gates=gates, **BLOCK)
    before = policy(query, key, value, Layer(0)).dense()
    monkeypatch.setattr("dynmask.policies.blocks.NUMBERS_AT_A_TIME", 40)
    assert torch.equal(policy(query, key, value, Layer(0)).dense(), before)


def test_sinks_that_a_cache_has_dropped_are_no_blocks():
    query, key, value = tensors(40, 1, batch=1)
    policy = Gated(sinks=9, window=3, columns=0, blocks=1, **BLOCK)
    blocks = [
        policy(query, key, value, Layer(0, first_key=first)).dense()[0, 0, 0].unflatten(0, (5, 8))
        for first in (0, 4, 9)
    ]
    assert [int(x.any(1).sum()) for x in blocks] == [4, 3, 2]


def test_a_map_of_blocks_is_widened_by_the_guard_and_dense_as_blocks():
    query, key, value = tensors(200, 150)
    gates = gates_of([[4, 4, 5, 5]], [[0, 3, 0, 0]], blocks=[[1, 0, 1, 2]])
    promise = torch.tensor([[1.0, 0.0, 0.7, 0.0]])
    mask, [(_, factor)] = promised(query, key, value, gates, promise, 0.0, **BLOCK)
    assert (factor[:, 0] == 0).all() and (factor[:, 2] > 1).all() and (factor[:, 1::2] == 1).all()
    found = mask.dense()
    assert torch.equal(found[:, 0], torch.ones(150, 200).tril(50).bool().expand(2, -1, -1))
    for b in range(2):
        wide = gates_of([[5 * int(factor[b, 2])] * 4], [[0] * 4], blocks=[[int(factor[b, 2])] * 4])
        alone = Gated(sinks=1, gates=wide, **BLOCK)(query, key, value, Layer(0)).dense()
        assert torch.equal(found[b, 2], alone[b, 2])
    assert (kept_mass(query, key, mask, sampled_rows(150, 16)).mean(-1) >= promise - 1e-6).all()


MIXED = gates_of(
    [[24, 5, 6, 6], [6, 6, 9, 12]], [[9, 0, 0, 3], [0] * 4], blocks=[[0, 2, 1, 0], [2, 1, 1, 1]]
)


@torch.no_grad()
def test_padded_batches_of_mixed_layers_are_each_sequence_alone():
    model, policy = tiny_llama(), Gated(sinks=1, last=8, gates=MIXED, **BLOCK)
    ids = torch.stack(documents(70, 70, 70))
    ids[1] = ids[1].flip(0)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    more = {"max_new_tokens": 3, "do_sample": False}
    more |= {"output_logits": True, "return_dict_in_generate": True}
    with dynmask.sparsify(model, policy, measure=True) as run:
        both = model.generate(ids * mask, attention_mask=mask, **more)
        assert 0 < run.summary()["prefill"]["density"] < 1
        for row, pad in enumerate((11, 0, 0)):
            alone = model.generate(ids[row : row + 1, pad:], **more)
            for a, b in zip(both.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-4, atol=1e-4)


def test_columns_beside_blocks_are_refused():
    with pytest.raises(ValueError, match="columns or blocks.*Pass columns=0"):
        parse("gated:blocks=4")
    with pytest.raises(
        ValueError,
        match="columns, blocks or kept of a map, received columns and blocks for layer 0",
    ):
        gates_of([[3, 3]], [[0, 2]], blocks=[[1, 1]])
    with pytest.raises(ValueError, match="query_pool that divides 64"):
        Gated(query_pool=3)
    assert parse("gated:columns=0,blocks=4").blocks == 4


# -------------------------------------------------------------------------------------- soft masks


@pytest.mark.parametrize(("keys", "queries", "pool"), [(50, 50, 1), (41, 17, 3), (30, 1, 1)])
def test_a_columns_bias_is_its_worth_beside_that_of_the_best(keys, queries, pool):
    query, key, value = tensors(keys, queries)
    gates = gates_of([[3, 7, 4, INF]], [[5, 9, 0, 0]])
    policy = Gated(sinks=2, last=5, least=1e-3, pool=pool, gates=gates, soft=True, strength=0.5)
    mask, bias = policy.biased(query, key, value, Layer(0))
    hard = replace(policy, soft=False)
    assert torch.equal(mask.death, hard(query, key, value, Layer(0)).death)
    assert hard.biased(query, key, value, Layer(0))[1] is None
    columns = mask.death == INF
    columns[..., :2] = False
    columns &= (torch.tensor([3, 7, 4, INF]) < INF)[:, None]
    assert not bias[~columns].any() and (bias[columns] <= 0).all()
    plain = Gated(sinks=2, last=5, least=1e-3, pool=pool, gates=gates)
    for b in range(2):
        for h in range(2):
            own = columns[b, h].nonzero().flatten()
            chosen, worth = plain._columns(query, key, gates.window[0].view(1, 4, 1), 0, 9)
            table = dict(zip(chosen[b, h].tolist(), worth[b, h].tolist(), strict=True))
            best = max(table[k] for k in own.tolist())
            expected = torch.tensor([0.5 * math.log(table[k] / best) for k in own.tolist()])
            torch.testing.assert_close(bias[b, h, own], expected, rtol=1e-4, atol=1e-5)
    out = dynmask.attention(query, key, value, mask, bias).double()
    logits = query.double() @ repeat_heads(key, 4).double().mT * 8**-0.5 + bias[:, :, None]
    share = logits.masked_fill(~mask.dense(), -math.inf).softmax(-1)
    torch.testing.assert_close(out, share @ repeat_heads(value, 4).double(), rtol=1e-4, atol=1e-4)


def test_worthless_columns_have_a_finite_bias():
    query, key, value = tensors(40, 40)
    policy = Gated(sinks=0, window=60, columns=9, least=0.0, last=4, soft=True)
    gates = gates_of([[39, 39, 39, 39]], [[9, 9, 9, 9]])
    for some in (replace(policy, window=39), replace(policy, gates=gates)):
        _, bias = some.biased(query * 100, key, value, Layer(0))
        assert torch.isfinite(bias).all()


@torch.no_grad()
def test_soft_masks_act_in_a_model_and_padded_batches_are_each_sequence_alone():
    gates = gates_of([[4, 5, INF, 6], [60, 60, 60, 60]], [[9, 3, 0, 3], [0] * 4])
    model, policy = tiny_llama(), Gated(sinks=1, last=8, gates=gates, soft=True, strength=2.0)
    ids = torch.stack(documents(70, 70))
    ids[1] = ids[1].flip(0)
    mask = torch.ones_like(ids)
    mask[0, :67] = 0  # so short that nothing is left out, and nothing biased
    mask[1, :3] = 0
    found = {}
    for name, some in {
        "soft": policy, "hard": replace(policy, soft=False), "none": replace(policy, strength=0.0)
    }.items():  # fmt: skip
        with dynmask.sparsify(model, some):
            found[name] = model(ids * mask, attention_mask=mask).logits
            alone = [model(ids[row : row + 1, pad:]).logits[0] for row, pad in ((0, 67), (1, 3))]
        for row, pad in ((0, 67), (1, 3)):
            torch.testing.assert_close(found[name][row, pad:], alone[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["hard"], found["none"], rtol=1e-4, atol=1e-4)
    assert (found["soft"] - found["hard"])[1, 3:].abs().max() > 0.01


def test_soft_masks_of_blocks_or_kept_columns_are_refused():
    with pytest.raises(ValueError, match="soft: expected maps that choose columns"):
        Gated(gates=MIXED, soft=True)
    with pytest.raises(ValueError, match="soft: expected decode='full' or 'select'"):
        Gated(decode="keep", soft=True)
    with pytest.raises(ValueError, match="strength finite and >= 0"):
        Gated(strength=-1)
    with pytest.raises(ValueError, match="budgets without blocks.*budgets.BUDGETS"):
        GatedSettings(soft=True, budgets=WITH_BLOCKS)


# -------------------------------------------------------------------------------------- the guard


def promised(query, key, value, gates, promise, guard=0.1, **more):
    """A guarded policy, its mask, and what it told."""
    told = []
    policy = Gated(sinks=1, last=8, gates=gates, promise=promise, guard=guard, **more)
    layer = Layer(0, tell=lambda what, factor: told.append((what, factor)))
    return policy(query, key, value, layer), told


@pytest.mark.parametrize("seed", range(4))
def test_a_map_is_widened_until_it_keeps_what_was_promised_and_no_further(seed):
    query, key, value = tensors(64, 40, seed=seed)
    gates = gates_of([[4, 6, 4, 9]], [[0, 3, 2, 0]])
    promise = torch.tensor([[0.3, 0.9, 1.0, 0.7]])
    mask, [(what, factor)] = promised(query, key, value, gates, promise, least=0.0)
    assert what == "widened" and factor.shape == (2, 4)
    rows = sampled_rows(40, 16)
    seen = set()
    for b in range(2):
        for h in range(4):
            window, columns = int(gates.window[0, h]), int(gates.columns[0, h])
            for step in (1, 2, 4, 8, 0):
                if step > 1:
                    wide = [[window * step], [max(window, columns) * step]]
                else:
                    wide = [[window if step else INF], [columns if step else 0]]
                one = Gated(sinks=1, last=8, least=0.0, gates=gates_of([wide[0]], [wide[1]]))
                part = [x[b : b + 1, n : n + 1] for x, n in ((query, h), (key, h // 2))]
                found = one(*part, part[1], Layer(0))
                mass = kept_mass(*part, found, rows).mean()
                if step == 0 or mass >= promise[0, h] - 0.1:
                    break
            assert int(factor[b, h]) == step
            assert torch.equal(mask.dense()[b, h], found.dense()[0, 0])
            seen.add(step)
    assert mask.dense().sum(-1).max() <= mask.most
    assert len(seen) > 1  # some were left alone, some not


def test_what_keeps_its_promise_and_what_is_dense_is_left_alone():
    query, key, value = tensors(64, 64)
    gates = gates_of([[4, 6, 4, INF]], [[0, 3, 2, 0]])
    mask, [(_, factor)] = promised(query, key, value, gates, torch.full((1, 4), 0.05))
    plain = Gated(sinks=1, last=8, gates=gates)(query, key, value, Layer(0))
    assert (factor == 1).all() and torch.equal(mask.death, plain.death)
    high = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    _, [(_, factor)] = promised(query, key, value, gates, high, guard=0.0)
    assert (factor == 1).all()
    _, told = promised(query, key, value, Gates.full(1, 4), high)
    assert not told  # nothing was looked at


@pytest.mark.parametrize("queries", [1, 15])
def test_calls_of_few_rows_are_not_looked_at(queries):
    query, key, value = tensors(64, queries)
    gates = gates_of([[4, 6, 4, 9]], [[0, 3, 2, 0]])
    _, told = promised(query, key, value, gates, torch.ones(1, 4), guard=0.0)
    assert not told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kept_mass_is_that_of_the_whole_attention_map(dtype, monkeypatch):
    query, key, value = (x.to(dtype) for x in tensors(37, 29))
    mask = Gated(sinks=2, window=5, columns=6)(query, key, value, Layer(0))
    rows = sampled_rows(29, 6)
    logits = query.double() @ repeat_heads(key, 4).double().mT * 0.3
    k, q = torch.arange(37), torch.arange(8, 37)[:, None]
    for window in (None, 9):
        hidden = (k > q) | (k <= q - (window or 99))
        true = logits.masked_fill(hidden, -math.inf).softmax(-1)
        expected = (true * mask.dense()).sum(-1)[..., rows]
        for at_once in (2**25, 1):
            monkeypatch.setattr("dynmask.policies.kept.WEIGHTS_AT_A_TIME", at_once)
            found = kept_mass(query, key, mask, rows, 0.3, window)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def guarded_policy(level=0.97, guard=0.05):
    """Some maps of the tiny model keep so much, others do not."""
    gates = gates_of([[24, 24, 6, 6], [6, 24, INF, 12]], [[9, 2, 3, 0], [0, 9, 0, 2]])
    return Gated(sinks=1, last=8, gates=gates, guard=guard, promise=torch.full((2, 4), level))


@torch.no_grad()
def test_padding_and_neighbours_change_nothing_of_what_the_guard_does():
    model, policy = tiny_llama(), guarded_policy()
    ids = torch.stack(documents(50, 50, 50))
    ids[1] = ids[1].flip(0)
    pads = (9, 0, 0)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with pytest.warns(UserWarning, match="guard"), dynmask.sparsify(model, policy) as run:
        out = model(ids * mask, attention_mask=mask).logits
    factors, logits = [], []
    for row, pad in enumerate(pads):
        with pytest.warns(UserWarning, match="guard"), dynmask.sparsify(model, policy) as alone:
            logits.append(model(ids[row : row + 1, pad:]).logits[0])
        factors.append(alone.summary()["guard"])
        torch.testing.assert_close(out[row, pad:], logits[-1], rtol=1e-4, atol=1e-4)
    total = run.summary()["guard"]
    for name in ("maps", "widened", "dense"):
        assert total[name] == sum(found[name] for found in factors)
    assert total["maps"] == 24 and 0 < total["widened"] < 24 and total["dense"] <= total["widened"]
    assert total["share"] == total["widened"] / 24


@torch.no_grad()
def test_the_guard_warns_once_a_run_and_counts_on(recwarn):
    model, ids = tiny_llama(), documents(50)[0][None]
    with dynmask.sparsify(model, guarded_policy()) as run:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        first = run.summary()["guard"]
        model(ids)
        second = run.summary()["guard"]
        run.reset()
        assert "guard" not in run.summary()
        model(ids)
    said = [str(w.message) for w in recwarn if "guard" in str(w.message)]
    assert len(said) == 1 and "heads" in said[0]
    assert first["maps"] == 8 and second["maps"] == 16  # decoding is not looked at
    assert second["widened"] == 2 * first["widened"] > 0
    shares = torch.tensor(second["widened_per_head"])
    assert shares.sum() * 2 == second["widened"] and shares[1, 2] == 0


@torch.no_grad()
def test_dense_is_what_a_promise_of_everything_comes_to():
    model, ids = tiny_llama(), documents(150)[0][None]
    gates = gates_of([[2, 2, 3, INF]] * 2, [[0, 1, 0, 0]] * 2)
    policy = Gated(sinks=0, gates=gates, guard=0.0, promise=torch.ones(2, 4))
    expected = model(ids).logits
    with pytest.warns(UserWarning), dynmask.sparsify(model, policy) as run:
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert run.summary()["guard"]["dense"] == 6  # and two were dense before


def test_an_evaluation_says_how_many_maps_were_widened():
    from dynmask.evals import evaluate
    from dynmask.evals.needle import Needle
    from tests.stand_in import stand_in_model, stand_in_tokenizer

    policies = {"full": None, "guarded": guarded_policy(), "plain": Gated(window=9)}
    with pytest.warns(UserWarning, match="guard"):
        report = evaluate(
            stand_in_model(), stand_in_tokenizer(), policies, Needle(), n=1, length=448,
            timing=False, progress=False,
        )  # fmt: skip
    rows = {row.policy: row for row in report.rows}
    assert 0 < rows["guarded"].widened < 1 and rows["plain"].widened is None
    assert "widened" in report.table()


def test_a_guard_without_a_promise_and_promises_of_another_model_are_refused():
    with pytest.raises(ValueError, match="expected guard with the kept mass"):
        parse("gated:guard=0.1")
    with pytest.raises(ValueError, match=r"guard in \[0, 1\]"):
        Gated(guard=1.5, promise=torch.ones(2, 4))
    with pytest.raises(ValueError, match="promise for 2 layers of 4 heads"):
        dynmask.sparsify(tiny_llama(), Gated(guard=0.1, promise=torch.ones(3, 4)))


# --------------------------------------------------------------------------------------- choosing


PLACES = [(layer, head) for layer in range(3) for head in range(4)]
OFFERED = (Budget(2), Budget(8), Budget(16, 4))


def linear(prices):
    """A cost that adds up: prices [layer, head] of each budget."""

    def cost(gates, most=math.inf):
        total = 0.0
        for layer, head in PLACES:
            window = int(gates.window[layer, head])
            if window != INF:
                number = [b.window for b in OFFERED].index(window)
                total += prices[layer][head][number]
        return total

    return cost


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.floats(0.01, 2))
def test_each_map_gets_a_budget_it_can_afford_and_all_together_stay_within(kinds, allowed):
    """Maps of kind n cost nothing from budget n on, and far too much below."""
    prices = [[[0.0 if i >= kind else 100.0 for i in range(3)] for kind in kinds[4 * n : 4 * n + 4]]
              for n in range(3)]  # fmt: skip
    gates = choose_gates(PLACES, OFFERED, allowed, linear(prices), Gates.full(3, 4))
    expected = [OFFERED[kind].window if kind < 3 else INF for kind in kinds]
    assert gates.window.flatten().tolist() == expected
    assert linear(prices)(gates) <= allowed


def test_few_maps_that_matter_need_few_trials():
    prices = [[[0.0, 0.0, 0.0] for _ in range(4)] for _ in range(3)]
    prices[1][2] = [9.0, 9.0, 9.0]
    trials = []

    def cost(gates, most):
        trials.append(gates)
        return linear(prices)(gates)

    gates = choose_gates(PLACES, OFFERED, 1.0, cost, Gates.full(3, 4))
    assert int(gates.dense.sum()) == 1 and bool(gates.dense[1, 2])
    assert len(trials) <= 10  # 2 log2(12) at the first budget, one at each of the others


def test_small_costs_add_up_to_what_is_allowed_and_no_further():
    prices = [[[0.3, 0.1, 0.0] for _ in range(4)] for _ in range(3)]
    gates = choose_gates(PLACES, OFFERED, 1.2, linear(prices), Gates.full(3, 4))
    assert linear(prices)(gates) <= 1.2
    assert not gates.dense.any()


# ------------------------------------------------------------------------------- on tiny models


def documents(*lengths):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(2, 200, (n,), generator=g) for n in lengths]


SETTINGS = GatedSettings(
    max_kl=0.05, budgets=(Budget(4), Budget(16), Budget(16, 16)), judged=12, sinks=1, last=8
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def card(model):
    return calibrate_gates(model, documents(90, 120), SETTINGS, progress=False)


@pytest.fixture(scope="module")
def sparse(model):
    """A card that leaves much out."""
    settings = GatedSettings(**{**vars(SETTINGS), "max_kl": 5.0})
    return calibrate_gates(model, documents(90, 120), settings, progress=False)


def test_the_divergence_of_a_card_is_measured_and_within_what_was_allowed(model, card):
    assert 0 <= card.header["kl"] <= SETTINGS.max_kl
    judge = Judge(model, documents(90, 120), SETTINGS, 0)
    judge.prepare()
    gates = Gates(*(card.tensors[name] for name in ("window", "columns", "share")))
    assert judge.cost(gates) == pytest.approx(card.header["kl"], rel=1e-4, abs=1e-7)
    assert judge.cost(Gates.full(2, 4)) == pytest.approx(0, abs=1e-6)


def test_a_trial_ends_at_the_first_document_that_refuses(model, sparse):
    judge = Judge(model, documents(90, 120, 60), SETTINGS, 0)
    judge.prepare()
    asked = []
    predict = judge._predict
    sizes = [90, 120, 60]
    judge._predict = lambda index, *rest: asked.append(sizes[index]) or predict(index, *rest)
    gates = sparse.policy().gates
    whole = judge.cost(gates)
    assert sorted(asked) == [60, 90, 120] and whole > 0
    asked.clear()
    assert judge.cost(gates, whole / 1e6) == whole and not asked  # what is known is not measured
    other = gates.replaced(torch.ones(2, 4, dtype=torch.bool), window=3)
    low = judge.cost(other, 1e-9)
    assert low > 1e-9 and asked == [60]
    assert judge.cost(other, low * 0.9) == low and asked == [60]  # enough is known
    full = judge.cost(other)
    assert full >= low and sorted(asked[1:]) == [60, 90, 120]
    fresh = Judge(model, documents(90, 120, 60), SETTINGS, 0)
    fresh.prepare()
    assert fresh.cost(other) == pytest.approx(full, rel=1e-6)
    for most in (low * 0.5, full * 0.99, full * 1.01):
        new = Judge(model, documents(90, 120, 60), SETTINGS, 0)
        new.full = fresh.full
        assert (new.cost(other, most) <= most) == (full <= most)


def test_predictions_that_are_not_numbers_are_refused(model):
    judge = Judge(model, documents(40), SETTINGS, 0)
    judge.prepare()
    judge._predict = lambda *_: judge.full[0] * math.nan
    assert judge.cost(Gates.full(2, 4)) == math.inf


def test_a_model_without_predictions_is_refused_before_any_trial(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(ValueError, match=r"model: expected predictions .* documents\[0\]"):
        calibrate_gates(broken, documents(60), SETTINGS, progress=False)


def test_a_masked_part_of_the_vocabulary_counts_nothing(model):
    judge = Judge(model, documents(40), SETTINGS, 0)
    judge.prepare()
    sparse = Gates.full(2, 4).replaced(torch.ones(2, 4, dtype=torch.bool), window=2)
    plain, inner = judge.cost(sparse), judge._predict

    def masked(*given):
        found = inner(*given)
        return torch.cat([found, found.new_full((len(found), 3), -math.inf)], -1)

    other = Judge(model, documents(40), SETTINGS, 0)
    other._predict = masked
    other.prepare()
    assert other.cost(sparse) == pytest.approx(plain, rel=1e-4) and plain > 0
    judge._predict = lambda *given: inner(*given).masked_fill(judge.full[0] > -3, -math.inf)
    judge.known.clear()
    assert judge.cost(sparse) == math.inf  # what full attention expects is gone


def test_more_divergence_buys_sparser_masks(sparse, card):
    def density(some):
        return sum(map(sum, some.header["density"]))

    assert density(sparse) < density(card)


def test_a_density_can_be_asked_for_instead(model):
    asked = GatedSettings(**{**vars(SETTINGS), "max_kl": 10.0, "density": 0.4})
    found = calibrate_gates(model, documents(90, 120), asked, progress=False)
    assert sum(map(sum, found.header["density"])) / 8 <= 0.4
    assert found.header["settings"]["allowed"] < 10.0


def test_a_density_that_is_out_of_reach_is_told(model):
    asked = GatedSettings(**{**vars(SETTINGS), "max_kl": 1e-6, "density": 0.01})
    with pytest.raises(
        ValueError,
        match=r"settings.density: expected at least [01]\.\d+, which max_kl.*Raise max_kl",
    ):
        calibrate_gates(model, documents(60), asked, progress=False)


def test_a_density_that_the_cheapest_budget_exceeds_is_told(model):
    asked = GatedSettings(**{**vars(SETTINGS), "max_kl": 1e3, "density": 0.001})
    with pytest.raises(ValueError, match="cheapest budget already: judge longer documents"):
        calibrate_gates(model, documents(60), asked, progress=False)


def test_the_policy_of_a_card_is_guarded_by_what_the_card_kept(card):
    policy = card.policy()
    assert policy.guard == SETTINGS.guard is not None
    assert torch.equal(policy.promise, torch.tensor(card.header["least_mass"]))
    assert (policy.promise <= torch.tensor(card.kept_mass) + 1e-6).all()
    assert card.policy(guard=None).guard is None and card.policy(guard=0.5).guard == 0.5
    header = json.loads(json.dumps(card.header))
    for name in ("guard", "block", "encoder", "soft", "rank"):  # made before there were such
        header["settings"].pop(name)
    tensors = {name: card.tensors[name] for name in ("window", "columns", "share")}
    header.pop("least_mass")
    old = MaskCard(header, tensors).policy()
    assert old.guard is None and not old.soft and not old.gates.blocks.any()


@torch.no_grad()
def test_documents_that_a_card_was_made_from_are_as_promised(model, sparse, recwarn):
    with dynmask.sparsify(model, sparse.policy(guard=1e-4)) as run:
        for document in documents(90, 120):
            model(document[None])
    assert run.summary()["guard"]["widened"] == 0 and run.summary()["guard"]["maps"] > 0
    assert not [w for w in recwarn if "guard" in str(w.message)]


def test_a_card_is_the_same_policy_after_a_round_trip(model, card, tmp_path):
    card.save_pretrained(tmp_path / "card")
    again = MaskCard.from_pretrained(tmp_path / "card")
    again.check(model)
    first, second = card.policy(), again.policy()
    assert first == second and digest_of(first.gates) == digest_of(second.gates)
    assert digest_of(parse(f"gated:{tmp_path / 'card'}").gates) == digest_of(first.gates)
    with pytest.raises(ValueError, match="expected options among"):
        card.policy(width=3)


def test_an_option_after_a_card_that_there_is_not_is_no_path(card, tmp_path):
    card.save_pretrained(tmp_path / "card")
    with pytest.raises(ValueError, match="expected options .* received 'dense_upto=9'"):
        parse(f"gated:{tmp_path / 'card'},dense_upto=9")
    card.save_pretrained(tmp_path / "a,b=c")
    (tmp_path / "a").mkdir()
    assert parse(f"gated:{tmp_path / 'a,b=c'}").gates is not None  # a path with a comma


@given(
    st.dictionaries(
        st.sampled_from(["decode", "dense_up_to", "guard", "soft", "strength"]), st.integers(0, 2)
    )
)
def test_text_after_a_card_is_what_python_would_ask_it_for(card, saved, chosen):
    """The same policy, or the same refusal: no option is for one of the two alone."""
    values = {
        "decode": ("full", "select", "keep"), "dense_up_to": (0, 9, -1),
        "guard": (None, 0.125, 1.5), "soft": (True, False, True), "strength": (0.5, 2.0, -1.0),
    }  # fmt: skip
    options: dict = {name: values[name][number] for name, number in chosen.items()}
    text = ",".join([f"gated:{saved}", *(f"{k}={v}".lower() for k, v in options.items())])
    try:
        expected = card.policy(**options)
    except ValueError as error:
        with pytest.raises(ValueError) as refused:
            parse(text)
        assert str(refused.value) == str(error) and str(error).startswith("gated: ")
        return
    found: Any = parse(text)
    assert found == expected and policy_label(text).partition(",")[2] == text.partition(",")[2]
    assert (found.promise is None) == (expected.promise is None)


@pytest.fixture(scope="module")
def saved(card, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "card"
    card.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("soft=1", "policy gated: expected soft as true or false, received '1'"),
        ("guard=no", "policy gated: expected guard as a share or none, received 'no'"),
        ("strength=", "policy gated: expected strength as float, received ''"),
        ("dense_up_to=1.5", "policy gated: expected dense_up_to as int, received '1.5'"),
        ("guard=nan", "gated: guard: expected a share from 0 to 1, or None, received nan"),
        ("soft=true,strength=inf", "gated: strength: expected a finite number of at least 0"),
        ("soft=true,decode=keep", "gated: soft: expected decode='full' or 'select'"),
        ("strength=2", "gated: strength: expected soft masks.*Ask for soft as well"),
        ("sinks=2", "expected options decode, dense_up_to, guard, soft, strength after a card, "
         "received 'sinks=2'; correct it, or leave it out"),
        ("soft=true,columns=2", "received 'columns=2'; correct it, or leave it out"),
        ("soft", "which does not exist here"),
        ("guard=0.1,guard=0.2", "expected guard once after a card, received it as '0.1' and '0.2'"),
    ],
)  # fmt: skip
def test_text_after_a_card_that_is_no_option_of_it_is_refused(saved, options, message):
    with pytest.raises(ValueError, match=message):
        parse(f"gated:{saved},{options}")


def test_a_card_cannot_be_asked_for_what_it_has_not(model, card, tmp_path):
    header, tensors = copied(card)
    header.pop("least_mass")
    old = MaskCard(header, tensors)
    assert old.policy(guard=None).guard is None and old.policy().guard is None
    with pytest.raises(ValueError, match="gated: guard: expected a card that says what its maps"):
        old.policy(guard=0.5)
    chooses = GatedSettings(**{**vars(SETTINGS), "budgets": (Budget(4, blocks=2),)})
    blocks = calibrate_gates(model, documents(300), chooses, progress=False)
    blocks.save_pretrained(tmp_path / "card")
    with pytest.raises(ValueError, match="^gated: soft: expected budgets without blocks and diag"):
        parse(f"gated:{tmp_path / 'card'},soft=true")


def test_a_card_of_soft_masks_says_what_the_bias_changes(model, tmp_path):
    more = {"max_kl": 50.0, "soft": True, "strength": 2.0, "budgets": (Budget(4, 8),)}
    asked = GatedSettings(**{**vars(SETTINGS), **more})
    card = calibrate_gates(model, documents(90, 120), asked, progress=False)
    assert card.header["kl"] != card.header["kl_hard"] and card.header["kl"] <= 50
    card.save_pretrained(tmp_path / "card")
    policy = MaskCard.from_pretrained(tmp_path / "card").policy()
    assert policy.soft and policy.strength == 2.0
    judge = Judge(model, documents(90, 120), asked, 0)
    judge.prepare()
    for name, some in (("kl", policy), ("kl_hard", card.policy(soft=False))):
        assert judge.divergence(some) == pytest.approx(card.header[name], rel=1e-4)


def test_documents_and_the_model_are_left_as_they_were(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    given_documents = documents(60)
    model.train()
    calibrate_gates(model, given_documents, SETTINGS, progress=False)
    assert model.training
    model.eval()
    assert torch.equal(given_documents[0], documents(60)[0])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def measured_in(path):
    """Gates that a journal knows something of."""
    content = json.loads(path.read_text())
    return len(content["known"]) + len(content["above"])


def test_an_interrupted_calibration_goes_on_with_what_it_measured(
    model, card, tmp_path, monkeypatch
):
    path = tmp_path / "gates.json"
    measured = Judge.cost
    done = []

    def interrupted(self, gates, most):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(gates)
        return measured(self, gates, most)

    monkeypatch.setattr(Judge, "cost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_gates(model, documents(90, 120), SETTINGS, checkpoint=path, progress=False)
    assert measured_in(path) == 5
    runs = []

    def counted(self, policy, most, divergence=Judge.divergence):
        runs.append(policy)
        return divergence(self, policy, most)

    monkeypatch.setattr(Judge, "cost", measured)
    monkeypatch.setattr(Judge, "divergence", counted)
    again = calibrate_gates(model, documents(90, 120), SETTINGS, checkpoint=path, progress=False)
    assert digest_of(again.policy().gates) == digest_of(card.policy().gates)
    assert len(runs) == measured_in(path) - 5 > 0  # what was not known


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"dynmask_budgets": 2, "known": {}, "identity": 1}']
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(model, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="checkpoint: expected"):
        calibrate_gates(model, documents(60), SETTINGS, checkpoint=path, progress=False)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("given_documents", "settings", "message"),
    [
        ([], None, "documents: expected at least one"),
        ([torch.tensor([1.0, 2.0])], None, "documents"),
        (documents(1), None, "documents"),
        (documents(1025), None, "at most the model's 1024 positions"),
        (documents(60), 3, "GatedSettings"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(model, given_documents, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate_gates(model, given_documents, settings, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"max_kl": 0}, {"max_kl": math.nan}, {"density": 0}, {"density": 2}, {"budgets": ()},
        {"judged": 0}, {"late": 1.5}, {"sinks": -1}, {"budgets": (Budget(0),)}, {"pool": 2},
        {"guard": 2}, {"guard": True}, {"guard": "no"}, {"strength": math.nan}, {"soft": 1},
        {"key_pool": 5}, {"block": 0}, {"budgets": (Budget(4, 2, blocks=2),)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        GatedSettings(**change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, h: t.update(window=t["window"][:, :3].contiguous()),
        lambda t, h: t.update(window=t["window"] * 0),
        lambda t, h: t.update(columns=t["columns"].float()),
        lambda t, h: t["share"].fill_(math.nan),
        lambda t, h: t.pop("share"),
        lambda t, h: h.update(kl=-1.0),
        lambda t, h: h.update(kl=None),
        lambda t, h: h.update(least_mass=[[0.5]]),
        lambda t, h: h["settings"].update(guard=-1),
        lambda t, h: h["settings"].update(soft="yes"),
        lambda t, h: h.update(kl_hard=math.inf),
        lambda t, h: h.update(judged="many"),
        lambda t, h: h.update(decoded=-1),
        lambda t, h: t.update(blocks=t["window"] * 0 - 1),
        lambda t, h: t.pop("blocks"),
        lambda t, h: h["settings"].update(last=0),
        lambda t, h: h["settings"].update(budgets="all"),
        lambda t, h: h["settings"].pop("pool"),
    ],
)
def test_damaged_cards_are_refused(card, damage):
    header, tensors = copied(card)
    damage(tensors, header)
    with pytest.raises(ValueError, match="mask card|gates"):
        MaskCard(header, tensors)


def test_generation_with_a_card_runs_on_another_architecture():
    model = tiny_qwen3()
    card = dynmask.calibrate(
        model, documents(70), policy="gated", settings=SETTINGS, progress=False
    )
    ids = documents(50)[0][None]
    with dynmask.sparsify(model, card.policy(), measure=True) as run:
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 53
    summary = run.summary()
    assert 0 < summary["prefill"]["density"] <= 1 and 0 < summary["decode"]["density"] <= 1


def test_full_gates_change_nothing():
    model = tiny_llama()
    ids = documents(40)[0][None]
    with torch.no_grad():
        expected = model(ids).logits
        with dynmask.sparsify(model, Gated(gates=Gates.full(2, 4))):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_judged_tokens_can_be_given(model):
    rows = [torch.tensor([89]), torch.tensor([5, 119])]
    found = calibrate_gates(model, documents(90, 120), SETTINGS, judged=rows, progress=False)
    judge = Judge(model, documents(90, 120), SETTINGS, 0, rows)
    judge.prepare()
    assert judge.cost(found.policy().gates) == pytest.approx(found.header["kl"], abs=1e-6)
    for bad in (rows[:1], [rows[0], torch.tensor([120])], [rows[0], torch.tensor([1.0])]):
        with pytest.raises(ValueError, match="judged"):
            calibrate_gates(model, documents(90, 120), SETTINGS, judged=bad, progress=False)


@torch.no_grad()
def test_answers_are_judged_as_they_are_decoded(model):
    """A prompt under the gates, then one token after another, which reads every key."""
    texts, answer = documents(90, 120), [1, 7]
    rows = [torch.tensor([88, 89]), torch.tensor([119, 5, 112, 115])]
    gates = Gates.full(2, 4).replaced(torch.ones(2, 4, dtype=torch.bool), window=3, columns=2)
    judge = Judge(model, texts, SETTINGS, 0, rows, answer)
    judge.prepare()
    policy = judge.policy(gates)
    means = []
    for text, own, count in zip(texts, rows, answer, strict=True):
        with dynmask.sparsify(model, policy):
            read = model(text[None, :-count], use_cache=True)
            parts = [read.logits]
            for token in text[-count:]:
                parts.append(model(token.view(1, 1), past_key_values=read.past_key_values).logits)
        both = torch.cat(parts, 1), model(text[None]).logits
        found, full = (x[0, own].log_softmax(-1) for x in both)
        means.append(float((full.exp() * (full - found)).sum(-1).mean()))
    assert judge.cost(gates) == pytest.approx(max(means), rel=1e-3)
    whole = Judge(model, texts, SETTINGS, 0, rows)
    whole.prepare()
    assert whole.cost(gates) != pytest.approx(max(means), rel=1e-2)
    given = {"judged": rows, "progress": False}
    card = calibrate_gates(model, texts, SETTINGS, decoded=answer, **given)
    assert (card.header["judged"], card.header["decoded"]) == (6, 8)
    assert "6 tokens judged, 8 read as decoded ones" in card._summary()
    assert judge.cost(card.policy().gates) == pytest.approx(card.header["kl"], abs=1e-6)
    for bad in ([1], [1, 120], [1, -1], [1, 1.0], [1, True]):
        with pytest.raises(ValueError, match="decoded"):
            calibrate_gates(model, texts, SETTINGS, decoded=bad, **given)


class Forgetful(torch.nn.Module):
    """A model whose forward returns no cache."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, **given):
        return SimpleNamespace(logits=self.model(**given).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["jamba", "bamba"])
def test_answers_to_models_with_recurrent_layers_are_judged_as_the_model_decodes(name):
    """One such layer forgets the prompt before several tokens, another model loses positions."""
    shape = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    own = {
        "jamba": {
            "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4,
        },
        "bamba": {
            "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
            "mamba_n_groups": 1, "mamba_chunk_size": 16,
        },
    }[name]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **shape, **own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    texts, rows = documents(60), [torch.arange(50, 60)]
    judge = Judge(model, texts, SETTINGS, 0, rows, [7])
    judge.prepare()
    whole = model(texts[0][None]).logits[0, rows[0]].log_softmax(-1)
    assert torch.allclose(judge.full[0], whole, atol=1e-3)
    assert judge.cost(Gates.full(2, 4)) < 1e-6
    with pytest.raises(ValueError, match="attention in each of 2 layers.*received none in layer 0"):
        calibrate_gates(model, texts, SETTINGS, progress=False)


def test_answers_need_a_model_that_returns_its_cache(model):
    judge = Judge(Forgetful(model), documents(60), SETTINGS, 0, None, [7])
    with pytest.raises(ValueError, match="decoded: expected a model that returns its cache"):
        judge.prepare()


def test_what_gates_read_is_measured_in_prompts(model, sparse):
    texts, policy = documents(90, 120), sparse.policy(guard=None)
    ways = (
        Judge(model, texts, SETTINGS, 0, None, [40, 60]),
        Judge(model, [texts[0][:50], texts[1][:60]], SETTINGS, 0),
    )
    (density, mass), (its, kept) = (measure(judge, policy, range(2), 2) for judge in ways)
    assert torch.equal(density, its) and torch.equal(mass, kept) and bool((density < 1).any())


# ------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.stand_in import save_stand_in

    return save_stand_in(tmp_path_factory.mktemp("model") / "stand-in")


def calibrate(folder, out, *options):
    from dynmask import cli

    call = ["calibrate", "--model", folder, "--policy", "gated", "--out", out, "--quiet", "--json"]
    return cli.main([*map(str, call), "--judged", "8", "--max-kl", "50", *options])


def test_the_command_trains_an_encoder_and_sets_the_guard(folder, tmp_path, capsys):
    call = ("--lengths", "260", "--documents", "2", "--guard", "0.5", "--encoder")
    assert calibrate(folder, tmp_path / "a", *call) == 2
    assert "--rank: expected encoders of at most 1%" in capsys.readouterr().err
    call = (*call, "--rank", "2", "--steps", "2", "--teacher", "effect")
    assert calibrate(folder, tmp_path / "a", *call) == 0
    header = json.loads(capsys.readouterr().out)
    settings = header["settings"]
    assert (settings["guard"], settings["steps"], settings["rank"]) == (0.5, 2, 2)
    assert settings["teacher"] == "effect" and len(header["encoder"]["loss"]) == 2
    policy = parse(f"gated:{tmp_path / 'a'}")
    assert len(policy.encoders) == 2 and policy.guard == 0.5


def test_the_command_makes_soft_masks_of_columns(folder, tmp_path, capsys):
    call = ("--lengths", "96", "--documents", "1", "--soft", "--strength", "2")
    assert calibrate(folder, tmp_path / "b", *call) == 0
    header = json.loads(capsys.readouterr().out)
    assert header["settings"]["soft"] and header["kl_hard"] >= 0
    assert not any(budget["blocks"] for budget in header["settings"]["budgets"])


def test_commands_take_the_options_of_a_card(folder, tmp_path, capsys):
    from dynmask import cli

    assert calibrate(folder, tmp_path / "a", "--lengths", "96", "--documents", "1") == 0
    policy = f"gated:{tmp_path / 'a'},soft=true,strength=3,guard=none"
    capsys.readouterr()
    asked = ["--model", str(folder), "--prompt", "a b c " * 20, "--quiet", "--json", "--policy"]
    assert cli.main(["generate", "--max-new-tokens", "2", *asked, policy]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == policy
    assert cli.main(["inspect", *asked, f"{policy},sofd=true"]) == 2
    said = capsys.readouterr().err
    assert "policy gated: expected options decode, dense_up_to, guard, soft, strength" in said


def test_the_command_judges_the_end_of_documents_as_it_is_decoded(folder, tmp_path, monkeypatch):
    from dynmask import budgets

    asked = []

    def noted(model, documents, settings, **given):
        asked.append((documents, settings.judged, settings.late, given["decoded"]))
        return calibrate_gates(model, documents, settings, **given)

    monkeypatch.setattr(budgets, "calibrate_gates", noted)
    call = ("--lengths", "96", "40", "--documents", "1")
    for name, more in (("a", ()), ("b", ("--decoded",))):
        assert calibrate(folder, tmp_path / name, *call, *more) == 0
    (texts, *plain), (again, *decoded) = asked
    assert sorted(map(len, texts)) == [40, 96] and list(map(len, again)) == list(map(len, texts))
    assert plain == [8, 0.5, None]
    assert decoded == [8, 1.0, [7, 7]]  # the first of eight is the prompt's to predict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--decoded", "--lengths", "8"), "--lengths: expected more than the 8 judged tokens"),
        (("--decoded", "--decode", "keep", "--judged", "1"), "--judged: expected at least 2 with"),
        (("--strength", "2"), "--strength: expected with --soft"),
        (("--steps", "2"), "--steps: expected with --encoder"),
        (("--rank", "2"), "--rank: expected with --encoder"),
        (("--soft", "--encoder"), "--soft: expected budgets without blocks"),
        (("--soft", "--blocks"), "--soft: expected budgets without blocks"),
        (("--guard", "2"), "--guard: expected a share from 0 to 1"),
        (("--width", "600"), "--width: expected with another --policy"),
    ],
)
def test_options_that_say_nothing_are_refused(folder, tmp_path, capsys, options, message):
    assert calibrate(folder, tmp_path / "c", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_short_inputs_are_read_whole():
    query, key = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    policy = Gated(window=8, columns=0, dense_up_to=300)
    assert policy(query, key, key, Layer(0)).is_causal
    longer = policy(query, torch.randn(1, 2, 301, 16), key, Layer(0))
    assert not longer.is_causal
    assert policy.frees(0, 4, 2) == [False, False], "what a cache drops cannot be read whole"
    with pytest.raises(ValueError, match="dense_up_to: expected 0 where decode='keep'"):
        Gated(decode="keep", dense_up_to=1)


def test_what_is_no_column_has_no_bias():
    """Whatever ``least`` allows: sinks and the window are read anyway."""
    query, key = 3 * torch.randn(1, 2, 40, 8), 3 * torch.randn(1, 2, 40, 8)
    policy = Gated(sinks=2, window=4, columns=40, least=0.0, soft=True)
    _, bias = policy.biased(query, key, key, Layer(0))
    assert (bias[..., -4:] == 0).all() and (bias[..., :2] == 0).all()


def test_a_worth_spreads_to_the_nearest_first_and_forwards_before_backwards():
    worth = torch.zeros(9)
    worth[4] = 1.0
    found = spread(worth, 5)
    assert found.argsort(descending=True)[:5].tolist() == [4, 5, 3, 6, 2]
    assert (found > 0).sum() == 5 and torch.equal(spread(worth, 1), worth)
    assert spread(worth[4:5], 1023).tolist() == [1.0]


def test_gates_and_settings_that_no_calibration_gives_are_refused():
    with pytest.raises(ValueError, match="gates.share: expected shares of at most 1"):
        gates_of([[3]], [[2]], share=[[1.5]])
    with pytest.raises(ValueError, match="strength finite"):
        Gated(strength=math.inf)
    for wrong in (
        {"sinks": 4.5},
        {"last": 64.0},
        {"block": 2**40},
        {"pool": True},
        {"least": True},
    ):
        with pytest.raises(ValueError, match="settings"):
            GatedSettings(**wrong)
    with pytest.raises(ValueError, match="settings.max_kl"):
        GatedSettings(max_kl=10**400)


def test_the_model_of_a_card_is_checked():
    class Card:
        @staticmethod
        def check(model):
            raise ValueError("mask card: expected another model")

    with (
        pytest.raises(ValueError, match="expected another model"),
        dynmask.sparsify(tiny_llama(layers=1), Gated(card=Card())),
    ):
        pass
