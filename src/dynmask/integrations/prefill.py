"""Read a long prompt a chunk at a time: what a chunk means for a policy, and the loop itself.

A chunk's activations are all that exists of a prompt beside the weights and the cache, so they,
and not the prompt, set the memory that is left to explain. No mask of queries x keys is made: the
adapter asks for positions (:mod:`.placement`), O(keys).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad
from ..policies import H2O, Gated
from ..policies.base import evicts, for_prompts_alone, grid_of

BOUNDED_CHUNK = 8_192
"""Tokens read at once by default where the cache holds only keys that are still read."""

FEWEST_LAST = 256
"""Tokens of a last chunk at least, where chunks are longer: its queries choose columns."""

CHUNK = 65_536
"""The same for other policies: each chunk looks at all keys before it, so fewer are faster."""


def default_chunk(policy: Any, tokens: int) -> int:
    """Tokens to read at once of a prompt of so many; 0 to read it whole.

    The model's own attention (None) is left alone: in chunks it would make masks of
    queries x keys.
    """
    if policy is None:
        return 0
    chunk = BOUNDED_CHUNK if evicts(policy) or isinstance(policy, H2O) else CHUNK
    return chunk if tokens > chunk else 0


def chunk_size(policy: Any, tokens: int, chunk: int) -> int:
    """Tokens of each chunk but the last, of a prompt of so many: at most ``chunk``.

    Chunks are about equally long. They are whole blocks of a policy that then reads what it would
    in the whole prompt, where a chunk has room for one.
    """
    grid = grid_of(policy) or 1
    most = chunk - chunk % grid if chunk >= grid else chunk
    size = -(-tokens // -(-tokens // most))
    if most % grid == 0:
        size += -size % grid
    # a last chunk of a few tokens would choose by a few queries
    while size > grid and 0 < tokens % size < min(FEWEST_LAST, size // 2):
        size -= grid
    return size


def exact_in_chunks(policy: Any, tokens: int, chunk: int) -> bool:
    """Whether a prompt of so many tokens, in chunks, is read as the whole prompt would be.

    The cache is that of :func:`cache_for`, which carries what H2O goes on with. A chunk of one
    token after others is taken for a decoded one, about which some policies are not asked, or by
    another rule.
    """
    grid, size = grid_of(policy), chunk_size(policy, tokens, chunk)
    grid = 1 if isinstance(policy, H2O) else grid
    single = tokens > size and (size == 1 or tokens % size == 1)
    if policy is not None and for_prompts_alone(policy) and single:
        return False
    return grid > 0 and size % grid == 0


def chunk_note(policy: Any, tokens: int, chunk: int) -> str:
    """One line: what reading ``tokens`` in chunks means under a policy.

    Args:
        policy: of the run; None for the model's own attention, which is computed as ``Causal``.
        tokens: of the prompt.
        chunk: tokens read at once.
    """
    name = "full" if policy is None else policy.name
    size = chunk_size(policy, tokens, chunk)
    what = f"{-(-tokens // size)} chunks of up to {size:,} tokens: "
    if exact_in_chunks(policy, tokens, chunk):
        return what + (
            f"chunks change nothing, under {name} each query reads what it would in one piece"
        )
    kept = ""
    if isinstance(policy, Gated) and policy.decode == "keep":
        kept = "; keys are dropped after the last"
    if isinstance(policy, Gated) and policy.guard is not None:
        alone = replace(policy, guard=None)
        if exact_in_chunks(alone, tokens, chunk):
            return what + (
                "chunks change nothing but where the guard of gated, which looks at each chunk by "
                f"itself, widens a map{kept}"
            )
    return what + (
        f"{name} chooses anew for each chunk, by that chunk's own queries, which is another choice "
        f"than one for the whole prompt (--chunk 0){kept}"
    )


def cache_for(run: Any, tokens: int, offload: bool = False) -> Any:
    """The cache that holds least under a run; transformers' own where all keys are read again.

    Args:
        run: what ``sparsify`` returned.
        tokens: of the prompt that will come in chunks.
        offload: keep on the host what is rarely read, see :class:`dynmask.GatedCache`.

    Raises:
        ValueError: ``offload`` under a policy that it cannot serve; a hybrid model under one that
            cannot decode, or go on, without its cache.
    """
    from transformers import DynamicCache

    from .cache import BoundedCache
    from .gated_cache import GatedCache
    from .heavy_cache import HeavyHitterCache

    if offload:
        return GatedCache(run, prompt=tokens, offload=True)
    try:
        if evicts(run.policy):
            return BoundedCache(run)
        if isinstance(run.policy, Gated):
            return GatedCache(run, prompt=tokens)
    except ValueError:  # a hybrid model keeps its own cache, and gates may need every key
        if getattr(run.policy, "decode", None) == "keep":
            raise
    if isinstance(run.policy, H2O):
        return HeavyHitterCache(run)
    return DynamicCache(config=run.model.config)


@torch.no_grad()
def read_chunks(
    model: nn.Module,
    ids: Tensor,
    cache: Any,
    chunk: int,
    heard: Callable[[int], object] | None = None,
    policy: Any = None,
) -> int:
    """Read a prompt into a cache, all but its last chunk, which its caller reads.

    The last chunk is the one whose logits are wanted, and the one that ``generate`` reads when it
    is given all ids and this cache. How long chunks are says :func:`chunk_size`.

    Args:
        model: a Hugging Face causal language model, sparsified or converted.
        ids: token ids [b, n] without padding, on any device.
        cache: an empty cache of the model.
        chunk: most tokens read at once.
        heard: called after each chunk, when the device has done with it, with its tokens.
        policy: that the model runs under: chunks are whole blocks of it where that matters.

    Returns:
        Tokens that were read, less than n.

    Raises:
        ValueError: no ids, or no tokens to read at once.
    """
    if ids.dim() != 2 or ids.shape[1] < 1 or chunk < 1:
        raise bad("read_chunks", "ids [b, n >= 1] and chunk >= 1", f"{tuple(ids.shape)}, {chunk}")
    last_only = {"logits_to_keep": 1} if keeps_logits(model) else {}
    device = next(model.parameters()).device
    tokens = ids.shape[1]
    size = chunk_size(policy, tokens, chunk)
    read = (tokens - 1) // size * size
    for part in ids[:, :read].split(size, 1) if read else ():
        model(input_ids=part.to(device), past_key_values=cache, use_cache=True, **last_only)
        if device.type == "cuda":
            # chunks queued ahead would hold their activations, and tell of work not yet done
            torch.cuda.synchronize(device)
        if heard is not None:
            heard(part.shape[1])
    return read


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model can compute the logits of its last token alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def cache_bytes(cache: Any) -> int | None:
    """Bytes of a cache's keys and values, all that it holds for one of ours; None if not known."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    layers = getattr(cache, "layers", ())
    kept = [getattr(x, name, None) for x in layers for name in ("keys", "values")]
    known = bool(kept) and all(isinstance(x, Tensor) for x in kept)
    return sum(x.nbytes for x in kept) if known else None  # type: ignore[union-attr]


__all__ = [
    "BOUNDED_CHUNK",
    "CHUNK",
    "cache_bytes",
    "cache_for",
    "chunk_note",
    "chunk_size",
    "default_chunk",
    "exact_in_chunks",
    "keeps_logits",
    "read_chunks",
]
