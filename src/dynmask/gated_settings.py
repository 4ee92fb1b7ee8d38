"""How budgets of gates are chosen, and the policy that a card of them means."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynmask.card import MaskCard
from dynmask.card_kinds import ENCODER_TENSORS, MAX_HIDDEN, SCORES
from dynmask.encoder import BlockEncoder
from dynmask.encoder_training import encoder_of
from dynmask.errors import bad
from dynmask.policies.gated import Gated, Gates
from dynmask.policies.retained import modules_of


@dataclass(frozen=True)
class Budget:
    """What one map may read: see :class:`dynmask.policies.gated.Gates`."""

    window: int
    columns: int = 0
    share: float = 0.0
    blocks: int = 0
    kept: int = 0
    slashes: int = 0


BUDGETS = (
    Budget(128, 1024), Budget(256, 1024), Budget(512, 1024), Budget(128, 2048),
    Budget(512, 1024, 0.02), Budget(1024, 1024, 0.03), Budget(128, 4096), Budget(1024, 1024, 0.06),
    Budget(2048, 2048, 0.06), Budget(2048, 2048, 0.12), Budget(4096, 4096, 0.25),
)  # fmt: skip
"""What maps may read, the cheap first; beyond the last a map is dense. None has less than 128 keys
and 1,024 columns: what an input has no worthy keys for costs nothing, and a map that no document of
the calibration needed may be the one that the next input asks: with windows of 32 where documents
allowed them, other tasks lost a fifth of their answers (``docs/findings.md``)."""

BLOCK_BUDGETS = (
    Budget(128, blocks=8), Budget(128, blocks=16), Budget(256, blocks=32),
    Budget(512, blocks=32, share=0.06),
)  # fmt: skip
"""What maps may read that choose blocks."""

KEPT_BUDGETS = (Budget(128, kept=1024), Budget(128, kept=2048), Budget(512, kept=4096))
"""What maps may read that keep by score. None reads less than the cheapest of ``BUDGETS``, for the
same reason; and what is evicted cannot be asked for again."""

SLASH_BUDGETS = (
    Budget(128, 1024, slashes=128), Budget(128, 1024, slashes=512),
    Budget(512, 1024, slashes=2048),
)  # fmt: skip
"""What maps may read that choose diagonals beside columns."""


def reads(budget: Budget, keys: int = 65_536, block: int = 64) -> float:
    """Keys that a map reads of so many, at most; sinks are not counted."""
    fixed = budget.window + budget.columns + budget.kept + budget.blocks * block
    return fixed + budget.slashes + budget.share * keys


def offered(blocks: bool = False, kept: bool = False, slashes: bool = False) -> tuple[Budget, ...]:
    """``BUDGETS``, and with them those of blocks, kept keys or diagonals, as they are asked for.

    In the order of what a map may read of a long input; of those that read equally much one of kept
    keys comes first, because its memory can be freed, and then columns alone, one list for all.
    """
    more = (SLASH_BUDGETS if slashes else ()) + (BLOCK_BUDGETS if blocks else ())
    others = (KEPT_BUDGETS if kept else ()) + BUDGETS + more
    return tuple(sorted(others, key=reads)) if blocks or kept or slashes else BUDGETS


WITH_BLOCKS = offered(blocks=True)
"""Blocks beside columns."""

WITH_KEPT = offered(kept=True)
"""Keys that score heads keep beside columns; ``calibrate_gates`` needs their card then."""

WITH_SLASHES = offered(slashes=True)
"""Diagonals beside columns."""


@dataclass(frozen=True)
class GatedSettings:
    """How budgets are chosen.

    Args:
        max_kl: the divergence allowed at a judged token, mean over them, in nats; on the
            documents whose mean is the largest.
        density: choose the smallest divergence that keeps the density, on the longest documents,
            at or below this; ``max_kl`` is then the largest that is tried.
        budgets: what a map may read, the cheap first. Those of kept keys are offered to all query
            heads of a kv head together: its keys are freed where none of them reads more.
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
        soft, strength: of the policy; columns alone can be soft, so budgets must have no blocks and
            no diagonals. The card's ``kl_hard`` is then the divergence of the same gates without.
        decode: under what ``decode`` of the policy answers are judged, and what the card's policy
            decodes with unless it is told otherwise. Under "full" an answer costs nothing that maps
            have evicted after the prompt. Under the others it is read token by token, and the
            calibration must be told what is answer (``decoded`` of
            :func:`dynmask.budgets.calibrate_gates`).

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
    decode: Literal["full", "select", "keep"] = "full"

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
            sizes = (size for name, size in asdict(budget).items() if name != "share")
            if any(type(size) is not int for size in sizes):
                raise bad("settings.budgets", "whole numbers of keys", repr(budget)[:80])
        self._check_encoder()
        if self.decode not in ("full", "select", "keep"):
            raise bad("settings.decode", "'full', 'select' or 'keep'", repr(self.decode)[:40])
        if self.guard is not None and (
            type(self.guard) not in (int, float) or not 0 <= self.guard <= 1
        ):
            raise bad("settings.guard", "a share from 0 to 1, or None", repr(self.guard))
        for budget in budgets:
            Gates.full(1, 1).replaced(torch.ones(1, 1, dtype=torch.bool), **asdict(budget))
        self._check_soft()
        replace(self.policy(None, torch.ones(1, 1)), decode=self.decode)

    def _check_soft(self) -> None:
        """Raise ValueError for soft masks where they cannot be."""
        if type(self.soft) is not bool:
            raise bad("settings.soft", "True or False", repr(self.soft))
        if type(self.strength) not in (int, float) or not 0 <= self.strength < 1e300:
            raise bad("settings.strength", "a finite number of at least 0", repr(self.strength))
        if self.soft and any(budget.blocks or budget.slashes for budget in self.budgets):
            raise bad(
                "settings.soft", "budgets without blocks and diagonals, which have no bias",
                "some with",
                "Offer columns alone (dynmask.budgets.BUDGETS), or leave soft out.",
            )  # fmt: skip
        if self.soft and self.decode == "keep":
            raise bad(
                "settings.soft", "decode='full' or 'select', which remember no columns", "'keep'",
                "Leave one of the two out.",
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

    @property
    def keeps(self) -> bool:
        """Whether some budget keeps by score."""
        return any(budget.kept for budget in self.budgets)

    def policy(
        self,
        gates: Gates | None,
        promise: Tensor | None = None,
        encoders: tuple[BlockEncoder | None, ...] | None = None,
        scores: tuple[nn.Module | None, ...] | None = None,
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
            scores=scores,
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
    decode: Literal["full", "select", "keep"] | None = None,
    dense_up_to: int = 0,
    **options: Any,
) -> Gated:
    """The policy of a gated card; ``decode`` and ``options`` in place of its own.

    Args:
        card: of policy "gated".
        decode: see :class:`dynmask.policies.gated.Gated`; the card's own when None.
        dense_up_to: see there.
        **options: ``guard``, ``soft`` and ``strength``, see there.

    Raises:
        ValueError: an option out of range, one that the card's maps rule out, or one without
            effect: a guard of a card that was made before there were guards and promises nothing,
            a strength without a bias.
    """
    names = [item.name for item in fields(Gates) if item.name in card.tensors]
    gates = Gates(**{name: card.tensors[name] for name in names})
    given = settings_of(card.header["settings"])
    try:
        settings = replace(given, decode="full", **options)
    except ValueError as error:  # it was an option of the policy that did not fit
        raise ValueError(f"gated: {str(error).removeprefix('settings.')}") from None
    promise = card.header.get("least_mass")
    if promise is None and options.get("guard") is not None:
        raise bad(
            "gated: guard", "a card that says what its maps kept", "one without", "Leave guard out."
        )
    if "strength" in options and not settings.soft:
        raise bad(
            "gated: strength", "soft masks, of whose bias it is the factor", "none",
            "Ask for soft as well, or leave strength out.",
        )  # fmt: skip
    promise = None if promise is None else torch.tensor(promise, dtype=torch.float32)
    scores = None
    if "scores" in card.header:
        told, prefix = card.header["scores"], f"{SCORES}."
        named = {n.removeprefix(prefix): t for n, t in card.tensors.items() if n.startswith(prefix)}
        scores = modules_of(told, card.header["model"], named, told["layers"])
    policy = settings.policy(gates, promise, _encoders_of(card, settings), scores)
    decode = given.decode if decode is None else decode
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
