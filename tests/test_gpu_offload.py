"""Keys in host memory where there is a GPU: the same outputs, and the bytes that are reported."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from dynmask import GatedCache, sparsify
from tests.test_offload import HOSTED, policy_of
from tests.tiny import VOCAB, tiny_llama

pytestmark = pytest.mark.gpu

NEAR = {"rtol": 5e-3, "atol": 5e-3}


def ids_of(batch, tokens):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (batch, tokens), generator=draw).cuda()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_chunks_tokens_and_reordered_rows_equal_those_of_a_full_cache(offload, trained):
    model, ids = tiny_llama(layers=3).cuda(), ids_of(2, 140)
    with sparsify(model, policy_of(3, trained=trained)) as run:
        logits = []
        for own in (False, True):
            cache = GatedCache(run, offload=offload) if own else DynamicCache()
            first = ids[:, :132].split([100, 30, 1, 1], 1)
            parts = [model(x, past_key_values=cache).logits for x in first]
            cache.reorder_cache(torch.tensor([1, 0]).cuda())
            parts += [model(x, past_key_values=cache).logits for x in ids[:, 132:].split(1, 1)]
            logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(logits[1], logits[0], **NEAR)


@torch.no_grad()
def test_reported_bytes_are_those_of_the_allocator_and_host_memory_is_pinned():
    model, ids = tiny_llama(layers=4).cuda(), ids_of(2, 300)
    with sparsify(model, policy_of(4)) as run:
        cache = GatedCache(run, offload=True)
        for part in ids.split([290, *[1] * 10], 1):
            model(part, past_key_values=cache)
        torch.cuda.synchronize()
        stores = [layer.store for layer in cache.layers]
        for store, away in zip(stores, HOSTED, strict=True):
            assert store.hosted.keys.shape[1] == len(away)
            assert store.hosted.keys.is_pinned() and store.hosted.values.is_pinned()
        ours = []
        for store in stores:
            others = [store.ragged, store.whole, store.whole and store.whole.pools]
            some = [x for x in (*others, store.hosted.pools) if x is not None]
            ours += [x for one in some for x in one._tensors.values()]
        assert cache.nbytes == sum(x.nbytes for x in ours)
        rounded = sum(-(-x.nbytes // 512) * 512 for x in ours)
        del ours, some, others, store, stores
        before = torch.cuda.memory_allocated()
        cache.reset()
        assert before - torch.cuda.memory_allocated() == rounded
        assert cache.nbytes == cache.host_nbytes == 0
