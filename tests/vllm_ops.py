"""The few compiled operators of vLLM that a decoder on a CPU calls, in tensor operations.

vLLM's own Python then runs where its compiled part was left out (``CONTRIBUTING.md``); where it is
there, nothing is replaced. vLLM calls :func:`register` in every process, as one of its plugins.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_kept: list[Any] = []


def slots(starts: Tensor, positions: Tensor, table: Tensor, out: Tensor, size: int) -> None:
    """Where vLLM wants each token of a step: page x page size + place in the page."""
    ends = starts.tolist()
    for request, (first, stop) in enumerate(pairwise(ends)):
        own = positions[first:stop]
        out[first:stop] = table[request][own // size].to(out.dtype) * size + own % size


def silu_and_mul(out: Tensor, both: Tensor) -> None:
    gate, up = both.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def gelu_tanh_and_mul(out: Tensor, both: Tensor) -> None:
    gate, up = both.chunk(2, -1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    wide = x.float()
    size = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    out.copy_((wide * size).to(x.dtype) * weight)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual += x
    rms_norm(x, residual, weight, epsilon)


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, size: int, table: Tensor, halves: bool
) -> None:
    cos, sin = (x[:, None] for x in table[positions.flatten()].chunk(2, -1))
    turned = 2 * cos.shape[-1]
    for x in (query, key):
        if x is None:
            continue
        heads = x.view(positions.numel(), -1, size)[..., :turned]
        low, high = heads.chunk(2, -1) if halves else (heads[..., 0::2], heads[..., 1::2])
        a, b = low * cos - high * sin, high * cos + low * sin
        low.copy_(a)
        high.copy_(b)


OPERATORS = (
    ("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None),
    (
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, "
        "Tensor block_table, Tensor(a!) slot_mapping, int block_size) -> ()",
        slots,
    ),
    ("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1)),
    ("silu_and_mul(Tensor(a!) out, Tensor input) -> ()", silu_and_mul),
    ("gelu_tanh_and_mul(Tensor(a!) out, Tensor input) -> ()", gelu_tanh_and_mul),
    (
        "rms_norm(Tensor(a!) result, Tensor input, Tensor weight, float epsilon) -> ()",
        rms_norm,
    ),
    (
        "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, "
        "float epsilon) -> ()",
        fused_add_rms_norm,
    ),
    (
        "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
        "Tensor cos_sin_cache, bool is_neox) -> ()",
        rotary_embedding,
    ),
)


def register() -> None:
    """Define the operators, unless vLLM's compiled part is there."""
    if os.environ.get("DYNMASK_TEST_FLASH"):
        from tests.vllm_flash import register as register_flash

        register_flash()
    if _kept or find_spec("vllm._C") is not None:
        return
    library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in OPERATORS:
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
    _kept.append(library)
