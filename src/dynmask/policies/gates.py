"""Gates: what each attention map (layer x head) may read, as tables of numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ..masks import LifetimeMask


@dataclass(frozen=True, eq=False)
class Gates:
    """What each attention map reads besides the sinks: one number per map, [layers, heads].

    Attributes:
        window: int32, newest keys, the query's own counted; ``LifetimeMask.INF`` is a dense map.
        columns: int32, keys that are chosen from the input, at most.
        share: float32, so many columns more for each key of the input, or so many blocks for each
            block of it (length-elastic).
        blocks: int32, key blocks that each query block chooses, in place of columns; 0 in all
            maps when None.
        kept: int32, keys that the learned score of the map's kv head keeps besides sinks and
            window, in place of columns; 0 in all maps when None. A key that leaves the window must
            be among the best so far, and what is not is never read again: the memory of such a map
            is bounded, so that no share of the input comes on top.
        slashes: int32, diagonals beyond the window that are chosen from the input, alone or beside
            columns; 0 in all maps when None. They do not grow with the input.
    """

    window: Tensor
    columns: Tensor
    share: Tensor
    blocks: Tensor = None  # type: ignore[assignment]
    kept: Tensor = None  # type: ignore[assignment]
    slashes: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("blocks", "kept", "slashes"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.zeros_like(self.columns))
        for item in fields(self):
            x = getattr(self, item.name)
            kind = torch.float32 if item.name == "share" else torch.int32
            ok = isinstance(x, Tensor) and x.dtype == kind and x.dim() == 2
            if not ok or x.shape != self.window.shape:
                got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"gates.{item.name}: expected {kind} [layers, heads], the same for all, "
                    f"received {got}"
                )
            least = 1 if item.name == "window" else 0
            if not bool((x >= least).all()):
                raise ValueError(
                    f"gates.{item.name}: expected numbers of at least {least}, received "
                    f"{x.min().item()}"
                )
        if not bool((self.share <= 1).all()):
            raise ValueError(
                f"gates.share: expected shares of at most 1, received {self.share.max().item()}"
            )
        for kinds in (("columns", "blocks", "kept"), ("slashes", "blocks", "kept")):
            several = torch.stack([getattr(self, name) > 0 for name in kinds]).sum(0) > 1
            if bool(several.any()):
                layer, head = several.nonzero()[0].tolist()
                own = [name for name in kinds if getattr(self, name)[layer, head] > 0]
                raise ValueError(
                    f"gates: expected {', '.join(kinds[:2])} or kept of a map, received "
                    f"{' and '.join(own)} for layer {layer}, head {head}"
                )
        if bool(((self.kept > 0) & (self.share > 0)).any()):
            raise ValueError(
                "gates: expected no share of maps that keep by score, received some; their memory "
                "does not grow with the input"
            )

    @classmethod
    def full(cls, layers: int, heads: int) -> Gates:
        """Every map dense."""
        window = torch.full((layers, heads), LifetimeMask.INF, dtype=torch.int32)
        return cls(window, torch.zeros_like(window), torch.zeros_like(window, dtype=torch.float32))

    @cached_property
    def keeping(self) -> tuple[bool, ...]:
        """For each layer whether some of its maps keep by score."""
        return tuple(self.kept.any(-1).tolist())

    @property
    def dense(self) -> Tensor:
        """Which maps are dense: bool [layers, heads]."""
        return self.window == LifetimeMask.INF

    def replaced(
        self,
        maps: Tensor,
        window: int,
        columns: int = 0,
        share: float = 0.0,
        blocks: int = 0,
        kept: int = 0,
        slashes: int = 0,
    ) -> Gates:
        """The same gates, but these numbers where ``maps`` (bool [layers, heads]) is True."""
        numbers = (window, columns, share, blocks, kept, slashes)
        tables = (getattr(self, item.name) for item in fields(self))
        return Gates(
            *(
                torch.where(maps, torch.tensor(number, dtype=table.dtype), table)
                for number, table in zip(numbers, tables, strict=True)
            )
        )

    def of(self, layer: int, keys: int, block: int) -> tuple[Tensor, ...]:
        """Window, columns, blocks, kept and slashes of a layer's heads: int64 [h] each.

        Of so many keys; ``block`` is the size of a block. But for the window all are at most what
        there is.
        """
        share, chooses = self.share[layer].double(), self.blocks[layer] > 0
        wide = (share * keys + self.columns[layer]).long().clamp(max=keys)
        number = -(-keys // block)
        many = (share * number + self.blocks[layer]).long().clamp(max=number)
        return (
            self.window[layer].long(),
            wide.masked_fill(chooses, 0),
            many.masked_fill(~chooses, 0),
            self.kept[layer].long().clamp(max=keys),
            self.slashes[layer].long().clamp(max=keys),
        )
