"""The needle recipe's settings and variants, its data, positions with gaps, and its forward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dma_common import Ranks
from dma_decoder import rotary_tables
from reference_data import Author, Batches, Corpus
from safetensors.torch import load_file
from torch import Tensor, nn
from train_reference import Recipe, Trainer, _rotate, new_model

from dynmask import attention
from dynmask.nn import PairScore, Retention, ValueScore, retention_loss_of


@dataclass(frozen=True)
class NeedleRecipe(Recipe):
    """What is trained and tested; the fields of the reference's recipe, and these.

    The first ``dense_stages`` of the stages read all keys, with the retention loss already on.
    """

    minutes: float = 8.0
    tokens: int = 132_096
    stages: tuple[tuple[int, float], ...] = (
        (516, 0.25), (2_064, 0.2), (4_128, 0.2), (8_256, 0.17), (16_512, 0.18),
    )  # fmt: skip
    own: float = 0.3
    long_facts: float = 0.75  # share of texts with facts among sequences of 4,000 tokens or more
    most_facts: int = 16
    rope_theta: float = 2.7e8
    characters: int = 40_000_000
    characters_per_source: int = 4_000_000
    mixer: str = "dma"  # dma, full, window
    width: int = 512
    width_start: int | None = None  # shrinks linearly to width over the run
    least_width: int | None = None  # each sparse step draws a width from here to width
    window: int = 128
    sinks: int = 4
    dense_stages: int = 2
    score: str = "value"  # or pair: keys and values, a small MLP
    form: str = "bounded"
    start: float = 1.0  # A
    bias: bool = True
    weight: float = 0.05
    reach: bool = True  # the retention loss also trains the values
    rows: int = 48
    after: int = 128
    late: float = 0.25
    score_rate: float = 1.0  # learning rate of the scores, times the others'
    longest_position: int = 2**20
    gaps: str = "jumps"  # jumps, uniform, none
    gapless: float = 0.2
    far: float = 0.0  # share of the spans with jumps that are uniform up to the longest position
    most_jumps: int = 8
    tests: tuple[tuple[int, int], ...] = (
        (4_096, 110), (16_384, 220), (65_536, 110), (262_144, 44), (1_048_576, 22),
    )  # fmt: skip
    other_widths: tuple[int, ...] = (256, 1024)  # tested at up to 16K

    @property
    def longest(self) -> int:
        """The longest position of training, which the model's configuration names."""
        return self.longest_position

    def keys(self, progress: float, step: int = 0) -> int:
        """Keys that a sparse layer reads in a step, at this point of the run."""
        if self.least_width is not None:
            rng = random.Random(f"width/{self.seed}/{step}")
            return rng.randrange(self.least_width, self.width + 1, 64)
        if self.width_start is None:
            return self.width
        keys = self.width_start + (self.width - self.width_start) * min(1.0, progress)
        return max(self.width, round(keys / 64) * 64)  # kernels are compiled for a few widths

    def dense(self, progress: float) -> bool:
        """Whether this point of the run reads all keys."""
        if self.mixer == "full":
            return True
        return progress < sum(share for _, share in self.stages[: self.dense_stages])

    def retention(self, keys: int) -> Retention | None:
        """What a sparse layer reads, of ``keys`` keys; None is everything."""
        if self.mixer == "full":
            return None
        if self.mixer == "window":
            return Retention(keys, keys, 0)
        return Retention(keys, self.window, self.sinks)


VARIANTS: dict[str, dict[str, Any]] = {
    "dma": {},
    "far": {"far": 0.5},
    "full": {"mixer": "full", "weight": 0.0, "bias": False},
    "window": {"mixer": "window", "weight": 0.0, "bias": False, "dense_stages": 0},
    "published": {"form": "exp", "start": 0.1, "window": 0, "sinks": 0, "weight": 0.0,
                  "dense_stages": 0, "width_start": 1024},
    "loss_only": {"window": 0, "sinks": 0},
    "window_only": {"weight": 0.0},
    "exp": {"form": "exp", "start": 0.1},
    "linear": {"form": "linear", "start": 0.1},
    "no_bias": {"bias": False},
    "detached": {"reach": False},
    "sparse_first": {"dense_stages": 0},
    "pair": {"score": "pair", "bias": False},
    "narrow": {"least_width": 192},
    "no_gaps": {"gaps": "none"},
    "uniform_gaps": {"gaps": "uniform"},
}  # fmt: skip


def continued(recipe: NeedleRecipe) -> NeedleRecipe:
    """Return the recipe for a model that attends already: no short sequences, smaller steps."""
    return replace(
        recipe, minutes=4.0, learning_rate=1e-3, warmup_steps=50, decay_from=0.3, facts=0.5,
        stages=((2_064, 0.15), (4_128, 0.15), (8_256, 0.3), (16_512, 0.4)), dense_stages=1,
    )  # fmt: skip


def recipe_of(name: str, smoke: bool = False, go_on: bool = False) -> NeedleRecipe:
    """Return the recipe of a variant, at toy sizes for ``smoke``."""
    if name not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, received {name!r}")
    base = continued(NeedleRecipe()) if go_on else NeedleRecipe()
    recipe = replace(base, **VARIANTS[name])
    if not smoke:
        return recipe
    return replace(
        recipe, minutes=0.15, tokens=1_032, stages=((129, 0.4), (516, 0.6)), hidden=32, layers=2,
        heads=2, kv_heads=1, head_dim=32, intermediate=64, warmup_steps=5, workers=1, width=64,
        window=16, after=16, rows=8, dense_stages=min(recipe.dense_stages, 1), shorter=0.2,
        least_width=recipe.least_width and 64,
        width_start=recipe.width_start and 128, characters=900_000, characters_per_source=300_000,
        tests=((512, 4), (1_024, 2)), other_widths=(32,), checkpoint_minutes=0.05,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- the data


class Needles(Author):
    """The reference's author; long sequences are mostly text with a few facts."""

    def __init__(self, corpus: Corpus, recipe: NeedleRecipe) -> None:
        super().__init__(corpus, recipe.facts, recipe.own, recipe.most_facts)
        self.shares = (recipe.facts, recipe.long_facts)

    def sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, classes) of one sequence."""
        self.share = self.shares[length >= 4_000]
        return super().sequence(rng, length)


def positions_of(
    rows: int, length: int, recipe: NeedleRecipe, device: torch.device | str = "cpu"
) -> Tensor:
    """Return increasing positions [rows, length] with gaps, below ``longest_position``.

    Drawn from torch's default generator of the device.
    """
    plain = torch.arange(length, device=device).expand(rows, length)
    room = recipe.longest_position - length
    if recipe.gaps == "none" or room <= 0:
        return plain
    # the span is log-uniform between the length and the longest position
    ratio = recipe.longest_position / length
    span = length * ratio ** torch.rand(rows, 1, device=device)
    if recipe.far:
        uniform = length + room * torch.rand(rows, 1, device=device)
        span = torch.where(torch.rand(rows, 1, device=device) < recipe.far, uniform, span)
    span = torch.where(torch.rand(rows, 1, device=device) < recipe.gapless, length, span)
    extra = (span - length).clamp(0, room)
    if recipe.gaps == "uniform":
        weight = torch.empty(rows, length, device=device).exponential_()
        weight[:, 0] = 0
        share = weight.double().cumsum(-1) / weight.double().sum(-1, keepdim=True)
        return plain + (share * extra).long()
    jumps = recipe.most_jumps
    where = torch.randint(1, length, (rows, jumps), device=device)
    size = torch.empty(rows, jumps, device=device).exponential_()
    used = torch.arange(jumps, device=device) < torch.randint(
        1, jumps + 1, (rows, 1), device=device
    )
    size = size * used
    size = (size / size.sum(-1, keepdim=True) * extra).long()
    gaps = torch.zeros(rows, length, dtype=torch.long, device=device).scatter_add_(1, where, size)
    return plain + gaps.cumsum(-1)


class Feed:
    """Batches in their order, written ahead; a resumed run asks for the same ones."""

    def __init__(self, batches: Batches, recipe: NeedleRecipe, ranks: Ranks) -> None:
        self.batches, self.recipe, self.ranks = batches, recipe, ranks
        self.asked: int | None = None

    def __call__(self, step: int, progress_of: Callable[[int], float]) -> tuple[Tensor, Tensor]:
        """Return ids and classes of a step, [row, token]."""
        ranks, batches = self.ranks, self.batches
        if self.asked is None:
            self.asked = step
        while batches.free:
            length = self.recipe.length(self.asked, progress_of(self.asked))
            batches.ask(self.asked * ranks.count + ranks.index, length)
            self.asked += 1
        ids, classes, _ = batches.take(step * ranks.count + ranks.index)
        tensors = (torch.from_numpy(part.astype(np.int32)) for part in (ids, classes))
        tokens, kinds = (part.to(ranks.device, non_blocking=True) for part in tensors)
        return tokens.long(), kinds


# --------------------------------------------------------------------------------------- the model


def dma_model(recipe: NeedleRecipe) -> Any:
    """Return the reference's model, with a score module in each layer of a DMA variant."""
    model = new_model(recipe)
    if recipe.mixer == "dma":
        for layer in model.model.layers:
            sizes = recipe.kv_heads, recipe.head_dim
            score: nn.Module
            if recipe.score == "pair":
                score = PairScore(*sizes)
            else:
                score = ValueScore(*sizes, form=recipe.form)  # type: ignore[arg-type]
                nn.init.constant_(score.A, recipe.start)
            layer.self_attn.dynmask_score = score
    return model


def start_from(model: nn.Module, path: Path) -> None:
    """Load a trained model's weights [safetensors]; score modules keep their initial values."""
    tensors = load_file(str(path))
    own = {k: v for k, v in model.named_parameters() if "dynmask_score" not in k}
    odd = [k for k in own.keys() | tensors.keys()
           if k not in own or k not in tensors or own[k].shape != tensors[k].shape]  # fmt: skip
    if odd:
        raise ValueError(
            f"{path}: expected the weights of this recipe's model, received others (missing, "
            f"unknown or of another size: {', '.join(sorted(odd)[:4])}); pass a model of its shape"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


class DmaTrainer(Trainer):
    """The reference's training forward, with scores, masks and the retention loss."""

    def __init__(self, model: Any, recipe: NeedleRecipe, compiled: bool) -> None:
        super().__init__(model, recipe, compiled)
        self.needle = recipe
        self.kept: list[Tensor] = []
        self.counts: dict[int, Tensor] = {}
        self.turn: int | None = None  # the layer that attends; None while kernels are timed
        self.progress, self.number = 0.0, 0

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [token, dim] of newly drawn positions."""
        recipe = self.needle
        where = positions_of(recipe.tokens // length, length, recipe, self.device)
        self.rotary = rotary_tables(where.flatten(), recipe.head_dim, recipe.rope_theta, self.dtype)
        return self.rotary

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Return attention [token, width] within rows of ``length`` tokens."""
        recipe, turn = self.needle, self.turn
        if turn is None or recipe.mixer == "full":
            biased = recipe.bias and recipe.mixer == "dma"
            zero = value.new_zeros(len(value), value.shape[1]).float() if biased else None
            return self._dense(query, key, value, zero, length)
        self.turn = turn + 1
        q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
        scores, bias = k.new_zeros(k.shape[:3], dtype=torch.float32), None
        if recipe.mixer == "dma":
            score = self.model.model.layers[turn].self_attn.dynmask_score
            plain = None
            if recipe.score == "pair":
                cos, sin = self.rotary
                plain = _rotate(key, cos, -sin).unflatten(0, (-1, length)).transpose(1, 2)
            scores = score(plain, v)
            bias = score.bias(scores) if recipe.bias else None
            if recipe.weight:
                taught = scores
                if not recipe.reach:
                    taught = score(None if plain is None else plain.detach(), v.detach())
                self.kept.append(
                    retention_loss_of(q, k, taught, rows=recipe.rows, after=recipe.after,
                                      late=recipe.late, protect=recipe.retention(recipe.width))
                )  # fmt: skip
        keys = recipe.keys(self.progress, self.number)
        retention = recipe.retention(keys)
        if recipe.dense(self.progress) or retention is None or keys >= length:
            flat = None if bias is None else bias.transpose(1, 2).flatten(0, 1)
            return self._dense(query, key, value, flat, length)
        out = attention(q, k, v, retention.mask(scores.detach()), bias)
        return out.transpose(1, 2).reshape(len(query), -1)

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, length: int
    ) -> Tensor:
        """Attend to all keys; the bias [token, g] rides on two more dimensions of the head.

        So the fused kernels take it, gradient included: the query holds ones there, the key the
        bias, split into a rounded part and the rest.
        """
        if bias is None:
            return super().attend(query, key, value, length)
        dim, wide = query.shape[-1], query.shape[-1] + 8
        one = 8.0  # exact in bf16
        column = (bias * (math.sqrt(wide) / one))[..., None]
        high = column.to(key.dtype)
        low = (column - high.float()).to(key.dtype)
        blank = key.new_zeros(*key.shape[:2], 6)
        ones = query.new_full((*query.shape[:2], 2), one)
        query = torch.cat((query * math.sqrt(wide / dim), ones, blank.new_zeros(
            *query.shape[:2], 6)), -1)  # fmt: skip
        key = torch.cat((key, high, low, blank), -1)
        value = torch.cat((value, value.new_zeros(*value.shape[:2], 8)), -1)
        out = super().attend(query, key, value, length)
        return out.unflatten(-1, (-1, wide))[..., :dim].flatten(1)

    def step(
        self, batch: tuple[Tensor, Tensor], step: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and what is logged."""
        ids, classes = batch
        self.kept.clear()
        self.turn, self.progress, self.number = 0, progress, step
        loss, found = self.loss(ids, classes)
        length = ids.shape[1]
        self.counts[length] = 0.8 * self.counts.get(length, torch.zeros_like(found)) + found
        numbers = {
            f"answers_{n}": table[4, 2] / table[4, 0].clamp(min=1)
            for n, table in sorted(self.counts.items())
        }
        if self.kept:
            retention = torch.stack(self.kept).sum()
            loss = loss + self.needle.weight * retention
            numbers["retention"] = retention.detach() / len(self.kept)
        return loss, numbers
