"""Questions about one long document: chapters of real prose, with invented facts among its lines.

Facts about people (where they live, what they do) are scattered over the chapters. Some questions
need one of them, some need two that lead to each other, the later of two, the one that fits both
of two conditions, the chapter that it stands in, or a count. The prose is Python's language
reference, names and towns are held-out words, so no answer can be known beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dynmask.evals.task import Item, Tokenizer, check_request, fit, holds
from dynmask.evals.text import haystack_lines, key_words, stream

__all__ = ["KINDS", "DocumentQA"]

CHAPTER = 24  # lines of prose
SHORTEST = 640
INTRO = "A document in chapters follows. Facts about people stand among its lines.\n\n"
HEADING = "Chapter {number}: {first} and {second}"
TRADES = ("brewer", "cook", "glazier", "miller", "sailor", "saddler", "tailor", "teacher")
HOMES = (
    "{who} lives in {what}.",
    "The house of {who} stands in {what}.",
    "{who} has a home in {what}.",
)
WORKS = ("By trade {who} is a {what}.", "{who} earns a living as a {what}.")
MOVES = ("Since then {who} has moved to {what}.", "Later {who} moved house to {what}.")


class Fact(NamedTuple):
    """A sentence and its place, as a share of the document's lines."""

    sentence: str
    place: float


class Asked(NamedTuple):
    """A question with the beginning of its answer, the answer, and the facts around it.

    ``evidence`` are the facts that lead to the answer; ``facts`` are all, these included. An
    ``answer`` of None is the number of the chapter in which the evidence stands.
    """

    question: str
    prefix: str
    answer: str | None
    evidence: list[Fact]
    facts: list[Fact]


class World:
    """People and towns with names of their own, and facts about them at random places.

    Args:
        rng: the source of every random choice.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.taken: list[str] = []

    def name(self) -> str:
        """Return a name that no other one is, or holds."""
        while True:
            name = key_words(self.rng, 1)[0].capitalize()
            if not any(name.lower() in old.lower() or old.lower() in name.lower()
                       for old in self.taken):  # fmt: skip
                self.taken.append(name)
                return name

    def names(self, count: int) -> list[str]:
        """Return several different names."""
        return [self.name() for _ in range(count)]

    def fact(self, wordings: tuple[str, ...], who: str, what: str, after: float = 0.0) -> Fact:
        """Return a fact at a place that is not before ``after``."""
        sentence = self.rng.choice(wordings).format(who=who, what=what)
        return Fact(sentence, after + (1 - after) * self.rng.random())


def _single(world: World) -> Asked:
    """One person's town, among others'."""
    people, towns = world.names(6), world.names(6)
    facts = [world.fact(HOMES, *pair) for pair in zip(people, towns, strict=True)]
    question = f"In which town does {people[0]} live?"
    return Asked(question, f"{people[0]} lives in", towns[0], facts[:1], facts)


def _chapter(world: World) -> Asked:
    """The chapter that says where a person lives."""
    asked = _single(world)
    who = asked.prefix.removesuffix(" lives in")
    question = f"Which chapter says in which town {who} lives? Give its number."
    return asked._replace(question=question, prefix="Chapter", answer=None)


def _two_hops(world: World) -> Asked:
    """What the person does who lives in a town: two facts, one leading to the other."""
    people, towns = world.names(5), world.names(5)
    trades = world.rng.sample(TRADES, 5)
    homes = [world.fact(HOMES, *pair) for pair in zip(people, towns, strict=True)]
    works = [world.fact(WORKS, *pair) for pair in zip(people, trades, strict=True)]
    question = f"What is the trade of the person who lives in {towns[0]}?"
    prefix = f"The person who lives in {towns[0]} is a"
    return Asked(question, prefix, trades[0], [homes[0], works[0]], homes + works)


def _latest(world: World) -> Asked:
    """Where a person lives who has moved: the later of two facts."""
    people, towns = world.names(5), world.names(8)
    homes = [world.fact(HOMES, *pair) for pair in zip(people, towns[:5], strict=True)]
    moved = zip(people[:3], towns[5:], homes[:3], strict=True)
    moves = [world.fact(MOVES, who, town, after=home.place) for who, town, home in moved]
    question = f"In which town does {people[0]} live in the end?"
    prefix = f"In the end {people[0]} lives in"
    return Asked(question, prefix, towns[5], [moves[0]], homes + moves)


def _filter(world: World) -> Asked:
    """Who lives in a town and has a trade, where others have only one of the two."""
    people, towns = world.names(5), world.names(3)
    trade, other = world.rng.sample(TRADES, 2)
    lives = [towns[0], towns[0], towns[0], towns[1], towns[2]]
    does = [trade, other, other, trade, trade]
    homes = [world.fact(HOMES, *pair) for pair in zip(people, lives, strict=True)]
    works = [world.fact(WORKS, *pair) for pair in zip(people, does, strict=True)]
    question = f"Who lives in {towns[0]} and is a {trade}?"
    prefix = f"The {trade} who lives in {towns[0]} is"
    return Asked(question, prefix, people[0], [homes[0], works[0]], homes + works)


def _count(world: World) -> Asked:
    """How many people live in a town."""
    people, towns = world.names(9), world.names(2)
    count = world.rng.randint(2, 6)
    lives = [towns[0]] * count + [towns[1]] * (9 - count)
    facts = [world.fact(HOMES, *pair) for pair in zip(people, lives, strict=True)]
    question = f"How many people live in {towns[0]}? Give a number."
    prefix = f"The number of people who live in {towns[0]} is"
    return Asked(question, prefix, str(count), facts[:count], facts)


KINDS: dict[str, Callable[[World], Asked]] = {
    "single": _single,
    "chapter": _chapter,
    "two_hops": _two_hops,
    "latest": _latest,
    "filter": _filter,
    "count": _count,
}


@dataclass(frozen=True)
class DocumentQA:
    """A long document in chapters and a question about people in it.

    Args:
        kinds: which questions are asked, names of ``KINDS``. Several kinds make one evaluation
            with a group for each.

    Raises:
        ValueError: on no kind, an unknown one, or one named twice.
    """

    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        known = not isinstance(self.kinds, str) and set(self.kinds) <= set(KINDS)
        if not known or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(
                f"kinds: expected different names among {list(KINDS)}, received {self.kinds!r}; "
                "pass for example ('two_hops',)"
            )

    @property
    def name(self) -> str:
        """The task's name in tables."""
        return "document_qa"

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` items of every kind, of at most ``length`` tokens, filled close to it."""
        check_request(n, length, SHORTEST)
        return [
            self._item(tokenizer, kind, index, length, seed)
            for kind in self.kinds
            for index in range(n)
        ]

    def _item(self, tokenizer: Tokenizer, kind: str, index: int, length: int, seed: int) -> Item:
        rng = stream("document_qa", kind, seed, length, index)
        world = World(rng)
        asked = KINDS[kind](world)
        prose = haystack_lines()
        start = rng.randrange(len(prose))
        titles: list[tuple[str, str]] = []
        end = f"\nQuestion: {asked.question}\nAnswer: {asked.prefix}"

        def build(count: int) -> str:
            while len(titles) <= count // CHAPTER:
                first, second = key_words(rng, 2)
                titles.append((first.capitalize(), second))
            lines = [prose[(start + offset) % len(prose)] for offset in range(count)]
            return INTRO + "\n".join(_compose(lines, titles, asked.facts)) + "\n" + end

        count = fit(build, tokenizer, length)
        places = [round(fact.place, 4) for fact in asked.evidence]
        chapter = str(_line(asked.evidence[0], count) // CHAPTER + 1)
        depth = {"depth": places[0]} if len(places) == 1 else {"depths": places}
        return Item(
            prompt=build(count),
            answers=(asked.answer or chapter,),
            group=f"{length} tokens" if len(self.kinds) == 1 else f"{kind}, {length} tokens",
            meta={"kind": kind, "question": asked.question, "lines": count, **depth},
            max_new_tokens=24,
        )

    def score(self, item: Item, text: str) -> float:
        """Return 1 if the answer stands in the first line of ``text`` as a whole word, else 0."""
        lines = text.strip().lower().splitlines()
        return float(bool(lines) and holds(lines[0], item.answers[0].lower()))


def _line(fact: Fact, count: int) -> int:
    """Return the line of prose before which a fact stands."""
    return min(int(fact.place * count), max(count - 1, 0))


def _compose(prose: list[str], titles: list[tuple[str, str]], facts: list[Fact]) -> list[str]:
    """Return the document's lines: a heading before every chapter, facts before their lines."""
    at: dict[int, list[Fact]] = {}
    for fact in sorted(facts, key=lambda fact: fact.place):
        at.setdefault(_line(fact, len(prose)), []).append(fact)
    lines = []
    for number in range(max(len(prose), 1)):
        if number % CHAPTER == 0:
            first, second = titles[number // CHAPTER]
            heading = HEADING.format(number=number // CHAPTER + 1, first=first, second=second)
            lines += ["", heading, ""]
        lines += [fact.sentence for fact in at.get(number, ())]
        lines += prose[number : number + 1]
    return lines
