"""What every policy has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..masks import Mask

if TYPE_CHECKING:
    from ..retention import Retention
    from ..summary import BlockSummary


@dataclass(frozen=True)
class Layer:
    """Which attention call a policy is asked about.

    Attributes:
        index: number of the layer, from 0.
        first_key: position of the first key in its sequence; above 0 where a sliding-window
            cache has dropped older keys.
        unrotate: from keys [b, g, n, d] as the layer rotated them to those before rotation, at
            the positions of this call; None where they were not rotated, or it is not known.
        tell: hears what a policy did beyond its settings, a name and a number for each map
            [b, h]: the gated policy's guard tells ``"widened"``, by how much. None if nobody
            listens.
        pools: from kv heads side by side, a slice of those of this call, to a summary of all
            their keys that a cache has carried along, or None for heads that have none. None
            where no cache carries any.
        scores: float32 [b, g, n], what the policy's own scores of the call's keys are, from where
            they were made before; None where the policy is to make them.
    """

    index: int
    first_key: int = 0
    unrotate: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)
    tell: Callable[[str, Tensor], None] | None = field(default=None, compare=False, repr=False)
    pools: Callable[[slice], BlockSummary | None] | None = field(
        default=None, compare=False, repr=False
    )
    scores: Tensor | None = field(default=None, compare=False, repr=False)


@runtime_checkable
class Policy(Protocol):
    """Decides what matters.

    Attributes:
        name: as on the command line and in tables.
        causal: whether row i's choice depends on tokens up to i alone; then prefill, chunked
            prefill and decoding agree.
        phase: "both", or "prefill" for a policy that is not asked while single tokens are
            decoded (dense causal attention then).
    """

    name: ClassVar[str]
    causal: ClassVar[bool]
    phase: ClassVar[Literal["both", "prefill"]]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Mask:
        """The mask of one attention call: query [b, h, q, d], key and value [b, g, k, d]."""
        ...

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError when the policy does not fit a model of this shape."""
        ...


def for_prompts_alone(policy: Any) -> bool:
    """Whether decoded tokens read every key: always under a policy, or as it was set up."""
    return policy.phase == "prefill" or getattr(policy, "decode", None) == "full"


@runtime_checkable
class Evicting(Protocol):
    """A policy that only ever evicts, by scores that belong to the keys alone.

    Its masks are lifetime masks, so that ``dynmask.BoundedCache`` can free what is dropped.
    """

    def retention(self, layer: int) -> Retention:
        """What a query of this layer reads, given the scores."""
        ...

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key: float32 [b, g, n], from key and value [b, g, n, d]."""
        ...

    def bias(self, scores: Tensor, layer: Layer) -> Tensor | None:
        """What is added to the logits of keys with these scores [b, g, n], or None."""
        ...


def evicts(policy: Any) -> bool:
    """Whether a policy is one of :class:`Evicting`.

    Each attention call asks, so its methods are looked up: ``isinstance`` would walk through the
    protocol's members first.
    """
    return (
        getattr(policy, "retention", None) is not None
        and getattr(policy, "scores", None) is not None
        and getattr(policy, "bias", None) is not None
    )


def looks_before_rotation(policy: Any) -> bool:
    """Whether a policy scores keys, as they were before rotation: it evicts, or says so."""
    return evicts(policy) or bool(getattr(policy, "scored", False))


@runtime_checkable
class Sharded(Protocol):
    """A policy with numbers of single heads, which tensor parallelism cuts by rank.

    A policy without this method is taken to treat all heads alike.
    """

    def of_shard(self, rank: int, ranks: int) -> Policy:
        """The policy of the ``rank``-th of ``ranks`` equal runs of heads, as if they were all."""
        ...


@runtime_checkable
class Gridded(Protocol):
    """A policy that reads, in chunks cut at multiples of ``grid``, what it would in the whole
    prompt; 0 where no cut does that.

    A policy without it does so at any cut if it is causal, and at none otherwise.
    """

    @property
    def grid(self) -> int:
        """Positions between two cuts that change nothing; they count from the first token."""
        ...


def grid_of(policy: Any) -> int:
    """Where a prompt can be cut without a change of what is read: multiples of it; 0 nowhere."""
    if policy is None or policy.causal:
        return 1
    return policy.grid if isinstance(policy, Gridded) else 0


def looks_ahead(policy: Any) -> bool:
    """Whether what a query of one call reads depends on tokens after it.

    No causal policy does, and some others do not: H2O goes on from call to call with its cache
    alone, but no row of a call asks later ones.
    """
    return policy is not None and getattr(policy, "looks_ahead", not policy.causal)


@runtime_checkable
class Glancing(Protocol):
    """A policy that looks at a few query rows of a call, or at none.

    Where positions are shared over processes, no more than these are gathered. A policy without
    this method is taken to look at all.
    """

    def rows_read(self, queries: int, layer: int) -> list[int] | None:
        """Which of a call's query rows the choice depends on, ascending; None for all."""
        ...


class LooksAtNone:
    """For policies whose choice does not depend on queries."""

    def rows_read(self, queries: int, layer: int) -> list[int]:
        """None of them."""
        return []


def last_rows(queries: int, count: int) -> list[int]:
    """The last ``count`` of so many query rows."""
    return list(range(max(queries - count, 0), queries))


def own_heads(table: Any, rank: int, ranks: int) -> Any:
    """The ``rank``-th of ``ranks`` equal runs of a table's heads, its first dimension."""
    size = len(table) // ranks
    return table[rank * size : (rank + 1) * size]


class AnyModel:
    """For policies that fit every model."""

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Fits every model."""


def check_field(policy: str, name: str, value: float, ok: bool, expected: str) -> None:
    """Raise ValueError unless a field of a policy is in range."""
    if not ok:
        raise ValueError(f"{policy}: expected {name} {expected}, received {value}")
