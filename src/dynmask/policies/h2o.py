"""H2O: keys that have received the most attention so far, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..masks import LifetimeMask
from .base import AnyModel, Layer, check_field

NO_KEY = torch.iinfo(torch.int64).min
"""Where a slot stands that holds no key."""


class Followed(NamedTuple):
    """What became of a call's keys: those that were held before it, then those of its rows.

    Attributes:
        death: int32 [b, g, past + n], as in ``LifetimeMask``, over these keys.
        held: int64 [b, g, k], which of them are left after the last row.
        received: float32 [b, g, k], the attention that these have received so far.
    """

    death: Tensor
    held: Tensor
    received: Tensor


@dataclass(frozen=True)
class H2O(AnyModel):
    """Heavy hitters (arXiv 2306.14048, section 4): evict what has received the least attention.

    Each key's received attention is summed over the rows so far, over the keys that are still
    there, per kv head (summed over the query heads of its group). Before a row comes the keys
    with the smallest sums go, except the newest, as many as must for ``width`` to hold it. In the
    paper that is one key for each row, and so it is here for a decoded token. Rows of a prompt
    are taken ``block`` at a time, counted from the first token of the sequence: before the first
    of them there is made room for all.

    The sums belong to the keys that are held, so whoever goes on with a sequence must have them:
    ``dynmask.HeavyHitterCache`` does. With it a prompt may be cut anywhere, and tokens are
    decoded by the same rule. Without it the policy serves prompts alone: decoded tokens read
    every key, and a call of several tokens that continues a sequence starts from its newest keys.

    Args:
        width: keys that a row reads at most, per kv head; what the cache holds.
        recent: share of what is held before a row that belongs to the newest keys.
        block: rows of a prompt between two evictions, at most half of the width.
    """

    width: int = 512
    recent: float = 0.5
    block: int = 64

    name: ClassVar[str] = "h2o"
    causal: ClassVar[bool] = False
    phase: ClassVar[Literal["both", "prefill"]] = "prefill"
    looks_ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_field(self.name, "width", self.width, self.width >= 2, ">= 2")
        check_field(self.name, "recent", self.recent, 0 <= self.recent <= 1, "in [0, 1]")
        check_field(self.name, "block", self.block, self.block >= 1, ">= 1")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The row at which each key is evicted, a block of rows at a time: O(N w)."""
        keys, queries = key.shape[2], query.shape[2]
        first = keys - queries
        past = min(first, self.width - self._rows(first, first + 1, False)[1])
        gone = first - past
        position = torch.arange(-past, 0, device=key.device).expand(*key.shape[:2], past)
        received = torch.zeros(position.shape, device=key.device)
        death = self.follow(query, key[:, :, gone:], position, received, first).death
        death = (death + gone).where(death < LifetimeMask.INF, LifetimeMask.INF)
        death = torch.nn.functional.pad(death, (gone, 0), value=0)
        return LifetimeMask(death, queries, most=min(self.width, keys))

    def follow(
        self,
        query: Tensor,
        key: Tensor,
        position: Tensor,
        received: Tensor,
        first: int,
        decoding: bool = False,
    ) -> Followed:
        """One step of the recurrence: which keys are evicted before which of some new rows.

        A prompt, a part of one and a decoded token are the same step.

        Args:
            query: [b, h, n, d], of the new rows.
            key: [b, g, past + n, d]: the keys that are held, in any order, then the new ones.
            position: int64 [b, g, past], where the held keys stand, the first new row being 0;
                ``NO_KEY`` for a slot without a key, which is the first to go.
            received: float32 [b, g, past], attention that they have received.
            first: position of the first new row in its sequence.
            decoding: the new rows are decoded tokens: each is a block of its own.
        """
        (batch, groups, past), n = position.shape, query.shape[2]
        device, dim = key.device, key.shape[3]
        new = torch.arange(n, device=device).expand(batch, groups, n)
        position = torch.cat([position, new], -1)
        held = torch.arange(past, device=device).expand(batch, groups, past)
        death = torch.full_like(position, LifetimeMask.INF, dtype=torch.int32)
        query = query.unflatten(1, (groups, -1))
        start = 0
        while start < n:
            stop, needed = self._rows(first + start, first + n, decoding)
            stop -= first
            room = self.width - needed
            if held.shape[-1] > room:
                where = position.gather(-1, held)
                recent = where >= start - int(self.recent * room)
                worth = received.masked_fill(recent, float("inf"))
                # nothing received is more than what no key has received
                order = worth.masked_fill(where == NO_KEY, -1.0).argsort(-1, descending=True)
                gone = held.gather(-1, order[..., room:])
                death.scatter_(-1, gone, past + start)
                held, received = (x.gather(-1, order[..., :room]) for x in (held, received))
            held = torch.cat([held, new[..., start:stop] + past], -1)
            near = key.gather(2, held[..., None].expand(-1, -1, -1, dim)).float()
            logits = query[:, :, :, start:stop].float() @ near.mT[:, :, None] * dim**-0.5
            where = position.gather(-1, held)[:, :, None]
            hidden = (where == NO_KEY) | (where > new[:, :, start:stop, None])
            weights = logits.masked_fill(hidden[:, :, None], float("-inf")).softmax(-1)
            received = torch.nn.functional.pad(received, (0, stop - start)) + weights.sum((2, 3))
            start = stop
        return Followed(death.masked_fill(position == NO_KEY, 0), held, received)

    def _rows(self, start: int, end: int, decoding: bool) -> tuple[int, int]:
        """Where the rows from ``start`` on that are taken at once stop, and room that they need.

        A part of a prompt may end within a block: there is room for the rest of it.
        """
        block = 1 if decoding else min(self.block, self.width // 2)
        needed = block - start % block
        return min(start + needed, end), needed
