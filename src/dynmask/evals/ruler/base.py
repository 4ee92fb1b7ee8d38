"""What the RULER-style tasks share: words, hiding places, and filling a prompt to a length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dynmask.evals.task import Tokenizer, count_tokens
from dynmask.evals.text import haystack_lines, haystack_words, held_out, pronounceable

__all__ = ["DEPTHS", "NOISE", "Draft", "Family", "Material", "distinct", "fill", "hide", "listed"]

# Where needles stand, in percent of the haystack: as in the published code.
DEPTHS: tuple[int, ...] = tuple(round(100 * step / 39) for step in range(40))
# The unit of a haystack that says nothing.
NOISE = "The lamp is lit. The door is shut. The soup is warm. Off we walk. Out and home again."
# A prompt may stay this share of its length short: the next measurement would cost more time.
SLACK = 1 / 1024


@dataclass(frozen=True)
class Material:
    """What prompts are written from. The default is held out; training passes its own.

    Args:
        admits: whether a made-up word may be used, whatever its case.
        real: returns real words that may be used.
        lines: returns lines of prose for haystacks.
    """

    admits: Callable[[str], bool] = held_out
    real: Callable[[], Sequence[str]] = haystack_words
    lines: Callable[[], Sequence[str]] = haystack_lines

    def invented(self, rng: random.Random) -> str:
        """Return a pronounceable word."""
        while True:
            if self.admits(word := pronounceable(rng)):
                return word

    def word(self, rng: random.Random) -> str:
        """Return a word: one in four is real, the others are invented."""
        return rng.choice(self.real()) if rng.random() < 0.25 else self.invented(rng)

    def letters(self, rng: random.Random, alphabet: str, size: int) -> str:
        """Return ``size`` random letters."""
        while True:
            if self.admits(word := "".join(rng.choices(alphabet, k=size))):
                return word


@dataclass(frozen=True)
class Draft:
    """A prompt of any size about one question.

    Args:
        build: returns the prompt with that many units of haystack, 0 included; it grows by about
            the same number of tokens with every unit.
        answers: the references.
        reply: the text of a right answer; it continues the prompt.
        meta: JSON-serialisable facts about the question.
        least: the fewest units with which the question makes sense.
    """

    build: Callable[[int], str]
    answers: tuple[str, ...]
    reply: str
    meta: dict[str, Any] = field(default_factory=dict)
    least: int = 1


class Family(Protocol):
    """A kind of question with its parameters."""

    @property
    def new_tokens(self) -> int:
        """How many tokens an answer may have."""
        ...

    def drafts(
        self, rng: random.Random, index: int, length: int, material: Material
    ) -> Iterator[Draft]:
        """Yield forms of one question; each is for lengths that the one before does not fit.

        Args:
            rng: the source of every random choice.
            index: the item's number, for what is gone through in turn.
            length: the tokens that prompt and answer may have.
            material: the words and the prose.
        """
        ...


def distinct(draw: Callable[[], str], apart: int = 0) -> Iterator[str]:
    """Yield what ``draw`` returns, never the same twice.

    The first ``apart`` strings are part of no other one, nor is another one part of them: answers
    are scored as substrings, and a wrong word must not hold a right one.
    """
    taken: set[str] = set()
    first: list[str] = []
    while True:
        text = draw()
        if text in taken or any(text in other or other in text for other in first):
            continue
        taken.add(text)
        if len(first) < apart:
            first.append(text)
        yield text


def hide(lines: list[str], sentences: Iterable[tuple[int, str]]) -> list[str]:
    """Return ``lines`` with sentences put in, each before the line of its number.

    Sentences of the same place keep their order.
    """
    shown = list(lines)
    for place, sentence in reversed(sorted(sentences, key=lambda pair: pair[0])):
        shown.insert(place, sentence)
    return shown


def listed(words: Sequence[str]) -> str:
    """Return the words as a list in a sentence: ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def fill(draft: Draft, tokenizer: Tokenizer, length: int) -> tuple[int, str]:
    """Return how many units fit ``length`` tokens, and the prompt with them.

    The prompt is less than a unit, or less than a thousandth of ``length``, short of what fits. A
    line through the sizes of the closest prompts measured so far predicts the next, first one of
    an eighth of the length: a long prompt is encoded two to five times.

    Raises:
        ValueError: if fewer than ``draft.least`` units fit.
    """
    empty = count_tokens(tokenizer, draft.build(0))
    low, low_size, best = 0, empty, ""
    high, high_size = max(2, length), 0  # unknown as long as it is 0
    count = min(draft.least + 15, high - 1)
    for attempt in range(48):
        prompt = draft.build(count)
        size = count_tokens(tokenizer, prompt)
        if size <= length:
            low, low_size, best = count, size, prompt
        else:
            high, high_size = count, size
        per_unit = (high_size - low_size) / (high - low) if high_size else (size - empty) / count
        per_unit = max(per_unit, 1e-3)
        slack = max(per_unit, SLACK * length)
        if high - low <= 1 or (low and length - low_size < slack):
            break
        wanted = length / 8 if attempt == 0 and 8 * size < length else length - slack / 2
        guess = low + int((wanted - low_size) / per_unit) if attempt < 8 else (low + high) // 2
        count = min(max(guess, low + 1), high - 1)
    if low < draft.least:
        raise ValueError(
            f"length: expected room for at least {draft.least} units of context beside the {empty} "
            f"tokens of instructions and question, received {length} for the prompt; ask for a "
            "longer context"
        )
    return low, best
