"""What prefill and decoding have in common: a call's tensors, strides and compile-time switches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is a function of its language and slow on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller than n >= 1."""
    return 1 << (n - 1).bit_length()


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class PlanTensors(NamedTuple):
    """The tensors of a plan, as in :class:`dynmask.Plan`; kernels know nothing else of it."""

    index: Tensor
    full: Tensor
    count: Tensor
    batch: Tensor
    row: Tensor
    rows: Tensor
    position: Tensor
    death: Tensor | None
    bits: Tensor | None
    tile: int
    block: int
    even: bool

    def contiguous(self) -> PlanTensors:
        """The same lists as the kernels index them."""
        lists = (x if x is None else x.contiguous() for x in (self.index, self.full, self.count))
        index, full, count = lists
        bits = None if self.bits is None else self.bits.contiguous()
        return self._replace(index=index, full=full, count=count, bits=bits)


@dataclass(frozen=True)
class Call:
    """Tensors as the kernels take them: last stride 1, a bias and a death even where none is."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    death: Tensor
    lists: int
    members: int
    bias_heads: int
    factor: float
    has_bias: bool

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        plan: PlanTensors,
        scale: float,
    ) -> Call:
        """Arrange one call's arguments."""
        if scale < 0:  # the kernels scale the largest logit, so its sign goes into the queries
            query, scale = -query, -scale
        if scale < torch.finfo(torch.float32).tiny:  # 0 to the kernels, and 0 times -inf is NaN
            query, scale = torch.zeros_like(query), 1.0
        query, key, value = (
            x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
            for x in (query, key, value)
        )
        has_bias, death = bias is not None, plan.death
        if bias is None:
            bias = query.new_empty(1, 1, 1)
        elif bias.stride(-1) != 1:
            bias = bias.contiguous()
        if death is None:
            death = plan.index.new_empty(1, 1, 1)
        elif death.stride(-1) != 1:
            death = death.contiguous()
        death = death.expand(query.shape[0], plan.index.shape[0], -1)
        bias_heads = bias.shape[1]
        lists = max(plan.index.shape[0], key.shape[1], bias_heads if has_bias else 1)
        return cls(
            query, key, value, bias.expand(query.shape[0], -1, -1), death, lists,
            query.shape[1] // lists, bias_heads, scale * math.log2(math.e), has_bias,
        )  # fmt: skip

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of batch, head and position, in the kernels' order."""
        return (
            *(x for t in (self.query, self.key, self.value) for x in t.stride()[:3]),
            *self.bias.stride()[:2],
            *self.death.stride()[:2],
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Head dims, and the powers of two that hold them."""
        d, dv = self.query.shape[-1], self.value.shape[-1]
        pad = {
            "D_PAD": max(next_power_of_2(d), 16),
            "DV_PAD": max(next_power_of_2(dv), 16),
        }
        return {"D": d, "DV": dv, **pad}

    @property
    def switches(self) -> dict[str, object]:
        """Compile-time switches; bfloat16 products need float32 in Triton's interpreter."""
        precision = "ieee" if self.query.dtype == torch.float32 else "tf32"
        return {
            "HAS_BIAS": self.has_bias,
            "UPCAST": INTERPRETED and self.query.dtype == torch.bfloat16,
            "PRECISION": precision,
        }

    def wide(self, out: Tensor) -> bool:
        """Whether offsets inside one head need 64 bits."""
        return any(
            (t.shape[2] - 1) * t.stride(2) + t.shape[3] >= 2**31
            for t in (self.query, self.key, self.value, out)
        )
