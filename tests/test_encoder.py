"""The encoder: summaries, the estimate without training, the teacher, the loss, the module."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynmask
from dynmask import Budget, GatedSettings, MaskCard
from dynmask.budgets import BUDGETS, calibrate_gates
from dynmask.encoder import BlockEncoder, BlockSummary, block_estimate
from dynmask.encoder_loss import block_effects, block_masses, encoder_loss, encoder_loss_of
from dynmask.encoder_training import EncoderTraining
from dynmask.fingerprints import describe_model
from dynmask.masks.base import repeat_heads
from dynmask.policies import Gated, Layer
from dynmask.retention import LATE_ROWS
from tests.tiny import copied, tiny_llama

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
    monkeypatch.setattr("dynmask.summary.NUMBERS_AT_A_TIME", 2 * 2 * 6 * 16)
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
    for part in ("encoder", "encoder_loss"):
        monkeypatch.setattr(f"dynmask.{part}.NUMBERS_AT_A_TIME", 500)
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


@pytest.mark.parametrize("heads", [[0, 1], [3], [0, 2], [2, 3], [3, 2, 0, 1]])
def test_the_encoder_of_some_heads_scores_as_the_whole_one(heads):
    query, key, _ = tensors(29, 21)
    encoder = make_encoder()
    part = encoder.of_heads(heads)
    groups = list(dict.fromkeys(head // 2 for head in heads))
    found = part(query[:, heads], key[:, groups], 3, scale=0.7)
    torch.testing.assert_close(found, encoder(query, key, 3, scale=0.7)[:, heads])
    assert encoder.of_query.requires_grad and not any(p.requires_grad for p in part.parameters())


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
    masses = block_masses(query, key, BLOCK, some, 0.7, first_key=first_key)
    torch.testing.assert_close(masses, found[1])


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
    some = {"query_blocks": 50, "scale": 0.7, "first_key": 3}
    loss = encoder_loss_of(encoder, query, key, value, teacher="mass", **some)
    _, masses = effects_by_definition(query, key, value, 3, 0.7)
    torch.testing.assert_close(loss, encoder_loss(encoder(query, key, 3, scale=0.7), masses))
    with pytest.raises(ValueError, match="teacher: expected 'effect' or 'mass'"):
        encoder_loss_of(encoder, query, key, value, teacher="mas")


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
    from dynmask.retention import draw_rows

    late = LATE_ROWS // 64
    drawn = draw_rows(2, 100, 16, 0.25, torch.device("cpu"), near=4)
    assert len(drawn.unique()) == 16 and torch.equal(drawn, drawn.sort().values)
    assert int(drawn[0]) >= 2 and int(drawn[-1]) < 100 and int((drawn >= 100 - late).sum()) == 4
    assert not torch.equal(drawn, draw_rows(2, 100, 16, 0.25, torch.device("cpu"), near=4))
    assert draw_rows(2, 9, 16, 0.25, torch.device("cpu"), near=4).tolist() == list(range(2, 9))
    for message, arguments in (("query_blocks >= 1", {"query_blocks": 0}), ("late", {"late": 2})):
        with pytest.raises(ValueError, match=message):
            encoder_loss_of(make_encoder(), *tensors(40, 40), **arguments)


# training on a frozen model

SETTINGS = GatedSettings(
    max_kl=5.0, budgets=(Budget(4), Budget(16, blocks=2)), judged=8, sinks=1, last=8, block=BLOCK,
    encoder=True, rank=2, steps=12, rate=3e-3, lessons=8, **POOLS,
)  # fmt: skip


def documents(*lengths):
    """Repeated pieces, so that there is something far away to look for."""
    g = torch.Generator().manual_seed(3)
    piece = torch.randint(2, 200, (17,), generator=g)
    return [piece.repeat(n // 17 + 1)[:n].roll(i) for i, n in enumerate(lengths)]


def training(model, settings=SETTINGS, given=(90, 80, 100)):
    return EncoderTraining(model, documents(*given), settings, 0, describe_model(model))


def parameters(lessons):
    return [p.detach().clone() for e in lessons.encoders for p in e.parameters()]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_training_lowers_the_loss_of_every_layer_and_touches_nothing_else(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    long = GatedSettings(**{**vars(SETTINGS), "steps": 40, "rate": 0.01})
    lessons = training(model, long, (200, 150, 180, 170, 160))
    start = parameters(lessons)
    rng = torch.get_rng_state()
    lessons.run(None, None, False)
    encoders, figures = lessons.judge()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(lessons.held_out) == 1 and len(lessons.taught) == 4
    for encoder, (plain, trained), kept in zip(
        encoders, figures["loss"], figures["kept"], strict=True
    ):
        assert kept and trained < plain - 0.005
        assert (encoder.gain == 1).all() and not encoder.of_query.requires_grad
    moved = [not torch.equal(a, b) for a, b in zip(start, parameters(lessons), strict=True)]
    assert moved == [False, True, True] * 2  # the gain is left alone


def test_layers_learn_alone(model):
    """What one layer's encoder learns does not depend on whether another learns."""
    whole, alone = training(model), training(model)
    whole.run(None, None, False)
    alone.encoders[0].of_key.register_hook(torch.zeros_like)
    alone.encoders[0].of_query.register_hook(torch.zeros_like)
    alone.run(None, None, False)
    found, other = parameters(whole), parameters(alone)
    assert not torch.equal(found[2], other[2])
    assert all(torch.equal(a, b) for a, b in zip(found[3:], other[3:], strict=True))


def test_an_encoder_that_foretells_no_better_is_not_kept(model):
    lessons = training(model)
    with torch.no_grad():
        lessons.encoders[1].of_key.normal_(std=30)
    encoders, figures = lessons.judge()
    assert encoders == (None, None) and figures["kept"] == [False, False]
    (same, untrained), (plain, worse) = figures["loss"]
    assert same == untrained and worse > plain


def test_a_training_that_was_interrupted_goes_on_as_if_it_was_not(model, tmp_path, monkeypatch):
    expected = training(model)
    expected.run(None, None, False)
    path, learn = tmp_path / "state", EncoderTraining._learn

    def interrupted(self, teacher):
        if self.step == 5:
            raise KeyboardInterrupt
        learn(self, teacher)

    with monkeypatch.context() as patch:
        patch.setattr(EncoderTraining, "_learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training(model).run(path, {"run": 1}, False)
    again = training(model)
    again.run(path, {"run": 1}, False)
    assert again.step == 12
    pairs = zip(parameters(expected), parameters(again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    done = training(model)
    monkeypatch.setattr(EncoderTraining, "_learn", lambda *given: pytest.fail("learned again"))
    done.run(path, {"run": 1}, False)
    assert torch.equal(parameters(done)[2], parameters(again)[2])
    content = path.read_bytes()
    with pytest.raises(ValueError, match="which is of another run"):
        training(model).run(path, {"run": 2}, False)
    assert path.read_bytes() == content
    path.write_text("something else")
    with pytest.raises(ValueError, match="cannot be read"):
        training(model).run(path, {"run": 1}, False)
    assert path.read_text() == "something else"


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"rank": 40}, (90, 90), "encoders of at most 1% of the model's .* received rank 40"),
        ({}, (90, 31), "two of 32 tokens at least"),
        ({"budgets": BUDGETS}, (90, 90), "a budget with blocks"),
        ({"rank": 0}, (90, 90), "rank: expected a whole number"),
        ({"steps": 2.0}, (90, 90), "steps: expected a whole number"),
        ({"teacher": "gain"}, (90, 90), "'mass' or 'effect'"),
        ({"encoder": 1}, (90, 90), "True or False"),
        ({"rate": 0}, (90, 90), "rate: expected a number above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_model_runs(
    model, settings, given, message, monkeypatch
):
    monkeypatch.setattr(EncoderTraining, "run", lambda *given: pytest.fail("trained first"))
    with pytest.raises(ValueError, match=message):
        wanted = GatedSettings(**{**vars(SETTINGS), **settings})
        calibrate_gates(model, documents(*given), wanted, progress=False)


@pytest.fixture(scope="module")
def card(model):
    return calibrate_gates(model, documents(90, 80, 100), SETTINGS, progress=False)


def test_a_card_holds_the_encoders_and_gives_them_back(model, card, tmp_path):
    assert card.header["encoder"]["kept"] == [True, True]
    path = card.save_pretrained(tmp_path / "card")
    again = MaskCard.from_pretrained(path.parent)
    first, second = card.policy().encoders, again.policy().encoders
    lessons = training(model)
    lessons.run(None, None, False)
    for layer in range(2):
        for name, parameter in lessons.encoders[layer].state_dict().items():
            for encoders in (first, second):
                assert torch.equal(encoders[layer].state_dict()[name], parameter)
    count = sum(p.numel() for e in second for p in e.parameters())
    assert count < 0.01 * sum(p.numel() for p in model.parameters())
    with dynmask.sparsify(model, again.policy(guard=None)), torch.no_grad():
        assert torch.isfinite(model(documents(90)[0][None]).logits).all()


def test_a_calibration_interrupted_while_it_trains_comes_to_the_same_card(
    model, card, tmp_path, monkeypatch
):
    path, learn = tmp_path / "state.json", EncoderTraining._learn

    def interrupted(self, teacher):
        if self.step == 7:
            raise KeyboardInterrupt
        learn(self, teacher)

    model.train()
    given = model, documents(90, 80, 100), SETTINGS
    with monkeypatch.context() as patch:
        patch.setattr(EncoderTraining, "_learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate_gates(*given, checkpoint=path, progress=False)
    assert model.training and (tmp_path / "state.json.encoder").exists()
    again = calibrate_gates(*given, checkpoint=path, progress=False)
    model.eval()
    assert again.header["encoder"] == card.header["encoder"]
    assert again.header["kl"] == card.header["kl"]
    assert all(torch.equal(again.tensors[name], x) for name, x in card.tensors.items())


def test_maps_choose_the_blocks_that_their_encoder_scores_best():
    query, key, value = tensors(90, 90)
    encoder = make_encoder()
    gates = dict(sinks=0, window=1, columns=0, blocks=2, block=BLOCK, **POOLS)
    mask = Gated(**gates, encoders=(encoder,))(query, key, value, Layer(0))
    scores = encoder(query, key)
    own = torch.eye(12).bool()
    best = scores.masked_fill(own, -math.inf).topk(2, -1)
    expected = own.expand_as(scores).clone()
    expected.scatter_(-1, best.indices, best.values > -math.inf)
    expected |= own
    blocks = mask.dense()[:, :, 7:-2:8].unflatten(-1, (-1, 90))[..., 0, :]
    found = torch.nn.functional.pad(blocks, (0, 6)).unflatten(-1, (12, 8)).any(-1)
    assert torch.equal(found, expected[:, :, :11])
    plain = Gated(**gates)(query, key, value, Layer(0))
    assert not torch.equal(plain.dense(), mask.dense())
    with pytest.raises(ValueError, match="encoders for 2 layers of 4 heads"):
        Gated(**gates, encoders=(encoder,)).check(2, 4, 2)
    with pytest.raises(ValueError, match="encoders for 1 layers of 8 heads"):
        Gated(**gates, encoders=(encoder,)).check(1, 8, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, h: t.pop("layers.1.of_key"),
        lambda t, h: t.update({"layers.2.of_key": t["layers.1.of_key"].clone()}),
        lambda t, h: t.update({"layers.1.of_key": t["layers.1.of_key"][..., :1].contiguous()}),
        lambda t, h: t["layers.0.of_query"].fill_(math.nan),
        lambda t, h: h["settings"].update(rank=10**12),
        lambda t, h: h["settings"].update(rank="2"),
        lambda t, h: h["settings"].update(encoder=False),
        lambda t, h: h["settings"].update(block=9),
        lambda t, h: h["model"].update(head_dim=10**12),
        lambda t, h: h.pop("encoder"),
        lambda t, h: h["encoder"].update(kept=[True]),
        lambda t, h: h["encoder"].update(kept=[1, 1]),
        lambda t, h: h["encoder"].update(kept="ab"),
        lambda t, h: h["encoder"].update(loss=[[1.0, -1.0]] * 2),
        lambda t, h: h["encoder"].update(loss=[[1.0]] * 2),
    ],
)
def test_damaged_cards_with_encoders_are_refused(card, damage):
    header, held = copied(card)
    damage(held, header)
    with pytest.raises(ValueError, match="mask card"):
        MaskCard(header, held)
