"""Caches of a policy with a mask for every head: some kv heads drop keys, others keep all.

A kv head drops what none of its query heads will read again: it keeps the first keys (sinks),
keys that were chosen (columns), and a ring of the newest. How much that is differs from head to
head, so the heads of a layer lie one behind the other in one tensor, each as long as it must be.
When a key dies is known for each query head alone: heads of a group share memory, not masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import LifetimeMask
from .plan import Plan, compact, place
from .pooled_keys import PooledKeys
from .slots import EMPTY, FEWEST_SLOTS, Rows

INF = LifetimeMask.INF


class Part(NamedTuple):
    """What some kv heads of some batch rows have read in a call, and until when each key is read.

    Attributes:
        rows: batch rows, with equally many tokens so far.
        heads: kv heads, numbered as in the store.
        positions: int64, [r, g, k] or smaller where rows or heads are alike; rising. The first
            ``sinks`` and the newest window of each head are among them without a gap.
        key: [r, g, k, d].
        value: [r, g, k, dv].
        death: int32 [r, g, members, k], position of the first query that no longer reads the key.
        seen: tokens of each of these rows so far, those of this call counted.
    """

    rows: Sequence[int]
    heads: Sequence[int]
    positions: Tensor
    key: Tensor
    value: Tensor
    death: Tensor
    seen: int


class RaggedStore(Rows):
    """The kv heads of a layer that drop keys: sinks, columns and a ring of the newest of each.

    Tensors are [b, slots, d], the slots of one kv head behind those of another. A new token's key
    takes the ring slot of the key that leaves the widest window of its group. Columns are given
    by :meth:`fill` and stay until the next one. A ring begins with 64 slots, or its window where
    that is less, and doubles as tokens come. Keys and values are stored without their gradients.

    Args:
        windows: for each kv head the newest keys that its query heads read, own key counted.
        sinks: first keys that are always read.
    """

    shared = ("windows", "layout")

    def __init__(self, windows: Sequence[Sequence[int]], sinks: int) -> None:
        self.windows = windows
        self.sinks = sinks
        self._rings = [max(own) for own in windows]
        super().__init__()

    def reset(self) -> None:
        """Forget every key, the batch size too."""
        super().reset()
        self._columns = [0] * len(self.windows)
        self._sizes = [0] * len(self.windows)  # of the rings, for now

    @property
    def size(self) -> tuple[int, int]:
        """Batch rows and kv heads."""
        return self.batch, len(self.windows)

    @property
    def positions(self) -> Tensor:
        """int32 [b, slots], position of each key in its sequence; -1 in empty slots."""
        return self._tensors["positions"]

    @property
    def slots(self) -> list[int]:
        """Slots of each kv head."""
        pairs = zip(self._columns, self._sizes, strict=True)
        return [self.sinks + columns + ring for columns, ring in pairs]

    # a call of many tokens

    def fill(self, batch: int, parts: Sequence[Part]) -> None:
        """Keep what is still read of the parts, in place of all that was kept before.

        Waits for the device once: how many columns there are decides how much memory is taken.
        """
        with torch.no_grad():
            lasting = [self._lasting(part) for part in parts]
            counts = torch.cat([x.sum(-1).amax(0) for x in lasting]).tolist()
            self._columns = [0] * len(self.windows)
            for head, count in zip((h for p in parts for h in p.heads), counts, strict=True):
                self._columns[head] = max(self._columns[head], count)
            self.seen = [0] * batch
            for part in parts:
                for row in part.rows:
                    self.seen[row] = part.seen
            self._sizes = self._rings_for(max(self.seen))
            self._allocate(batch, parts[0])
            for part, own in zip(parts, lasting, strict=True):
                self._store(part, own)

    def _lasting(self, part: Part) -> Tensor:
        """Which keys outlive their place in the ring: bool [r, g, k]."""
        ring = part.positions.new_tensor([self._rings[head] for head in part.heads])
        ends = (part.positions + ring[:, None]).clamp(min=part.seen)
        return (part.death.amax(2) > ends) & (part.positions >= self.sinks)

    def _allocate(self, batch: int, like: Part) -> None:
        """Empty slots."""
        total, device = sum(self.slots), like.key.device
        members = like.death.shape[2]
        with torch.inference_mode(False):  # slots are written again, maybe outside of it
            whole = {"dtype": torch.int32, "device": device}
            self._tensors = {
                "keys": like.key.new_zeros(batch, total, like.key.shape[3], requires_grad=False),
                "values": like.value.new_zeros(
                    batch, total, like.value.shape[3], requires_grad=False
                ),
                "death": torch.zeros(batch, members, total, **whole),
                "positions": torch.full((batch, total), EMPTY, **whole),
                "next": torch.tensor(self.seen, **whole),
                "windows": torch.tensor(self.windows, device=device),
                "layout": self._layout(device),
            }

    def _layout(self, device: torch.device) -> Tensor:
        """First slot, slots, first ring slot and window of each kv head: int64 [4, g]."""
        ends = list(accumulate(self.slots))
        starts = [end - slots for end, slots in zip(ends, self.slots, strict=True)]
        rings = [end - ring for end, ring in zip(ends, self._sizes, strict=True)]
        return torch.tensor([starts, self.slots, rings, self._rings], device=device)

    def _store(self, part: Part, lasting: Tensor) -> None:
        """Write the sinks, columns and ring of a part's heads to their slots."""
        device, keys = part.key.device, part.key.shape[2]
        rows = torch.tensor(part.rows, device=device)[:, None]
        index, heads, slots = [], [], []
        most = max(self._columns[head] for head in part.heads)
        every = torch.arange(keys, device=device)
        where, _, _ = compact(lasting, cap=most)
        columns = place(every, where, most, keys)  # `keys` where there is none
        starts = self._layout(torch.device("cpu"))[0].tolist()
        for number, head in enumerate(part.heads):
            ring = self._ring(self._rings[head], self._sizes[head], part.seen, keys, device)
            own = lasting[:, number]
            held = ring.expand(len(own), -1)
            twice = own.gather(-1, held.clamp(max=keys - 1)) & (held < keys)
            sinks = torch.arange(self.sinks, device=device).clamp(max=keys)
            index += [
                sinks.expand(len(own), -1),
                columns[:, number, : self._columns[head]],
                held.masked_fill(twice, keys),
            ]
            count = self.slots[head]
            heads.append(torch.full((count,), number, device=device))
            slots.append(torch.arange(starts[head], starts[head] + count, device=device))
        self._copy(part, rows, torch.cat(heads), torch.cat(index, -1), torch.cat(slots))

    def _ring(self, window: int, size: int, seen: int, keys: int, device: torch.device) -> Tensor:
        """Index of the key in each slot of a ring, ``keys`` where there is none: int64 [size].

        Position p is in slot ``p % window``.
        """
        slot = torch.arange(size, device=device)
        position = seen - 1 - (seen - 1 - slot) % window
        none = position < self.sinks
        return (position + keys - seen).masked_fill(none, keys)

    def _copy(self, part: Part, rows: Tensor, heads: Tensor, index: Tensor, slots: Tensor) -> None:
        """Copy keys ``index`` [r, n] of ``heads`` [n] to ``slots`` [n]; nothing where it is k."""
        keys = part.key.shape[2]
        none = index >= keys
        index = index.clamp(max=keys - 1)
        row = torch.arange(len(part.rows), device=rows.device)[:, None]
        wide = part.positions.expand(part.key.shape[:3])
        self.keys[rows, slots] = part.key[row, heads, index]
        self.values[rows, slots] = part.value[row, heads, index]
        positions = wide[row, heads, index].masked_fill(none, EMPTY)
        self.positions[rows, slots] = positions.int()
        death = part.death[row, heads, :, index].masked_fill(none[..., None], 0)
        self._tensors["death"][rows, :, slots] = death

    def live(self) -> tuple[Tensor, list[list[int]]]:
        """The slots that are still read, those of a head behind another's, by position.

        Returns:
            int64 [b, slots], those first, and how many there are of each row and head; one wait
            for the device.
        """
        positions, after = self.positions, self._tensors["next"][:, None]
        alive = (self._tensors["death"].amax(1) > after) & (positions >= 0) & (positions < after)
        head = torch.arange(len(self.windows), device=positions.device)
        head = head.repeat_interleave(self._tensors["layout"][1], output_size=sum(self.slots))
        order = (head * 2**32 + positions).masked_fill(~alive, 2**62).argsort(-1)
        counts = torch.zeros(self.batch, len(self.windows), dtype=torch.int64, device=head.device)
        counts.index_add_(1, head, alive.long())
        return order, counts.tolist()

    # a decoded token

    def add(self, key: Tensor, value: Tensor, active: Sequence[int]) -> None:
        """Keep one more token; the key that leaves the ring makes room for it.

        Args:
            key: [b, g, 1, d].
            value: [b, g, 1, dv].
            active: batch rows that have a token; what the others hold is padding.
        """
        with torch.no_grad():
            for row in active:
                self.seen[row] += 1
            self._reserve(max(self.seen))
            after, layout = self._tensors["next"][:, None], self._tensors["layout"]
            slot = layout[2] + after % layout[3]
            first = after < self.sinks if min(self.seen) <= self.sinks else None
            if first is not None:
                slot = torch.where(first, layout[0] + after, slot)
            self.keys.scatter_(1, slot[..., None].expand(-1, -1, key.shape[3]), key[:, :, 0])
            self.values.scatter_(1, slot[..., None].expand(-1, -1, value.shape[3]), value[:, :, 0])
            death = (after[..., None] + self._tensors["windows"]).clamp(max=INF)
            if first is not None:
                death = death.masked_fill(first[..., None], INF)
            death = death.int().transpose(1, 2)
            self._tensors["death"].scatter_(2, slot[:, None].expand_as(death), death)
            self.positions.scatter_(1, slot, after.expand_as(slot).contiguous())
            step(self._tensors["next"], active)

    def read(self) -> tuple[Tensor, Tensor, Plan]:
        """What the query of each row's newest token reads: keys [b, 1, slots, d], values, a plan.

        The plan has a list for each query head of these kv heads.
        """
        layout, death = self._tensors["layout"], self._tensors["death"]
        batch, members, total = death.shape
        longest = max(self.slots)
        slot = torch.arange(longest, device=death.device)
        index = (layout[0][:, None] + slot).clamp(max=total - 1)  # [g, longest]
        own = (self._tensors["next"] - 1)[:, None, None, None]
        seen = (death[:, :, index] > own) & (slot < layout[1][:, None])
        if not min(self.seen):
            seen &= own >= 0
        seen = seen.permute(2, 1, 0, 3).flatten(0, 1)  # [h, b, longest]
        where, full, count = compact(seen, cap=longest)
        lists = index.int()[:, None].expand(-1, members, -1).reshape(len(seen), 1, longest)
        row = torch.arange(batch, dtype=torch.int32, device=death.device)
        plan = Plan(
            batch=row,
            row=torch.zeros_like(row),
            rows=torch.ones_like(row),
            position=torch.full_like(row, total - 1),
            index=place(lists, where, longest, 0),
            full=full,
            count=count,
            tile=1,
            shape=(batch, 1, total),
        )
        return self.keys[:, None], self.values[:, None], plan

    def check_crop(self) -> None:
        """Raise ValueError where keys were dropped that an earlier state would need."""
        if self.seen and max(self.seen) > min(self._rings):
            raise ValueError(
                f"crop: expected at most {min(self._rings)} tokens seen, nothing dropped yet, "
                f"received {max(self.seen)}; dropped keys do not come back: run the prompt again, "
                "or keep a copy.deepcopy of the cache from before"
            )

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` tokens of every row; ValueError where keys were dropped."""
        self.check_crop()
        self.seen = [max(seen - tokens, 0) for seen in self.seen]
        if self._tensors:
            after = self._tensors["next"].sub_(tokens).clamp_(min=0)
            gone = self.positions >= after[:, None]
            self.positions.masked_fill_(gone, EMPTY)
            self._tensors["death"].masked_fill_(gone[:, None], 0)

    # memory

    def _rings_for(self, tokens: int) -> list[int]:
        """Slots of each ring where a row has so many tokens."""
        room = max(1 << max(tokens - 1, 0).bit_length(), FEWEST_SLOTS)
        return [min(ring, room) for ring in self._rings]

    def _reserve(self, tokens: int) -> None:
        """Wider rings, where they are not as wide as their windows and too small."""
        sizes = self._rings_for(tokens)
        if all(size <= old for size, old in zip(sizes, self._sizes, strict=True)):
            return
        before = self.slots
        self._sizes = [max(pair) for pair in zip(sizes, self._sizes, strict=True)]
        with torch.inference_mode(False):
            for name, fill in (("keys", 0), ("values", 0), ("positions", EMPTY), ("death", 0)):
                axis = 2 if name == "death" else 1
                parts = []
                old = self._tensors[name].split(before, axis)
                for part, slots in zip(old, self.slots, strict=True):
                    shape = list(part.shape)
                    shape[axis] = slots - shape[axis]
                    parts += [part, part.new_full(shape, fill)]
                self._tensors[name] = torch.cat(parts, axis)
            self._tensors["layout"] = self._layout(self.keys.device)


class WholeStore(Rows):
    """The kv heads of a layer that keep every key, by position.

    There is room for a sixteenth more keys than there are, so that few tokens copy them.

    Args:
        windows: for each query head its window, where the store remembers until when each key is
            read; None where that is asked anew for every call.
        sinks: first keys that are always read.
        pools: summaries that the store is to keep up to date, or None.
    """

    shared = ("windows",)

    def __init__(
        self,
        windows: Sequence[int] | None = None,
        sinks: int = 0,
        pools: PooledKeys | None = None,
    ) -> None:
        self.windows = windows
        self.sinks = sinks
        self.pools = pools
        super().__init__()

    def reset(self) -> None:
        """Forget every key, the batch size too."""
        super().reset()
        if self.pools is not None:
            self.pools.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes + (0 if self.pools is None else self.pools.nbytes)

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Batch row i becomes what row ``index[i]`` was."""
        super().reorder(index)
        if self.pools is not None:
            self.pools.reorder(index)

    def extend(self, key: Tensor, value: Tensor, runs: dict[int, tuple[int, int]]) -> None:
        """Keep new keys.

        Args:
            key: [b, g, n, d], of the new tokens.
            value: [b, g, n, dv].
            runs: for each batch row that has some its tokens, from and to; the rest is padding.
        """
        batch, _, n, _ = key.shape
        with torch.no_grad():
            if not self._tensors:
                self._start(key, value)
            before = list(self.seen)
            for row, (start, stop) in runs.items():
                self.seen[row] += stop - start
            # where a row has no token, one is written all the same
            self._reserve(max(self.seen) + (len(runs) < batch))
            whole = len(runs) == batch and set(runs.values()) == {(0, n)}
            if whole and len(set(before)) == 1:
                self.keys[:, :, before[0] : before[0] + n] = key
                self.values[:, :, before[0] : before[0] + n] = value
            elif n == 1:  # what a row without a token writes, its next one writes again
                at = self._tensors["next"].long()[:, None, None, None]
                self.keys.scatter_(2, at.expand_as(key), key)
                self.values.scatter_(2, at.expand_as(value), value)
            else:
                for row, (start, stop) in runs.items():
                    own = slice(before[row], self.seen[row])
                    self.keys[row, :, own] = key[row, :, start:stop]
                    self.values[row, :, own] = value[row, :, start:stop]
            if self.windows is not None and n == 1:
                self._remember_new()
            if n == 1:
                step(self._tensors["next"], list(runs))
            else:
                self._tensors["next"].copy_(torch.tensor(self.seen, dtype=torch.int32))
            if self.pools is not None:
                self.pools.extend(key, runs)

    def remember(self, rows: Sequence[int], death: Tensor) -> None:
        """Until when the query heads of some rows read each key: int32 [r, h, k]."""
        at = torch.tensor(rows, device=death.device)
        self._tensors["death"][at, :, : death.shape[2]] = death

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.seen)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values [b, g, longest, d]."""
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def read(self) -> LifetimeMask:
        """What the query of each row's newest token reads of the keys held."""
        count, device = self.longest, self.keys.device
        if self.windows is None and len(set(self.seen)) == 1:
            return LifetimeMask.causal(count, 1, device=device)
        after = self._tensors["next"][:, None, None]
        seen = torch.arange(count, device=device) < after
        if self.windows is not None:
            seen = seen & (self._tensors["death"][:, :, :count] >= after)
        return LifetimeMask(seen.expand(self.batch, -1, -1).int() * INF, 1, most=count)

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` tokens of every row."""
        self.seen = [max(seen - tokens, 0) for seen in self.seen]
        if self._tensors:
            self._tensors["next"].sub_(tokens).clamp_(min=0)
        if self.pools is not None:
            self.pools.crop(tokens, lambda row, start, stop: self.keys[row, :, start:stop])

    def _start(self, key: Tensor, value: Tensor) -> None:
        """No keys yet."""
        (batch, heads, _, dim), device = key.shape, key.device
        self.seen = [0] * batch
        whole = {"dtype": torch.int32, "device": device}
        with torch.inference_mode(False):
            self._tensors = {
                "keys": key.new_zeros(batch, heads, 0, dim, requires_grad=False),
                "values": value.new_zeros(batch, heads, 0, value.shape[3], requires_grad=False),
                "next": torch.zeros(batch, **whole),
            }
            if self.windows is not None:
                self._tensors["death"] = torch.zeros(batch, len(self.windows), 0, **whole)
                self._tensors["windows"] = torch.tensor(self.windows, device=device)

    def _reserve(self, tokens: int) -> None:
        """Room for so many tokens a row."""
        old = self.keys.shape[2]
        if tokens <= old:
            return
        size = tokens + max(FEWEST_SLOTS, tokens // 16)
        with torch.inference_mode(False):
            for name in {"keys", "values", "death"} & self._tensors.keys():
                x = self._tensors[name]
                new = x.new_zeros(*x.shape[:2], size, *x.shape[3:])
                new[:, :, :old] = x
                self._tensors[name] = new

    def _remember_new(self) -> None:
        """Until when the newest key of each row is read."""
        after = self._tensors["next"].long()[:, None]
        death = (after + self._tensors["windows"]).clamp(max=INF)
        death = death.masked_fill(after < self.sinks, INF).int()[..., None]
        self._tensors["death"].scatter_(2, after[..., None].expand_as(death), death)


def step(after: Tensor, active: Sequence[int]) -> None:
    """One token more in the active rows of int32 [b]; all of them wait for nothing."""
    if len(active) == len(after):
        after.add_(1)
    else:
        after[torch.tensor(active, device=after.device)] += 1


__all__ = ["Part", "RaggedStore", "WholeStore"]
