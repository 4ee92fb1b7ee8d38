"""The 13 tasks by name, written and scored as RULER does."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from dynmask.evals.task import Item, Tokenizer, check_request
from dynmask.evals.text import stream

from .base import Family, Material, fill
from .niah import Niah
from .qa import DocumentQuestions
from .tracing import Tracing
from .words import CommonWords, FrequentWords

__all__ = ["TASKS", "Ruler", "write"]

# The published configurations (appendix B).
TASKS: dict[str, Family] = {
    "niah_single_1": Niah(haystack="noise"),
    "niah_single_2": Niah(),
    "niah_single_3": Niah(value_kind="uuids"),
    "niah_multikey_1": Niah(keys=4),
    "niah_multikey_2": Niah(haystack="needles"),
    "niah_multikey_3": Niah(haystack="needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Niah(values=4),
    "niah_multiquery": Niah(keys=4, queries=4),
    "vt": Tracing(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": DocumentQuestions(hops=1),
    "qa_2": DocumentQuestions(hops=2),
}
SHORTEST = 512


@dataclass(frozen=True)
class Ruler:
    """RULER-style tasks (arXiv 2404.06654), all 13 or some of them.

    ``length`` counts the prompt and the tokens an answer may have, as published. An answer scores
    the share of its references that stand in it, in any order and case.

    Args:
        tasks: names of ``TASKS``. Several tasks make one evaluation with a group for each.

    Raises:
        ValueError: on no task, an unknown one, or one named twice.
    """

    tasks: tuple[str, ...] = tuple(TASKS)

    def __post_init__(self) -> None:
        _check_names(self.tasks)

    @property
    def name(self) -> str:
        """The task's name in tables: ``ruler``, or ``ruler_vt`` when that is the only one."""
        return f"ruler_{self.tasks[0]}" if len(self.tasks) == 1 else "ruler"

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` items of every task; prompt and answer have at most ``length`` tokens."""
        check_request(n, length, SHORTEST)
        items = []
        for name in self.tasks:
            for index in range(n):
                rng = stream("ruler", name, seed, length, index)
                item, _ = write(name, tokenizer, length, rng, index)
                group = item.group if len(self.tasks) == 1 else f"{name}, {item.group}"
                items.append(replace(item, group=group))
        return items

    def score(self, item: Item, text: str) -> float:
        """Return the share of the references that stand in ``text``, whatever the case."""
        said = text.lower()
        return sum(answer.lower() in said for answer in item.answers) / len(item.answers)


def write(
    name: str,
    tokenizer: Tokenizer,
    length: int,
    rng: random.Random,
    index: int = 0,
    material: Material | None = None,
) -> tuple[Item, str]:
    """Return one item of a task, and the text of a right answer, which continues its prompt.

    Evaluation needs the item only; training passes words and prose of its own, and learns the
    answer.

    Args:
        name: a name of ``TASKS``.
        tokenizer: what the lengths are counted with.
        length: the tokens that prompt and answer may have.
        rng: the source of every random choice.
        index: the item's number; the first asked needle takes depth ``17 * index`` modulo 40.
        material: the words and the prose; held-out ones when None.

    Raises:
        ValueError: on an unknown task, or if ``length`` has no room for the question with a little
            context.
    """
    _check_names((name,))
    family = TASKS[name]
    refusal: ValueError | None = None
    for draft in family.drafts(rng, index, length, material or Material()):
        try:
            count, prompt = fill(draft, tokenizer, length - family.new_tokens)
        except ValueError as error:
            refusal = error
            continue
        meta = {"task": name, "units": count, **draft.meta}
        item = Item(prompt, draft.answers, f"{length} tokens", meta, family.new_tokens)
        return item, draft.reply
    raise ValueError(f"{name}: {refusal}") from refusal


def _check_names(names: tuple[str, ...]) -> None:
    unknown = isinstance(names, str) or not set(names) <= set(TASKS)
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"tasks: expected different names among {list(TASKS)}, received {names!r}; "
            "pass for example ('vt',)"
        )
