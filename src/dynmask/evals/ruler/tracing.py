"""Variable tracking: a value handed from variable to variable, in noise (section 3.2)."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

from .base import NOISE, Draft, Material, distinct, hide

__all__ = ["Tracing"]

INTRO = "The text below sets variables, some of them to what another one holds. Keep track of them."
ASSIGNMENT = "SET {name} = {what}"
QUESTION = (
    "Question: Which variables hold the value {value} after the text above? Name all of them.\n"
    "Answer: By the assignments in the text above, the {count} variables with the value {value} are"
)
# The example has names of three letters, the question names of five, as published.
EXAMPLE_LETTERS, LETTERS = 3, 5
EXAMPLE_NOISE = 10


@dataclass(frozen=True)
class Tracing:
    """Chains of assignments in noise; all variables of the first chain are asked.

    A worked example of the same form stands before it. The assignments of a chain stand in order,
    with noise between them.

    Args:
        chains: how many chains there are, each with a value of its own.
        hops: how often a chain's value is handed on; it has ``hops + 1`` variables.
        new_tokens: how many tokens an answer may have.

    Raises:
        ValueError: if there is no chain or no hop.
    """

    chains: int = 1
    hops: int = 4
    new_tokens: int = 30

    def __post_init__(self) -> None:
        if self.chains < 1 or self.hops < 1:
            raise ValueError(
                f"expected at least 1 chain and 1 hop, received {self.chains} and {self.hops}; "
                "pass chains=1, hops=4 for the published task"
            )

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield one draft, whose unit is a line of noise."""
        values = distinct(lambda: str(rng.randint(10_000, 99_999)))
        shown = self._puzzle(rng, material, values, EXAMPLE_LETTERS)
        puzzle = self._puzzle(rng, material, values, LETTERS)
        example = shown.build(EXAMPLE_NOISE) + shown.reply

        def build(count: int) -> str:
            return f"{example}\n\n{puzzle.build(count)}"

        yield Draft(build, puzzle.answers, puzzle.reply, puzzle.meta, puzzle.least)

    def _puzzle(
        self, rng: random.Random, material: Material, values: Iterator[str], letters: int
    ) -> Draft:
        """Return one text with its question, whose unit is a line of noise."""
        names = distinct(lambda: material.letters(rng, string.ascii_uppercase, letters))
        chains = [[next(names) for _ in range(self.hops + 1)] for _ in range(self.chains)]
        held = [next(values) for _ in chains]
        question = QUESTION.format(value=held[0], count=self.hops + 1)
        salt = rng.random()

        def build(count: int) -> str:
            places = random.Random(salt)
            told: list[tuple[int, str]] = []
            for chain, value in zip(chains, held, strict=True):
                where = sorted(places.sample(range(max(count, len(chain))), len(chain)))
                for place, name, what in zip(where, chain, [value, *chain], strict=False):
                    told.append((min(place, count), ASSIGNMENT.format(name=name, what=what)))
            return "\n".join([INTRO, "", *hide([NOISE] * count, told), question])

        answers = tuple(chains[0])
        return Draft(build, answers, " " + " ".join(answers), {"value": held[0]}, len(answers))
