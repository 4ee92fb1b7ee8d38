"""What every mask has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.ops import fused as is_fused
from ..plan import Plan, Tiles

if TYPE_CHECKING:
    from .lifetime import LifetimeMask

LOWERED_ROWS = 2048
"""Query rows lowered at a time where a whole mask is walked through."""


class Mask(ABC):
    """Which keys each query may read; causal, for the last ``queries`` of ``keys`` positions.

    ``batch`` and ``heads`` are the mask's own; a 1 stands for every batch row or head.
    """

    batch: int
    """Batch rows with choices of their own."""
    heads: int
    """Heads with choices of their own: 1, the kv heads or the query heads."""
    keys: int
    queries: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the mask's tensors."""

    @abstractmethod
    def dense(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The mask's meaning: bool [b, heads, rows, keys] for query rows [rows[0], rows[1])."""

    @abstractmethod
    def lower_tiles(self, tiles: Tiles) -> Plan:
        """Lower the query rows of ``tiles``, which straddle none of :meth:`borders`."""

    def lower(
        self,
        rows: tuple[int, int] | None = None,
        tile: int | None = None,
        fused: bool | None = None,
    ) -> Plan:
        """Lower query rows [rows[0], rows[1]) to a plan with tiles of at most ``tile`` rows.

        ``fused`` lowers by Triton kernels, as on a GPU where triton is installed when None. They
        write the same lists without waiting for the device, their capacity a bound.
        """
        rows = self._range(rows)
        fused = is_fused(self.device) if fused is None else fused
        size = self.preferred_tile(fused) if tile is None else tile
        size = min(check_whole("tile", size, 1), rows[1] - rows[0])
        borders = self.borders(rows[0] + self.offset, rows[1] + self.offset)
        return self.lower_tiles(
            Tiles.cut(self.batch, rows, self.offset, size, self.device, borders, fused)
        )

    def preferred_tile(self, fused: bool = False, members: int = 1) -> int:
        """Rows of a tile unless the caller says otherwise.

        Args:
            fused: for the fused kernels.
            members: query heads that share a list; the fused kernels stack them in one tile.
        """
        return 128

    def backward_tile(self, members: int = 1) -> int:
        """Rows of a tile for the fused kernel that holds keys and walks over rows.

        Large ones serve it best, where the element rule does not need a bit for each row.
        """
        return self.preferred_tile(fused=True, members=members)

    def list_words(self, tile: int) -> int:
        """Integers in the lists of one tile at most, as the fused lowering makes them."""
        return self.keys

    def cuts(self) -> Iterable[int]:
        """Positions where the rule changes: what lies on both sides is lowered in two parts."""
        return ()

    def borders(self, first: int, stop: int) -> Iterable[int]:
        """Positions in (first, stop) where the choice changes, so that no tile straddles them."""
        return ()

    @abstractmethod
    def expand(self, batch: int) -> Mask:
        """The same mask for ``batch`` batch rows (a view)."""

    @abstractmethod
    def __and__(self, other: LifetimeMask) -> Mask:
        """Intersection with a lifetime mask: a window, a length."""

    def __or__(self, other: Mask) -> Mask:
        """Union."""
        from .union import UnionMask

        check_same_size(self, other)
        return UnionMask((self, other))

    def density(self) -> Tensor:
        """Kept pairs over causal pairs of the query rows: float32 [b, heads]."""
        kept = torch.zeros(self.batch, self.heads, dtype=torch.int64, device=self.device)
        for first in range(0, self.queries, LOWERED_ROWS):
            kept += self.lower((first, min(first + LOWERED_ROWS, self.queries))).kept()
        return kept / self.causal_pairs()

    def causal_pairs(self) -> int:
        """Pairs that causal attention computes for the query rows of one head."""
        return self.queries * self.keys - self.queries * (self.queries - 1) // 2

    @property
    def offset(self) -> int:
        """Key index of query row 0."""
        return self.keys - self.queries

    @property
    def is_causal(self) -> bool:
        """Whether this is known to be plain causal attention, without looking at tensors."""
        return False

    def _range(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        first, last = (0, self.queries) if rows is None else rows
        if not 0 <= first < last <= self.queries:
            raise ValueError(
                f"rows: expected 0 <= first < last <= {self.queries} (the mask's query rows), "
                f"received {rows}; pass a non-empty range of query rows"
            )
        return first, last

    def _positions(self, rows: tuple[int, int]) -> Tensor:
        """Key index of each query row of the range, as a column [rows, 1]."""
        first, last = rows[0] + self.offset, rows[1] + self.offset
        return torch.arange(first, last, device=self.device)[:, None]


def check_sizes(keys: int, queries: int) -> None:
    """Raise ValueError unless 1 <= queries <= keys."""
    if not 1 <= queries <= keys:
        raise ValueError(
            f"queries: expected 1 <= queries <= keys, received {queries} queries and {keys} keys; "
            "queries are the last positions of the keys"
        )


def check_index(name: str, tensor: Tensor, dims: int, meaning: str) -> None:
    """Raise ValueError unless ``tensor`` is an integer tensor of ``dims`` dimensions."""
    if not isinstance(tensor, Tensor) or tensor.dim() != dims or tensor.dtype != torch.int32:
        what = (
            f"{tensor.dtype} {tuple(tensor.shape)}"
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
        )
        raise ValueError(f"{name}: expected an int32 tensor {meaning}, received {what}")


def check_whole(name: str, value: object, least: int) -> int:
    """The value as it is, when it is a whole number of at least ``least``; else ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number, {name} >= {least}, received {value!r}")
    return value


def check_limit(limit: object) -> None:
    """Raise ValueError unless ``limit`` is a lifetime mask."""
    from .lifetime import LifetimeMask

    if not isinstance(limit, LifetimeMask):
        raise ValueError(
            f"mask & other: expected a LifetimeMask on the right, received {type(limit).__name__}; "
            "only lifetimes limit other masks"
        )


def check_same_size(a: Mask, b: object) -> None:
    """Raise ValueError unless two masks are about the same queries and keys."""
    if not isinstance(b, Mask):
        raise ValueError(
            f"masks: expected two masks, received {type(a).__name__} and {type(b).__name__}"
        )
    if (a.queries, a.keys, a.device) != (b.queries, b.keys, b.device):
        raise ValueError(
            f"masks: expected the same queries, keys and device, received {a.queries} x {a.keys} "
            f"on {a.device} and {b.queries} x {b.keys} on {b.device}; build both for the same call"
        )
    for name, x, y in (("batch rows", a.batch, b.batch), ("heads", a.heads, b.heads)):
        if max(x, y) % min(x, y) or (name == "batch rows" and min(x, y) != 1 and x != y):
            raise ValueError(
                f"masks: expected {name} that agree or are 1, received {x} and {y}; "
                "build both for the same tensors"
            )


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat dimension 1 of [b, heads', ...] to ``heads``, grouped order."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
