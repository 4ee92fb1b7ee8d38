"""Retrofit: score heads for a frozen model, taught what later queries will look for.

The model is run as it is, and in every layer a small module learns to tell from a key and its value
how much attention the key will get from queries that come later (the retention loss of
``dynmask.nn``). No gradient reaches the model, and no layer learns from another. What comes out is
a MaskCard of the policy "retained": O(N w) prefill and a cache of w keys for a model that was never
trained for it.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dynmask.card import MaskCard
from dynmask.card_file import SCHEMA
from dynmask.card_kinds import MAX_HIDDEN
from dynmask.documents import check_document, token_digest, vocabulary_of
from dynmask.errors import bad
from dynmask.fingerprints import describe_model
from dynmask.masks import LifetimeMask
from dynmask.nn import Retention
from dynmask.teaching import Heads, Training, measure

HELD_OUT = 4
"""Documents of the longest length that are measured and not trained on, a twentieth of these at
most; with fewer than twice as many none is held out."""


@dataclass(frozen=True)
class RetainedSettings:
    """How score heads are trained, and the sizes that their policy starts with.

    Args:
        steps: training steps; the same card every time. None: as many as fit ``minutes``.
        minutes: training time, where ``steps`` is None.
        lengths: tokens of a sequence, one after the other for equal shares of the training.
        shorter: share of the steps that go back to one of the earlier lengths.
        tokens: tokens of a step; it has ``tokens // length`` sequences, at least one.
        rows: query rows drawn from a step's sequences.
        late: share of these rows near the end, where tasks ask their questions.
        learning_rate: of AdamW, after ``warmup`` steps; a cosine takes it to 0.
        warmup: steps in which the learning rate rises.
        weight_decay: of AdamW.
        head: "pair" (a small network of key and value) or "value" (a linear map of the values).
        hidden: units of the pair head's hidden layer.
        width: keys that a query reads per kv head, where the policy is given no other number.
        window: newest keys that are always read; also how much later a query must be for its
            attention to count as a lesson.
        sinks: first keys that are always read.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    steps: int | None = None
    minutes: float = 3.0
    lengths: tuple[int, ...] = (2_048, 4_096, 16_384)
    shorter: float = 0.2
    tokens: int = 65_536
    rows: int = 32
    late: float = 0.25
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    head: Literal["pair", "value"] = "pair"
    hidden: int = 64
    width: int = 512
    window: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        lengths = self.lengths
        if not isinstance(lengths, list | tuple) or not lengths:
            raise bad("settings.lengths", "some numbers of tokens", repr(lengths))
        object.__setattr__(self, "lengths", tuple(lengths))
        whole = {name: 1 for name in ("tokens", "rows", "hidden", "width")}
        whole |= {"warmup": 0, "window": 1, "sinks": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise bad(f"settings.{name}", f"a whole number of at least {least}", repr(value))
            most = MAX_HIDDEN if name == "hidden" else LifetimeMask.INF
            if value > most:
                raise bad(f"settings.{name}", f"at most {most}", value)
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise bad("settings.steps", "a whole number of at least 1, or None", repr(self.steps))
        for name in ("minutes", "shorter", "late", "learning_rate", "weight_decay"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise bad(f"settings.{name}", "a finite number of at least 0", repr(value))
        for name in ("shorter", "late"):
            if getattr(self, name) > 1:
                raise bad(f"settings.{name}", "a share from 0 to 1", getattr(self, name))
        for name in ("minutes", "learning_rate"):
            if not getattr(self, name):
                raise bad(f"settings.{name}", "more than 0", 0)
        if self.head not in ("pair", "value"):
            raise bad("settings.head", "'pair' or 'value'", repr(self.head))
        shortest = self.window + self.sinks + 2
        for length in self.lengths:
            if type(length) is not int or length < shortest:
                raise bad(
                    "settings.lengths",
                    f"whole numbers of at least {shortest} (window, sinks and something to judge)",
                    repr(length),
                    "Pass longer lengths or a smaller window.",
                )
        if self.width < self.window + self.sinks:
            raise bad(
                "settings.width",
                f"at least window and sinks ({self.window + self.sinks})",
                self.width,
                "Raise width or lower window.",
            )

    @property
    def retention(self) -> Retention:
        """What a layer keeps at the settings' width."""
        return Retention(self.width, self.window, self.sinks)

    def stage(self, seed: int, step: int, progress: float) -> int:
        """Return which of the sorted lengths a step trains on."""
        last = min(int(progress * len(self.lengths)), len(self.lengths) - 1)
        rng = random.Random(f"length/{seed}/{step}")
        return rng.randrange(last) if last and rng.random() < self.shorter else last

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of a step: a linear rise, then a cosine to 0."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def retrofit(
    model: nn.Module,
    documents: Sequence[Tensor],
    settings: RetainedSettings | None = None,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 2.0,
    progress: bool = True,
) -> MaskCard:
    """Train score heads on a frozen model; ``dynmask.calibrate(policy="retained")`` calls this.

    Args:
        model: a causal language model of transformers that ``dynmask.sparsify`` takes, on any
            device, in any dtype. It stays as it is.
        documents: token ids, each a 1-D integer tensor. A step of length L takes documents of at
            least L tokens, of those shorter than the next length if there are any, and cuts a
            random window from longer ones (a beginning-of-sequence token stays in front). With
            enough documents of the longest length some are held out and measured.
        settings: see `RetainedSettings`.
        seed: of every random choice.
        checkpoint: a file that training can go on from. It is written every ``checkpoint_minutes``,
            on Ctrl-C and at the end, each time as a whole, and read when it is there.
        checkpoint_minutes: how often.
        progress: show a progress bar with the loss.

    Returns:
        A card of policy "retained". ``density`` and ``kept_mass`` are those of the card's width on
        the held-out documents (on the training documents if there are too few), under full
        attention in the other layers; ``curve`` says how much mass more and fewer keys capture.

    Raises:
        ValueError: no documents or too short ones, bad settings, a model that cannot be
            sparsified, or a checkpoint of another run; before the model runs.
        RuntimeError: a loss that is not finite.
    """
    settings = settings or RetainedSettings()
    if not isinstance(settings, RetainedSettings):
        raise bad("settings", "RetainedSettings", type(settings).__name__)
    data = _Data(model, documents, settings, seed)
    from dynmask.integrations.checks import check_model

    check_model(model)
    description = describe_model(model)
    heads = Heads(model, settings, description, seed)
    identity = {
        "settings": asdict(settings) | {"lengths": list(settings.lengths)},
        "seed": seed,
        "model": description["fingerprint"],
        "data": data.digest,
    }
    training = Training(model, data, settings, seed, heads)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        training.load(path, identity)
    elif path is not None:
        training.save(path, identity)  # a path that cannot be written fails before the training
    training.run(path, identity, 60 * checkpoint_minutes, progress)
    meter = measure(model, heads, settings, data.held_out_windows())
    import dynmask

    header = {
        "schema": SCHEMA,
        "version": dynmask.__version__,
        "policy": "retained",
        "settings": {
            **identity["settings"],
            "length": max(settings.lengths),
            "trained_steps": training.step,
            "loss": round(training.recent(), 6),
        },
        "model": description,
        "data": {
            "sha256": data.digest,
            "documents": len(data.documents),
            "tokens": sum(map(len, data.documents)),
            "held_out": len(data.held_out),
            "seed": seed,
        },
        "windows": heads.windows,
        **meter,
    }
    tensors = {
        f"layers.{layer}.{name}": tensor.detach().float().cpu().clone()
        for layer, module in heads.trained()
        for name, tensor in module.state_dict().items()
    }
    return MaskCard(header, tensors)


class _Data:
    """The documents: which are trained on at which length, and which are held out."""

    def __init__(
        self, model: nn.Module, documents: Sequence[Tensor], settings: RetainedSettings, seed: int
    ) -> None:
        if len(documents) == 0:
            raise bad("documents", "at least one", "an empty set", "Pass token ids to train on.")
        self.lengths = sorted(settings.lengths)
        self.seed, self.tokens = seed, settings.tokens
        vocabulary, positions, self.bos = vocabulary_of(model)
        if positions is not None and self.lengths[-1] > positions:
            raise bad(
                "settings.lengths",
                f"at most the model's {positions} positions",
                self.lengths[-1],
                "Pass shorter lengths.",
            )
        for index, document in enumerate(documents):
            check_document(index, document, self.lengths[0], vocabulary, "lengths")
        # Narrow numbers: millions of tokens are kept, and widened a step at a time.
        self.documents = [document.cpu().to(torch.int32) for document in documents]
        longest = [i for i, d in enumerate(self.documents) if len(d) >= self.lengths[-1]]
        if not longest:
            raise bad(
                "documents",
                f"at least one of {self.lengths[-1]} tokens, the longest of settings.lengths",
                f"none above {max(map(len, self.documents))}",
                "Join documents or pass shorter lengths.",
            )
        kept_back = min(HELD_OUT, max(len(longest) // 20, 1)) if len(longest) >= 2 * HELD_OUT else 0
        self.held_out = longest[len(longest) - kept_back :]
        self.measured = self.held_out or longest[:HELD_OUT]
        known = [i for i in range(len(self.documents)) if i not in set(self.held_out)]
        self.pools: list[list[int]] = []
        for number, length in enumerate(self.lengths):
            able = [i for i in known if len(self.documents[i]) >= length]
            limit = self.lengths[number + 1] if number + 1 < len(self.lengths) else math.inf
            self.pools.append([i for i in able if len(self.documents[i]) < limit] or able)
        self.digest = token_digest(self.documents)

    def batch(self, step: int, stage: int) -> Tensor:
        """Token ids of a step, int64 [rows, length]: a function of seed, step and stage."""
        length, pool = self.lengths[stage], self.pools[stage]
        rng = random.Random(f"documents/{self.seed}/{step}")
        count = max(1, self.tokens // length)
        chosen = rng.sample(pool, count) if count <= len(pool) else rng.choices(pool, k=count)
        return torch.stack([self._window(i, length, rng) for i in chosen])

    def held_out_windows(self) -> Tensor:
        """Windows to measure on, int64 [documents, longest length]."""
        rng = random.Random(f"held out/{self.seed}")
        return torch.stack([self._window(i, self.lengths[-1], rng) for i in self.measured])

    def _window(self, index: int, length: int, rng: random.Random) -> Tensor:
        document = self.documents[index]
        start = rng.randint(0, len(document) - length)
        window = document[start : start + length].long()
        if self.bos is not None and document[0] == self.bos:
            window[0] = self.bos
        return window
