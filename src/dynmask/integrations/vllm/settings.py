"""What is asked for: by the environment, or by ``--additional-config``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...attention import IMPLS
from ...errors import bad

CARD, POLICY, IMPL = "DYNMASK_CARD", "DYNMASK_POLICY", "DYNMASK_IMPL"
PHASE = "DYNMASK_PHASE"
"""Environment variables."""

SECTION = "dynmask"
"""Name in ``--additional-config``, whose entries are card, policy, impl and phase."""

PHASES = ("both", "prefill")
"""When a policy is asked: whenever it has a choice to make, or for prompts alone."""

SUPPORTED_IMPLS = tuple(name for name in IMPLS if name != "sdpa")


@dataclass(frozen=True)
class Settings:
    """A policy by its text form, and how it is computed.

    Args:
        policy: as on the command line, ``streaming:sinks=4,window=1024`` or ``gated:FOLDER``.
        impl: implementation of ``dynmask.attention``.
        phase: "both" leaves it to the policy what is chosen for; with "prefill" decoded tokens
            read every key whatever the policy.
    """

    policy: str
    impl: str = "auto"
    phase: str = "both"

    @classmethod
    def of(
        cls, additional: object = None, environment: Mapping[str, str] | None = None
    ) -> Settings | None:
        """What ``--additional-config`` says, or else the environment; None where neither does.

        Raises:
            ValueError: a card beside a policy, an unknown name, or a card that cannot be read.
        """
        environment = os.environ if environment is None else environment
        given: Any = additional.get(SECTION) if isinstance(additional, Mapping) else None
        source = f"--additional-config {SECTION}"
        names = {key: f"{source} {key}" for key in ("card", "policy", "impl", "phase")}
        of_environment = given is None
        if of_environment:
            names = {"card": CARD, "policy": POLICY, "impl": IMPL, "phase": PHASE}
            given = {k: environment[v] for k, v in names.items() if environment.get(v)}
            source = f"{CARD}, {POLICY}"
        if not isinstance(given, Mapping) or not all(
            key in names and isinstance(text, str) for key, text in given.items()
        ):
            raise bad(
                source, f"texts named {', '.join(names)}", repr(given),
                "For example {\"dynmask\": {\"card\": \"FOLDER\"}}.",
            )  # fmt: skip
        card, policy = given.get("card"), given.get("policy")
        if card and policy:
            raise bad(
                source, "a card or a policy", "both", "A policy may name its card: dam:FOLDER."
            )
        if not card and not policy:
            if given and not of_environment:  # the environment's is not read beside it
                raise bad(source, "a card or a policy beside the rest", repr(given))
            return None
        impl = given.get("impl", "auto")
        if impl not in SUPPORTED_IMPLS:
            raise bad(names["impl"], f"one of {', '.join(SUPPORTED_IMPLS)}", repr(impl))
        phase = given.get("phase", "both")
        if phase not in PHASES:
            raise bad(names["phase"], f"one of {', '.join(PHASES)}", repr(phase))
        return cls(policy or policy_of_card(str(card)), impl, phase)


def policy_of_card(path: str) -> str:
    """The text form of a card's policy; ValueError for a card that cannot be read."""
    from ...card import MaskCard

    return f"{MaskCard.from_pretrained(path).header['policy']}:{path}"


__all__ = ["CARD", "IMPL", "PHASE", "POLICY", "SECTION", "Settings", "policy_of_card"]
