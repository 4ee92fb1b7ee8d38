"""The trainable layer: retention, scores, the loss that teaches them, and the layer itself."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dynmask import LifetimeMask, Span, nn, spans_packed
from dynmask.cache import KeyStore
from dynmask.masks.base import repeat_heads
from dynmask.nn import (
    DynamicMaskAttention,
    PairScore,
    Retention,
    ValueScore,
    collect_retention_loss,
    retention_loss_of,
)

FORMS = ["exp", "linear", "bounded"]
HIDDEN, HEADS, KV_HEADS, DIM = 24, 4, 2, 6
CPU = torch.device("cpu")


def kept(scores, widths, window, sinks):
    """The definition, one query and one head at a time: bool [b, g, n, n]."""
    b, g, n = scores.shape
    out = torch.zeros(b, g, n, n, dtype=torch.bool)
    scores = scores.detach()
    for row in range(b):
        for head in range(g):
            for q in range(n):
                always = {k for k in range(q + 1) if k < sinks or k > q - window}
                rest = sorted(
                    set(range(q + 1)) - always, key=lambda k: (float(scores[row, head, k]), k)
                )
                best = rest[len(rest) - min(widths[head] - window - sinks, len(rest)) :]
                out[row, head, q, list(always) + best] = True
    return out


@st.composite
def retentions(draw):
    """Scores with ties, and what to retain: (scores, widths, window, sinks)."""
    keys = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 10_000))
    scores = torch.randn(2, 2, keys, generator=torch.Generator().manual_seed(seed))
    scores = scores.round(decimals=draw(st.sampled_from([0, 1, 6])))
    window, sinks = draw(st.sampled_from([0, 1, 5])), draw(st.sampled_from([0, 1, 3]))
    widths = [max(window + sinks + draw(st.integers(0, 9)), 1) for _ in range(2)]
    return scores, tuple(widths), window, sinks


@given(retentions())
def test_a_query_reads_sinks_window_and_the_best_of_the_rest(case):
    scores, widths, window, sinks = case
    mask = Retention(widths, window, sinks).mask(scores)
    assert torch.equal(mask.dense(), kept(*case))
    assert mask.most == min(max(widths), mask.keys)
    assert mask.plain == (min(widths) >= mask.keys)
    one = LifetimeMask.retained(scores, widths[0], window, sinks)
    assert torch.equal(one.dense(), kept(scores, (widths[0],) * 2, window, sinks))


@given(retentions(), st.data())
def test_the_mask_of_a_prefix_is_the_prefix_of_the_mask(case, data):
    scores, widths, window, sinks = case
    whole = LifetimeMask.retained(scores, widths, window, sinks).dense()
    stop = data.draw(st.integers(1, scores.shape[2]))
    part = LifetimeMask.retained(scores[..., :stop], widths, window, sinks)
    assert torch.equal(part.dense(), whole[..., :stop, :stop])
    queries = data.draw(st.integers(1, scores.shape[2]))
    last = LifetimeMask.retained(scores, widths, window, sinks, queries=queries)
    assert torch.equal(last.dense(), whole[..., -queries:, :])


def test_retained_without_extras_is_top_w_and_without_a_rest_is_streaming():
    scores = torch.randn(2, 3, 33).round(decimals=1)
    assert torch.equal(LifetimeMask.retained(scores, 7).death, LifetimeMask.top_w(scores, 7).death)
    both = LifetimeMask.retained(scores, 9, window=6, sinks=3).dense()
    assert torch.equal(both, LifetimeMask.streaming(33, 3, 6).dense().expand_as(both))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 3, "window": 2, "sinks": 2}, "pass at least 4"),
        ({"width": (4, 4, 4)}, "one for each of 2 heads"),
        ({"width": (4, 0)}, "width >= 1"),
        ({"width": 4, "window": -1}, "window >= 0"),
        ({"width": 4.0}, "width >= 1"),
    ],
)
def test_retained_refuses_what_does_not_fit(arguments, message):
    scores = torch.randn(1, 2, 5)
    with pytest.raises(ValueError, match=message):
        Retention(**arguments).mask(scores)
    if not isinstance(arguments["width"], float):
        with pytest.raises(ValueError, match=message):
            LifetimeMask.retained(scores, **arguments)


def test_retained_refuses_nan_scores():
    with pytest.raises(ValueError, match=r"received NaN, first at .* \[0, 1, 2\]"):
        LifetimeMask.retained(torch.tensor([[[0.0] * 3, [0.0, 0.0, math.nan]]]), 2)


# scores


def test_value_scores_by_hand():
    value = torch.tensor([[[[1.0], [2.0]], [[3.0], [-1.0]]]])  # 2 kv heads, 2 keys
    score = ValueScore(2, 1, "linear")
    with torch.no_grad():
        score.A.copy_(torch.tensor([2.0, -1.0]))
        score.dt_proj.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    soft = torch.nn.functional.softplus
    x = torch.tensor([[[1.0, 2.0], [4.0, 1.0]]])
    expected = soft(x) * torch.tensor([[[2.0], [-1.0]]])
    torch.testing.assert_close(score(None, value), expected)
    score.form = "bounded"
    torch.testing.assert_close(score(None, value), x * torch.tensor([[[2.0], [-1.0]]]))


def test_bias_of_each_form():
    s = torch.tensor([[[-1.0, 0.5, 200.0]]])
    torch.testing.assert_close(
        ValueScore(1, 1, "exp").bias(s), torch.tensor([[[-1.0, 0.5, 10.0]]]).exp()
    )
    assert torch.equal(ValueScore(1, 1, "linear").bias(s), s)
    torch.testing.assert_close(ValueScore(1, 1, "bounded").bias(s), 4 * (s / 4).tanh())
    assert PairScore(1, 1).bias(s) is None


def test_each_kv_head_has_a_network_of_its_own():
    torch.manual_seed(0)
    score = PairScore(3, 5, hidden=7).double()
    key, value = torch.randn(2, 3, 9, 5).double(), torch.randn(2, 3, 9, 5).double()
    out = score(key, value)
    for g in range(3):
        x = torch.cat([key[:, g], value[:, g]], -1)
        sizes = [x[..., :5], x[..., 5:]]
        sizes = [s.square().mean(-1, keepdim=True).sqrt() for s in sizes]
        x = torch.cat([key[:, g] / sizes[0], value[:, g] / sizes[1], *(s.log() for s in sizes)], -1)
        hidden = torch.nn.functional.silu(x @ score.w_in[g] + score.b_in[g])
        torch.testing.assert_close(out[:, g], (hidden @ score.w_out[g])[..., 0])


@pytest.mark.parametrize("make", [ValueScore, PairScore])
def test_scores_are_float32_under_autocast_and_in_half_precision(make):
    torch.manual_seed(0)
    score = make(2, 8)
    if make is ValueScore:
        torch.nn.init.ones_(score.A)
    key, value = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    plain = score(key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(key, value), plain)
    key, value = key.bfloat16(), value.bfloat16()
    assert score(key, value).dtype == torch.float32
    assert torch.equal(score.bfloat16()(key, value), score.float()(key, value))


@pytest.mark.parametrize("make", [ValueScore, PairScore])
def test_long_inputs_are_scored_a_part_at_a_time(make, monkeypatch):
    torch.manual_seed(0)
    score = make(2, 4).double()
    if make is ValueScore:
        torch.nn.init.ones_(score.A)
    key, value = (torch.randn(3, 2, 23, 4).double().requires_grad_() for _ in range(2))
    learned = [value, *score.parameters()]
    weight = torch.randn(3, 2, 23).double()
    results = []
    for most in (2**24, 5 * 24):
        monkeypatch.setattr("dynmask.scores.NUMBERS_AT_A_TIME", most)
        out = score(key, value)
        results.append([out, *torch.autograd.grad((out * weight).sum(), learned)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    if make is ValueScore:  # what plain autograd says
        x = value.transpose(1, 2).flatten(2) @ score.dt_proj.weight.T
        plain = (torch.nn.functional.softplus(x) * score.A).transpose(1, 2)
        for a, b in zip(
            results[0],
            [plain, *torch.autograd.grad((plain * weight).sum(), learned)],
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_scores_keep_no_wide_copy_of_the_values_for_the_gradient():
    score, saved = ValueScore(2, 16), []
    value = torch.randn(1, 2, 50, 16).bfloat16().requires_grad_()

    def pack(x):
        saved.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        score(None, value)
    assert max(saved) == value.numel() * 2


# the retention loss


def loss_by_definition(query, key, scores, after, sinks):
    """Every row sampled, the whole attention map at once."""
    h, q, n = query.shape[1], query.shape[2], key.shape[2]
    g = key.shape[1]
    logits = query @ repeat_heads(key, h).mT * query.shape[-1] ** -0.5
    row, k = torch.arange(n - q, n)[:, None], torch.arange(n)
    share = logits.masked_fill(k > row, -math.inf).softmax(-1).masked_fill(k > row - after, 0)
    worth = share.unflatten(1, (g, h // g)).amax((2, 3))
    judged = slice(sinks, n - after)
    worth = worth[..., judged] / worth[..., judged].sum(-1, keepdim=True)
    return -(worth * scores[..., judged].log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("queries", [41, 20])
@pytest.mark.parametrize("at_a_time", [2**24, 100])
def test_the_loss_is_its_definition_when_every_row_is_drawn(queries, at_a_time, monkeypatch):
    monkeypatch.setattr("dynmask.retention.NUMBERS_AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, queries, 6).double(), torch.randn(2, 2, 41, 6).double()
    scores = torch.randn(2, 2, 41).double().requires_grad_()
    loss = retention_loss_of(
        query, key, scores, rows=100, after=3, protect=Retention(9, window=5, sinks=2)
    )
    expected = loss_by_definition(query, key, scores, 5, 2)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_loss_is_least_where_the_scores_are_the_worths():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 60, 8) * 2, torch.randn(1, 1, 60, 8)
    scores = torch.zeros(1, 1, 60, requires_grad=True)
    optimizer = torch.optim.Adam([scores], 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = retention_loss_of(query, key, scores, rows=60, after=2)
        loss.backward()
        optimizer.step()
    share = (
        (query @ key.mT * 8**-0.5)
        .masked_fill(torch.ones(60, 60).triu(1).bool(), -math.inf)
        .softmax(-1)
    )
    worth = share.masked_fill(torch.ones(60, 60).triu(-1).bool(), 0).amax((1, 2))[..., :58]
    found = scores.detach()[0, :, :58].softmax(-1)
    torch.testing.assert_close(found, worth / worth.sum(-1, keepdim=True), atol=3e-3, rtol=0)


def test_drawn_rows_are_distinct_in_range_and_partly_late():
    from dynmask.retention import LATE_ROWS, draw_rows

    rows = draw_rows(100, 5000, 48, 0.25, CPU)
    assert len(rows.unique()) == 48 and int(rows[0]) >= 100 and int(rows[-1]) < 5000
    assert torch.equal(rows, rows.sort().values)
    assert not torch.equal(rows, draw_rows(100, 5000, 48, 0.25, CPU))
    assert int((rows >= 5000 - LATE_ROWS).sum()) == 12
    assert draw_rows(7, 30, 48, 0.25, CPU).tolist() == list(range(7, 30))
    assert len(draw_rows(0, 260, 48, 0.25, CPU)) == 48


def test_a_sequence_that_is_too_short_to_judge_gives_zero_with_a_graph():
    scores = torch.randn(1, 2, 12, requires_grad=True)
    loss = retention_loss_of(torch.randn(1, 4, 12, 4), torch.randn(1, 2, 12, 4), scores, after=12)
    loss.backward()
    assert loss == 0 and scores.grad is not None and not scores.grad.any()


# the layer


def make_layer(width=9, window=3, sinks=2, form: Any = "exp", dtype=torch.float64, seed=0, **more):
    """A layer whose scores are far from ties."""
    torch.manual_seed(seed)
    layer = DynamicMaskAttention(
        HIDDEN, HEADS, KV_HEADS, DIM, width=width, window=window, sinks=sinks, form=form,
        retention_after=4, **more,
    )  # fmt: skip
    with torch.no_grad():
        layer.score.A.copy_(torch.tensor([0.5, 0.7]))
        layer.score.dt_proj.weight.normal_()
    return layer.to(dtype)


def rotary(n, dim=DIM, first=0, dtype=torch.float64):
    angle = torch.arange(first, first + n)[:, None] * 0.3 ** torch.arange(dim // 2)
    angle = torch.cat([angle, angle], -1)[None].to(dtype)
    return angle.cos(), angle.sin()


def dense_parts(layer, x, cos, sin):
    """Rotated queries and keys, values and scores, in plain torch."""
    b, n, _ = x.shape

    def split(y):
        return y.view(b, n, -1, layer.head_dim).transpose(1, 2)

    def turn(y):
        low, high = y[..., : DIM // 2], y[..., DIM // 2 :]
        c, s = cos[:, None, :, : DIM // 2], sin[:, None, :, : DIM // 2]
        return torch.cat([low * c - high * s, high * c + low * s], -1)

    q, k, v = (split(p(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    s = layer.score.dt_proj(v.transpose(1, 2).flatten(2)).transpose(1, 2)
    if layer.score.form != "bounded":
        s = torch.nn.functional.softplus(s)
    return turn(layer.q_norm(q)), turn(layer.k_norm(k)), v, s * layer.score.A[:, None]


def dense_layer(layer, x, cos, sin):
    """The same layer in plain torch with an N x N mask."""
    q, k, v, s = dense_parts(layer, x, cos, sin)
    bias = {"exp": s.exp(), "linear": s, "bounded": 4 * (s / 4).tanh()}[layer.score.form]
    r = layer.retention
    seen = kept(s, [r.width] * KV_HEADS, r.window, r.sinks)
    logits = q @ repeat_heads(k, HEADS).mT * layer.head_dim**-0.5
    logits = logits + repeat_heads(bias, HEADS)[:, :, None, :]
    weights = logits.masked_fill(~repeat_heads(seen, HEADS), -math.inf).softmax(-1)
    return layer.o_proj((weights @ repeat_heads(v, HEADS)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [7, 45])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layer_and_its_gradients_are_the_dense_ones(form, n, qk_norm):
    layer = make_layer(form=form, qk_norm=qk_norm, bias=qk_norm, retention_weight=0.0)
    x = torch.randn(2, n, HIDDEN).double().requires_grad_()
    out, maps = layer(x, rotary(n))
    expected = dense_layer(layer, x, *rotary(n))
    assert maps is None
    torch.testing.assert_close(out, expected)
    learned = [x, *layer.parameters()]
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), learned)
    theirs = torch.autograd.grad((expected * weight).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert layer.score.A.shape == (KV_HEADS,) and all(g.any() for g in ours)


def test_rotation_may_cover_a_part_of_the_head():
    query, key = torch.randn(1, 2, 5, 6), torch.randn(1, 1, 5, 6)
    cos, sin = rotary(5, 4, dtype=torch.float32)
    q, k = nn.rotate(query, key, cos, sin)
    assert torch.equal(q[..., 4:], query[..., 4:]) and not torch.equal(q[..., :4], query[..., :4])
    torch.testing.assert_close(k.norm(dim=-1), key.norm(dim=-1))


@pytest.mark.parametrize("sinks", [0, 3])
def test_sequences_without_two_keys_to_judge_are_told(sinks):
    """A single one has nothing to be told from: its loss is 0 as well."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(16, 2, 1, width=8, window=2, sinks=sinks, retention_after=20)
    for tokens in (20 + sinks, 21 + sinks):
        with pytest.warns(UserWarning, match="20 tokens after them; give longer sequences"):
            layer(torch.randn(1, tokens, 16))
        assert float(collect_retention_loss(layer)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(1, 22 + sinks, 16))
        assert float(collect_retention_loss(layer)) > 0
        layer.eval()(torch.randn(1, 20, 16))


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_the_layer_starts_as_a_sliding_window(form):
    """A is 0: all scores tie, and the later key wins."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(HIDDEN, HEADS, KV_HEADS, width=5, window=0, sinks=0, form=form)
    x = torch.randn(1, 30, HIDDEN)
    moved = x.clone()
    moved[:, 10] += 1
    changed = (layer(x)[0] != layer(moved)[0]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_each_sequence_alone(side):
    layer = make_layer().eval()
    lengths, n = [31, 12, 1], 31
    x = torch.randn(3, n, HIDDEN).double()
    mask = torch.zeros(3, n, dtype=torch.bool)
    cos, sin = torch.zeros(3, n, DIM).double(), torch.zeros(3, n, DIM).double()
    for row, length in enumerate(lengths):
        place = slice(n - length, n) if side == "left" else slice(0, length)
        mask[row, place] = True
        cos[row, place], sin[row, place] = (y[0] for y in rotary(length))
    out = layer(x, (cos, sin), attention_mask=mask)[0]
    for row, length in enumerate(lengths):
        alone = layer(x[row : row + 1, mask[row]], rotary(length))[0]
        torch.testing.assert_close(out[row : row + 1, mask[row]], alone)


def test_packed_sequences_are_each_alone_and_so_is_their_loss():
    layer = make_layer(retention_rows=100)
    lengths = [20, 3, 14]
    parts = [torch.randn(1, n, HIDDEN).double() for n in lengths]
    turns = [torch.cat(y, 1) for y in zip(*(rotary(n) for n in lengths), strict=True)]
    out = layer(torch.cat(parts, 1), tuple(turns), spans=spans_packed([0, 20, 23, 37]))[0]
    loss = collect_retention_loss(layer)
    alone, losses = [], []
    for n, part in zip(lengths, parts, strict=True):
        alone.append(layer(part, rotary(n))[0])
        losses.append(collect_retention_loss(layer) * n / 37)
    torch.testing.assert_close(out, torch.cat(alone, 1))
    torch.testing.assert_close(loss, torch.stack(losses).sum())


@pytest.mark.parametrize("width", [9, (6, 11)])
def test_a_store_of_live_keys_gives_what_one_forward_gives(width):
    layer = make_layer(width=width, layer_idx=1).eval()
    x = torch.randn(2, 40, HIDDEN).double()
    whole = layer(x, rotary(40))[0]
    stores = [KeyStore(layer.retention), KeyStore(layer.retention)]
    parts, first = [], 0
    for size in (13, 1, 1, 20, 1, 4):
        turn = rotary(size, first=first)
        parts.append(layer(x[:, first : first + size], turn, past_key_values=stores)[0])
        first += size
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert stores[0].batch == 0 and stores[1].slots == layer.retention.most


def test_the_layer_keeps_the_loss_of_its_own_attention():
    layer = make_layer(retention_rows=100, retention_weight=0.3, qk_norm=True)
    x = torch.randn(2, 70, HIDDEN).double()
    layer(x, rotary(70))
    q, k, _, s = dense_parts(layer, x, *rotary(70))
    torch.testing.assert_close(
        collect_retention_loss(layer), 0.3 * loss_by_definition(q, k, s, 4, 2)
    )


def test_the_retention_loss_reaches_the_score_only():
    layer = make_layer()
    layer(torch.randn(1, 30, HIDDEN).double().requires_grad_(), rotary(30))
    collect_retention_loss(layer).backward()
    reached = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert reached == {"score.A", "score.dt_proj.weight"}
    assert layer.score.A.grad.any() and layer.score.dt_proj.weight.grad.any()


def test_losses_are_weighted_summed_and_cleared():
    layers = torch.nn.ModuleList(
        [make_layer(retention_rows=99, retention_weight=w) for w in (1.0, 0.5, 0.0)]
    )
    x = torch.randn(1, 30, HIDDEN).double()
    for layer in layers:
        layer(x)
    total = collect_retention_loss(layers)
    layers[0](x)
    torch.testing.assert_close(total, 1.5 * collect_retention_loss(layers))
    assert collect_retention_loss(layers) == 0
    layers.eval()
    layers[0](x)
    assert collect_retention_loss(layers) == 0
    layers.train()[0](x)
    assert collect_retention_loss(copy.deepcopy(layers)) == 0  # a copy has not run


class Stack(torch.nn.Module):
    """Two layers with residuals, checkpointed or not."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layers = torch.nn.ModuleList([make_layer(seed=s, retention_rows=7) for s in (1, 2)])
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)[0]
            else:
                x = x + checkpoint(lambda y, m=layer: m(y)[0], x, use_reentrant=self.reentrant)
        return x


def test_checkpointing_changes_no_gradient():
    x = torch.randn(1, 40, HIDDEN).double()
    grads = []
    for reentrant in (None, False):
        model = Stack(reentrant)
        for _ in range(2):  # the forward that is repeated in backward leaves nothing behind
            torch.manual_seed(5)
            out = model(x.clone().requires_grad_())
            (out.square().mean() + collect_retention_loss(model)).backward()
            assert collect_retention_loss(model) == 0
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused():
    model = Stack(reentrant=True)
    model(torch.randn(1, 40, HIDDEN).double().requires_grad_())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        collect_retention_loss(model)


def test_bfloat16_with_large_scores_stays_finite():
    layer = make_layer(form="exp", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.score.A.fill_(500.0)
    x = torch.randn(1, 40, HIDDEN).bfloat16().requires_grad_()
    out = layer(x, rotary(40))[0]
    assert out.dtype == torch.bfloat16
    (out.float().square().sum() + collect_retention_loss(layer)).backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()] if p.grad is not None)


def test_autocast_selects_as_float32_does(monkeypatch):
    layer = make_layer(dtype=torch.float32)
    seen = []
    monkeypatch.setattr(
        Retention, "mask", lambda self, s, queries=None: seen.append(s) or LifetimeMask.causal(40)
    )
    x = torch.randn(1, 40, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, rotary(40))[0]
    value = (x.bfloat16() @ layer.v_proj.weight.bfloat16().T).view(1, 40, KV_HEADS, DIM)
    assert out.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], layer.score(None, value.transpose(1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kv_heads": 3}, "divisor of 4"),
        ({"width": 8, "window": 9}, "pass at least 13"),
        ({"width": (200, 200, 200)}, "each of 2 kv heads"),
        ({"form": "cubic"}, "exp, linear, bounded"),
        ({"impl": "fast"}, "impl: expected"),
        ({"retention_weight": -1}, "retention_weight"),
        ({"retention_weight": float("nan")}, "retention_weight: expected .* received nan"),
        ({"retention_weight": "0.1"}, "retention_weight: expected .* received '0.1'"),
        ({"width": 512.0}, "whole number.* received 512.0"),
        ({"width": None}, "whole number.* received None"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(arguments, message):
    settings = {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "width": 200} | arguments
    with pytest.raises(ValueError, match=message):
        DynamicMaskAttention(**settings)


def test_a_mask_of_tokens_alone_places_nothing():
    assert nn.spans_of_mask(torch.ones(2, 5, dtype=torch.bool)) is None
    mask = torch.tensor([[False, True, True], [False] * 3, [True, False, False]])
    assert nn.spans_of_mask(mask) == [Span(0, 1, 3, 1, 3), Span(2, 0, 1, 0, 1)]


def test_input_that_does_not_fit_is_refused():
    layer = make_layer().eval()
    x = torch.randn(2, 5, HIDDEN).double()
    holes = torch.tensor([[True, False, True, True, True], [True] * 5])
    for arguments, message in [
        ((x[0],), "hidden_states"),
        ((x[:, :0], None), "a token at least"),
        ((x[:0], None), "a token at least"),
        ((x, rotary(4)), "position_embeddings"),
        ((x, (*rotary(5), rotary(5)[0])), "cos and sin of one shape"),
        ((x, (rotary(5)[0], rotary(5, 4)[1])), "cos and sin of one shape"),
        ((x, None, None, None, {}), "expected a KeyStore.* received dict"),
        ((x, rotary(5), holes), "unbroken run"),
        ((x, rotary(5), holes & False), "no tokens"),
        ((x, rotary(5), holes.int()), "bool"),
        ((x, rotary(5), holes | True, []), "received both"),
        ((x, None, None, None, KeyStore(Retention(3))), r"KeyStore\(layer.retention\)"),
        ((x, None, None, None, [KeyStore(Retention(3))]), "layer_idx"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    kept = layer.retention
    for retention, message in [
        (512, "expected a Retention, received 512"),
        (Retention((9, 9, 9)), "each of 2 kv heads, received 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.retention = retention
    assert layer.retention is kept
