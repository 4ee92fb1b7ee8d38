"""The encoder: summaries, the estimate without training, the teacher, the loss, the module."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask.encoder import (
    BlockEncoder,
    BlockSummary,
    block_effects,
    block_estimate,
    encoder_loss,
    encoder_loss_of,
)
from dynmask.masks.base import repeat_heads
from dynmask.retention import LATE_ROWS

BLOCK, QUERY_POOL, KEY_POOL = 8, 4, 2
POOLS = {"query_pool": QUERY_POOL, "key_pool": KEY_POOL}


def tensors(keys, queries, batch=2, heads=4, kv_heads=2, dim=6, seed=0):
    """Query, key and value in float64, with keys that differ in mean and in spread."""
    torch.manual_seed(seed)
    key = torch.randn(batch, kv_heads, keys, dim).double() * torch.rand(dim).double()
    key = key + 2 * torch.randn(batch, kv_heads, keys, 1).double()
    query = torch.randn(batch, heads, queries, dim).double()
    return query, key, torch.randn(batch, kv_heads, keys, dim + 1).double()


def groups(first, stop, size):
    """Positions of each cell of the grid that has any: lists of positions."""
    numbers = range(first // size, (stop - 1) // size + 1)
    return [[p for p in range(first, stop) if p // size == n] for n in numbers]


@st.composite
def sizes(draw):
    """(keys, queries, first key): odd sizes, queries and keys that begin inside a block."""
    keys = draw(st.integers(1, 45))
    return keys, draw(st.integers(1, keys)), draw(st.sampled_from([0, 0, 3, 8, 21]))


# summaries


def summary_by_definition(key, block, start):
    cells = groups(start, start + key.shape[2], block)
    parts = [key[:, :, [p - start for p in cell]] for cell in cells]
    mean = torch.stack([x.mean(2) for x in parts], 2)
    variance = torch.stack([x.var(2, correction=0) for x in parts], 2)
    return torch.tensor([len(cell) for cell in cells]).double(), mean, variance


def same(summary, expected):
    count, mean, variance = expected
    torch.testing.assert_close(summary.count, count)
    torch.testing.assert_close(summary.mean, mean)
    torch.testing.assert_close(summary.variance, variance)


@given(sizes(), st.data())
def test_a_summary_is_the_same_in_any_chunks_and_in_coarser_blocks(case, data):
    keys, _, start = case
    _, key, _ = tensors(keys, 1)
    expected = summary_by_definition(key, 4, start)
    same(BlockSummary.of(key, 4, start), expected)
    summary, at = None, 0
    while at < keys:
        stop = data.draw(st.integers(at + 1, keys))
        part = key[:, :, at:stop]
        place = start + at
        summary = summary.update(part, place) if summary else BlockSummary.of(part, 4, place)
        assert (summary.start, summary.stop) == (start, start + stop)
        at = stop
    same(summary, expected)
    same(summary.coarser(12), summary_by_definition(key, 12, start))


def test_a_summary_token_by_token_is_that_of_all_keys_and_old_ones_stay_as_they_were():
    _, key, _ = tensors(37, 1)
    steps = [BlockSummary.of(key[:, :, :1], 8)]
    for i in range(1, 37):
        steps.append(steps[-1].update(key[:, :, i : i + 1], i))
    for n, summary in enumerate(steps, 1):
        same(summary, summary_by_definition(key[:, :, :n], 8, 0))


@pytest.mark.parametrize("start", [0, 5])
def test_a_summary_of_many_keys_is_made_in_parts(start, monkeypatch):
    _, key, _ = tensors(45, 1)
    monkeypatch.setattr("dynmask.encoder.NUMBERS_AT_A_TIME", 2 * 2 * 6 * 16)
    same(BlockSummary.of(key, 8, start), summary_by_definition(key, 8, start))


def test_the_spread_of_half_precision_keys_far_from_zero_is_exact():
    key = (torch.randn(1, 1, 64, 4) * 0.1 + 1000).half()
    variance = BlockSummary.of(key, 64).update(key, 64).coarser(128).variance
    assert variance.dtype == torch.float32
    wide = key.double().var(2, correction=0, keepdim=True)
    torch.testing.assert_close(variance.double(), wide, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, key: s.update(key, 4), "expected 5, the position after"),
        (lambda s, key: s.update(key[:, :1], 5), "like the summary"),
        (lambda s, key: s.coarser(6), "a multiple of 4"),
        (lambda s, key: BlockSummary.of(key[:, :, :0], 4), "expected some"),
        (lambda s, key: BlockSummary.of(key, 0), "block >= 1"),
    ],
)
def test_summaries_refuse_what_does_not_fit(change, message):
    _, key, _ = tensors(5, 1)
    with pytest.raises(ValueError, match=message):
        change(BlockSummary.of(key, 4), key)


# the estimate


def scores_by_definition(query, key, first_key, scale, encoder=None):
    """One query pool and one key block at a time."""
    b, h, queries, _ = query.shape
    stop = first_key + key.shape[2]
    start = stop - queries
    key = repeat_heads(key, h)
    rows, columns = groups(start, stop, BLOCK), groups(first_key, stop, BLOCK)
    out = torch.full((b, h, len(rows), len(columns)), -math.inf).double()
    for i, row in enumerate(rows):
        visible = [c for c in columns if c[0] // BLOCK <= row[0] // BLOCK]
        total = torch.zeros(b, h, len(visible)).double()
        for pool in groups(row[0], row[-1] + 1, QUERY_POOL):
            q = query[:, :, [p - start for p in pool]].mean(2)
            found = [
                logit_by_definition(q, key, column, first_key, scale, encoder) for column in visible
            ]
            total += torch.stack(found, -1).softmax(-1) * len(pool) / len(row)
        out[:, :, i, : len(visible)] = total.log()
    return out


def logit_by_definition(q, key, column, first_key, scale, encoder):
    """[b, h] of one query pool q [b, h, d] and one key block."""
    parts = []
    for cell in groups(column[0], column[-1] + 1, KEY_POOL):
        k = key[:, :, [p - first_key for p in cell]]
        logit = (q * k.mean(2)).sum(-1) * scale
        logit += 0.5 * (scale**2 * q.square() * k.var(2, correction=0)).sum(-1)
        parts.append(logit + math.log(len(cell)))
    logit = torch.stack(parts).logsumexp(0)
    if encoder is None:
        return logit
    k = key[:, :, [p - first_key for p in column]]
    x = torch.cat([k.mean(2), k.std(2, correction=0)], -1)
    x = x / k.square().mean((2, 3))[..., None].sqrt()
    of_key = encoder.of_key.repeat_interleave(q.shape[1] // encoder.of_key.shape[0], 0)
    unit = torch.cat(
        [q / q.square().mean(-1, keepdim=True).sqrt(), torch.ones(*q.shape[:2], 1)], -1
    )
    mapped = [torch.einsum("bhi,hir->bhr", *p) for p in ((x, of_key), (unit, encoder.of_query))]
    return logit * encoder.gain + (mapped[0] * mapped[1]).sum(-1) * len(mapped[0][0, 0]) ** -0.5


@given(sizes())
def test_the_estimate_is_its_definition(case):
    keys, queries, first_key = case
    query, key, _ = tensors(keys, queries)
    found = block_estimate(query, key, BLOCK, 0.7, first_key=first_key, **POOLS)
    torch.testing.assert_close(found, scores_by_definition(query, key, first_key, 0.7))
    summary = BlockSummary.of(key, KEY_POOL, first_key)
    torch.testing.assert_close(
        block_estimate(query, summary, BLOCK, 0.7, query_pool=QUERY_POOL), found
    )
    some = torch.tensor([0, found.shape[2] - 1])
    part = block_estimate(query, key, BLOCK, 0.7, first_key=first_key, query_blocks=some, **POOLS)
    torch.testing.assert_close(part, found[:, :, some])


def test_the_estimate_is_true_for_pools_of_one_and_for_normal_keys():
    """The own block counts whole, future keys included: here the last rows, which see all."""
    query, key, _ = tensors(40, 8)
    logits = query @ repeat_heads(key, 4).mT * 6**-0.5
    expected = logits.softmax(-1).unflatten(3, (5, 8)).sum(4).mean(2, keepdim=True)
    found = block_estimate(query, key, 8, query_pool=1, key_pool=1)
    torch.testing.assert_close(found.exp(), expected)
    torch.manual_seed(0)
    key = torch.cat([torch.randn(1, 1, 2048, 6) * size + 0.3 for size in (0.5, 1.5)], 2).double()
    query = torch.randn(1, 1, 1, 6).double() * 2
    found = block_estimate(query, key, 2048, query_pool=1, key_pool=2048)
    expected = (query @ key.mT * 6**-0.5).softmax(-1).unflatten(3, (2, 2048)).sum(4)
    torch.testing.assert_close(found.exp(), expected, atol=0.03, rtol=0)
    assert abs(float(expected[0, 0, 0, 0]) - 0.5) > 0.2


@pytest.mark.parametrize("trained", [False, True])
def test_chunked_prefill_and_decode_score_as_at_once_where_query_blocks_are_whole(trained):
    encoder = make_encoder(trained)
    query, key, _ = tensors(48, 48)
    whole = encoder(query, key)
    summary = encoder.summary(key[:, :, :16])
    parts = [encoder(query[:, :, :16], summary)]
    for a, b in ((16, 40), (40, 48)):
        summary = summary.update(key[:, :, a:b], a)
        parts.append(encoder(query[:, :, a:b], summary))
    for at, part in zip((0, 2, 5), parts, strict=True):
        own = whole[:, :, at : at + part.shape[2]]
        torch.testing.assert_close(part, own[..., : part.shape[3]])
        assert bool((own[..., part.shape[3] :] == -math.inf).all())
    alone = encoder(query[:, :, -1:], summary)
    assert alone.shape == (2, 4, 1, 6) and bool(alone.isfinite().all())
    torch.testing.assert_close(alone, encoder(query[:, :, -1:], key))


def test_a_few_query_blocks_at_a_time_change_nothing(monkeypatch):
    query, key, value = tensors(45, 41)
    encoder, some = make_encoder(), torch.tensor([1, 5, 2])
    before = encoder(query, key), *block_effects(query, key, value, BLOCK, some)
    monkeypatch.setattr("dynmask.encoder.NUMBERS_AT_A_TIME", 500)
    after = encoder(query, key), *block_effects(query, key, value, BLOCK, some)
    torch.testing.assert_close(before, after)


# the encoder


def make_encoder(trained=True, heads=4, kv_heads=2, dim=6, dtype=torch.float64):
    torch.manual_seed(1)
    encoder = BlockEncoder(heads, kv_heads, dim, block=BLOCK, rank=3, **POOLS)
    if trained:
        with torch.no_grad():
            encoder.of_key.normal_()
            encoder.gain.uniform_(0.5, 2)
    return encoder.to(dtype)


@given(sizes())
def test_an_untrained_encoder_is_the_estimate_and_the_trained_part_its_definition(case):
    keys, queries, first_key = case
    query, key, _ = tensors(keys, queries)
    estimate = block_estimate(query, key, BLOCK, 0.7, first_key=first_key, **POOLS)
    torch.testing.assert_close(make_encoder(False)(query, key, first_key, scale=0.7), estimate)
    encoder = make_encoder()
    expected = scores_by_definition(query, key, first_key, 0.7, encoder)
    found = encoder(query, key, first_key, scale=0.7)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, estimate) or found.shape[3] == 1
    torch.testing.assert_close(found.exp().sum(-1), torch.ones_like(found.sum(-1)))


def test_grouped_heads_are_repeated_heads_and_a_batch_is_each_alone():
    query, key, _ = tensors(29, 21)
    encoder = make_encoder()
    found = encoder(query, key)
    wide = BlockEncoder(4, 4, 6, block=BLOCK, rank=3, **POOLS).double()
    weights = copy.deepcopy(encoder.state_dict())
    weights["of_key"] = weights["of_key"].repeat_interleave(2, 0)
    wide.load_state_dict(weights)
    torch.testing.assert_close(wide(query, repeat_heads(key, 4)), found)
    for row in range(2):
        own = slice(row, row + 1)
        torch.testing.assert_close(encoder(query[own], key[own]), found[own])


def test_later_keys_and_values_change_nothing():
    query, key, value = tensors(40, 40)
    encoder, some = make_encoder(), torch.tensor([0, 2])
    before = encoder(query, key), *block_effects(query, key, value, BLOCK, some)
    for x in (query, key, value):
        x[:, :, 24:] = math.nan
    after = encoder(query, key), *block_effects(query, key, value, BLOCK, some)
    assert torch.equal(before[0][:, :, :3], after[0][:, :, :3])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_half_precision_and_autocast_are_as_good_as_float32():
    query, key, _ = tensors(29, 21)
    encoder = make_encoder(dtype=torch.float32)
    query, key = query.bfloat16(), key.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(query, key)
    assert found.dtype == torch.float32
    true = make_encoder()(query.double(), key.double())
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "parameters"),
    [(8, 4, 2, 7_344_384), (16, 32, 8, 1_235_814_400)],
    ids=["reference", "Llama-3.2-1B"],
)
def test_encoders_have_less_than_a_hundredth_of_the_models_parameters(
    layers, heads, kv_heads, parameters
):
    encoder = BlockEncoder(heads, kv_heads, 64)
    assert layers * sum(p.numel() for p in encoder.parameters()) < parameters / 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "a multiple of 2 kv heads"),
        ({"rank": 0}, "rank >= 1"),
        ({"query_pool": 3}, "divides the block 8"),
        ({"key_pool": 16}, "divides the block 8"),
        ({"block": 0}, "block >= 1"),
    ],
)
def test_the_encoder_refuses_sizes_that_do_not_fit(change, message):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 6, "block": 8, **POOLS} | change
    with pytest.raises(ValueError, match=message):
        BlockEncoder(**sizes)


def test_tensors_that_do_not_fit_are_refused():
    query, key, value = tensors(8, 8)
    for q, k in ((query, key[:, :, :5]), (query[:, :3], key), (query[..., :4], key)):
        with pytest.raises(ValueError, match="last q positions of the keys"):
            block_estimate(q, k, BLOCK)
    with pytest.raises(ValueError, match="value: expected"):
        block_effects(query, key, value[:, :, :5], BLOCK, torch.tensor([0]))
    with pytest.raises(ValueError, match="divides the block 8"):
        block_estimate(query, BlockSummary.of(key, 3), BLOCK, query_pool=1)
    assert "rank=3, query_pool=4, key_pool=2" in repr(make_encoder())


# the teacher


def effects_by_definition(query, key, value, first_key, scale):
    """The whole attention map at once, blocks one by one."""
    h, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    start, stop = first_key + keys - queries, first_key + keys
    key, value = repeat_heads(key, h), repeat_heads(value, h)
    future = torch.arange(first_key, stop) > torch.arange(start, stop)[:, None]
    p = (query @ key.mT * scale).masked_fill(future, -math.inf).softmax(-1)
    output = p @ value
    effects, masses = [], []
    for column in groups(first_key, stop, BLOCK):
        at = [x - first_key for x in column]
        mass = p[..., at].sum(-1)
        mean = p[..., at] @ value[:, :, at] / mass.clamp(min=1e-300)[..., None]
        effects.append(mass * (mean - output).norm(dim=-1))
        masses.append(mass)
    rows = [[x - start for x in row] for row in groups(start, stop, BLOCK)]
    return tuple(
        torch.stack([torch.stack([x[..., row].mean(-1) for row in rows], -1) for x in xs], -1)
        for xs in (effects, masses)
    )


@given(sizes())
def test_effects_are_their_definition(case):
    keys, queries, first_key = case
    query, key, value = tensors(keys, queries)
    expected = effects_by_definition(query, key, value, first_key, 0.7)
    some = torch.arange(expected[0].shape[2]).flip(0)[::2]
    found = block_effects(query, key, value, BLOCK, some, 0.7, first_key=first_key)
    torch.testing.assert_close(found, tuple(x[:, :, some] for x in expected))
    torch.testing.assert_close(found[1].sum(-1), torch.ones_like(found[1].sum(-1)))


def test_a_block_with_the_values_of_the_output_has_no_effect_whatever_its_mass():
    query, key, value = tensors(40, 40)
    effects, masses = block_effects(query, key, value * 0 + 3, BLOCK, torch.arange(5))
    assert float(effects.max()) < 1e-12 and float(masses.max()) > 0.1


def test_effects_foretell_how_far_the_output_moves_without_the_block():
    query, key, value = tensors(40, 40, heads=2, kv_heads=2)
    p = (query @ key.mT * 6**-0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    effects, _ = block_effects(query[:, :, -1:], key, value, BLOCK, torch.tensor([0]))
    row = p[:, :, -1].softmax(-1)
    for j in range(4):
        cut = row.clone()
        cut[..., j * 8 : j * 8 + 8] = 0
        rest = cut.sum(-1, keepdim=True)
        moved = ((cut / rest - row)[..., None] * value).sum(2).norm(dim=-1)
        torch.testing.assert_close(effects[:, :, 0, j], moved * rest[..., 0])


# the loss


def test_the_loss_by_hand():
    hidden = -math.inf
    scores = torch.tensor([[[[5.0, 1.0, 2.0, 9.0, hidden], [5.0, 9.0, hidden, hidden, hidden]]]])
    effects = torch.tensor([[[[7.0, 1.0, 3.0, 7.0, 0.0], [7.0, 7.0, 0.0, 0.0, 0.0]]]])
    share = torch.tensor([1.0, 2.0]).softmax(0)
    expected = -(0.25 * share[0].log() + 0.75 * share[1].log())
    torch.testing.assert_close(encoder_loss(scores, effects), expected)


def visible(n):
    return torch.ones(n, n).tril().bool()


def test_the_loss_is_least_at_perfect_scores_where_it_is_the_entropy():
    torch.manual_seed(0)
    effects = torch.rand(2, 3, 9, 9).double().masked_fill(~visible(9), 0)
    scores = effects.log().masked_fill(~visible(9), -math.inf).requires_grad_()
    loss = encoder_loss(scores, effects)
    judged = effects.tril(-1)[..., 1:]
    p = (judged / judged.sum(-1, keepdim=True))[:, :, 3:]
    torch.testing.assert_close(loss, -torch.special.xlogy(p, p).sum(-1).mean())
    (grad,) = torch.autograd.grad(loss, scores)
    assert float(grad.abs().max()) < 1e-12
    moved = (scores + torch.randn(2, 3, 9, 9)).detach()
    assert encoder_loss(moved, effects) > loss


def test_first_own_and_hidden_blocks_are_no_lesson():
    torch.manual_seed(0)
    effects = torch.rand(1, 2, 6, 6).masked_fill(~visible(6), 0)
    scores = torch.randn(1, 2, 6, 6).masked_fill(~visible(6), -math.inf)
    own = torch.eye(6).bool()
    other, worth = scores + 3 * own, effects + own
    other[..., 0] += 2
    worth[..., 0] += 5
    torch.testing.assert_close(encoder_loss(other, worth), encoder_loss(scores, effects))


def test_where_nothing_can_be_judged_the_loss_is_zero_with_a_graph():
    scores = torch.randn(1, 2, 2, 2).masked_fill(~visible(2), -math.inf).requires_grad_()
    loss = encoder_loss(scores, torch.ones(1, 2, 2, 2))
    loss.backward()
    assert loss == 0 and scores.grad is not None and not scores.grad.any()
    some = torch.randn(1, 1, 4, 4).masked_fill(~visible(4), -math.inf)
    assert encoder_loss(some, torch.zeros(1, 1, 4, 4)) == 0
    query, key, value = tensors(24, 24)
    encoder = make_encoder()
    loss = encoder_loss_of(encoder, query, key, value)
    loss.backward()
    assert loss == 0 and not any(p.grad is None or p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("queries", [45, 18])
def test_the_loss_of_an_encoder_is_that_of_its_scores_when_every_block_is_drawn(queries):
    query, key, value = tensors(45, queries)
    encoder = make_encoder()
    loss = encoder_loss_of(encoder, query, key, value, query_blocks=50, scale=0.7, first_key=3)
    effects, _ = effects_by_definition(query, key, value, 3, 0.7)
    expected = encoder_loss(encoder(query, key, 3, scale=0.7), effects)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("queries", [32, 24, 11])
def test_query_blocks_with_nothing_to_choose_from_are_not_drawn(queries):
    """Of four blocks the last alone has two between the first and its own."""
    query, key, value = tensors(32, queries)
    encoder = make_encoder()
    losses = [encoder_loss_of(encoder, query, key, value, query_blocks=1) for _ in range(12)]
    assert min(losses) > 0 and all(torch.equal(losses[0], x) for x in losses)


def test_gradients_reach_the_encoder_and_nothing_else():
    query, key, value = (x.requires_grad_() for x in tensors(45, 45))
    encoder = make_encoder()
    encoder_loss_of(encoder, query, key, value).backward()
    assert query.grad is None and key.grad is None and value.grad is None
    for p in encoder.parameters():
        assert p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all())
    start = make_encoder(False)
    encoder_loss_of(start, query, key, value).backward()
    assert start.of_key.grad is not None and start.of_key.grad.any()


def test_the_loss_teaches():
    """Keys of two blocks carry a mark, and values that move the output: mass does not say so."""
    query, key, value = tensors(64, 64, batch=1)
    for block in (2, 4):
        key[:, :, block * 8 : block * 8 + 8, 0] += 2
        value[:, :, block * 8 : block * 8 + 8] *= 5
    encoder = make_encoder(False)
    optimizer = torch.optim.Adam(encoder.parameters(), 0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = encoder_loss_of(encoder, query, key, value, query_blocks=8)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses[::10]


def test_drawn_query_blocks_are_distinct_in_range_and_partly_late():
    from dynmask.retention import _draw

    late = LATE_ROWS // 64
    drawn = _draw(2, 100, 16, 0.25, torch.device("cpu"), near=4)
    assert len(drawn.unique()) == 16 and torch.equal(drawn, drawn.sort().values)
    assert int(drawn[0]) >= 2 and int(drawn[-1]) < 100 and int((drawn >= 100 - late).sum()) == 4
    assert not torch.equal(drawn, _draw(2, 100, 16, 0.25, torch.device("cpu"), near=4))
    assert _draw(2, 9, 16, 0.25, torch.device("cpu"), near=4).tolist() == list(range(2, 9))
    for message, arguments in (("query_blocks >= 1", {"query_blocks": 0}), ("late", {"late": 2})):
        with pytest.raises(ValueError, match=message):
            encoder_loss_of(make_encoder(), *tensors(40, 40), **arguments)
