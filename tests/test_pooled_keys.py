"""Pools of keys that a cache carries along: those of all keys at once, whatever the chunks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask import encoder
from dynmask.encoder import BlockEncoder, block_estimate
from dynmask.policies import Gated
from dynmask.policies.base import Layer
from dynmask.pooled_keys import PooledKeys
from dynmask.summary import BlockSummary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Fed:
    """Pools beside the keys that they are made of, for each row."""

    def __init__(self, batch, heads, sizes, dtype, seed=0):
        self.draw = torch.Generator().manual_seed(seed)
        self.pools = PooledKeys(heads, sizes)
        self.rows = [torch.empty(3, 0, 5, dtype=dtype) for _ in range(batch)]
        self.dtype = dtype

    def feed(self, n, padding):
        key = torch.randn(len(self.rows), 3, n, 5, generator=self.draw).to(self.dtype)
        runs = {row: (pad, n) for row, pad in enumerate(padding) if pad < n}
        self.pools.extend(key, runs)
        for row, (start, stop) in runs.items():
            self.rows[row] = torch.cat([self.rows[row], key[row, :, start:stop]], 1)

    def crop(self, tokens):
        self.rows = [keys[:, : max(keys.shape[1] - tokens, 0)] for keys in self.rows]
        self.pools.crop(tokens, lambda row, start, stop: self.rows[row][:, start:stop])

    def check(self):
        for row, keys in enumerate(self.rows):
            if not keys.shape[1]:
                continue
            for first in range(len(self.pools.heads)):
                head = self.pools.heads[first]
                found = self.pools.of(slice(row, row + 1), slice(head, head + 1))
                for size in self.pools.sizes:
                    expected = BlockSummary.of(keys[None, head : head + 1], self.pools.sizes[0])
                    equal(found.coarser(size), expected.coarser(size))


def equal(a, b):
    """Bit for bit."""
    assert (a.block, a.start, a.stop) == (b.block, b.start, b.stop)
    for name in ("count", "mean", "spread"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([[0, 1, 2], [1], [0, 2]]),
    sizes=st.sampled_from([(4,), (1, 8), (2, 6), (5, 10)]),
    steps=st.lists(st.sampled_from([1, 1, 1, 2, 9, 40, -1, -3, -100]), min_size=1, max_size=9),
    padding=st.lists(st.sampled_from([0, 0, 1, 7, 50]), min_size=3, max_size=3),
    kind=st.sampled_from(sorted(DTYPES)),
)
def test_pools_are_those_of_all_keys_at_once(batch, heads, sizes, steps, padding, kind):
    """In chunks, token by token, with padding on the left and after going back; bit for bit."""
    fed = Fed(batch, heads, sizes, DTYPES[kind])
    fed.feed(30, [0, *padding][:batch])
    for number, n in enumerate(steps):
        if n < 0:
            fed.crop(-n)
        else:
            fed.feed(n, [0] * batch if number else [0, *padding][:batch])
        fed.check()


def test_rows_are_reordered_and_repeated_as_their_keys_are():
    fed = Fed(3, [0, 2], (4, 8), torch.float32)
    fed.feed(21, [3, 0, 6])
    fork = copy.deepcopy(fed)
    fed.pools.reorder(torch.tensor([2, 0, 2]))
    fed.rows = [fed.rows[i] for i in (2, 0, 2)]
    fed.feed(1, [0] * 3)
    fed.check()
    fed.pools.repeat(2)
    fed.rows = [x for x in fed.rows for _ in range(2)]
    fed.feed(7, [0] * 6)
    fed.check()
    fork.check()  # what happened to its copy did not happen to it
    one = fed.pools
    assert one.nbytes == sum(x.untyped_storage().nbytes() for x in one._tensors.values())
    one.reset()
    assert one.nbytes == 0 and one.batch == 0


def test_some_heads_are_views_and_others_are_not_known():
    fed = Fed(1, [1, 2], (4,), torch.float32)
    fed.feed(13, [0])
    rows = slice(0, 1)
    both = fed.pools.of(rows, slice(1, 3))
    assert both.mean.shape == (1, 2, 4, 5) and both.count.tolist() == [4, 4, 4, 1]
    assert (
        both.mean.untyped_storage().data_ptr()
        == fed.pools.of(rows, slice(2, 3)).mean.untyped_storage().data_ptr()
    )
    assert fed.pools.of(rows, slice(0, 2)) is None and fed.pools.of(rows, slice(0, 3)) is None
    with pytest.raises(ValueError, match="sizes that divide the next"):
        PooledKeys([0], (4, 6))


# how much a choice holds, and how it is cut


SIZES = {"block": 8, "query_pool": 2, "key_pool": 4}


def tensors(keys, queries, heads=4, groups=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, queries, 6, generator=draw) * 2
    key = torch.randn(1, groups, keys, 6, generator=draw)
    return query, key


class Largest(torch.overrides.TorchFunctionMode):
    """The most numbers that one tensor had, results aside."""

    most = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not isinstance(out, torch.nn.Parameter):
            self.most = max(self.most, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("queries", [1, 37, 400])
@pytest.mark.parametrize("trained", [False, True])
def test_ranges_of_query_blocks_and_of_key_blocks_change_nothing(monkeypatch, queries, trained):
    """Even where the pools of one query block are more numbers than may be held at a time."""
    query, key = tensors(403, queries)
    own = BlockEncoder(4, 2, 6, rank=3, **SIZES)
    if trained:
        torch.nn.init.normal_(own.of_key, std=0.3)

    def estimate():
        if trained:
            return own(query, key).detach()
        return block_estimate(query, key, **SIZES)

    whole = estimate()
    for few in (5000, 900):
        monkeypatch.setattr("dynmask.encoder.NUMBERS_AT_A_TIME", few)
        # shares are sums of the same terms, in another order: an ulp or two for each
        torch.testing.assert_close(estimate(), whole, rtol=2e-6, atol=2e-6)


def test_no_more_is_held_at_a_time_than_is_said(monkeypatch):
    query, key = tensors(4096, 32)
    summary = BlockSummary.of(key, SIZES["key_pool"])
    one = 4 * 4 * 1024  # of a query block: logits of all heads, query pools and key pools

    def held():
        with Largest() as seen:
            block_estimate(query, summary, 8, query_pool=2)
        return seen.most

    assert held() >= 4 * one
    assert summary.mean.numel() < one - 4000
    for few in (2 * one, one, one - 4000):
        monkeypatch.setattr("dynmask.encoder.NUMBERS_AT_A_TIME", few)
        assert held() <= few


def test_a_range_never_looks_at_what_begins_after_it(monkeypatch):
    query, key = tensors(400, 400)
    summary = BlockSummary.of(key, 4)
    whole = block_estimate(query, summary, 8, query_pool=2)
    real, looked = encoder._log_sums, []

    def spy(x, summary, own, front, size):
        looked.append(own.stop)
        return real(x, summary, own, front, size)

    monkeypatch.setattr(encoder, "_log_sums", spy)
    found = block_estimate(query, summary, 8, query_pool=2, query_blocks=range(7, 30))
    torch.testing.assert_close(found, whole[:, :, 7:30], rtol=2e-6, atol=2e-6)
    assert looked == [30 * 8 // 4]
    for wrong in (range(5, 5), range(0, 51), range(-1, 3), range(0, 9, 2)):
        with pytest.raises(ValueError, match="query_blocks: expected a range"):
            block_estimate(query, summary, 8, query_pool=2, query_blocks=wrong)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [0, 2, 3], [1, 3], [2]])
@pytest.mark.parametrize("queries", [1, 5, 64])
def test_known_pools_choose_what_all_keys_do_and_no_key_is_looked_at(heads, queries):
    from dynmask.policies.gates import Gates

    query, key = tensors(150, queries, heads=8, groups=4)
    window = torch.full((1, 8), 5).int()
    blocks = torch.zeros_like(window)
    for head in heads:
        blocks[0, 2 * head : 2 * head + 1 + head % 2] = 2  # one head of a group, or both
    gates = Gates(window, torch.zeros_like(window), torch.zeros(1, 8), blocks)
    policy = Gated(sinks=1, gates=gates, **SIZES)
    expected = policy(query, key, key, Layer(0))
    pools = PooledKeys(range(4), (4,))
    pools.extend(key, {0: (0, 150)})
    nothing = key.new_full((1,), float("nan")).expand_as(key)
    layer = Layer(0, pools=lambda groups: pools.of(slice(0, 1), groups))
    found = policy(query, nothing, nothing, layer)
    assert torch.equal(found.dense(), expected.dense())
    lists = [x.index for x in getattr(found, "parts", [found]) if hasattr(x, "index")]
    assert lists and all(x.is_contiguous() for x in lists)  # kernels step over rows of that length
