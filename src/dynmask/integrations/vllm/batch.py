"""The requests of one step, as a policy sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """One request's part of a step.

    Attributes:
        number: its row in the block table.
        start, stop: its rows in the step's queries.
        keys: tokens seen so far, those of this step counted.
    """

    number: int
    start: int
    stop: int
    keys: int

    @property
    def queries(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def before(self) -> int:
        """Tokens of earlier steps, or of a prefix that another request has left."""
        return self.keys - self.queries

    @property
    def phase(self) -> str:
        """As the transformers adapter tells them apart."""
        return "decode" if self.queries == 1 and self.before else "prefill"


@dataclass(frozen=True)
class Batch:
    """Prompts, chunks of prompts and decoded tokens of one step.

    Args:
        starts: where each request's queries begin, and where the last ends.
        lengths: tokens of each request so far, those of this step counted.
        table: pages of each request, integers [requests, n].
        memo: what layers share in this step.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    table: Tensor
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Request]:
        """The requests that have queries; padding has none."""
        spans = zip(self.starts, self.starts[1:], self.lengths, strict=False)
        for number, (start, stop, keys) in enumerate(spans):
            if stop > start:
                yield Request(number, start, stop, keys)


__all__ = ["Batch", "Request"]
