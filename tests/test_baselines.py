"""The published baselines against naive versions of their papers' rules, one pair at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask import LifetimeMask, attention
from dynmask.integrations.transformers import sparsify
from dynmask.policies import (
    Elastic,
    FlexPrefill,
    Layer,
    OracleBlocks,
    OracleTokens,
    Quest,
    VerticalSlash,
    XAttention,
    parse,
)
from dynmask.policies import flexprefill as flexprefill_module
from dynmask.policies import weights as weights_module
from dynmask.policies.weights import block_sums, diagonal_sums, row_ranges, smallest_set
from tests.policies import POLICIES
from tests.tiny import tiny_gemma3, tiny_llama

HEADS, GROUPS, DIM = 4, 2, 8


def inputs(keys=70, queries=None, seed=0, batch=2, spread=2.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, HEADS, queries or keys, DIM), *[(batch, GROUPS, keys, DIM)] * 2)
    draws = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return tuple(x.mul(spread).to(dtype) for x in draws)


@st.composite
def calls(draw, most=60):
    """What ``inputs`` takes, for odd sizes: whole prefills, later chunks, single rows."""
    keys = draw(st.integers(1, most))
    return {
        "keys": keys,
        "queries": draw(st.sampled_from([keys, max(keys // 3, 1), max(keys - 5, 1), 1])),
        "seed": draw(st.integers(0, 10**6)),
        "batch": draw(st.sampled_from([1, 2])),
        "spread": draw(st.sampled_from([0.3, 1.5, 3.0])),
    }


def each_head(query, key):
    """(batch row, head, queries [q, d], keys [k, d] of its group), float64."""
    for b, h in itertools.product(range(query.shape[0]), range(HEADS)):
        yield b, h, query[b, h].double(), key[b, h * GROUPS // HEADS].double()


def true_weights(q, k):
    hidden = torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool()
    return (q @ k.T * DIM**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)


def fewest(weights, share, forced=(), most=None):
    """The fewest entries with this share of the sum, the forced ones before all others."""
    order = sorted(range(len(weights)), key=lambda i: (i not in forced, -float(weights[i]), i))
    chosen, mass = set(), 0.0
    for i in order[:most]:
        if share < 1 and mass >= share * float(sum(weights)):
            break
        chosen.add(i)
        mass += float(weights[i])
    return chosen | set(forced)


def kept(mask, b, h):
    """The blocks of each list of a block mask."""
    return [{int(j) for j in row if j >= 0} for row in mask.index[b, h]]


def query_blocks(queries, keys, block):
    """(number, its rows) of every query block that holds a row."""
    first = keys - queries
    for number in range(first // block, (keys - 1) // block + 1):
        start, stop = max(number * block, first), min((number + 1) * block, keys)
        yield number, slice(start - first, stop - first)


# What is computed from weights


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 99))
def test_diagonals_are_summed_by_offset(rows, more, seed):
    keys = rows + more
    weights = torch.rand(2, 3, rows, keys, generator=torch.Generator().manual_seed(seed))
    weights = weights.tril(keys - rows)  # as attention is
    sums = diagonal_sums(weights)
    for offset in range(keys):
        cells = [weights[:, :, i, keys - rows + i - offset] for i in range(rows)
                 if keys - rows + i >= offset]  # fmt: skip
        torch.testing.assert_close(sums[..., offset], torch.stack(cells).sum(0))


@given(st.integers(1, 50), st.integers(1, 9))
def test_blocks_are_summed_to_the_last_short_one(n, block):
    x = torch.arange(1.0, n + 1)
    assert block_sums(x, block).tolist() == [float(sum(p)) for p in x.split(block)]


@given(st.integers(1, 99), st.integers(1, 40), st.integers(1, 9), st.integers(0, 20))
def test_ranges_cover_all_rows_and_cut_no_block(rows, width, align, start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "WEIGHTS_AT_A_TIME", 64)
        ranges = list(row_ranges(rows, width, align, start))
    assert [i for first, last in ranges for i in range(first, last)] == list(range(rows))
    for first, last in ranges:
        assert last == rows or (start + last) % align == 0
        assert (last - first) * width <= max(64, align * width)


@given(st.integers(1, 12), st.floats(0.05, 1.2), st.integers(0, 12), st.integers(0, 999))
def test_the_smallest_set_takes_forced_entries_first(n, share, most, seed):
    g = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 5, (3, n), generator=g) / 8  # exact, with many ties and zeros
    forced = torch.rand(3, n, generator=g) < 0.2
    share = round(share * 16) / 16
    chosen = smallest_set(weights, share, forced, most)
    for row in range(3):
        must = set(forced[row].nonzero().flatten().tolist())
        expected = fewest(weights[row], share, must, most or None)
        assert set(chosen[row].nonzero().flatten().tolist()) == expected


# FlexPrefill


def flexprefill_head(q, k, policy):
    """Which key blocks each query block of one head reads, and whether it is query-aware."""
    block, keys = policy.block, len(k)
    rows = true_weights(q, k)[-block:]
    columns = [float(rows[:, c].sum()) / len(rows) for c in range(keys)]
    diagonals = [0.0] * keys
    for i, c in itertools.product(range(len(rows)), range(keys)):
        offset = keys - len(rows) + i - c
        if offset >= 0:
            diagonals[offset] += float(rows[i, c]) / len(rows)
    means = torch.stack([x.mean(0) for x in k.split(block)])
    estimate = (means @ q[-block:].mean(0) * DIM**-0.5).softmax(-1)
    truth = [sum(columns[i : i + block]) for i in range(0, keys, block)]
    far = 0.0
    for p, t in zip(estimate.tolist(), truth, strict=True):
        for x in (p, t):
            far += x * math.log(2 * x / (p + t)) / 2 if x > 0 else 0.0
    aware = math.sqrt(max(far, 0.0)) < policy.tau

    def lines(line):
        left, needed = sorted(line, reverse=True), 0
        while needed < keys and sum(left[:needed]) < policy.gamma:
            needed += 1
        least = max(math.ceil(policy.min_budget / block), 1)
        count = least if aware else max(needed // block + 1, least)
        sums = [sum(line[i : i + block]) for i in range(0, keys, block)]
        return set(sorted(range(len(sums)), key=lambda i: (i > 0, -sums[i]))[:count])

    vertical, slash = lines(columns), lines(diagonals)
    chosen, cells = [], []
    for number, part in query_blocks(len(q), keys, block):
        chosen.append({j for j in range(number + 1) if j in vertical or number - j in slash})
        w = (means[: number + 1] @ q[part].mean(0) * DIM**-0.5).softmax(-1)
        cells += [(len(chosen) - 1, j, float(w[j])) for j in range(number + 1)]
    if aware:
        for i in fewest([w for _, _, w in cells], policy.gamma):
            row, j, _ = cells[i]
            chosen[row].add(j)
    return chosen, aware


# Shares of a number of rows that are no whole number, or a naive sum may stop one entry later.
FLEX = {
    "never aware": FlexPrefill(0.71, tau=0, min_budget=0, block=8),
    "always aware": FlexPrefill(0.71, tau=1, min_budget=0, block=8),
    "some": FlexPrefill(0.61, tau=0.18, min_budget=9, block=8),
    "odd block": FlexPrefill(0.87, tau=0.2, min_budget=16, block=5),
}


@pytest.mark.parametrize("policy", FLEX.values(), ids=FLEX)
@pytest.mark.parametrize("queries", [90, 31, 4])
def test_flexprefill_is_the_papers_rule_on_blocks(policy, queries):
    query, key, value = inputs(90, queries, seed=3, spread=1.2)
    mask = policy(query, key, value, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == flexprefill_head(q, k, policy)[0]


def test_flexprefill_has_heads_of_both_kinds():
    query, key, _ = inputs(90, seed=3, spread=1.2)
    kinds = [flexprefill_head(q, k, FLEX["some"])[1] for *_, q, k in each_head(query, key)]
    assert 0 < sum(kinds) < len(kinds)


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(sorted(FLEX)))
def test_flexprefill_at_every_size(call, name):
    query, key, value = inputs(**call)
    mask = FLEX[name](query, key, value, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == flexprefill_head(q, k, FLEX[name])[0]


def test_flexprefill_keeps_a_minimum_of_columns_and_diagonals():
    """All attention lies on the first key; the budget's other blocks are the next best."""
    query, key = torch.ones(1, 1, 64, DIM), torch.zeros(1, 1, 64, DIM)
    key[:, :, 0] = 40.0
    none = FlexPrefill(0.9, tau=0, min_budget=0, block=8)(query, key, key, Layer(0))
    some = FlexPrefill(0.9, tau=0, min_budget=24, block=8)(query, key, key, Layer(0))
    assert kept(none, 0, 0)[-1] == {0, 7}
    assert len(kept(some, 0, 0)[-1]) >= 5  # three columns and three diagonals, one of them both


def test_the_distance_is_that_of_jensen_and_shannon():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2]])
    far = flexprefill_module.distance(p, q)
    third = sum(x * math.log(x / 0.35) for x in (0.2, 0.5)) / 2 * 2
    expected = torch.tensor([0.0, math.sqrt(math.log(2)), math.sqrt(third)])
    torch.testing.assert_close(far, expected, rtol=1e-4, atol=1e-3)


# XAttention


def xattention_head(q, k, policy):
    """Which key blocks each query block of one head reads."""
    s, block, keys, first = policy.stride, policy.block, len(k), len(k) - len(q)
    blocks = -(-keys // block)
    squares = blocks * block // s
    chosen = []
    for number, _ in query_blocks(len(q), keys, block):
        mass = [0.0] * blocks
        for j in range(number * block // s, (number + 1) * block // s):
            if not any(first <= j * s + i < keys for i in range(s)):
                continue  # no query there
            logits = torch.full((squares,), float("-inf"), dtype=torch.float64)
            for col in range(j + 1):
                total = 0.0
                for i in range(s):  # the antidiagonal of square (j, col)
                    at, to = j * s + s - 1 - i, col * s + i
                    if first <= at < keys and to < keys:
                        total += float(q[at - first] @ k[to])
                logits[col] = total / s / math.sqrt(DIM)
            for col, w in enumerate(logits.softmax(-1).tolist()):
                mass[col * s // block] += w
        chosen.append({j for j in fewest(mass, policy.threshold, {0, number}) if j <= number})
    return chosen


X = {
    "stride 4": XAttention(4, 0.71, 8),
    "stride 2": XAttention(2, 0.87, 8),
    "whole block": XAttention(6, 0.83, 6),
}


@pytest.mark.parametrize("policy", X.values(), ids=X)
@pytest.mark.parametrize("queries", [61, 22, 3])
def test_xattention_sums_antidiagonals(policy, queries):
    query, key, value = inputs(61, queries, seed=5)
    mask = policy(query, key, value, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == xattention_head(q, k, policy)


@settings(max_examples=25, deadline=None)
@given(calls(40), st.sampled_from(sorted(X)))
def test_xattention_at_every_size(call, name):
    query, key, value = inputs(**call)
    mask = X[name](query, key, value, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == xattention_head(q, k, X[name])


# Quest


@pytest.mark.parametrize("keys", [70, 69, 68, 65, 20, 17, 9])
@pytest.mark.parametrize(("budget", "page"), [(16, 4), (19, 4), (4, 4), (30, 7)])
def test_quest_reads_the_pages_with_the_largest_bounds(keys, budget, page):
    query, key, value = inputs(keys, 1, seed=keys)
    mask = Quest(budget, page, dense_layers=0)(query, key, value, Layer(0))
    own, dense = (keys - 1) // page, mask.dense().expand(2, HEADS, 1, keys)
    for b, h, q, k in each_head(query, key):
        bounds = []
        for start in range(0, own * page, page):
            held = k[start : start + page]
            least, most = held.min(0).values, held.max(0).values
            bounds.append(float(torch.maximum(q[0] * least, q[0] * most).sum()))
            assert bounds[-1] >= float((held @ q[0]).max()) - 1e-9
        best = sorted(range(own), key=lambda i: -bounds[i])[: budget // page - 1]
        seen = {i // page for i in dense[b, h, 0].nonzero().flatten().tolist()}
        assert seen == {*best, own}
        assert all(dense[b, h, 0, i * page : (i + 1) * page].all() for i in seen)


def test_quest_breaks_ties_without_reading_more():
    query, key = torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, GROUPS, 64, DIM)
    mask = Quest(16, 4, dense_layers=0)(query, key, key, Layer(0))
    assert (mask.dense().sum(-1) == 16).all() and mask.dense()[..., 60:].all()


@pytest.mark.parametrize(("queries", "layer"), [(1, 0), (1, 1), (2, 5), (70, 5)])
def test_quest_is_dense_in_prefill_and_in_the_first_layers(queries, layer):
    query, key, value = inputs(70, queries)
    mask = Quest(16, 4)(query, key, value, Layer(layer))
    assert isinstance(mask, LifetimeMask) and mask.is_causal


def test_quest_decodes_with_pages_after_a_dense_prefill():
    g = torch.Generator().manual_seed(0)
    model, ids = tiny_llama(layers=3), torch.randint(3, 200, (1, 40), generator=g)
    config = {"max_new_tokens": 4, "do_sample": False}
    with sparsify(model, Quest(8, 4, dense_layers=1), measure=True) as run:
        model.generate(ids, **config)
    summary = run.summary()
    assert summary["prefill"]["density"] == 1
    first, *rest = summary["decode"]["density_per_head"]
    assert set(first) == {1.0}
    assert all(0.1 < x < 0.3 for heads in rest for x in heads)
    with sparsify(model, Quest(64, 4, dense_layers=0)):
        everything = model.generate(ids, **config)
    assert torch.equal(everything, model.generate(ids, **config))


# Elastic windows


def elastic_dense(policy, alpha, beta, keys, queries, first_key=0):
    out = torch.zeros(queries, keys, dtype=torch.bool)
    for row, k in itertools.product(range(queries), range(keys)):
        q = first_key + keys - queries + row
        count = policy.length or q + 1
        span = max(policy.least, math.floor(alpha + beta * count))
        at = first_key + k
        out[row, k] = at <= q and (at < policy.sinks or q - at < span)
    return out


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 59),
    st.sampled_from([-20.0, 0.0, 3.0, 7.5]),
    st.sampled_from([0.0, 0.1, 0.37, 0.5, 1.0]),
    st.sampled_from([0, 33]),
    st.sampled_from([0, 2, 5]),
)
def test_elastic_spans_grow_with_the_text(keys, fewer, alpha, beta, length, first_key):
    policy = Elastic(alpha, beta, sinks=3, least=2, length=length)
    query, key, value = inputs(keys, max(keys - fewer, 1))
    mask = policy(query, key, value, Layer(0, first_key))
    dense = elastic_dense(policy, alpha, beta, keys, query.shape[2], first_key)
    assert torch.equal(mask.dense()[0, 0], dense)
    most = int(dense.sum(-1).max())
    assert most <= mask.most <= most + policy.sinks


def test_elastic_heads_and_layers_have_spans_of_their_own():
    alpha = ((1, 5, 9, 2), (4, 4, 8, 8))
    beta = ((0.0, 0.1, 0.2, 1.0), (0.5, 0.0, 0.25, 0.125))
    policy = Elastic(alpha, beta, sinks=2, least=1)
    policy.check(2, HEADS, GROUPS)
    query, key, value = inputs(50, 29)
    for layer in range(2):
        mask = policy(query, key, value, Layer(layer))
        for h in range(HEADS):
            expected = elastic_dense(policy, alpha[layer][h], beta[layer][h], 50, 29)
            assert torch.equal(mask.dense()[0, h], expected)
        out = attention(query, key, value, mask)
        torch.testing.assert_close(out, attention(query, key, value, mask, impl="reference"))


def test_elastic_takes_numbers_beside_tables_and_kv_heads():
    policy = Elastic(((3.0, 6.0),), 0.25, sinks=0, least=1)
    policy.check(1, HEADS, GROUPS)
    query, key, value = inputs(30)
    mask = policy(query, key, value, Layer(0))
    assert mask.heads == GROUPS
    assert torch.equal(mask.dense()[0, 1], elastic_dense(policy, 6.0, 0.25, 30, 30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": ((1, 2), (3, 4))}, "expected alpha for 3 layers .* received 2 layers"),
        ({"beta": ((0.1, 0.2, 0.3),) * 3}, r"expected beta .* of \[3\]"),
        (
            {"alpha": ((1,) * 4,) * 3, "beta": ((0.1,) * 2,) * 3},
            "same heads of layer 0, .* 4 and 2",
        ),
    ],
)
def test_elastic_refuses_another_model(fields, message):
    with pytest.raises(ValueError, match=message):
        Elastic(**fields).check(3, HEADS, GROUPS)


def test_elastic_refuses_a_layer_that_it_has_no_spans_for():
    with pytest.raises(ValueError, match="expected alpha for layer 2"):
        Elastic(((1, 2), (3, 4)))(*inputs(), Layer(2))


@pytest.mark.parametrize("name", ["elastic", "oracle_tokens"])
def test_causal_baselines_choose_alike_for_prefix_and_whole(name):
    policy = POLICIES[name]
    assert policy.causal
    query, key, value = inputs(60, dtype=torch.float64)
    whole = policy(query, key, value, Layer(0)).dense()
    for first, last in ((20, 40), (0, 1), (37, 38), (0, 60)):
        parts = query[:, :, first:last], key[:, :, :last], value[:, :, :last]
        part = policy(*parts, Layer(0)).dense()
        assert torch.equal(part, whole[:, :, first:last, :last])


# Oracles

TOKENS = [OracleTokens(5), OracleTokens(0, 0.6), OracleTokens(7, 0.5), OracleTokens(1)]


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(TOKENS))
def test_oracle_tokens_are_the_true_best_of_every_row(call, policy):
    query, key, value = inputs(**call)
    mask = policy(query, key, value, Layer(0))
    offset = mask.keys - mask.queries
    for b, h, q, k in each_head(query, key):
        for row, w in enumerate(true_weights(q, k)):
            best = fewest(w[: offset + row + 1], policy.top_p, most=policy.top_k or None)
            listed = [int(j) for j in mask.index[b, h, row] if j >= 0]
            assert listed == sorted(best)


@given(calls(40), st.integers(1, 9))
def test_no_other_choice_of_k_keys_keeps_more(call, k):
    query, key, value = inputs(**call)
    dense = OracleTokens(k)(query, key, value, Layer(0)).dense()
    offset = key.shape[2] - query.shape[2]
    rows = torch.arange(offset, key.shape[2])
    assert torch.equal(dense.sum(-1)[0, 0], (rows + 1).clamp(max=k))
    for b, h, q, own in each_head(query, key):
        weights = true_weights(q, own)
        best = weights.topk(min(k, len(own)), -1).values.sum(-1)
        torch.testing.assert_close((weights * dense[b, h]).sum(-1), best, rtol=1e-5, atol=1e-6)


def test_oracle_tokens_break_ties_without_reading_more():
    query, key = torch.ones(1, HEADS, 40, DIM), torch.zeros(1, GROUPS, 40, DIM)
    dense = OracleTokens(6)(query, key, key, Layer(0)).dense()
    assert torch.equal(dense.sum(-1)[0, 0], torch.arange(1, 41).clamp(max=6))
    # of n equal keys, half of the mass takes the half of them, rounded up
    half = OracleTokens(0, 0.5)(query, key, key, Layer(0)).dense()
    count = half.sum(-1)[0, 0] - (torch.arange(1, 41) + 1) // 2
    assert count.abs().max() <= 1 and (count == 0).float().mean() > 0.7  # sums are rounded


BLOCKS = [OracleBlocks(0, 0.7, 8), OracleBlocks(3, 1.0, 8), OracleBlocks(2, 0.4, 5)]


def oracle_blocks_head(q, k, policy):
    weights, chosen = true_weights(q, k), []
    for number, part in query_blocks(len(q), len(k), policy.block):
        mass = [float(x.sum()) for x in weights[part].split(policy.block, -1)][: number + 1]
        chosen.append(fewest(mass, policy.top_p, {number}, policy.top_k or None))
    return chosen


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(BLOCKS))
def test_oracle_blocks_are_the_true_best_of_every_query_block(call, policy):
    query, key, value = inputs(**call)
    mask = policy(query, key, value, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == oracle_blocks_head(q, k, policy)


@pytest.mark.parametrize("queries", [70, 29])
@pytest.mark.parametrize("policy", [TOKENS[1], TOKENS[2], BLOCKS[0], X["stride 4"]])
def test_a_range_of_rows_at_a_time_gives_the_same_mask(policy, queries, monkeypatch):
    tensors = inputs(70, queries)
    whole = policy(*tensors, Layer(0)).dense()
    monkeypatch.setattr(weights_module, "WEIGHTS_AT_A_TIME", 2 * HEADS * 70 * 3)
    assert torch.equal(policy(*tensors, Layer(0)).dense(), whole)


@pytest.mark.parametrize(
    ("policy", "naive"),
    [(BLOCKS[1], oracle_blocks_head), (X["whole block"], xattention_head)]
    + [(policy, lambda *args: flexprefill_head(*args)[0]) for policy in FLEX.values()],
)
def test_of_blocks_that_are_worth_the_same_the_earlier_come_first(policy, naive):
    query, key = torch.ones(1, HEADS, 70, DIM), torch.zeros(1, GROUPS, 70, DIM)
    mask = policy(query, key, key, Layer(0))
    for b, h, q, k in each_head(query, key):
        assert kept(mask, b, h) == naive(q, k, policy)


# All of them

BASELINES = ["elastic", "flexprefill", "xattention", "quest", "oracle_tokens", "oracle_blocks"]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "queries"), [(1, 1), (2, 2), (7, 3), (64, 64), (65, 1)])
def test_every_size_and_dtype_is_answered(name, dtype, keys, queries):
    tensors = inputs(keys, queries, dtype=dtype)
    mask = POLICIES[name](*tensors, Layer(0))
    assert (mask.keys, mask.queries) == (keys, queries)
    own = torch.arange(keys - queries, keys)[:, None]
    dense = mask.dense().expand(2, -1, -1, -1)
    assert dense.any(-1).all() and not (dense & (torch.arange(keys) > own)).any()
    assert attention(*tensors, mask).isfinite().all()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("queries", [33, 1])
def test_a_query_of_nan_still_gets_a_mask(name, queries):
    query, key, value = inputs(33, queries)
    clean = POLICIES[name](query, key, value, Layer(0)).dense().expand(2, HEADS, -1, -1)
    query[0, 1] = float("nan")
    mask = POLICIES[name](query, key, value, Layer(0))
    dense = mask.dense().expand(2, HEADS, -1, -1)
    assert dense.any(-1).all()
    assert torch.equal(dense[0, 2:], clean[0, 2:]) and torch.equal(dense[1], clean[1])


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_chooses_for_each_sequence(name):
    """Also where heads are written out: a kv head's group chooses as it would alone."""
    query, key, value = inputs(50)
    for rows in (query, query[:, :, -1:]):
        both = POLICIES[name](rows, key, value, Layer(0)).dense().expand(2, HEADS, -1, -1)
        for b in range(2):
            one = slice(b, b + 1)
            wide = (x[one].repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
            alone = POLICIES[name](rows[one], *wide, Layer(0)).dense()
            assert torch.equal(both[one], alone.expand(1, HEADS, -1, -1))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("name", BASELINES)
def test_padded_generation_equals_each_sequence_alone(name, build):
    """Gemma 3 has layers with a window of their own."""
    model = build()
    g = torch.Generator().manual_seed(2)
    ids, attended = torch.randint(3, 200, (2, 30), generator=g), torch.ones(2, 30, dtype=torch.long)
    attended[0, :7] = 0
    config = {"max_new_tokens": 3, "do_sample": False}
    with sparsify(model, POLICIES[name]):
        together = model.generate(ids, attention_mask=attended, **config)
        for row, pad in enumerate((7, 0)):
            alone = model.generate(ids[row : row + 1, pad:], **config)
            assert torch.equal(together[row, pad:], alone[0])


def test_fields_are_read_from_text():
    assert parse("flexprefill:gamma=0.9,min_budget=512") == FlexPrefill(0.9, min_budget=512)
    assert parse("xattention:stride=16,threshold=0.8") == XAttention(16, 0.8)
    assert parse("quest:budget=2048") == Quest(2048)
    assert parse("elastic:alpha=128,beta=0.25,length=4096") == Elastic(128, 0.25, length=4096)
    assert parse("oracle_tokens:top_k=32") == OracleTokens(32)
    assert parse("oracle_blocks:top_p=0.9,block=128") == OracleBlocks(0, 0.9, 128)
    released = VerticalSlash(verticals=1000, slashes=6096, last=64, sinks=30, window=100)
    assert parse("vertical_slash") == released


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flexprefill:gamma=0", r"expected gamma in \(0, 1\]"),
        ("flexprefill:tau=-1", "expected tau >= 0"),
        ("flexprefill:min_budget=-1", "expected min_budget >= 0"),
        ("flexprefill:block=0", "expected block >= 1"),
        ("xattention:stride=12", "expected stride a divisor of block 128, received 12"),
        ("xattention:stride=0", "expected stride a divisor"),
        ("xattention:threshold=1.5", r"expected threshold in \(0, 1\]"),
        ("quest:budget=15", "expected budget >= 16, the keys of a page, received 15"),
        ("quest:page=0", "expected page >= 1"),
        ("quest:dense_layers=-1", "expected dense_layers >= 0"),
        ("elastic:beta=1.5", r"expected beta in \[0, 1\]"),
        ("elastic:alpha=nan", "expected alpha finite"),
        ("elastic:least=0", "expected least >= 1"),
        ("elastic:alpha=x", "expected alpha as float, received 'x'"),
        ("oracle_tokens:top_k=-1", "expected top_k >= 0"),
        ("oracle_tokens:top_p=0", "expected top_p > 0"),
        ("oracle_blocks:block=0", "expected block >= 1"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)
