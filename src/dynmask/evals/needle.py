"""Needle: facts hidden in real prose, one of which is asked at the end, over a grid of depths.

Several facts of one kind are hidden, so that finding "the odd sentence" is not enough: the name
in the question decides. The family is that of "needle in a haystack" and RULER's multi-key tasks;
the wording and the names are the project's own, the prose is Python's language reference.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from dynmask.evals.task import Item, Tokenizer, check_request, fit, holds
from dynmask.evals.text import haystack_lines, key_words, stream

__all__ = ["Needle"]

# What is hidden about a name, and the sentence that hides it.
KINDS: tuple[str, ...] = ("locker number", "badge number", "ferry ticket", "parking permit")
FACTS: tuple[str, ...] = (
    "The {kind} of {name} is {value}.",
    "{name} was given the {kind} {value}.",
    "By the way, the {kind} that belongs to {name} is {value}.",
)
QUESTION = "\nQuestion: What is the {kind} of {name}?\nAnswer: The {kind} of {name} is"


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000, 999_999))


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVWX") for _ in range(2))
    return f"{letters}-{rng.randint(100, 9_999)}"


@dataclass(frozen=True)
class Needle:
    """Facts hidden in prose to a given length; the fact at a chosen depth is asked.

    Args:
        depths: where the asked fact stands, as a share of the characters of the context, from 0
            (start) to 1 (just before the question); item i takes depth i modulo their number.
        facts: how many facts are hidden, the asked one included; the others stand anywhere.
        values: ``"number"`` (four to six digits), ``"code"`` (``KT-4821``) or ``"mixed"``.

    Raises:
        ValueError: on a depth outside 0 to 1, fewer than one fact, or unknown values.
    """

    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    facts: int = 6
    values: str = "number"

    def __post_init__(self) -> None:
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(
                f"depths: expected numbers from 0 to 1, received {self.depths!r}; "
                "pass for example (0.0, 0.25, 0.5, 0.75, 1.0)"
            )
        if self.facts < 1:
            raise ValueError(f"facts: expected at least 1, received {self.facts}; pass facts=6")
        if self.values not in ("number", "code", "mixed"):
            raise ValueError(
                f"values: expected 'number', 'code' or 'mixed', received {self.values!r}; "
                "pass one of the three"
            )

    @property
    def name(self) -> str:
        """The task's name in tables."""
        return "needle"

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` items of at most ``length`` tokens of ``tokenizer``, filled close to it."""
        check_request(n, length, shortest=128 + 48 * self.facts)
        return [self._item(tokenizer, index, length, seed) for index in range(n)]

    def _item(self, tokenizer: Tokenizer, index: int, length: int, seed: int) -> Item:
        rng = stream("needle", seed, length, index)
        depth = self.depths[index % len(self.depths)]
        names = _names(rng, self.facts)
        kind, fact = rng.choice(KINDS), rng.choice(FACTS)
        coded = self.values == "code" or (self.values == "mixed" and index % 2 == 1)
        values = [(_code if coded else _number)(rng) for _ in names]
        places = [depth] + [rng.random() for _ in names[1:]]
        lines = haystack_lines()
        start = rng.randrange(len(lines))

        def build(count: int) -> str:
            shown = [lines[(start + offset) % len(lines)] for offset in range(count)]
            ends = list(accumulate(len(line) + 1 for line in shown))
            hidden = zip(places, names, values, strict=True)
            for place, name, value in sorted(hidden, reverse=True):
                sentence = fact.format(kind=kind, name=name, value=value)
                size = ends[-1] if ends else 0
                shown.insert(bisect_left(ends, place * size) + (place == 1), sentence)
            return "\n".join(shown) + "\n" + QUESTION.format(kind=kind, name=names[0])

        count = fit(build, tokenizer, length)
        return Item(
            prompt=build(count),
            answers=(values[0],),
            group=f"{length} tokens",
            meta={"depth": depth, "facts": self.facts, "name": names[0], "kind": kind},
            max_new_tokens=24,
        )

    def score(self, item: Item, text: str) -> float:
        """Return 1 if the value stands in the first line of ``text`` as a whole word, else 0."""
        lines = text.strip().splitlines()
        return float(bool(lines) and holds(lines[0], item.answers[0]))


def _names(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` different names of a held-out word each, capitalised."""
    names: list[str] = []
    while len(names) < count:
        name = key_words(rng, 1)[0].capitalize()
        if name not in names:
            names.append(name)
    return names
