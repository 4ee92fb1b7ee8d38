"""Timed generations keep only the keys that are still read, where a policy evicts."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from dynmask.evals.generation import attend, bounded_cache, greedy
from dynmask.policies import Pooled, Streaming
from tests.test_evaluate import run
from tests.test_gallery import IDS, taught
from tests.tiny import TINY


def full_bytes(model, tokens):
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
    return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@pytest.mark.parametrize("make", [taught, lambda model: Streaming(sinks=2, window=7)])
def test_a_bounded_cache_answers_the_same_with_less(make):
    model = TINY["llama"]()
    policy = make(model)
    with attend(model, policy) as active:
        expected = greedy(model, IDS, 6, keep_logits=True)
        bounded = greedy(model, IDS, 6, keep_logits=True, cache=bounded_cache(active))
    assert bounded.tokens == expected.tokens
    torch.testing.assert_close(bounded.logits, expected.logits, rtol=1e-4, atol=1e-4)
    whole = full_bytes(model, IDS.shape[1] + 5)
    assert expected.cache_bytes == whole
    assert bounded.cache_bytes is not None and bounded.cache_bytes < 0.4 * whole


def test_other_policies_keep_the_models_own_cache():
    model = TINY["llama"]()
    assert bounded_cache(None) is None
    with attend(model, Pooled(block=16)) as active:
        assert bounded_cache(active) is None


def test_a_table_shows_what_each_cache_holds():
    policies = {
        "full": None,
        "streaming": Streaming(sinks=2, window=22),
        "pooled": Pooled(block=16),
    }
    report = run(policies=policies, n=1, length=160)
    full, streaming, pooled = (row.cache_bytes or 0 for row in report.rows)
    assert 0 < streaming < 0.3 * full and pooled == full
    assert "  cache  " in report.table().splitlines()[1]
    plain = run(policies=policies, n=1, length=160, timing=False)
    assert {row.cache_bytes for row in plain.rows} == {None} and "MiB" not in plain.table()
