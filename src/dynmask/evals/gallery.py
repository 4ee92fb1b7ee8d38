"""Masks as pictures: one panel per layer and head of what its mask lets through on a prompt.

A mask is reduced to pixels while it is read, a range of rows at a time, so that the picture of a
long prompt costs little and no N x N tensor is ever held.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..policies.base import evicts, for_prompts_alone
from .engine import check_policies
from .generation import attend
from .plots import figure_of, save_figure

__all__ = [
    "MaskPicture",
    "Recorder",
    "block_average",
    "card_pictures",
    "last_row",
    "mask_gallery",
    "picture_of",
    "record_masks",
    "recorder_of",
]

RESOLUTION = 192  # pixels along each axis of one mask
SAMPLED_ROWS = 8  # query rows that stand for one pixel row of a long mask
DENSE_ELEMENTS = 2**26  # booleans of a dense mask held at a time


@dataclass(frozen=True)
class MaskPicture:
    """What one layer's mask lets through, reduced to pixels.

    ``share`` is float [heads, pixels, pixels]: the kept part of each pixel's causal pairs, NaN
    above the diagonal. ``density`` is float [heads] over the whole mask. ``last`` is bool
    [heads, keys]: what the last query reads.
    """

    layer: int
    share: Tensor
    density: Tensor
    keys: int
    last: Tensor | None = None


def block_average(mask: Any, resolution: int = RESOLUTION) -> Tensor:
    """Return the kept share of every pixel's causal pairs, [heads, pixels, pixels], batch row 0.

    A pixel row of many query rows is represented by the last ``SAMPLED_ROWS`` of them, so the
    cost grows with the pixels and the keys, not with the square of the length; up to
    ``resolution * SAMPLED_ROWS`` rows the picture is exact. The mask is read as ranges of rows.
    """
    rows, keys = mask.queries, mask.keys
    height, width = min(resolution, rows), min(resolution, keys)
    column_edges = torch.arange(width + 1) * keys // width
    offset = keys - rows
    share = torch.empty(mask.heads, height, width)
    for pixel in range(height):
        first, last = pixel * rows // height, (pixel + 1) * rows // height
        first = max(first, last - SAMPLED_ROWS)
        kept = torch.zeros(mask.heads, keys)
        step = max(1, DENSE_ELEMENTS // (keys * mask.heads))
        for start in range(first, last, step):
            dense = mask.dense(rows=(start, min(start + step, last)))[0]
            kept += dense.sum(dim=1).float().cpu()
        positions = torch.arange(first, last) + offset
        # A row at position p can read the keys of [a, b) that are at most p.
        reach = (positions[:, None] + 1).clamp(max=column_edges[None, 1:]) - column_edges[None, :-1]
        causal = reach.clamp(min=0).sum(dim=0)
        total = torch.cat([torch.zeros(mask.heads, 1), kept.cumsum(dim=1)], dim=1)
        pairs = total[:, column_edges[1:]] - total[:, column_edges[:-1]]
        share[:, pixel] = torch.where(causal > 0, pairs / causal.clamp(min=1), torch.nan)
    return share


@dataclass
class Recorder:
    """A policy that answers as ``policy`` does and keeps a picture of every prefill mask.

    Args:
        policy: the policy that is asked.
        resolution: pixels along each axis.
        pictures: layer -> picture, filled while the model runs.
        decoded: layer -> what the token decoded last reads, bool [heads, keys]; filled likewise.
    """

    policy: Any
    resolution: int = RESOLUTION
    pictures: dict[int, MaskPicture] = field(default_factory=dict)
    decoded: dict[int, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def causal(self) -> bool:
        """Whether the policy is causal."""
        return self.policy.causal

    @property
    def phase(self) -> str:
        """When the policy is asked."""
        return "prefill" if for_prompts_alone(self.policy) else "both"

    @property
    def scored(self) -> bool:
        """Whether the policy says that it looks at keys before rotation."""
        return bool(getattr(self.policy, "scored", False))

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ``ValueError`` when the policy does not fit such a model."""
        self.policy.check(layers, heads, kv_heads)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Any) -> Any:
        """Return the policy's mask, keeping its picture."""
        mask = self.policy(query, key, value, layer)
        self.keep(mask, layer.index, query.shape[2])
        return mask

    def keep(self, mask: Any, layer: int, queries: int) -> None:
        """Keep a picture of a prefill's mask, or the row of a decoded token."""
        if queries > 1:
            self.pictures[layer] = picture_of(mask, layer, self.resolution)
        else:
            self.decoded[layer] = last_row(mask)


class EvictingRecorder(Recorder):
    """A recorder of a policy that evicts, which is asked for scores where they decide."""

    def retention(self, layer: int) -> Any:
        """What a query of this layer reads."""
        return self.policy.retention(layer)

    def scores(self, key: Tensor, value: Tensor, layer: Any) -> Tensor:
        """Return the policy's scores, keeping the picture of the mask that they give."""
        scores = self.policy.scores(key, value, layer)
        # Only keys are told: the first call of a layer is its prefill, later ones decode.
        queries = 1 if layer.index in self.pictures else key.shape[2]
        mask = self.policy.retention(layer.index).mask(scores, queries)
        self.keep(mask, layer.index, queries)
        return scores

    def bias(self, scores: Tensor, layer: Any) -> Tensor | None:
        """What is added to the logits."""
        return self.policy.bias(scores, layer)


def picture_of(mask: Any, layer: int, resolution: int = RESOLUTION) -> MaskPicture:
    """Return the picture of a layer's mask."""
    density = mask.density()[0].float().cpu()
    share = block_average(mask, resolution)
    return MaskPicture(layer, share, density, mask.keys, last_row(mask))


def last_row(mask: Any) -> Tensor:
    """Return what the last query of batch row 0 reads: bool [heads, keys]."""
    return mask.dense(rows=(mask.queries - 1, mask.queries))[0, :, 0].cpu()


def recorder_of(policy: Any, resolution: int = RESOLUTION) -> Recorder:
    """Return the recorder that fits a policy."""
    kind = EvictingRecorder if evicts(policy) else Recorder
    return kind(policy, resolution)


def record_masks(
    model: torch.nn.Module,
    ids: Tensor,
    policy: Any,
    *,
    measure_rows: int = 0,
    resolution: int = RESOLUTION,
    draw: bool = True,
) -> tuple[list[MaskPicture], dict[str, Any]]:
    """Run a prefill of ``ids`` [1, length] and return each layer's picture and the run's summary.

    Without ``draw`` there are no pictures, only the summary.

    Raises:
        ValueError: if the policy does not fit the model.
    """
    check_policies(model, {policy.name: policy})
    recorder = recorder_of(policy, resolution)
    asked = recorder if draw else policy
    with (
        torch.inference_mode(),
        attend(model, asked, measure=True, measure_rows=measure_rows) as run,
    ):
        getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
        summary = run.summary()
    return [recorder.pictures[layer] for layer in sorted(recorder.pictures)], summary


def card_pictures(card: Any, length: int, resolution: int = RESOLUTION) -> list[MaskPicture]:
    """Return the picture of every layer's mask of a card, for a sequence of ``length`` tokens.

    Raises:
        ValueError: the card of a policy that looks at its input, as retained does.
    """
    from ..policies import Layer

    if card.header["policy"] != "dam":
        raise ValueError(
            f"card: expected one whose masks are the same for every input (dam), received "
            f"{card.header['policy']}; draw its masks of a prompt: dynmask inspect --model MODEL "
            f"--policy {card.header['policy']}:CARD --file PROMPT --out FILE"
        )
    policy, model = card.policy(), card.header["model"]
    query = torch.empty(1, model["heads"], length, 1)
    key = torch.empty(1, model["kv_heads"], length, 1)
    return [
        picture_of(policy(query, key, key, Layer(layer)), layer, resolution)
        for layer in range(model["layers"])
    ]


def mask_gallery(
    pictures: Sequence[MaskPicture], path: str | os.PathLike[str], *, title: str, caption: str
) -> Path:
    """Draw one panel per layer (row) and head (column) of what the masks let through.

    Masks that all heads share give one panel per layer, four in a row.

    Args:
        pictures: one per layer, from :func:`record_masks`.
        path: the file to write; its suffix decides the format.
        title: the heading.
        caption: model, n, device and seed.

    Raises:
        ValueError: if there is no picture.
    """
    if not pictures:
        raise ValueError("pictures: expected at least one layer's mask, received none")
    matplotlib, figure_type = figure_of()
    heads = max(picture.share.shape[0] for picture in pictures)
    columns = heads if heads > 1 else 4
    rows = len(pictures) if heads > 1 else -(-len(pictures) // columns)
    size = 1.7 if columns * rows <= 128 else 1.0
    figure = figure_type(
        figsize=(max(size * columns + 1.6, 6.0), size * rows + 1.2), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    colours = matplotlib.colormaps["magma_r"].with_extremes(bad="0.93", under="white")
    # A diagonal one key wide is a small part of a pixel: the root makes it visible.
    norm = matplotlib.colors.PowerNorm(0.4, 1e-6, 1.0)
    image = None
    for panel, axis in enumerate(axes.flat):
        layer, head = divmod(panel, heads)
        axis.set(xticks=[], yticks=[])
        if layer >= len(pictures) or head >= pictures[layer].share.shape[0]:
            axis.set_axis_off()
            continue
        picture = pictures[layer]
        share = picture.share[head].numpy()
        image = axis.imshow(share, cmap=colours, norm=norm, interpolation="nearest")
        density = 100 * float(picture.density[head])
        axis.set_title(f"{density:.1f} %" if density >= 1 else f"{density:.2f} %", fontsize=7)
        if head == 0:
            axis.set_ylabel(f"layer {picture.layer}", fontsize=8)
        if heads > 1 and layer == len(pictures) - 1:
            axis.set_xlabel(f"head {head}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="kept share of the pixel's pairs")
    labels = ["0", "1 %", "10 %", "25 %", "50 %", "100 %"]
    bar.set_ticks([1e-6, 0.01, 0.1, 0.25, 0.5, 1], labels=labels)
    keys = pictures[0].keys
    shared = "" if heads > 1 else "; the same for all heads"
    meaning = f"queries down, keys across, {keys:,} tokens; density above each panel{shared}"
    figure.suptitle(f"{title}\n{meaning}", fontsize=10)
    return save_figure(figure, path, caption)
