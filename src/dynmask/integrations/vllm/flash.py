"""The backend on NVIDIA GPUs: FlashAttention's own, and our kernels where keys are chosen.

The cache, its updates and every step that reads all keys are FlashAttention's own, so that short
prompts cost what they cost without dynmask.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from . import BACKEND
from .backend import batch_of
from .engine import Engine, Parts
from .pages import Pages


class FlashBackend(FlashAttentionBackend):
    """FlashAttention's backend under our name."""

    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's own list of names."""
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[FlashImpl]:
        """What computes."""
        return FlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashBuilder]:
        """What describes a step."""
        return FlashBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders alone."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal attention alone."""
        return False


class FlashBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's description of a step, and ours beside it."""

    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs hold attention of decoded tokens where they read every key, and nothing else.

        A choice of keys is made by Python in every step, which no graph can hold.
        """
        if Engine.of(vllm_config).decodes_whole:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        """The description of a step that is recorded: in it no layer asks for a choice."""
        made: Any = super().build_for_cudagraph_capture(common_attn_metadata)
        made.dynmask = None
        return made

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Requests are computed one by one, or all of them read every key."""
        return False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """The description that every layer of a step gets; vLLM names the arguments."""
        made: Any = super().build(
            common_prefix_len=0, common_attn_metadata=common_attn_metadata, fast_build=fast_build
        )
        made.dynmask = batch_of(common_attn_metadata)
        return made


class FlashImpl(FlashAttentionImpl):
    """Attention of one layer; arguments are vLLM's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: Any = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        config = get_current_vllm_config()
        rest = attn_type, alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name
        engine = Parts.check(config, *rest)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks,
        )  # fmt: skip
        sizes = num_heads, num_kv_heads, head_size, scale
        self._parts = Parts(engine, *sizes, sliding_window, sinks)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step, written into ``output`` [tokens, h, d]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("dynmask: expected plain outputs, received a scale for them")
        step = layer, query, key, value, kv_cache, attn_metadata, output
        if attn_metadata is None:  # vLLM measures what a step takes
            return super().forward(*step)
        own, batch = self._parts.layer(layer.layer_name), attn_metadata.dynmask
        if batch is None:
            return super().forward(*step)
        if own.reads_all(batch):
            own.note_scores(Pages.of(kv_cache, self.num_kv_heads, self.head_size), batch)
            return super().forward(*step)
        own.attend(kv_cache, batch, query, key, value, output)
        return output


__all__ = ["FlashBackend", "FlashBuilder", "FlashImpl"]
