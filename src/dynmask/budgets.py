"""Budgets from effect: the gates of a frozen model, chosen by what they cost its predictions.

Attention mass is a poor price: diffuse heads hold much of it and matter little. Here a budget is
paid for in the divergence of the model's own next-token distribution, KL(full || gated), at judged
tokens of calibration documents. The cheapest budget is offered to all maps (layer x head) first,
to whole groups of them at a time: a group whose joint cost is within its share of what the user
allows takes the budget, another one is halved and tried again. What no map of a group of one can
afford is offered again at the next, wider budget. So effects are measured together, as they will
act, and a model with few heads that matter needs few trials. Budgets that keep by score are offered
to the query heads of a kv head together: only where all of them evict is memory freed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.card import MaskCard
from dynmask.card_file import SCHEMA
from dynmask.card_kinds import ENCODER_TENSORS, SCORES, slashes_in
from dynmask.documents import check_document, token_digest, vocabulary_of
from dynmask.encoder_training import EncoderTraining
from dynmask.errors import bad
from dynmask.fingerprints import describe_model
from dynmask.gated_settings import (
    BLOCK_BUDGETS,
    BUDGETS,
    KEPT_BUDGETS,
    SLASH_BUDGETS,
    WITH_BLOCKS,
    WITH_KEPT,
    WITH_SLASHES,
    Budget,
    GatedSettings,
    offered,
)
from dynmask.judge import Judge, measure
from dynmask.policies.gated import Gates
from dynmask.trials import Trials, known_of

__all__ = [
    "BLOCK_BUDGETS", "BUDGETS", "KEPT_BUDGETS", "SLASH_BUDGETS", "WITH_BLOCKS", "WITH_KEPT",
    "WITH_SLASHES", "Budget", "GatedSettings", "calibrate_gates", "choose_gates", "offered",
]  # fmt: skip


def choose_gates(
    maps: Sequence[tuple[int, int]],
    budgets: Sequence[Budget],
    allowed: float,
    cost: Callable[[Gates, float], float],
    gates: Gates,
    members: int = 1,
    scored: Sequence[bool] | None = None,
) -> Gates:
    """Give every map the first budget that it can afford; the others stay as ``gates`` has them.

    A budget of kept keys is offered to kv heads none of whose maps has one yet.

    Args:
        maps: (layer, head) of the maps that are offered budgets, those likely to be alike side by
            side: groups are halved in this order.
        budgets: the cheap first.
        allowed: cost of all maps together; a map's share is equal.
        cost: of gates as a whole, measured; where it is more than the second argument, any number
            above that does.
        gates: where to start from.
        members: query heads of a kv head.
        scored: for each layer whether its keys have scores to keep by; all when None.

    Returns:
        Gates whose cost is at most ``allowed``, if that of ``gates`` is 0.
    """
    settled = 0
    waiting = list(maps)

    def offer(group: list[list[tuple[int, int]]], budget: Budget) -> None:
        """Give units of maps the budget if together they can afford it, or each half by itself."""
        nonlocal gates, settled, waiting
        if not group:
            return
        own = [place for unit in group for place in unit]
        chosen = torch.zeros_like(gates.dense)
        chosen[tuple(torch.tensor(own).T)] = True
        trial = gates.replaced(chosen, **asdict(budget))
        share = allowed * (settled + len(own)) / len(maps)
        if cost(trial, share) <= share:
            gates, settled = trial, settled + len(own)
            waiting = [place for place in waiting if place not in own]
        elif len(group) > 1:
            half = len(group) // 2
            offer(group[:half], budget)
            offer(group[half:], budget)

    for budget in budgets:
        units = [[place] for place in waiting]
        if budget.kept:
            units = _kv_heads(waiting, members)
            units = [unit for unit in units if scored is None or scored[unit[0][0]]]
        offer(units, budget)
    return gates


def _kv_heads(maps: Sequence[tuple[int, int]], members: int) -> list[list[tuple[int, int]]]:
    """Maps by the kv head that they share; those of kv heads some of whose maps are not there."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for layer, head in maps:
        found.setdefault((layer, head // members), []).append((layer, head))
    return [unit for unit in found.values() if len(unit) == members]


def calibrate_gates(
    model: nn.Module,
    documents: Sequence[Tensor],
    settings: GatedSettings | None = None,
    *,
    seed: int = 0,
    judged: Sequence[Tensor] | None = None,
    decoded: Sequence[int] | None = None,
    scores: MaskCard | None = None,
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
        decoded: tokens at the end of each document that come after its prompt: of an answer all
            but the last, which nobody reads. The gates are for prompts, so these read every key,
            as they do when they are decoded, or what the settings' ``decode`` says. None at all by
            default; a ``decode`` other than "full" needs some.
        scores: a retained card of the same model, whose score heads say what maps keep; needed by
            budgets of kept keys, and for those alone.
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
        :meth:`dynmask.encoder_training.EncoderTraining.judge`. With ``scores`` the score modules of
        layers where a map keeps by them.

    Raises:
        ValueError: no documents or too short ones, bad settings, a ``decode`` that nothing is
            judged under, a model that cannot be sparsified, scores of another model, or a
            checkpoint of another run; before the model runs. A density that ``max_kl`` does not
            allow; when that is known.
    """
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
    _check_decoded(decoded, documents)
    _check_decode(settings, decoded)
    check_model(model)
    modules = _modules_of(scores, settings, model)
    description = describe_model(model)
    layers = description["layers"]
    identity = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "seed": seed,
        "model": description["fingerprint"],
        "data": token_digest(documents),
        "judged": None if judged is None else token_digest(judged),
        **({} if decoded is None else {"decoded": [int(count) for count in decoded]}),
        **({} if scores is None else {"scores": scores.digest}),
    }
    judge = Judge(model, documents, settings, seed, judged, decoded)
    if modules is not None:  # placed once, not in every trial
        judge.scores = tuple(None if m is None else m.to(judge.device) for m in modules)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        judge.known, judge.above = known_of(path, identity)
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
        with Trials(judge, path, identity, progress) as cost:
            gates, allowed = _search(judge, cost, settings, which, description)
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
        "judged": sum(map(len, judge.rows)),
        "decoded": sum(judge.decoded),
        "density": density[which].mean(0).tolist(),
        "kept_mass": mass[which].mean(0).tolist(),
        "least_mass": mass.amin(0).tolist(),
    }
    tensors = {item.name: getattr(gates, item.name) for item in fields(gates)}
    # a card without score heads has no table of what they keep, as before there were any
    if not any(gates.keeping):
        tensors.pop("kept")
    if not slashes_in(header["settings"]):
        tensors.pop("slashes")
    if judge.encoders is not None:
        header["encoder"] = figures
        for layer, encoder in enumerate(judge.encoders):
            if encoder is not None:
                state = encoder.cpu().state_dict()
                tensors |= {f"layers.{layer}.{name}": state[name] for name in ENCODER_TENSORS}
    if scores is not None and "kept" in tensors:
        own = list(gates.keeping)
        told = scores.header["settings"]
        origin = {
            "name": scores.source, "sha256": identity["scores"],
            "version": scores.header["version"],
            **{name: scores.header["data"][name] for name in ("documents", "tokens")},
        }  # fmt: skip
        header[SCORES] = {
            "head": told["head"], "hidden": told["hidden"], "layers": own, "origin": origin,
        }  # fmt: skip
        for name, tensor in scores.tensors.items():
            place = name.removeprefix("layers.")
            if own[int(place.partition(".")[0])]:
                tensors[f"{SCORES}.{place}"] = tensor
    return MaskCard(header, tensors)


def _modules_of(
    scores: MaskCard | None, settings: GatedSettings, model: nn.Module
) -> tuple[nn.Module | None, ...] | None:
    """The score modules of a card; ValueError for one of no use, or where one is missing."""
    if scores is None:
        if settings.keeps:
            raise bad(
                "scores", "a retained card of this model, for budgets that keep by score", "none",
                "Make one with dynmask calibrate --policy retained.",
            )  # fmt: skip
        return None
    if not isinstance(scores, MaskCard) or scores.header["policy"] != "retained":
        got = f"one of {scores.header['policy']!r}" if isinstance(scores, MaskCard) else scores
        raise bad("scores", "a card of policy 'retained'", str(got)[:80])
    if not settings.keeps:
        raise bad(
            "scores", "budgets that keep by score", "none",
            "Pass budgets=dynmask.budgets.WITH_KEPT.",
        )  # fmt: skip
    if scores.header["settings"]["head"] != "pair":
        raise bad(
            "scores", "score heads that read keys and values of their kv head (head='pair')",
            f"head={scores.header['settings']['head']!r}", "Calibrate with --head pair.",
        )  # fmt: skip
    scores.check(model)
    return scores.policy().modules


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


def _check_decoded(decoded: Sequence[int] | None, documents: Sequence[Tensor]) -> None:
    """Raise ValueError unless every document has a prompt before what was decoded."""
    if decoded is None:
        return
    if len(decoded) != len(documents):
        raise bad("decoded", f"a number for each of {len(documents)} documents", len(decoded))
    for index, (count, document) in enumerate(zip(decoded, documents, strict=True)):
        if type(count) is not int or not 0 <= count < len(document):
            raise bad(
                f"decoded[{index}]", f"a whole number below its {len(document)} tokens", repr(count)
            )


def _check_decode(settings: GatedSettings, decoded: Sequence[int] | None) -> None:
    """Raise ValueError for a way of decoding that no token is judged under.

    The card would decode so, and its divergence would say nothing about it.
    """
    if settings.decode != "full" and not any(decoded or ()):
        raise bad(
            "settings.decode", "some tokens that were decoded (decoded=), to be judged under it",
            f"{settings.decode!r} and documents that are prompts as a whole",
            "Pass decoded to dynmask.budgets.calibrate_gates, or leave decode out and ask the "
            f"card for it, unjudged: card.policy(decode={settings.decode!r}).",
        )  # fmt: skip


def _search(
    judge: Judge,
    cost: Callable[[Gates, float], float],
    settings: GatedSettings,
    which: Sequence[int],
    model: Mapping[str, int],
) -> tuple[Gates, float]:
    """The gates, and the divergence that was allowed for them, of a ``model`` of this shape."""
    layers, heads = model["layers"], model["heads"]
    full = Gates.full(layers, heads)
    scored = [module is not None for module in judge.scores or [None] * layers]
    some = full.dense
    if settings.budgets[0].kept:
        some = some & torch.tensor(scored)[:, None]
    first = full.replaced(some, **asdict(settings.budgets[0]))
    # maps that the cheapest budget leaves most of their attention are tried together
    _, mass = measure(judge, judge.policy(first), which[:1], layers)
    maps = sorted(
        ((layer, head) for layer in range(layers) for head in range(heads)),
        key=lambda place: -float(mass[0][place]),
    )

    def at(allowed: float) -> Gates:
        members = heads // model["kv_heads"]
        return choose_gates(maps, settings.budgets, allowed, cost, full, members, scored)

    allowed = settings.max_kl
    gates = at(allowed)
    if settings.density is None:
        return gates, allowed
    least, _ = measure(judge, judge.policy(gates), which, layers)
    if float(least.mean()) > settings.density:
        remedy = "Raise max_kl; a checkpoint keeps what was measured."
        names = (item.name for item in fields(gates))
        if all(torch.equal(getattr(gates, name), getattr(first, name)) for name in names):
            remedy = (
                "Every map has the cheapest budget already: judge longer documents, of which it "
                "reads less, or offer cheaper budgets."
            )
        raise bad(
            "settings.density",
            f"at least {float(least.mean()):.4f}, which max_kl {allowed:g} allows",
            settings.density,
            remedy,
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
