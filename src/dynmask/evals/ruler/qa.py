"""Questions about documents: one fact, or two that lead to each other (section 3.4).

RULER asks SQuAD (``qa_1``) and HotpotQA (``qa_2``). Here the documents are invented, so that
nothing is downloaded and no answer can be known beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .base import Draft, Material, distinct

__all__ = ["DocumentQuestions"]

RULE = "Answer by the documents alone, in as few words as it takes."
DOCUMENT = "Document {number}: {text}"
QUESTION = "Question: {question}\nAnswer:"
TRADES = ("clockmaker", "painter", "surgeon", "baker", "botanist", "printer", "weaver", "pilot")
BRIDGES = ("footbridge", "stone bridge", "drawbridge", "toll bridge", "railway bridge")
# Sentences and the questions about them; {what} is the trade or the kind of bridge, {who} stands
# for the subject of the document.
PEOPLE = (
    ("The {what} was born in {value}.", "In which town was {who} born?"),
    ("The {what} learned the trade from {value}.", "From whom did {who} learn the trade?"),
    ("Later the {what} crossed the sea on the {value}.", "On which ship did {who} cross the sea?"),
    ("The {what} married {value}.", "Whom did {who} marry?"),
    ("The {what} is buried in {value}.", "In which town is {who} buried?"),
)
PLACES = (
    ("The {what} leads over the {value}.", "Over which river does {who} lead?"),
    ("The {what} was paid for by {value}.", "Who paid for {who}?"),
    ("On the {what} stands a statue of {value}.", "Of whom does a statue stand on {who}?"),
    ("The {what} is the pride of {value}.", "Of which town is {who} the pride?"),
)
BUILT = ("The {what} was built by {value}.", "Who built {who}?")
BRIDGE, BUILDER = "the {what} {name}", "the person who built {who}"
FACTS = 4  # in a document


class Document(NamedTuple):
    """A text, how a question calls its subject, and (question, answer) for each of its facts.

    A question has ``{who}`` where the subject is named.
    """

    text: str
    who: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class DocumentQuestions:
    """Small documents about invented people and bridges, and a question about one or two of them.

    With one hop any fact is asked. With two, a bridge's document names its builder and the
    builder's document has the answer; every bridge has its builder's document, so that the asked
    ones do not stand out.

    Args:
        hops: how many documents the answer takes, 1 or 2.
        new_tokens: how many tokens an answer may have.

    Raises:
        ValueError: on another number of hops.
    """

    hops: int = 1
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.hops not in (1, 2):
            raise ValueError(f"hops: expected 1 or 2, received {self.hops}; pass one of the two")

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield one draft, whose unit is a document, or a bridge's and its builder's."""
        # The asked documents come first: none of their names is part of a later one.
        apart = self.hops * (FACTS + 1)
        names = distinct(lambda: material.invented(rng).capitalize(), apart)
        make = _linked if self.hops == 2 else _single
        question, answer, asked = make(rng, names)
        others: list[list[str]] = []
        places = [rng.random() for _ in asked]
        salt = rng.random()

        def build(count: int) -> str:
            others.extend(make(rng, names)[2] for _ in range(count - len(others)))
            texts = [text for documents in others[:count] for text in documents]
            random.Random(salt).shuffle(texts)
            for place, text in zip(places, asked, strict=True):
                texts.insert(int(place * (len(texts) + 1)), text)
            shown = [DOCUMENT.format(number=n, text=text) for n, text in enumerate(texts, 1)]
            return "\n\n".join([RULE, *shown, f"{RULE}\n{QUESTION.format(question=question)}"])

        where = [round(place, 4) for place in places]
        meta = {"depth": where[0]} if self.hops == 1 else {"depths": where}
        yield Draft(build, (answer,), f" {answer}", {"question": question, **meta})


def _single(rng: random.Random, names: Iterator[str]) -> tuple[str, str, list[str]]:
    """Return a question, its answer, and the document that has it."""
    make = rng.choice((_person, _bridge))
    document = make(rng, names, next(names))
    question, answer = rng.choice(document.facts)
    return question.format(who=document.who), answer, [document.text]


def _linked(rng: random.Random, names: Iterator[str]) -> tuple[str, str, list[str]]:
    """Return a question, its answer, and the two documents that lead to it."""
    builder = next(names)
    bridge, person = _bridge(rng, names, next(names), builder), _person(rng, names, builder)
    question, answer = rng.choice(person.facts)
    who = BUILDER.format(who=bridge.who)
    return question.format(who=who), answer, [bridge.text, person.text]


def _person(rng: random.Random, names: Iterator[str], name: str) -> Document:
    """Return a document about a person."""
    what = rng.choice(TRADES)
    told = [(*fact, next(names)) for fact in rng.sample(PEOPLE, FACTS)]
    return _document(f"{name} was a {what}.", what, name, told)


def _bridge(
    rng: random.Random, names: Iterator[str], name: str, builder: str | None = None
) -> Document:
    """Return a document about a bridge, which has a builder among its facts."""
    what = rng.choice(BRIDGES)
    told = [(*fact, next(names)) for fact in rng.sample(PLACES, FACTS - 1)]
    told.insert(rng.randrange(FACTS), (*BUILT, builder or next(names)))
    return _document(f"{name} is a {what}.", what, BRIDGE.format(what=what, name=name), told)


def _document(first: str, what: str, who: str, told: list[tuple[str, str, str]]) -> Document:
    """Return a document of a first sentence and one for each (sentence, question, value)."""
    sentences = [sentence.format(what=what, value=value) for sentence, _, value in told]
    facts = [(question, value) for _, question, value in told]
    return Document(" ".join([first, *sentences]), who, facts)
