"""What gates cost a frozen model: the divergence of its predictions on documents, measured."""

from __future__ import annotations

import hashlib
import inspect
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.encoder import BlockEncoder
from dynmask.errors import bad
from dynmask.gated_settings import GatedSettings
from dynmask.policies.base import Layer
from dynmask.policies.gated import Gated, Gates

MASS_ROWS = 16
"""Query rows of a document whose kept attention is measured, for the card."""


class Judge:
    """Measures the divergence of gates on the documents, and remembers what it measured."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Tensor],
        settings: GatedSettings,
        seed: int,
        judged: Sequence[Tensor] | None = None,
        decoded: Sequence[int] | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.documents = [document.long() for document in documents]
        self.device = next(model.get_input_embeddings().parameters()).device
        self.rows = [
            self._judged(len(d), random.Random(f"{seed}/{i}"))
            if judged is None
            else judged[i].sort().values
            for i, d in enumerate(self.documents)
        ]
        self.decoded = [0] * len(self.documents) if decoded is None else list(decoded)
        self.encoders: tuple[BlockEncoder | None, ...] | None = None
        self.scores: tuple[nn.Module | None, ...] | None = None
        self.known: dict[str, float] = {}
        self.above: dict[str, float] = {}
        """Divergences that are known to be larger than these numbers, no more."""
        self.refusals = [0] * len(self.documents)
        self.trials = 0
        self.full: list[Tensor] = []

    def _judged(self, length: int, rng: random.Random) -> Tensor:
        """Positions of the judged tokens of a document, ascending."""
        count = min(self.settings.judged, length)
        late = min(math.ceil(self.settings.late * count), count)
        early = sorted(rng.sample(range(length - late), min(count - late, length - late)))
        return torch.tensor([*early, *range(length - late, length)])

    def policy(self, gates: Gates) -> Gated:
        """The policy with these gates, as it is judged."""
        return self.settings.policy(gates, encoders=self.encoders, scores=self.scores)

    def prepare(self) -> None:
        """Run the full model once on every document; ValueError where it predicts nothing."""
        self.full = []
        for index in range(len(self.documents)):
            self.full.append(self._predict(index, None))
            if bool(self.full[-1].isnan().any()):
                raise bad(
                    "model", "predictions that are numbers",
                    f"NaN after documents[{index}], with full attention",
                    "Check the weights, or load the model in bfloat16 or float32.",
                )  # fmt: skip

    def cost(self, gates: Gates, most: float = math.inf) -> float:
        """Divergence of gates: the largest of the documents' means over judged tokens, in nats.

        Where it is larger than ``most``, a number above that: the first document that shows it
        ends the measurement.
        """
        name = digest_of(gates)
        self.trials += 1
        if name not in self.known and not self.above.get(name, -1.0) > most:
            found = self.divergence(self.policy(gates), most)
            (self.known if found <= most else self.above)[name] = found
        return self.known.get(name, self.above.get(name, math.inf))

    def divergence(self, policy: Gated, most: float = math.inf) -> float:
        """Divergence of a policy, measured; of one above ``most``, what showed it."""
        worst = 0.0
        for index in self._order():
            found = self._predict(index, policy)
            mean = float(_divergence(found, self.full[index])) / len(found)
            worst = max(worst, math.inf if math.isnan(mean) else mean)
            if worst > most:
                self.refusals[index] += 1
                break
        return worst

    def _order(self) -> list[int]:
        """Documents, those first that refused most gates for their cost."""

        def worth(index: int) -> tuple[float, int]:
            return -(self.refusals[index] + 1) / len(self.documents[index]), index

        return sorted(range(len(self.documents)), key=worth)

    def prompt(self, index: int) -> Tensor:
        """What a document's gates are for: the tokens before those that were decoded."""
        document = self.documents[index]
        return document[: len(document) - self.decoded[index]]

    @torch.no_grad()
    def _predict(self, index: int, policy: Any) -> Tensor:
        """Log-probabilities of what follows the judged tokens: float32 [rows, vocabulary].

        What was decoded after the prompt reads every key, or by the policy what the settings say.
        """
        from dynmask.integrations.gated_cache import GatedCache
        from dynmask.integrations.transformers import sparsify

        ids, rows = (x.to(self.device) for x in (self.documents[index], self.rows[index]))
        prompt, decoded = ids.split([len(ids) - self.decoded[index], self.decoded[index]])
        decode = self.settings.decode
        chooses = policy is not None and len(decoded) > 0 and decode != "full"
        if policy is not None and chooses:
            policy = replace(policy, decode=decode)
        logits: list[Tensor] = []
        with nullcontext() if policy is None else sparsify(self.model, policy) as run:
            own: Any = {"past_key_values": GatedCache(run)} if chooses and decode == "keep" else {}  # type: ignore[arg-type]
            read = self.model(
                input_ids=prompt[None],
                logits_to_keep=rows[rows < len(prompt)],
                use_cache=len(decoded) > 0,
                **own,
            )
            logits.append(read.logits)
            cache = getattr(read, "past_key_values", None)
            if chooses:
                logits += self._decode(decoded, len(prompt), rows, cache, 1)
        if len(decoded) and not chooses:
            logits += self._decode(decoded, len(prompt), rows, cache)
        return torch.cat(logits, 1)[0].float().log_softmax(-1)

    def _decode(
        self, ids: Tensor, first: int, rows: Tensor, cache: Any, together: int = 0
    ) -> list[Tensor]:
        """Logits of judged tokens that come after so many others: [1, rows, vocabulary] each.

        All in one call, or ``together`` at a time; one after another where a layer is no attention,
        as some of those forget what came before several tokens.
        """
        if cache is None:
            raise bad(
                "decoded", "a model that returns its cache", type(self.model).__name__,
                "Leave decoded out.",
            )  # fmt: skip
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        attention = DynamicLayer, DynamicSlidingWindowLayer
        alike = all(type(x) in attention for x in getattr(cache, "layers", (None,)))
        named = "position_ids" in inspect.signature(self.model.forward).parameters
        logits = []
        for part in ids.split((together or len(ids)) if alike else 1):
            stop = first + len(part)
            where = torch.arange(first, stop, device=ids.device)[None]
            read = self.model(
                input_ids=part[None],
                past_key_values=cache,
                logits_to_keep=rows[(rows >= first) & (rows < stop)] - first,
                use_cache=True,
                **({"position_ids": where} if named else {}),
            )
            logits.append(read.logits)
            first = stop
        return logits


def _divergence(found: Tensor, full: Tensor) -> Tensor:
    """KL(full || found) of log-probabilities [rows, vocabulary], the sum over rows.

    What has no probability in full attention (a masked part of the vocabulary) counts nothing.
    """
    kl = torch.nn.functional.kl_div(found, full, log_target=True, reduction="none")
    return kl.masked_fill(full == -math.inf, 0).sum()


def digest_of(gates: Gates) -> str:
    """A name of gates: the same numbers, the same name."""
    parts = (getattr(gates, item.name) for item in fields(gates))
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in parts)).hexdigest()


class _Meter:
    """A policy that applies gates and notes density, kept mass and locality of every map."""

    name, causal, phase = "meter", False, "both"

    def __init__(self, policy: Gated, layers: int) -> None:
        self.policy = policy
        self.density: list[list[Tensor]] = [[] for _ in range(layers)]
        self.mass: list[list[Tensor]] = [[] for _ in range(layers)]

    @property
    def scored(self) -> bool:
        """Whether the policy looks at keys before rotation."""
        return self.policy.scored

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Fits what the policy fits."""
        self.policy.check(layers, heads, kv_heads)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Any:
        """The policy's mask, looked at."""
        from dynmask.integrations.tally import kept_mass, sampled_rows

        mask = self.policy(query, key, value, layer)
        rows = sampled_rows(query.shape[2], MASS_ROWS)
        heads = query.shape[1]
        density = mask.density().double()
        self.density[layer.index].append(density.repeat_interleave(heads // density.shape[1], 1))
        mass = kept_mass(query, key, mask, rows, query.shape[-1] ** -0.5, None)
        self.mass[layer.index].append(mass.mean(-1).double())
        return mask


def measure(judge: Judge, policy: Gated, which: Sequence[int], layers: int) -> tuple[Tensor, ...]:
    """Density and kept mass of every map in each prompt: float64 [documents, layers, heads].

    Raises:
        ValueError: a model with a layer that is no attention.
    """
    from dynmask.integrations.transformers import sparsify

    meter = _Meter(policy, layers)
    with sparsify(judge.model, meter), torch.no_grad():
        for i in which:
            ids = judge.prompt(i)[None].to(judge.device)
            judge.model.base_model(input_ids=ids, use_cache=False)
    without = [layer for layer, found in enumerate(meter.density) if not found]
    if without:
        raise bad(
            "model", f"attention in each of {layers} layers, whose maps have budgets",
            f"none in layer {without[0]}", "Hybrid models have gates without a card: Gated().",
        )  # fmt: skip
    return tuple(
        torch.stack([torch.cat(found) for found in kind], 1).clamp(0, 1).cpu()
        for kind in (meter.density, meter.mass)
    )
