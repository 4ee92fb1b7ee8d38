"""All baselines in one evaluation: the list, the rows of a small run, and the table of them."""

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import tables
from benchmarks.baselines import BASELINES
from dynmask.cli.common import resolve_policy
from tests.stand_in import save_stand_in

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import evaluate_gated

MEASURED = ("full", "quest", "h2o")
COLUMNS = 10


def run(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["evaluate_gated.py", *map(str, given)])
    evaluate_gated.main()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with the rows of a small run, and what was said."""
    folder = tmp_path_factory.mktemp("baselines")
    model, out = save_stand_in(folder / "model"), folder / "baselines.jsonl"
    given = ["--model", model, "--device", "cpu", "--threads", 1, "--tasks", "lines 700", "--n", 1]
    given += ["--baselines", "--timed", "--only", "h2o", "quest", "retained", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *given)
    return folder


def rows_of(folder, name="baselines.jsonl"):
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return {row["policy"]: row for row in map(json.loads, lines)}


def test_the_list_holds_what_is_asked_for_under_names_of_its_own():
    options = argparse.Namespace(
        model=evaluate_gated.MODEL, only=None,
        cards=[evaluate_gated.MODEL.with_name("dynmask-reference-gated")],
    )  # fmt: skip
    specs, missing = evaluate_gated.baselines(options)
    assert not missing and list(specs) == [one.label for one in BASELINES]
    labels = {evaluate_gated.ZERO_SHOT, evaluate_gated.CARD}
    labels |= {evaluate_gated.decoding(evaluate_gated.CARD, "keep")}
    assert {one.label for one in BASELINES if one.kind == "gated"} == labels
    kinds = {one.kind for one in BASELINES}
    assert kinds >= {
        "full", "streaming", "vertical_slash", "flexprefill", "xattention", "quest", "elastic",
        "h2o", "snapkv", "retained", "oracle_blocks", "oracle_tokens",
    }  # fmt: skip
    for one in BASELINES:
        policy = resolve_policy(specs[one.label])
        if policy is not None:
            assert policy.name == one.kind
            policy.check(8, 4, 2)


def test_some_are_chosen_by_label_or_policy_and_those_without_a_card_are_left_out(tmp_path):
    model = tmp_path / "model"
    options = argparse.Namespace(model=model, only=["gated", "elastic"], cards=[])
    specs, missing = evaluate_gated.baselines(options)
    assert list(specs) == ["full", "gated (zero-shot)", "elastic"]
    assert missing == ["gated (card)", "gated (card, decode=keep)"]
    options.only = ["vertical_slash 200+1000"]
    assert list(evaluate_gated.baselines(options)[0]) == ["full", "vertical_slash 200+1000"]


def test_rows_have_quality_and_cost(ran):
    rows = rows_of(ran)
    assert tuple(rows) == MEASURED
    asked = ("density", "density_decode", "prefill_seconds", "ms_per_token", "peak_memory_bytes")
    for name, row in rows.items():
        assert all(row[key] is not None for key in asked)
        assert (row["difference"] is None) == (row["kl"] is None) == (name == "full")
        assert row["cache_bytes"] > 0


def test_a_journal_is_gone_on_with_and_times_are_added_to_answers(ran, tmp_path, monkeypatch):
    given = ["--model", ran / "model", "--device", "cpu", "--threads", 1, "--n", 1, "--baselines",
             "--tasks", "lines 700", "--out", tmp_path / "rows.jsonl", "--journal", tmp_path,
             "--only", "h2o"]  # fmt: skip
    run(monkeypatch, *given)
    journal = tmp_path / "lines-700.jsonl"
    before = journal.read_text(encoding="utf-8").splitlines()
    run(monkeypatch, *given, "quest", "--timed")
    after = journal.read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before and len(before) == 3  # which run, full, h2o
    kinds = [json.loads(line)["key"].partition("/")[0] for line in after[len(before) :]]
    assert sorted(kinds) == ["item", "timing", "timing", "timing"]
    apart = ("prefill_seconds", "ms_per_token", "peak_memory_bytes", "date", "kl")
    once, twice = rows_of(ran), rows_of(tmp_path, "rows.jsonl")
    assert once.keys() == twice.keys()
    for name, row in once.items():
        assert {k: v for k, v in row.items() if k not in apart} == {
            k: v for k, v in twice[name].items() if k not in apart
        }


def test_what_has_no_card_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_gated, "run", lambda name, options: [])
    given = ["--model", tmp_path / "model", "--baselines", "--tasks", "lines 300"]
    run(monkeypatch, *given, "--out", tmp_path / "out.jsonl")
    said = capsys.readouterr().err
    assert "note: left out" in said and "retained w=512" in said and "gated (card)" in said


def test_the_table_has_every_policy_and_a_dash_for_what_was_not_measured(ran, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", ran)
    lines = [line for line in tables.baselines().splitlines() if line.startswith("|")][2:]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines}
    assert list(cells) == [one.label for one in BASELINES]
    for label, found in cells.items():
        dashes = [cell.strip(" |") == "-" for cell in found]
        assert len(found) == COLUMNS - 1
        if label not in MEASURED:
            assert all(dashes)
    assert [cell.strip(" |") == "-" for cell in cells["full"]] == [
        key in ("difference", "kl")
        for key in ("accuracy", "difference", "density", "decode", "kept", "kl", "s", "ms", "MB")
    ]
    row = rows_of(ran)["h2o"]
    assert row["density_decode"] < row["density"] < 1
    assert row["cache_bytes"] < rows_of(ran)["quest"]["cache_bytes"]
    assert cells["h2o"][0] == f"{row['accuracy']:.3g} of 1"
    low, high = row["difference_interval"]
    assert (
        cells["h2o"][1] == f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    )
    assert cells["h2o"][3] == f"{row['density_decode']:.1%}"
    assert cells["h2o"][8].strip(" |") == f"{row['peak_memory_bytes'] / 1e6:,.0f} MB"


def test_without_rows_the_table_is_one_of_dashes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.baselines().splitlines()
    assert "not measured yet" in lines[0]
    assert [line.count(" - ") for line in lines[4:]] == [COLUMNS - 1] * len(BASELINES)


def test_the_picture_is_of_these_rows_alone(ran, tmp_path, monkeypatch):
    seen = {}

    def pareto_of(rows, path, **given):
        seen.update(rows=list(rows), path=path)

    monkeypatch.setattr("dynmask.evals.plots.pareto_of", pareto_of)
    monkeypatch.setattr(evaluate_gated, "MODEL", ran / "model")  # as the reference: no others
    known = rows_of(tables.ROOT / "benchmarks" / "results", "reference.jsonl")
    task = next(iter(known.values()))["task"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "task": task}) + "\n" for row in rows_of(ran).values())
    )
    given = ["--model", ran / "model", "--baselines", "--out", tmp_path / "rows.jsonl"]
    run(monkeypatch, *given, "--plot", task, "--out-plot", tmp_path / "a.png")
    assert [row["policy"] for row in seen["rows"]] == list(MEASURED)
    assert seen["path"] == tmp_path / "a.png"


REFUSED = {
    "--only: expected some of": ["--baselines", "--only", "h2o", "nonsense"],
    "--only: expected --baselines": ["--only", "h2o"],
    "--timed: expected one task at a time": ["--timed", "--jobs", "2"],
    "--baselines: expected no --policies": ["--baselines", "--policies", "h2o"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused_before_the_work(said, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_gated, "run", None)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--tasks", "lines 300", *REFUSED[said])
    assert said in capsys.readouterr().err
