"""The harder reference's recipe: documents whose answers follow from them, resuming, evaluation."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import evaluate_gated
import gated_card
import harder_data
import harder_evaluation
import harder_wording
import train_harder
from harder_data import ANSWERS, FAMILIES, WEIGHTS, HarderAuthor
from harder_wording import Phrases, Relation
from reference_data import ANSWER, BOS, EOS, Corpus, Words
from tokenizers import Tokenizer

from dynmask.evals.ruler import niah, qa, tracing, words
from dynmask.evals.ruler.base import NOISE
from dynmask.evals.text import held_out
from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = Tokenizer.from_file(str(ROOT / "models" / "dynmask-reference" / "tokenizer.json"))
REAL = "river stone amber lamp harbor copy grass violin marble needle orange paper"
KNOWN = [word for word in REAL.split() if not held_out(word)]
LENGTHS = [400, 1_032, 3_000]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    ids = np.array(TOKENIZER.encode("A line of text.\n" * 3_000).ids[1:], np.uint16)
    return Corpus(
        TOKENIZER, ids, ids.copy(), KNOWN, [{"name": "x", "licence": "MIT", "characters": 1}]
    )


def document(corpus: Corpus, family: str, length: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the tokens of one document of a family and their classes."""
    author, rng = HarderAuthor(corpus, [(family, 1.0)], 0.25), random.Random(seed)
    author.ids, author.spans = [], []
    author.add([BOS], 0)
    author.document(rng, length, length)
    author.cut(length)
    return author.ids, [kind for count, kind in author.spans for _ in range(count)]


def told(ids: list[int], kinds: list[int]) -> tuple[str, list[str]]:
    """Return a document's text up to its last question, and every answer."""
    inside = [kind > ANSWER for kind in kinds]
    starts = [i for i in range(1, len(ids)) if inside[i] and not inside[i - 1]]
    ends = [i + 1 for i in range(len(ids)) if inside[i] and inside[i + 1 : i + 2] != [True]]
    decode = lambda part: TOKENIZER.decode([i for i in part if i not in (BOS, EOS)])  # noqa: E731
    return decode(ids), [decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


# the documents


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_whole_and_tokens_are_the_tokenizers(corpus, family: str, length: int) -> None:
    answered = 0
    for seed in range(12):
        ids, kinds = document(corpus, family, length, seed)
        assert 0 < len(ids) == len(kinds) <= length
        text = TOKENIZER.decode(ids, skip_special_tokens=False)
        for part in re.split("</s>", text.removeprefix("<s>")):
            assert "<s>" not in part
        pieces: list[list[int]] = [[]]
        for token in ids[1:]:
            pieces[-1].append(token)
            if token == EOS:
                pieces.append([])
        for piece in pieces:
            whole = [token for token in piece if token != EOS]
            again = TOKENIZER.encode(TOKENIZER.decode(whole), add_special_tokens=False).ids
            assert whole == again
        inside = [kind > ANSWER for kind in kinds]
        for i in range(len(ids)):
            if inside[i] and inside[i + 1 : i + 2] != [True]:  # the last token of an answer
                answered += 1
                example = TOKENIZER.decode(ids[i + 1 : i + 3]).startswith("\n\n")
                assert ids[i] == EOS or example
    assert answered >= 10


def test_sequences_have_their_length_and_depend_on_the_seed_alone(corpus) -> None:
    mix = train_harder.HarderRecipe().mix
    for length in (300, 1_032, 4_128):
        author = HarderAuthor(corpus, mix, 0.25)
        first = author.sequence(random.Random(3), length)
        author.sequence(random.Random(4), length)
        again = HarderAuthor(corpus, mix, 0.25).sequence(random.Random(3), length)
        for a, b in zip(first, again, strict=True):
            assert a.shape == (length,) and (a == b).all()
        assert first[1].max() < len(WEIGHTS)


def test_the_mix_is_what_is_written(corpus) -> None:
    author = HarderAuthor(corpus, [("traces", 0.5), ("common", 0.25)], 0.25)
    seen: Counter[str] = Counter()
    author.mix = [
        (lambda *a, name=name: seen.update([name]), share)
        for (_, share), name in zip(author.mix, ("traces", "common"), strict=True)
    ]
    rng = random.Random(0)
    author.plain = author.facts = author.interleaved = author.copies = author.asked_at_end = (
        lambda *a: seen.update(["other"])
    )
    for _ in range(2_000):
        author.document(rng, 1_000, 1_000)
    assert abs(seen["traces"] - 1_000) < 120 and abs(seen["other"] - 500) < 100
    author.document(rng, 100, 100)  # too short for a family
    assert sum(seen.values()) == 2_001


def test_every_value_of_a_key_is_told_in_the_order_of_the_text(corpus, monkeypatch) -> None:
    monkeypatch.setattr(harder_data, "compose_sentence", lambda *a: "fact {K} has {V} so")
    monkeypatch.setattr(harder_data, "compose_ask", lambda *a: ("ask <{K}> {n}?", "\nA:"))
    monkeypatch.setattr(harder_data, "LIST_STYLES", (harder_wording.ListStyle("; ", "; "),))
    counts: Counter[int] = Counter()
    for seed in range(40):
        text, answers = told(*document(corpus, "needles", 1_500, seed))
        facts: dict[str, list[str]] = {}
        for key, value in re.findall(r"fact (.+) has (\S+) so", text):
            facts.setdefault(key, []).append(value)
        asked = re.findall(r"ask <(.+)> (\d+)\?", text)
        assert len(asked) == len(answers)
        for (keys, count), answer in zip(asked, answers, strict=True):
            names = keys.replace(" and ", ", ").split(", ")
            expected = [value for name in names for value in facts[name]]
            assert answer.strip().rstrip(".") == "; ".join(expected)
            assert len(expected) == int(count)
            counts[len(names)] += 1
            counts[-len(expected)] += 1
    assert counts[1] and counts[2] and counts[4] and counts[-1] and counts[-4]


def test_traces_follow_the_assignments(corpus, monkeypatch) -> None:
    monkeypatch.setattr(harder_data, "compose_assignment", lambda *a: "let {N} be {W} now")
    ask = lambda phrases, many: (f"ask {'all' if many else 'one'} <{{K}}> {{n}}?", "\nA:")  # noqa: E731
    monkeypatch.setattr(harder_data, "compose_ask", ask)
    seen: Counter[str] = Counter()
    for seed in range(60):
        text, answers = told(*document(corpus, "traces", 1_500, seed))
        source: dict[str, str] = {}
        names: dict[str, list[str]] = {}
        told_of = dict(re.findall(r"let (\S+) be (\S+) now", text))
        for name, what in re.findall(r"let (\S+) be (\S+) now", text):
            assert name not in source  # no variable is set twice
            source[name] = source.get(what, what)
            names.setdefault(source[name], []).append(name)
        asked = re.findall(r"ask (\w+) <(\S+)> (\d+)\?", text)
        assert len(asked) == len(answers)
        for (kind, key, count), answer in zip(asked, answers, strict=True):
            said = re.split(", | and | ", answer.strip())
            assert said == (names[key] if kind == "all" else [source[key]])
            assert len(said) == int(count)
            if kind == "all":  # one chain, in its order
                assert [told_of[name] for name in said] == [key, *said[:-1]]
            seen[f"{kind} {len(said)}"] += 1
        seen[f"chains {min(len(names), 3)}"] += 1
    assert all(seen[kind] for kind in ("all 5", "all 2", "one 1", "chains 1", "chains 3"))


COMMON_STEMS = {"what", "valu", "that", "with", "from", "over", "unde", "thro", "whic", "whos"}


def listed_words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def test_common_words_come_more_often_than_all_others(corpus, monkeypatch) -> None:
    monkeypatch.setattr(harder_data, "compose_count", lambda *a: ("\nASK {n}?", "\nREPLY"))
    monkeypatch.setattr(Phrases, "opening", lambda self: "0")
    for seed in range(25):
        text, answers = told(*document(corpus, "common", 2_000, seed))
        parts = re.split(r"\nASK \d+\?\nREPLY.*(?:\n|$)", text)
        for part, answer in zip(parts, answers, strict=False):
            counts = Counter(listed_words(part))
            said = [word for word in listed_words(answer) if word != "and"]
            others = [count for word, count in counts.items() if word not in said]
            assert len({counts[word] for word in said}) == 1
            assert len(others) >= 3 and counts[said[0]] >= 3 * max(others)


def test_frequent_words_are_told_from_the_most_frequent_down(corpus, monkeypatch) -> None:
    monkeypatch.setattr(harder_data, "compose_count", lambda *a: ("\nASK {n}?", "\nREPLY"))
    monkeypatch.setattr(Phrases, "opening", lambda self: "0")
    for seed in range(40):
        text, answers = told(*document(corpus, "frequent", 350 if seed % 2 else 1_500, seed))
        parts = re.split(r"\nASK \d+\?\nREPLY.*(?:\n|$)", text)
        for part, answer in zip(parts, answers, strict=False):
            counts = Counter(listed_words(part))
            said = [word for word in listed_words(answer) if word != "and"]
            ranked = [count for _, count in counts.most_common(len(said) + 1)]
            assert [word for word, _ in counts.most_common(len(said))] == said
            assert len(set(ranked)) == len(ranked)  # no ties


@pytest.mark.parametrize("room", [30, 60, 90])
def test_asked_words_never_come_equally_often(corpus, room: int) -> None:
    author = HarderAuthor(corpus, [], 0.25)
    coded = ["..", "river", "stone", "amber", "lamp", "harbor"]
    ids = harder_data.frequent_list(author, random.Random(0), coded, 1.2, 3, room)
    counts = Counter(TOKENIZER.decode(ids).split())
    times = [counts[word] for word in coded[:5]]
    assert times == sorted(set(times), reverse=True)


def test_documents_hold_their_answers_one_or_two_hops_away(corpus, monkeypatch) -> None:
    made = iter(range(10**9))

    def relation(phrases: Phrases) -> Relation:
        tag = f"r{next(made)}x"
        return Relation(f"The {{what}} {tag} {{value}}.", f"ASK {tag} <{{who}}>?",
                        f"that {tag} [{{who}}]")  # fmt: skip

    monkeypatch.setattr(harder_data, "compose_relation", relation)
    monkeypatch.setattr(harder_data, "HEADERS", ("DOC {n}: ",))
    monkeypatch.setattr(HarderAuthor, "word", lambda *a: f"zq{next(made)}")
    hops: Counter[int] = Counter()
    for seed in range(30):
        text, answers = told(*document(corpus, "documents", 1_500, seed))
        facts: dict[tuple[str, str], str] = {}
        pages = re.split(r"DOC \d+: ", text.split("ASK")[0])[1:]
        for page in pages:
            subject = re.findall(r"Zq\d+", page)[0]
            for tag, value in re.findall(r"(r\d+x) (Zq\d+)", page):
                assert facts.setdefault((subject, tag), value) == value
        asked = re.findall(r"ASK (r\d+x) <(.*?)>\?", text)
        assert len(asked) == len(answers) > 0
        for (tag, who), answer in zip(asked, answers, strict=True):
            (name,) = re.findall(r"Zq\d+", who)
            link = re.findall(r"that (r\d+x) \[", who)
            hops[len(link) + 1] += 1
            for known in (*link, tag):
                name = facts[name, known]
            assert answer.strip().rstrip(".") == name
    assert hops[1] > 20 and hops[2] > 20


# apart from the evaluation


def test_words_and_names_are_never_held_out(corpus) -> None:
    author, rng = HarderAuthor(corpus, [], 0.25), random.Random(1)
    for _ in range(400):
        assert not held_out(author.word(rng, 0.3))
        assert not held_out(author.letters(rng, "ABCDEFG", 5))
    names: set[str] = set()
    for seed in range(20):
        _, answers = told(*document(corpus, "documents", 1_000, seed))
        names |= {word for answer in answers for word in listed_words(answer)}
        _, answers = told(*document(corpus, "traces", 1_000, seed))
        names |= {word for word in listed_words(" ".join(answers)) if word.isupper()}
    assert len(names) > 60 and not any(held_out(name) for name in names)


def strings(path: Path) -> list[str]:
    """Return the texts in a source file, its docstrings aside."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [node.value for node in nodes if isinstance(node, ast.Constant)
            and isinstance(node.value, str) and id(node) not in said]  # fmt: skip


def test_wordings_are_not_the_evaluated_ones() -> None:
    source = "\n".join(text for module in (harder_wording, harder_data)
                       for text in strings(Path(module.__file__))).lower()  # fmt: skip
    pairs = (*qa.PEOPLE, *qa.PLACES, qa.BUILT)
    evaluated = [
        NOISE, niah.ONE, niah.MANY, niah.FACT, niah.ASK_ONE, niah.ASK_MANY, tracing.INTRO,
        tracing.QUESTION, words.COMMON_INTRO, words.COMMON_QUESTION, words.CODED_INTRO,
        words.CODED_QUESTION, qa.RULE, *(part for pair in pairs for part in pair),
    ]  # fmt: skip
    for text in evaluated:
        for sentence in re.split(r"[.?:;\n]|\{\w+\}", text.lower()):
            words_of = sentence.split()
            for i in range(len(words_of) - 3):
                assert " ".join(words_of[i : i + 4]) not in source
    phrases = Phrases(random.Random(0), Words(["set", "river"]))
    wordings = [harder_wording.compose_assignment(phrases) for _ in range(2_000)]
    assert not any(line.lower().startswith("set ") for line in wordings)
    assert all("{N}" in line and "{W}" in line for line in wordings)
    assert not any(header.startswith("Document") for header in harder_wording.HEADERS)


@pytest.mark.parametrize("seed", range(3))
def test_composed_wordings_have_their_blanks(seed: int) -> None:
    phrases = Phrases(random.Random(seed), Words(KNOWN))
    for _ in range(400):
        question, start = harder_wording.compose_ask(phrases, many=bool(_ % 2))
        assert "{K}" in question and not start.endswith(" ")
        (question + start).format(K="k", L="l", n=2)
        question, start = harder_wording.compose_count(phrases)
        assert "{n}" in question and not start.endswith(" ")
        relation = harder_wording.compose_relation(phrases)
        assert "{what}" in relation.sentence.lower() and "{value}" in relation.sentence
        assert "{who}" in relation.question and "{who}" in relation.clause
        stems = [{word[:4].lower() for word in listed_words(text) if len(word) > 3} - COMMON_STEMS
                 for text in (relation.sentence, relation.question)]  # fmt: skip
        assert stems[0] & stems[1]
        assert relation.question.format(who="x") and relation.clause.format(who="x")


# the evaluation


def test_answers_together_are_the_answers_alone() -> None:
    model = tiny_llama(seed=3)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 250, (size,), generator=generator) for size in (5, 41, 17, 1)]
    alone = []
    for prompt in prompts:
        out = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)),
                             max_new_tokens=12, do_sample=False)  # fmt: skip
        alone.append(out[0, len(prompt) :].tolist())
    assert harder_evaluation.replies(model, prompts, 12, stop=-1) == alone
    stop = alone[1][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in alone]
    assert harder_evaluation.replies(model, prompts, 12, stop=stop) == cut


def test_the_whole_grid_comes_before_any_second_round() -> None:
    found = harder_evaluation.cells((65_536, 4_096), 5, 2, None)
    assert len(found) == 2 * 2 * 15 and len(set(found)) == len(found)
    assert [cell.round for cell in found] == [1] * 30 + [2] * 30
    assert [cell.length for cell in found[:30]] == [65_536] * 15 + [4_096] * 15


def test_an_evaluation_keeps_every_row_and_goes_on(tmp_path, monkeypatch) -> None:
    wanted = harder_evaluation.cells((512,), 2, 2, None)
    begun: list[tuple[str, int]] = []

    def measured(cell, model, tokenizer):
        if len(begun) == stop:
            raise KeyboardInterrupt
        begun.append((cell.label, cell.round))
        if cell.label == "cwe":
            return None  # no room
        return {"task": cell.label, "group": "g", "length": 512, "rounds": 1, "items": 2,
                "score": float(cell.round == 2), "prompt_tokens": 9.0, "seconds": 0.1,
                "wrong": [{}] * 2}  # fmt: skip

    monkeypatch.setattr(harder_evaluation, "measured", measured)
    monkeypatch.setattr(harder_evaluation, "load", lambda *a: (None, None))
    kept: list[list[dict]] = []
    run = lambda rows, minutes=1.0: harder_evaluation.evaluate(  # noqa: E731
        wanted, rows, tmp_path, "cpu", minutes, kept.append
    )
    stop = 20
    with pytest.raises(KeyboardInterrupt):
        run([])
    assert len(kept[-1]) == 14 and sum(row["rounds"] for row in kept[-1]) == 19
    before, stop = list(begun), -1
    begun.clear()
    rows = run(kept[-1])
    assert not set(begun) & {pair for pair in before if pair[0] != "cwe"}
    assert {row["score"] for row in rows} == {0.5} and {row["items"] for row in rows} == {4}
    assert all(len(row["wrong"]) == 4 for row in rows)
    begun.clear()
    assert run([], minutes=0.0) == [] and not begun


# the recipe


def test_the_recipe_refuses_what_cannot_work(tmp_path) -> None:
    recipe = train_harder.HarderRecipe()
    assert recipe.rope_theta == pytest.approx(0.0424 * 65_536**1.628, rel=0.02)
    assert recipe.longest == 66_048
    with pytest.raises(ValueError, match=r"mix: expected families among .* received"):
        replace(recipe, mix=(("needles", 0.9), ("traces", 0.2)))
    with pytest.raises(ValueError, match="mix: expected families"):
        replace(recipe, mix=(("riddles", 0.1),))
    with pytest.raises(ValueError, match=r"--longest: expected at least the 1032"):
        train_harder.shortened(recipe, 1_000)
    short = train_harder.shortened(recipe, 2_064)
    assert short.stages == ((1_032, 0.5), (2_064, 0.5))
    assert set(ANSWERS.values()) == set(range(ANSWER + 1, len(WEIGHTS)))


def start_model(folder: Path) -> Path:
    """Save a tiny model in the tokens of the reference, as its recipe does."""
    model = tiny_llama(vocab_size=4_096, hidden_size=16, intermediate_size=16, head_dim=8)
    recipe = train_harder.HarderRecipe()
    train_harder.save_model(model, TOKENIZER, recipe, folder)  # type: ignore[arg-type]
    (folder / "evaluation.json").write_text(json.dumps({"phases": []}))
    (folder / "training.jsonl").write_text('{"phase": 1, "step": 7}\n')
    return folder


def run_recipe(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_harder.py", *map(str, arguments)])
    train_harder.main()


def test_training_resumes_where_it_was_interrupted(corpus, tmp_path, monkeypatch) -> None:
    start = start_model(tmp_path / "start")
    train_harder.save_corpus(tmp_path / "text", corpus)
    common = ("--start", start, "--text", tmp_path / "text", "--longest", 1_032, "--tokens", 2_064,
              "--steps", 4, "--minutes", 99, "--device", "cpu", "--workers", 1, "--log-seconds",
              0, "--evaluation-minutes", 0)  # fmt: skip
    run_recipe(monkeypatch, *common, "--out", tmp_path / "whole")
    loss, calls = train_harder.HarderTrainer.loss, []

    def interrupted(self, ids, classes):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, ids, classes)

    monkeypatch.setattr(train_harder.HarderTrainer, "loss", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 2"):
        run_recipe(monkeypatch, *common, "--out", tmp_path / "parts")
    run_recipe(monkeypatch, *common, "--out", tmp_path / "parts", "--resume")
    assert len(calls) == 5  # two steps, the interrupted one, and the two that are left
    whole, parts = (train_harder.AutoConfig.from_pretrained(tmp_path / name)
                    for name in ("whole", "parts"))  # fmt: skip
    assert whole.rope_parameters["rope_theta"] == parts.rope_parameters["rope_theta"] == 2.9e6
    assert whole.max_position_embeddings == 1_032 and whole.hidden_size == 16
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1] != (start / "model.safetensors").read_bytes()
    log = [json.loads(line) for line in (tmp_path / "parts/training.jsonl").open()]
    assert log[0] == {"phase": 1, "step": 7} and [row["step"] for row in log[1:]] == [1, 2, 3, 4]
    assert any(key.startswith("needles_") for row in log[1:] for key in row)
    report = json.loads((tmp_path / "parts" / "evaluation.json").read_text())
    assert report["phases"][0]["training"]["step"] == 4 and report["rows"] == []
    card = (tmp_path / "parts" / "README.md").read_text()
    assert "| niah_multivalue |" in card and "needles 20%" in card


def test_the_recipe_names_what_is_missing(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="--start: expected a folder of a trained model"):
        run_recipe(monkeypatch, "--start", tmp_path, "--device", "cpu")


# the documents of the gated cards


@pytest.mark.parametrize("harder", [False, True])
def test_a_card_is_judged_where_answers_are_told(corpus, harder):
    """Every document ends within its last answer; what is judged predicts that answer's tokens."""
    mix = [(name, 0.1) for name in FAMILIES]
    author = HarderAuthor(corpus, mix, 0.25) if harder else gated_card.Author(corpus)
    kinds = len(gated_card.writers(author))
    assert kinds == (7 if harder else 2) and len(gated_card.writers(author, recall=True)) == 2
    texts, judged, decoded = gated_card.documents(author, [500, 900], kinds, 3, beside=7)
    again, *_ = gated_card.documents(author, [500, 900], kinds, 3, beside=7)
    assert len(texts) == 2 * kinds and all(map(torch.equal, texts, again))
    for number, (text, rows) in enumerate(zip(texts, judged, strict=True)):
        assert len(text) < (500 if number < kinds else 900)
        assert rows.tolist() == sorted(set(rows.tolist())) and rows[-1] == len(text) - 1
        told = rows[7:]  # one run, up to the end
        assert told.tolist() == list(range(int(told[0]), len(text)))
        assert decoded[number] == len(told) - 1  # its first token is the prompt's to predict
        before = int(told[0])
        assert before - gated_card.LATE <= int(rows[0]) and int(rows[6]) < before
    begin, stop = gated_card.answers(author.spans)[-1]  # of the last document
    assert judged[-1][7:].tolist() == list(range(begin - 1, stop - 1))
    alone = gated_card.documents(author, [500, 900], kinds, 3)[1]
    assert all(map(torch.equal, alone, [rows[7:] for rows in judged]))


def test_a_text_that_is_full_before_its_first_question_is_written_again(corpus, monkeypatch):
    author = gated_card.Author(corpus)
    asked = []

    def first_without(spans, answers=gated_card.answers):
        asked.append(len(spans))
        return answers(spans) if len(asked) > 1 else []

    monkeypatch.setattr(gated_card, "answers", first_without)
    texts, *_ = gated_card.documents(author, [500], 1, 3)
    assert len(asked) == 2 and len(texts) == 1


REFUSED_CARDS = {
    "--recall": "--recall --max-kl 0.002",
    "--documents": "--documents 0",
    "--lengths": "--lengths 4096 10",
    "--max-kl": "--max-kl 0.02 0.02",
    "--least-window: expected 0 to 4096": "--least-window 5000",
    "settings.max_kl": "--max-kl -1",
    "settings.density": "--density 2",
    "settings.encoder": "--encoder --least-window 600",
    "pool": "--pool 2",
}


@pytest.mark.parametrize("named", REFUSED_CARDS)
def test_a_card_that_cannot_be_made_is_refused_before_the_model_is_read(
    named, tmp_path, monkeypatch, capsys
):
    given = [*REFUSED_CARDS[named].split(), "--model", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["gated_card.py", *given])
    with pytest.raises(SystemExit):
        gated_card.main()
    assert named in capsys.readouterr().err


def answered(policy: str, *groups: str, task: str = "ruler 32768") -> list[dict]:
    """Rows of a policy, as results have them."""
    row = {"model": "dynmask-reference-64k", "task": task, "policy": policy, "n": 8}
    row |= {"accuracy": 0.5, "density": 0.1, "device": {"type": "cuda", "name": "a GPU"}}
    return [{**row, "group": group} for group in groups]


UNKNOWN = {
    "received 'lines'": ["--tasks", "lines"],
    "received 'line 4096'": ["--tasks", "line 4096"],
    "received 'ruler:vt abc'": ["--tasks", "ruler:vt abc"],
    "received ('vt', 'foo')": ["--tasks", "ruler:vt+foo 4096"],
    "received 'nonsense'": ["--tasks", "lines 4096", "--policies", "nonsense"],
}


@pytest.mark.parametrize("said", UNKNOWN)
def test_an_evaluation_of_what_is_unknown_is_refused_before_the_work(said, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_gated, "run", None)
    monkeypatch.setattr(sys, "argv", ["evaluate_gated.py", *UNKNOWN[said]])
    with pytest.raises(SystemExit):
        evaluate_gated.main()
    assert said in capsys.readouterr().err


def test_a_picture_of_what_was_not_measured_is_refused(tmp_path):
    rows = answered("full", "vt", "cwe", task="longeval 600")
    rows = [{**row, "model": evaluate_gated.MODEL.name} for row in rows]
    task, out = "longeval 600", tmp_path / "picture.png"
    with pytest.raises(SystemExit, match="gate .card"):
        evaluate_gated.draw(rows, evaluate_gated.MODEL.name, task, out, ["full", "gate (card)"])
    with pytest.raises(SystemExit, match="--plot"):  # others have measured the task
        evaluate_gated.draw([], evaluate_gated.MODEL.name, task, out, None)
    assert not out.exists()


@pytest.mark.parametrize("asked", [("vt",), ("vt", "cwe")])
def test_a_goal_compares_the_same_groups(asked, monkeypatch):
    import benchmarks.headline

    written: list[dict] = []
    monkeypatch.setattr(benchmarks.headline, "record", lambda **given: written.append(given))
    rows = answered("full", "vt", "cwe") + answered(evaluate_gated.CARD, *asked)
    evaluate_gated.record_goals(rows)
    assert len(written) == (2 if len(asked) == 2 else 0)


def test_a_cell_of_some_groups_says_so():
    from benchmarks.tables import _answered

    rows = answered("full", "vt", "cwe", "fwe") + answered("one", "vt") + answered("a", "vt", "cwe")
    cells = [_answered(rows, "ruler 32768", name) for name in ("full", "one", "a")]
    assert ["of 3 tasks" in cell for cell in cells] == [False, True, True]


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("asked", [{}, {"slashes"}, {"scores", "slashes"}, {"blocks", "scores"}])
def test_a_card_is_offered_the_kinds_that_are_asked_for(asked, smoke):
    given = {"encoder": False, "density": None, "least": 1e-3, "pool": 1, "decode": "full"}
    kinds = {name: name in asked for name in ("blocks", "slashes")}
    scores = "card" if "scores" in asked else None
    options = SimpleNamespace(**given, **kinds, scores=scores, least_window=512, smoke=smoke)
    budgets = gated_card.settings_of(options, 0.02).budgets
    found = {"scores": "kept", "slashes": "slashes", "blocks": "blocks"}
    for name, field in found.items():
        some = [getattr(budget, field) for budget in budgets if getattr(budget, field)]
        assert bool(some) is (name in asked) or (smoke and name == "blocks" and not some)
    assert all(budget.window >= 512 for budget in budgets)
    assert len(budgets) <= 4 or not smoke
