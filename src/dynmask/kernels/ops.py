"""The fused kernels as PyTorch operators: what is called, and what ``torch.compile`` sees.

A plain call goes straight to the kernel; while PyTorch traces, the operator ``torch.ops.dynmask``
of the same name stands in its place, whose fake implementation gives the shapes. Nothing here
imports triton before a kernel runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_FOUND = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether the triton package is installed."""
    return _FOUND


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and has_triton()


def fused(device: torch.device) -> bool:
    """Whether masks on this device are selected and lowered by fused kernels."""
    return device.type == "cuda" and has_triton()


def fused_rows(query: Tensor) -> bool:
    """Whether the kernels for a few query rows (``triton/worth.py``) take such queries."""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    return fused(query.device) and query.dtype in kinds and query.shape[-1] <= 256


def _operator(fake: Callable, mutates: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Register a function as an operator and call it as one only where PyTorch traces."""

    def register(run: Callable) -> Callable:
        operator: Any = torch.library.custom_op(
            f"dynmask::{run.__name__}", run, mutates_args=tuple(mutates)
        )
        operator.register_fake(fake)

        @wraps(run)
        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else run(*args)

        return call

    return register


def _lists(like: Tensor, heads: int, tiles: int, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors in the shape of index, full and count."""
    index, full, count = (
        like.new_empty(shape, dtype=torch.int32)
        for shape in ((heads, tiles, cap), (heads, tiles), (heads, tiles))
    )
    return index, full, count


@_operator(
    lambda query, key, window: query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.float32)
)
def key_worth(query: Tensor, key: Tensor, window: Tensor) -> Tensor:
    """What keys are worth to some queries: :func:`dynmask.kernels.triton.worth.key_worth`."""
    from .triton.worth import key_worth

    return key_worth(query, key, window)


@_operator(
    lambda query, key, position, death, scale, window: query.new_empty(
        query.shape[:3], dtype=torch.float32
    )
)
def kept_share(
    query: Tensor, key: Tensor, position: Tensor, death: Tensor, scale: float, window: int
) -> Tensor:
    """What lifetimes keep of some queries' attention: the kernel of ``triton/worth.py``."""
    from .triton.worth import kept_share

    return kept_share(query, key, position, death, scale, window)


@_operator(lambda scores, width: scores.new_empty(scores.shape, dtype=torch.int32))
def lifetimes(scores: Tensor, width: int) -> Tensor:
    """Lifetimes of the running top w: :func:`dynmask.kernels.triton.select.lifetimes`."""
    from .triton.select import lifetimes

    return lifetimes(scores, width)


@_operator(
    lambda death, first, stop, tile, most: _lists(
        death,
        death.shape[1],
        death.shape[0] * -(-(stop - first) // tile),
        min(most + tile, stop),
    )
)
def alive_lists(
    death: Tensor, first: int, stop: int, tile: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Key lists under lifetimes: :func:`dynmask.kernels.triton.lower.alive_lists`."""
    from .triton.lower import alive_lists

    return alive_lists(death, first, stop, tile, most)


@_operator(
    lambda chosen, block_q, block_k, keys, first_block, cap: chosen.new_empty(
        *chosen.shape[:3], cap, dtype=torch.int32
    )
)
def block_lists(
    chosen: Tensor, block_q: int, block_k: int, keys: int, first_block: int, cap: int
) -> Tensor:
    """Lists of chosen key blocks: :func:`dynmask.kernels.triton.lower.block_lists`."""
    from .triton.lower import block_lists

    return block_lists(chosen, block_q, block_k, keys, first_block, cap)


@_operator(
    lambda blocks, position, rows, batch, block_q, block_k, first_block: _lists(
        blocks, blocks.shape[1], position.shape[0], blocks.shape[3]
    )
)
def block_plan(
    blocks: Tensor,
    position: Tensor,
    rows: Tensor,
    batch: int,
    block_q: int,
    block_k: int,
    first_block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of tiles of a block mask: :func:`dynmask.kernels.triton.lower.block_plan`."""
    from .triton.lower import block_plan

    return block_plan(blocks, position, rows, batch, block_q, block_k, first_block)


def _table_shapes(
    diagonals: Tensor, verticals: Tensor, keys: int, stop: int, size: int, first_key: int, cap: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, heads = diagonals.shape[:2]
    marks = diagonals.new_empty(b, heads, 2, keys, dtype=torch.uint8)
    return (
        diagonals.new_empty(b, heads, cap),
        diagonals.new_empty(b, heads, cap, -(-size // 32)),
        diagonals.new_empty(b, heads),
        diagonals.new_empty(b, heads),
        verticals.new_empty(verticals.shape),
        marks[:, :, 1],
    )


@_operator(_table_shapes)
def pattern_table(
    diagonals: Tensor, verticals: Tensor, keys: int, stop: int, size: int, first_key: int, cap: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Offsets of a tile's diagonals: :func:`dynmask.kernels.triton.patterns.pattern_table`."""
    from .triton.patterns import pattern_table

    return pattern_table(diagonals, verticals, keys, stop, size, first_key, cap)


def _pattern_shapes(
    offset: Tensor, words: Tensor, wholes: Tensor, found: Tensor, vertical: Tensor,
    is_vertical: Tensor, position: Tensor, rows: Tensor, batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    index, full, count = _lists(
        offset, offset.shape[1], position.shape[0], offset.shape[2] + vertical.shape[2]
    )
    return index, full, count, words.new_empty(*index.shape, words.shape[3])


@_operator(_pattern_shapes)
def pattern_lists(
    offset: Tensor,
    words: Tensor,
    wholes: Tensor,
    found: Tensor,
    vertical: Tensor,
    is_vertical: Tensor,
    position: Tensor,
    rows: Tensor,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of diagonals and verticals: :func:`dynmask.kernels.triton.patterns.pattern_lists`."""
    from .triton.patterns import pattern_lists

    return pattern_lists(offset, words, wholes, found, vertical, is_vertical, position, rows, batch)


@_operator(lambda *args: None, mutates=("out", "lse"))
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    index: Tensor,
    full: Tensor,
    count: Tensor,
    batch: Tensor,
    row: Tensor,
    rows: Tensor,
    position: Tensor,
    death: Tensor | None,
    bits: Tensor | None,
    tile: int,
    block: int,
    even: bool,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention over the pairs of a plan, into ``out`` and ``lse``: prefill or decoding.

    :func:`dynmask.kernels.triton.prefill.prefill`, for tiles of one row
    :func:`dynmask.kernels.triton.decode.decode`.
    """
    from .triton.call import PlanTensors
    from .triton.decode import decode
    from .triton.prefill import prefill

    plan = PlanTensors(
        index, full, count, batch, row, rows, position, death, bits, tile, block, even
    ).contiguous()
    run = decode if tile == 1 else prefill
    run(query, key, value, bias, plan, scale, out, lse)


@_operator(lambda *args: None, mutates=("query_grad", "delta"))
def attend_rows_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    index: Tensor,
    full: Tensor,
    count: Tensor,
    batch: Tensor,
    row: Tensor,
    rows: Tensor,
    position: Tensor,
    death: Tensor | None,
    bits: Tensor | None,
    tile: int,
    block: int,
    even: bool,
    scale: float,
    out: Tensor,
    out_grad: Tensor,
    lse: Tensor,
    lse_grad: Tensor | None,
    query_grad: Tensor,
    delta: Tensor,
) -> None:
    """Gradient of query rows: :func:`dynmask.kernels.triton.backward.rows_backward`."""
    from .triton.backward import rows_backward
    from .triton.call import PlanTensors

    plan = PlanTensors(
        index, full, count, batch, row, rows, position, death, bits, tile, block, even
    ).contiguous()
    rows_backward(
        query, key, value, bias, plan, scale, out, out_grad, lse, lse_grad, query_grad, delta
    )


@_operator(lambda *args: None, mutates=("key_grad", "value_grad", "bias_grad"))
def attend_keys_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    index: Tensor,
    full: Tensor,
    count: Tensor,
    batch: Tensor,
    row: Tensor,
    rows: Tensor,
    position: Tensor,
    death: Tensor | None,
    bits: Tensor | None,
    tile: int,
    block: int,
    even: bool,
    scale: float,
    out_grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
    bias_grad: Tensor | None,
    launches: int,
) -> None:
    """Gradients of keys: :func:`dynmask.kernels.triton.backward.keys_backward`."""
    from .triton.backward import keys_backward
    from .triton.call import PlanTensors

    plan = PlanTensors(
        index, full, count, batch, row, rows, position, death, bits, tile, block, even
    ).contiguous()
    keys_backward(
        query, key, value, bias, plan, scale, out_grad, lse, delta, key_grad, value_grad,
        bias_grad, launches,
    )  # fmt: skip
