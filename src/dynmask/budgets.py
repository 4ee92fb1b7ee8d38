"""Budgets from effect: the gates of a frozen model, chosen by what they cost its predictions.

Attention mass is a poor price: diffuse heads hold much of it and matter little. Here a budget is
paid for in the divergence of the model's own next-token distribution, KL(full || gated), at judged
tokens of calibration documents. The cheapest budget is offered to all maps (layer x head) first,
to whole groups of them at a time: a group whose joint cost is within its share of what the user
allows takes the budget, another one is halved and tried again. What no map of a group of one can
afford is offered again at the next, wider budget. So effects are measured together, as they will
act, and a model with few heads that matter needs few trials.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynmask.card import SCHEMA, MaskCard, describe_model, write_atomically
from dynmask.card_kinds import ENCODER_TENSORS, MAX_HIDDEN
from dynmask.checkpoint import unreadable
from dynmask.encoder import BlockEncoder
from dynmask.encoder_training import EncoderTraining, encoder_of
from dynmask.errors import bad
from dynmask.policies.base import Layer
from dynmask.policies.gated import Gated, Gates

MASS_ROWS = 16
"""Query rows of a document whose kept attention is measured, for the card."""

_JOURNAL = "dynmask_budgets"


@dataclass(frozen=True)
class Budget:
    """What one map may read: see :class:`dynmask.policies.gated.Gates`."""

    window: int
    columns: int = 0
    share: float = 0.0
    blocks: int = 0


BUDGETS = (
    Budget(128, 1024), Budget(256, 1024), Budget(512, 1024), Budget(128, 2048),
    Budget(512, 1024, 0.02), Budget(1024, 1024, 0.03), Budget(128, 4096), Budget(1024, 1024, 0.06),
    Budget(2048, 2048, 0.06), Budget(2048, 2048, 0.12), Budget(4096, 4096, 0.25),
)  # fmt: skip
"""What maps may read, the cheap first; beyond the last a map is dense. None has less than the
policy has without calibration: what an input has no worthy keys for costs nothing, and a map that
no document of the calibration needed may be the one that the next input asks: with windows of 32
where documents allowed them, other tasks lost a fifth of their answers (``docs/findings.md``)."""

BLOCK_BUDGETS = (
    Budget(128, blocks=8), Budget(128, blocks=16), Budget(256, blocks=32),
    Budget(512, blocks=32, share=0.06),
)  # fmt: skip
"""What maps may read that choose blocks."""


def reads(budget: Budget, keys: int = 65_536, block: int = 64) -> float:
    """Keys that a map reads of so many, at most; sinks are not counted."""
    return budget.window + budget.columns + budget.blocks * block + budget.share * keys


WITH_BLOCKS = tuple(sorted(BUDGETS + BLOCK_BUDGETS, key=reads))
"""Both, in the order of what a map may read of a long input."""


@dataclass(frozen=True)
class GatedSettings:
    """How budgets are chosen.

    Args:
        max_kl: the divergence allowed at a judged token, mean over them, in nats; on the
            documents whose mean is the largest.
        density: choose the smallest divergence that keeps the density, on the longest documents,
            at or below this; ``max_kl`` is then the largest that is tried.
        budgets: what a map may read, the cheap first.
        judged: tokens of a document that are judged, the share ``late`` of them at its end (where
            answers stand), the rest spread over it.
        late: see above.
        sinks, least, last, pool, guard, block, query_pool, key_pool: of the policy, see
            :class:`dynmask.policies.gated.Gated`. What a map promises its guard is what it kept in
            that of the documents where it kept least.
        encoder: train the encoder that scores blocks, see :mod:`dynmask.encoder_training`, before
            budgets are chosen; what follows says how.
        rank: numbers that its linear maps give, see :class:`dynmask.encoder.BlockEncoder`.
        steps: training steps, a document each.
        rate: the learning rate at the start; a cosine takes it to 0.
        lessons: query blocks of a document that a step learns from.
        teacher: what a block is worth: its attention ("mass"), or what losing it does to the
            output of a head ("effect").
        soft, strength: of the policy; columns alone can be soft, so budgets must have no blocks.
            The card's ``kl_hard`` is then the divergence of the same gates without.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    max_kl: float = 0.02
    density: float | None = None
    budgets: tuple[Budget, ...] = BUDGETS
    judged: int = 64
    late: float = 0.5
    sinks: int = 4
    least: float = 1e-3
    last: int = 256
    pool: int = 1
    guard: float | None = 0.25
    block: int = 64
    query_pool: int = 8
    key_pool: int = 8
    encoder: bool = False
    rank: int = 16
    steps: int = 200
    rate: float = 0.01
    lessons: int = 16
    teacher: Literal["mass", "effect"] = "mass"
    soft: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        given: Any = self.budgets  # a card gives lists of numbers
        budgets = tuple(b if isinstance(b, Budget) else Budget(**b) for b in given)
        object.__setattr__(self, "budgets", budgets)
        if not budgets:
            raise bad("settings.budgets", "at least one", "none")
        for name in ("max_kl", "late", "density", "rate"):
            value = getattr(self, name)
            if name == "density" and value is None:
                continue
            top = math.inf if name == "max_kl" else 1
            good = type(value) in (int, float) and 0 <= value <= top and value < 1e300
            if not good or (value == 0 and name != "late"):
                raise bad(f"settings.{name}", "a number above 0, shares up to 1", repr(value))
        for name in ("judged", "rank", "steps", "lessons"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_HIDDEN:
                raise bad(f"settings.{name}", f"a whole number from 1 to {MAX_HIDDEN}", repr(value))
        for name in ("sinks", "last", "pool", "block", "query_pool", "key_pool"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**31:
                raise bad(f"settings.{name}", "a whole number below 2**31", repr(value)[:40])
        if type(self.least) not in (int, float):
            raise bad("settings.least", "a share", repr(self.least)[:40])
        for budget in budgets:
            sizes = (budget.window, budget.columns, budget.blocks)
            if any(type(size) is not int for size in sizes):
                raise bad("settings.budgets", "whole numbers of keys", repr(budget)[:80])
        self._check_encoder()
        if self.guard is not None and type(self.guard) not in (int, float):
            raise bad("settings.guard", "a share, or None", repr(self.guard))
        for budget in budgets:
            Gates.full(1, 1).replaced(torch.ones(1, 1, dtype=torch.bool), **asdict(budget))
        self._check_soft()
        self.policy(None, torch.ones(1, 1))

    def _check_soft(self) -> None:
        """Raise ValueError for soft masks where they cannot be."""
        if type(self.soft) is not bool:
            raise bad("settings.soft", "True or False", repr(self.soft))
        if type(self.strength) not in (int, float) or not abs(self.strength) < 1e300:
            raise bad("settings.strength", "a finite number", repr(self.strength))
        if self.soft and any(budget.blocks for budget in self.budgets):
            raise bad(
                "settings.soft", "budgets without blocks, which have no bias", "some with",
                "Pass budgets=dynmask.budgets.BUDGETS, or leave soft out.",
            )  # fmt: skip

    def _check_encoder(self) -> None:
        """Raise ValueError for what is said of an encoder and cannot be."""
        if self.teacher not in ("mass", "effect"):
            raise bad("settings.teacher", "'mass' or 'effect'", repr(self.teacher))
        if type(self.encoder) is not bool:
            raise bad("settings.encoder", "True or False", repr(self.encoder))
        if self.encoder and not any(budget.blocks for budget in self.budgets):
            raise bad(
                "settings.encoder", "a budget with blocks, which an encoder scores", "none",
                "Pass budgets=dynmask.budgets.WITH_BLOCKS.",
            )  # fmt: skip

    def policy(
        self,
        gates: Gates | None,
        promise: Tensor | None = None,
        encoders: tuple[BlockEncoder | None, ...] | None = None,
    ) -> Gated:
        """The policy with these gates, guarded where it is known what they kept."""
        return Gated(
            sinks=self.sinks,
            least=self.least,
            last=self.last,
            pool=self.pool,
            block=self.block,
            query_pool=self.query_pool,
            key_pool=self.key_pool,
            gates=gates,
            guard=None if promise is None else self.guard,
            promise=promise,
            encoders=encoders,
            soft=self.soft,
            strength=self.strength,
        )


_FIRST = ("max_kl", "density", "budgets", "judged", "late", "sinks", "least", "last", "pool")
BEFORE: dict[str, Any] = {
    item.name: None if item.name == "guard" else item.default
    for item in fields(GatedSettings)
    if item.name not in _FIRST
}
"""What cards that were made before a setting existed mean by not naming it."""


def settings_of(header: dict[str, Any]) -> GatedSettings:
    """The settings in a card's header; ValueError, TypeError or KeyError where they are none."""
    known = {f.name for f in fields(GatedSettings)}
    given = BEFORE | header
    return GatedSettings(**{name: given[name] for name in known})


def gated_of(
    card: MaskCard,
    decode: Literal["select", "keep"] = "select",
    dense_up_to: int = 0,
    **options: Any,
) -> Gated:
    """The policy of a gated card; ``guard`` in place of the card's own.

    A card that was made before there were guards promises nothing.
    """
    names = [item.name for item in fields(Gates) if item.name in card.tensors]
    gates = Gates(**{name: card.tensors[name] for name in names})
    settings = replace(settings_of(card.header["settings"]), **options)
    promise = card.header.get("least_mass")
    promise = None if promise is None else torch.tensor(promise, dtype=torch.float32)
    policy = settings.policy(gates, promise, _encoders_of(card, settings))
    return replace(policy, decode=decode, dense_up_to=dense_up_to, card=card)


def _encoders_of(card: MaskCard, settings: GatedSettings) -> tuple[BlockEncoder | None, ...] | None:
    """The encoders that a card holds, one for each layer that has one; None where it has none."""
    if not settings.encoder:
        return None
    encoders: list[BlockEncoder | None] = []
    for layer, kept in enumerate(card.header["encoder"]["kept"]):
        encoder = encoder_of(settings, card.header["model"]) if kept else None
        if encoder is not None:
            for name in ENCODER_TENSORS:
                getattr(encoder, name).data.copy_(card.tensors[f"layers.{layer}.{name}"])
            encoder.eval().requires_grad_(False)
        encoders.append(encoder)
    return tuple(encoders)


def choose_gates(
    maps: Sequence[tuple[int, int]],
    budgets: Sequence[Budget],
    allowed: float,
    cost: Callable[[Gates, float], float],
    gates: Gates,
) -> Gates:
    """Give every map the first budget that it can afford; the others stay as ``gates`` has them.

    Args:
        maps: (layer, head) of the maps that are offered budgets, those likely to be alike side by
            side: groups are halved in this order.
        budgets: the cheap first.
        allowed: cost of all maps together; a map's share is equal.
        cost: of gates as a whole, measured; where it is more than the second argument, any number
            above that does.
        gates: where to start from.

    Returns:
        Gates whose cost is at most ``allowed``, if that of ``gates`` is 0.
    """
    settled = 0
    waiting = list(maps)

    def offer(group: list[tuple[int, int]], budget: Budget) -> list[tuple[int, int]]:
        """Give the group the budget if it can afford it; return the maps that cannot."""
        nonlocal gates, settled
        if not group:
            return []
        chosen = torch.zeros_like(gates.dense)
        chosen[tuple(torch.tensor(group).T)] = True
        trial = gates.replaced(chosen, **asdict(budget))
        share = allowed * (settled + len(group)) / len(maps)
        if cost(trial, share) <= share:
            gates, settled = trial, settled + len(group)
            return []
        if len(group) == 1:
            return group
        half = len(group) // 2
        return offer(group[:half], budget) + offer(group[half:], budget)

    for budget in budgets:
        waiting = offer(waiting, budget)
    return gates


class Judge:
    """Measures the divergence of gates on the documents, and remembers what it measured."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Tensor],
        settings: GatedSettings,
        seed: int,
        judged: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.documents = [document.long() for document in documents]
        self.device = next(model.get_input_embeddings().parameters()).device
        self.rows = [
            self._judged(len(d), random.Random(f"{seed}/{i}")) if judged is None else judged[i]
            for i, d in enumerate(self.documents)
        ]
        self.encoders: tuple[BlockEncoder | None, ...] | None = None
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
        return self.settings.policy(gates, encoders=self.encoders)

    def prepare(self) -> None:
        """Run the full model once on every document; ValueError where it predicts nothing."""
        self.full = []
        for index, (document, rows) in enumerate(zip(self.documents, self.rows, strict=True)):
            self.full.append(self._predict(document, rows, None))
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
            rows = self.rows[index]
            found = self._predict(self.documents[index], rows, policy)
            mean = float(_divergence(found, self.full[index])) / len(rows)
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

    @torch.no_grad()
    def _predict(self, document: Tensor, rows: Tensor, policy: Any) -> Tensor:
        """Log-probabilities of what follows the judged tokens: float32 [rows, vocabulary]."""
        from contextlib import nullcontext

        from dynmask.integrations.transformers import sparsify

        with nullcontext() if policy is None else sparsify(self.model, policy):
            logits = self.model(
                input_ids=document[None].to(self.device),
                logits_to_keep=rows.to(self.device),
                use_cache=False,
            ).logits
        return logits[0].float().log_softmax(-1)


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
    """Density and kept mass of every map in each document: float64 [documents, layers, heads]."""
    from dynmask.integrations.transformers import sparsify

    meter = _Meter(policy, layers)
    with sparsify(judge.model, meter), torch.no_grad():
        for i in which:
            ids = judge.documents[i][None].to(judge.device)
            judge.model.base_model(input_ids=ids, use_cache=False)
    return tuple(
        torch.stack([torch.cat(found) for found in kind], 1).clamp(0, 1).cpu()
        for kind in (meter.density, meter.mass)
    )


def calibrate_gates(
    model: nn.Module,
    documents: Sequence[Tensor],
    settings: GatedSettings | None = None,
    *,
    seed: int = 0,
    judged: Sequence[Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MaskCard:
    """Choose the budgets of every map; ``dynmask.calibrate(policy="gated")`` calls this.

    Args:
        model: a causal language model of transformers that ``dynmask.sparsify`` takes, on any
            device, in any dtype. It stays as it is.
        documents: token ids, each a 1-D integer tensor, judged whole: texts like those that the
            model will read, with questions and answers at their ends if it will be asked. Of
            several lengths: a budget must do at each.
        settings: see `GatedSettings`.
        seed: chooses the judged tokens.
        judged: the positions of each document whose predictions are judged, int64, in place of
            the settings' choice: where an answer begins, say.
        checkpoint: a file of what was measured, written as it comes and read when it is there, so
            that an interrupted calibration goes on. Beside it, under the same name with
            ``.encoder``, lies the state of an encoder's training.
        progress: show a progress bar.

    Returns:
        A card of policy "gated". Its ``kl`` is measured with all gates at once, and so is its
        ``kl_hard`` without the bias, where ``settings.soft`` asks for one; ``density`` and
        ``kept_mass`` are those of the longest documents, ``least_mass`` is the kept mass of each
        map in that of all documents where it is least. With ``settings.encoder`` its parameters,
        for layers where they help, and ``encoder``: see
        :meth:`dynmask.encoder_training.EncoderTraining.judge`.

    Raises:
        ValueError: no documents or too short ones, bad settings, a model that cannot be
            sparsified, or a checkpoint of another run; before the model runs. A density that
            ``max_kl`` does not allow; when that is known.
    """
    from dynmask.calibrate import check_document, token_digest, vocabulary_of
    from dynmask.integrations.checks import check_model

    settings = settings or GatedSettings()
    if not isinstance(settings, GatedSettings):
        raise bad("settings", "GatedSettings", type(settings).__name__)
    if len(documents) == 0:
        raise bad("documents", "at least one", "an empty set", "Pass token ids to judge by.")
    vocabulary, positions, _ = vocabulary_of(model)
    for index, document in enumerate(documents):
        check_document(index, document, 2, vocabulary, "judged")
        if positions is not None and len(document) > positions:
            raise bad(
                f"documents[{index}]", f"at most the model's {positions} positions", len(document)
            )
    _check_judged(judged, documents)
    check_model(model)
    description = describe_model(model)
    layers, heads = description["layers"], description["heads"]
    identity = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "seed": seed,
        "model": description["fingerprint"],
        "data": token_digest(documents),
        "judged": None if judged is None else token_digest(judged),
    }
    judge = Judge(model, documents, settings, seed, judged)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        judge.known, judge.above = _known(path, identity)
    lessons = None
    if settings.encoder:
        lessons = EncoderTraining(model, judge.documents, settings, seed, description)
    longest = max(map(len, documents))
    which = [i for i, d in enumerate(documents) if len(d) == longest]
    training = [(module, module.training) for module in model.modules()]
    figures: dict[str, Any] = {}
    try:
        model.eval()
        judge.prepare()
        if lessons is not None:
            beside = None if path is None else path.with_name(f"{path.name}.encoder")
            lessons.run(beside, identity, progress)
            judge.encoders, figures = lessons.judge()
        with _Progress(judge, path, identity, progress) as cost:
            gates, allowed = _search(judge, cost, settings, which, layers, heads)
            kl = cost(gates, math.inf)
        hard = judge.divergence(replace(judge.policy(gates), soft=False)) if settings.soft else None
        density, mass = measure(judge, judge.policy(gates), range(len(documents)), layers)
    finally:
        for module, mode in training:
            module.training = mode
    import dynmask

    header = {
        "schema": SCHEMA,
        "version": dynmask.__version__,
        "policy": "gated",
        "settings": {**identity["settings"], "length": longest, "allowed": allowed},
        "model": description,
        "data": {
            "sha256": identity["data"],
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "seed": seed,
        },
        "kl": kl,
        **({} if hard is None else {"kl_hard": hard}),
        "trials": judge.trials,
        "density": density[which].mean(0).tolist(),
        "kept_mass": mass[which].mean(0).tolist(),
        "least_mass": mass.amin(0).tolist(),
    }
    tensors = {item.name: getattr(gates, item.name) for item in fields(gates)}
    if judge.encoders is not None:
        header["encoder"] = figures
        for layer, encoder in enumerate(judge.encoders):
            if encoder is not None:
                state = encoder.cpu().state_dict()
                tensors |= {f"layers.{layer}.{name}": state[name] for name in ENCODER_TENSORS}
    return MaskCard(header, tensors)


def _check_judged(judged: Sequence[Tensor] | None, documents: Sequence[Tensor]) -> None:
    """Raise ValueError unless there are positions of every document."""
    if judged is None:
        return
    if len(judged) != len(documents):
        raise bad("judged", f"positions for each of {len(documents)} documents", len(judged))
    for index, (rows, document) in enumerate(zip(judged, documents, strict=True)):
        good = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 1
        if not good or not len(rows) or rows.min() < 0 or rows.max() >= len(document):
            raise bad(
                f"judged[{index}]", f"int64 positions of {len(document)} tokens", repr(rows)[:80]
            )


def _search(
    judge: Judge,
    cost: Callable[[Gates, float], float],
    settings: GatedSettings,
    which: Sequence[int],
    layers: int,
    heads: int,
) -> tuple[Gates, float]:
    """The gates, and the divergence that was allowed for them."""
    full = Gates.full(layers, heads)
    first = full.replaced(full.dense, **asdict(settings.budgets[0]))
    # maps that the cheapest budget leaves most of their attention are tried together
    _, mass = measure(judge, judge.policy(first), which[:1], layers)
    maps = sorted(
        ((layer, head) for layer in range(layers) for head in range(heads)),
        key=lambda place: -float(mass[0][place]),
    )

    def at(allowed: float) -> Gates:
        return choose_gates(maps, settings.budgets, allowed, cost, full)

    allowed = settings.max_kl
    gates = at(allowed)
    if settings.density is None:
        return gates, allowed
    least, _ = measure(judge, judge.policy(gates), which, layers)
    if float(least.mean()) > settings.density:
        raise bad(
            "settings.density",
            f"at least {float(least.mean()):.4f}, which max_kl {allowed:g} allows",
            settings.density,
            "Raise max_kl, or offer cheaper budgets; a checkpoint keeps what was measured.",
        )
    # the smallest divergence whose gates are sparse enough, within a factor of 1.2
    low, high = settings.max_kl * 1e-4, settings.max_kl
    while high / low > 1.2:
        middle = math.sqrt(low * high)
        found = at(middle)
        density, _ = measure(judge, judge.policy(found), which, layers)
        if float(density.mean()) <= settings.density:
            gates, high = found, middle
        else:
            low = middle
    return gates, high


class _Progress:
    """The cost, with a progress bar of trials, and a journal that is written as they come."""

    def __init__(self, judge: Judge, path: Path | None, identity: Any, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.judge, self.path, self.identity = judge, path, identity
        self.bar = tqdm(desc="trials", unit="trial", disable=not shown)

    def __enter__(self) -> Callable[[Gates, float], float]:
        """Return the cost."""
        if self.path is not None:
            self._write()  # a path that cannot be written fails before the work
        return self._cost

    def __exit__(self, *error: object) -> None:
        """Leave the journal whole, also on Ctrl-C."""
        self.bar.close()
        if self.path is not None:
            self._write()

    def _cost(self, gates: Gates, most: float) -> float:
        before = self._measured()
        found = self.judge.cost(gates, most)
        self.bar.update()
        self.bar.set_postfix_str(f"kl {found:.4f}")
        if self.path is not None and self._measured() > before and self._measured() % 20 == 0:
            self._write()
        return found

    def _measured(self) -> int:
        """Gates of which something is known."""
        return len(self.judge.known) + len(self.judge.above)

    def _write(self) -> None:
        assert self.path is not None
        content = {
            _JOURNAL: 2, "identity": self.identity,
            "known": self.judge.known, "above": self.judge.above,
        }  # fmt: skip
        write_atomically(self.path, json.dumps(content).encode())


def read_journal(path: Path) -> tuple[Any, list[dict[str, float]]]:
    """Which calibration an earlier one was, what it measured, and what it knows to be above.

    Raises:
        ValueError: another file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = [
            {str(name): float(kl) for name, kl in content[kind].items()}
            for kind in ("known", "above")
        ]
        return content["identity"] if content[_JOURNAL] == 2 else None, known
    except Exception as error:
        raise unreadable(path, "a calibration of gates", error) from error


def _known(path: Path, identity: Any) -> list[dict[str, float]]:
    """What an earlier run of the same calibration measured, and what it knows to be above."""
    its, known = read_journal(path)
    if its != identity:
        raise bad(
            "checkpoint",
            "one of the same model, documents, settings and seed",
            f"{path}, which is of another run",
            "Delete it, or name another file.",
        )
    return known
