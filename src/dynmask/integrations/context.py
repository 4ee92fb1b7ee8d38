"""Context parallelism in transformers models: each process computes some positions of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

from ..distributed import Split, agree, gather, of_rows, own_rank
from ..errors import bad
from .cache import OwnedCache
from .checks import attention_modules, decoder_config
from .placement import Placement

if TYPE_CHECKING:
    from .transformers import Run


@contextmanager
def context_parallel(
    run: Run,
    split: Split,
    group: dist.ProcessGroup | None = None,
    *,
    cache: DynamicCache | None = None,
) -> Iterator[None]:
    """Let every process of ``group`` compute its own positions of one sequence.

    The model is whole on every rank; a rank passes its own tokens and their positions::

        split = Split.over(group, input_ids.shape[1], balanced=True)
        rank = torch.distributed.get_rank(group)
        with dynmask.sparsify(model, policy) as run, context_parallel(run, split, group):
            logits = model(
                input_ids=split.take(input_ids, rank, 1),
                position_ids=split.positions(rank)[None],
                use_cache=False,
            ).logits  # of the rank's positions
        logits = gather(logits, split, group, dim=1)  # of all, where they are wanted

    Keys and values are gathered in each layer, and those queries that the policy looks at. It is
    asked about the whole sequence on every rank, and the rank's rows are lowered and computed. So
    the choice is that of one process, forward and backward. Measurements of the run are those of
    the whole sequence, the same on all ranks.

    For the forward over a prompt, without padding or packing, and without a cache to continue
    from: batch rows are sequences of equal length. Every rank has at least one position.

    Decoding goes on by one process on each rank that passed an empty ``cache``, which then holds
    the keys and values of the whole prompt::

        cache = DynamicCache(config=model.config)
        with dynmask.sparsify(model, policy) as run:
            with context_parallel(run, split, group, cache=cache):
                logits = model(..., use_cache=False, logits_to_keep=1).logits
            token = last_position(logits, split, group).argmax(-1)
            ids = torch.cat([input_ids, token], 1)
            model.generate(ids, past_key_values=cache, max_new_tokens=100)

    Args:
        run: what ``sparsify`` returned.
        split: who holds what.
        group: the processes; the default group when None.
        cache: an empty ``DynamicCache`` to be filled on this rank; none is kept when None.

    Raises:
        ValueError: no process group, a split for other ranks, or one that leaves a rank without
            positions, another cache, or a model with layers that mix tokens without attention;
            in the model's forward, tokens that are not the rank's positions, padding, a
            cache.
    """
    rank = own_rank(split, group)
    empty = [r for r in range(split.ranks) if not split.size(r)]
    if empty:
        raise bad(
            "split", "positions for every rank", f"none for rank {empty[0]}",
            "Use fewer ranks for so short a sequence.",
        )  # fmt: skip
    if run.removed or run._context is not None:
        raise bad(
            "run", "one in effect, not in a context yet",
            "one that was removed" if run.removed else "one inside of context_parallel",
        )  # fmt: skip
    layers = decoder_config(run.model).num_hidden_layers
    found = {int(m.layer_idx) for m in attention_modules(run.model)}  # type: ignore[arg-type]
    if found != set(range(layers)):
        raise bad(
            "model", f"attention in each of {layers} layers", f"attention in {len(found)}",
            "Layers that mix tokens in another way would mix a rank's own alone.",
        )  # fmt: skip
    if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length()):
        got = "one with tokens" if isinstance(cache, DynamicCache) else type(cache).__name__
        raise bad("cache", "an empty DynamicCache", got, "Pass DynamicCache(config=model.config).")
    run._context = Context(split, rank, group, cache)
    try:
        yield
    finally:
        run._context = None


@dataclass(frozen=True)
class Context:
    """Which positions this process holds, and with whom it shares the rest.

    Attributes:
        split: who holds what.
        rank: of this process.
        group: the processes.
        cache: keeps the keys and values of the whole sequence; None where nobody wants them.
        memo: what layers share.
    """

    split: Split
    rank: int
    group: dist.ProcessGroup | None
    cache: DynamicCache | None = None
    memo: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def looked_at(self, query: Tensor, rows: list[int] | None) -> Tensor:
        """All positions of queries [b, h, positions, d] of which only ``rows`` are looked at.

        The others are 0 and are not sent: keys and values are small beside the queries of several
        heads to a group.
        """
        if rows is None:
            return self.all(query)
        batch, heads, _, dim = query.shape
        every = query.new_zeros(batch, heads, self.split.length, dim)
        if rows:
            place, mine, own = self._places(tuple(rows), query.device)
            few = query.new_zeros(batch, heads, len(rows), dim)
            few[:, :, mine] = query[:, :, own]
            dist.all_reduce(few, group=self.group)  # each row has one holder
            every[:, :, place] = few
        return every

    def _places(self, rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        """Rows of the sequence; which of them are this rank's, and where it has them."""
        if rows not in self.memo:
            every = torch.tensor(rows)
            positions = self.split.positions(self.rank)
            own = torch.searchsorted(positions, every).clamp(max=len(positions) - 1)
            mine = (positions[own] == every).nonzero().flatten()
            found = every, mine, own[mine]
            self.memo[rows] = tuple(x.to(device) for x in found)
        return self.memo[rows]

    def keep(self, index: int, key: Tensor, value: Tensor) -> None:
        """Put all positions' keys and values [b, g, length, d] of a layer into the cache."""
        if self.cache is not None:
            self.cache.update(key.detach(), value.detach(), index)

    def all(self, x: Tensor) -> Tensor:
        """All positions of [b, heads, positions, d]."""
        return gather(x, self.split, self.group)

    def unrotate(self, back: Callable[[Tensor], Tensor] | None, key: Tensor) -> Any:
        """From gathered keys to those before rotation: each rank turns its own back."""
        return None if back is None else lambda _: self.all(back(key))

    def rows(self, query: Tensor, mask: Any, attend: Callable[..., Tensor]) -> Tensor:
        """Attention of this rank's rows [b, h, n, d]."""
        return torch.cat(of_rows(query, mask, self.split.ranges(self.rank), attend), 2)

    def place(
        self, where: Placement, query: Tensor, key: Tensor, cache: Any, first: bool
    ) -> Placement:
        """Where the whole sequence lies; ValueError where this rank's positions are not its part.

        On the ``first`` layer all ranks hear of it, so that none waits for one that has refused.
        """
        problem = self._problem(where, query, key, cache)
        if first:
            batch, heads, _, dim = query.shape
            facts: dict[str, tuple[int, ...]] = {"batch, heads, head dim": (batch, heads, dim)}
            facts["split"] = (self.split.length, int(self.split.balanced))
            facts["gradient"] = (int(key.requires_grad),)
            agree(self.group, facts, problem, query.device)
        elif problem is not None:
            raise problem
        length = self.split.length
        return Placement.dense(len(query), length, length, where.window)

    def _problem(
        self, where: Placement, query: Tensor, key: Tensor, cache: Any
    ) -> ValueError | None:
        """What is wrong with the tokens of this rank."""
        size = self.split.size(self.rank)
        if query.shape[2] != size or key.shape[2] != size or isinstance(cache, OwnedCache):
            return bad(
                "context_parallel", f"the {size} positions of rank {self.rank}, and no cache",
                f"{query.shape[2]} queries and {key.shape[2]} keys",
                "Pass split.take(input_ids, rank, 1), split.positions(rank)[None] as position_ids "
                "and use_cache=False.",
            )  # fmt: skip
        # where positions jump, transformers may see two sequences
        jumps = [last - first for first, last in self.split.ranges(self.rank)][:-1]
        for row in range(len(query)):
            spans = sorted((s for s in where.spans if s.batch == row), key=lambda s: s.key_start)
            ends, at = [0], 0
            for s in spans:
                whole = s.key_start == s.query_start == at and s.key_stop == s.query_stop
                at = s.key_stop if whole else -1
                ends.append(at)
            if ends[-1] != size or set(ends[1:-1]) - set(jumps):
                return bad(
                    "context_parallel", "one sequence in each batch row, without padding",
                    "padded or packed tokens", "Take sequences of other lengths one by one.",
                )  # fmt: skip
        return None


__all__ = ["Context", "context_parallel"]
