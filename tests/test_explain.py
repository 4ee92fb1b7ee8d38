"""explain() says what attention() does."""

import pytest
import torch

import dynmask
from dynmask import LifetimeMask, attention, explain

X = torch.randn(1, 2, 64, 8)


def test_it_names_what_auto_runs_and_why():
    sparse = explain(X, X, X, LifetimeMask.window(64, 9))
    assert sparse.impl == "cpu" and "on the CPU" in sparse.reason
    dense = explain(X, X, X, LifetimeMask.causal(64))
    assert dense.impl == "sdpa" and "plain causal" in dense.reason
    asked = explain(X, X, X, LifetimeMask.window(64, 9), impl="reference")
    assert asked.impl == "reference" and "asked" in asked.reason


def test_density_is_that_of_the_mask_and_of_its_plan():
    mask = LifetimeMask.window(64, 9)
    expected = float(mask.density())
    assert explain(X, X, X, mask).density == pytest.approx(expected)
    assert explain(X, X, X, mask.lower()).density == pytest.approx(expected)


def test_the_call_that_is_timed_is_the_call_that_was_asked_for(monkeypatch):
    calls = []
    module = __import__("sys").modules["dynmask.explain"]
    monkeypatch.setattr(module, "attention", lambda *a: (calls.append(a), attention(*a))[1])
    bias, mask = torch.zeros(1, 1, 64), LifetimeMask.window(64, 9)
    said = explain(X, X, X, mask, bias, 0.5, True)
    assert len(calls) == module.RUNS + 1
    assert all(a[4] is bias and a[5:] == (0.5, True, "cpu") for a in calls)
    assert said.milliseconds > 0 and said.dense_milliseconds > 0


def test_few_queries_have_no_dense_counterpart_and_the_text_reads_well():
    said = explain(X[:, :, -3:], X, X, LifetimeMask.window(64, 9, 3))
    assert said.dense_milliseconds is None
    assert str(said).startswith("impl='cpu': the tensors are on the CPU. It keeps ")
    assert "dense" not in str(said) and "dense" in str(explain(X, X, X, LifetimeMask.window(64, 9)))


def test_wrong_input_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="mask_or_plan: expected one"):
        dynmask.explain(X, X, X, LifetimeMask.causal(5))
