"""The bounded cache: per layer, batch row and kv head only the keys that are still read.

A lifetime mask only ever evicts, so a dead key's slot is free for good. What is kept of ``n``
tokens is ``min(n, width)`` keys per head, whatever ``n`` is, and attention over them is exact:
token by token, in chunks and in one forward the same keys are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import attention
from .masks import LifetimeMask, Span
from .slots import EMPTY, Slots

INFINITY = float("inf")


class Live(NamedTuple):
    """What the queries of one call read.

    Attributes:
        key: [b, g, k, d]; the queries are the last ones of these k positions.
        value: [b, g, k, dv].
        scores: float32 [b, g, k] (float64 where they came so); what a bias is made of.
        mask: the lifetimes among these keys.
        positions: int32 [b, g, k], position of each key in its sequence; -1 for an empty slot.
    """

    key: Tensor
    value: Tensor
    scores: Tensor
    mask: LifetimeMask
    positions: Tensor


class KeyStore(Slots):
    """One layer's live keys: Dynamic Mask Attention (arXiv 2508.02124, section 3) in O(width).

    The store starts with 64 slots per row and head, or the width where that is less; slots
    double as keys come, up to the largest width. Once they are full a decoded token changes no
    shape and reads nothing back from the device: its key takes the slot of the key that dies
    with it, so that every slot is live and the attention over them needs no mask.

    Rows of a batch may have seen different numbers of tokens; padding never enters a slot. How
    many keys a row holds follows from the number of its tokens alone, which the host knows.
    Keys and values are stored without their gradients.

    Args:
        retention: what a query reads; widths may differ between kv heads.
        limit: a sliding window on top, its own key counted, or None. A key that is older keeps
            its place in the ranking, so that the mask is the intersection of the two.
    """

    _mask: LifetimeMask | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        spans: Sequence[Span] | None = None,
        *,
        bias: Callable[[Tensor], Tensor | None] | None = None,
        scale: float | None = None,
        impl: str = "auto",
        compute: Callable[[Tensor, Live, int], Tensor] | None = None,
    ) -> Tensor:
        """Attention of new tokens over the live keys and themselves; then only live keys stay.

        Args:
            query: [b, h, n, d].
            key: [b, g, n, d], of the new tokens.
            value: [b, g, n, dv].
            scores: [b, g, n], of the new keys; see :meth:`Retention.compared`.
            spans: the new tokens of each batch row, one unbroken run at most; the others are
                padding and give 0. All tokens when None.
            bias: from scores [b, g, k] to the bias of :func:`dynmask.attention`, or to None.
            scale: as in :func:`dynmask.attention`.
            impl: as in :func:`dynmask.attention`.
            compute: in place of :func:`dynmask.attention`: from the queries of some rows, what
                they read, and the number of tokens before the first of them.

        Returns:
            [b, h, n, dv].

        Raises:
            ValueError: tensors that do not fit each other or the store, or two spans in a row;
                the store is as it was then.
        """
        batch, _, n, _ = query.shape
        _check(key, value, scores, batch, n)
        if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
            raise ValueError(
                f"query: expected [{batch}, a multiple of {key.shape[1]} heads, {n}, "
                f"{key.shape[3]}] like key {tuple(key.shape)}, received {tuple(query.shape)}"
            )

        def attended(q: Tensor, live: Live, first: int) -> Tensor:
            if compute is not None:
                return compute(q, live, first)
            added = None if bias is None else bias(live.scores)
            return attention(q, live.key, live.value, live.mask, added, scale, impl=impl)

        runs = runs_of(spans, batch, n)
        if not runs:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        whole = len(runs) == batch and set(runs.values()) == {(0, n)}
        real = [scores] if whole else [scores[row, :, slice(*run)] for row, run in runs.items()]
        for some in real:  # all of them before the first is stored
            _refuse_nan(some)
        self._start(batch, key, value, scores)
        if whole and (n == 1 or len(set(self.seen)) == 1):
            first = max(self.seen)
            return attended(query, self._add(key, value, scores, None), first)
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, run in runs.items():
            groups.setdefault((self.seen[row], *run), []).append(row)
        for (first, start, stop), rows in groups.items():
            at = torch.tensor(rows, device=query.device)
            k, v, s = (x[at, :, start:stop] for x in (key, value, scores))
            live = self._add(k, v, s, rows)
            part = attended(query[at, :, start:stop], live, first)
            out[at, :, start:stop] = part.to(out.dtype)
        return out

    def extend(
        self, key: Tensor, value: Tensor, scores: Tensor, rows: Sequence[int] | None = None
    ) -> Live:
        """Add new keys; returns what their queries read.

        Args:
            key: [b, g, n, d], of the given rows.
            value: [b, g, n, dv].
            scores: [b, g, n].
            rows: batch rows of the store, with equally many tokens so far; all when None.

        Raises:
            ValueError: tensors that do not fit the store, or rows that have seen different
                numbers of tokens where ``n`` is more than 1 or ``rows`` are given.
        """
        _check(key, value, scores, key.shape[0] if rows is None else len(rows), key.shape[2])
        _refuse_nan(scores)
        if rows is None:
            self._start(key.shape[0], key, value, scores)
        return self._add(key, value, scores, rows)

    def _add(self, key: Tensor, value: Tensor, scores: Tensor, rows: Sequence[int] | None) -> Live:
        """What :meth:`extend` does with tensors that fit."""
        scores = scores.detach().to(self.scores.dtype)
        if scores.device.type != "cpu":  # there it was refused
            scores = scores.nan_to_num(-INFINITY, INFINITY, -INFINITY)
        if rows is None and key.shape[2] == 1:
            with torch.no_grad():
                return self._decode(key, value, scores)
        numbers = {self.seen[row] for row in (range(self.batch) if rows is None else rows)}
        if len(numbers) != 1:
            raise ValueError(
                f"rows: expected rows that have seen equally many tokens, received {numbers}; "
                "use attend(), or extend() for each group of rows"
            )
        return self._chunk(key, value, scores, rows, numbers.pop())

    def _chunk(
        self, key: Tensor, value: Tensor, scores: Tensor, rows: Sequence[int] | None, seen: int
    ) -> Live:
        """Live keys in the order of their positions, then the new ones."""
        n, widths = key.shape[2], self._widths(key.shape[1])
        past = min(seen, max(widths))
        new = torch.arange(seen, seen + n, dtype=torch.int32, device=key.device)
        positions = new.expand(*key.shape[:2], n)
        if past:
            key, value, scores, positions = self._joined(
                key, value, scores, positions, rows, past, min(seen, self.retention.sinks)
            )
        ranked = scores
        if any(min(seen, w) < past for w in widths):
            # a full head outranks what is no key: such slots are dead at once
            ranked = scores.masked_fill(positions < 0, float("-inf"))
        mask = self.retention.mask(ranked, n)
        death = mask.death.expand(positions.shape)
        with torch.no_grad():
            self._keep(key, value, scores, positions, death, rows, seen + n)
        if self.limit is not None and seen + n > self.limit:
            # positions and indices of new keys differ by a constant
            last = (positions.long() + self.limit + past - seen).clamp(0, LifetimeMask.INF)
            mask = LifetimeMask(torch.minimum(death, last.int()), n, most=mask.most)
        return Live(key, value, scores, mask, positions)

    def _joined(
        self,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        positions: Tensor,
        rows: Sequence[int] | None,
        past: int,
        sinks: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ``past`` live keys of each head, sorted, with the new ones behind.

        A head that holds fewer has empty slots right behind its sinks: older than all that are
        ranked, they outrank nothing.
        """
        k, v, p, s = (
            x if rows is None else x[torch.tensor(rows, device=x.device)]
            for x in (self.keys, self.values, self.positions, self.scores)
        )
        place = (2 * p.long() + 1).masked_fill(p < 0, 2 * sinks)
        order = place.argsort(-1)
        spare = self.slots - past
        order = torch.cat([order[..., :sinks], order[..., sinks + spare :]], -1)
        return (
            torch.cat([gather_keys(k, order), key], 2),
            torch.cat([gather_keys(v, order), value], 2),
            torch.cat([s.gather(-1, order), scores], -1),
            torch.cat([p.gather(-1, order), positions], -1),
        )

    def _keep(
        self,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        positions: Tensor,
        death: Tensor,
        rows: Sequence[int] | None,
        seen: int,
    ) -> None:
        """Store what outlives the last query, in the order of positions."""
        widths = self._widths(key.shape[1])
        count = min(seen, max(widths))
        self._reserve(count)
        if count < key.shape[2] or min(widths) < count:
            order = (death < key.shape[2]).byte().argsort(stable=True, dim=-1)[..., :count]
            key, value = gather_keys(key, order), gather_keys(value, order)
            scores, positions = scores.gather(-1, order), positions.gather(-1, order)
        if min(widths) < count:
            held = torch.tensor(widths, device=key.device)[:, None]
            empty = torch.arange(count, device=key.device) >= held
            positions = positions.masked_fill(empty, EMPTY)
            scores = scores.masked_fill(empty, 0)
        at = slice(None) if rows is None else torch.tensor(rows, device=key.device)
        self.keys[at, :, :count] = key
        self.values[at, :, :count] = value
        self.scores[at, :, :count] = scores
        self.positions[at, :, :count] = positions
        self._tensors["next"][at] = seen
        for row in range(self.batch) if rows is None else rows:
            self.seen[row] = seen

    def _decode(self, key: Tensor, value: Tensor, scores: Tensor) -> Live:
        """One token of every row: fixed shapes once the slots are full, no host synchronisation."""
        widths = self._widths(key.shape[1])
        self._reserve(min(max(self.seen) + 1, max(widths)))
        own = self._tensors["next"][:, None, None]  # position of the new key
        own_key = own.expand(-1, key.shape[1], 1)
        if max(self.seen) >= min(widths):
            slot, key, value, scores, own_key = self._replace(widths, own_key, key, value, scores)
        else:
            slot = own_key.long()
        self.keys.scatter_(2, slot[..., None].expand_as(key), key)
        self.values.scatter_(2, slot[..., None].expand_as(value), value)
        self.scores.scatter_(2, slot, scores)
        self.positions.scatter_(2, slot, own_key)
        self._tensors["next"].add_(1)
        self.seen = [s + 1 for s in self.seen]
        return self._read(widths)

    def _replace(
        self, widths: list[int], own_key: Tensor, key: Tensor, value: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In full heads the new key's slot is that of the key that dies: worst, then oldest."""
        ranked, pool = self.retention.compared(self.scores), self._pool(widths, own_key)
        inside = ranked if pool is None else torch.where(pool, ranked, INFINITY)
        worst = inside.amin(-1, keepdim=True)
        tied = ranked == worst
        if pool is not None:
            tied &= pool
        slot = torch.where(tied, self.positions, LifetimeMask.INF).argmin(-1, keepdim=True)
        full = None
        if min(self.seen) < max(widths):  # some head of some row has room
            full = own_key >= self._tensors["width"][:, None]
            slot = torch.where(full, slot, own_key.long().clamp(max=self.slots - 1))
        if self.retention.window == 0:  # the new key itself may be outranked by all
            stays = worst > self.retention.compared(scores)
            if pool is not None:
                stays |= ~pool.any(-1, keepdim=True)
            if full is not None:
                stays &= full
            key = torch.where(stays[..., None], gather_keys(self.keys, slot), key)
            value = torch.where(stays[..., None], gather_keys(self.values, slot), value)
            scores = torch.where(stays, self.scores.gather(-1, slot), scores)
            own_key = torch.where(stays, self.positions.gather(-1, slot), own_key)
        return slot, key, value, scores, own_key

    def _pool(self, widths: list[int], own_key: Tensor) -> Tensor | None:
        """Slots of keys that may die, bool [b, g, slots]; None for all."""
        retention, pool = self.retention, None
        if retention.sinks or min(min(self.seen), min(widths)) < self.slots:  # or empty ones
            pool = self.positions >= retention.sinks
        if retention.window > 1:  # its first key is the new one
            aged = self.positions <= own_key - retention.window
            pool = aged if pool is None else pool & aged
        return pool

    def _read(self, widths: list[int]) -> Live:
        """All live keys, for one query in each row."""
        count = min(max(self.seen), self.slots)
        same = min(min(self.seen), min(widths)) >= count
        k, v, s, p = (
            x[:, :, :count] for x in (self.keys, self.values, self.scores, self.positions)
        )
        near = self.limit is None or max(self.seen) <= self.limit
        if same and near:
            return Live(k, v, s, self._all_of(count), p)
        visible = p >= 0
        if self.limit is not None:
            visible &= p > self._tensors["next"][:, None, None] - 1 - self.limit
        death = torch.where(visible, LifetimeMask.INF, 0).to(torch.int32)
        return Live(k, v, s, LifetimeMask(death, 1, most=count), p)

    def _all_of(self, count: int) -> LifetimeMask:
        """The mask of one query that reads ``count`` keys; the same one while they stay so many."""
        mask, device = self._mask, self.keys.device
        if mask is None or mask.keys != count or mask.death.device != device:
            with torch.inference_mode(False):  # later calls may keep it for their gradients
                self._mask = mask = LifetimeMask.causal(count, 1, device=device)
        return mask

    def replayed(self, steps: int = 1) -> None:
        """Tell the host of decoding steps that a captured CUDA graph repeated.

        The tensors count by themselves; capture once every row has seen ``width`` tokens.
        """
        if min(self.seen, default=0) <= max(self._widths(self.keys.shape[1])):
            raise ValueError(
                "replayed: expected a store whose slots were full when the graph was captured, "
                f"received one that has seen {min(self.seen, default=0)} tokens; decode until "
                "more than width tokens have passed, then capture"
            )
        self.seen = [s + steps for s in self.seen]


def gather_keys(x: Tensor, order: Tensor) -> Tensor:
    """x [b, g, k, d] at order [b, g, n] of dimension 2."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))


def runs_of(spans: Sequence[Span] | None, batch: int, n: int) -> dict[int, tuple[int, int]]:
    """Each batch row's new tokens; rows without any are left out."""
    if spans is None:
        return {row: (0, n) for row in range(batch)}
    runs: dict[int, tuple[int, int]] = {}
    for span in spans:
        if span.batch in runs:
            raise ValueError(
                f"spans: expected one sequence a batch row, received two in row {span.batch}; "
                "packed sequences have no cache: give each a row of its own"
            )
        runs[span.batch] = span.query_start, span.query_stop
    return runs


def _refuse_nan(scores: Tensor) -> None:
    """Raise ValueError for NaN where looking costs nothing; on a GPU it counts as -inf."""
    if scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise ValueError(
            "scores: expected numbers, received NaN; look for an overflow where they are computed"
        )


def _check(key: Tensor, value: Tensor, scores: Tensor, batch: int, n: int) -> None:
    """Raise ValueError unless new keys, values and scores are about the same tokens."""
    size = (batch, key.shape[1], n)
    if key.shape[:3] != size or value.shape[:3] != size or scores.shape != size:
        raise ValueError(
            f"key, value, scores: expected [{batch}, kv heads, {n}, ...] each, received "
            f"{tuple(key.shape)}, {tuple(value.shape)}, {tuple(scores.shape)}; give the new "
            "tokens alone"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores: expected a floating dtype, received {scores.dtype}")


__all__ = ["KeyStore", "Live", "gather_keys", "runs_of"]
