"""Attention that is called with a run of each layer's heads, one run for each process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from ..distributed import Split, gather, own_rank
from ..errors import bad
from .checks import decoder_config
from .shard import policy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .transformers import Run

HEADS = 1


@dataclass(frozen=True)
class Share:
    """Which run of heads this process computes, and with whom it shares the others.

    Attributes:
        rank, ranks: its number and how many there are.
        group: the processes.
        trains: whether gradients of replicated weights are summed over the processes.
    """

    rank: int
    ranks: int
    group: dist.ProcessGroup | None
    trains: bool = True

    def all(self, x: Tensor) -> Tensor:
        """All heads of [b, heads of this process, n, d]."""
        split = Split(x.shape[HEADS] * self.ranks, self.ranks)
        return gather(x, split, self.group, HEADS)

    def own(self, x: Tensor) -> Tensor:
        """This process's heads of [b, heads, ...]."""
        size = x.shape[HEADS] // self.ranks
        return x.narrow(HEADS, self.rank * size, size)


def share_heads(
    run_or_model: Run | PreTrainedModel, group: dist.ProcessGroup | None = None
) -> None:
    """Say that attention is called with a run of each layer's heads on each process of a group.

    For what splits heads without the model's knowledge: DeepSpeed Ulysses, which gives the r-th
    process the r-th of equal runs of heads, and all positions. A policy's numbers of single heads
    are cut to the process's own; the scores of a converted model read the values of all heads,
    which are gathered. (``tp_plan="auto"`` is known without being told.)

    Args:
        run_or_model: what ``sparsify`` returned, or a model that ``convert`` changed. The same
            call on every process of the group.
        group: the processes; the default group when None.

    Raises:
        ValueError: no process group, heads that it does not share evenly, a run that was removed
            or shares its heads already, a model that is not converted.
    """
    from .convert import is_converted, share_scores

    run: Any = run_or_model
    sparsified = hasattr(run, "removed")
    model = run.model if sparsified else run
    if not sparsified and not (hasattr(model, "modules") and is_converted(model)):
        raise bad(
            "share_heads", "the run that sparsify returned, or a converted model",
            type(run).__name__, "See dynmask.sparsify and dynmask.convert.",
        )  # fmt: skip
    config = decoder_config(model)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rank = own_rank(Split.over(group, kv_heads), group)
    ranks = dist.get_world_size(group)
    if kv_heads % ranks:
        raise bad(
            "group", "a number of processes that divides the kv heads",
            f"{ranks} for {kv_heads}", "Use fewer processes.",
        )  # fmt: skip
    if not sparsified:
        share_scores(model, Share(rank, ranks, group))
        return
    if run.removed or run.shard != (0, 1):
        raise bad(
            "share_heads", "a run in effect whose heads are not shared yet",
            "one that was removed" if run.removed else f"one of rank {run.shard[0]}",
        )  # fmt: skip
    run.policy = policy_of(run.policy, (rank, ranks))
    run.shard = rank, ranks


__all__ = ["Share", "share_heads"]
