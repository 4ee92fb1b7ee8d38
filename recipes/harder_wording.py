"""Wordings for the harder reference's training, composed at random and never those evaluated.

A question and the start of its answer, a sentence about a relation and the question that asks for
it, an assignment: all are put together from parts and from random words, so that the model learns
to match words rather than to know sentences. Blanks are ``{K}`` (the key), ``{L}`` (what is asked),
``{n}`` (how many), ``{what}`` and ``{who}`` (the subject of a document), ``{value}``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reference_data import COPULAS, DETERMINERS, LABELS, NOUNS, OPENERS, PREPOSITIONS, VERBS, Words

QUESTION_LEADS = ("Question: ", "Question: ", "Q: ", "Query: ", "Ask: ", "> ", "", "", "Now: ")
ANSWER_LEADS = ("\nAnswer: ", "\nAnswer: ", "\nA: ", "\nReply: ", "\nResult: ", "\n", "\n\n", " ")
AUXILIARIES = ("does", "did", "can", "do", "will", "has", "is", "was")
MOST = (
    "most",
    "the most times",
    "most frequently",
    "more than the rest",
    "top",
    "most of all",
)
NEAR = ("in", "over", "by", "from", "on", "with", "of", "under", "to", "at", "through", "for")
# Prefixes, operators and ends of assignments; a blank prefix may be a random word too.
PREFIXES = ("", "", "let ", "LET ", "now ", "put ", "var ", "DEF ", "assign ", "- ", "* ", "> ")
OPERATORS = (" = ", " = ", " = ", " := ", " <- ", " == ", "=", ": ", " is ", " becomes ", " takes ",
             " gets ", " equals ", " holds ")  # fmt: skip
BACKWARD = ("{W} -> {N}", "{W} => {N}", "{W} goes to {N}", "copy {W} into {N}", "{W} to {N}",
            "move {W} over to {N}", "{W} is kept in {N}", "write {W} on {N}")  # fmt: skip
HEADERS = ("[{n}] ", "({n}) ", "{n}. ", "Text {n}: ", "Passage {n}: ", "# {n}\n", "Note {n} - ",
           "{W} {n}: ", "{W} {n}: ", "")  # fmt: skip
VARIABLES = ("name", "cell", "letter", "box", "place", "slot", "label", "jar", "pot", "variable")
TAILS = ("", "", " All of them, please.", " List every one.", " Name each.", " There are {n}.",
         " Give all {n}.")  # fmt: skip


class ListStyle(NamedTuple):
    """How several values are told: what stands between two of them, and before the last."""

    between: str
    last: str

    def __call__(self, values: Sequence[str]) -> str:
        """Return the values as a text."""
        if len(values) == 1:
            return values[0]
        return self.between.join(values[:-1]) + self.last + values[-1]


IN_A_SENTENCE = ListStyle(", ", " and ")
SPACED = ListStyle(" ", " ")
LIST_STYLES = (
    IN_A_SENTENCE, IN_A_SENTENCE, IN_A_SENTENCE, SPACED, ListStyle(", ", ", "),
    ListStyle(", ", ", and "), ListStyle("; ", "; "), ListStyle(" / ", " / "),
)  # fmt: skip


def capital(text: str) -> str:
    """Return a text with a capital letter, unless it starts with a blank."""
    return text[:1].upper() + text[1:]


def inflected(verb: str, rng: random.Random) -> str:
    """Return a form of a verb, regular as nonsense is."""
    end = rng.choice(("ed", "ed", "s", "ing", ""))
    return (verb[:-1] if verb.endswith("e") and end[:1] in ("e", "i") else verb) + end


@dataclass
class Phrases:
    """Random phrases from the words of training."""

    rng: random.Random
    words: Words

    def some(self, most: int, least: int = 1) -> str:
        """Return ``least`` to ``most`` words."""
        count = self.rng.randint(least, most)
        return " ".join(self.words.one(self.rng) for _ in range(count))

    def label(self) -> str:
        """Return the name of what is asked, of one or two words."""
        label = self.rng.choice(LABELS) if self.rng.random() < 0.5 else self.words.one(self.rng)
        return f"{self.words.one(self.rng)} {label}" if self.rng.random() < 0.5 else label

    def noise(self) -> str:
        """Return a line that says nothing: a few short sentences."""
        rng = self.rng
        return " ".join(
            capital(
                rng.choice(
                    (
                        f"{rng.choice(DETERMINERS)} {self.some(2)} {rng.choice(COPULAS)} "
                        f"{self.some(2)}",
                        f"{self.some(2)} we {self.some(2)}",
                        f"{self.some(2)} and {self.some(3)}",
                        self.some(5, 2),
                    )
                )
            )
            + "."
            for _ in range(rng.randint(1, 6))
        )

    def lead(self) -> tuple[str, str]:
        """Return what stands before a question, and what before an answer that starts at once."""
        return self.rng.choice(QUESTION_LEADS), self.rng.choice(ANSWER_LEADS).rstrip(" ")

    def opening(self) -> str:
        """Return a sentence or two about what follows."""
        ends = self.rng.choices((".", ":", "!", "."), k=self.rng.randint(1, 2))
        return " ".join(capital(self.some(10, 3)) + end for end in ends)


def compose_ask(phrases: Phrases, many: bool) -> tuple[str, str]:
    """Return (question, start of its answer) about ``{L}`` of ``{K}``; ``many`` values are asked.

    The start ends where the values begin, without a space.
    """
    rng, some = phrases.rng, phrases.some
    what = "{L}s" if many else "{L}"
    be = rng.choice(("are", "are", "were", "are now") if many else ("is", "is", "was", "reads"))
    place, auxiliary = rng.choice(PREPOSITIONS), rng.choice(AUXILIARIES)
    question = rng.choice(
        (
            f"which {what} {some(3)} {place} {{K}}",
            f"what {be} the {what} {place} {{K}}",
            f"which {what} {auxiliary} {some(4)} {place} {{K}}",
            f"which {what} {auxiliary} {{K}} {some(2)}",
            f"{some(2)} {place} {{K}} {some(2)} {what}",
            f"name {rng.choice(DETERMINERS)} {what} {place} {{K}}",
            f"{what} {place} {{K}}",
            f"{place} {{K}}, {some(3)} {what}",
            f"{{K}} {rng.choice(VERBS)} which {what}",
            f"{some(3)} {{K}}",
        )
    ) + rng.choice(("?", "?", "?", ".", ":"))  # fmt: skip
    question += rng.choice(TAILS) if many else rng.choice(("", "", "", " Only the {L}, please."))
    counted = f"{{n}} {what}" if many and rng.random() < 0.4 else what
    start = rng.choice(
        (
            "",
            f"the {counted} {place} {{K}} {be}",
            f"the {counted} {place} {{K}} {be}",
            f"the {counted} {some(2)} {place} {{K}} {some(4)} {be}",
            f"the {counted} {place} {{K}} {some(4)} {be}",
            f"{some(5)}, the {counted} {place} {{K}} {be}",
            f"{{K}} {rng.choice(VERBS)} the {counted}",
            f"{{K}} {rng.choice(('-', ':', '=', 'gives', 'has'))}",
            f"the {counted} {be}",
        )
    )
    return joined(rng, question, start)


def compose_count(phrases: Phrases) -> tuple[str, str]:
    """Return (question, start of its answer) about the ``{n}`` most frequent words."""
    rng, some = phrases.rng, phrases.some
    noun = "words" if rng.random() < 0.7 else phrases.words.one(rng) + "s"
    most = rng.choice(MOST)
    question = rng.choice(
        (
            f"which {{n}} {noun} {some(3)} {most} {some(4)}",
            f"{some(4)}, which {{n}} {noun} {some(3)} {most}",
            f"which {{n}} {noun} {rng.choice(AUXILIARIES)} {some(3)} {most}",
            f"name the {{n}} {noun} that {some(2)} {most}",
            f"{{n}} {noun} {some(2)} {most}",
        )
    ) + rng.choice(("?", "?", ".", ":"))  # fmt: skip
    be = rng.choice(("are", "are", "were", "are:", ":"))
    start = rng.choice(
        (
            "",
            f"the {{n}} {noun} that {some(2)} {most} {some(4)} {be}",
            f"the {{n}} {noun} {some(3)} that {some(2)} {most} {some(2)} {be}",
            f"{most} {be}",
            f"the {{n}} {noun} {be}",
        )
    )
    return joined(rng, question, start)


def joined(rng: random.Random, question: str, start: str) -> tuple[str, str]:
    """Return a question with its lead, and the start of its answer with what stands before it."""
    lead = rng.choice(ANSWER_LEADS)
    return rng.choice(QUESTION_LEADS) + capital(question), (lead + capital(start)).rstrip(" ")


def compose_assignment(phrases: Phrases) -> str:
    """Return how a variable ``{N}`` is given what ``{W}`` says."""
    rng = phrases.rng
    if rng.random() < 0.2:
        return capital(rng.choice(BACKWARD)) if rng.random() < 0.5 else rng.choice(BACKWARD)
    prefix = rng.choice(PREFIXES)
    while not prefix and rng.random() < 0.6:
        word = phrases.words.one(rng)
        if word != "set":  # the evaluated wording
            prefix = rng.choice((word, word.upper())) + " "
    return prefix + "{N}" + rng.choice(OPERATORS) + "{W}" + rng.choice(("", "", "", ";", "."))


class Relation(NamedTuple):
    """A sentence with ``{what}`` and ``{value}``, its question, and a clause for ``{who}``."""

    sentence: str
    question: str
    clause: str


def compose_relation(phrases: Phrases) -> Relation:
    """Return a relation: sentence and question share a verb or a noun, and little else."""
    rng, words = phrases.rng, phrases.words
    verb, noun, near = words.one(rng), words.one(rng), rng.choice(NEAR)
    does, auxiliary = inflected(verb, rng), rng.choice(AUXILIARIES)
    again = does if rng.random() < 0.5 else inflected(verb, rng)
    the = rng.choice(("the", "a", "one", "its"))
    sentence, question, clause = rng.choice(
        (
            (f"the {{what}} {does} {near} {{value}}", f"{near} which {noun} {auxiliary} {{who}} "
             f"{again}", f"what {again} {near} {{who}}"),
            (f"the {{what}} was {does} {near} {{value}}", f"{near} which {noun} was {{who}} "
             f"{again}", f"the one {near} which {{who}} was {again}"),
            (f"the {{what}} {does} {the} {noun} {near} {{value}}", f"{near} whom {auxiliary} "
             f"{{who}} {again} {the} {noun}", f"the {noun} that {{who}} {again}"),
            (f"the {{what}} was {does} by {{value}}", f"who {again} {{who}}",
             f"the one who {again} {{who}}"),
            (f"the {{what}} {does} {{value}}", f"whom {auxiliary} {{who}} {again}",
             f"whom {{who}} {again}"),
            (f"{near} the {{what}} {does} {the} {noun} of {{value}}", f"of whom {auxiliary} {the} "
             f"{noun} {again} {near} {{who}}", f"whose {noun} {again} {near} {{who}}"),
            (f"the {{what}} is {the} {noun} of {{value}}", f"of which {words.one(rng)} is {{who}} "
             f"{the} {noun}", f"the place whose {noun} is {{who}}"),
            (f"{the} {noun} of the {{what}} is {{value}}", f"what is {the} {noun} of {{who}}",
             f"the {noun} of {{who}}"),
        )
    )  # fmt: skip
    if rng.random() < 0.25:
        opener = rng.choice(OPENERS) if rng.random() < 0.4 else phrases.some(2)
        sentence = f"{opener}{rng.choice((' ', ', '))}{sentence}"
    if rng.random() < 0.15:
        question = f"{phrases.some(2)} {question}"
    return Relation(capital(sentence) + ".", capital(question) + "?", clause)


def compose_kind(phrases: Phrases) -> str:
    """Return what subjects of documents are, such as ``red baker``."""
    noun = phrases.rng.choice(NOUNS) if phrases.rng.random() < 0.2 else phrases.some(1)
    return noun if phrases.rng.random() < 0.6 else f"{phrases.some(1)} {noun}"
