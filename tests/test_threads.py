"""Threads that generate at the same time: each gets what it would get alone."""

import copy
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")

import dynmask.integrations.transformers as adapter
from dynmask import BoundedCache, GatedCache, sparsify
from dynmask.integrations.tally import Tally
from dynmask.policies import Gated, Streaming
from tests.test_bounded import generate, prompt
from tests.test_offload import policy_of
from tests.tiny import tiny_llama

STEPS = 7
"""New tokens of each thread: as many attention calls as the others make."""


def together(works):
    """Run functions in threads; what they returned, or the error of one of them."""
    results, errors = [None] * len(works), []

    def run(i):
        try:
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    if errors:
        raise errors[0]
    return results


class Meeting:
    """A policy whose calls wait for one another: every attention call meets one of each thread."""

    def __init__(self, policy, barrier):
        self._policy, self._barrier = policy, barrier

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def __call__(self, query, key, value, layer):
        self._barrier.wait(60)
        mask = self._policy(query, key, value, layer)
        self._barrier.wait(60)
        return mask


def prompts():
    """Three prompts of unlike length and padding."""
    sizes = ((24, (6, 1)), (31, (0, 9)), (12, (2, 3)))
    return [prompt(2, n, padding, seed) for seed, (n, padding) in enumerate(sizes)]


def same(found, expected):
    for (tokens, logits), (own, exact) in zip(found, expected, strict=True):
        assert torch.equal(tokens, own) and torch.equal(logits, exact)


def test_a_model_each_with_a_policy_each():
    model, barrier, works, expected = tiny_llama(), threading.Barrier(2), [], []
    policies = [Streaming(sinks=1, window=3), Gated(window=4, columns=3, sinks=1, decode="select")]
    for policy, (ids, mask) in zip(policies, prompts()[:2], strict=True):
        own = copy.deepcopy(model)
        with sparsify(own, policy):
            expected.append(generate(own, ids, mask, new=STEPS))

        def work(own=own, policy=policy, ids=ids, mask=mask):
            with sparsify(own, Meeting(policy, barrier)):
                return generate(own, ids, mask, new=STEPS)

        works.append(work)
    same(together(works), expected)


@pytest.mark.parametrize("kind", ["own", "gated", "offload", "bounded"])
def test_one_model_and_one_run_with_a_cache_for_each_thread(kind):
    model = tiny_llama(layers=4)
    policy = Streaming(sinks=1, window=5) if kind == "bounded" else policy_of()

    def cache(run):
        if kind == "own":
            return None
        if kind == "bounded":
            return BoundedCache(run)
        return GatedCache(run, offload=kind == "offload")

    with sparsify(model, policy, measure=True) as run:
        expected = [generate(model, *x, cache(run), new=STEPS) for x in prompts()]
        alone = run.summary()
        run.reset()
        pace = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            works = [lambda x=x: generate(model, *x, cache(run), new=STEPS) for x in prompts()]
            same(together(works), expected)
        finally:
            sys.setswitchinterval(pace)
        both = run.summary()
    for phase in ("prefill", "decode"):
        assert both[phase]["calls"] == alone[phase]["calls"]
        assert both[phase]["density"] == pytest.approx(alone[phase]["density"], rel=1e-9)


def test_one_model_under_one_run_meets_itself_in_every_call():
    model = tiny_llama()
    policy = Gated(window=4, columns=3, sinks=1, decode="select")
    with sparsify(model, policy):
        expected = [generate(model, *x, new=STEPS) for x in prompts()]
    with sparsify(model, Meeting(policy, threading.Barrier(3))):
        works = [lambda x=x: generate(model, *x, new=STEPS) for x in prompts()]
        # rows of unlike length are asked about one by one: two calls a layer for each thread
        same(together(works), expected)


def test_of_two_threads_that_want_one_model_one_is_refused(monkeypatch):
    """Whoever comes second finds the first's policy, however close they are."""
    model, refused, others = tiny_llama(), [], []
    real = adapter.check_policy

    def second():
        try:
            sparsify(model, Streaming(sinks=0, window=2))
        except ValueError as error:
            refused.append(str(error))

    def first_is_between_looking_and_taking(*given):
        if not others:
            others.append(threading.Thread(target=second))
            others[0].start()
            others[0].join(0.3)  # it waits for the first to be done
        real(*given)

    monkeypatch.setattr(adapter, "check_policy", first_is_between_looking_and_taking)
    with sparsify(model, Streaming(sinks=1, window=3)) as run:
        others[0].join()
        assert len(refused) == 1 and "one policy at a time" in refused[0]
        assert run.policy.window == 3
    assert model.config._attn_implementation == "sdpa"


def test_counts_of_threads_add_up():
    """Adding lets other threads run in between."""
    tally, one, times = Tally(), torch.ones(4, dtype=torch.float64), 1500

    def work():
        for _ in range(times):
            tally.add_kept("decode", 0, one, 2)
            tally.count("decode", "cpu")

    pace = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        together([work, work, work])
    finally:
        sys.setswitchinterval(pace)
    found = tally.summary(1)["decode"]
    assert (found["density"], found["calls"]) == (0.5, 3 * times)
    assert tally._kept["decode", 0].tolist() == [3.0 * times] * 4
