"""Heads that a rank holds where transformers splits a model by tensor parallelism."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import bad
from ..policies.base import Sharded
from .checks import decoder_config

KEYS = ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value")
"""Projections whose outputs are an attention's keys, as tensor parallel plans name them."""


def shard_of(model: PreTrainedModel) -> tuple[int, int]:
    """Rank and number of the ranks that share every layer's heads; (0, 1) where nobody does.

    A model that was loaded with ``tp_plan="auto"`` calls its attention function with plain tensors
    of the local heads, rank r with the r-th of equal runs of heads. Some plans leave attention
    whole (gpt-oss), or gather its heads again (Olmo 2, whose norm is over all of them).

    Raises:
        ValueError: heads that the ranks cannot share by whole groups, or no device mesh.
    """
    ranks = getattr(model, "_tp_size", None) or 1
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    by_heads = {style for name, style in plan.items() if name.rsplit(".", 1)[-1] in KEYS}
    if ranks == 1 or "colwise" not in by_heads:
        return 0, 1
    config = decoder_config(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if kv_heads % ranks:
        raise bad(
            "model", f"kv heads that {ranks} ranks share evenly", kv_heads,
            "Use as many ranks as divide the kv heads.",
        )  # fmt: skip
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None:
        raise bad(
            "model", "one that transformers split over a device mesh", "one without",
            "Load it with from_pretrained(..., tp_plan='auto').",
        )  # fmt: skip
    return mesh.get_local_rank("tp" if "tp" in (mesh.mesh_dim_names or ()) else None), ranks


def policy_of(policy: Any, shard: tuple[int, int]) -> Any:
    """The policy of a rank's own heads: numbers of single heads are cut, others stay."""
    if shard[1] == 1 or not isinstance(policy, Sharded):
        return policy
    return policy.of_shard(*shard)


def check_heads(
    received: int, heads: int, model: PreTrainedModel, shard: tuple[int, int], policy: Any
) -> None:
    """Raise ValueError where attention is called with other heads than a rank was taken to hold.

    A policy without numbers of single heads takes any, where nobody said how many there are.

    Args:
        received: query heads of an attention call.
        heads: query heads of the model.
        model: whose attention is called.
        shard: rank and number of the ranks that share the heads.
        policy: of the rank.
    """
    expected = heads // shard[1]
    if received == expected:
        return
    split = getattr(model, "_tp_size", None) not in (None, 1)
    told = split or shard[1] > 1 or isinstance(policy, Sharded)
    if told:
        raise bad(
            "heads", f"attention of {expected} heads on this rank", received,
            "Load the model without tp_plan, or with one that splits all layers alike."
            if split
            else "Where processes share heads (DeepSpeed Ulysses), call "
            "dynmask.distributed.share_heads(run, group) with the group that shares them.",
        )  # fmt: skip


__all__ = ["check_heads", "policy_of", "shard_of"]
