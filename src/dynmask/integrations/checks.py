"""What the transformers adapter cannot honour, refused with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel, cache_utils

from ..attention import IMPLS
from ..policies import H2O, Gated, Policy
from ..policies.base import evicts
from .cache import BoundedLayer
from .calls import arguments, note_asked
from .gated_cache import GatedLayer
from .heavy_cache import HeavyHitterLayer

PREFIX = "dynmask_"
"""How the names of registered runs begin."""

CONVERTED = f"{PREFIX}layers"
"""Name of the attention of converted models."""

# Caches whose keys are where a mask says: all of them, or the newest of a sliding window.
KNOWN_CACHE_LAYERS = tuple(
    getattr(cache_utils, name)
    for name in (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "StaticLayer",
        "StaticSlidingWindowLayer",
        "QuantoQuantizedLayer",
        "HQQQuantizedLayer",
        # these hold no keys
        "LinearAttentionLayer",
        "DummyLayer",
    )
    if hasattr(cache_utils, name)
)


def decoder_config(model: PreTrainedModel) -> Any:
    """Configuration of the text decoder."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's attention modules."""
    kind = type(decoder_config(model))
    return [
        m
        for m in model.modules()
        if "Attention" in type(m).__name__
        and isinstance(getattr(m, "layer_idx", None), int)
        and type(getattr(m, "config", None)) is kind
    ]


def configs(model: PreTrainedModel) -> Iterator[Any]:
    """Each configuration object that the decoder dispatches on, once."""
    kind = type(decoder_config(model))
    seen: set[int] = set()
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    owners = (decoder_config(model), *(m.config for m in [*parts, *attention_modules(model)]))
    for config in owners:
        if type(config) is kind and id(config) not in seen:
            seen.add(id(config))
            yield config


def check_settings(impl: str, measure_rows: int) -> None:
    """Refuse an unknown implementation or a negative count."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, received {impl!r}")
    if measure_rows < 0:
        raise ValueError(
            f"measure_rows: expected 0 (nothing) or more rows, received {measure_rows}"
        )


def check_model(model: Any) -> None:
    """Refuse what cannot be sparsified."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a transformers PreTrainedModel, received {name}; load one with "
            "from_pretrained, or pass the model inside of a wrapper"
        )
    config = decoder_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only model, received {name}; use its sdpa")
    modules = attention_modules(model)
    bidirectional = not getattr(config, "is_causal", True) or bool(
        getattr(config, "use_bidirectional_attention", False)
    )
    if bidirectional or any(not getattr(m, "is_causal", True) for m in modules):
        raise ValueError(
            f"model: expected causal attention, received {name} with attention in both "
            "directions; sparsify decoders only"
        )
    supported = getattr(model, "_can_set_attn_implementation", lambda: True)
    if not modules or not supported():
        raise ValueError(
            f"model: expected attention that goes through transformers' AttentionInterface, "
            f"received {name}, whose attention is its own; use an architecture that supports "
            "attn_implementation='sdpa'"
        )
    if any(c._attn_implementation == CONVERTED for c in configs(model)):
        raise ValueError(
            f"model: expected one without dynamic mask attention, received {name} that was "
            "converted; call dynmask.revert(model) first"
        )
    if any(str(c._attn_implementation).startswith(PREFIX) for c in configs(model)):
        raise ValueError(
            f"model: expected one policy at a time, received {name} that is sparsified already; "
            "call remove() of its run first (for a copy made while a run was on: "
            "model.set_attn_implementation('sdpa'))"
        )
    for attribute in ("attn_logit_softcapping", "attention_logit_softcapping"):
        if getattr(config, attribute, None) is not None:
            raise ValueError(_softcap(f"{name} with {attribute}={getattr(config, attribute)}"))


def check_policy(model: PreTrainedModel, policy: Any, config: Any) -> None:
    """Refuse a policy that is none, or one for another model."""
    is_policy = isinstance(policy, Policy) and not isinstance(policy, type)
    if not is_policy or policy.phase not in ("both", "prefill"):
        raise ValueError(
            "policy: expected a policy (name, causal, phase 'both' or 'prefill', check, callable), "
            f"received {policy!r}; for example dynmask.policies.Streaming(sinks=4, window=1024)"
        )
    card = getattr(policy, "card", None)
    if card is not None:
        card.check(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    policy.check(config.num_hidden_layers, heads, kv_heads)


def cache_layers(policy: Any) -> tuple[type, ...]:
    """Kinds of cache layers that drop keys and that a policy can serve; none for most."""
    if evicts(policy):
        return (BoundedLayer,)
    kinds = {Gated: GatedLayer, H2O: HeavyHitterLayer}
    return tuple(layer for kind, layer in kinds.items() if isinstance(policy, kind))


def check_forward(module: nn.Module, args: tuple, kwargs: dict, own: tuple[type, ...] = ()) -> None:
    """Refuse forward arguments that would be ignored or misread.

    Args:
        module: the model.
        args: positional arguments.
        kwargs: named arguments.
        own: kinds of cache layers that the policy serves beside transformers', see
            :func:`cache_layers`.
    """
    given = arguments(module, args, kwargs)
    asked = given.get("output_attentions")
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions: expected False, received True; sparse attention forms no "
            "attention maps: ask the model for them with attn_implementation='eager' and no policy"
        )
    note_asked(given)
    cache = given.get("past_key_values")
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    unknown = (
        [cache]
        if layers is None or isinstance(cache, cache_utils.EncoderDecoderCache)
        else [x for x in layers if type(x) not in (*KNOWN_CACHE_LAYERS, *own)]
    )
    if unknown:
        raise ValueError(
            "past_key_values: expected a cache whose keys stay in order (DynamicCache, "
            f"StaticCache, QuantizedCache), received {type(unknown[0]).__name__}; leave the cache "
            "to generate() or pass a DynamicCache(config=model.config)"
        )


def check_call(module: nn.Module, dropout: float, softcap: float | None, kwargs: dict) -> None:
    """Refuse what the attention function is asked for and does not compute."""
    if dropout:
        raise ValueError(
            f"attention_dropout: expected 0, received {dropout}; sparse attention has no dropout: "
            "set config.attention_dropout = 0 before building the model, or call model.eval()"
        )
    if softcap is not None:
        raise ValueError(_softcap(f"softcap={softcap}"))
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(
            f"attention: expected causal attention, received {type(module).__name__} with "
            "is_causal=False; sparsify decoders only"
        )
    for name in ("cache", "block_table", "head_mask", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected none, received {type(kwargs[name]).__name__}; use generate() "
                "(not generate_batch), with a model that has no bias on its attention logits"
            )


def _softcap(received: str) -> str:
    return (
        f"attention logits: expected no soft cap, received {received}; the kernels compute a plain "
        "softmax: use a model without it (Gemma 3 has none)"
    )
