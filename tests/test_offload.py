"""GatedCache with maps that choose blocks: pools as state, and keys that lie on the host."""

import contextlib
import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from dynmask import GatedCache, cli, hosted, sparsify  # noqa: E402
from dynmask.encoder import BlockEncoder  # noqa: E402
from dynmask.hosted import HostedStore  # noqa: E402
from dynmask.masks import LifetimeMask  # noqa: E402
from dynmask.policies import Gated, gated  # noqa: E402
from dynmask.policies.gates import Gates  # noqa: E402
from dynmask.pooled_keys import PooledKeys  # noqa: E402
from dynmask.summary import BlockSummary  # noqa: E402
from tests.stand_in import save_stand_in  # noqa: E402
from tests.test_bounded import CLOSE, generate, prompt  # noqa: E402
from tests.tiny import TINY, VOCAB, tiny_llama  # noqa: E402

INF = LifetimeMask.INF
SIZES = {"block": 4, "query_pool": 2, "key_pool": 2}
# two kv heads of two query heads: blocks and a window beside them; blocks beside a dense map;
# blocks beside columns; blocks beside blocks; windows alone
WINDOW = [[3, 7, INF, 4], [5, 2, 9, 6], [3, 1, 2, 3], [6, 6, 5, 5]]
COLUMNS = [[0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
BLOCKS = [[2, 0, 0, 1], [1, 0, 1, 2], [2, 3, 1, 1], [0, 0, 2, 0]]
HOSTED = [[0], [1], [0, 1], [1]]


def policy_of(layers=4, trained=False, dim=16, **over):
    window, columns, blocks = (
        torch.tensor(x[:layers], dtype=torch.int32) for x in (WINDOW, COLUMNS, BLOCKS)
    )
    gates = Gates(window, columns, torch.zeros(window.shape), blocks)
    encoders = None
    if trained:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            made = [BlockEncoder(4, 2, dim, rank=3, **SIZES) for _ in range(layers)]
        for encoder in made:
            torch.nn.init.normal_(encoder.of_key, std=0.3)
        encoders = (None, *made[1:])
    given = {"sinks": 2, "least": 1e-3, "last": 5, "gates": gates, "encoders": encoders}
    given["decode"] = "select"
    return Gated(**(given | SIZES | over))


@pytest.fixture(scope="module", params=["llama", "gpt_oss"])
def model(request):
    return TINY[request.param](layers=4)


KINDS = pytest.mark.parametrize(("offload", "trained"), [(False, True), (True, False)])


# the law: the outputs of the same policy over all keys, pooled anew by every call


@KINDS
def test_generation_equals_that_with_a_full_cache(model, offload, trained):
    ids, mask = prompt()
    with sparsify(model, policy_of(trained=trained)) as run:
        expected, logits = generate(model, ids, mask, new=8)
        cache = GatedCache(run, offload=offload)
        tokens, got = generate(model, ids, mask, cache, new=8)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(got, logits, **CLOSE)
    assert (cache.host_nbytes > 0) is offload


@settings(max_examples=8, deadline=None)
@given(
    parts=st.lists(st.sampled_from([1, 1, 1, 2, 9, 30]), min_size=2, max_size=7),
    offload=st.booleans(),
    trained=st.booleans(),
    decode=st.sampled_from(["select", "keep"]),
    announced=st.booleans(),
)
@torch.no_grad()
def test_chunks_turns_and_tokens_of_any_length(parts, offload, trained, decode, announced):
    """Where windows are beside blocks alone, 'keep' has nothing to remember."""
    model = tiny_llama(layers=4)
    policy = policy_of(trained=trained)
    gates = replace(policy.gates, columns=0 * policy.gates.columns)
    policy = replace(policy, gates=gates)
    ids = torch.randint(3, VOCAB, (2, sum(parts)), generator=torch.Generator().manual_seed(3))
    with sparsify(model, policy):
        whole = DynamicCache(config=model.config)
        expected = [model(x, past_key_values=whole).logits for x in ids.split(parts, 1)]
    with sparsify(model, replace(policy, decode=decode)) as run:
        cache = GatedCache(run, prompt=announced * ids.shape[1], offload=offload)
        got = [model(x, past_key_values=cache).logits for x in ids.split(parts, 1)]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), **CLOSE)


@KINDS
def test_beam_search_and_sampling(offload, trained):
    model, (ids, mask) = tiny_llama(layers=4), prompt()
    for more in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        outputs = []
        with sparsify(model, policy_of(trained=trained)) as run:
            for own in (False, True):
                given = {"past_key_values": GatedCache(run, offload=offload)} if own else {}
                torch.manual_seed(0)
                outputs.append(
                    model.generate(ids, attention_mask=mask, max_new_tokens=3, **given, **more)
                )
        assert torch.equal(*outputs)


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_rows_may_begin_late(offload):
    model, (ids, mask) = tiny_llama(layers=4), prompt(length=12, padding=(5, 1, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with sparsify(model, policy_of()) as run:
        logits = []
        for own in (False, True):
            cache: Any = GatedCache(run, offload=offload) if own else DynamicCache()
            parts, end = [], 0
            for part in ids.split([3, 1, 1, 2, 1, 4], 1):
                end += part.shape[1]
                given = {"attention_mask": mask[:, :end], "past_key_values": cache}
                at = positions[:, end - part.shape[1] : end]
                parts.append(model(part, **given, position_ids=at).logits)
            logits.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


@KINDS
@torch.no_grad()
def test_going_back_forks_and_selected_rows(offload, trained):
    """Windows alone would drop keys: here no kv head does, so that crop always works."""
    model, (ids, _) = tiny_llama(layers=3), prompt(batch=2, length=40, padding=())
    policy = policy_of(3, trained=trained)
    with sparsify(model, policy) as run:
        cache = GatedCache(run, offload=offload)
        model(ids[:, :20], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (20, 21, 22)]
        cache.crop(-3)
        assert cache.get_seq_length() == 20
        fork = copy.deepcopy(cache)
        again = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (20, 21, 22)]
        torch.testing.assert_close(torch.stack(again), torch.stack(steps))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(ids[[1, 0], 23:31], past_key_values=cache).logits
        assert fork.get_seq_length() == 20
        turn = model(ids[:, 20:30], past_key_values=fork).logits
        cache.crop(-100)
        assert cache.get_seq_length() == 0
        anew = model(ids[:, :20], past_key_values=cache).logits
        whole = DynamicCache(config=model.config)
        cuts = [20, 1, 1, 1, 8]
        parts = [model(x, past_key_values=whole).logits for x in ids[:, :31].split(cuts, 1)]
        whole = DynamicCache(config=model.config)
        other = [model(x, past_key_values=whole).logits for x in ids[:, :30].split([20, 10], 1)]
    torch.testing.assert_close(torch.cat(again, 1), torch.cat(parts[1:4], 1), **CLOSE)
    torch.testing.assert_close(swapped, parts[4][[1, 0]], **CLOSE)
    torch.testing.assert_close(turn, other[1], **CLOSE)
    torch.testing.assert_close(anew, parts[0], **CLOSE)


@torch.no_grad()
def test_a_guard_looks_at_all_keys_of_a_call_of_many_tokens():
    model, (ids, _) = tiny_llama(layers=3), prompt(length=40, padding=())
    policy = policy_of(3, guard=0.02, promise=torch.full((3, 4), 0.9))
    more = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    logits, told = [], []
    for own in (False, True):
        with pytest.warns(UserWarning), sparsify(model, policy, measure=True) as run:
            cache: Any = GatedCache(run, offload=True) if own else DynamicCache()
            steps = (ids, ids[:, :1], more, ids[:, :1])
            logits.append(torch.cat([model(x, past_key_values=cache).logits for x in steps], 1))
            told.append(run.summary())
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    assert told[1]["guard"] == told[0]["guard"]
    for phase in ("prefill", "decode"):
        full, own = (x[phase]["density_per_head"] for x in told)
        for a, b in zip(full, own, strict=True):
            assert b == pytest.approx(a, rel=1e-5)


# nothing is pooled twice, and little is copied


@pytest.mark.parametrize("trained", [False, True])
@torch.no_grad()
def test_a_token_and_a_chunk_pool_their_own_keys_alone(monkeypatch, trained):
    model = tiny_llama(layers=4)
    ids = torch.randint(3, VOCAB, (1, 200), generator=torch.Generator().manual_seed(3))
    real, pooled = BlockSummary.of.__func__, []

    def spy(cls, key, block, start=0):
        pooled.append(key.shape[2])
        return real(cls, key, block, start)

    monkeypatch.setattr(BlockSummary, "of", classmethod(spy))
    with sparsify(model, policy_of(trained=trained)) as run:
        cache = GatedCache(run)
        for first, last in ((0, 150), (150, 180), (180, 181), (181, 182)):
            pooled.clear()
            model(ids[:, first:last], past_key_values=cache)
            if first:
                assert pooled and max(pooled) < last - first + SIZES["key_pool"]


@torch.no_grad()
def test_a_token_copies_the_blocks_that_it_reads_and_no_other(monkeypatch):
    model = tiny_llama(layers=4)
    ids = torch.randint(3, VOCAB, (1, 201), generator=torch.Generator().manual_seed(3))
    copied, real = [], HostedStore.fetch

    def spy(self, seen):
        out = real(self, seen)
        copied.append((out[0], out[1], self.keys.shape[1]))
        return out

    monkeypatch.setattr(HostedStore, "fetch", spy)
    with sparsify(model, policy_of()) as run:
        cache = GatedCache(run, offload=True)
        model(ids[:, :200], past_key_values=cache)
        monkeypatch.setattr(HostedStore, "held", lambda _: pytest.fail("copied every key"))
        model(ids[:, 200:], past_key_values=cache)
    assert [groups for *_, groups in copied] == [len(x) for x in HOSTED]
    for key, value, _ in copied:
        # both query heads of a group choose up to 3 blocks, besides sinks, window and own block
        assert key.shape[2] == value.shape[2] <= (2 * 3 + 1 + 3) * SIZES["block"] < 50


@torch.no_grad()
def test_bytes_are_what_tensors_hold_device_and_host_apart():
    model = tiny_llama(layers=4)
    ids = torch.randint(3, VOCAB, (2, 305), generator=torch.Generator().manual_seed(1))
    caches = {}
    with sparsify(model, policy_of(trained=True)) as run:
        for offload in (False, True):
            cache = caches[offload] = GatedCache(run, offload=offload)
            for part in ids.split([300, *[1] * 5], 1):
                model(part, past_key_values=cache)
    device = host = 0
    for layer, away in zip(caches[True].layers, HOSTED, strict=True):
        assert layer.plan.hosted.numbers == away
        store = layer.store
        kept = [store.hosted.keys, store.hosted.values]
        host += sum(x.untyped_storage().nbytes() for x in kept)
        others = [x for x in (store.ragged, store.whole, store.hosted.pools) if x is not None]
        others += [store.whole.pools] if store.whole and store.whole.pools else []
        tensors = [x for one in others for x in one._tensors.values()]
        device += sum(x.untyped_storage().nbytes() for x in tensors)
    assert (caches[True].nbytes, caches[True].host_nbytes) == (device, host)
    one = 2 * 2 * 305 * 16 * 4  # keys and values of a kv head, both rows
    moved = sum(map(len, HOSTED))
    assert moved * one <= host <= moved * one * 1.3
    assert caches[False].host_nbytes == 0
    assert 0.95 < (caches[False].nbytes - device) / host < 1.05


# a GPU as seen from a CPU: which copies are made, and when


class FakeEvent:
    def __init__(self, log):
        self.log = log

    def synchronize(self):
        self.log.append("host waits")


def test_the_host_is_read_when_what_was_written_is_there():
    """Whoever reads the host's memory waits for the last copy to it, once."""
    log = []
    store = HostedStore(PooledKeys([0], (2,)), 4)
    key, more = torch.randn(1, 1, 10, 3), torch.randn(1, 1, 200, 3)
    seen = torch.ones(1, 2, 10, dtype=torch.bool)
    read = {
        "fetch": lambda: store.fetch(seen),
        "reorder": lambda: store.reorder([0]),
        "crop": lambda: store.crop(0),
        "copy": lambda: copy.deepcopy(store),
        "grow": lambda: store.extend(more, more, {0: (0, 200)}),
    }
    store.extend(key, key, {0: (0, 10)})
    for name, call in read.items():
        store._written = FakeEvent(log)
        call()
        assert log == ["host waits"] and store._written is None, name
        log.clear()


class FakeStream:
    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append(f"waits for {other}")

    def record_event(self):
        self.log.append("event")
        return FakeEvent(self.log)

    def wait_event(self, event):
        assert isinstance(event, FakeEvent)
        self.log.append("the device waits")


def test_copies_to_the_host_follow_the_computation_and_nothing_waits_for_them(monkeypatch):
    """Keys stay until they are copied; a call of many tokens waits on the device, not here."""
    log = []
    monkeypatch.setattr(hosted, "_stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the computation")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: log.append("kept"))
    store = HostedStore(PooledKeys([0], (2,)), 4)
    key, value = torch.randn(2, 1, 10, 3), torch.randn(2, 1, 10, 5)
    store.extend(key, value, {0: (0, 10), 1: (2, 10)})
    assert log == ["waits for the computation", "kept", "kept", "event"]
    assert torch.equal(store.keys[0, 0, :10], key[0, 0])
    assert torch.equal(store.values[1, 0, :8], value[1, 0, 2:])
    log.clear()
    store._device = torch.device("meta")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log))
    k, v = store.held()
    assert log == ["the device waits"] and (k.device, v.device) == (store._device, store._device)
    assert k.shape == (2, 1, 10, 3) and v.shape == (2, 1, 10, 5)


def test_fetched_blocks_are_those_of_any_query_head_of_the_group():
    store = HostedStore(PooledKeys([0, 1], (2,)), 4)
    key, value = torch.randn(2, 2, 30, 3), torch.randn(2, 2, 30, 5)
    store.extend(key, value, {0: (0, 30), 1: (4, 30)})
    seen = torch.rand(2, 4, 30, generator=torch.Generator().manual_seed(0)) < 0.06
    seen[:, 2:] &= torch.arange(30) > 17
    seen[1, :, 26:] = False
    k, v, mask = store.fetch(seen)
    sees = mask.dense()[:, :, 0]
    assert sees.sum() == seen.sum()
    own = {0: key[0], 1: key[1, :, 4:]}, {0: value[0], 1: value[1, :, 4:]}
    for b in range(2):
        for h in range(4):
            at = seen[b, h].nonzero().flatten()
            for got, all_of in ((k, own[0]), (v, own[1])):
                found = got[b, h // 2, sees[b, h]]
                assert torch.equal(found, all_of[b][h // 2, at])


# what cannot be honoured


def test_what_offloading_cannot_help_is_refused():
    model = tiny_llama()
    dense = Gates.full(2, 4)
    columns = Gates(dense.window * 0 + 4, dense.columns + 3, dense.share)
    for gates in (dense, columns):
        with (
            sparsify(model, Gated(gates=gates, decode="keep")) as run,
            pytest.raises(
                ValueError, match="offload: expected a kv head whose maps.*Leave offload"
            ),
        ):
            GatedCache(run, offload=True)
    with sparsify(model, policy_of(2)) as run:
        with pytest.raises(ValueError, match="offload: expected True or False, received 1"):
            GatedCache(run, offload=1)
        cache = GatedCache(run, offload=True)
        ids, _ = prompt(padding=())
        with torch.no_grad():
            model(ids, past_key_values=cache)
            with pytest.raises(ValueError, match=r"expected \(3, 1\) batch rows and kv heads"):
                model(ids[:2, :1], past_key_values=cache)
    assert hosted._stream(torch.device("cpu")) is None
    assert gated.Gated(columns=0, blocks=2).reads_blocks(0, 4, 2) == [True, True]


# on the command line


def test_the_command_offloads_and_says_where_bytes_are(tmp_path, capsys):
    model = str(save_stand_in(tmp_path / "model"))
    asked = ["generate", "--model", model, "--prompt", "a b c " * 60, "--max-new-tokens", "4"]
    blocks = "columns=0,blocks=2,block=8,query_pool=4,key_pool=4,window=9"
    policy = ["--policy", f"gated:{blocks},decode=select"]
    results = []
    for more in ([], ["--offload"], ["--offload", "--chunk", "64"]):
        assert cli.main([*asked, *policy, *more, "--json", "--quiet"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    plain, away, chunks = (x["memory"] for x in results)
    assert results[0]["text"] == results[1]["text"] == results[2]["text"]
    assert results[2]["chunk"] == 64
    assert plain["offloaded_bytes"] == 0 < away["offloaded_bytes"]
    assert chunks["offloaded_bytes"] > 0.5 * away["offloaded_bytes"]
    assert away["cache_bytes"] < plain["cache_bytes"]
    for memory in (plain, away, chunks):
        parts = ("weight_bytes", "cache_bytes", "rest_bytes", "offloaded_bytes")
        assert memory["peak_bytes"] == sum(memory[name] for name in parts)
    assert cli.main([*asked, *policy, "--offload"]) == 0
    assert "in host memory" in capsys.readouterr().err


def test_the_command_refuses_offloading_where_it_is_no_use(tmp_path, capsys, monkeypatch):
    model = str(save_stand_in(tmp_path / "model"))
    asked = ["generate", "--model", model, "--prompt", "a b c", "--offload", "--policy"]
    assert cli.main([*asked, "gated:window=4,decode=select"]) == 2
    assert "Leave offload out" in capsys.readouterr().err
    monkeypatch.setattr("dynmask.cli.generate.load", lambda *_: pytest.fail("loaded a model"))
    for policy in ("full", "streaming", "gated:columns=0,blocks=2"):
        assert cli.main([*asked, policy]) == 2
        expected = "--offload: expected a gated policy with maps that choose blocks, and decode="
        error = capsys.readouterr().err
        assert expected in error and f"received {policy};" in error
