"""Counting words: which come most often in a long list (section 3.3)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .base import Draft, Material, distinct, listed

__all__ = ["CommonWords", "FrequentWords"]

COMMON_INTRO = (
    "Here are words, each with its place in the list. A few of them come back far more often than "
    "the others; keep those in mind."
)
COMMON_QUESTION = (
    "Question: Which {count} words come back most often in the list above?\n"
    "Answer: The {count} words that come back most often in the list above are:"
)
CODED_INTRO = (
    "The words below are written in a code. Keep count of how often each of them comes; the dots "
    "between them mean nothing."
)
CODED_QUESTION = (
    "Question: Leaving out the dots, which {count} words of the code come most often above?\n"
    "Answer: The {count} words of the code that come most often above are"
)
DOTS = "..."


class Form(NamedTuple):
    """How often words of a list and of its example come, and from which length on."""

    shortest: int
    common: int
    rest: int
    example_words: int
    example_common: int
    example_rest: int


# The published forms for 4,096 tokens and more and for less; the last is ours, for tokenizers of
# few entries at 1,024 tokens, where the published ones have no room.
FORMS = (Form(4096, 30, 3, 40, 10, 3), Form(0, 6, 1, 20, 3, 1), Form(0, 3, 1, 15, 2, 1))
# With fewer other words than this the common ones are found without counting.
LEAST = 10


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which some words come several times as often as the others; name them.

    A worked example stands before it. Which form was written is in ``meta["times"]``: how often
    a common and another word come.

    Args:
        common: how many words are common.
        new_tokens: how many tokens an answer may have.
    """

    common: int = 10
    new_tokens: int = 120

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield the forms for ``length``; a unit is one word that is not common."""
        for form in FORMS:
            if length >= form.shortest:
                yield self._draft(rng, form, material)

    def _draft(self, rng: random.Random, form: Form, material: Material) -> Draft:
        example = self._list(rng, form.example_common, form.example_rest, material)
        puzzle = self._list(rng, form.common, form.rest, material)
        shown = example.build(form.example_words - self.common) + example.reply

        def build(count: int) -> str:
            return f"{shown}\n\n{puzzle.build(count)}"

        meta = {"times": [form.common, form.rest]}
        return Draft(build, puzzle.answers, puzzle.reply, meta, least=LEAST)

    def _list(self, rng: random.Random, common: int, rest: int, material: Material) -> Draft:
        """Return one list with its question, whose unit is one word that is not common."""
        words = distinct(lambda: material.word(rng), apart=self.common)
        answers = tuple(next(words) for _ in range(self.common))
        others: list[str] = []
        salt = rng.random()
        question = COMMON_QUESTION.format(count=self.common)

        def build(count: int) -> str:
            others.extend(next(words) for _ in range(count - len(others)))
            shown = [*answers] * common + others[:count] * rest
            random.Random(salt).shuffle(shown)
            return "\n".join([COMMON_INTRO, _numbered(shown), question])

        return Draft(build, answers, " " + _numbered(answers))


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequencies fall as a power of their rank; name the most frequent ones.

    The word of rank k comes in proportion to ``k ** -alpha``, rounded down. Rank 1 are dots, which
    do not count; ranks 2 to ``named + 1`` are asked. There is a rank for every 50 tokens.

    Args:
        alpha: the exponent of the zeta distribution.
        named: how many words are asked.
        letters: how many letters a word has.
        new_tokens: how many tokens an answer may have.
    """

    alpha: float = 2.0
    named: int = 3
    letters: int = 6
    new_tokens: int = 50

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield one draft, whose unit is one run of dots with its share of words."""
        words = distinct(lambda: material.letters(rng, string.ascii_lowercase, self.letters))
        size = max((length - self.new_tokens) // 50, 2 * self.named)
        vocabulary = [DOTS, *(next(words) for _ in range(size - 1))]
        salt = rng.random()
        question = CODED_QUESTION.format(count=self.named)

        def build(count: int) -> str:
            shown: list[str] = []
            for rank, word in enumerate(vocabulary, 1):
                shown += [word] * int(count / rank**self.alpha)
            random.Random(salt).shuffle(shown)
            return "\n".join([CODED_INTRO, " ".join(shown), question])

        answers = vocabulary[1 : self.named + 1]
        meta = {"alpha": self.alpha, "words": len(vocabulary)}
        yield Draft(build, tuple(answers), f" {listed(answers)}.", meta, self._least())

    def _least(self) -> int:
        """Return how often dots must come so that the last asked word leads by one at least."""
        last = self.named + 1
        return math.ceil(1 / (last**-self.alpha - (last + 1) ** -self.alpha))


def _numbered(words: list[str] | tuple[str, ...]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
