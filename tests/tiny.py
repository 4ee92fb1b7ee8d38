"""Tiny random causal language models of several architectures: `from tests.tiny import tiny_llama`.

Weights are drawn from a fixed seed without touching the global generator. Their spread is ten times
the usual one, so that attention is far from uniform and a wrong mask changes the logits visibly.
"""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB = 256
WINDOW = 8
"""Width of the sliding window in the models that have one."""


def copied(card: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a card, to be changed: nothing is shared with it."""
    return copy.deepcopy(card.header), {name: x.clone() for name, x in card.tensors.items()}


def _shape(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def _build(config: Any, seed: int, attn_implementation: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.eval()


def tiny_llama(*, layers: int = 2, seed: int = 0, attn: str = "sdpa", **over: Any):
    return _build(LlamaConfig(**(_shape(layers) | over)), seed, attn)


def tiny_qwen3(*, layers: int = 2, seed: int = 0, attn: str = "sdpa", **over: Any):
    return _build(Qwen3Config(**(_shape(layers) | over)), seed, attn)


def tiny_mistral(*, layers: int = 2, seed: int = 0, attn: str = "sdpa", **over: Any):
    """Every layer has a sliding window."""
    shape = _shape(layers) | {"sliding_window": WINDOW} | over
    return _build(MistralConfig(**shape), seed, attn)


def tiny_gemma3(*, layers: int = 4, seed: int = 0, attn: str = "sdpa", **over: Any):
    """Sliding and full layers alternate; queries are scaled by their own constant."""
    shape = _shape(layers) | {"sliding_window": WINDOW, "query_pre_attn_scalar": 16} | over
    kinds = ["sliding_attention", "full_attention"]
    shape.setdefault("layer_types", [kinds[i % 2] for i in range(layers)])
    return _build(Gemma3TextConfig(**shape), seed, attn)


def tiny_gpt_oss(*, layers: int = 2, seed: int = 0, attn: str = "eager", **over: Any):
    """Attention sinks, a sliding and a full layer in turn, mixture of experts; no sdpa."""
    shape = _shape(layers) | {"sliding_window": WINDOW} | over
    shape |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    # The default is YaRN for a model of full size, which says so in a warning here.
    shape.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 150_000.0})
    return _build(GptOssConfig(**shape), seed, attn)


TINY = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma3": tiny_gemma3,
    "gpt_oss": tiny_gpt_oss,
}
