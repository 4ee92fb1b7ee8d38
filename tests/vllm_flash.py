"""FlashAttention's functions in tensor operations, so that the GPU's backend runs on a CPU.

What is tested by it is how `flash.py` stands on vLLM's backend: which step goes where, the cache,
the description of a step. A test process's plugins call :func:`register` where it is asked for.
"""

from __future__ import annotations

import atexit
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor,
    softmax_scale: float, block_table: Tensor, **rest: Any,
) -> Tensor:  # fmt: skip
    """Causal attention of each request over its pages: q [tokens, h, d], k [pages, size, g, d]."""
    CALLS["dense"] += 1
    assert rest["causal"] and tuple(rest["window_size"]) == (-1, -1)
    starts = cu_seqlens_q.tolist()
    for row, keys in enumerate(seqused_k.tolist()):
        first, stop = starts[row : row + 2]
        if first == stop:
            continue
        pages = block_table[row, : -(-keys // k.shape[1])].long()
        own = (x[pages].flatten(0, 1)[:keys].transpose(0, 1)[None] for x in (k, v))
        seen = torch.ones(stop - first, keys, dtype=torch.bool).tril(keys - (stop - first))
        out[first:stop] = torch.nn.functional.scaled_dot_product_attention(
            q[first:stop].transpose(0, 1)[None], *own, attn_mask=seen, scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)  # fmt: skip
    return out


def reshape_and_cache_flash(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *rest: Any
) -> None:
    """Keep new tokens: keys and values are [pages, size, g, d]."""
    kept = slots >= 0
    page, place = slots[kept] // keys.shape[1], slots[kept] % keys.shape[1]
    keys[page, place] = key[: len(slots)][kept]
    values[page, place] = value[: len(slots)][kept]


def register() -> None:
    """Let vLLM's CPU platform take the GPU's backend."""
    import vllm.v1.attention.backends.flash_attn as flash
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    stand_ins: dict[str, Any] = {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "reshape_and_cache_flash": reshape_and_cache_flash,
        "get_flash_attn_version": lambda *args, **kwargs: 2,
        "flash_attn_supports_quant_query_input": lambda: False,
    }
    for name, function in stand_ins.items():
        setattr(flash, name, function)

    from dynmask.integrations.vllm.layer import PagedLayer

    attend = PagedLayer.attend

    def counted(*args: Any) -> None:
        CALLS["chosen"] += 1
        attend(*args)

    PagedLayer.attend = counted  # type: ignore[method-assign]
    register_backend(AttentionBackendEnum.CPU_ATTN, "dynmask.integrations.vllm.flash.FlashBackend")
    atexit.register(lambda: print(f"CALLS {dict(CALLS)}", file=sys.stderr))
