"""The recipe for several GPUs: it runs through, and a process that fails stops its stage alone."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

import two_gpus


@pytest.mark.slow
def test_it_measures_one_process_and_two(tmp_path, capfd):
    call = ["--smoke", "--cpu", "--only", "vertical_slash", "--out", str(tmp_path)]
    assert two_gpus.main([*call, "--commit", "abc"]) == 0
    rows = [json.loads(x) for x in (tmp_path / "two_gpus.jsonl").read_text().splitlines()]
    one, two = sorted(rows, key=lambda row: row["gpus"])
    assert (one["gpus"], two["gpus"], two["keys"]) == (1, 2, 509)
    assert two["speedup"] == pytest.approx(one["median_s"] / two["median_s"])
    assert len(one["seconds"]) == len(two["seconds"]) == one["rounds"] == 2
    assert [len(row["peak_beyond_weights_bytes"]) for row in rows] == [row["gpus"] for row in rows]
    assert two["gather_s"] > 0 and two["choice_s"] > 0 and two["logits_apart"] < 1e-4
    for row in rows:
        assert row["commit"] == "abc" and row["versions"]["torch"] and row["device"]["name"]
    assert "every stage ran through" in capfd.readouterr().out


class Process:
    """Ends with a status after so many looks; never where it is None."""

    def __init__(self, status, looks=0):
        self.status, self.looks = status, looks

    def poll(self):
        self.looks -= 1
        return self.status if self.looks < 0 else None


def test_a_stage_does_not_wait_for_processes_that_wait_for_a_dead_one(monkeypatch):
    monkeypatch.setattr(two_gpus, "END", 0)
    monkeypatch.setattr(two_gpus.time, "sleep", lambda _: None)
    now = two_gpus.time.monotonic()
    assert two_gpus.watch([Process(0, 3), Process(0)], now + 60) == ""
    assert "process 1" in two_gpus.watch([Process(None), Process(1, 3)], now + 60)
    assert "process 0" in two_gpus.watch([Process(-9), Process(0)], now + 60)
    assert two_gpus.watch([Process(None), Process(0)], now - 1) == "out of time"


def test_stages_that_have_no_time_left_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(two_gpus.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    call = ["--smoke", "--cpu", "--minutes", "0.1", "--only", "gated", "--out", str(tmp_path)]
    assert two_gpus.main(call) == 1
    assert "gated: not begun" in capsys.readouterr().out


def test_a_difference_is_written_and_raised_at_the_end():
    rows = []
    rank = two_gpus.Rank(0, 1, torch.device("cpu"), None, True, rows.append)
    object.__setattr__(rank, "most", lambda value: value)
    assert two_gpus.report(rank, "a", {"ranks_apart": 0.5, "tolerance": 1.0}) == []
    assert two_gpus.report(rank, "b", {"ranks_apart": 2.0, "tolerance": 1.0}) == ["b"]
    assert [row["equal"] for row in rows] == [True, False]
    two_gpus.refuse([])
    with pytest.raises(RuntimeError, match=r"received others: \['b'\]"):
        two_gpus.refuse(["b"])


def test_the_headline_is_of_gpus_and_of_this_commit(tmp_path, capsys):
    here = {"versions": {}, "commit": "c", "date": "d", "device": {"type": "cuda", "name": "x",
            "threads": 1}}  # fmt: skip
    row = {"case": "s 1", "variant": "gated", "gpus": 2, "median_s": 1.0, "rounds": 3, **here,
           "speedup": 1.8, "policy": "p", "gather_s": 0.1, "choice_s": 0.2}  # fmt: skip
    cpu = {"type": "cpu", "name": "x", "threads": 1}
    changes = {"gpus": 1}, {"commit": "old", "variant": "a"}, {"device": cpu, "variant": "b"}
    others = [row | change for change in changes]
    two_gpus.write_rows(tmp_path / "two_gpus.jsonl", [row, *others])
    two_gpus.goals(tmp_path, "c")
    (made,) = two_gpus.rows_of(tmp_path / "headline.jsonl")
    assert (made["issue"], made["value"], made["target"], made["met"]) == (5, 1.8, 1.7, True)
    assert "gathering alone 0.10 s" in made["note"]


def test_unknown_stages_and_missing_gpus_are_refused(capsys):
    for call, message in ((["--only", "nothing"], "--only"), (["--cpu"], "--smoke")):
        with pytest.raises(SystemExit):
            two_gpus.main(call)
        assert message in capsys.readouterr().err
