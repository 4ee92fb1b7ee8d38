"""The DMA recipes: what their generators promise, resuming, and that every variant trains."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import dma_common
import dma_decoder
import mqar
import needle_evaluation
import needle_model
import scaling
from dma_common import Loop, Ranks, adamw, fit

from dynmask.kernels.reference import reference_attention
from dynmask.nn import Retention

TINY = {
    "tokens": 192, "stages": ((48, 0.5), (96, 0.5)), "hidden": 16, "layers": 2, "heads": 2,
    "kv_heads": 1, "head_dim": 8, "intermediate": 16, "vocabulary": 64, "warmup_steps": 2,
    "width": 24, "window": 8, "sinks": 2, "after": 8, "rows": 6, "dense_stages": 1, "workers": 1,
}  # fmt: skip


def tiny(name: str, **changes):
    recipe = replace(needle_model.recipe_of(name, smoke=True), **TINY)
    kept = {k: v for k, v in needle_model.VARIANTS[name].items() if k != "width_start"}
    if recipe.width_start:
        kept["width_start"] = 48
    if recipe.least_width:
        kept["least_width"] = 24
    return replace(recipe, **{**kept, **changes})


def random_feed(recipe):
    """Batches that depend on the step alone."""

    def feed(step, progress_of):
        length = recipe.length(step, progress_of(step))
        generator = torch.Generator().manual_seed(step)
        shape = (recipe.tokens // length, length)
        ids = torch.randint(3, recipe.vocabulary, shape, generator=generator)
        return ids, torch.randint(0, 5, shape, generator=generator)

    return feed


def trained(recipe, steps, folder=None, resume=False, stop=None):
    torch.manual_seed(0)
    model = needle_model.dma_model(recipe)
    loop = Loop(seed=1, steps=steps, warmup_steps=2, log_seconds=0, sync_steps=1)
    optimizer = adamw(model, loop, 0.1, (0.9, 0.98))
    trainer = needle_model.DmaTrainer(model, recipe, compiled=False)
    step = trainer.step
    if stop is not None:

        def step(batch, at, progress):
            if at == stop:
                raise KeyboardInterrupt
            return trainer.step(batch, at, progress)

    fit(loop, model, optimizer, random_feed(recipe), step, folder, Ranks("cpu"), resume)
    return model


# positions


@pytest.mark.parametrize("gaps", ["jumps", "uniform", "none"])
def test_positions_increase_and_stay_below_the_longest(gaps):
    recipe = replace(tiny("dma"), gaps=gaps)
    torch.manual_seed(3)
    where = needle_model.positions_of(64, 100, recipe)
    assert where.shape == (64, 100) and where.dtype == torch.int64
    assert bool((where[:, 0] == 0).all())
    assert bool((where.diff(dim=-1) >= 1).all())
    assert int(where.max()) < recipe.longest_position
    if gaps == "jumps":
        jumps = (where.diff(dim=-1) > 1).sum(-1)
        assert int(jumps.max()) <= recipe.most_jumps and bool((jumps > 0).any())
        assert bool((jumps == 0).any())  # some sequences have none
    if gaps != "none":  # spans are spread over the orders of magnitude
        span = where[:, -1].double().log2()
        assert span.min() < 9 and span.max() > 17


def test_rotary_tables_are_exact_at_a_million():
    where = torch.tensor([0, 1, 2**20 - 1])
    cos, sin = tables(where)
    assert torch.allclose(cos[:, 0].double(), where.double().cos(), atol=1e-6)
    assert torch.allclose(sin[:, 0].double(), where.double().sin(), atol=1e-6)
    turned = where.double() * 2.7e8 ** (-2 / 8)
    assert torch.allclose(cos[:, 1].double(), turned.cos(), atol=1e-6)


def tables(where):
    return dma_decoder.rotary_tables(where, 8, 2.7e8, torch.float32)


# the forward


def test_a_bias_on_two_more_dimensions_is_a_bias():
    recipe = tiny("dma")
    trainer = needle_model.DmaTrainer(needle_model.dma_model(recipe), recipe, compiled=False)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(96, heads, 8, generator=generator) for heads in (2, 1, 1))
    bias = (3 * torch.randn(96, 1, generator=generator)).requires_grad_()
    out = trainer._dense(q, k, v, bias, 48)
    rows = [part.unflatten(0, (2, 48)).transpose(1, 2).double() for part in (q, k, v)]
    causal = torch.ones(48, 48, dtype=torch.bool).tril()[None, None]
    expected, _ = reference_attention(
        *rows, causal, bias.view(2, 48, 1).transpose(1, 2).double().repeat(1, 2, 1), 8**-0.5
    )
    expected = expected.transpose(1, 2).reshape(96, -1)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    weight = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad((out * weight).sum(), bias)[0]
    true = torch.autograd.grad((expected * weight).sum(), bias)[0]
    assert torch.allclose(found, true, atol=1e-4)


@pytest.mark.parametrize("name", needle_model.VARIANTS)
def test_every_variant_takes_a_dense_and_a_sparse_step(name):
    recipe = tiny(name)
    torch.manual_seed(0)
    model = needle_model.dma_model(recipe)
    trainer = needle_model.DmaTrainer(model, recipe, compiled=False)
    for progress in (0.0, 0.9):
        batch = random_feed(recipe)(1, lambda step, p=progress: p)
        loss, numbers = trainer.step(batch, 1, progress)
        loss.backward()
        assert torch.isfinite(loss)
        assert ("retention" in numbers) == (recipe.weight > 0)
    if recipe.mixer == "dma":
        for parameter in model.model.layers[0].self_attn.dynmask_score.parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


@pytest.mark.parametrize("name", ["dma", "pair", "published", "window", "full"])
def test_reading_in_chunks_and_token_by_token_is_the_training_forward(name):
    recipe = tiny(name, gaps="none", layers=3, width_start=None, vocabulary=256)
    torch.manual_seed(0)
    model = needle_model.dma_model(recipe)
    for score in (m for m in model.modules() if hasattr(m, "dt_proj")):
        torch.nn.init.normal_(score.dt_proj.weight, std=0.5)
    trainer = needle_model.DmaTrainer(model, recipe, compiled=False)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 96), generator=generator)  # repeated tokens: scores tie
    if name == "pair":  # turned back keys of equal tokens differ by rounding
        ids = torch.stack([torch.randperm(253, generator=generator)[:96] + 3 for _ in range(2)])
    logits = []

    def keep(x, norm, embedding, targets, dtype):
        x = needle_evaluation._norm(x, norm)
        logits.append(torch.nn.functional.linear(x, embedding).unflatten(0, (2, 96)))
        return x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)

    trainer.losses = keep
    trainer.turn, trainer.progress = 0, 0.99
    with torch.no_grad():
        trainer.loss(ids, torch.zeros_like(ids))
    retention = recipe.retention(recipe.width)
    reader = needle_evaluation.Reader(model, recipe.rope_theta, retention, recipe.bias)
    with torch.inference_mode():
        reader.start(96)
        for part in (ids[:, :40], ids[:, 40:77]):
            last = reader.read(part)
        assert torch.allclose(last, logits[0][:, 76], atol=2e-5)
        for at in range(77, 96):
            last = reader.read(ids[:, at : at + 1])
            assert torch.allclose(last, logits[0][:, at], atol=2e-5)
    if retention is not None:
        held = reader.stores[1].positions
        assert held.shape[-1] <= recipe.width
        share = needle_evaluation.recalled([held], [(95, 96), (0, 96)])
        assert np.allclose(share[1], recipe.width / 96)
        assert name == "published" or share[0].min() == 1.0  # without a window even the newest goes


# resuming


@pytest.mark.parametrize("name", ["dma", "full"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, tmp_path):
    recipe = tiny(name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = trained(recipe, 8, whole)
    with pytest.raises(SystemExit):
        trained(recipe, 8, parts, stop=5)
    resumed = trained(recipe, 8, parts, resume=True)
    rows = [
        [(row["step"], row["loss"]) for row in dma_common.read_rows(folder / "training.jsonl")]
        for folder in (whole, parts)
    ]
    assert [step for step, _ in rows[0]] == list(range(1, 9))
    assert rows[0] == rows[1]
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_replace_fields_and_teach():
    recipe = dma_common.with_settings(tiny("dma"), ["width=16", "form=linear", "betas=[0.9,0.95]"])
    assert (recipe.width, recipe.form, recipe.betas) == (16, "linear", (0.9, 0.95))
    with pytest.raises(ValueError, match="choose one of"):
        dma_common.with_settings(recipe, ["widht=3"])


def test_rows_are_appended_and_a_cut_line_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    dma_common.append_row(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": ')
    assert dma_common.read_rows(path) == [{"a": 1}]
    assert json.loads(path.read_text().splitlines()[0]) == {"a": 1}


def test_prompts_know_where_their_fact_stands():
    path = str(dma_common.ROOT / "models" / "dynmask-reference")
    from transformers import AutoTokenizer

    needle_evaluation._tokenizer = tokenizer = AutoTokenizer.from_pretrained(path)
    for index in (0, 4, 10):
        ids, known = needle_evaluation._write((index, 1_024, 1))
        assert len(ids) == 1_024
        fact = tokenizer.decode(ids[slice(*known["fact"])])
        assert known["answer"] in fact and known["meta"]["name"] in fact and "\n" not in fact
        assert tokenizer.decode(ids[slice(*known["value"])]).strip() == known["answer"]


def test_long_texts_hide_few_facts():
    recipe = tiny("dma", most_facts=3)
    from reference_data import Corpus
    from tokenizers import Tokenizer

    given = Tokenizer.from_file(str(dma_common.ROOT / "models/dynmask-reference/tokenizer.json"))
    ids = np.array(given.encode("A line of text.\n" * 3_000).ids, np.uint16)
    author = needle_model.Needles(Corpus(given, ids, ids, ["word", "other"], []), recipe)
    facts = []
    author.form = lambda *a, **k: (facts.append(0), needle_model.Author.form(author, *a, **k))[1]
    for seed in range(6):
        tokens, classes = author.sequence(random.Random(seed), 4_096)
        assert tokens.shape == classes.shape == (4_096,)
    assert author.share == recipe.long_facts and author.most == 3 and facts


def test_a_window_is_a_retention_without_a_pool():
    assert tiny("window").retention(24) == Retention(24, 24, 0)
    assert tiny("full").retention(24) is None
    narrow = tiny("narrow", least_width=16, width=216)
    drawn = {narrow.keys(0.5, step) for step in range(50)}
    assert drawn == {16, 80, 144, 208}
    published = tiny("published")
    assert published.keys(0.0) == 64 and published.keys(1.0) == published.width


# MQAR


def test_mqar_is_answered_by_looking_back():
    generator = torch.Generator().manual_seed(2)
    ids, where, values = mqar.mqar(16, 128, 16, generator, vocabulary=256)
    assert ids.shape == (16, 128) and where.shape == values.shape == (16, 16)
    keys = ids[:, 0:32:2]
    assert bool(((keys >= 1) & (keys < 128)).all())
    assert bool(((ids[:, 1:32:2] >= 128) & (ids[:, 1:32:2] < 256)).all())
    for row in range(16):
        assert len(set(keys[row].tolist())) == 16  # no two equal keys
        assert len(set(ids[row, 1:32:2].tolist())) == 16
        assert len(set(where[row].tolist())) == 16
        for at, value in zip(where[row].tolist(), values[row].tolist(), strict=True):
            assert at >= 32 and at % 2 == 0
            first = keys[row].tolist().index(int(ids[row, at]))
            assert int(ids[row, 2 * first + 1]) == value


def test_mqar_gaps_follow_their_power_law():
    generator = torch.Generator().manual_seed(4)
    _, where, _ = mqar.mqar(4_000, 512, 1, generator, vocabulary=64)
    gap = (where[:, 0] - 2) // 2
    weight = mqar.POWER * torch.arange(1, 256).double() ** (mqar.POWER - 1)
    weight = weight / weight.sum()
    for index in range(4):  # 4,000 draws: three standard errors
        share, expected = float((gap == index).double().mean()), float(weight[index])
        assert abs(share - expected) < 3 * (expected / 4_000) ** 0.5


def test_mqar_grows_to_its_case_and_refuses_too_many_pairs():
    cell = mqar.Cell(mqar.Case("published", 8_192, 512, 512), "dma", 64, 0, 1e-3)
    stages = [cell.stage(at / 100) for at in range(100)]
    assert stages[0] == (64, 16) and stages[-1] == stages[65] == (8_192, 512)
    assert [length for length, _ in stages] == sorted(length for length, _ in stages)
    assert all(4 * pairs <= length for length, pairs in stages)
    with pytest.raises(ValueError, match="a quarter of 512"):
        mqar.Case("too many", 512, 256, 64)


def test_cells_run_once_and_take_the_best_rate():
    cells = mqar.order(3, 64, [], [64], ["full", "dma"])
    assert len(cells) == 4 and {cell.rate for cell in cells} == set(mqar.RATES)
    rows = [{"key": list(c.key), "rate": c.rate, "accuracy": c.rate} for c in cells[:-1]]
    left = mqar.order(3, 64, rows, [64], ["full", "dma"])
    assert left[0] == cells[-1]
    assert {c.mixer for c in left[1:]} == {"full"}
    assert {c.rate for c in left[1:]} == {max(mqar.RATES)}
    assert len({c.key for c in left}) == len(left)
    assert not {c.key for c in left} & {tuple(row["key"]) for row in rows}


@pytest.mark.parametrize("seeds", [(0.05078, 0.04517), (0.9968, 0.9971), (0.0004, 0.0115), (0.5,)])
def test_mqar_table_has_means_within_their_ranges(seeds):
    case = asdict(mqar.CASES[0])
    rows = [{"case": case, "mixer": "dma", "hidden": 64, "seed": seed, "accuracy": right}
            for seed, right in enumerate(seeds)]  # fmt: skip
    mean, *ends = map(float, re.findall(r"\d+\.\d", mqar.recall(rows).splitlines()[2]))
    assert mean == pytest.approx(100 * sum(seeds) / len(seeds), abs=0.051)
    assert len(ends) == (2 if len(seeds) > 1 else 0)
    if ends:
        assert ends == pytest.approx([100 * min(seeds), 100 * max(seeds)], abs=0.051)
        assert ends[0] <= mean <= ends[1]


def test_a_table_holds_rows_that_were_trained_alike():
    told = {"case": asdict(mqar.CASES[0]), "mixer": "dma", "hidden": 64, "tokens": 512}
    rows = [{**told, "seed": 0, "steps": 1_500, "accuracy": 0.5},
            {**told, "seed": 1, "steps": 1_500, "accuracy": 0.7},
            {**told, "seed": 0, "steps": 9_000, "accuracy": 0.9}]  # fmt: skip
    assert list(mqar.recalled(rows).values()) == [[0.5, 0.7]]
    assert mqar.recalled([]) == {}
    spent = {"size": "10M", "mixer": "full", "step_tokens": 64, "length": 8}
    rows = [{**spent, "seed": 0, "tokens": 16, "steps": 2, "perplexity": 9.0},
            {**spent, "seed": 1, "tokens": 16, "steps": 2, "perplexity": 8.0},
            {**spent, "seed": 0, "tokens": 32, "steps": 4, "perplexity": 1.0}]  # fmt: skip
    assert scaling.perplexities(rows) == {("10M", "full"): [9.0, 8.0]}


@pytest.mark.parametrize("case", mqar.CASES, ids=str)
@pytest.mark.parametrize("hidden", mqar.WIDTHS)
def test_peers_of_equal_cache_hold_as_many_numbers_and_nsa_has_blocks_to_choose(case, hidden):
    dma, mla, nsa = (mqar.Cell(case, mixer, hidden, 0, 1e-2).shape()
                     for mixer in ("dma", "mla, equal cache", "nsa, w chosen"))  # fmt: skip
    held = dma.width * dma.kv_heads * 2 * dma.head_dim
    assert mla.latent > 0 and mla.rotary > 0 and mla.rotary % 2 == 0
    latents = (mla.latent + mla.rotary) * case.length
    assert latents <= held < latents + case.length  # one number more a token is too many
    assert nsa.selected >= max(case.width, 128)


@pytest.mark.parametrize("mixer", ["full", "dma", "window", "dma as published"])
def test_mqar_mixers_learn_something(mixer):
    case = mqar.Case("tiny", 64, 4, 16)
    cell = mqar.Cell(case, mixer, 16, 0, 1e-2, steps=2, tokens=256)
    row = mqar.train(cell, "cpu", float("inf"))
    assert 0 <= row["accuracy"] <= 1 and row["questions"] == mqar.TESTS * 4 * 4
    assert mqar.train(cell, "cpu", 0.0) is None  # no time left


def test_tries_are_compared_with_dma_at_its_own_rate():
    first = asdict(mqar.CASES[0])
    ran = (("dma", 0, 0.01, 0.3), ("dma", 0, 0.003, 0.6), ("dma", 1, 0.02, 0.9),
           ("mla", 0, 0.03, 1.0))  # fmt: skip
    rows = [{"mixer": mixer, "hidden": 128, "case": first, "seed": seed, "rate": rate,
             "accuracy": right, "steps": 10, "tokens": 64}
            for mixer, seed, rate, right in ran]  # fmt: skip
    rows.append({**rows[0], "rate": 0.04, "accuracy": 1.0, "steps": 99})
    cells = mqar.tries(10, 64, rows)
    assert len({cell.key for cell in cells}) == len(cells) == len(mqar.TRIES) * len(mqar.TRIED)
    assert [cell.trial for cell in cells[: len(mqar.TRIES)]] == list(mqar.TRIES)
    assert len({cell.case for cell in cells[: len(mqar.TRIES)]}) == 1  # every try once, first
    assert {c.rate for c in cells if c.hidden == 128} == {0.003}
    assert {c.rate for c in cells if c.hidden == 64} == {mqar.RATES[0]}  # without rows
    assert {c.steps for c in cells if c.trial != "steps x 3"} == {10}
    assert {c.steps for c in cells if c.trial == "steps x 3"} == {30}
    plain = mqar.Cell(cells[0].case, "dma", 128, 0, 0.003)
    for cell in cells[: len(mqar.TRIES)]:
        told = asdict(cell.shape()), asdict(plain.shape())
        changed = {name: told[0][name] for name in told[0] if told[0][name] != told[1][name]}
        assert changed == mqar.TRIES[cell.trial].settings


@pytest.mark.parametrize("case", mqar.CASES, ids=str)
def test_a_narrowing_width_begins_with_every_key_and_ends_with_w(case):
    cell = mqar.Cell(case, "dma", 64, 0, 1e-2, trial="width from N down")
    plain = replace(cell, trial="")
    last = case.length
    for step in range(1_000):
        progress = step / 1_000
        length, width = cell.stage(progress)[0], cell.width(progress)
        assert plain.width(progress) == case.width
        if length < case.length:
            assert width >= length
        else:
            assert case.width <= width <= last
            last = width
    assert cell.width(0.65) == case.length  # the first step of the full length
    assert cell.width(0.849) > cell.width(0.85) == case.width


def test_exploring_keeps_as_many_keys_and_always_the_window():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 40)
    kept = {"width": 8, "window": 3, "sinks": 2}
    plain = Retention(**kept).mask(scores).dense()
    noisy = mqar.Exploring(**kept, noise=1.0).mask(scores).dense()
    assert torch.equal(mqar.Exploring(**kept).mask(scores).dense(), plain)
    assert not torch.equal(noisy, plain)
    assert torch.equal(noisy.sum(-1), plain.sum(-1))
    always = Retention(width=5, window=3, sinks=2).mask(scores).dense()
    assert not (always & ~noisy).any()
    far = mqar.Exploring(**kept, noise=1e-6).mask(scores).dense()
    assert (far & plain).sum() > 0.9 * plain.sum()  # little noise, nearly the same keys


@pytest.mark.parametrize("trial", ["exploration", "width from N down", "scores learn 10 x as fast"])
def test_what_is_tried_is_over_when_a_model_is_tested(monkeypatch, trial):
    case = mqar.Case("tiny", 128, 4, 16)
    seen, keep = [], mqar.keep

    def watched(model, width, noise=0.0):
        keep(model, width, noise)
        seen.append({layer.retention for layer in model.mixers})

    monkeypatch.setattr(mqar, "keep", watched)
    cell = mqar.Cell(case, "dma", 16, 0, 1e-2, steps=20, tokens=256, trial=trial)
    row = mqar.train(cell, "cpu", float("inf"))
    assert 0 <= row["accuracy"] <= 1
    assert seen[-1] == {Retention(16, 4)}
    if trial == "exploration":
        assert seen[0] == {mqar.Exploring(16, 4, noise=1.0)}
    if trial == "width from N down":
        assert [next(iter(some)).width for some in seen] == [64, 128, 64, 32, 16, 16]


@pytest.mark.parametrize("option", [["--hidden", "64"], ["--mixers", "dma"], ["--plot", "a.png"]])
def test_options_that_say_nothing_to_tries_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mqar.py", "--tries", "--report", *option])
    with pytest.raises(SystemExit):
        mqar.main()
    assert f"{option[0]}: expected none with --tries" in capsys.readouterr().err


def test_tries_stand_under_the_cell_they_are_compared_with():
    told = {"case": asdict(mqar.CASES[0]), "mixer": "dma", "hidden": 128, "seed": 0,
            "steps": 8, "tokens": 64}  # fmt: skip
    base = [{**told, "steps": 16, "accuracy": 1.0}, {**told, "accuracy": 0.5},
            {**told, "accuracy": 0.625}, {**told, "seed": 1, "accuracy": 0.9},
            {**told, "mixer": "mla", "accuracy": 1.0}]  # fmt: skip
    rows = [{**told, "trial": "worse", "accuracy": 0.25}, {**told, "trial": "better",
            "accuracy": 0.75}]  # fmt: skip
    lines = mqar.recall_tries(rows, base).splitlines()
    assert lines[0] == "| tried | 512 tokens, w 32, width 128 |"
    assert lines[2:] == ["| - | 62.5 |", "| better | 75.0 |", "| worse | 25.0 |"]
    easy = {**told, "case": asdict(mqar.CASES[2]), "trial": "worse", "accuracy": 1.0}
    lines = mqar.recall_tries([*rows, easy], base[:1]).splitlines()  # trained longer: no peer
    assert lines[2:] == ["| worse | 25.0 | 100.0 |", "| better | 75.0 | - |"]
    assert mqar.recall_tries([], base) == "nothing was tried yet"


# scaling


def test_scaling_shapes_have_the_sizes_they_are_called_by():
    for size, millions in (("10M", 10), ("30M", 30), ("80M", 80)):
        with torch.device("meta"):
            model = dma_decoder.Decoder(scaling.Cell(size, "full", 0, 1e-3).shape())
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(count / millions - 1) < 0.08


def test_scaling_stops_and_goes_on(tmp_path, monkeypatch):
    tokens = torch.arange(5_000) % 61
    monkeypatch.setattr(scaling, "text", lambda folder: (tokens, tokens))
    monkeypatch.setitem(scaling.SIZES, "smoke", {"hidden": 16, "layers": 1, "heads": 2,
                        "kv_heads": 1, "head_dim": 8, "intermediate": 16})  # fmt: skip
    cell = scaling.Cell("smoke", "dma", 0, 1e-2, 512, 128, 64, 24, str(tmp_path))
    assert scaling.train(cell, "cpu", 0.0) is None
    row = scaling.train(cell, "cpu", float("inf"))
    assert row["steps"] == 4 and np.isfinite(row["perplexity"])
    assert len(row["loss_by_position"]) == scaling.BUCKETS
    row = dma_common._run(lambda *_: row, cell, float("inf"), None)
    assert str(tmp_path) not in json.dumps(row) and row["size"] == "smoke"


# several processes


class Pair:
    """What accelerate does for two processes, the other one's numbers being twice these."""

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        return tensor * 1.5


def test_gradients_are_averaged_over_processes():
    ranks = Ranks("cpu")
    a, b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.full((2, 3), 2.0)
    ranks.average([a, b])
    assert b.grad is None and ranks.agree(0.5) == 0.5
    ranks.accelerator = Pair()
    ranks.average([a, b])
    assert bool((a.grad == 3).all()) and bool((b.grad == 0).all())
    assert ranks.agree(0.5) == 0.75


def test_the_needle_report_has_a_row_for_each_variant_and_a_table_for_each_way_of_training(
    tmp_path,
):
    import needle_report

    def row(variant, width, length, right, steps=None):
        return {"variant": variant, "width": width, "length": length, "n": 20, "minutes": 2.4,
                "accuracy": right, "interval": [0.9 * right, right], "steps": steps}  # fmt: skip

    rows = [row("dma", 512, n, 0.95) for n in (4_096, 16_384, 2**20)]
    rows += [row("full", None, 4_096, 1.0), row("window", 512, 4_096, 0.1, steps=400)]
    found = needle_report.table(rows)
    assert "| dma, w 512 | 95.0% of 20 | 95.0% of 20 | 95.0% of 20 |" in found
    assert "| full, all keys | 100.0% of 20 | - | - |" in found
    assert "nothing, 2.4 minutes" in found and "nothing, 400 steps" in found
    needle_report.plot(rows, tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 10_000


def test_far_spans_reach_the_longest_position_and_never_pass_it():
    import needle_model

    recipe = replace(needle_model.NeedleRecipe(), far=1.0, gapless=0.0)
    last = needle_model.positions_of(400, 516, recipe)[:, -1]
    assert int(last.max()) < recipe.longest_position
    # uniform: half of the spans lie above the middle
    assert 140 < int((last > recipe.longest_position // 2).sum()) < 260
