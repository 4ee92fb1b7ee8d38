"""vLLM's attention backend on any device: a paged cache of our own layout, our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from . import BACKEND
from .batch import Batch
from .engine import Parts
from .pages import Pages


class PagedBackend(AttentionBackend):
    """What vLLM asks about the backend before it makes layers."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's own list of names."""
        return BACKEND

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages of any size that vLLM offers."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        """What computes."""
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedBuilder]:
        """What describes a step."""
        return PagedBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Logical shape of a layer's cache, which vLLM 0.26 to 0.28 ask for; later ones know it."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks of a model are honoured."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """So are its sliding windows."""
        return True


@dataclass
class PagedMetadata:
    """One step.

    Attributes:
        batch: its requests.
        slot_mapping: where vLLM wants each token kept.
    """

    batch: Batch
    slot_mapping: Tensor


def batch_of(common: CommonAttentionMetadata) -> Batch:
    """The requests of a step, once for all layers.

    Their lengths come from the host, where vLLM knows them before the device does: a bound that is
    exact without speculative decoding, which is refused. Older versions have none: the device's.
    """
    starts = common.query_start_loc_cpu.tolist()
    known = getattr(common, "seq_lens_cpu_upper_bound", None)
    lengths = (common.seq_lens if known is None else known).tolist()
    return Batch(starts, lengths, common.block_table_tensor)


class PagedBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Describes each step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        """The description that every layer of a step gets; vLLM names the arguments."""
        return PagedMetadata(batch_of(common_attn_metadata), common_attn_metadata.slot_mapping)


class PagedImpl(AttentionImpl[Any]):
    """Attention of one layer; arguments are vLLM's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        config = get_current_vllm_config()
        rest = attn_type, alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name
        engine = Parts.check(config, *rest)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        sizes = num_heads, self.num_kv_heads, head_size, scale
        self._parts = Parts(engine, *sizes, sliding_window, sinks)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Keep a step's keys and values."""
        if kv_cache.numel():
            pages = Pages.of(kv_cache, self.num_kv_heads, self.head_size)
            pages.write(slot_mapping, key, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step, written into ``output`` [tokens, h, d]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("dynmask: expected plain outputs, received a scale for them")
        if attn_metadata is None:  # vLLM measures what a step takes
            return output.fill_(0)
        own = self._parts.layer(layer.layer_name)
        own.attend(kv_cache, attn_metadata.batch, query, key, value, output)
        return output


__all__ = ["PagedBackend", "PagedBuilder", "PagedImpl", "PagedMetadata", "batch_of"]
