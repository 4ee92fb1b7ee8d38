"""What an evaluation asks: items with a prompt and its references, and a score for the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

__all__ = ["Item", "Task", "Tokenizer", "check_request", "count_tokens", "fit", "holds", "integers"]


class Tokenizer(Protocol):
    """What a task needs of a tokenizer; every Hugging Face tokenizer is one."""

    def __call__(self, text: str, /) -> Mapping[str, Any]:
        """Return a mapping whose ``input_ids`` are the token ids, special tokens included."""
        ...


@dataclass(frozen=True)
class Item:
    """One question with its context.

    Args:
        prompt: the whole prompt, question and answer prefix included: generation starts where it
            ends. Encode it as ``tokenizer(prompt)``, with the tokenizer's own special tokens.
        answers: the references.
        group: the label under which tables count the item, such as ``"4096 tokens"``.
        meta: JSON-serialisable facts about the item; ``depth`` (0 to 1) is where the evidence
            stands in the context.
        max_new_tokens: how many tokens a model may generate.
    """

    prompt: str
    answers: tuple[str, ...]
    group: str
    meta: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 16


@runtime_checkable
class Task(Protocol):
    """A generator of items and the rule that scores answers to them."""

    @property
    def name(self) -> str:
        """A short lower-case name for tables and files."""
        ...

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` items of at most ``length`` tokens, the same for the same arguments."""
        ...

    def score(self, item: Item, text: str) -> float:
        """Return how right the generated ``text`` is, from 0 to 1."""
        ...


def check_request(n: int, length: int, shortest: int) -> None:
    """Raise ``ValueError`` unless ``n`` items of ``length`` tokens can be asked for."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 item, received {n}; ask for n >= 1")
    if length < shortest:
        raise ValueError(
            f"length: expected at least {shortest} tokens, so that question and evidence fit, "
            f"received {length}; ask for a longer context"
        )


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of ``text``, special tokens included."""
    return len(tokenizer(text)["input_ids"])


def fit(build: Callable[[int], str], tokenizer: Tokenizer, length: int) -> int:
    """Return (nearly) the largest ``count`` for which ``build(count)`` fits ``length`` tokens.

    ``build(count)`` must grow by about the same number of tokens with every unit. A line through
    two measurements predicts the count, so that a long prompt is encoded a handful of times.

    Raises:
        ValueError: if not even one unit fits.
    """
    empty = count_tokens(tokenizer, build(0))
    low, high = 0, max(2, length)
    count = min(32, high - 1)
    for attempt in range(48):
        size = count_tokens(tokenizer, build(count))
        if size <= length:
            low = count
        else:
            high = count
        per_unit = max((size - empty) / count, 1e-3)
        if high - low <= 1 or (low == count and length - size < per_unit):
            break
        guess = int((length - empty) / per_unit) if attempt < 6 else (low + high) // 2
        count = min(max(guess, low + 1), high - 1)
    if low == 0:
        raise ValueError(
            f"length: expected room for at least one unit of context beside the {empty} tokens of "
            f"instructions and question, received {length}; ask for a longer context"
        )
    return low


def integers(text: str) -> list[int]:
    """Return the runs of ASCII digits in ``text`` as integers, in order."""
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


def holds(text: str, answer: str) -> bool:
    """Return whether ``answer`` stands in ``text`` as a whole word, not inside a longer one."""
    return re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", text) is not None
