"""The recipes over vLLM, without vLLM: their card, their rows, and what a client expects."""

import json
import random
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

from dynmask import MaskCard
from dynmask.evals.task import Item

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
    row["asked_phase"] = os.environ.get("DYNMASK_PHASE")
    print("row: " + json.dumps(row), flush=True)
"""


def test_rows_are_kept_as_they_come_even_of_an_engine_that_fails(tmp_path, monkeypatch, capsys):
    done, rows = run(tmp_path, monkeypatch, PRINT)
    assert done and [r["keys"] for r in rows] == [64, 128]
    assert rows[0]["asked"] == f"gated:{tmp_path / 'card'},dense_up_to=7"
    assert rows[0]["policy"] == "gated:CARD,dense_up_to=7" and rows[0]["commit"] == "c"
    assert rows[0]["phase"] == rows[0]["asked_phase"] == "prefill"
    done, rows = run(tmp_path, monkeypatch, PRINT + "raise ValueError('broken')", case="flash")
    assert not done and len(rows) == 4 and rows[-1]["asked"] is None
    assert rows[-1]["phase"] is rows[-1]["asked_phase"] is None
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


@pytest.mark.parametrize(
    "kind, status, fine",
    [
        ("malformed", 400, True),
        ("malformed", 200, False),
        ("too long", 400, True),
        ("too long", 500, False),
        ("cancelled", 200, True),
        ("short", 500, False),
    ],
)
def test_what_a_client_expects(kind, status, fine):
    item = Item("the prompt", ("12",), "g")
    questions = {k: [soak.Question(item, " 12")] for k in ("short", "long")}
    server = Answers(status, "said")
    said = soak.one_request(server, questions, kind, soak.Tally(), random.Random(0))
    assert (said == "") == fine
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
