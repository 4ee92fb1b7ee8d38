"""Calibration: a frozen model and some documents in, a MaskCard out.

DAM stage 1 (arXiv 2506.11104): average the attention maps over documents, amplify, threshold to a
true mask, and keep the diagonals and verticals that the true mask fills. Score heads for the policy
"retained" are trained in ``dynmask.retrofit``, budgets of gates chosen in ``dynmask.budgets``.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynmask.amplify import AMPLIFIERS, amplify
from dynmask.capture import mean_attention
from dynmask.card import MaskCard
from dynmask.card_file import SCHEMA
from dynmask.card_kinds import pack_bits
from dynmask.documents import token_digest, windows_of
from dynmask.errors import bad
from dynmask.fingerprints import describe_model

if TYPE_CHECKING:
    from dynmask.budgets import GatedSettings
    from dynmask.retrofit import RetainedSettings


@dataclass(frozen=True)
class DamSettings:
    """How DAM turns mean attention into patterns; the paper's values but for `min_support`.

    Args:
        length: L, positions of a document that are looked at; at least 2.
        tau: score from which a pair belongs to the true mask.
        mu: share of its cells that the true mask must fill for a pattern to be kept.
        lam: exponent of the amplifiers `box_cox` and `yeo_johnson`.
        amplifier: a name in `dynmask.amplify.AMPLIFIERS`.
        min_support: cells that a pattern must have to be considered. The paper takes every pattern,
            which is 1. But s sink columns fill the last s diagonals all by themselves, and a band
            of width s the last s verticals. A row's attention sums to 1, so at the paper's tau
            (mean attention above 0.0225) at most 44 keys of a row pass, and accidents of that kind
            end at 44 / mu = 55 cells; the default lies above.
        eps: mean attention is raised to this before it is amplified.
    """

    length: int = 512
    tau: float = 0.3
    mu: float = 0.8
    lam: float = 0.5
    amplifier: str = "box_cox"
    min_support: int = 64
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("length", "min_support"):
            if type(getattr(self, name)) is not int:
                raise bad(f"settings.{name}", "a whole number", repr(getattr(self, name)))
        for name in ("tau", "mu", "lam", "eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise bad(f"settings.{name}", "a finite number", repr(value))
        if self.length < 2:
            raise bad("settings.length", "at least 2", self.length, "The paper has 512.")
        if self.tau <= 0:
            raise bad("settings.tau", "more than 0", self.tau, "At 0 every pair is kept.")
        if not 0 < self.mu <= 1:
            raise bad("settings.mu", "a share in (0, 1]", self.mu)
        if not 0 < self.eps < 1:
            raise bad("settings.eps", "a value in (0, 1)", self.eps)
        if not isinstance(self.amplifier, str) or self.amplifier not in AMPLIFIERS:
            raise bad("settings.amplifier", f"one of {', '.join(AMPLIFIERS)}", self.amplifier)
        if not 1 <= self.min_support <= self.length:
            raise bad(
                "settings.min_support",
                f"1 to length ({self.length})",
                self.min_support,
                "No pattern has more cells than that: lower min_support or raise length.",
            )


def check_checkpoint(policy: str, path: str | os.PathLike[str] | None) -> None:
    """Look, before a model is loaded, whether the files of ``checkpoint`` can be gone on from.

    Whether they are of the same run is known with the model.

    Args:
        policy: "retained" or "gated".
        path: the file, there or not; None for none.

    Raises:
        ValueError: a file of another kind, or a damaged one.
    """
    from dynmask import encoder_training, teaching, trials
    from dynmask.checkpoint import read_checkpoint

    if path is None:
        return
    file = Path(path)
    beside = file.with_name(f"{file.name}.encoder")
    if policy == "retained" and file.exists():
        read_checkpoint(file, teaching.CHECKPOINT, teaching.LEFT)
    if policy == "gated" and file.exists():
        trials.read_journal(file)
    if policy == "gated" and beside.exists():
        read_checkpoint(beside, encoder_training.CHECKPOINT, encoder_training.LEFT)


def calibrate(
    model: nn.Module,
    documents: Sequence[Tensor],
    *,
    policy: str = "dam",
    settings: "DamSettings | RetainedSettings | GatedSettings | None" = None,
    seed: int = 0,
    batch: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MaskCard:
    """Learn a model's masks from its own attention; the model stays as it is.

    Args:
        model: any causal language model of transformers whose attention goes through its attention
            interface, on any device, in any dtype. Maps are computed in float32.
        documents: token ids, each a 1-D integer tensor of at least `settings.length`
            (`min(settings.lengths)` for "retained").
        policy: what to calibrate: "dam" averages attention maps, "retained" trains score heads,
            "gated" chooses a budget for every map by its effect; the rest of this text is about
            "dam", see `dynmask.retrofit.retrofit` and `dynmask.budgets.calibrate_gates` for the
            others.
        settings: see `DamSettings`, `RetainedSettings` and `GatedSettings`.
        seed: chooses the window of `settings.length` tokens taken from a longer document (a
            beginning-of-sequence token stays in front). The same model, documents, settings, seed
            and batch give the same card on the same device.
        batch: how many documents run at once. One map of one layer and one document is held at a
            time whatever it is, beside one sum of [h, L, L] float32 for every layer.
        checkpoint: only for "retained" and "gated": the file that an interrupted run goes on from.
        progress: show a progress bar.

    Returns:
        A card with the patterns; `density` is kept pairs over causal pairs, and `kept_mass` the
        mean over rows of the share of a row's mean attention that the row's kept keys receive
        (attention sinks that are no keys do not count), both for diagonals, verticals and self
        laid over L positions, as sequences beyond L get them. `true_density` and `true_kept_mass`
        in its header say the same of the true mask.

    Raises:
        ValueError: no documents, a document that is too short or holds unknown tokens, bad
            settings, or a model whose attention cannot be captured. Raised before the model runs,
            but for the last.

    An exception or Ctrl-C leaves the model as it was, and nothing is written anywhere.
    """
    if policy not in ("dam", "retained", "gated"):
        raise bad(
            "policy",
            "'dam', 'retained' or 'gated'",
            repr(policy),
            "Other policies need no calibration.",
        )
    from dynmask.budgets import GatedSettings, calibrate_gates
    from dynmask.retrofit import RetainedSettings, retrofit

    others: dict[str, tuple[type, Callable[..., MaskCard]]] = {
        "retained": (RetainedSettings, retrofit),
        "gated": (GatedSettings, calibrate_gates),
    }
    if policy in others:
        kind, run = others[policy]
        if settings is not None and not isinstance(settings, kind):
            raise _wrong_settings(kind.__name__, policy, settings)
        return run(model, documents, settings, seed=seed, checkpoint=checkpoint, progress=progress)
    if checkpoint is not None:
        raise bad("checkpoint", "none for policy 'dam'", repr(checkpoint), "Leave it out.")
    settings = DamSettings() if settings is None else settings
    if not isinstance(settings, DamSettings):
        raise _wrong_settings("DamSettings", policy, settings)
    if type(batch) is not int or batch < 1:
        raise bad("batch", "a whole number of at least 1", repr(batch))
    windows = windows_of(model, documents, settings.length, seed)
    description = describe_model(model)
    means = mean_attention(model, windows, batch=batch, progress=progress)
    tensors, figures = _distil(means, settings)
    import dynmask

    header = {
        "schema": SCHEMA,
        "version": dynmask.__version__,
        "policy": policy,
        "settings": asdict(settings),
        "model": description,
        "data": {
            "sha256": token_digest(windows.unbind()),
            "documents": len(windows),
            "tokens": windows.numel(),
            "seed": seed,
        },
        **figures,
    }
    return MaskCard(header, tensors)


def _wrong_settings(expected: str, policy: str, received: object) -> ValueError:
    return bad("settings", f"{expected} for policy {policy!r}", type(received).__name__)


def _distil(
    means: dict[int, Tensor], settings: DamSettings
) -> tuple[dict[str, Tensor], dict[str, list[list[float]]]]:
    """Tensors of the card, and density and kept mass per layer and head; empties `means`."""
    tensors: dict[str, Tensor] = {}
    figures: dict[str, list[list[float]]] = {}
    for layer in range(len(means)):
        # Taken out one by one, so that the memory of a layer is free before the next is worked on.
        mean = means.pop(layer).cpu()
        diagonals, verticals, true_mask = dam_patterns(mean, settings)
        tensors[f"layers.{layer}.diagonals"] = _padded(diagonals)
        tensors[f"layers.{layer}.verticals"] = _padded(verticals)
        tensors[f"layers.{layer}.true_mask"] = pack_bits(true_mask)
        pattern = _extended(diagonals, verticals)
        true_mask |= torch.eye(settings.length, dtype=torch.bool)
        for prefix, mask in (("", pattern), ("true_", true_mask)):
            figures.setdefault(f"{prefix}density", []).append(_density(mask))
            figures.setdefault(f"{prefix}kept_mass", []).append(_kept_mass(mean, mask))
    return tensors, figures


def dam_patterns(mean: Tensor, settings: DamSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Kept diagonals bool [h, L], kept verticals bool [h, L], true mask bool [h, L, L].

    `mean` is a layer's mean attention [h, L, L]. Entry r of the diagonals stands for the pairs with
    `q - k = r`, entry c of the verticals for the pairs with `k = c`.
    """
    score = amplify(mean, settings.amplifier, settings.lam, settings.eps)
    true_mask = (score >= settings.tau).tril()
    support = torch.arange(mean.shape[-1], 0, -1)
    eligible = support >= settings.min_support
    diagonals, verticals = (g >= settings.mu for g in pattern_scores(true_mask))
    return diagonals & eligible, verticals & eligible, true_mask


def pattern_scores(true_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma: the share of its cells that the mask fills, for every diagonal and every vertical.

    `true_mask` is bool [h, L, L] and causal; both results are float64 [h, L]. Diagonal r and
    vertical c have L - r and L - c cells. The kept pairs are counted by offset and by column, so no
    pattern is ever laid out.
    """
    heads, length = true_mask.shape[0], true_mask.shape[-1]
    head, row, column = true_mask.nonzero(as_tuple=True)
    cells = torch.arange(length, 0, -1, dtype=torch.float64, device=true_mask.device)

    def share(pattern: Tensor) -> Tensor:
        counts = torch.bincount(head * length + pattern, minlength=heads * length)
        return counts.view(heads, length) / cells

    return share(row - column), share(column)


def _padded(keep: Tensor) -> Tensor:
    """Kept indices of bool [h, n] as int32 [h, width], sorted, -1 at the end; width at least 1."""
    width = max(1, int(keep.sum(-1).max()))
    # A stable sort brings the kept ones to the front and leaves them in order.
    index = torch.argsort(~keep, dim=-1, stable=True)[:, :width]
    return index.masked_fill(~keep.gather(-1, index), -1).int()


def _extended(diagonals: Tensor, verticals: Tensor) -> Tensor:
    """The pattern bool [h, L, L] that rows beyond L get, laid over the first L positions."""
    position = torch.arange(diagonals.shape[-1])
    distance = position[:, None] - position
    kept = diagonals[:, distance.clamp(min=0)] | verticals[:, None, :] | (distance == 0)
    return kept.tril()


def _density(mask: Tensor) -> list[float]:
    length = mask.shape[-1]
    return (mask.sum((-2, -1)).double() / (length * (length + 1) / 2)).tolist()


def _kept_mass(mean: Tensor, mask: Tensor) -> list[float]:
    total = mean.sum(-1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    kept = (mean * mask).sum(-1, dtype=torch.float64)
    return (kept / total).mean(-1).clamp(0, 1).tolist()
