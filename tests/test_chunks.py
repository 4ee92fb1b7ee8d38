"""A prompt in chunks: which policies read what they would in the whole prompt, at what cuts."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask.policies import FIXED, Gated, Layer, Streaming
from dynmask.policies.base import for_prompts_alone, grid_of
from dynmask.policies.gates import Gates
from tests.policies import POLICIES

BLOCKS = Gated(
    sinks=2, window=5, columns=0, blocks=2, block=8, query_pool=2, key_pool=4, decode="select"
)
EVERY = POLICIES | {"gated (blocks)": BLOCKS}
N = 120


def tensors():
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, N, 8, generator=draw) * 2
    key, value = (torch.randn(1, 2, N, 8, generator=draw) for _ in range(2))
    return query, key, value


def reads(policy, cuts):
    """Which keys each query reads where a prompt comes in chunks: bool [1, 4, N, N]."""
    query, key, value = tensors()
    out = torch.zeros(1, 4, N, N, dtype=torch.bool)
    for a, b in itertools.pairwise(cuts):
        mask = policy(query[:, :, a:b], key[:, :, :b], value[:, :, :b], Layer(1)).dense()
        out[:, :, a:b, :b] = mask.repeat_interleave(4 // mask.shape[1], 1)
    return out


def cuts_of(size):
    return [*range(0, N, size), N]


@pytest.mark.parametrize("name", EVERY)
def test_cuts_on_the_grid_of_a_policy_change_nothing(name):
    """And where there is no such grid, or none of one position, other cuts do."""
    policy = EVERY[name]
    grid, whole = grid_of(policy), reads(policy, [0, N])
    if grid:
        for size in (grid, 3 * grid, 5 * grid):
            assert torch.equal(reads(policy, cuts_of(size)), whole)
    other = [reads(policy, cuts_of(size)) for size in (7, 37, 63)]
    assert all(torch.equal(found, whole) for found in other) is (grid == 1)


def test_what_a_gated_policy_looks_at_of_a_whole_call_leaves_no_grid():
    gates = Gates.full(2, 4)
    blocks = replace(gates, window=gates.window * 0 + 5, blocks=gates.columns + 2)
    assert Gated(gates=blocks).grid == 64 and grid_of(Gated(gates=gates)) == 64
    columns = torch.zeros(2, 4, dtype=torch.int32)
    columns[1, 2] = 3
    with_columns = replace(
        blocks, columns=columns, blocks=blocks.blocks.masked_fill(columns > 0, 0)
    )
    promise = torch.ones(2, 4)
    for policy in (
        Gated(gates=with_columns),
        Gated(gates=replace(blocks, share=torch.full((2, 4), 0.1))),
        Gated(gates=blocks, dense_up_to=100),
        Gated(gates=blocks, guard=0.1, promise=promise),
        Gated(columns=0, blocks=2, share=0.1),
        Gated(),
    ):
        assert policy.grid == 0
    assert grid_of(None) == grid_of(Streaming()) == 1


prefill = pytest.importorskip("dynmask.integrations.prefill")

from dynmask import GatedCache, sparsify  # noqa: E402
from tests.tiny import TINY  # noqa: E402


@given(
    tokens=st.integers(1, 5000),
    chunk=st.integers(1, 2000),
    policy=st.sampled_from(["full", "pooled", "quest", "vertical_slash"]),
)
def test_chunks_are_whole_blocks_about_equally_long_and_none_is_too_long(tokens, chunk, policy):
    policy = POLICIES[policy]
    grid, size = grid_of(policy) or 1, prefill.chunk_size(policy, tokens, chunk)
    assert 1 <= size <= chunk
    assert size % grid == 0 or chunk < grid
    last = tokens % size or size
    assert last >= min(prefill.FEWEST_LAST, size // 2, tokens) or size <= grid
    # never many more than there have to be: what rounding takes, and what the last one needs
    fewest = -(-tokens // chunk)
    assert -(-tokens // size) <= fewest or size > chunk // 2 - 2 * grid - 2 * prefill.FEWEST_LAST
    exact = prefill.exact_in_chunks(policy, tokens, chunk)
    alone = last == 1 < min(size, tokens) and for_prompts_alone(policy)
    assert exact is (grid_of(policy) > 0 and size % grid_of(policy) == 0 and not alone)


@pytest.mark.parametrize("policy", [replace(BLOCKS, decode="full"), BLOCKS, POLICIES["pooled"]])
@torch.no_grad()
def test_a_last_chunk_of_one_token_is_exact_where_decoded_tokens_are_asked_about(policy):
    model, size = TINY["llama"](), grid_of(policy)
    for tokens, same in ((8 * size + 1, policy is BLOCKS), (8 * size + 2, True)):
        ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(1))
        with sparsify(model, policy) as run:
            whole = model(ids, logits_to_keep=1).logits
            cache = prefill.cache_for(run, tokens)
            read = prefill.read_chunks(model, ids, cache, size, policy=policy)
            parts = model(ids[:, read:], past_key_values=cache, logits_to_keep=1).logits
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-4) is same
        assert prefill.exact_in_chunks(policy, tokens, size) is same


MODELS = {
    "pooled": POLICIES["pooled"],
    "xattention": POLICIES["xattention"],
    "quest": POLICIES["quest"],
    "oracle_blocks": POLICIES["oracle_blocks"],
    "gated (blocks)": BLOCKS,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [50, 100])
@torch.no_grad()
def test_a_model_reads_in_whole_blocks_what_it_reads_at_once(name, chunk):
    model, policy = TINY["llama"](), MODELS[name]
    ids = torch.randint(3, 250, (1, 203), generator=torch.Generator().manual_seed(3))
    with sparsify(model, policy) as run:
        whole = model(ids, logits_to_keep=1).logits
        caches = [prefill.cache_for(run, 203)]
        if policy is BLOCKS:
            assert isinstance(caches[0], GatedCache)
            caches.append(GatedCache(run, offload=True))
        for cache in caches:
            read = prefill.read_chunks(model, ids, cache, chunk, policy=policy)
            parts = model(ids[:, read:], past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    note = prefill.chunk_note(policy, 203, chunk)
    assert (
        "chunks change nothing" in note
        and f"chunks of up to {prefill.chunk_size(policy, 203, chunk)} " in note
    )
    assert "chooses anew" in prefill.chunk_note(policy, 203, 3)  # no room for a block


def test_the_table_of_the_docs_says_of_each_policy_what_its_grid_does():
    page = (Path(__file__).parent.parent / "docs" / "long_prompts.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    said = {
        name.strip(" `"): effect.strip().split(",")[0].split(":")[0]
        for names, effect in rows
        for name in names.split(", ")
    }
    kinds = {1: "the same", 0: "another choice"}
    for name in FIXED:
        if name == "h2o":  # its cache carries what it goes on with
            continue
        grid = grid_of(POLICIES.get(name, POLICIES["full"]))
        assert said[name] == kinds.get(grid, "the same where chunks are whole blocks"), name
    for name in ("full", "dam", "retained", "h2o", "DMA layers"):
        assert said[name] == "the same"
    assert said["gated` with maps of blocks alone"] == "the same where chunks are whole blocks"
