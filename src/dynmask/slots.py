"""Slots for live keys: their tensors, how they grow, and what a batch does to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import LifetimeMask
from .masks.base import check_whole
from .retention import Retention

FEWEST_SLOTS = 64
"""Slots of a store that holds little; beyond, slots double until there are ``width``."""

EMPTY = -1
"""Position of a slot without a key."""


class Rows:
    """Tensors of several batch rows, and what generation does to the rows: beams, repeats."""

    shared: tuple[str, ...] = ()
    """Names of tensors that are the same for all rows."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every key, the batch size too."""
        self.seen: list[int] = []
        """Tokens that each batch row has given so far, padding not counted."""
        self._tensors: dict[str, Tensor] = {}

    @property
    def batch(self) -> int:
        """Batch rows; 0 before the first call."""
        return len(self.seen)

    @property
    def keys(self) -> Tensor:
        """[b, g, slots, d], or [b, slots, d] where the slots of all heads lie in one row."""
        return self._tensors["keys"]

    @property
    def values(self) -> Tensor:
        """Likewise, of the values' dimensions."""
        return self._tensors["values"]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors.values())

    @property
    def size(self) -> tuple[int, int]:
        """Batch rows and kv heads of the keys."""
        return self.keys.shape[0], self.keys.shape[1]

    def check_fit(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError unless new keys [b, g, n, d] and values are of the kind of the old."""
        dims = self.keys.shape[-1], self.values.shape[-1]
        if tuple(key.shape[:2]) != self.size or (key.shape[-1], value.shape[-1]) != dims:
            raise ValueError(
                f"key, value: expected {self.size} batch rows and kv heads, head dims {dims[0]} "
                f"and {dims[1]} as in the store, received {tuple(key.shape)} and "
                f"{tuple(value.shape)}; reset() it for a new batch"
            )
        kinds = [(x.dtype, x.device) for x in (self.keys, self.values, key, value)]
        if kinds[:2] != kinds[2:]:
            raise ValueError(
                f"key, value: expected {kinds[0]} and {kinds[1]} as in the store, received "
                f"{kinds[2]} and {kinds[3]}; fill and read a store under the same autocast, "
                "on one device"
            )

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Batch row i becomes what row ``index[i]`` was: beams, repeats, selections.

        Waits for the device only where rows have seen different numbers of tokens.
        """
        if not self._tensors:
            return
        at = torch.as_tensor(index, device=next(iter(self._tensors.values())).device)
        if at.dtype == torch.bool:
            at = at.nonzero().flatten()
        same = len(set(self.seen)) == 1
        self.seen = (
            self.seen[:1] * len(at) if same else [self.seen[int(row)] for row in at.tolist()]
        )
        for name, x in self._tensors.items():
            if name in self.shared:
                continue
            if len(at) == len(x):  # where it was, for captured CUDA graphs
                x.copy_(x.index_select(0, at))
            else:
                with torch.inference_mode(False):
                    self._tensors[name] = x.index_select(0, at)

    def repeat(self, times: int) -> None:
        """Each batch row ``times`` times, side by side."""
        self.reorder([row for row in range(self.batch) for _ in range(times)])


class Slots(Rows):
    """The memory of a :class:`dynmask.cache.KeyStore`.

    Args:
        retention: what a query reads; widths may differ between kv heads.
        limit: a sliding window on top, its own key counted, or None.
    """

    shared = ("width",)

    def __init__(self, retention: Retention, limit: int | None = None) -> None:
        if not isinstance(retention, Retention):
            raise ValueError(
                f"retention: expected a Retention, received {retention!r}; pass "
                "Retention(width, window, sinks)"
            )
        self.retention = retention
        self.limit = None if limit is None else check_whole("limit", limit, 1)
        super().__init__()

    # what is in it

    @property
    def slots(self) -> int:
        """Slots per row and head; the keys in them are never more than the head's width."""
        return self.positions.shape[-1] if self._tensors else 0

    @property
    def positions(self) -> Tensor:
        """int32 [b, g, slots], position of each key in its sequence; -1 in empty slots."""
        return self._tensors["positions"]

    @property
    def scores(self) -> Tensor:
        """float32 [b, g, slots], float64 where the first ones were."""
        return self._tensors["scores"]

    # going back

    def check_crop(self) -> None:
        """Raise ValueError where keys were evicted that an earlier state would need."""
        if not self._tensors:
            return
        narrowest = min(self._widths(self.keys.shape[1]))
        if max(self.seen) > narrowest:
            raise ValueError(
                f"crop: expected at most {narrowest} tokens seen, nothing evicted yet, received "
                f"{max(self.seen)}; evicted keys do not come back: run the prompt again, or keep "
                "a copy.deepcopy of the cache from before"
            )

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` tokens of every row.

        Raises:
            ValueError: a row has evicted keys, which an earlier state would need.
        """
        if tokens < 0:
            raise ValueError(f"crop: expected 0 or more tokens to forget, received {tokens}")
        if tokens == 0 or not self._tensors:
            return
        self.check_crop()
        self.seen = [max(s - tokens, 0) for s in self.seen]
        # nothing was evicted: slots are in the order of positions
        after = self._tensors["next"].sub_(tokens).clamp_(min=0)
        self.positions.masked_fill_(self.positions >= after[:, None, None], EMPTY)

    # memory

    def _widths(self, heads: int) -> list[int]:
        width = self.retention.width
        if isinstance(width, int):
            return [width] * heads
        if len(width) != heads:
            raise ValueError(
                f"width: expected one for each of {heads} kv heads, received {len(width)}"
            )
        return list(width)

    def _start(self, batch: int, key: Tensor, value: Tensor, scores: Tensor) -> None:
        """Empty slots for a first call; a later one must fit them."""
        if self._tensors:
            self.check_fit(key, value)
            return
        heads, device = key.shape[1], key.device
        widths = self._widths(heads)
        self.seen = [0] * batch
        whole = {"dtype": torch.int32, "device": device}
        wide = torch.promote_types(scores.dtype, torch.float32)
        with torch.inference_mode(False):  # slots are written again, maybe outside of it
            self._tensors = {
                "keys": key.new_zeros(batch, heads, 0, key.shape[3], requires_grad=False),
                "values": value.new_zeros(batch, heads, 0, value.shape[3], requires_grad=False),
                "positions": torch.zeros(batch, heads, 0, **whole),
                "scores": torch.zeros(batch, heads, 0, dtype=wide, device=device),
                "next": torch.zeros(batch, **whole),
                "width": torch.tensor([min(w, LifetimeMask.INF) for w in widths], **whole),
            }

    def _reserve(self, slots: int) -> None:
        """At least so many slots, doubling, never more than the largest width."""
        if slots <= self.slots:
            return
        most = max(self._widths(self.keys.shape[1]))
        size = min(max(1 << (slots - 1).bit_length(), FEWEST_SLOTS), most)
        with torch.inference_mode(False):
            for name, fill in (("keys", 0), ("values", 0), ("positions", EMPTY), ("scores", 0)):
                old = self._tensors[name]
                new = old.new_full((*old.shape[:2], size, *old.shape[3:]), fill)
                new[:, :, : old.shape[2]] = old
                self._tensors[name] = new
