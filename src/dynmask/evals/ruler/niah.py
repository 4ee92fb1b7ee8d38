"""Needles in a haystack: facts hidden among lines, some of which are asked (section 3.1)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .base import DEPTHS, NOISE, Draft, Material, distinct, hide, listed

__all__ = ["Niah"]

HAYSTACKS = ("noise", "prose", "needles")
KINDS = {"numbers": "vault number", "uuids": "vault code"}
ONE = "A {kind} is noted somewhere in the lines below. Keep it in mind: it is asked for at the end."
MANY = (
    "There are {kind}s noted in the lines below. Keep them in mind: some are asked for at the end."
)
FACT = "In the register, {key} has the {kind} {value}."
ASK_ONE = (
    "Question: Which {kind} does the text above note for {keys}?\n"
    "Answer: The {kind} noted for {keys} in the text above is"
)
ASK_MANY = (
    "Question: Which {kind}s does the text above note for {keys}? Give all of them.\n"
    "Answer: The {kind}s noted for {keys} in the text above are"
)


@dataclass(frozen=True)
class Niah:
    """Keys with values, hidden at fixed depths of a haystack.

    The first asked fact goes through the 40 depths, item by item, so that 40 items meet each once;
    the others stand at depths drawn from the rest.

    Args:
        haystack: ``"noise"`` (one line again and again), ``"prose"``, or ``"needles"`` (other
            facts of the same form).
        keys: how many keys are hidden, those of a haystack of needles aside.
        values: how many values each key has.
        queries: how many of the keys are asked.
        key_kind: ``"words"`` (two, joined by a hyphen) or ``"uuids"``.
        value_kind: ``"numbers"`` (seven digits) or ``"uuids"``.
        new_tokens: how many tokens an answer may have.

    Raises:
        ValueError: on an unknown haystack or kind, or counts that do not go together.
    """

    haystack: str = "prose"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"
    new_tokens: int = 128

    def __post_init__(self) -> None:
        allowed = (HAYSTACKS, ("words", "uuids"), tuple(KINDS))
        names = ("haystack", "key_kind", "value_kind")
        for name, choices in zip(names, allowed, strict=True):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {choices}, received {getattr(self, name)!r}; "
                    "pass one of them"
                )
        if not 1 <= self.queries <= self.keys or not 1 <= self.values * self.keys <= len(DEPTHS):
            raise ValueError(
                f"expected 1 <= queries <= keys and 1 to {len(DEPTHS)} facts (keys x values), "
                f"received {self.queries} queries, {self.keys} keys and {self.values} values; "
                "hide at least the keys that are asked, and fewer facts than depths"
            )

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield one draft, whose unit is a line of the haystack."""
        kind = KINDS[self.value_kind]
        keys = distinct(_drawer(rng, self.key_kind, material))
        values = distinct(_drawer(rng, self.value_kind, material))
        shown = [next(keys) for _ in range(self.keys)]
        facts = [(key, next(values)) for key in shown for _ in range(self.values)]
        depths = _depths(rng, index, len(facts))
        sentences = [FACT.format(key=key, kind=kind, value=value) for key, value in facts]
        asked = shown[: self.queries]
        found = sorted(zip(depths, facts, strict=True))
        answers = [value for key in asked for _, (other, value) in found if other == key]
        lines = self._haystack(
            rng, material, lambda: FACT.format(key=next(keys), kind=kind, value=next(values))
        )
        single = len(answers) == 1
        told = {"kind": kind, "keys": listed(asked)}
        intro = (ONE if len(facts) == 1 and self.haystack != "needles" else MANY).format(**told)
        question = (ASK_ONE if single else ASK_MANY).format(**told)

        def build(count: int) -> str:
            places = [depth * count // 100 for depth in depths]
            shown = hide(lines(count), zip(places, sentences, strict=True))
            return "\n".join([intro, "", *shown, "", question])

        where = [depth / 100 for depth in depths[: len(answers)]]
        yield Draft(
            build,
            answers=tuple(answers),
            reply=f" {listed(answers)}.",
            meta={"keys": asked} | ({"depth": where[0]} if single else {"depths": where}),
            least=len(facts),
        )

    def _haystack(
        self, rng: random.Random, material: Material, distractor: Callable[[], str]
    ) -> Callable[[int], list[str]]:
        """Return what makes the first so many lines of the haystack."""
        if self.haystack == "noise":
            return lambda count: [NOISE] * count
        if self.haystack == "prose":
            prose = material.lines()
            start = rng.randrange(len(prose))
            return lambda count: [prose[(start + i) % len(prose)] for i in range(count)]
        lines: list[str] = []

        def needles(count: int) -> list[str]:
            lines.extend(distractor() for _ in range(count - len(lines)))
            return lines[:count]

        return needles


def _drawer(rng: random.Random, kind: str, material: Material) -> Callable[[], str]:
    """Return what draws a key or a value of a kind."""
    if kind == "words":
        return lambda: f"{material.word(rng)}-{material.word(rng)}"
    if kind == "numbers":
        return lambda: str(rng.randint(1_000_000, 9_999_999))
    return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _depths(rng: random.Random, index: int, count: int) -> list[int]:
    """Return different depths in percent; the first of them takes turns."""
    # 17 and 40 have no common factor: 40 items meet every depth, and few items spread over them.
    first = DEPTHS[17 * index % len(DEPTHS)]
    return [first, *rng.sample([depth for depth in DEPTHS if depth != first], count - 1)]
