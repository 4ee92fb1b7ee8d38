"""Policies against naive versions of their papers' rules."""

import pytest
import torch

from dynmask import attention
from dynmask.masks.structural import count_bands
from dynmask.policies import NAMES, Gated, Layer, Pooled, Streaming, VerticalSlash, parse
from dynmask.policies.base import Evicting, Glancing, evicts
from dynmask.policies.gates import Gates
from tests.policies import POLICIES, score_modules

N, HEADS, GROUPS, DIM = 70, 4, 2, 8

GLANCING = {
    "guarded": Gated(
        sinks=2, window=3, columns=2, last=4, guard=0.05, promise=torch.linspace(0, 1, 8).view(2, 4)
    ),
    "blocks": Gated(
        sinks=2, window=5, columns=0, blocks=1, last=4, block=4, query_pool=2, key_pool=2
    ),
    "scores": Gated(
        sinks=2,
        last=4,
        gates=Gates(
            torch.full((2, 4), 3).int(),
            torch.tensor([[0, 0, 5, 0]] * 2).int(),
            torch.zeros(2, 4),
            kept=torch.tensor([[6, 6, 0, 4]] * 2).int(),
        ),
        scores=(score_modules()[0],) * 2,
    ),
}


def inputs(queries=N, batch=2):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, HEADS, queries, DIM, generator=g) * 2,
        torch.randn(batch, GROUPS, N, DIM, generator=g) * 2,
        torch.randn(batch, GROUPS, N, DIM, generator=g),
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("queries", [N, 23, 1])
def test_every_policy_answers_with_a_mask_that_attention_takes(policy, queries):
    query, key, value = inputs(queries)
    mask = policy(query, key, value, Layer(0))
    assert (mask.keys, mask.queries) == (N, queries)
    assert mask.dense().any(-1).all()  # no row is empty
    out = attention(query, key, value, mask)
    torch.testing.assert_close(out, attention(query, key, value, mask, impl="reference"))
    policy.check(2, HEADS, GROUPS)


def kind(**members):
    """A class of this name, as every other call makes one."""
    return type("Kind", (), members)


def method(*_):
    """Stands for any."""


ALL = {"retention": method, "scores": method, "bias": method}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_which_policies_evict_is_what_the_protocol_says(policy):
    assert evicts(policy) == isinstance(policy, Evicting)


@pytest.mark.parametrize("missing", ALL)
def test_a_policy_evicts_with_all_three_methods_only(missing):
    """Of its type or its own; two types of one name, and two objects of one type, are two."""
    some = {name: item for name, item in ALL.items() if name != missing}
    assert not evicts(kind(**some)()) and evicts(kind(**ALL)())
    assert not evicts(kind(**ALL | {missing: None})())
    own, other = (kind(**some)() for _ in range(2))
    setattr(own, missing, method)
    assert evicts(own) and not evicts(other)


@pytest.mark.parametrize("queries", [N, 23, 3])
@pytest.mark.parametrize("name", POLICIES | GLANCING)
def test_queries_that_a_policy_does_not_look_at_change_nothing(name, queries):
    policy = (POLICIES | GLANCING)[name]
    if not isinstance(policy, Glancing):
        return
    query, key, value = inputs(queries)
    expected = policy(query, key, value, Layer(0)).dense()
    rows = policy.rows_read(queries, 0)
    if rows is None:
        return
    assert rows == sorted(set(rows)) and all(0 <= row < queries for row in rows)
    hidden = torch.full_like(query, float("nan"))
    hidden[:, :, rows] = query[:, :, rows]
    assert torch.equal(policy(hidden, key, value, Layer(0)).dense(), expected)


def weights_of_last(query, key, last):
    key = key.repeat_interleave(HEADS // GROUPS, 1)
    rows = query.shape[2]
    full = query @ key.mT * DIM**-0.5
    hidden = torch.ones(rows, N).triu(N - rows + 1).bool()
    return full.masked_fill(hidden, float("-inf")).softmax(-1)[:, :, -last:]


def test_vertical_slash_keeps_the_heaviest_columns_and_diagonals():
    policy = VerticalSlash(verticals=6, slashes=9, last=5, sinks=2, window=3)
    query, key, value = inputs()
    mask = policy(query, key, value, Layer(0))
    weights = weights_of_last(query, key, 5)
    for b in range(2):
        for h in range(HEADS):
            w = weights[b, h]
            columns = w.sum(0)
            slashes = torch.stack(
                [sum(w[i, N - 5 + i - r] for i in range(5) if N - 5 + i >= r) for r in range(N)]
            )
            columns[:2], slashes[:3] = 9e9, 9e9
            assert mask.verticals[b, h].tolist() == sorted(columns.topk(6).indices.tolist())
            assert mask.diagonals[b, h].tolist() == sorted(slashes.topk(9).indices.tolist())


def test_vertical_slash_gives_no_weight_to_the_future():
    """The last row but one would look at the last key alone, if it could see it."""
    query, key = torch.zeros(1, 1, 2, DIM), torch.zeros(1, 1, N, DIM)
    query[..., 0, 0], query[..., 1, 1] = 50.0, 50.0
    key[..., 10, 0], key[..., N - 1, 0], key[..., 20, 1] = 1.0, 5.0, 1.0
    policy = VerticalSlash(verticals=2, slashes=3, last=2, sinks=0, window=1)
    mask = policy(query, key, key, Layer(0))
    assert mask.verticals.flatten().tolist() == [10, 20]
    assert mask.diagonals.flatten().tolist() == [0, N - 1 - 20, N - 2 - 10]


@pytest.mark.parametrize("queries", [N, 23])
def test_pooled_takes_the_smallest_set_of_blocks_that_reaches_top_p(queries):
    block, top_p = 8, 0.6
    query, key, value = inputs(queries)
    mask = Pooled(block, top_p)(query, key, value, Layer(0))
    first = N - queries
    for b in range(2):
        for h in range(HEADS):
            k = key[b, h * GROUPS // HEADS]
            means = torch.stack([x.mean(0) for x in k.split(block)])
            for i in range(mask.index.shape[2]):
                number = first // block + i
                a, z = max(number * block, first), min((number + 1) * block, N)
                pooled = query[b, h, a - first : z - first].mean(0)
                w = (means[: number + 1] @ pooled * DIM**-0.5).softmax(-1)
                chosen, mass = {0, number}, 0.0
                for j in w.argsort(descending=True).tolist():
                    if mass >= top_p:
                        break
                    chosen.add(j)
                    mass += float(w[j])
                kept = [j for j in mask.index[b, h, i].tolist() if j >= 0]
                assert kept == sorted(chosen)


def test_streaming_in_a_trimmed_cache_keeps_its_window():
    query, key, value = inputs(1)
    whole = Streaming(5, 20)(query, key, value, Layer(0)).dense()
    part = Streaming(5, 20)(query, key[:, :, 3:], value[:, :, 3:], Layer(0, first_key=3)).dense()
    assert torch.equal(part, whole[..., 3:])


@pytest.mark.parametrize("first_key", [0, 3, 9])
def test_streaming_keeps_the_first_keys_and_the_newest(first_key):
    query, key, value = inputs(23)
    mask = Streaming(sinks=5, window=20)(query, key, value, Layer(0, first_key))
    q, k = torch.arange(N - 23, N)[:, None], torch.arange(N)
    kept = (k <= q) & ((k < 5 - first_key) | (q - k < 20))
    assert torch.equal(mask.dense()[0, 0], kept)


@pytest.mark.parametrize("first_key", [3, 5, 9])
def test_vertical_slash_in_a_trimmed_cache_keeps_the_sinks_that_are_left(first_key):
    query, key, value = inputs()
    rest = {"verticals": 7, "slashes": 9, "last": 5, "window": 3}
    part = VerticalSlash(**rest, sinks=5)(query, key, value, Layer(0, first_key))
    same = VerticalSlash(**rest, sinks=max(5 - first_key, 0))(query, key, value, Layer(0))
    assert torch.equal(part.dense(), same.dense())


def test_bands_are_runs_of_neighbouring_diagonals():
    sets = torch.tensor([[0, 1, 2, 5, -1, -1], [3, 5, 7, 8, 9, -1], [-1, -1, -1, -1, -1, -1]])
    assert [count_bands(x) for x in sets] == [2, 3, 0]
    assert count_bands(sets) == 3 and count_bands(sets[:, :0]) == 0


def test_parse():
    assert parse("streaming:sinks=4,window=9") == Streaming(4, 9)
    assert parse("pooled:top_p=0.5") == Pooled(top_p=0.5)
    assert parse("full").name == "full"
    assert parse("gated:soft=true").soft and not parse("gated:soft=false").soft
    assert set(NAMES) == set(POLICIES) | {"dam"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fulll", "expected one of full, streaming"),
        ("streaming:windw=9", "expected fields sinks, window, received 'windw'"),
        ("streaming:window=x", "expected window as int, received 'x'"),
        ("streaming:window=-1", "expected window >= 1, received -1"),
        ("streaming:sinks=-1", "expected sinks >= 0"),
        ("pooled:top_p=1.5", r"expected top_p in \(0, 1\]"),
        ("pooled:block=0", "expected block >= 1"),
        ("vertical_slash:last=0", "expected last >= 1"),
        ("full:a=1", r"expected fields \(none\)"),
        ("gated:soft=1", "expected soft as true or false, received .1."),
        ("dam", "expected dam:PATH"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)
