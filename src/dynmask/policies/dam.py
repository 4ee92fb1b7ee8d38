"""DAM: diagonals and verticals calibrated on a frozen model's mean attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..masks import StructuralMask
from ..masks.structural import count_bands
from .base import Layer, LooksAtNone, own_heads

if TYPE_CHECKING:
    from ..card import MaskCard


@dataclass(frozen=True, eq=False)
class Dam(LooksAtNone):
    """Dynamic Attention Mask (arXiv 2506.11104, section 3), stage 2: apply a calibrated card.

    Positions below the card's L read what the true mask says; later ones read the kept diagonals
    and verticals. The mask does not look at the input.

    Args:
        card: from ``dynmask.calibrate``.
        share_group: one pattern for each kv head, the union over its query heads, so that keys
            which the group never reads again can be dropped.
        shard: rank and number of ranks that share the heads of every layer (tensor parallelism);
            see :meth:`of_shard`.
    """

    card: MaskCard
    share_group: bool = False
    shard: tuple[int, int] = (0, 1)

    name: ClassVar[str] = "dam"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", {})

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, heads, kv heads) of the model that the card is for, or of the shard's part."""
        model, ranks = self.card.header["model"], self.shard[1]
        return model["layers"], model["heads"] // ranks, model["kv_heads"] // ranks

    def of_shard(self, rank: int, ranks: int) -> Dam:
        """The policy of the heads that a rank holds under tensor parallelism."""
        return Dam(self.card, self.share_group, (rank, ranks))

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError unless the card is for a model of this shape."""
        if self.shape != (layers, heads, kv_heads):
            own = "{} layers, {} heads, {} kv heads".format(*self.shape)
            raise ValueError(
                f"dam: expected a card for {layers} layers, {heads} heads, {kv_heads} kv heads, "
                f"received one for {own}; calibrate this model with dynmask calibrate"
            )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> StructuralMask:
        """The layer's patterns, for as many positions as there are."""
        diagonals, verticals, true_mask, bands = self._patterns(layer.index, query.device)
        mask = StructuralMask(
            diagonals=diagonals,
            verticals=verticals,
            keys=key.shape[2],
            queries=query.shape[2],
            true_mask=true_mask,
            first_key=layer.first_key,
            bands=bands,
            checked=True,
        )
        return mask.union_heads(self.shape[2]) if self.share_group else mask

    def _patterns(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
        """A layer's index sets [1, h, n], true mask [h, L, L] and bands, unpacked once."""
        cache: dict = self._layers  # type: ignore[attr-defined]
        if (index, device) not in cache:
            patterns = self.card.patterns(index)
            patterns = [own_heads(x, *self.shard) for x in patterns]
            diagonals, verticals, true_mask = (x.to(device) for x in patterns)
            bands = count_bands(patterns[0])
            cache[index, device] = diagonals[None], verticals[None], true_mask, bands
        return cache[index, device]
