"""The generated tasks: deterministic, as long as asked, on held-out words, scored strictly."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.evals.lines import TEMPLATES, Lines
from dynmask.evals.longeval import LongEval
from dynmask.evals.needle import FACTS, Needle
from dynmask.evals.task import Item, Task, count_tokens, fit, holds, integers
from dynmask.evals.text import haystack_lines, held_out, key_words, pronounceable, stream

PIECES = re.compile(r" ?[A-Za-z]{1,4}|[0-9]| ?[^\sA-Za-z0-9]+|\s*[\r\n]+|\s+")
TASKS = [Lines(), Lines(templates=("arrows",), joiners=("-",)), Needle(), Needle(values="mixed")]


def tokenizer(text: str) -> dict[str, list[int]]:
    """Stand in for a tokenizer with a special token at the start."""
    return {"input_ids": [0] + [1] * len(PIECES.findall(text))}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_items_depend_on_their_arguments_only(task: Task) -> None:
    random.seed(0)
    first = task.items(tokenizer, 3, 700, 5)
    random.seed(1)
    assert task.items(tokenizer, 3, 700, 5) == first
    assert task.items(tokenizer, 2, 700, 5) == first[:2]
    prompts = {item.prompt for item in first}
    assert len(prompts) == 3
    assert prompts.isdisjoint(item.prompt for item in task.items(tokenizer, 3, 700, 6))


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("length", [500, 1_024, 6_000])
def test_prompts_fill_the_length_and_never_exceed_it(task: Task, length: int) -> None:
    for item in task.items(tokenizer, 3, length, 0):
        assert length - 60 <= count_tokens(tokenizer, item.prompt) <= length
        assert item.group == f"{length} tokens"
        json.dumps(item.meta)


@settings(max_examples=40, deadline=None)
@given(overhead=st.integers(0, 50), unit=st.integers(1, 40), length=st.integers(100, 3_000))
def test_fit_finds_the_largest_count(overhead: int, unit: int, length: int) -> None:
    count = fit(lambda count: "7" * (overhead + unit * count), tokenizer, length)
    assert count == (length - 1 - overhead) // unit


def test_fit_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="room for at least one unit"):
        fit(lambda count: "7" * (90 + 20 * count), tokenizer, 100)


def test_the_answer_stands_in_the_prompt_once_with_its_key() -> None:
    for item in Lines().items(tokenizer, 8, 900, 3):
        before = item.prompt.rindex(item.meta["key"])
        assert item.prompt.index(item.meta["key"]) < before
        record = item.prompt[item.prompt.index(item.meta["key"]) :].split("\n")[0]
        assert integers(record.removeprefix(item.meta["key"])) == [int(item.answers[0])]
    for item in Needle(values="mixed").items(tokenizer, 8, 900, 3):
        sentences = [line for line in item.prompt.split("\n") if item.meta["name"] in line]
        assert any(holds(sentence, item.answers[0]) for sentence in sentences[:1])


def test_needles_stand_at_their_depths() -> None:
    for item in Needle(depths=(0.0, 0.5, 1.0)).items(tokenizer, 6, 4_000, 0):
        told = {**item.meta, "value": item.answers[0]}
        sentences = [fact.format(**told) for fact in FACTS]
        (place,) = [item.prompt.index(told) for told in sentences if told in item.prompt]
        assert place / len(item.prompt) == pytest.approx(item.meta["depth"], abs=0.05)


def test_lines_ask_at_many_depths() -> None:
    depths = [item.meta["depth"] for item in Lines().items(tokenizer, 40, 700, 0)]
    assert min(depths) < 0.15 and max(depths) > 0.85


def test_keys_and_names_are_held_out() -> None:
    for item in Lines().items(tokenizer, 8, 700, 1):
        assert all(held_out(word) for word in re.split("[-_ ]", item.meta["key"]))
    assert all(held_out(item.meta["name"]) for item in Needle().items(tokenizer, 8, 700, 1))


def test_the_hash_holds_out_a_tenth_whatever_the_case() -> None:
    words = [pronounceable(stream("share", index)) for index in range(4_000)]
    assert 0.08 < sum(map(held_out, words)) / len(words) < 0.12
    assert all(held_out(word.upper()) == held_out(word) for word in words)
    assert all(map(held_out, key_words(random.Random(0), 200)))


def test_training_never_uses_a_held_out_word_for_a_key() -> None:
    pytest.importorskip("tokenizers")
    recipes = Path(__file__).parents[1] / "recipes"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(recipes))
        from reference_data import UNWANTED, Words, _wanted
    words = Words(["alpha", "river"])
    rng = random.Random(0)
    for letters in (False, True):
        drawn = [words.one(rng, letters) for _ in range(1_000)]
        assert not any(held_out(word) for word in drawn if word not in words.real)
    assert UNWANTED.search("... REGISTER_CONTENT is <1>")
    assert not _wanted(Path("pydoc_data/topics.py"))


def test_training_wordings_are_not_the_evaluated_ones() -> None:
    pytest.importorskip("tokenizers")
    source = (Path(__file__).parents[1] / "recipes" / "reference_data.py").read_text("utf-8")
    for phrase in ("was given the", "By the way", "ferry ticket", "locker number", "ledger"):
        assert phrase not in source
    assert source.count("REGISTER_CONTENT") == 1  # the filter that keeps it out of the text


def test_the_haystack_is_real_prose_of_this_python() -> None:
    text = "\n".join(haystack_lines())
    assert len(text) > 300_000
    assert "global" in text and "\n\n\n" not in text


def answered(answer: str) -> Item:
    return Item("", (answer,), "")


@pytest.mark.parametrize(
    ("text", "score"),
    [(" 4821", 1), ("4821>.", 1), (" 4821 or 7", 1), ("48210", 0), (" 7, 4821", 0), ("", 0),
     ("none", 0), ("04821", 1)],
)  # fmt: skip
def test_lines_count_the_first_integer(text: str, score: float) -> None:
    assert Lines().score(answered("4821"), text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [(" KT-48.", 1), (" it is KT-48", 1), ("\n KT-48", 1), (" KT-481", 0), (" AKT-48", 0),
     (" KT-4", 0), (" no\nKT-48", 0), ("", 0)],
)  # fmt: skip
def test_needles_count_the_whole_value_in_the_first_line(text: str, score: float) -> None:
    assert Needle().score(answered("KT-48"), text) == score


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lines(templates=("no",)), "templates: expected names among"),
        (lambda: Lines(templates=()), "templates: expected"),
        (lambda: Lines(joiners=()), "joiners: expected"),
        (lambda: Lines(largest=0), "largest: expected"),
        (lambda: Needle(depths=(1.5,)), "depths: expected"),
        (lambda: Needle(depths=()), "depths: expected"),
        (lambda: Needle(facts=0), "facts: expected"),
        (lambda: Needle(values="words"), "values: expected"),
        (lambda: LongEval("missing.jsonl"), "path: expected"),
        (lambda: Lines().items(tokenizer, 0, 500, 0), "n: expected"),
        (lambda: Needle().items(tokenizer, 1, 100, 0), "length: expected"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "received" in str(caught.value) and ";" in str(caught.value)


CASE = {"prompt": "a: 5\nWhat is a? ", "random_idx": ["a-b", 3], "expected_number": 5,
        "num_lines": 4, "correct_line": "a: 5\n"}  # fmt: skip


def write(path: Path, *cases: object) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return path


def test_longeval_reads_official_fields(tmp_path: Path) -> None:
    cases = [{**CASE, "expected_number": number} for number in range(5)]
    task = LongEval(write(tmp_path / "x.jsonl", *cases), answer_prefix="In {key} it is <")
    items = task.items(tokenizer, 5, 400, 0)
    assert [item.answers for item in items] == [(str(number),) for number in range(5)]
    assert items[0].prompt == CASE["prompt"] + "In a-b it is <"
    assert items[0].meta["depth"] == 0.75 and items[0].group == "4 lines"
    assert items[0].max_new_tokens == 100
    shuffled = task.items(tokenizer, 5, 400, 7)
    assert shuffled != items and sorted(map(str, shuffled)) == sorted(map(str, items))


@pytest.mark.parametrize(
    ("text", "score"), [("5>", 1), ("line 3 is 5.", 1), ("5 or 3", 0), ("", 0), ("50", 0)]
)
def test_longeval_counts_the_last_integer(tmp_path: Path, text: str, score: float) -> None:
    task = LongEval(write(tmp_path / "x.jsonl", CASE))
    assert task.score(task.items(tokenizer, 1, 400, 0)[0], text) == score


@pytest.mark.parametrize(
    "change",
    [{"prompt": 3}, {"random_idx": ["a"]}, {"random_idx": [1, 2]}, {"expected_number": "5"},
     {"num_lines": None}, {"num_lines": 0}],
)  # fmt: skip
def test_longeval_checks_fields(tmp_path: Path, change: dict[str, object]) -> None:
    path = write(tmp_path / "x.jsonl", {**CASE, **change})
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected .*received"):
        LongEval(path).items(tokenizer, 1, 400, 0)


def test_longeval_refuses_other_files_and_never_cuts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="expected a JSON object"):
        LongEval(tmp_path / "x.jsonl").items(tokenizer, 1, 400, 0)
    task = LongEval(write(tmp_path / "y.jsonl", CASE))
    with pytest.raises(ValueError, match="length: expected at least"):
        task.items(tokenizer, 1, 10, 0)
    with pytest.raises(ValueError, match="n: expected at most"):
        task.items(tokenizer, 2, 400, 0)


def test_every_template_is_asked_as_it_is_written() -> None:
    for intro, record, outro, question in TEMPLATES.values():
        assert "{key}" in record and "{value}" in record and "{key}" in question
        assert intro.endswith("\n") and outro.endswith("\n") and not question.endswith(" ")
