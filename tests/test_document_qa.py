"""Document questions: the answers follow from the prompts, by rules written anew here."""

from __future__ import annotations

import json
import random
import re

import pytest

from dynmask.evals.document_qa import CHAPTER, KINDS, DocumentQA
from dynmask.evals.task import Item, Task, count_tokens
from dynmask.evals.text import haystack_lines, held_out

PIECES = re.compile(r" ?[A-Za-z]{1,4}|[0-9]| ?[^\sA-Za-z0-9]+|\s*[\r\n]+|\s+")
LIVES = re.compile(r"^(\w+) lives in (\w+)\.$|^The house of (\w+) stands in (\w+)\.$|"
                   r"^(\w+) has a home in (\w+)\.$")  # fmt: skip
WORKS = re.compile(r"^By trade (\w+) is a (\w+)\.$|^(\w+) earns a living as a (\w+)\.$")
MOVES = re.compile(r"^Since then (\w+) has moved to (\w+)\.$|^Later (\w+) moved house to (\w+)\.$")


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [0] + [1] * len(PIECES.findall(text))}


def items(kind: str, n: int = 12, length: int = 1_500, seed: int = 0) -> list[Item]:
    return DocumentQA((kind,)).items(tokenizer, n, length, seed)


def told(prompt: str, rule: re.Pattern[str]) -> list[tuple[str, str]]:
    """(who, what) of the facts of a kind, in the order of the document."""
    hits = (rule.match(line) for line in prompt[: prompt.rindex("Question:")].split("\n"))
    return [tuple(part for part in hit.groups() if part) for hit in hits if hit]  # type: ignore[misc]


def answer(item: Item) -> str:
    """The answer, from the text alone."""
    question, lives = item.meta["question"], told(item.prompt, LIVES)
    if item.meta["kind"] == "single":
        return dict(lives)[question.split()[-2]]
    if item.meta["kind"] == "chapter":
        who, chapter = question.split()[-5], "0"
        for line in item.prompt.split("\n"):
            heading = re.match(r"^Chapter (\d+): ", line)
            chapter = heading[1] if heading else chapter
            hit = LIVES.match(line)
            if hit and who in hit.groups():
                return chapter
    if item.meta["kind"] == "two_hops":
        (who,) = [who for who, town in lives if town == question.split()[-1].strip("?")]
        return dict(told(item.prompt, WORKS))[who]
    if item.meta["kind"] == "latest":
        return dict(lives + told(item.prompt, MOVES))[question.split()[-5]]
    if item.meta["kind"] == "filter":
        town, trade = re.match(r"Who lives in (\w+) and is a (\w+)\?", question).groups()  # type: ignore[union-attr]
        here = {who for who, what in lives if what == town}
        (both,) = here & {who for who, what in told(item.prompt, WORKS) if what == trade}
        assert len(here) > 1
        return both
    town = re.match(r"How many people live in (\w+)\?", question)[1]  # type: ignore[index]
    return str(sum(what == town for _, what in lives))


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_document(kind):
    task = DocumentQA((kind,))
    for item in items(kind):
        assert item.answers == (answer(item),)
        assert task.score(item, f" {item.answers[0]}.\nQuestion: more") == 1
        assert task.score(item, f"{item.answers[0].upper()}") == 1
        assert task.score(item, f"none\n{item.answers[0]}") == 0
        assert task.score(item, f"{item.answers[0]}x") == 0 == task.score(item, " \n")


def test_a_move_comes_after_the_home_it_replaces():
    for item in items("latest"):
        lines = item.prompt.split("\n")
        where = {who: n for n, line in enumerate(lines) if (hit := LIVES.match(line))
                 for who in hit.groups()[::2] if who}  # fmt: skip
        moves = {who: n for n, line in enumerate(lines) if (hit := MOVES.match(line))
                 for who in hit.groups()[::2] if who}  # fmt: skip
        assert len(moves) == 3 and all(n > where[who] for who, n in moves.items())


def test_names_are_held_out_and_never_part_of_each_other():
    for kind in ("single", "two_hops", "latest"):
        for item in items(kind, n=4):
            names = {name for pair in told(item.prompt, LIVES) for name in pair}
            assert all(held_out(name) for name in names)
            low = [name.lower() for name in names]
            assert not any(a in b for a in low for b in low if a != b)


def test_chapters_are_cut_from_real_prose():
    prose = set(haystack_lines())
    (item,) = items("single", n=1, length=3_000)
    headings = [line for line in item.prompt.split("\n") if re.match(r"^Chapter \d+: ", line)]
    assert len(headings) == -(-item.meta["lines"] // CHAPTER)
    body = item.prompt[: item.prompt.rindex("Question:")].split("\n")
    strange = [line for line in body if line not in prose and not LIVES.match(line)]
    assert len(strange) == len(headings) + 1  # and the introduction


@pytest.mark.parametrize("length", [700, 4_000])
def test_prompts_fill_the_length_and_depend_on_their_arguments_only(length):
    task = DocumentQA()
    assert isinstance(task, Task)
    random.seed(0)
    first = task.items(tokenizer, 2, length, 3)
    random.seed(1)
    assert task.items(tokenizer, 2, length, 3) == first
    assert [item.group for item in first[::2]] == [f"{kind}, {length} tokens" for kind in KINDS]
    assert len({item.prompt for item in first}) == 2 * len(KINDS)
    assert task.items(tokenizer, 1, length, 4)[0].prompt != first[0].prompt
    for item in first:
        assert length - 90 <= count_tokens(tokenizer, item.prompt) <= length
        json.dumps(item.meta)


@pytest.mark.parametrize("kinds", [(), ("nope",), ("single", "single"), "single"])
def test_bad_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match="different names among"):
        DocumentQA(kinds)


def test_what_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="longer context"):
        DocumentQA().items(tokenizer, 1, 300, 0)
