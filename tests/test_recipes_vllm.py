"""The recipes over vLLM, without vLLM: their card, their rows, and what a client expects."""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import soak
import vllm_compare
import vllm_equal

from dynmask import MaskCard
from dynmask.evals.task import Item
from dynmask.policies import parse

HERE = {"commit": "c", "device": {"name": "d"}}


def test_a_card_is_spread_over_another_shape(tmp_path):
    made = vllm_compare.write_card(tmp_path / "card", vllm_compare.CARD, vllm_compare.LLAMA_1B)
    source, card = (MaskCard.from_pretrained(p) for p in (vllm_compare.CARD, made))
    card.policy(dense_up_to=99).check(16, 32, 8)
    for name, table in card.tensors.items():
        assert table.shape == (16, 32)
        assert torch.equal(table[::2, ::8], source.tensors[name])
    assert card.policy().least == 0


@pytest.mark.parametrize("given", ["--lengths 0", "--rounds -1", "--limit 0", "--card {retained}"])
def test_a_comparison_that_cannot_be_is_refused_before_the_work(given, monkeypatch, capsys):
    retained = Path(vllm_compare.CARD).with_name("dynmask-reference-retained")
    monkeypatch.setattr(vllm_compare, "write_model", None)
    with pytest.raises(SystemExit):
        vllm_compare.main(["--device", "cpu", *given.format(retained=retained).split()])
    assert f"{given.split()[0]}: expected" in capsys.readouterr().err


def test_a_card_of_before_there_were_blocks_is_of_columns_alone():
    card = MaskCard.from_pretrained(vllm_compare.CARD)
    older = {name: x for name, x in card.tensors.items() if name != "blocks"}
    settings = {k: x for k, x in card.header["settings"].items() if k != "block"}
    card = MaskCard(card.header | {"settings": settings}, older)
    assert vllm_compare.kind_of(card).endswith("columns alone")


def test_a_model_is_a_configuration_alone(tmp_path):
    folder = vllm_compare.write_model(tmp_path / "model", vllm_compare.TINY, 300)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 300
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def asked(model):
    return {"model": str(model), "short": 7, "cpu": True, "limit": 60}


def run(tmp_path, monkeypatch, code, case="gated"):
    """One case whose engine is a line of Python; the rows that are left."""
    script = tmp_path / "engine.py"
    script.write_text(code)
    monkeypatch.setattr(vllm_compare, "__file__", str(script))
    own = vllm_compare.CASES[case], asked("m"), tmp_path / "card", tmp_path
    out = tmp_path / "vllm.jsonl"
    done = vllm_compare.run(*own, vllm_compare.TINY, HERE, out)
    return done, [json.loads(x) for x in out.read_text().splitlines()] if out.exists() else []


PRINT = """import json, os
print("noise")
for keys in (64, 128):
    row = {"keys": keys, "first_s": 1, "tokens_per_s": 2, "asked": os.environ.get("DYNMASK_POLICY")}
    print("row: " + json.dumps(row), flush=True)
"""


def test_rows_are_kept_as_they_come_even_of_an_engine_that_fails(tmp_path, monkeypatch, capsys):
    done, rows = run(tmp_path, monkeypatch, PRINT)
    assert done and [r["keys"] for r in rows] == [64, 128]
    assert rows[0]["asked"] == f"gated:{tmp_path / 'card'},dense_up_to=7"
    assert rows[0]["policy"] == "gated:CARD,dense_up_to=7" and rows[0]["commit"] == "c"
    done, rows = run(tmp_path, monkeypatch, PRINT + "raise ValueError('broken')", case="flash")
    assert not done and len(rows) == 4 and rows[-1]["asked"] is None
    assert "FAILED" in capsys.readouterr().out
    assert len(run(tmp_path, monkeypatch, PRINT)[1]) == 4  # a row takes the place of its own


def test_an_engine_that_hangs_is_stopped(tmp_path, monkeypatch, capsys):
    late = asked("m") | {"limit": 0}
    monkeypatch.setattr(sys.modules[__name__], "asked", lambda model: late)
    done, rows = run(tmp_path, monkeypatch, "import threading; threading.Event().wait()")
    assert not done and not rows and "limit 0 s" in capsys.readouterr().out


class Steps:
    """An engine that gives one token of an answer a step, after one that gives none."""

    def __init__(self, tokens):
        self.left, self.now = [0, *range(1, tokens + 1)], 10

    def add_request(self, name, prompt, wanted):
        assert prompt == {"prompt_token_ids": [5, 6]}

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        made = self.left.pop(0)
        self.now += 1
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * made)])]


def test_the_first_token_is_the_first_that_comes_back(monkeypatch):
    vllm = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for made in (4, 3):
        engine = Steps(made)
        clock = SimpleNamespace(perf_counter=lambda engine=engine: engine.now)
        monkeypatch.setattr(vllm_compare, "time", clock)
        if made == 4:
            assert vllm_compare.answer(engine, [5, 6], 4) == (2, 5)
            continue
        with pytest.raises(RuntimeError, match="answer of 4 tokens, received 3"):
            vllm_compare.answer(engine, [5, 6], 4)


class Answers:
    """A server that answers with what it is told."""

    model, longest = "m", 100

    def __init__(self, status, text):
        self.answer = status, text.encode()
        self.bodies = []

    def post(self, body, hang_up=False):
        self.bodies.append(body)
        return self.answer


WHY = json.dumps({"error": {"message": "it is  too long"}})


@pytest.mark.parametrize(
    "kind, status, text, fine",
    [
        ("malformed", 400, WHY, True),
        ("malformed", 400, "no JSON", False),
        ("malformed", 400, '{"error": {"message": ""}}', False),
        ("malformed", 200, WHY, False),
        ("too long", 400, WHY, True),
        ("too long", 400, "[]", False),
        ("too long", 500, WHY, False),
        ("cancelled", 200, "anything", True),
        ("short", 500, WHY, False),
    ],
)
def test_what_a_client_expects(kind, status, text, fine):
    """A refusal is a 4xx that says why."""
    item = Item("the prompt", ("12",), "g")
    questions = {k: [soak.Question(item, " 12")] for k in ("short", "long")}
    server, tally = Answers(status, text), soak.Tally()
    said = soak.one_request(server, questions, kind, tally, random.Random(0))
    assert (said == "") == fine
    assert tally.statuses == {kind: {str(status): 1}}
    refused = kind in ("malformed", "too long") and text == WHY
    assert tally.refusals == ({f"{status} it is too long": 1} if refused else tally.refusals)
    if kind == "too long":
        assert len(json.loads(server.bodies[0])["prompt"]) >= server.longest


def test_answers_are_held_against_the_offline_ones():
    item = Item("the prompt", ("12",), "g")
    questions = {k: [soak.Question(item, " 12")] for k in ("short", "long")}
    tally = soak.Tally()
    for text in (" 12", " 13", " 12 and so on"):
        answer = json.dumps({"choices": [{"text": text}]})
        own = Answers(200, answer), questions, "short", tally, random.Random(0)
        assert soak.one_request(*own) == ""
    assert (tally.answered, tally.different, tally.wrong, tally.wrong_offline) == (3, 2, 1, 0)
    assert tally.sent == Counter()


@pytest.mark.parametrize("recipe", [soak, vllm_compare])
def test_without_vllm_the_remedy_is_named(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_compare, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--device", "cpu", "--smoke", "--out", str(tmp_path)])
    said = str(stop.value)
    assert Path(recipe.__file__).name in said and "pip install 'dynmask[vllm]'" in said
    assert "expected" in said and "received" in said and not list(tmp_path.iterdir())


def curve(*sizes, every=60.0):
    return [{"s": i * every, "requests": i, "worker_rss": x} for i, x in enumerate(sizes)]


def test_growth_is_told_from_settling():
    """What comes in the warm-up is no growth; a spike is none; a slope is, by the hour."""
    settled = soak.growth(curve(*[100.0] * 10, *[200.0] * 50))["worker_rss"]
    assert (settled["grown_mb"], settled["mb_per_hour"]) == (0, 0)
    spiky = soak.growth(curve(*[200.0] * 40, 900.0, 900.0, *[200.0] * 18))["worker_rss"]
    assert (spiky["grown_mb"], spiky["mb_per_hour"], spiky["most_mb"]) == (0, 0, 900)
    leak = soak.growth(curve(*[100.0 + i for i in range(60)]))["worker_rss"]  # 1 MB each minute
    assert leak["mb_per_hour"] == leak["mb_per_hour_last_half"] == 60
    assert leak["grown_mb"] == pytest.approx(37, abs=2)  # between the quarters of 50 minutes
    late = soak.growth(curve(*[100.0] * 45, *[100.0 + 2 * i for i in range(15)]))["worker_rss"]
    assert late["mb_per_hour_last_half"] > 20
    assert soak.growth(curve(*[100.0] * 7)) == {} == soak.growth([])


def arguments(tmp_path, **own):
    given = {
        "model": Path("m"), "card": Path("c"), "minutes": 0.1, "clients": 2, "dense_up_to": 1,
        "short": 8, "long": 16, "plain": False, "kill": False, "seed": 0, "out": tmp_path,
    }  # fmt: skip
    return argparse.Namespace(**given | own)


class Nobody(Answers):
    """A server whose processes are there and that nobody reaches."""

    environment = {"OMP_NUM_THREADS": "1", "HOME": "/a/secret"}  # noqa: RUF012
    process = argparse.Namespace(poll=lambda: None)

    def memory(self):
        return {"worker": {"rss": 2_000_000}, "all": {"rss": 3_000_000}}

    def post(self, body, hang_up=False, begun=None):
        raise ConnectionRefusedError("nobody")


def test_clients_that_find_nobody_end_the_run_and_leave_a_row(tmp_path):
    questions = {k: [soak.Question(Item("p", ("1",), "g"), "1")] for k in ("short", "long")}
    server, own = Nobody(400, WHY), arguments(tmp_path)
    record = soak.Record(own, HERE, server)
    soak.ask(server, questions, own, record)
    assert 1 <= len(record.curve) <= 3  # not one after the other until the time is over
    assert record.curve[0]["worker_rss"] == 2 and record.curve[0]["all_rss"] == 3
    record.finish(alive=False)
    (row,) = soak.rows_of(tmp_path / "soak.jsonl")
    assert row["case"] == "soak m" and row["unexpected"] >= 1 and not row["alive_at_the_end"]
    assert row["settings"] == {"OMP_NUM_THREADS": "1"} and row["commit"] == "c"


def test_a_run_that_is_stopped_has_left_its_row(tmp_path):
    record = soak.Record(arguments(tmp_path), HERE, Nobody(400, WHY))

    def rows():
        return soak.rows_of(tmp_path / "soak.jsonl")

    memory = Nobody.memory(record)
    for second in (0, 30, 61):
        record.sample(second, memory)
    assert [(r["finished"], len(r["memory_mb"])) for r in rows()] == [(False, 3)]
    other = soak.Record(arguments(tmp_path, plain=True), HERE, Nobody(400, WHY))
    other.finish(alive=True)
    record.finish(alive=True)  # in place of its own, beside another's
    assert [(r["case"], r["finished"]) for r in rows()] == [("soak m vllm", True), ("soak m", True)]
    soak.Record(arguments(tmp_path, minutes=9), HERE, Nobody(400, WHY)).finish(alive=True)
    assert [r["minutes"] for r in rows()] == [0.1, 0.1, 9]


class Killed(Nobody):
    """A server whose worker is a process of its own, and that is there again after a while."""

    def __init__(self, answer):
        super().__init__(200, json.dumps({"choices": [{"text": answer}]}))
        code = "import time; print(flush=True); time.sleep(600)"
        self.worker = subprocess.Popen(
            [sys.executable, "-c", code, "VLLM::Worker"], stdout=subprocess.PIPE
        )
        assert self.worker.stdout is not None and self.worker.stdout.readline()  # it has its title
        self.refused = 0

    def processes(self):
        return iter([Path("/proc") / str(self.worker.pid)])

    def post(self, body, hang_up=False, begun=None):
        if begun is not None:
            begun()
            return 200, b'data: {"choices": []}\n\ndata: ' + WHY.encode() + b"\n\ndata: [DONE]\n"
        self.worker.wait(60)
        if json.loads(body).get("ignore_eos"):
            return 500, WHY.encode()
        self.refused += 1
        if self.refused < 3:
            raise ConnectionRefusedError
        return self.answer


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("answer, right", [(" 12", True), (" 13", False)])
def test_a_worker_is_killed_and_the_next_request_answered(tmp_path, answer, right):
    server = Killed(answer)
    question = soak.Question(Item("the prompt", ("12",), "g"), " 12")
    found = soak.kill_and_ask(server, question, arguments(tmp_path, kill=True))
    assert server.worker.returncode == -9 and server.refused == 3
    assert found["killed"] == "worker" and found["right_again"] == right and found["away_s"] >= 0
    assert found["heard"] == {"streamed": "200 it is too long", "whole": "500 it is too long"}


def test_the_memory_is_drawn(tmp_path, monkeypatch):
    """Of measured rows; one whose worker was killed is no curve of memory."""
    pytest.importorskip("matplotlib")
    for name in ("plain", "kill"):
        record = soak.Record(arguments(tmp_path, **{name: True}), HERE, Nobody(400, WHY))
        for second in (0, 30):
            memory = {"all": {"anonymous": 3}, "worker": {"anonymous": 2}}
            record.sample(second, memory)
        record.killed = {"killed": "worker"} if name == "kill" else None
        record.finish(alive=True)
    picture, drawn, draw = tmp_path / "picture" / "soak.png", [], soak.draw
    monkeypatch.setattr(soak, "draw", lambda rows, path: (drawn.extend(rows), draw(rows, path)))
    soak.main(["--out", str(tmp_path), "--draw", str(picture)])
    assert [row["case"] for row in drawn] == ["soak m vllm"]
    assert picture.read_bytes().startswith(b"\x89PNG")


# the same tokens as transformers


@pytest.mark.parametrize("broken", [False, True])
def test_answers_of_both_are_compared(tmp_path, monkeypatch, capsys, broken):
    def as_transformers(question, spec, folder, limit):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(question["model"]).eval()
        tokens = vllm_equal.of_transformers(model, question["prompts"], parse(spec))
        if broken:
            tokens[1] = [7, *tokens[1][1:]]
        return tokens, "0"

    monkeypatch.setattr(vllm_equal, "of_vllm", as_transformers)
    monkeypatch.setattr(vllm_equal, "require_vllm", lambda recipe: None)
    out = tmp_path / "vllm_equal.jsonl"
    call = ["--smoke", "--device", "cpu", "--only", "streaming", "--out", str(out)]
    if broken:
        with pytest.raises(SystemExit, match="others or none under streaming"):
            vllm_equal.main(call)
    else:
        vllm_equal.main(call)
    row = json.loads(out.read_text())
    assert (row["n"], row["same"], len(row["apart"])) == ((3, 2, 1) if broken else (3, 3, 0))
    assert row["unlike_full"] == 3 and row["policy"] == "streaming:sinks=4,window=256"
    assert "of 3 answers the same" in capsys.readouterr().out


def test_an_engine_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    def fails_once(question, spec, folder, limit):
        if spec.startswith("streaming"):
            raise RuntimeError("the engine failed (1):\nno kernel")
        return [[7] * vllm_equal.NEW] * len(question["prompts"]), "0"

    monkeypatch.setattr(vllm_equal, "of_vllm", fails_once)
    monkeypatch.setattr(vllm_equal, "require_vllm", lambda recipe: None)
    out = tmp_path / "vllm_equal.jsonl"
    call = ["--smoke", "--device", "cpu", "--only", "streaming", "narrow", "--out", str(out)]
    with pytest.raises(SystemExit, match="others or none under streaming, narrow"):
        vllm_equal.main(call)
    assert [json.loads(line)["variant"] for line in out.read_text().splitlines()] == ["narrow"]
    assert "no kernel" in capsys.readouterr().out
