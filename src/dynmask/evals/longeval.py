"""LongEval: the official "lines" test cases of LongChat, read from a file that the user has.

The data is not part of this package. Each line of a file is a JSON object with ``prompt``,
``random_idx`` (key and position), ``expected_number``, ``num_lines`` and ``correct_line``.
An answer is right when the last integer of at most 100 generated tokens is the expected number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmask.evals.task import Item, Tokenizer, check_request, count_tokens, integers
from dynmask.evals.text import stream

__all__ = ["LongEval"]


@dataclass(frozen=True)
class LongEval:
    """The items of one official file.

    Args:
        path: the jsonl file.
        answer_prefix: text appended to every prompt, the beginning of the answer, as RULER gives
            its models; ``{key}`` is replaced by the asked key. A model without instruction tuning
            needs it; pass ``""`` for the bare prompt. It is part of every item's ``meta``.
        max_new_tokens: tokens an answer may have; 100 officially.

    Raises:
        ValueError: if the file is missing.
    """

    path: str | Path
    answer_prefix: str = "The <REGISTER_CONTENT> in line {key} is <"
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(
                f"path: expected a LongEval jsonl file, received {str(self.path)!r}; "
                "pass the path of one official file, such as 200_lines.jsonl"
            )

    @property
    def name(self) -> str:
        """The task's name in tables."""
        return "longeval"

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` of the file's items: its first ones for seed 0, else a random choice.

        Raises:
            ValueError: if the file has fewer items or a wrong field, or if a prompt has more than
                ``length`` tokens: official prompts are never cut.
        """
        check_request(n, length, shortest=1)
        cases = self._read()
        if n > len(cases):
            raise ValueError(
                f"n: expected at most the {len(cases)} items of {self.path}, received {n}; "
                "ask for fewer"
            )
        order = list(range(len(cases)))
        if seed:
            stream("longeval", seed).shuffle(order)
        items = [self._item(cases[index]) for index in order[:n]]
        for item in items:
            size = count_tokens(tokenizer, item.prompt)
            if size > length:
                raise ValueError(
                    f"length: expected at least the {size} tokens of an item of {self.path}, "
                    f"received {length}; ask for a longer context or take a file of fewer lines"
                )
        return items

    def _read(self) -> list[dict[str, Any]]:
        with open(self.path, encoding="utf-8") as file:
            return [_case(line, f"{self.path}:{number}") for number, line in enumerate(file, 1)]

    def _item(self, case: dict[str, Any]) -> Item:
        key, position = case["random_idx"]
        prefix = self.answer_prefix.replace("{key}", key)
        return Item(
            prompt=case["prompt"] + prefix,
            answers=(str(case["expected_number"]),),
            group=f"{case['num_lines']} lines",
            meta={
                "depth": position / case["num_lines"],
                "records": case["num_lines"],
                "key": key,
                "answer_prefix": prefix,
            },
            max_new_tokens=self.max_new_tokens,
        )

    def score(self, item: Item, text: str) -> float:
        """Return 1 if the last integer of ``text`` is the expected number, else 0."""
        return float(integers(text)[-1:] == [int(item.answers[0])])


def _case(line: str, where: str) -> dict[str, Any]:
    """Return the checked JSON object of one line of a file."""
    try:
        case = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected a JSON object on each line, received {line[:40]!r}; "
            "use the official file unchanged"
        ) from error
    wanted = {"prompt": str, "random_idx": list, "expected_number": int, "num_lines": int}
    for name, kind in wanted.items():
        found = case.get(name) if isinstance(case, dict) else None
        if not isinstance(found, kind):
            raise ValueError(
                f"{where}: expected the field {name!r} of type {kind.__name__}, received "
                f"{found!r}; use the official file unchanged"
            )
    index = case["random_idx"]
    if len(index) != 2 or not isinstance(index[0], str) or not isinstance(index[1], int):
        raise ValueError(
            f"{where}: expected random_idx as [key, position], received {index!r}; "
            "use the official file unchanged"
        )
    if case["num_lines"] < 1:
        raise ValueError(
            f"{where}: expected num_lines of at least 1, received {case['num_lines']}; "
            "use the official file unchanged"
        )
    return case
