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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.card import SCHEMA, MaskCard, describe_model, write_atomically
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


BUDGETS = (
    Budget(32), Budget(128), Budget(64, 32), Budget(128, 128), Budget(256, 256),
    Budget(512, 512), Budget(1024, 1024, 0.03),
)  # fmt: skip
"""Offered in this order: what a map may read, the cheap first. Beyond the last a map is dense."""


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
        sinks, least, last, pool: of the policy, see :class:`dynmask.policies.gated.Gated`.

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
    last: int = 64
    pool: int = 1

    def __post_init__(self) -> None:
        given: Any = self.budgets  # a card gives lists of numbers
        budgets = tuple(b if isinstance(b, Budget) else Budget(**b) for b in given)
        object.__setattr__(self, "budgets", budgets)
        if not budgets:
            raise bad("settings.budgets", "at least one", "none")
        for name in ("max_kl", "late", "density"):
            value = getattr(self, name)
            if name == "density" and value is None:
                continue
            top = math.inf if name == "max_kl" else 1
            good = type(value) in (int, float) and math.isfinite(value) and 0 <= value <= top
            if not good or (value == 0 and name != "late"):
                raise bad(f"settings.{name}", "a number above 0, shares up to 1", repr(value))
        if type(self.judged) is not int or self.judged < 1:
            raise bad("settings.judged", "a whole number of at least 1", repr(self.judged))
        for budget in budgets:
            Gates.full(1, 1).replaced(torch.ones(1, 1, dtype=torch.bool), **asdict(budget))
        self.policy(None)

    def policy(self, gates: Gates | None) -> Gated:
        """The policy with these gates."""
        return Gated(
            sinks=self.sinks, least=self.least, last=self.last, pool=self.pool, gates=gates
        )


def settings_of(header: dict[str, Any]) -> GatedSettings:
    """The settings in a card's header; ValueError, TypeError or KeyError where they are none."""
    known = {f.name for f in fields(GatedSettings)}
    return GatedSettings(**{name: header[name] for name in known})


def gated_of(card: MaskCard) -> Gated:
    """The policy of a gated card."""
    gates = Gates(**{name: card.tensors[name] for name in ("window", "columns", "share")})
    return settings_of(card.header["settings"]).policy(gates)


def choose_gates(
    maps: Sequence[tuple[int, int]],
    budgets: Sequence[Budget],
    allowed: float,
    cost: Callable[[Gates], float],
    gates: Gates,
) -> Gates:
    """Give every map the first budget that it can afford; the others stay as ``gates`` has them.

    Args:
        maps: (layer, head) of the maps that are offered budgets, those likely to be alike side by
            side: groups are halved in this order.
        budgets: the cheap first.
        allowed: cost of all maps together; a map's share is equal.
        cost: of gates as a whole, measured.
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
        if cost(trial) <= allowed * (settled + len(group)) / len(maps):
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
        self.known: dict[str, float] = {}
        self.trials = 0
        self.full: list[Tensor] = []

    def _judged(self, length: int, rng: random.Random) -> Tensor:
        """Positions of the judged tokens of a document, ascending."""
        count = min(self.settings.judged, length)
        late = min(math.ceil(self.settings.late * count), count)
        early = sorted(rng.sample(range(length - late), min(count - late, length - late)))
        return torch.tensor([*early, *range(length - late, length)])

    def prepare(self) -> None:
        """Run the full model once on every document."""
        self.full = [
            self._predict(document, rows, None)
            for document, rows in zip(self.documents, self.rows, strict=True)
        ]

    def cost(self, gates: Gates) -> float:
        """Divergence of gates: the largest of the documents' means over judged tokens, in nats."""
        name = digest_of(gates)
        if name not in self.known:
            policy = self.settings.policy(gates)
            worst = 0.0
            for document, rows, full in zip(self.documents, self.rows, self.full, strict=True):
                found = self._predict(document, rows, policy)
                kl = torch.nn.functional.kl_div(found, full, log_target=True, reduction="sum")
                worst = max(worst, float(kl) / len(rows))
            self.known[name] = worst
        self.trials += 1
        return self.known[name]

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


def digest_of(gates: Gates) -> str:
    """A name of gates: the same numbers, the same name."""
    parts = (gates.window, gates.columns, gates.share)
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
    """Density and kept mass of every map, means over documents: float64 [layers, heads] each."""
    from dynmask.integrations.transformers import sparsify

    meter = _Meter(policy, layers)
    with sparsify(judge.model, meter), torch.no_grad():
        for i in which:
            ids = judge.documents[i][None].to(judge.device)
            judge.model.base_model(input_ids=ids, use_cache=False)
    return tuple(
        torch.stack([torch.cat(found).mean(0) for found in kind]).clamp(0, 1).cpu()
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
            that an interrupted calibration goes on.
        progress: show a progress bar.

    Returns:
        A card of policy "gated". Its ``kl`` is measured with all gates at once; ``density`` and
        ``kept_mass`` are those of the longest documents.

    Raises:
        ValueError: no documents or too short ones, bad settings, a model that cannot be
            sparsified, or a checkpoint of another run; before the model runs.
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
        judge.known = _read_journal(path, identity)
    longest = max(map(len, documents))
    which = [i for i, d in enumerate(documents) if len(d) == longest]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        judge.prepare()
        with _Progress(judge, path, identity, progress) as cost:
            gates, allowed = _search(judge, cost, settings, which, layers, heads)
            kl = cost(gates)
        density, mass = measure(judge, settings.policy(gates), which, layers)
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
        "trials": judge.trials,
        "density": density.tolist(),
        "kept_mass": mass.tolist(),
    }
    tensors = {"window": gates.window, "columns": gates.columns, "share": gates.share}
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
    cost: Callable[[Gates], float],
    settings: GatedSettings,
    which: Sequence[int],
    layers: int,
    heads: int,
) -> tuple[Gates, float]:
    """The gates, and the divergence that was allowed for them."""
    full = Gates.full(layers, heads)
    first = full.replaced(full.dense, **asdict(settings.budgets[0]))
    # maps that the cheapest budget leaves most of their attention are tried together
    _, mass = measure(judge, settings.policy(first), which[:1], layers)
    maps = sorted(
        ((layer, head) for layer in range(layers) for head in range(heads)),
        key=lambda place: -float(mass[place]),
    )

    def at(allowed: float) -> Gates:
        return choose_gates(maps, settings.budgets, allowed, cost, full)

    allowed = settings.max_kl
    gates = at(allowed)
    if settings.density is None:
        return gates, allowed
    # the smallest divergence whose gates are sparse enough, within a factor of 1.2
    low, high = settings.max_kl * 1e-4, settings.max_kl
    while high / low > 1.2:
        middle = math.sqrt(low * high)
        found = at(middle)
        density, _ = measure(judge, settings.policy(found), which, layers)
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

    def __enter__(self) -> Callable[[Gates], float]:
        """Return the cost."""
        if self.path is not None:
            self._write()  # a path that cannot be written fails before the work
        return self._cost

    def __exit__(self, *error: object) -> None:
        """Leave the journal whole, also on Ctrl-C."""
        self.bar.close()
        if self.path is not None:
            self._write()

    def _cost(self, gates: Gates) -> float:
        fresh = digest_of(gates) not in self.judge.known
        found = self.judge.cost(gates)
        self.bar.update()
        self.bar.set_postfix_str(f"kl {found:.4f}")
        if fresh and self.path is not None and len(self.judge.known) % 20 == 0:
            self._write()
        return found

    def _write(self) -> None:
        assert self.path is not None
        content = {_JOURNAL: 1, "identity": self.identity, "known": self.judge.known}
        write_atomically(self.path, json.dumps(content).encode())


def _read_journal(path: Path, identity: Any) -> dict[str, float]:
    """What an earlier run of the same calibration measured."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ours = content[_JOURNAL] == 1
        known = {str(name): float(kl) for name, kl in content["known"].items()}
        same = content["identity"] == identity
    except Exception as error:
        raise bad(
            "checkpoint",
            "a file that a calibration of gates left",
            f"{path}, which cannot be read ({type(error).__name__})",
            "Delete it, or name another file.",
        ) from error
    if not ours or not same:
        raise bad(
            "checkpoint",
            "one of the same model, documents, settings and seed",
            f"{path}, which is of another run",
            "Delete it, or name another file.",
        )
    return known
