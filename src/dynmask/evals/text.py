"""Words and haystack text for tasks that are generated: nothing is downloaded or copied.

Words are either pronounceable strings of syllables or real words of the haystack. A hash puts
every word in or out of a held-out tenth: evaluation draws keys and names from that tenth only,
training of the reference model from the rest only, so a key cannot have been memorised.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache

__all__ = ["haystack_lines", "held_out", "key_words", "pronounceable", "stream"]

ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "pr", "sh", "sk",
          "sl", "st", "th", "tr")  # fmt: skip
VOWELS = (*"aeiou", "ai", "ea", "ee", "io", "oa", "ou")
CODAS = ("", "", "", "", "l", "m", "n", "r", "s", "t", "k", "nd", "rt", "st")


def held_out(word: str) -> bool:
    """Return whether ``word`` belongs to the held-out tenth, whatever its case."""
    return hashlib.blake2b(word.lower().encode(), digest_size=4).digest()[0] % 10 == 0


def stream(*parts: object) -> random.Random:
    """Return a generator of random numbers that is the same for the same parts everywhere."""
    return random.Random("/".join(map(str, parts)))


def pronounceable(rng: random.Random) -> str:
    """Return a lower-case word of two or three syllables."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + rng.choice(CODAS)


@cache
def haystack_lines() -> tuple[str, ...]:
    """Return the lines of real prose that haystacks are cut from.

    It is the language reference that every CPython carries for ``help()``
    (``pydoc_data.topics``), about 10,000 lines, in an order that depends on the Python version
    only. Blank lines are kept where they separate paragraphs.

    Raises:
        RuntimeError: if this Python was built without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "the haystack: expected the standard library's pydoc_data.topics, found none; "
            "use a Python that carries its own documentation"
        ) from error
    lines: list[str] = []
    for name in sorted(topics):
        text = re.sub(r"\n\s*\n+", "\n\n", topics[name].strip())
        lines += [line.rstrip() for line in text.split("\n")]
        lines.append("")
    return tuple(lines)


@cache
def haystack_words() -> tuple[str, ...]:
    """Return the held-out words of four to ten letters of the haystack, sorted."""
    words = set(re.findall(r"\b[a-z]{4,10}\b", "\n".join(haystack_lines())))
    return tuple(sorted(word for word in words if held_out(word)))


def key_words(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` held-out words, about a quarter of them real, the others pronounceable."""
    words: list[str] = []
    while len(words) < count:
        if rng.random() < 0.25:
            words.append(rng.choice(haystack_words()))
            continue
        word = pronounceable(rng)
        while not held_out(word):
            word = pronounceable(rng)
        words.append(word)
    return words
