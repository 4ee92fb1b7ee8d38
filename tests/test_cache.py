"""The bounded cache: decode = chunks = one forward, in O(width) memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask import LifetimeMask, Span, attention
from dynmask.cache import KeyStore
from dynmask.nn import Retention
from dynmask.retention import ExactRetention
from dynmask.slots import FEWEST_SLOTS

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def tensors(batch, heads, groups, n, dim=8, seed=0, levels=None):
    """Query, key, value in float64 and scores in float32; few ``levels`` make ties."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=draw, dtype=torch.float64)
    k = torch.randn(batch, groups, n, dim, generator=draw, dtype=torch.float64)
    v = torch.randn(batch, groups, n, dim + 3, generator=draw, dtype=torch.float64)
    s = torch.randn(batch, groups, n, generator=draw)
    if levels is not None:
        s = torch.randint(levels, s.shape, generator=draw).float() - 1
    return q, k, v, s


def whole(q, k, v, s, retention, limit=None, bias=None):
    """The dense oracle of one forward."""
    mask = retention.mask(s)
    if limit is not None:
        mask = mask & LifetimeMask.window(k.shape[2], limit)
    return attention(q, k, v, mask, None if bias is None else bias(s), impl="reference")


def in_pieces(store, q, k, v, s, cuts, bias=None):
    """The same through a store, the tokens cut at ``cuts``."""
    parts, start = [], 0
    for stop in (*sorted(cuts), q.shape[2]):
        part = (x[:, :, start:stop] for x in (q, k, v, s))
        parts.append(store.attend(*part, bias=bias))
        start = stop
    return torch.cat(parts, 2)


RETENTIONS = st.builds(
    lambda sinks, window, rest: Retention(sinks + window + rest, window, sinks),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 6),
) | st.builds(
    lambda sinks, window: Retention(sinks + window, window, sinks),
    st.integers(0, 3),
    st.integers(1, 5),
)
PER_HEAD = st.builds(
    lambda sinks, window, rests: Retention(tuple(sinks + window + r for r in rests), window, sinks),
    st.integers(0, 3),
    st.integers(1, 4),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
N = 40


@settings(max_examples=60)
@given(
    retention=RETENTIONS | PER_HEAD,
    cuts=st.sets(st.integers(1, N - 1), max_size=6) | st.just(frozenset(range(1, N))),
    levels=st.none() | st.integers(1, 3),
    limit=st.none() | st.integers(1, 12),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_decode_is_chunks_is_one_forward(retention, cuts, levels, limit, biased, seed):
    q, k, v, s = tensors(2, 4, 2, N, seed=seed, levels=levels)
    bias = torch.tanh if biased else None
    expected = whole(q, k, v, s, retention, limit, bias)
    store = KeyStore(retention, limit)
    torch.testing.assert_close(in_pieces(store, q, k, v, s, cuts, bias), expected, **EXACT)
    assert store.seen == [N, N]
    assert (store.positions >= 0).sum(-1).max() == min(N, retention.most)


@settings(max_examples=30)
@given(
    retention=RETENTIONS | PER_HEAD,
    pads=st.lists(st.integers(0, 20), min_size=2, max_size=3),
    cuts=st.sets(st.integers(1, N - 1), max_size=5),
    tail=st.integers(0, 12),
    levels=st.none() | st.integers(1, 2),
)
def test_padded_rows_are_as_if_alone(retention, pads, cuts, tail, levels):
    q, k, v, s = tensors(len(pads), 4, 2, N, levels=levels)
    cuts = sorted({*cuts, *range(N - tail, N)})
    store, parts, start = KeyStore(retention), [], 0
    for stop in (*cuts, N):
        spans = [
            Span(row, max(pad - start, 0), stop - start, max(pad - start, 0), stop - start)
            for row, pad in enumerate(pads)
            if pad < stop
        ]
        part = (x[:, :, start:stop] for x in (q, k, v, s))
        parts.append(store.attend(*part, spans))
        start = stop
    out = torch.cat(parts, 2)
    for row, pad in enumerate(pads):
        own = [x[row : row + 1, :, pad:] for x in (q, k, v, s)]
        torch.testing.assert_close(out[row : row + 1, :, pad:], whole(*own, retention), **EXACT)
        assert not out[row, :, :pad].any()
    assert store.seen == [N - pad for pad in pads]


def test_repeated_tokens_tie_exactly():
    retention = Retention(7, 2, 1)
    q, k, v, s = (x[:, :, torch.tensor([0, 1, 0, 2] * 8)] for x in tensors(1, 2, 1, 3))
    expected = whole(q, k, v, s, retention)
    for cuts in ([], [9, 20], range(1, 32)):
        out = in_pieces(KeyStore(retention), q, k, v, s, cuts)
        torch.testing.assert_close(out, expected, **EXACT)


def test_float64_scores_are_kept_as_they_are_for_the_bias():
    q, k, v, s = tensors(1, 2, 1, 30)
    s = 3 * s.double() / 7
    expected = whole(q, k, v, s, Retention(7, 2, 1), bias=torch.exp)
    for cuts in ([9, 20], range(1, 30)):
        out = in_pieces(KeyStore(Retention(7, 2, 1)), q, k, v, s, cuts, torch.exp)
        torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("window", [0, 2])
def test_what_is_rounded_off_decides_no_tie(window):
    """Each call has scores with an error of its own, as those of equal tokens have."""
    retention = Retention(7, window, 1)
    q, k, v, s = tensors(1, 2, 1, 60, levels=3)
    s, draw = 0.3 + s / 3, torch.Generator().manual_seed(2)
    expected = whole(q, k, v, s, retention)
    for cuts in ([9, 20], range(1, 60)):
        s = s * (1 + 1e-7 * torch.randn(s.shape, generator=draw))
        out = in_pieces(KeyStore(retention), q, k, v, s, cuts)
        torch.testing.assert_close(out, expected, **EXACT)
    # more than that is told apart, and all of it where scores are to be taken as they are
    near, last = torch.tensor([[[1.001, 1.0]]]), torch.tensor([[[1 + 1e-6, 1.0]]])
    for scores, kind, first in ((near, Retention, True), (last, Retention, False),
                                (last, ExactRetention, True)):  # fmt: skip
        assert kind(1).mask(scores).dense()[0, 0, 1].tolist() == [first, not first]


def test_infinite_scores_are_ranked():
    for retention in (Retention(5), Retention(5, 2, 0), Retention(3, 0, 3)):
        q, k, v, s = tensors(1, 2, 1, 30, levels=3)
        s = torch.where(s == 1, torch.inf, torch.where(s == 0, -torch.inf, s))
        expected = whole(q, k, v, s, retention)
        for cuts in ([11, 13], range(1, 30)):
            out = in_pieces(KeyStore(retention), q, k, v, s, cuts)
            torch.testing.assert_close(out, expected, **EXACT)


# memory


def test_bytes_stop_growing_at_width_tokens():
    retention = Retention(48, 8, 2)
    store, sizes = KeyStore(retention), []
    for _ in range(12):
        store.attend(*tensors(2, 2, 1, 16))
        sizes.append(store.nbytes)
    tensors_of = (store.keys, store.values, store.positions, store.scores)
    held = sum(x.numel() * x.element_size() for x in tensors_of)
    assert sizes[-1] == held + 4 * 2 + 4  # the count of each row, the width of each head
    assert set(sizes[2:]) == {sizes[-1]}
    for _ in range(5):
        store.attend(*tensors(2, 2, 1, 1))
    assert store.nbytes == sizes[-1]
    assert store.slots == 48


@pytest.mark.parametrize("window", [0, 1])
def test_empty_slots_of_a_narrow_head_are_no_keys(window):
    """Scores above 0, that of an empty slot."""
    q, k, v, s = tensors(1, 2, 2, N)
    retention = Retention((3, 9), window)
    store = KeyStore(retention)
    out = in_pieces(store, q, k, v, s.exp(), range(1, N))
    torch.testing.assert_close(out, whole(q, k, v, s.exp(), retention), **EXACT)
    assert (store.positions >= 0).sum(-1).tolist() == [[3, 9]]


def test_a_short_prompt_takes_few_slots():
    store = KeyStore(Retention(4096, 8, 2))
    store.attend(*tensors(1, 2, 1, 5))
    assert store.slots == FEWEST_SLOTS
    store.attend(*tensors(1, 2, 1, FEWEST_SLOTS))
    assert store.slots == 2 * FEWEST_SLOTS


def test_full_slots_stay_where_they_are_and_need_no_mask():
    store = KeyStore(Retention(16, 4, 2))
    store.attend(*tensors(2, 2, 1, 30))
    where = store.keys.data_ptr(), store.positions.data_ptr()
    _, k, v, s = tensors(2, 2, 1, 1)
    live = store.extend(k, v, s)
    assert (store.keys.data_ptr(), store.positions.data_ptr()) == where
    assert live.mask.is_causal and live.key.shape[2] == 16
    assert live.key.data_ptr() == store.keys.data_ptr()


@pytest.mark.parametrize("retention", [Retention(16, 4, 2), Retention((12, 16)), Retention(16)])
def test_decoding_in_full_slots_reads_nothing_back(retention):
    store = KeyStore(retention, limit=10)
    store.attend(*tensors(2, 2, 2, 20), [Span(0, 0, 20, 0, 20), Span(1, 1, 20, 1, 20)])
    # tensors without data: asking for a value, or for a shape that depends on one, fails
    store._tensors = {name: x.to("meta") for name, x in store._tensors.items()}
    _, k, v, s = (x.to("meta") for x in tensors(2, 2, 2, 1))
    before = {name: (id(x), x.shape) for name, x in store._tensors.items()}
    for _ in range(3):
        assert store.extend(k, v, s).key.shape[2] == 16
    store.seen = [23, 23]  # beams are of one length
    store.reorder(torch.zeros(2, dtype=torch.int64, device="meta"))
    assert {name: (id(x), x.shape) for name, x in store._tensors.items()} == before


def test_keys_are_kept_without_their_graph():
    q, k, v, s = tensors(1, 2, 1, 8)
    k.requires_grad_()
    store = KeyStore(Retention(4, 1, 0))
    out = store.attend(q, k, v, s)
    assert out.requires_grad and not store.keys.requires_grad


# the batch


def continued(store, index):
    """Attend five more tokens, those of row ``index[i]`` in row i."""
    q, k, v, s = (x[index] for x in tensors(3, 2, 1, 5, seed=7))
    return in_pieces(store, q, k, v, s, [1, 2])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("index", [[2, 0, 0], [1], [0, 0, 1, 1, 2, 2]])
def test_reordered_rows_carry_their_keys(padded, index):
    store = KeyStore(Retention(6, 2, 1))
    spans = [Span(row, row, 9, row, 9) for row in range(3)] if padded else None
    store.attend(*tensors(3, 2, 1, 9), spans)
    seen = list(store.seen)
    expected = continued(copy.deepcopy(store), [0, 1, 2])
    again = copy.deepcopy(store)
    if index == [0, 0, 1, 1, 2, 2]:
        again.repeat(2)
    else:
        again.reorder(torch.tensor(index))
    assert again.seen == [seen[row] for row in index]
    torch.testing.assert_close(continued(again, index), expected[index], **EXACT)
    if index == [1]:
        store.reorder(torch.tensor([False, True, False]))
        torch.testing.assert_close(continued(store, index), expected[index], **EXACT)


def test_crop_gives_back_an_earlier_state():
    q, k, v, s = tensors(2, 2, 1, 10)
    store = KeyStore(Retention(10, 2, 1))
    in_pieces(store, q, k, v, s, [4, 5, 6])
    store.crop(4)
    assert store.seen == [6, 6]
    for cuts in ([1], [2]):
        again = copy.deepcopy(store)
        out = in_pieces(again, *(x[:, :, 6:] for x in (q, k, v, s)), cuts)
        torch.testing.assert_close(out, whole(q, k, v, s, store.retention)[:, :, 6:], **EXACT)


def test_crop_refuses_where_keys_were_evicted():
    store = KeyStore(Retention(9, 2, 1))
    store.attend(*tensors(1, 2, 1, 10))
    with pytest.raises(ValueError, match="crop: expected at most 9 tokens seen.*deepcopy"):
        store.crop(1)
    store.crop(0)
    with pytest.raises(ValueError, match="0 or more"):
        store.crop(-1)


def test_reset_takes_another_batch():
    store = KeyStore(Retention(6, 2, 1))
    store.attend(*tensors(3, 2, 1, 9))
    with pytest.raises(ValueError, match=r"expected \(3, 1\).*reset\(\)"):
        store.attend(*tensors(2, 2, 1, 9))
    store.reset()
    assert store.nbytes == 0 and store.batch == 0
    store.attend(*tensors(2, 2, 1, 9))


def test_replayed_steps_are_counted():
    store = KeyStore(Retention(6, 2, 1))
    store.attend(*tensors(1, 2, 1, 6))
    with pytest.raises(ValueError, match="replayed: expected a store whose slots were full"):
        store.replayed()
    store.attend(*tensors(1, 2, 1, 1))
    store.replayed(3)
    assert store.seen == [10]


REFUSED = {
    "scores": (lambda q, k, v, s: (q, k, v, s[..., :-1]), "the new tokens alone"),
    "values": (lambda q, k, v, s: (q, k, v[:, :, 1:], s), "the new tokens alone"),
    "NaN": (lambda q, k, v, s: (q, k, v, s.masked_fill(s > 0, torch.nan)), "received NaN"),
    "whole scores": (lambda q, k, v, s: (q, k, v, s.int()), "floating dtype, received torch.int32"),
    "heads": (
        lambda q, k, v, s: (q, *(x.repeat(1, 3, 1, 1) for x in (k, v)), s.repeat(1, 3, 1)),
        "a multiple of 3 heads",
    ),
    "dims": (lambda q, k, v, s: (q[..., 1:], k, v, s), "like key"),
    "packed": (
        lambda q, k, v, s: (q, k, v, s, [Span(0, 0, 2, 0, 2), Span(0, 2, 4, 2, 4)]),
        "one sequence a batch row",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_stored(name):
    change, reason = REFUSED[name]
    for before in (0, 5):
        store = KeyStore(Retention(3, 1, 0))
        if before:
            store.attend(*tensors(1, 2, 1, before))
        with pytest.raises(ValueError, match=f"expected.*{reason}|{reason}"):
            store.attend(*change(*tensors(1, 2, 1, 4)))
        assert store.seen == [before] * bool(before)


def test_nan_in_one_row_leaves_the_others_as_they_were():
    store, spans = KeyStore(Retention(3, 1, 0)), [Span(0, 0, 3, 0, 3), Span(1, 1, 3, 1, 3)]
    q, k, v, s = tensors(2, 2, 1, 3)
    s[1, :, 0] = torch.nan  # of padding
    store.attend(q, k, v, s, spans)
    s[1, :, 2] = torch.nan
    with pytest.raises(ValueError, match="received NaN"):
        store.attend(q, k, v, s, spans)
    assert store.seen == [3, 2]


def test_stores_of_nothing_are_refused():
    for arguments, message in [((512,), "expected a Retention, received 512"),
                               ((Retention(3), 0), "limit: expected")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            KeyStore(*arguments)


def test_rows_of_different_lengths_need_attend():
    store = KeyStore(Retention(6, 2, 1))
    store.attend(*tensors(2, 2, 1, 3), [Span(0, 0, 3, 0, 3), Span(1, 1, 3, 1, 3)])
    _, k, v, s = tensors(2, 2, 1, 2)
    with pytest.raises(ValueError, match="equally many tokens"):
        store.extend(k, v, s)
