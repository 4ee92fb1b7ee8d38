"""What the vLLM plugin cannot honour, refused with the remedy, and what is worth a warning."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ...errors import bad
from ...policies import Gated, Policy, SnapKV
from ...policies.base import Sharded, evicts
from ...scores import Score

CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


OWN_SCORES = "dma"
"""The text form of the policy of a converted model itself."""


def head_dim_of(config: Any) -> int:
    """Dimensions of a key and of a value."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shape_of(config: Any) -> tuple[int, int, int]:
    """Layers, query heads and kv heads of a model's text configuration, all ranks together."""
    heads = config.num_attention_heads
    return config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads


def check_policy(policy: Any, config: Any, card_model: dict[str, Any] | None = None) -> None:
    """Refuse a policy that is none, needs a cache of its own, or is for another model.

    Args:
        policy: what is asked for.
        config: the model's text configuration.
        card_model: what the policy's card says of its model, where there is one.
    """
    if not isinstance(policy, Policy) or isinstance(policy, type):
        raise bad("policy", "one of dynmask.policies", repr(policy))
    if isinstance(policy, Gated) and policy.decode == "keep":
        raise bad(
            "gated: decode", "'full' or 'select' under vLLM, whose cache drops no single keys",
            "'keep'",
            "Say decode=full or decode=select.",
        )  # fmt: skip
    if isinstance(policy, Gated) and policy.slashed:
        raise bad(
            "gated: slashes", "maps without diagonals under vLLM, where they were never tried",
            "some with",
            "Calibrate without --slashes, or run the model under dynmask.sparsify.",
        )  # fmt: skip
    if isinstance(policy, SnapKV):
        raise bad(
            "snapkv", "a policy that serves several sequences at a time", "one that remembers one",
            "Use another policy.",
        )  # fmt: skip
    if card_model is not None:
        layers, heads, kv_heads = shape_of(config)
        found = {
            "architecture": config.model_type,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
        }
        for name, value in found.items():
            if card_model[name] != value:
                raise bad(
                    "mask card", f"the model that it was calibrated on ({name} {card_model[name]})",
                    f"a model with {name} {value}", "Calibrate this model with dynmask calibrate.",
                )  # fmt: skip
    policy.check(*shape_of(config))


def shard(policy: Any, rank: int, ranks: int, kv_heads: int) -> Any:
    """The policy of a rank's own heads under tensor parallelism."""
    if ranks == 1:
        return policy
    if kv_heads % ranks:
        raise bad(
            "tensor parallelism", f"a number of ranks that divides {kv_heads} kv heads", ranks,
            "Choose another --tensor-parallel-size.",
        )  # fmt: skip
    return policy.of_shard(rank, ranks) if isinstance(policy, Sharded) else policy


def check_engine(config: Any, policy: Any) -> None:
    """Refuse what vLLM is configured for and a policy does not understand.

    Args:
        config: vLLM's configuration of the engine.
        policy: what is asked for.
    """
    if config.speculative_config is not None:
        raise bad(
            "vLLM", "no speculative decoding: a policy takes several new tokens for a prompt",
            "a speculative configuration", "Leave --speculative-config out.",
        )  # fmt: skip
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise bad(
                "vLLM", f"{name} 1: a choice of keys needs all of them", getattr(parallel, name),
                "Use --tensor-parallel-size.",
            )  # fmt: skip
    dtype = str(config.cache_config.cache_dtype)
    if dtype not in CACHE_DTYPES:
        raise bad(
            "--kv-cache-dtype", f"one of {', '.join(CACHE_DTYPES)}", repr(dtype),
            "Leave it out: quantized keys are not read.",
        )  # fmt: skip
    if by_learned_scores(policy) and config.kv_transfer_config is not None:
        raise bad(
            "vLLM", "no transfer of cache pages, which would leave their scores behind",
            "a kv transfer configuration", "Leave --kv-transfer-config out.",
        )  # fmt: skip


def by_learned_scores(policy: Any) -> bool:
    """Whether a policy keeps a score for each key."""
    modules = getattr(policy, "modules", ())
    evicting = evicts(policy) and any(isinstance(module, nn.Module) for module in modules)
    return evicting or (isinstance(policy, Gated) and policy.scored)


def reads_keys(policy: Any) -> bool:
    """Whether those scores look at keys as they were before rotation."""
    modules = [m for m in getattr(policy, "modules", ()) if isinstance(m, Score)]
    evicting = evicts(policy) and any(module.reads_keys for module in modules)
    return evicting or (isinstance(policy, Gated) and policy.scored)


def check_layer(
    kind: str, alibi: object, soft_cap: float | None, shared: str | None, scored: bool
) -> None:
    """Refuse a layer whose attention is another than ours.

    Args:
        kind: of attention, "decoder" is ours.
        alibi: slopes, or None.
        soft_cap: of the logits; 0 and None are none.
        shared: the layer whose cache it reads, or None.
        scored: whether the policy keeps a score for each key.
    """
    if kind != "decoder":
        raise bad("attention", "that of a decoder", repr(kind), "Serve the model without dynmask.")
    if alibi is not None:
        raise bad(
            "attention", "logits without a bias of distance", "ALiBi slopes",
            "Serve the model without dynmask.",
        )  # fmt: skip
    if soft_cap:
        raise bad(
            "attention logits", "no soft cap: the kernels compute a plain softmax", soft_cap,
            "Serve the model without dynmask (Gemma 3 has none).",
        )  # fmt: skip
    if shared is not None and scored:
        raise bad(
            "attention", "a cache of the layer's own, for its scores", f"the cache of {shared}",
            "Use a policy without learned scores.",
        )  # fmt: skip


def layer_index(name: str) -> int:
    """Number of a layer by its name in the model, ``model.layers.3.self_attn.attn``."""
    found = re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")
    if len(found) != 1:
        raise bad("layer", "a name with one number", repr(name), "Serve it without dynmask.")
    return int(found[0])


def note_on_chunks(policy: Any, chunks: bool, prefixes: bool) -> str | None:
    """What to say of a policy whose choice depends on where a prompt is cut; None if nothing."""
    if policy.causal or not (chunks or prefixes):
        return None
    flags = ["--no-enable-chunked-prefill"] * chunks + ["--no-enable-prefix-caching"] * prefixes
    return (
        f"{policy.name} chooses by the tokens that are read at once: with chunked prefill or "
        "a cached prefix its answers depend on where vLLM cuts a prompt, and so on what else is "
        f"served. For the answers of the whole prompt: {' '.join(flags)}"
    )


__all__ = [
    "OWN_SCORES",
    "by_learned_scores",
    "check_engine",
    "check_layer",
    "check_policy",
    "head_dim_of",
    "layer_index",
    "note_on_chunks",
    "reads_keys",
    "shape_of",
    "shard",
]
