"""Retained: learned scores say which keys stay; what a frozen model's calibration leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import bad
from ..masks import LifetimeMask
from ..masks.base import check_whole
from ..nn import PairScore, Retention, ValueScore
from ..retention import ExactRetention
from .base import Layer, LooksAtNone, own_heads
from .scoring import ScoreModules

if TYPE_CHECKING:
    from ..card import MaskCard


@dataclass(frozen=True, eq=False)
class Retained(LooksAtNone):
    """The first ``sinks`` keys, the ``window`` newest and the best of the rest by a learned score.

    A score belongs to a key and is made once, from the key before rotation and its value; the
    query has no part in it. So a key that has been dropped never comes back: the mask is a
    lifetime mask, prefill takes O(N w), and a cache of ``width`` keys is enough (the selection of
    Dynamic Mask Attention, arXiv 2508.02124, section 3, on a model that was never trained for it).
    A layer with a sliding window of its own is bounded already and stays as it is.

    Args:
        modules: one score module for each layer, ``(key [b, g, n, d], value [b, g, n, dv])`` to
            float32 [b, g, n], as ``dynmask.nn.PairScore``; None for a layer with a sliding window.
        width: keys that a query reads, sinks and window counted: one number for all heads, or one
            for every layer and kv head.
        window: newest keys, the query's own counted.
        sinks: keys at the start of the sequence.
        windows: for each layer the model's own sliding window, or None; all None when empty.
        shape: (layers, query heads, kv heads) of the model, where it is known.
        card: where the modules come from, if from a card; checked against the model.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    modules: tuple[nn.Module | None, ...]
    width: int | tuple[tuple[int, ...], ...] = 512
    window: int = 128
    sinks: int = 4
    windows: tuple[int | None, ...] = ()
    shape: tuple[int, int, int] | None = None
    card: MaskCard | None = None

    name: ClassVar[str] = "retained"
    causal: ClassVar[bool] = True
    phase: ClassVar[Literal["both", "prefill"]] = "both"

    def __post_init__(self) -> None:
        layers = len(self.modules)
        windows = tuple(self.windows) or (None,) * layers
        widths: Sequence[int | tuple[int, ...]] = (
            self.width
            if isinstance(self.width, Sequence) and not isinstance(self.width, str)
            else [check_whole("width", self.width, 1)] * layers
        )
        if not len(windows) == len(widths) == layers or not layers:
            raise ValueError(
                f"retained: expected as many widths and windows as modules, received "
                f"{len(widths)} and {len(windows)} for {layers}; give one for each layer"
            )
        for index, (module, own) in enumerate(zip(self.modules, windows, strict=True)):
            if module is None and own is None:
                raise ValueError(
                    f"retained: expected a score module for layer {index}, received None; only a "
                    "layer with a sliding window of its own does without"
                )
        kept = tuple(  # scores are rounded already
            ExactRetention(width, self.window, self.sinks) if own is None else Retention(own, own)
            for width, own in zip(widths, windows, strict=True)
        )
        object.__setattr__(self, "_kept", kept)
        object.__setattr__(self, "_modules", ScoreModules(self.modules))

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError unless the modules are for a model of this shape."""
        own = self.shape or (len(self.modules), heads, kv_heads)
        if own != (layers, heads, kv_heads):
            raise ValueError(
                f"retained: expected score modules for {layers} layers, {heads} heads, {kv_heads} "
                "kv heads, received some for {} layers, {} heads, {} kv heads; calibrate this "
                "model with dynmask calibrate --policy retained".format(*own)
            )
        for layer, module in enumerate(self.modules):
            if module is not None:
                self.retention(layer).check(kv_heads)
            made = _heads_of(module)
            if made not in (None, kv_heads):
                raise bad(
                    "retained", f"score modules of {kv_heads} kv heads", f"one of {made} for layer "
                    f"{layer}", "Make them for this model.",
                )  # fmt: skip

    def of_shard(self, rank: int, ranks: int) -> Retained:
        """The policy of the heads that a rank holds under tensor parallelism."""
        modules: list[nn.Module | None] = []
        for module in self.modules:
            if not isinstance(module, PairScore | None):
                raise bad(
                    "retained",
                    "scores that each kv head has from its own keys and values (PairScore), for "
                    "tensor parallelism",
                    type(module).__name__,
                    "Calibrate with head='pair', or load the model without tp_plan.",
                )
            heads = 0 if module is None else len(module.w_in)
            own = own_heads(range(heads), rank, ranks)
            modules.append(None if module is None else module.of_heads(own))
        width, shape = self.width, self.shape
        if not isinstance(width, int):
            width = tuple(own_heads(row, rank, ranks) for row in width)
        if shape is not None:
            shape = shape[0], shape[1] // ranks, shape[2] // ranks
        return replace(self, modules=tuple(modules), width=width, shape=shape)

    def retention(self, layer: int) -> Retention:
        """How many keys of which kind a layer keeps."""
        return self._kept[layer]  # type: ignore[attr-defined]

    def scores(self, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
        """Score of each key, float32 [b, g, n]: see :meth:`.scoring.ScoreModules.scores`."""
        return self._modules.scores(key, value, layer)  # type: ignore[attr-defined]

    def bias(self, scores: Tensor, layer: Layer) -> None:
        """Nothing is added to the logits: the model's own attention, over fewer keys."""
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> LifetimeMask:
        """The lifetimes of a layer's keys."""
        scores = self.scores(key, value, layer)
        return self.retention(layer.index).mask(scores, query.shape[2])


def _heads_of(module: nn.Module | None) -> int | None:
    """Kv heads that a score module is for; None for one of another kind."""
    if isinstance(module, PairScore):
        return len(module.w_in)
    return len(module.A) if isinstance(module, ValueScore) else None


def score_module(
    settings: Mapping[str, Any], model: Mapping[str, Any], device: torch.device | str = "cpu"
) -> nn.Module:
    """A new score module: ``settings`` has head and hidden, ``model`` kv_heads and head_dim.

    Its parameters are float32, whatever PyTorch's default is: servers load models under bfloat16.
    """
    with torch.device(device):
        if settings["head"] == "pair":
            return PairScore(model["kv_heads"], model["head_dim"], settings["hidden"]).float()
        # The softplus of the other forms is a detour here: the order of the scores is all that
        # counts, and the loss compares them as logits.
        return ValueScore(model["kv_heads"], model["head_dim"], form="bounded").float()


def modules_of(
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    layers: Sequence[bool],
) -> tuple[nn.Module | None, ...]:
    """The score modules that a card holds, for the layers that have one.

    Args:
        settings, model: as for :func:`score_module`.
        tensors: their parameters, by ``LAYER.NAME``.
        layers: which layers have one.
    """
    modules: list[nn.Module | None] = []
    for layer, scored in enumerate(layers):
        module = None
        if scored:
            module = score_module(settings, model)
            prefix = f"{layer}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            module.load_state_dict(own)
            module = module.eval().requires_grad_(False)
        modules.append(module)
    return tuple(modules)


def from_card(card: MaskCard, width: int | None = None, budget: str = "even") -> Retained:
    """The policy of a retained card; see ``MaskCard.policy``."""
    header = card.header
    settings, model, windows = header["settings"], header["model"], header["windows"]
    mean: int = settings["width"] if width is None else width
    if budget not in ("even", "per_head"):
        raise ValueError(f"budget: expected 'even' or 'per_head', received {budget!r}")
    named = {name.removeprefix("layers."): tensor for name, tensor in card.tensors.items()}
    modules = modules_of(settings, model, named, [window is None for window in windows])
    widths: int | tuple[tuple[int, ...], ...] = mean
    if budget == "per_head":
        widths = _per_head(check_whole("width", mean, 1), header)
    return Retained(
        modules,
        widths,
        settings["window"],
        settings["sinks"],
        tuple(windows),
        (model["layers"], model["heads"], model["kv_heads"]),
        card,
    )


def _per_head(width: int, header: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Widths of every layer and kv head whose mean is ``width`` over layers without a window."""
    curve, windows, heads = header["curve"], header["windows"], header["model"]["kv_heads"]
    free = [layer for layer, window in enumerate(windows) if window is None]
    mass = [head for layer in free for head in curve["mass"][layer]]
    found = widths_within(width * len(mass), curve["widths"], mass) if mass else []
    widths = [(window or width,) * heads for window in windows]
    for number, layer in enumerate(free):
        widths[layer] = tuple(found[number * heads : (number + 1) * heads])
    return tuple(widths)


def widths_within(budget: int, widths: Sequence[int], mass: Sequence[Sequence[float]]) -> list[int]:
    """Widths of several heads that add up to ``budget`` and capture the most attention mass.

    Each head's mass grows with its width along straight lines between the measured ``widths``;
    where it grows faster later, the steps are taken as one. The steepest steps of all heads come
    first, so the sum of the masses is the largest that these curves allow.

    Args:
        budget: keys of all heads together.
        widths: rising widths at which the mass was measured; no head gets less than the first.
        mass: for each head its captured share of attention at each of ``widths``.

    Raises:
        ValueError: a budget that is below the smallest width of every head.
    """
    heads = len(mass)
    if budget < heads * widths[0]:
        raise ValueError(
            f"width: expected a mean of at least {widths[0]} keys a head (window, sinks and a "
            f"few), received {budget / heads:g}; raise it, or calibrate with a smaller window"
        )
    steps: list[tuple[float, int, int]] = []  # slope, head, keys
    for head, curve in enumerate(mass):
        hull: list[tuple[float, int]] = []  # gain, keys
        for i in range(1, len(widths)):
            hull.append((max(curve[i] - curve[i - 1], 0.0), widths[i] - widths[i - 1]))
            while len(hull) > 1 and hull[-1][0] * hull[-2][1] > hull[-2][0] * hull[-1][1]:
                gain, keys = hull.pop()
                hull[-1] = hull[-1][0] + gain, hull[-1][1] + keys
        steps += [(gain / keys, head, keys) for gain, keys in hull]
    chosen = [widths[0]] * heads
    left = budget - sum(chosen)
    for _, head, keys in sorted(steps, key=lambda step: -step[0]):
        taken = min(keys, left)
        chosen[head] += taken
        left -= taken
    # Beyond the widest that was measured nothing tells heads apart.
    for head in range(heads):
        chosen[head] += left // heads + (head < left % heads)
    return chosen
