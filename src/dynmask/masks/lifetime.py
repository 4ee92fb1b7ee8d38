"""LifetimeMask: one integer per key says until when it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.select import lifetimes_of_top_w
from ..plan import Plan, Tiles, compact, place
from .base import (
    Mask,
    check_index,
    check_limit,
    check_same_size,
    check_sizes,
    check_whole,
    repeat_heads,
)

CAUSAL_BLOCK = 128
"""Keys of an entry where a plain causal mask is lowered to key blocks."""

BACKWARD_TILE = 1024
"""Query rows of a tile for the kernel that holds keys."""


@dataclass(frozen=True, eq=False)
class LifetimeMask(Mask):
    """Key k is visible to query q exactly when ``k <= q < death[k]``.

    Whatever only ever evicts is a lifetime mask; a dead key is never read again, so its memory
    can be freed, and the mask of a prefix is the prefix of the mask.

    Args:
        death: int32 [b or 1, heads or 1, keys]; ``LifetimeMask.INF`` for keys that never die.
        queries: query rows, the last ones of the keys; all of them when None.
        plain: no key ever dies, known without looking at ``death``; set by the constructors that
            know it.
        most: keys that one query reads at most, where a constructor knows it; the fused lowering
            sizes its lists by it, and counts it when None.
    """

    death: Tensor
    queries: int = None  # type: ignore[assignment]
    plain: bool = False
    most: int | None = None

    INF: ClassVar[int] = 2**31 - 1

    def __post_init__(self) -> None:
        check_index("death", self.death, 3, "[b, heads, keys]")
        if self.queries is None:
            object.__setattr__(self, "queries", self.death.shape[-1])
        check_sizes(self.keys, self.queries)

    @classmethod
    def causal(
        cls, keys: int, queries: int | None = None, device: torch.device | str = "cpu"
    ) -> LifetimeMask:
        """Plain causal attention: nothing ever dies."""
        check_sizes(keys, keys if queries is None else queries)
        death = torch.full((1, 1, 1), cls.INF, dtype=torch.int32, device=device)
        queries = keys if queries is None else queries
        return cls(death.expand(1, 1, keys), queries, plain=True, most=keys)

    @classmethod
    def window(
        cls,
        keys: int,
        width: int,
        queries: int | None = None,
        device: torch.device | str = "cpu",
    ) -> LifetimeMask:
        """Sliding window: each query reads its own key and the ``width - 1`` before it."""
        return cls.streaming(keys, 0, width, queries, device=device)

    @classmethod
    def streaming(
        cls,
        keys: int,
        sinks: int,
        window: int,
        queries: int | None = None,
        first_key: int = 0,
        device: torch.device | str = "cpu",
    ) -> LifetimeMask:
        """StreamingLLM (arXiv 2309.17453): the first ``sinks`` keys and a window.

        Args:
            keys: keys in the tensor.
            sinks: keys at the start of the sequence that never die, 0 or more.
            window: newest keys that a query reads, its own counted, 1 or more.
            queries: query rows; all keys when None.
            first_key: position of the tensor's first key in its sequence (trimmed caches).
            device: where the mask lives.
        """
        check_sizes(keys, keys if queries is None else queries)
        check_whole("sinks", sinks, 0)
        window = min(check_whole("window", window, 1), cls.INF)
        k = torch.arange(keys, device=device)
        death = (k + window).clamp(max=cls.INF).to(torch.int32)
        sinks = max(sinks - first_key, 0)
        death[:sinks] = cls.INF
        most = min(sinks + window, keys)
        queries = keys if queries is None else queries
        return cls(death.view(1, 1, keys), queries, plain=most == keys, most=most)

    @classmethod
    def top_w(
        cls,
        scores: Tensor,
        width: int,
        queries: int | None = None,
        check: bool | None = None,
    ) -> LifetimeMask:
        """Exact running top-w (Dynamic Mask Attention, arXiv 2508.02124, section 3).

        Query q reads the ``width`` highest-scoring keys among ``k <= q``; on a tie the later key
        wins. A key that has left the top w never returns, so this is a lifetime mask.

        Args:
            scores: floating [b, heads, keys], one score per key and kv head.
            width: keys that a query reads, 1 or more.
            queries: query rows; all keys when None.
            check: look for NaN scores. None looks where that costs nothing: on a GPU it would
                wait for the device, and there NaN counts as -inf.

        Raises:
            ValueError: scores of another rank or type, NaN scores, or a width below 1.
        """
        _check_scores(scores)
        check_whole("width", width, 1)
        width = min(width, scores.shape[-1])
        fused = ops.fused(scores.device)
        if not fused if check is None else check:
            _check_no_nan(scores)
        queries = scores.shape[-1] if queries is None else queries
        if width == scores.shape[-1]:  # nothing is ever outranked by so many
            return cls._never(scores, queries)
        return cls(_select(scores, width), queries, most=width)

    @classmethod
    def retained(
        cls,
        scores: Tensor,
        width: int | Sequence[int],
        window: int = 0,
        sinks: int = 0,
        queries: int | None = None,
        check: bool | None = None,
    ) -> LifetimeMask:
        """Running top-w with keys that are always read: sinks and a window, counted in the width.

        Query q reads the first ``sinks`` keys, its ``window`` newest (its own counted) and, of
        the rest, the ``width - sinks - window`` that score highest; on a tie the later key wins.
        A key enters the contest when it leaves the window, so the contest of query q is the
        running top-w of the prefix that ends at ``q - window``: a lifetime mask again. Without
        sinks and window it is :meth:`top_w`, with no room for a rest :meth:`streaming`.

        Args:
            scores: floating [b, heads, keys], one score per key and kv head.
            width: keys that a query reads at most, 1 or more; a sequence gives each head its own.
            window: newest keys that are always read, 0 or more.
            sinks: first keys that are always read, 0 or more.
            queries: query rows; all keys when None.
            check: look for NaN scores, as in :meth:`top_w`.

        Raises:
            ValueError: scores of another rank or type, NaN scores, as many widths as there are
                no heads, or a width below 1 or below ``sinks + window``.
        """
        _check_scores(scores)
        heads, keys = scores.shape[1:]
        widths = [width] * heads if isinstance(width, int) else list(width)
        if len(widths) != heads:
            raise ValueError(
                f"width: expected one number, or one for each of {heads} heads, received "
                f"{len(widths)}; scores are [b, heads, keys]"
            )
        check_retention(widths, window, sinks)
        if not ops.fused(scores.device) if check is None else check:
            _check_no_nan(scores)
        queries = keys if queries is None else queries
        if min(widths) >= keys:
            return cls._never(scores, queries)
        rest = scores[..., sinks:]
        death = torch.full(scores.shape, cls.INF, dtype=torch.int32, device=scores.device)
        for one in sorted(set(widths)):  # heads of one width are selected together
            own = [i for i, w in enumerate(widths) if w == one]
            if one >= keys:
                continue
            if one == sinks + window:  # nothing is kept once it has left the window
                k = torch.arange(keys - sinks, dtype=torch.int32, device=scores.device)
                ends = k.expand(len(scores), len(own), -1)
            else:
                ends = _select(rest if len(own) == heads else rest[:, own], one - sinks - window)
            later = (ends + (sinks + window)).where(ends < cls.INF, cls.INF)
            if len(own) == heads:
                death[..., sinks:] = later
            else:
                death[:, own, sinks:] = later
        return cls(death, queries, most=min(max(widths), keys))

    @classmethod
    def _never(cls, scores: Tensor, queries: int) -> LifetimeMask:
        """No key of ``scores`` ever dies."""
        death = torch.full((1, 1, 1), cls.INF, dtype=torch.int32, device=scores.device)
        return cls(death.expand(scores.shape), queries, plain=True, most=scores.shape[-1])

    @property
    def keys(self) -> int:  # type: ignore[override]
        """Keys in the tensor."""
        return self.death.shape[-1]

    @property
    def batch(self) -> int:
        """Batch rows with lifetimes of their own."""
        return self.death.shape[0]

    @property
    def heads(self) -> int:
        """Heads with lifetimes of their own."""
        return self.death.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of ``death``."""
        return self.death.device

    @property
    def is_causal(self) -> bool:
        """Whether no key ever dies, as far as is known without looking at ``death``."""
        return self.plain

    def expand(self, batch: int) -> LifetimeMask:
        """The same mask for ``batch`` batch rows."""
        death = self.death.expand(batch, -1, -1)
        return LifetimeMask(death, self.queries, self.plain, self.most)

    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """bool [b, heads, rows, keys], straight from the definition."""
        q = self._positions(self._range(rows))
        k = torch.arange(self.keys, device=self.device)
        return (k <= q) & (q < self.death[:, :, None, :])

    def density(self) -> Tensor:
        """Kept pairs over causal pairs: float32 [b, heads]."""
        k = torch.arange(self.keys, device=self.device)
        rows = self.death.clamp(max=self.keys).long() - k.clamp(min=self.offset)
        return rows.clamp(min=0).sum(-1) / self.causal_pairs()

    def __or__(self, other: Mask) -> Mask:
        """Union: with another lifetime mask, the later death of each key."""
        if not isinstance(other, LifetimeMask):
            return super().__or__(other)
        most = None
        if self.most is not None and other.most is not None:
            most = min(self.most + other.most, self.keys)
        return self._combine(other, torch.maximum, self.plain or other.plain, most)

    def __and__(self, other: LifetimeMask) -> LifetimeMask:
        """Intersection: the earlier death of each key."""
        check_limit(other)
        most = min((m for m in (self.most, other.most) if m is not None), default=None)
        return self._combine(other, torch.minimum, self.plain and other.plain, most)

    def _combine(
        self,
        other: LifetimeMask,
        choose: Callable[[Tensor, Tensor], Tensor],
        plain: bool,
        most: int | None,
    ) -> LifetimeMask:
        check_same_size(self, other)
        heads = max(self.heads, other.heads)
        death = choose(repeat_heads(self.death, heads), repeat_heads(other.death, heads))
        return LifetimeMask(death, self.queries, plain, most)

    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Key lists per tile: keys that live through the tile first, then those born or dying."""
        if tiles.fused and (tiles.regular or self.plain):
            return self._lower_fused(tiles)
        alive = self._alive(tiles.first, tiles.stop)  # [b, heads, n], padded with `keys`
        t = len(tiles) // self.batch
        death = self.death.gather(-1, alive.clamp(max=self.keys - 1))[:, :, None]
        alive = alive[:, :, None]
        first = tiles.position[:t, None].long()
        stop = first + tiles.rows[:t, None]
        some = (alive < stop) & (death > first) & (death > alive)
        full = some & (alive <= first) & (death >= stop)
        slot, fulls, count = compact(full, some & ~full)
        cap = int(count.max())
        index = place(alive.int(), slot, cap, 0)

        def flat(x: Tensor) -> Tensor:  # [b, heads, t, ...] -> [heads, b * t, ...]
            return x.transpose(0, 1).flatten(1, 2).contiguous()

        return tiles.plan(
            index=flat(index),
            full=flat(fulls),
            count=flat(count),
            shape=(self.batch, self.queries, self.keys),
            death=None if self.plain else self.death,
        )

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """Half as many rows where two heads can be stacked: a smaller boundary for each."""
        return 64 if fused and members > 1 and not self.plain else 128

    def backward_tile(self, members: int = 1) -> int:
        """As many rows as pay for the keys that only some of them see."""
        return BACKWARD_TILE

    def list_words(self, tile: int) -> int:
        """Integers in the list of one tile at most."""
        if self.plain:
            return -(-self.keys // CAUSAL_BLOCK)
        return min(self._most() + tile, self.keys)

    def _lower_fused(self, tiles: Tiles) -> Plan:
        """The same by the fused kernels; plain causal masks as runs of key blocks."""
        if self.plain:
            block = CAUSAL_BLOCK
            starts = torch.arange(0, tiles.stop, block, dtype=torch.int32, device=self.device)
            index = starts.expand(self.heads, len(tiles), -1).contiguous()
            full = ((tiles.position + 1) // block).expand(self.heads, -1).contiguous()
            count = -(-(tiles.position + tiles.rows) // block)
            count = count.expand(self.heads, -1).contiguous()
            block, death, even = CAUSAL_BLOCK, None, True
        else:
            index, full, count = ops.alive_lists(
                self.death, tiles.first, tiles.stop, tiles.size, self._most()
            )
            block, death, even = 1, self.death, self.most is not None
        return tiles.plan(
            index=index,
            full=full,
            count=count,
            shape=(self.batch, self.queries, self.keys),
            block=block,
            death=death,
            even=even,
        )

    def _most(self) -> int:
        """Keys that one query reads at most; counted, which waits for the device, if not known."""
        if self.most is not None:
            return self.most
        n = self.keys
        k = torch.arange(n, device=self.device)
        ends = self.death.long().clamp(max=n).maximum(k)  # a key that dies at once counts for none
        change = torch.ones(*self.death.shape[:2], n + 1, dtype=torch.int64, device=self.device)
        change.scatter_add_(-1, ends, -torch.ones_like(ends))
        return int(change[..., :n].cumsum(-1).max())

    def _alive(self, first: int, stop: int) -> Tensor:
        """Keys that a query of [first, stop) reads: int64 [b, heads, n], padded with ``keys``."""
        k = torch.arange(stop, device=self.device)
        death = self.death[..., :stop]
        seen = (death > k) & (death > first)
        slot, _, count = compact(seen)
        return place(k, slot, int(count.max()), self.keys)


def check_retention(widths: Sequence[int], window: int, sinks: int) -> None:
    """Raise ValueError unless sinks and window fit into every width."""
    check_whole("window", window, 0)
    check_whole("sinks", sinks, 0)
    for width in widths:
        if check_whole("width", width, 1) < window + sinks:
            raise ValueError(
                f"width: expected room for {sinks} sinks and a window of {window}, which count "
                f"in it, received {width}; pass at least {window + sinks}"
            )


def _select(scores: Tensor, width: int) -> Tensor:
    """Lifetimes under the running top w, by the fused kernel where there is one."""
    select = ops.lifetimes if ops.fused(scores.device) else lifetimes_of_top_w
    return select(scores.float().contiguous(), width)


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor) or scores.dim() != 3 or not scores.is_floating_point():
        raise ValueError(
            "scores: expected a floating tensor [b, heads, keys], received "
            f"{getattr(scores, 'dtype', type(scores).__name__)} "
            f"{tuple(getattr(scores, 'shape', ()))}; give one score per key and kv head"
        )


def _check_no_nan(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        where = scores.isnan().nonzero()[0].tolist()
        raise ValueError(
            f"scores: expected numbers, received NaN, first at [b, head, key] = {where}; "
            "look for an overflow where the scores are computed"
        )
