"""One sequence over several processes: context parallelism by an all-gather of keys and values.

Each rank holds some query rows, and the keys and values at the same positions. Keys and values of
all ranks are gathered, the mask is cut to the rank's rows, and attention runs locally. A choice of
keys needs scores of all keys, so gathering them is natural for dynamic masks; keys and values are
small beside what attention computes with them.

Every rank calls the same functions in the same order, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import attention
from .errors import bad
from .masks import Mask
from .masks.base import check_whole
from .masks.part import part_of

if TYPE_CHECKING:
    from .integrations.context import context_parallel
    from .integrations.share import share_heads

# Newer names of the same collectives, where torch has them.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)

POSITIONS = 2
"""The dimension of positions in queries, keys, values and biases."""


@dataclass(frozen=True)
class Split:
    """Which positions of a sequence each rank holds.

    Args:
        length: positions of the sequence, 1 or more.
        ranks: processes that share it, 1 or more; it need not divide the length.
        balanced: cut the sequence into twice as many pieces and give rank r the pieces r and
            ``2 ranks - 1 - r``: under a causal mask every rank then has as many pairs. Without
            it rank r holds one range, and the last rank has the most to do.

    Raises:
        ValueError: numbers out of range.
    """

    length: int
    ranks: int
    balanced: bool = False

    def __post_init__(self) -> None:
        check_whole("length", self.length, 1)
        check_whole("ranks", self.ranks, 1)

    @classmethod
    def over(cls, group: dist.ProcessGroup | None, length: int, balanced: bool = False) -> Split:
        """For the ranks of a process group; None is the default group."""
        _check_group(group)
        return cls(length, dist.get_world_size(group), balanced)

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The positions of a rank as ascending half-open ranges; none where there are too few."""
        if not 0 <= rank < self.ranks:
            raise bad("rank", f"0 to {self.ranks - 1}", rank)
        pieces = 2 * self.ranks if self.balanced else self.ranks
        own = (rank, pieces - 1 - rank) if self.balanced else (rank,)
        cuts = [(self.length * i // pieces, self.length * (i + 1) // pieces) for i in own]
        return tuple((first, last) for first, last in cuts if first < last)

    def size(self, rank: int) -> int:
        """How many positions a rank holds."""
        return sum(last - first for first, last in self.ranges(rank))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The positions of a rank: int64 [n], ascending."""
        return self.take(torch.arange(self.length, device=device), rank, 0)

    def take(self, x: Tensor, rank: int, dim: int = POSITIONS) -> Tensor:
        """A rank's positions of a tensor that holds all of them along ``dim``."""
        if x.shape[dim] != self.length:
            raise bad(
                "tensor", f"{self.length} positions in dimension {dim}", tuple(x.shape),
                "Pass the tensor of the whole sequence.",
            )  # fmt: skip
        parts = [x.narrow(dim, first, last - first) for first, last in self.ranges(rank)]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def gather(
    x: Tensor, split: Split, group: dist.ProcessGroup | None = None, dim: int = POSITIONS
) -> Tensor:
    """The tensor of the whole sequence, on every rank, from each rank's positions of it.

    Differentiable: a rank gets back the sum of all ranks' gradients for its positions. Where all
    ranks compute the same loss from the result, divide it by the number of ranks.

    Args:
        x: this rank's positions along ``dim``, in the order of ``split``; other sizes are alike
            on all ranks.
        split: who holds what.
        group: the processes; the default group when None.
        dim: the dimension of positions.

    Raises:
        ValueError: no process group, or a tensor that is not this rank's part.
    """
    rank = own_rank(split, group)
    if x.shape[dim] != split.size(rank):
        raise bad(
            "tensor", f"{split.size(rank)} positions of rank {rank} in dimension {dim}",
            tuple(x.shape), "Take them with split.take(x, rank, dim).",
        )  # fmt: skip
    return _Gather.apply(split, group, dim % x.dim(), x)[0]


def last_position(
    x: Tensor, split: Split, group: dist.ProcessGroup | None = None, dim: int = 1
) -> Tensor:
    """What the last position of the whole sequence holds, on every rank.

    Of the logits of a prompt it is what the next token is chosen by. Without gradients.

    Args:
        x: positions of this rank along ``dim``, or its last one alone (``logits_to_keep=1``);
            other sizes are alike on all ranks, and no rank is without positions.
        split: who holds what.
        group: the processes; the default group when None.
        dim: the dimension of positions.

    Returns:
        ``x`` with one position in ``dim``.

    Raises:
        ValueError: no process group, a split for other ranks, or no position.
    """
    own_rank(split, group)
    if x.dim() == 0 or not x.shape[dim]:
        raise bad("tensor", f"a position in dimension {dim}", tuple(x.shape))
    ends = [split.ranges(rank)[-1:] for rank in range(split.ranks)]
    holder = next(rank for rank, end in enumerate(ends) if end and end[0][1] == split.length)
    own = x.detach().narrow(dim, x.shape[dim] - 1, 1)
    return gather(own, Split(split.ranks, split.ranks), group, dim).narrow(dim, holder, 1)


@overload
def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Callable[[Tensor, Tensor], Mask],
    split: Split,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    *,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    deterministic: bool | None = None,
    check: bool = True,
) -> Tensor: ...
@overload
def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Callable[[Tensor, Tensor], Mask],
    split: Split,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    deterministic: bool | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor]: ...
def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Callable[[Tensor, Tensor], Mask],
    split: Split,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    deterministic: bool | None = None,
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dynmask.attention` of a sequence whose positions are split over processes.

    The rows of the result are those of one process over the whole sequence, forward and backward,
    but for rounding. Every rank makes the call, and every rank runs backward if one does (a rank
    without positions too): the gradients of keys, values and bias are summed over ranks, in
    float32 at least.

    Each rank holds keys and values of the whole sequence while it computes, and until backward
    where autograd records the call.

    Args:
        query: [b, h, q, d], this rank's positions in the order of ``split``; q may be 0.
        key, value: [b, g, q, d] and [b, g, q, dv], at the same positions.
        mask: of the whole sequence, the same on all ranks; or what makes it of the gathered key
            and value [b, g, length, d], without gradients.
        split: who holds what.
        bias: [b or 1, 1 or g or h, q], added to the logits of this rank's keys.
        scale: of the logits, ``d ** -0.5`` when None.
        return_lse: also return the log-sum-exp of each row.
        group: the processes; the default group when None.
        impl: implementation of ``dynmask.attention``.
        deterministic: as there.
        check: compare sizes over all ranks first, so that ranks which disagree raise instead of
            waiting for each other. It waits for the device; leave it out where that counts.

    Returns:
        out [b, h, q, dv], and lse [b, h, q] when asked for.

    Raises:
        ValueError: no process group, another number of ranks than the split's, tensors that are
            not this rank's positions, ranks that disagree; on all ranks, before any work, where
            ``check`` is on.
    """
    rank = own_rank(split, group)
    problem = _problem(query, key, value, mask, bias, split, rank)
    if check:
        facts = {} if problem is not None else _facts(query, key, value, mask, bias, split)
        agree(group, facts, problem, getattr(query, "device", None))
    elif problem is not None:
        raise problem
    tensors = (key, value) if bias is None else (key, value, bias)
    whole = _Gather.apply(split, group, POSITIONS, *tensors)
    if not isinstance(mask, Mask):
        with torch.no_grad():
            mask = _made(mask(whole[0].detach(), whole[1].detach()), split)

    def attend(q: Tensor, own: Mask) -> Any:
        k, v, *rest = (x.narrow(POSITIONS, 0, own.keys) for x in whole)
        how: dict[str, Any] = {"impl": impl, "deterministic": deterministic}
        return attention(
            q, k, v, own, rest[0] if rest else None, scale, return_lse=return_lse, **how
        )

    found = of_rows(query, mask, split.ranges(rank), attend)
    if not found:
        return _no_rows(query, whole, return_lse)
    if not return_lse:
        return torch.cat(found, POSITIONS)
    out, lse = (torch.cat(x, POSITIONS) for x in zip(*found, strict=True))
    return out, lse


def of_rows(
    query: Tensor,
    mask: Mask,
    ranges: Sequence[tuple[int, int]],
    attend: Callable[[Tensor, Mask], Any],
) -> list[Any]:
    """What ``attend`` makes of the rows of each range and of the mask cut to them.

    Args:
        query: [b, h, q, d], the rows of all ranges one after the other.
        mask: of the whole sequence.
        ranges: of rows of the mask.
        attend: called with queries [b, h, n, d] and their mask, over its first keys.
    """
    found, at = [], 0
    for first, last in ranges:
        rows = query[:, :, at : at + last - first]
        found.append(attend(rows, part_of(mask, (first, last))))
        at += last - first
    return found


def agree(
    group: dist.ProcessGroup | None,
    facts: dict[str, tuple[int, ...]],
    problem: ValueError | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError on every rank unless all ranks have the same facts and no problem.

    Args:
        group: the processes.
        facts: numbers by name, at most ``FACTS`` in all; of no account where there is a problem.
        problem: what is wrong on this rank.
        device: where the group's tensors are.
    """
    numbers = [len(facts), *(x for values in facts.values() for x in (len(values), *values))]
    padded = [int(problem is not None), *numbers, *[0] * FACTS][:FACTS]
    if device is None:
        device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    own = torch.tensor(padded, device=device)
    every = own.new_empty(dist.get_world_size(group) * FACTS)
    _all_gather_single(every, own, group=group)
    rows = every.view(-1, FACTS).tolist()
    if problem is not None:
        raise problem
    refused = [rank for rank, row in enumerate(rows) if row[0]]
    if refused:
        raise bad(
            "ranks", "arguments that fit on all of them", f"a refusal by rank {refused[0]}",
            "See the error of that rank.",
        )  # fmt: skip
    at = 2
    for name, values in facts.items():
        part = slice(at + 1, at + 1 + len(values))
        for rank, row in enumerate(rows):
            if row[at : part.stop] != padded[at : part.stop]:
                theirs = row[at + 1 : at + 1 + row[at]]
                raise bad(
                    f"ranks: {name}", f"the same on all ranks ({list(values)} here)",
                    f"{theirs} on rank {rank}", "Make the same call on every rank.",
                )  # fmt: skip
        at = part.stop


FACTS = 64
"""Numbers that ranks compare."""


class _Gather(torch.autograd.Function):
    """Tensors of whole sequences from each rank's positions; backward sums and scatters.

    One function for all tensors of a call: the collectives of backward then come in one order.
    """

    @staticmethod
    def forward(
        ctx: Any, split: Split, group: dist.ProcessGroup | None, dim: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.how = split, group, dim
        return tuple(_all_gather(x, split, group, dim) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        found = [
            _reduce_scatter(grad, *ctx.how) if needed else None
            for grad, needed in zip(grads, wanted, strict=True)
        ]
        return None, None, None, *found


def _all_gather(x: Tensor, split: Split, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """All positions along ``dim``; every rank sends as many, padded where it has fewer."""
    most = max(split.size(rank) for rank in range(split.ranks))
    shape = [*x.shape]
    shape[dim] = most
    sent = x.contiguous()
    if x.shape[dim] < most:
        sent = x.new_zeros(shape)
        sent.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = x.new_empty(split.ranks, sent.numel())
    _all_gather_single(parts.view(-1), sent.view(-1), group=group)
    shape[dim] = split.length
    out = x.new_empty(shape)
    shape[dim] = most
    for rank, part in enumerate(parts):
        for a, b in _pairs(out, part.view(shape), split, rank, dim):
            a.copy_(b)
    return out


def _reduce_scatter(
    grad: Tensor, split: Split, group: dist.ProcessGroup | None, dim: int
) -> Tensor:
    """This rank's positions of the sum of all ranks' gradients, summed in float32 at least."""
    most = max(split.size(rank) for rank in range(split.ranks))
    shape = [*grad.shape]
    shape[dim] = most
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = torch.zeros(split.ranks, *shape, dtype=wide, device=grad.device)
    for rank, part in enumerate(parts):
        for a, b in _pairs(grad, part, split, rank, dim):
            b.copy_(a)
    own = torch.empty(shape, dtype=wide, device=grad.device)
    _reduce_scatter_single(own.view(-1), parts.view(-1), group=group)
    return own.narrow(dim, 0, split.size(dist.get_rank(group))).to(grad.dtype)


def _pairs(
    whole: Tensor, part: Tensor, split: Split, rank: int, dim: int
) -> list[tuple[Tensor, Tensor]]:
    """Views of a rank's ranges in the tensor of all positions and in the rank's own."""
    pairs, at = [], 0
    for first, last in split.ranges(rank):
        size = last - first
        pairs.append((whole.narrow(dim, first, size), part.narrow(dim, at, size)))
        at += size
    return pairs


def _no_rows(query: Tensor, whole: tuple[Tensor, ...], return_lse: bool) -> Any:
    """The result of a rank without positions; its backward still takes part in the sums."""
    tied = sum(x.narrow(POSITIONS, 0, 0).sum() for x in (query, *whole))
    out = query.new_zeros(*query.shape[:3], whole[1].shape[-1]) + tied
    if not return_lse:
        return out
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_zeros(query.shape[:3], dtype=dtype)


def _made(mask: Any, split: Split) -> Mask:
    """What a callable has made, when it is a mask of the whole sequence."""
    if not isinstance(mask, Mask) or (mask.queries, mask.keys) != (split.length,) * 2:
        size = f"{mask.queries} x {mask.keys}" if isinstance(mask, Mask) else type(mask).__name__
        raise bad("mask", f"one of {split.length} queries and keys", size)
    return mask


def _problem(
    query: Any, key: Any, value: Any, mask: Any, bias: Any, split: Split, rank: int
) -> ValueError | None:
    """What is wrong with the arguments of this rank."""
    own = split.size(rank)
    remedy = "Take this rank's positions with split.take(x, rank)."
    for name, x, dims in (("query", query, 4), ("key", key, 4), ("value", value, 4)):
        if not isinstance(x, Tensor) or x.dim() != dims or x.shape[POSITIONS] != own:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return bad(name, f"[batch, heads, {own} positions of rank {rank}, dim]", got, remedy)
    if bias is not None and (
        not isinstance(bias, Tensor) or bias.dim() != 3 or bias.shape[POSITIONS] != own
    ):
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        return bad("bias", f"[batch, heads, {own} positions of rank {rank}]", got, remedy)
    if isinstance(mask, Mask):
        try:
            _made(mask, split)
        except ValueError as error:
            return error
    elif not callable(mask):
        return bad("mask", "a mask of the whole sequence, or what makes it", type(mask).__name__)
    return None


def _facts(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None, split: Split
) -> dict[str, tuple[int, ...]]:
    """What must be the same on all ranks."""

    def sizes(x: Tensor | None) -> tuple[int, ...]:
        return () if x is None else tuple(n for i, n in enumerate(x.shape) if i != POSITIONS)

    def kind(x: Tensor | None) -> tuple[int, ...]:
        if x is None:
            return ()
        wanted = x.requires_grad and torch.is_grad_enabled()
        return x.dtype.itemsize, int(x.dtype == torch.bfloat16), int(wanted)

    known = isinstance(mask, Mask)
    shared = {"key": key, "value": value, "bias": bias}
    named = {"query": query, **shared}
    return {
        "length and balance of the split": (split.length, int(split.balanced)),
        **{f"{name} sizes but positions": sizes(x) for name, x in named.items()},
        **{f"{name} bytes a number, bfloat16, gradient": kind(x) for name, x in shared.items()},
        "mask batch and heads": (mask.batch, mask.heads) if known else (),
    }


def _check_group(group: dist.ProcessGroup | None) -> None:
    """Raise ValueError unless this process can talk to the others of a group."""
    if not dist.is_available() or not dist.is_initialized():
        raise bad(
            "process group", "one that is initialised", "none",
            "Call torch.distributed.init_process_group first (torchrun starts the processes).",
        )  # fmt: skip
    if dist.get_rank(group) < 0:
        raise bad("process group", "one that this process belongs to", "another one")


def own_rank(split: Split, group: dist.ProcessGroup | None) -> int:
    """This process's rank in a group that a split was made for."""
    _check_group(group)
    if dist.get_world_size(group) != split.ranks:
        raise bad(
            "split", f"one for the {dist.get_world_size(group)} ranks of the group",
            f"one for {split.ranks}", "Make it with Split.over(group, length).",
        )  # fmt: skip
    return dist.get_rank(group)


def __getattr__(name: str) -> object:
    """Load what needs transformers when it is first asked for."""
    if name == "context_parallel":
        from .integrations.context import context_parallel

        return context_parallel
    if name == "share_heads":
        from .integrations.share import share_heads

        return share_heads
    raise AttributeError(f"module 'dynmask.distributed' has no attribute {name!r}")


__all__ = [
    "Split",
    "context_attention",
    "context_parallel",
    "gather",
    "last_position",
    "share_heads",
]
