"""Heads that a rank holds where transformers splits a model by tensor parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import bad
from ..policies.base import Sharded
from .checks import attention_modules, decoder_config


def shard_of(model: PreTrainedModel) -> tuple[int, int]:
    """Rank and number of the ranks that share every layer's heads; (0, 1) where nobody does.

    A model that was loaded with ``tp_plan="auto"`` calls its attention function with plain tensors
    of the local heads, rank r with the r-th of equal runs of heads. Some plans leave attention
    whole (gpt-oss).

    Raises:
        ValueError: heads that the ranks cannot share by whole groups, or that are split in some
            layers only.
    """
    ranks = getattr(model, "_tp_size", None) or 1
    if ranks == 1:
        return 0, 1
    split = {_is_split(module) for module in attention_modules(model)}
    if split == {False}:
        return 0, 1
    if len(split) > 1:
        raise bad(
            "model", "attention that is split by heads in all layers, or in none",
            "some of each", "Load it with another tp_plan.",
        )  # fmt: skip
    config = decoder_config(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if kv_heads % ranks:
        raise bad(
            "model", f"kv heads that {ranks} ranks share evenly", kv_heads,
            "Use as many ranks as divide the kv heads.",
        )  # fmt: skip
    mesh: Any = model._device_mesh
    return mesh.get_local_rank("tp" if "tp" in (mesh.mesh_dim_names or ()) else None), ranks


def _is_split(module: nn.Module) -> bool:
    """Whether a projection of an attention module is split along its outputs, the heads."""
    return any(
        placement.is_shard(0)
        for name, parameter in module.named_parameters()
        if name.endswith("weight")
        for placement in getattr(parameter, "placements", ())
    )


def policy_of(policy: Any, shard: tuple[int, int]) -> Any:
    """The policy of a rank's own heads: numbers of single heads are cut, others stay."""
    if shard[1] == 1 or not isinstance(policy, Sharded):
        return policy
    return policy.of_shard(*shard)


def check_heads(received: int, model: PreTrainedModel, shard: tuple[int, int]) -> None:
    """Raise ValueError where attention is called with other heads than a rank was taken to hold."""
    expected = decoder_config(model).num_attention_heads // shard[1]
    if getattr(model, "_tp_size", None) not in (None, 1) and received != expected:
        raise bad(
            "tensor parallelism", f"attention of {expected} heads on this rank", received,
            "Use a version of transformers whose tp_plan splits weights into DTensors.",
        )  # fmt: skip


__all__ = ["check_heads", "policy_of", "shard_of"]
