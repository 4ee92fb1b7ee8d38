"""RULER-style tasks: the answers are really there, counted and traced anew from the prompts."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.evals.ruler import TASKS, Material, Ruler, write
from dynmask.evals.ruler.base import DEPTHS, NOISE, Draft, distinct, fill, hide, listed
from dynmask.evals.ruler.niah import Niah
from dynmask.evals.ruler.qa import DocumentQuestions
from dynmask.evals.ruler.tracing import Tracing
from dynmask.evals.ruler.words import CommonWords, FrequentWords
from dynmask.evals.task import Item, Task, count_tokens
from dynmask.evals.text import haystack_lines, held_out, stream

PIECES = re.compile(r" ?[A-Za-z]{1,4}|[0-9]| ?[^\sA-Za-z0-9]+|\s*[\r\n]+|\s+")
NIAH = [name for name in TASKS if name.startswith("niah")]
PROSE = [name for name in NIAH if name not in ("niah_single_1", "niah_multikey_2",
                                               "niah_multikey_3")]  # fmt: skip
FACT = re.compile(r"^In the register, (\S+) has the vault (number|code) (\S+)\.$", re.MULTILINE)


def tokenizer(text: str) -> dict[str, list[int]]:
    """Stand in for a tokenizer with a special token at the start."""
    return {"input_ids": [0] + [1] * len(PIECES.findall(text))}


@cache
def reference():
    """The tokenizer of the reference model: 4,096 entries, digits alone."""
    transformers = pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "models" / "dynmask-reference"
    return transformers.AutoTokenizer.from_pretrained(path, model_max_length=10**9)


@cache
def items(name: str, n: int = 4, length: int = 2_000, seed: int = 0) -> list[Item]:
    return Ruler((name,)).items(tokenizer, n, length, seed)


def context(item: Item) -> str:
    """What stands before the last question."""
    return item.prompt[: item.prompt.rindex("Question:")]


def facts(item: Item) -> list[tuple[str, str]]:
    """(key, value) of the needles, in order."""
    return [(key, value) for key, _, value in FACT.findall(item.prompt)]


def whole(word: str, text: str) -> int:
    """How often ``word`` stands in ``text`` as a whole word."""
    return len(re.findall(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))


# --- every task ---------------------------------------------------------------------------------


def test_the_tasks_are_the_published_ones() -> None:
    assert len(TASKS) == 13 and isinstance(Ruler(), Task)
    tokens = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert all(family.new_tokens == tokens[name.split("_")[0]] for name, family in TASKS.items())
    assert (Tracing().chains, Tracing().hops) == (1, 4)
    assert (FrequentWords().alpha, FrequentWords().named, FrequentWords().letters) == (2.0, 3, 6)
    assert CommonWords().common == 10


@pytest.mark.parametrize("name", TASKS)
def test_items_depend_on_their_arguments_only(name: str) -> None:
    random.seed(0)
    task = Ruler((name,))
    first = task.items(tokenizer, 3, 1_300, 5)
    random.seed(1)
    assert task.items(tokenizer, 3, 1_300, 5) == first
    assert task.items(tokenizer, 2, 1_300, 5) == first[:2]
    assert len({item.prompt for item in first}) == 3
    assert len({item.answers for item in first}) == 3
    others = task.items(tokenizer, 3, 1_300, 6)
    assert {item.answers for item in first}.isdisjoint(item.answers for item in others)
    for item in first:
        assert json.loads(json.dumps(item.meta)) == item.meta and item.meta["task"] == name
        assert item.group == "1300 tokens" and not item.prompt.endswith(" ")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("kind", "length"),
    [("stand-in", 1_024), ("stand-in", 4_096), ("stand-in", 20_000), ("reference", 1_024),
     ("reference", 6_000)],
)  # fmt: skip
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(
    name: str, kind: str, length: int
) -> None:
    counted = reference() if kind == "reference" else tokenizer
    for index in range(2):
        item, _ = write(name, counted, length, stream(name, length, index), index)
        limit = length - item.max_new_tokens
        size = count_tokens(counted, item.prompt)
        unit = (size - 100) / item.meta["units"]
        assert limit - max(3 * unit, 40, limit / 1_000) < size <= limit


def test_a_long_prompt_is_encoded_three_times() -> None:
    """On average over the tasks; prose, whose lines differ most, up to five times."""
    counted: dict[str, int] = dict.fromkeys(TASKS, 0)
    for name in TASKS:

        def counting(text: str, name: str = name) -> dict[str, list[int]]:
            ids = tokenizer(text)
            counted[name] += len(ids["input_ids"])
            return ids

        for index in range(3):
            write(name, counting, 40_000, stream(name, index), index)
    assert max(counted.values()) < 3 * 5.5 * 40_000
    assert sum(counted.values()) < 3 * 3.2 * 40_000 * len(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_right_answer_continues_the_prompt_and_fits(name: str) -> None:
    for index in range(20):
        item, reply = write(name, reference(), 1_024, stream("reply", name, index), index)
        assert reply.startswith(" ") and not reply.startswith("  ")
        assert Ruler().score(item, reply) == 1
        assert count_tokens(reference(), reply) - 1 <= item.max_new_tokens
        assert re.search(r"Answer:[^\n]*$", item.prompt)


def test_answers_score_the_share_of_their_references() -> None:
    item = Item("", ("Kalo-Brin", "7", "abc", "xyz"), "g")
    assert Ruler().score(item, "xyz, ABC and\n kalo-brin then 1789") == 1
    assert Ruler().score(item, "kalo-brin, abd, xyz") == 0.5
    assert Ruler().score(item, "") == 0 == Ruler().score(item, "kalo brin")


def test_several_tasks_are_one_evaluation_with_a_group_each() -> None:
    both = Ruler(("vt", "qa_1"))
    found = both.items(tokenizer, 2, 1_300, 3)
    assert [item.group for item in found] == ["vt, 1300 tokens"] * 2 + ["qa_1, 1300 tokens"] * 2
    alone = [item for name in both.tasks for item in Ruler((name,)).items(tokenizer, 2, 1_300, 3)]
    assert [item.prompt for item in found] == [item.prompt for item in alone]
    assert (both.name, Ruler().name, Ruler(("vt",)).name) == ("ruler", "ruler", "ruler_vt")


def test_the_command_line_knows_every_task() -> None:
    from dynmask.cli import evaluate, parser

    for task in ("ruler", *(f"ruler_{name}" for name in TASKS)):
        told = parser().parse_args(["evaluate", "--model", "m", "--task", task, "--length", "1024"])
        asked, lengths = evaluate._questions(told)
        assert asked.name == task and lengths == [1024]
    assert asked == Ruler(("qa_2",))


def test_evaluate_asks_several_tasks() -> None:
    from dynmask.evals import evaluate
    from tests.stand_in import stand_in_model, stand_in_tokenizer

    report = evaluate(
        stand_in_model(), stand_in_tokenizer(), {"full": None}, Ruler(("fwe", "qa_1")), n=1,
        length=1_024, timing=False, progress=False,
    )  # fmt: skip
    assert report.groups == ["fwe, 1024 tokens", "qa_1, 1024 tokens"]
    assert [row.n for row in report.rows] == [1, 1]
    assert report.header["settings"]["task_settings"] == {"tasks": ["fwe", "qa_1"]}


# --- needles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_as_many_and_of_the_kind_that_the_task_says(name: str) -> None:
    family = TASKS[name]
    assert isinstance(family, Niah)
    for item in items(name):
        found = facts(item)
        hidden = family.keys * family.values
        assert len(found) == hidden + (item.meta["units"] if family.haystack == "needles" else 0)
        assert len({value for _, value in found}) == len(found)
        per_key = Counter(key for key, _ in found)
        assert set(per_key.values()) == {family.values}
        for key, value in found:
            number = r"[1-9]\d{6}"
            code = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
            assert re.fullmatch(number if family.value_kind == "numbers" else code, value)
            assert re.fullmatch(r"[a-z]+-[a-z]+" if family.key_kind == "words" else code, key)


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [("niah_single_1", 1, 1, 1), ("niah_multikey_1", 4, 1, 1), ("niah_multikey_2", 1, 1, 1),
     ("niah_multivalue", 1, 4, 1), ("niah_multiquery", 4, 1, 4)],
)  # fmt: skip
def test_published_numbers_of_needles(name: str, keys: int, values: int, queries: int) -> None:
    family = TASKS[name]
    assert isinstance(family, Niah)
    assert (family.keys, family.values, family.queries) == (keys, values, queries)


@pytest.mark.parametrize("name", NIAH)
def test_the_values_of_the_asked_keys_are_the_answers(name: str) -> None:
    for item in items(name):
        asked = item.meta["keys"]
        found = facts(item)
        wanted = [value for key in asked for other, value in found if other == key]
        assert list(item.answers) == wanted and len(asked) == TASKS[name].queries  # type: ignore
        question = item.prompt[item.prompt.rindex("Question:") :]
        assert all(whole(key, question) == 2 for key in asked)
        others = {key for key, _ in found} - set(asked)
        assert not any(whole(key, question) for key in others)
        assert all(item.prompt.count(value) == 1 for value in item.answers)
        wording = "vault numbers" if len(wanted) > 1 else "vault (number|code) "
        assert re.search(wording, question)


@pytest.mark.parametrize("name", NIAH)
def test_haystacks_are_noise_prose_or_needles(name: str) -> None:
    prose = set(haystack_lines())
    for item in items(name):
        lines = context(item).split("\n\n", 1)[1].rstrip("\n").split("\n")
        hay = [line for line in lines if not FACT.match(line)]
        if name == "niah_single_1":
            assert set(hay) == {NOISE} and len(hay) == item.meta["units"]
        elif name in PROSE:
            assert set(hay) <= prose and len(set(hay)) > 10
        else:
            assert hay == []


@pytest.mark.parametrize("name", NIAH)
def test_forty_items_meet_every_depth(name: str) -> None:
    assert len(set(DEPTHS)) == 40 and (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    met = []
    for item in Ruler((name,)).items(tokenizer, 40, 1_300, 0):
        depth = item.meta.get("depth", item.meta.get("depths", [None])[0])
        met.append(round(100 * depth))
        lines = context(item).split("\n\n", 1)[1].removesuffix("\n\n").split("\n")
        key = item.meta["keys"][0]
        found = [i for i, line in enumerate(lines) if line.startswith(f"In the register, {key} ")]
        needles = sum(bool(FACT.match(line)) for line in lines) if name in PROSE else 1
        near = [abs(place - depth * (len(lines) - 1)) for place in found]
        assert min(near) <= needles, (name, depth, found, len(lines))
    assert sorted(met) == list(DEPTHS)
    assert max(met[:8]) > 80 and min(met[:8]) < 20  # few items spread, too


def test_needles_of_one_item_stand_at_different_depths() -> None:
    for item in items("niah_multiquery", 40, 1_300) + items("niah_multivalue", 40, 1_300):
        assert len(set(item.meta["depths"])) == 4
    places = {depth for item in items("niah_multiquery", 40, 1_300) for depth in
              item.meta["depths"][1:]}  # fmt: skip
    assert len(places) > 30


# --- variable tracking --------------------------------------------------------------------------


def interpret(text: str) -> dict[str, str]:
    """Run the assignments of a text: what every variable holds."""
    held: dict[str, str] = {}
    for name, what in re.findall(r"^SET ([A-Z]+) = (\S+)$", text, re.MULTILINE):
        assert name not in held, "set twice"
        held[name] = what if what.isdigit() else held[what]
    return held


def test_the_answers_are_what_the_assignments_say() -> None:
    for item in items("vt", 8):
        example, puzzle = item.prompt.split("\n\nThe text below sets", 1)
        held = interpret(puzzle)
        asked = re.findall(r"with the value (\d{5}) are$", item.prompt)
        assert [name for name, value in held.items() if value == asked[0]] == list(item.answers)
        assert len(held) == 5 and all(len(name) == 5 for name in held)
        shown = interpret(example)
        answer = example.rsplit("are ", 1)[1]
        assert answer.split() == list(shown) and all(len(name) == 3 for name in shown)
        assert set(shown.values()).isdisjoint(held.values())


def test_assignments_stand_apart_in_noise_and_in_different_places() -> None:
    places = set()
    for item in items("vt", 8):
        lines = item.prompt[item.prompt.rindex("Keep track") :].split("\n")
        where = [i for i, line in enumerate(lines) if line.startswith("SET")]
        assert all(b - a > 1 for a, b in pairwise(where))
        rest = [line for line in lines[2:-2] if not line.startswith("SET")]
        assert set(rest) == {NOISE} and len(rest) == item.meta["units"]
        places.add(tuple(where))
    assert len(places) == 8


def test_other_chains_hold_other_values() -> None:
    draft = next(Tracing(chains=3, hops=2).drafts(stream("chains"), 0, 2_000, Material()))
    held = interpret(draft.build(40).split("\n\nThe text below sets", 1)[1])
    assert len(held) == 9 and len(set(held.values())) == 3
    assert tuple(n for n, v in held.items() if v == draft.meta["value"]) == draft.answers


# --- counting -----------------------------------------------------------------------------------


def numbered(text: str) -> list[str]:
    """The words of a numbered list, whose numbers must be 1, 2, 3, ..."""
    found = re.findall(r"(\d+)\. ([a-z]+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("length", "times", "shown"),
    [(1_024, (6, 1), (3, 1, 20)), (4_096, (30, 3), (10, 3, 40)), (20_000, (30, 3), (10, 3, 40))],
)
def test_the_common_words_are_the_most_frequent(
    length: int, times: tuple[int, int], shown: tuple[int, int, int]
) -> None:
    def short(text: str) -> dict[str, list[int]]:
        """Count as a tokenizer of many entries does: a token for every word or number."""
        return {"input_ids": re.findall(r"\w+|[^\w\s]", text)}

    for item in Ruler(("cwe",)).items(short, 2, length, 1):
        parts = item.prompt.split("\n")
        lists = [Counter(numbered(line)) for line in parts if line.startswith("1. ")]
        expected = [(shown, numbered(parts[3].split(": ")[-1])), (times, list(item.answers))]
        for counts, (often, answers) in zip(lists, expected, strict=True):
            top = counts.most_common(10)
            assert {word for word, _ in top} == set(answers) and len(answers) == 10
            assert {count for _, count in top} == {often[0]}
            assert {count for word, count in counts.items() if word not in answers} == {often[1]}
        assert len(lists[0]) == shown[2] and len(lists[1]) == 10 + item.meta["units"]
        assert item.meta["times"] == list(times)


def test_the_common_words_are_spread_over_the_list() -> None:
    (item,) = items("cwe", 1, 20_000)
    words = numbered(item.prompt.split("\n")[-3])
    for answer in item.answers:
        places = [i / len(words) for i, word in enumerate(words) if word == answer]
        assert min(places) < 0.2 and max(places) > 0.8


def test_a_small_vocabulary_gets_a_shorter_list() -> None:
    item, _ = write("cwe", reference(), 4_096, stream("short"))
    assert item.meta["times"] == [6, 1] and item.meta["units"] >= 10
    item, _ = write("cwe", reference(), 1_024, stream("short"))
    assert item.meta["times"] == [3, 1] and item.meta["units"] >= 10


@pytest.mark.parametrize("length", [1_024, 8_000])
def test_frequent_words_follow_the_zeta_distribution(length: int) -> None:
    for item in items("fwe", 3, length):
        lines = item.prompt.split("\n")
        counts = Counter(lines[1].split())
        dots = counts.pop("...")
        assert dots == item.meta["units"]
        ranked = counts.most_common()
        assert tuple(word for word, _ in ranked[:3]) == item.answers
        assert [count for _, count in ranked] == [
            dots // rank**2 for rank in range(2, len(ranked) + 2)
        ]
        assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        assert len(counts) == min((length - 50) // 50, math.isqrt(dots)) - 1


def test_the_least_list_of_coded_words_has_no_tie() -> None:
    for alpha in (1.5, 2.0, 3.5):
        draft = next(FrequentWords(alpha).drafts(stream("tie"), 0, 4_000, Material()))
        counts = Counter(draft.build(draft.least).split("\n")[1].split())
        asked = [counts[word] for word in draft.answers]
        others = [n for word, n in counts.items() if word not in (*draft.answers, "...")]
        assert asked == sorted(asked, reverse=True) and min(asked) > max(others, default=0)


# --- documents ----------------------------------------------------------------------------------


def documents(item: Item) -> list[str]:
    found = re.findall(r"^Document (\d+): (.*)$", item.prompt, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [text for _, text in found]


def subject(document: str) -> str:
    return document.split(" ", 1)[0]


def test_one_document_has_the_answer_about_the_asked_subject() -> None:
    for item in items("qa_1", 12):
        texts, (answer,) = documents(item), item.answers
        assert len(texts) == item.meta["units"] + 1
        (holder,) = [text for text in texts if answer in text]
        question = item.meta["question"]
        assert whole(subject(holder), question) == 1 and item.prompt.count(answer) == 1
        assert not any(whole(subject(text), question) for text in texts if text != holder)
        assert item.prompt.endswith(f"Question: {question}\nAnswer:")
        place = texts.index(holder) / (len(texts) - 1)
        assert place == pytest.approx(item.meta["depth"], abs=1.5 / len(texts))


def test_the_answer_fits_the_question() -> None:
    """The sentence with the answer is the one that the question turns around."""
    words = {"born": "born", "learn": "learned", "cross": "crossed", "marry": "married",
             "buried": "buried", "lead": "leads", "paid": "paid", "statue": "statue",
             "pride": "pride", "built ": "built"}  # fmt: skip
    kinds = set()
    for name in ("qa_1", "qa_2"):
        for item in items(name, 40, 1_300):
            (holder,) = [text for text in documents(item) if item.answers[0] in text]
            (sentence,) = [s for s in holder.split(". ") if item.answers[0] in s]
            question = item.meta["question"].replace("the person who built", "")
            (kind,) = [verb for verb in words if verb in question]
            assert words[kind].strip() in sentence
            kinds.add(kind)
    assert len(kinds) == 10


def test_two_documents_lead_to_the_answer() -> None:
    for item in items("qa_2", 12):
        texts, (answer,) = documents(item), item.answers
        assert len(texts) == 2 * item.meta["units"] + 2
        (bridge,) = [text for text in texts if whole(subject(text), item.meta["question"])]
        (builder,) = re.findall(r"was built by (\w+)\.", bridge)
        (person,) = [text for text in texts if subject(text) == builder]
        assert answer in person and answer not in bridge and item.prompt.count(answer) == 1
        assert whole(builder, item.meta["question"]) == 0
        places = [texts.index(text) / (len(texts) - 1) for text in (bridge, person)]
        assert places == pytest.approx(item.meta["depths"], abs=2.5 / len(texts))


def test_every_builder_has_a_document() -> None:
    for item in items("qa_2", 3):
        texts = documents(item)
        builders = re.findall(r"was built by (\w+)\.", "\n".join(texts))
        people = {subject(text) for text in texts if re.match(r"\w+ was an? ", text)}
        assert set(builders) == people and len(builders) == len(people) == len(texts) / 2


def test_documents_are_in_no_order() -> None:
    places = [item.meta["depth"] for item in items("qa_1", 40, 1_300)]
    assert min(places) < 0.15 and max(places) > 0.85
    kinds = [" is a " in text for item in items("qa_2", 3) for text in documents(item)]
    assert 0.2 < sum(a == b for a, b in pairwise(kinds)) / len(kinds) < 0.8


# --- words --------------------------------------------------------------------------------------


def drawn(item: Item) -> list[str]:
    """The words and names that were drawn for an item."""
    name = item.meta["task"]
    if name.startswith("niah"):
        return [word for key, _ in facts(item) for word in key.split("-") if word.isalpha()]
    if name == "vt":
        return re.findall(r"^SET ([A-Z]+)", item.prompt, re.MULTILINE)
    if name == "cwe":
        return re.findall(r"\d+\. ([a-z]+)", item.prompt)
    if name == "fwe":
        return [word for word in item.prompt.split("\n")[1].split() if word != "..."]
    return [subject(text) for text in documents(item)] + list(item.answers)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "niah_multikey_3"])
def test_words_are_held_out_and_training_may_pass_its_own(name: str) -> None:
    assert all(all(map(held_out, drawn(item))) and drawn(item) for item in items(name))
    mine = Material(lambda word: not held_out(word), lambda: ["alpha", "river"], lambda: ["own."])
    item, reply = write(name, tokenizer, 1_300, stream("mine", name), 7, mine)
    assert drawn(item) and not any(map(held_out, drawn(item)))
    assert Ruler().score(item, reply) == 1
    if name in PROSE:
        lines = context(item).split("\n\n")[1].split("\n")
        assert {line for line in lines if not FACT.match(line)} == {"own."}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), apart=st.integers(0, 4))
def test_distinct_words_differ_and_the_first_are_part_of_none(seed: int, apart: int) -> None:
    rng = random.Random(seed)
    source = distinct(lambda: "".join(rng.choices("abc", k=rng.randint(3, 6))), apart)
    words = [next(source) for _ in range(30)]
    assert len(set(words)) == 30
    for i, first in enumerate(words[:apart]):
        assert not any(first in w or w in first for j, w in enumerate(words) if j != i)


def test_no_word_holds_a_right_one() -> None:
    for name in ("cwe", "qa_1", "qa_2"):
        for item in items(name):
            text = context(item)
            for answer in item.answers:
                assert text.count(answer) == whole(answer, text) > 0


# --- building a prompt --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    overhead=st.integers(0, 60), unit=st.integers(1, 40), length=st.integers(400, 9_000),
    wobble=st.integers(0, 3),
)  # fmt: skip
def test_fill_is_less_than_a_unit_or_a_thousandth_short(
    overhead: int, unit: int, length: int, wobble: int
) -> None:
    def build(count: int) -> str:
        return "7" * (overhead + unit * count + count * count % (1 + wobble))

    count, prompt = fill(Draft(build, ("a",), " a"), tokenizer, length)
    size = count_tokens(tokenizer, prompt)
    assert prompt == build(count)
    assert 0 <= length - size < max(unit + wobble + 1, length / 1_024 + 1)


def test_fill_refuses_what_cannot_fit() -> None:
    def build(count: int) -> str:
        return "7" * (90 + 20 * count)

    assert fill(Draft(build, ("a",), " a", least=4), tokenizer, 171)[0] == 4
    with pytest.raises(ValueError, match="at least 4 units .* received 170"):
        fill(Draft(build, ("a",), " a", least=4), tokenizer, 170)


@given(st.lists(st.integers(0, 9), max_size=8))
def test_hidden_sentences_stand_where_they_should_in_order(places: list[int]) -> None:
    sentences = [(place, f"s{i}") for i, place in enumerate(places)]
    shown = hide([str(i) for i in range(9)], sentences)
    assert [line for line in shown if line.isdigit()] == [str(i) for i in range(9)]
    for place, sentence in sentences:
        before = shown[: shown.index(sentence)]
        assert sum(line.isdigit() for line in before) == place
    for i, (place, sentence) in enumerate(sentences):
        later = [s for p, s in sentences[i + 1 :] if p == place]
        assert all(shown.index(sentence) < shown.index(s) for s in later)


def test_lists_read_as_sentences_do() -> None:
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a", "a and b", "a, b and c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ruler(()), "tasks: expected"),
        (lambda: Ruler(("vt", "vt")), "tasks: expected different"),
        (lambda: Ruler(("vtt",)), "tasks: expected"),
        (lambda: Ruler("vt"), "tasks: expected"),  # type: ignore
        (lambda: write("nope", tokenizer, 2_000, stream(0)), "tasks: expected"),
        (lambda: Ruler().items(tokenizer, 0, 2_000, 0), "n: expected"),
        (lambda: Ruler().items(tokenizer, 1, 100, 0), "length: expected"),
        (lambda: Ruler(("vt",)).items(tokenizer, 1, 512, 0), "vt: length: expected room"),
        (lambda: Ruler(("cwe",)).items(tokenizer, 1, 512, 0), "cwe: length: expected room"),
        (lambda: Niah(haystack="hay"), "haystack: expected"),
        (lambda: Niah(key_kind="numbers"), "key_kind: expected"),
        (lambda: Niah(value_kind="words"), "value_kind: expected"),
        (lambda: Niah(queries=2), "queries <= keys"),
        (lambda: Niah(keys=11, values=4), "40 facts"),
        (lambda: Tracing(hops=0), "1 hop"),
        (lambda: Tracing(chains=0), "1 chain"),
        (lambda: DocumentQuestions(hops=3), "hops: expected"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "received" in str(caught.value) and ";" in str(caught.value)
