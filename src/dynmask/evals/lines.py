"""Lines: a list of keyed records, one of which is asked at the end.

The haystack is nothing but records that differ in a key of two words, so that every record is a
distractor for the question. This is the hardest case for a mask that decides before the question
is known. The family is that of LongEval's "lines" (LongChat) and RULER's multi-key needles; the
wording here is the project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynmask.evals.task import Item, Tokenizer, check_request, fit, integers
from dynmask.evals.text import key_words, stream

__all__ = ["Lines"]

# Wording of the introduction, a record, the end of the list, and the question with the prefix of
# its answer. The wordings of the reference model's training are composed of other parts.
TEMPLATES: dict[str, tuple[str, str, str, str]] = {
    "ledger": (
        "The ledger below gives one balance for every account.\n\n",
        "account {key}: balance {value}\n",
        "\nThe ledger is complete.\n",
        "What is the balance of account {key}?\nThe balance of account {key} is",
    ),
    "tags": (
        "Every shelf in the store carries a tag with a stock count.\n\n",
        "shelf <{key}> stock <{value}>\n",
        "\n",
        "Which stock does shelf <{key}> carry?\nshelf <{key}> stock <",
    ),
    "arrows": (
        "Routing table:\n",
        "{key} --> {value}\n",
        "End of table.\n",
        "Where does {key} go?\n{key} -->",
    ),
    "brackets": (
        "Sensor readings follow, one a line.\n",
        "[{key}] reading: {value};\n",
        "No further readings.\n",
        "Look up the reading of [{key}].\n[{key}] reading:",
    ),
}


@dataclass(frozen=True)
class Lines:
    """Keyed records to a given length; one key is asked.

    Args:
        templates: which wordings to use, in turn; names of ``TEMPLATES``.
        joiners: what may stand between the two words of a key; drawn for each item.
        largest: the largest value; values are integers from 1 to ``largest``.

    Raises:
        ValueError: on an unknown template, no joiner, or values with more than 12 digits.
    """

    templates: tuple[str, ...] = tuple(TEMPLATES)
    joiners: tuple[str, ...] = ("-", "_", " ")
    largest: int = 99_999

    def __post_init__(self) -> None:
        unknown = [name for name in self.templates if name not in TEMPLATES]
        if unknown or not self.templates:
            raise ValueError(
                f"templates: expected names among {sorted(TEMPLATES)}, received "
                f"{self.templates!r}; name at least one of them"
            )
        if not self.joiners:
            raise ValueError("joiners: expected at least one string, received none; pass ('-',)")
        if not 1 <= self.largest < 10**12:
            raise ValueError(
                f"largest: expected 1 to 10**12 - 1, received {self.largest}; pass 99_999 for "
                "values of up to five digits"
            )

    @property
    def name(self) -> str:
        """The task's name in tables."""
        return "lines"

    def items(self, tokenizer: Tokenizer, n: int, length: int, seed: int) -> list[Item]:
        """Return ``n`` items of at most ``length`` tokens of ``tokenizer``, filled close to it."""
        check_request(n, length, shortest=128)
        return [self._item(tokenizer, index, length, seed) for index in range(n)]

    def _item(self, tokenizer: Tokenizer, index: int, length: int, seed: int) -> Item:
        rng = stream("lines", seed, length, index)
        template = self.templates[index % len(self.templates)]
        intro, record, outro, question = TEMPLATES[template]
        joiner, depth = rng.choice(self.joiners), rng.random()
        records: list[tuple[str, int]] = []
        taken: set[str] = set()

        def build(count: int) -> str:
            while len(records) < max(count, 1):
                key = joiner.join(key_words(rng, 2))
                if key not in taken:
                    taken.add(key)
                    records.append((key, rng.randint(1, self.largest)))
            body = "".join(record.format(key=key, value=value) for key, value in records[:count])
            return intro + body + outro + question.format(key=records[int(depth * count)][0])

        count = fit(build, tokenizer, length)
        position = int(depth * count)
        key, value = records[position]
        return Item(
            prompt=build(count),
            answers=(str(value),),
            group=f"{length} tokens",
            meta={"depth": position / count, "records": count, "key": key, "template": template},
            max_new_tokens=16,
        )

    def score(self, item: Item, text: str) -> float:
        """Return 1 if the first integer of ``text`` is the value of the asked key, else 0."""
        return float(integers(text)[:1] == [int(item.answers[0])])
