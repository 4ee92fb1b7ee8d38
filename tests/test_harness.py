"""Tasks of the lm-evaluation-harness: its questions and scores, asked under our policies.

The package is no dependency: what it would do at the boundary is done by a small one made here.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from dynmask import cli
from dynmask.evals.engine import Interrupted
from dynmask.evals.generation import attend, greedy, needed_cache
from dynmask.evals.harness import Harness, harness
from dynmask.evals.report import paired_difference
from dynmask.masks import LifetimeMask
from dynmask.policies import H2O, Gated, Streaming
from tests.stand_in import save_stand_in, stand_in_model, stand_in_tokenizer

POLICIES = {"full": None, "streaming": Streaming(sinks=2, window=24)}
PROMPTS = [f"item {i}: " + f"one two {i} three four. " * 8 for i in range(4)]


def sample(index, filter_="none", **more):
    return {
        "doc_id": index, "filter": filter_, "target": f"target {index}",
        "arguments": [(PROMPTS[index], {})], "filtered_resps": [f"said {index}"],
    } | more  # fmt: skip


class Package(ModuleType):
    """What dynmask asks of lm_eval, with a task of choices, one by length, one of metrics alone."""

    __version__ = "0.4.99"

    def __init__(self):
        super().__init__("lm_eval")
        self.calls, self.stop = [], None

    def simple_evaluate(self, asked, *, tasks, limit, **settings):
        (task,) = tasks
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((task, limit, settings))
        count = min(limit or 4, 4)
        answers = asked.generate_until(PROMPTS[:count])
        full = asked.model.config._attn_implementation in ("sdpa", "eager")
        samples = {
            "graded": [
                sample(i, metrics=["brier", "acc", "bleu"], brier=0.25, bleu=31.5,
                       acc=float(full or i % 2),
                       arguments=[(PROMPTS[i], " yes"), (PROMPTS[i], " no")],
                       filtered_resps=[(-2.0, False), (-1.0, True)], target=0)
                for i in range(count)
            ],
            "by_length": [
                sample(i, metrics=["4096", "8192"], **{"4096": -1.0, "8192": 0.5})
                for i in range(count)
            ] + [sample(0, "second", metrics=["4096"], **{"4096": 1.0})],
            "metrics": [sample(i, metrics=["word_perplexity"], word_perplexity=(-5.0, 3))
                        for i in range(count)],
        }[task]  # fmt: skip
        results = {
            "graded": {"alias": "graded", "acc,none": 0.5, "acc_stderr,none": 0.1,
                       "bleu,none": 31.5, "name": "graded"},
            "by_length": {"4096,none": -1, "8192,none": 0.5, "sample_len": 4},
            "metrics": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        }[task]  # fmt: skip
        assert len(answers) == count
        return {
            "samples": {task: samples},
            "results": {task: results},
            "higher_is_better": {task: {"brier": False, "acc": True, "word_perplexity": False}},
        }


class Wrapper:
    """A model as the harness sees it."""

    def __init__(self, *, pretrained, tokenizer, batch_size):
        assert batch_size == 1  # nothing is padded
        self.model, self.tokenizer = pretrained, tokenizer

    @torch.inference_mode()
    def generate_until(self, requests, disable_tqdm=False):
        assert disable_tqdm
        ids = [self.tokenizer(r, return_tensors="pt")["input_ids"] for r in requests]
        return [self.model(i).logits for i in ids]

    loglikelihood = loglikelihood_rolling = generate_until


@pytest.fixture
def package(monkeypatch):
    found = Package()

    def manager(include_path=None, metadata=None):
        found.folder, found.metadata = include_path, metadata
        return SimpleNamespace(all_tasks=["graded", "by_length", "metrics"])

    parts = {
        "lm_eval": found,
        "lm_eval.models": ModuleType("lm_eval.models"),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=Wrapper),
        "lm_eval.tasks": SimpleNamespace(TaskManager=manager),
    }
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def run(*tasks, **more):
    settings = {"timing": False, "progress": False, "measure_rows": 4} | more
    return harness(
        stand_in_model(),
        stand_in_tokenizer(),
        POLICIES,
        Harness(tasks, lengths=(8192,)),
        **settings,
    )


def test_every_policy_is_asked_and_compared_on_the_same_items(package):
    report = run("graded", n=3, seed=5)
    full, streaming = report.rows
    assert (full.group, full.n, full.accuracy) == ("graded, acc", 3, 1.0)
    assert (streaming.right, streaming.accuracy) == (1.0, pytest.approx(1 / 3))
    expected = paired_difference([0.0, 1.0, 0.0], [1.0] * 3, 5)
    assert (streaming.difference, streaming.difference_interval) == expected[:2]
    assert full.difference is None and full.density == 1.0
    # The densities are those of the masks on the very requests.
    lengths = [len(stand_in_tokenizer()(p)["input_ids"]) for p in PROMPTS[:3]]
    masks = [LifetimeMask.streaming(n, 2, 24) for n in lengths]
    kept = sum(float(m.density()) * n * (n + 1) for m, n in zip(masks, lengths, strict=True))
    assert streaming.density == pytest.approx(kept / sum(n * (n + 1) for n in lengths), rel=0.01)
    assert 0 < streaming.kept_mass < 1 == full.kept_mass
    assert [i.text for i in report.items] == ["no"] * 6
    assert {i.answers for i in report.items} == {("yes",)}
    assert full.metrics == {"bleu": 31.5}  # acc is the accuracy, its error is ours
    assert report.header["versions"]["lm_eval"] == "0.4.99"
    assert package.metadata["max_seq_lengths"] == [8192]
    _, limit, settings = package.calls[0]
    assert limit == 3 and settings["random_seed"] == 5 and settings["num_fewshot"] is None


def test_scores_are_shares_of_which_more_is_better(package):
    report = run("by_length", "metrics")
    by = {row.group: row for row in report.rows if row.policy == "streaming"}
    assert by["by_length, 8192"].accuracy == 0.5 and by["by_length, 8192"].metrics is None
    assert by["by_length, 8192"].n == 4  # the first filter's samples alone
    alone = by["metrics"]
    assert alone.accuracy is None and alone.n == 4
    assert alone.metrics == {"word_perplexity": 12.5}
    assert "12.500" in report.table()
    assert {i.answers[0] for i in report.items} == {f"target {i}" for i in range(4)}


def test_costs_are_measured_on_the_first_prompts(package):
    report = run("graded", n=2, timing=True, timing_items=1, timing_tokens=3)
    full, streaming = report.rows
    assert streaming.kl is not None and streaming.kl >= 0 and full.kl is None
    assert all(row.prefill_seconds > 0 and row.ms_per_token > 0 for row in report.rows)
    assert all(row.peak_memory_bytes is not None for row in report.rows)
    assert {timed["new_tokens"] for timed in report.timing} == {3}


@pytest.mark.parametrize("policy", [H2O(width=12, block=4), Gated(window=8, decode="keep")])
def test_answers_are_decoded_by_the_policys_own_rule(package, monkeypatch, policy):
    """H2O reads every key without its cache, ``keep`` nothing at all."""
    said = []

    def answered(self, requests, disable_tqdm=False):
        for request in requests:
            ids = self.tokenizer(request, return_tensors="pt")["input_ids"]
            fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
            said.append(self.model.generate(ids, use_cache=True, **fixed)[0, ids.shape[1] :])
        return said

    monkeypatch.setattr(Wrapper, "generate_until", answered)
    model, tokenizer = stand_in_model(), stand_in_tokenizer()
    settings = {"timing": False, "progress": False, "measure_rows": 0}
    harness(model, tokenizer, {"it": policy}, Harness(("graded",)), n=2, **settings)
    assert "generate" not in vars(model)
    for prompt, tokens in zip(PROMPTS, said, strict=False):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with attend(model, policy) as run:
            assert tokens.tolist() == greedy(model, ids, 6, cache=needed_cache(run)).tokens
            if isinstance(policy, H2O):
                assert tokens.tolist() != greedy(model, ids, 6).tokens


def test_an_interrupted_run_keeps_what_was_finished_and_resumes(package, tmp_path):
    journal = tmp_path / "j.jsonl"
    package.stop = 3
    with pytest.raises(Interrupted) as caught:
        run("graded", "metrics", journal=journal)
    partial = caught.value.report
    assert [(r.group, r.policy) for r in partial.rows] == [
        ("graded, acc", "full"), ("graded, acc", "streaming"), ("metrics", "full")]  # fmt: skip
    assert not partial.complete
    package.stop = None
    again = run("graded", "metrics", journal=journal)
    assert len(package.calls) == 4 and len(again.rows) == 4 and again.complete
    assert again.rows[:3] == partial.rows
    run("graded", "metrics", journal=journal, n=2)
    assert len(package.calls) == 8  # other settings, another run


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run("graded", "chess"), "lm_eval ls tasks"),
        (lambda: Harness(()), "names of the harness's tasks"),
        (lambda: Harness(("a",), folder="nowhere"), "nowhere"),
        (lambda: Harness(("a",), shots=-1), "0 or more"),
    ],
)
def test_bad_input_is_refused_before_any_work(package, make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert package.calls == []


def test_a_missing_package_is_told_with_its_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("dynmask.cli.evaluate.load", lambda *_: pytest.fail("loaded a model"))
    assert cli.main(["evaluate", "--model", "m/m", "--task", "lm_eval:arc_easy"]) == 1
    assert "pip install 'dynmask[lm-eval]'" in capsys.readouterr().err


def test_the_command_asks_tasks_of_the_harness(package, tmp_path, capsys):
    model, out = str(save_stand_in(tmp_path / "m")), tmp_path / "out"
    call = ["evaluate", "--model", model, "--task", "lm_eval:graded,metrics", "--quiet", "--n", "2",
            "--no-plots", "--no-timing", "--shots", "1", "--lm-eval-folder", str(tmp_path),
            "--policy", "full", "--policy", "streaming:window=24", "--out", str(out)]  # fmt: skip
    assert cli.main(call) == 0
    assert "graded, acc" in capsys.readouterr().out
    data = json.loads((out / "lm_eval_graded_metrics.json").read_text())
    assert data["command"].startswith("dynmask evaluate --model")
    assert data["settings"]["task_settings"]["shots"] == 1 and package.folder == str(tmp_path)
    assert "12.5" in (out / "report.html").read_text()
    assert cli.main(["evaluate", "--model", model, "--task", "needle", "--shots", "1"]) == 2
    assert "--shots" in capsys.readouterr().err
