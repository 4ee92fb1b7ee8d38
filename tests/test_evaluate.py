"""Evaluation: the same items for all, honest statistics, timing never stopped early, resuming."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask.evals import engine
from dynmask.evals.engine import Interrupted, evaluate
from dynmask.evals.gallery import block_average, card_pictures, mask_gallery, record_masks
from dynmask.evals.generation import attend, divergence, greedy, own_summary
from dynmask.evals.journal import Journal, policy_fingerprint
from dynmask.evals.memory import PeakMemory
from dynmask.evals.needle import Needle
from dynmask.evals.perplexity import bucket_edges, perplexity, token_losses
from dynmask.evals.plots import draw_report
from dynmask.evals.report import SCHEMA, paired_difference, proportion_interval
from dynmask.evals.task import Item
from dynmask.masks import BlockMask, LifetimeMask, StructuralMask
from dynmask.policies import Causal, Layer, Pooled, Streaming
from tests.stand_in import VOCABULARY, stand_in_model, stand_in_tokenizer
from tests.tiny import WINDOW, tiny_gemma3, tiny_llama

CPU = torch.device("cpu")
POLICIES = {"full": None, "causal": Causal(), "streaming": Streaming(sinks=2, window=48)}


@dataclass(frozen=True)
class Echo:
    """Short prompts; the score is the parity of the answer's length, to have right and wrong."""

    name: str = "echo"

    def items(self, tokenizer, n, length, seed):
        return [
            Item(
                prompt=" ".join(f"{seed + i + k} is" for k in range(length // 4)),
                answers=(str(i),),
                group=f"{length} tokens",
                meta={"depth": i / max(n - 1, 1)},
                max_new_tokens=5,
            )
            for i in range(n)
        ]

    def score(self, item, text):
        return float(len(text) % 2)


def run(**over):
    settings = {"n": 3, "length": [96, 160], "timing_tokens": 3, "progress": False} | over
    task = settings.pop("task", Echo())
    policies = settings.pop("policies", POLICIES)
    return evaluate(stand_in_model(), stand_in_tokenizer(), policies, task, **settings)


@pytest.fixture(scope="module")
def report():
    return run()


# --- what is asked and counted -----------------------------------------------------------------


def test_every_policy_gets_the_same_items(report):
    asked = {
        name: [
            (i.index, i.group, i.answers, i.prompt_tokens) for i in report.items if i.policy == name
        ]
        for name in POLICIES
    }
    assert asked["full"] == asked["causal"] == asked["streaming"]
    assert len(asked["full"]) == 6


def test_full_is_causal(report):
    by = {(row.policy, row.group): row for row in report.rows}
    for group in report.groups:
        full, causal = by["full", group], by["causal", group]
        assert (full.right, full.density, full.density_decode, full.kept_mass) == pytest.approx(
            (causal.right, causal.density, causal.density_decode, causal.kept_mass), abs=1e-6
        )
        assert causal.kl == pytest.approx(0, abs=1e-4) and causal.agreement == 1
    texts = [[i.text for i in report.items if i.policy == name] for name in ("full", "causal")]
    assert texts[0] == texts[1]


def test_density_is_that_of_the_mask(report):
    for item in report.items:
        if item.policy == "streaming":
            mask = LifetimeMask.streaming(item.prompt_tokens, 2, 48)
            assert item.density == pytest.approx(float(mask.density()), rel=1e-6)
            assert item.density < 1 and 0 < item.kept_mass < 1
            assert item.kept_mass_p5 <= item.kept_mass


def test_generation_is_that_of_transformers():
    model, tokenizer = stand_in_model(), stand_in_tokenizer()
    ids = tokenizer("def f(x): return", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    got = greedy(model, ids, 12)
    assert got.tokens == expected[0, ids.shape[1] :].tolist()


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it():
    model = stand_in_model()
    ids = torch.arange(5, 25)[None]
    tokens = greedy(model, ids, 12).tokens
    stopped = greedy(model, ids, 12, stop={tokens[4]}, keep_logits=True)
    assert stopped.tokens == tokens[: tokens.index(tokens[4])]
    assert len(stopped.logits) == len(stopped.tokens) + 1


def test_timing_never_stops_early(monkeypatch):
    """Every token ends an answer here, and yet the timed pass decodes all it was asked for."""
    monkeypatch.setattr(engine, "stop_tokens", lambda *_: frozenset(range(VOCABULARY)))
    report = run(n=1, length=96, timing_tokens=7)
    assert {item.new_tokens for item in report.items} == {0}
    assert {timed["new_tokens"] for timed in report.timing} == {7}
    assert len(report.timing) == len(POLICIES)
    assert all(row.ms_per_token > 0 and row.prefill_seconds > 0 for row in report.rows)


def test_timed_runs_do_not_measure(monkeypatch):
    seen = []
    real = engine.attend

    def spy(model, policy, *args, **kwargs):
        seen.append(kwargs)
        return real(model, policy, *args, **kwargs)

    monkeypatch.setattr(engine, "attend", spy)
    run(n=1, length=96, policies={"streaming": Streaming(sinks=2, window=48)})
    assert seen == [{"measure": True, "measure_rows": 32}, {}]


def test_own_attention_of_sliding_layers_is_counted_as_such():
    model = tiny_gemma3()
    ids = torch.arange(3, 43)[None]
    with attend(model, Causal(), measure=True) as active:
        greedy(model, ids, 6)
        measured = active.summary()
    own = own_summary(model, 40, 6, 0)
    for phase in ("prefill", "decode"):
        assert own[phase]["density"] == pytest.approx(measured[phase]["density"], rel=1e-5)
        flat = [torch.tensor(s[phase]["density_per_head"]).flatten() for s in (own, measured)]
        torch.testing.assert_close(*flat, check_dtype=False)
    assert own["prefill"]["density"] < 1 and WINDOW < 40


# --- statistics --------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_interval_holds_its_difference_and_is_never_a_point(pairs):
    a, b = ([float(pair[k]) for pair in pairs] for k in (0, 1))
    difference, (low, high), _ = paired_difference(a, b)
    assert difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    assert -1 <= low < high <= 1
    reverse, (low_r, high_r), _ = paired_difference(b, a)
    assert (reverse, low_r, high_r) == pytest.approx((-difference, -high, -low))


def test_no_difference_on_ten_items_proves_little():
    """By hand: (0 + 1) / 12 gained and lost, half width 1.96 sqrt((2 / 12) / 12)."""
    _, (low, high), _ = paired_difference([1.0] * 10, [1.0] * 10)
    assert high == pytest.approx(1.959964 * math.sqrt(2 / 12 / 12)) and low == -high


def test_graded_scores_are_bootstrapped_and_repeatable():
    a, b = [0.5, 0.25, 1.0, 0.75] * 5, [0.25, 0.25, 0.5, 1.0] * 5
    first, second = paired_difference(a, b, seed=3), paired_difference(a, b, seed=3)
    assert first == second and "bootstrap" in first[2]
    assert first[1][0] <= first[0] <= first[1][1]


def test_proportion_interval_holds_the_share():
    """For every count up to 80, shares of 0 and 1 included, where rounding is close."""
    for n in range(1, 81):
        for right in range(n + 1):
            low, high = proportion_interval(right, n)
            assert 0 <= low <= right / n <= high <= 1 and low < high


def test_divergence_counts_up_to_the_first_different_choice():
    def said(tokens, rows):
        return engine.Generation(tokens, torch.tensor(rows), 0.0, 0.0)

    even, odd = [0.0, 0.0], [0.0, math.log(3.0)]
    same = divergence(said([0, 0], [even, even]), said([0, 0], [even, even]))
    assert same == (0.0, 1.0)
    # Step 0 agrees, step 1 parts; step 2 answers another prompt and is not counted.
    kl, agreement = divergence(
        said([1, 1, 1], [odd, odd, odd]), said([1, 0, 0], [odd, even, [9.0, -9.0]])
    )
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl == pytest.approx(by_hand / 2, rel=1e-5) and agreement == 0.5


# --- report ------------------------------------------------------------------------------------


def test_json_says_how_it_was_measured(report, tmp_path):
    path = report.save(tmp_path)
    data = json.loads(path.read_text())
    assert data["schema"] == SCHEMA and data["task"] == "echo" and data["complete"] is True
    assert {"python", "torch", "transformers", "dynmask"} <= set(data["versions"])
    assert {"type", "name", "threads"} == set(data["device"])
    assert data["dtype"] == "float32" and "commit" in data and data["date"]
    assert data["settings"]["seed"] == 0 and data["settings"]["memory"]
    assert data["settings"]["policies"]["full"] == "own attention"
    assert len(data["model"]["fingerprint"]) == 64
    assert len(data["items"]) == 18 and len(data["rows"]) == 6
    assert {"policy", "text", "score", "answers", "meta"} <= set(data["items"][0])
    assert (tmp_path / "echo.txt").read_text().strip() == report.table().strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["echo.json", "echo.txt"]


def test_json_has_no_number_that_json_lacks(report):
    row = dataclasses.replace(report.rows[0], kl=math.inf, accuracy=math.nan)
    data = json.loads(dataclasses.replace(report, rows=(row,)).to_json())
    assert data["rows"][0]["kl"] is None and data["rows"][0]["accuracy"] is None


def test_table_is_aligned_and_complete(report):
    lines = report.table().splitlines()
    for title in ("policy", "right", "density", "mass kept", "prefill", "ms/token", "peak memory"):
        assert title in lines[1]
    rule = lines[2]
    gaps = [i for i, mark in enumerate(rule) if mark == " "]
    assert len(gaps) >= 16 and set(rule) == {" ", "-"}
    assert all(line[i] == " " for line in lines[1:6] for i in gaps if i < len(line))
    assert lines[0] == "echo, 96 tokens" and lines[3].startswith("full")


def test_pictures_are_written(report, tmp_path):
    files = draw_report(report, tmp_path)
    assert {file.name for file in files} == {
        "echo-pareto.png",
        "echo-heatmap.png",
        "echo-heads.png",
    }
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000


# --- interruption ------------------------------------------------------------------------------


class Impatient(Echo):
    """Presses Ctrl-C when the answer number ``stop`` is scored."""

    def __init__(self, stop):
        super().__init__()
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "scored", [])

    def score(self, item, text):
        self.scored.append(item)
        if len(self.scored) == self.stop:
            raise KeyboardInterrupt
        return super().score(item, text)


def results(report):
    """What a report says apart from times and memory."""
    drop = {"prefill_seconds": None, "ms_per_token": None, "peak_memory_bytes": None}
    return (
        [dataclasses.replace(row, **drop) for row in report.rows],
        list(report.items),
        report.header["settings"],
    )


def test_an_interrupted_run_keeps_what_was_finished_and_resumes(report, tmp_path):
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(Interrupted) as caught:
        run(task=Impatient(6), journal=journal)
    partial = caught.value.report
    assert not partial.complete and len(partial.items) == 5
    assert list(partial.items) == list(report.items[:5])
    assert "interrupted" in partial.table()
    resumed = Impatient(0)
    again = run(task=resumed, journal=journal)
    assert len(resumed.scored) == 13  # 18 answers less the 5 of before
    assert results(again) == results(report)
    nothing_left = Impatient(1)
    assert run(task=nothing_left, journal=journal).to_dict()["rows"] == again.to_dict()["rows"]


def test_new_items_and_policies_add_to_a_journal(tmp_path):
    journal = tmp_path / "journal.jsonl"
    run(n=1, length=96, journal=journal, timing=False)
    more = Impatient(0)
    run(n=2, length=96, journal=journal, timing=False, task=more)
    assert len(more.scored) == len(POLICIES)
    other = Impatient(0)
    policies = {"full": None, "streaming": Streaming(sinks=3, window=48)}
    run(n=2, length=96, journal=journal, timing=False, task=other, policies=policies)
    assert len(other.scored) == 2  # full is known, the changed policy is not


@pytest.mark.parametrize("change", [{"measure_rows": 8}, {"seed": 1}, {"resume": False}])
def test_another_setting_is_another_run(tmp_path, change):
    journal = tmp_path / "journal.jsonl"
    only = {"n": 1, "length": 96, "timing": False, "policies": {"full": None}}
    run(journal=journal, **only)
    task = Impatient(0)
    run(journal=journal, task=task, **(only | change))
    assert len(task.scored) == 1


def test_a_cut_journal_loses_its_last_line_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    book = Journal(path, "me")
    book.put("a", {"x": 1})
    book.put("b", {"x": 2})
    book.close()
    path.write_text(path.read_text()[:-9])
    again = Journal(path, "me")
    again.close()
    assert again.get("a") == {"x": 1} and again.get("b") is None
    other = Journal(path, "you")
    other.close()
    assert other.get("a") is None


def test_fingerprints_tell_policies_apart():
    first = policy_fingerprint(Streaming(sinks=2, window=48))
    assert first == policy_fingerprint(Streaming(sinks=2, window=48))
    assert first != policy_fingerprint(Streaming(sinks=2, window=49))
    one, two = torch.zeros(3), torch.tensor([0.0, 0.0, 1e-9])
    assert policy_fingerprint({"w": one}) != policy_fingerprint({"w": two})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": {}}, "at least one"),
        ({"length": []}, "length"),
        ({"timing_tokens": 1}, "timing_tokens"),
        ({"measure_rows": -1}, "measure_rows"),
        ({"policies": {"x": "streaming"}}, "policies"),
        ({"n": 0, "task": Needle()}, "n"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message, monkeypatch):
    monkeypatch.setattr(engine._Run, "score", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        run(**change)


# --- memory ------------------------------------------------------------------------------------


def test_peak_memory_sees_what_was_allocated_and_freed():
    size = 64 * 2**20
    with PeakMemory(CPU) as memory:
        block = torch.zeros(size, dtype=torch.uint8) + 1
        del block
    assert 0.9 * size < memory.bytes < 3 * size
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes < size // 4


# --- perplexity --------------------------------------------------------------------------------


def test_perplexity_of_full_is_cross_entropy():
    model, tokenizer = stand_in_model(), stand_in_tokenizer()
    text = " ".join(f"line {i} says {i * i}" for i in range(200))
    report = perplexity(
        model, tokenizer, {"full": None, "causal": Causal()}, text=text, n=2, length=300,
        edges=[0, 100, 300], progress=False,
    )  # fmt: skip
    ids = torch.tensor(tokenizer(text)["input_ids"])
    losses = []
    for start in (0, len(ids) - 300):
        piece = ids[start : start + 300]
        with torch.no_grad():
            logits = model(piece[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
    losses = torch.stack(losses)
    for row in report.rows:
        assert row.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-4)
        head, tail = row.buckets
        assert head.perplexity == pytest.approx(float(losses[:, :99].mean().exp()), rel=1e-4)
        assert tail.perplexity == pytest.approx(float(losses[:, 99:].mean().exp()), rel=1e-4)
        assert (head.tokens, tail.tokens) == (198, 400)


def test_losses_made_in_slices_are_those_of_one_pass(monkeypatch):
    """Gemma 2 style soft caps sit between head and logits; slices must pass through them."""
    from dynmask.evals import perplexity as module

    model = tiny_llama()
    ids = torch.randint(3, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    whole = token_losses(model, ids)
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", 256 * 7)
    sliced = token_losses(model, ids)
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(model.model)


def test_divergence_on_text_is_that_of_all_positions(monkeypatch):
    """Against both models' logits, made in float64 by hand; slices change nothing."""
    from dynmask.evals import perplexity as module

    model, tokenizer = stand_in_model(), stand_in_tokenizer()
    text = " ".join(f"line {i} says {i * i}" for i in range(60))
    policy = Streaming(sinks=1, window=8)
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", VOCABULARY * 37)
    settings = {"text": text, "n": 2, "length": 90, "edges": [0, 90], "progress": False}
    both = perplexity(model, tokenizer, {"streaming": policy, "full": None}, **settings)
    streaming, full = both.rows  # in the order of the caller
    ids = torch.tensor(tokenizer(text)["input_ids"])
    expected = []
    for start in (0, len(ids) - 90):
        piece = ids[None, start : start + 90]
        with torch.no_grad():
            p = model(piece).logits[0, :-1].double().log_softmax(-1)
            with attend(model, policy):
                q = model(piece).logits[0, :-1].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        expected.append((float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())))
    mean = [sum(pair) / 2 for pair in zip(*expected, strict=True)]
    assert streaming.kl == pytest.approx(mean[0], rel=1e-3) and streaming.kl > 0
    assert streaming.agreement == pytest.approx(mean[1]) and streaming.agreement < 1
    assert (full.kl, full.agreement) == (None, None)
    alone = perplexity(model, tokenizer, {"streaming": policy}, **settings).rows[0]
    assert alone.kl is None and alone.perplexity == pytest.approx(streaming.perplexity, rel=1e-5)


def test_bucket_edges_double():
    assert bucket_edges(1000) == [0, 256, 512, 1000]
    assert bucket_edges(100) == [0, 100]


def test_perplexity_refuses_a_short_text():
    with pytest.raises(ValueError, match="longer text"):
        perplexity(stand_in_model(), stand_in_tokenizer(), {"full": None}, text="short", length=64)


# --- masks as pictures -------------------------------------------------------------------------


def block_mask(keys):
    chosen = torch.rand(1, 2, -(-keys // 8), -(-keys // 8), generator=torch.manual_seed(1)) > 0.6
    chosen[..., 0] = True
    return BlockMask.from_scores(chosen, 8, 8, keys, keys)


def structural_mask(keys):
    diagonals = torch.tensor([[[0, 3, 9], [0, 1, -1]]], dtype=torch.int32)
    verticals = torch.tensor([[[0, 5], [2, -1]]], dtype=torch.int32)
    return StructuralMask(diagonals=diagonals, verticals=verticals, keys=keys)


@pytest.mark.parametrize(
    "mask",
    [
        LifetimeMask.streaming(53, 2, 9),
        LifetimeMask.streaming(53, 2, 9, queries=20),
        structural_mask(53),
        block_mask(48),
    ],
    ids=["lifetime", "queries", "structural", "block"],
)
def test_pixels_are_means_over_their_causal_pairs(mask):
    """Short masks, so that every row is read and the picture is exact."""
    pixels = 11
    share = block_average(mask, pixels)
    dense = mask.dense()[0]
    rows, keys = dense.shape[1:]
    causal = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    for i in range(pixels):
        for j in range(pixels):
            where = (
                slice(i * rows // pixels, (i + 1) * rows // pixels),
                slice(j * keys // pixels, (j + 1) * keys // pixels),
            )
            pairs = int(causal[where].sum())
            for head in range(len(dense)):
                value = float(share[head, i, j])
                if pairs == 0:
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(int(dense[head][where].sum()) / pairs, abs=1e-6)


def test_a_long_mask_is_never_made_dense(monkeypatch):
    real, most = LifetimeMask.dense, []

    def spy(self, rows=None):
        out = real(self, rows)
        most.append(out.numel())
        return out

    monkeypatch.setattr(LifetimeMask, "dense", spy)
    block_average(LifetimeMask.streaming(20_000, 4, 100), 32)
    assert max(most) <= 8 * 20_000


def test_recorded_masks_are_those_that_ran(tmp_path):
    model, policy = stand_in_model(), Streaming(sinks=2, window=16)
    ids = torch.randint(3, VOCABULARY, (1, 120), generator=torch.Generator().manual_seed(0))
    pictures, summary = record_masks(model, ids, policy, measure_rows=4, resolution=24)
    assert [picture.layer for picture in pictures] == [0, 1]
    expected = LifetimeMask.streaming(120, 2, 16)
    torch.testing.assert_close(
        pictures[0].share, block_average(expected, 24), equal_nan=True, check_device=False
    )
    assert summary["prefill"]["density"] == pytest.approx(float(expected.density()), rel=1e-5)
    path = mask_gallery(pictures, tmp_path / "masks.png", title="streaming", caption="n = 1")
    assert path.stat().st_size > 5000
    pooled, _ = record_masks(model, ids, Pooled(block=16), resolution=24)
    assert pooled[0].share.shape == (4, 24, 24)


def test_pictures_of_a_card_are_those_of_its_policy():
    import dynmask

    model = stand_in_model()
    documents = [
        torch.randint(3, VOCABULARY, (32,), generator=torch.manual_seed(i)) for i in (0, 1)
    ]
    settings = dynmask.DamSettings(length=32, tau=0.1, min_support=8)
    card = dynmask.calibrate(model, documents, settings=settings, progress=False)
    pictures = card_pictures(card, 64, 16)
    q, k = torch.zeros(1, 4, 64, 16), torch.zeros(1, 2, 64, 16)
    for picture in pictures:
        mask = card.policy()(q, k, k, Layer(picture.layer))
        torch.testing.assert_close(picture.share, block_average(mask, 16), equal_nan=True)


def test_public_names_resolve():
    import dynmask.evals as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    assert package.evaluate is evaluate
