"""Needle with DMA layers: facts hidden in real text, trained to 16K tokens, asked at up to 1M.

    python recipes/needle_dma.py --variant dma --minutes 8 --out runs/needle
    python recipes/needle_dma.py --variants dma full window --parallel --minutes 8 --out runs/needle
    python recipes/needle_dma.py --report             # tables, and docs/needle_dma.png
    python recipes/needle_dma.py --variant dma --smoke --out /tmp/needle

The model, its data and its compiled pieces are those of ``train_reference.py``; what differs is
here. Each of the variants is a change of the recipe's data (``VARIANTS`` of ``needle_model.py``):
full attention and a sliding window trained alike, the layer as published, and one part left out at
a time. ``--start models/dynmask-reference`` trains on from a model of full attention instead of
from nothing, every variant from the same one. ``--resume`` goes on after a kill, ``--set
width=256`` changes any field, rows go to ``benchmarks/results/needle_dma.jsonl``.

Positions. RoPE fails at distances that training never showed. Keys in a cache of w could be given
positions by their rank in it, but then a key's rotation depends on the query that reads it, and
neither a kernel over shared key lists nor a cache of rotated keys is possible. So positions have
gaps: a sequence is a few runs of neighbours, and the jumps between them add up to a span drawn
log-uniformly between its length and 2^20. Distances within a run are those of real text, which
heads that look at the token before need (gaps between all tokens, ``gaps="uniform"``, take that
away: previous token 1 is then 60 away); distances between runs cover all that a million tokens
show. The rotary base follows 0.0424 T^1.628, 2.7e8 for T = 2^20. A trial on a CPU (associative
recall, two layers, 64 tokens, positions to 65,536, 1,500 steps, one seed; right answers where
questions stand 0, 1,000, 8,000 and 60,000 positions after the pairs): jumps 99, 98, 97 and 73 %,
uniform gaps 9, 7, 7 and 3 % (it learned nothing), no gaps 68, 8, 3 and 7 %.

What 512 keys cannot do: hold 800 random records, each of which may be asked. Long sequences
therefore hide at most ``most_facts`` facts, and the other records are short or go unanswered.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dma_common import (
    RESULTS,
    ROOT,
    Loop,
    Ranks,
    adamw,
    append_row,
    fit,
    in_parallel,
    provenance,
    read_rows,
    with_settings,
)

# isort: split
import needle_evaluation as evaluation
import needle_report
import torch
from needle_model import (
    VARIANTS,
    DmaTrainer,
    Feed,
    NeedleRecipe,
    Needles,
    continued,
    dma_model,
    recipe_of,
    start_from,
)
from reference_data import Batches, Corpus, build_corpus
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from train_reference import load_corpus, save_corpus, write_atomically
from transformers import AutoTokenizer

TOKENIZER = ROOT / "models" / "dynmask-reference"


# ----------------------------------------------------------------------------------------- the run


def loop_of(recipe: NeedleRecipe, steps: int | None) -> Loop:
    """Return how long and how fast a recipe trains: minutes, or steps where they are given."""
    return Loop(
        seed=recipe.seed, minutes=math.inf if steps else recipe.minutes, steps=steps or 10**9,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps,
        decay_from=recipe.decay_from, clip=recipe.clip,
        checkpoint_minutes=recipe.checkpoint_minutes,
    )  # fmt: skip


def train(
    recipe: NeedleRecipe, corpus: Corpus, out: Path, options: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Train a variant; return the model, its weights rounded to bf16, and the last log row."""
    ahead = max(4, 2 * recipe.workers)
    # Workers are forked before the device is touched.
    batches = Batches(Needles(corpus, recipe), recipe.seed, recipe.tokens, recipe.workers, ahead)
    try:
        ranks = Ranks(options.device)
        model = dma_model(recipe)
        if options.start is not None:
            start_from(model, options.start / "model.safetensors")
        model = model.to(ranks.device)
        loop = loop_of(recipe, options.steps)
        scaled = {"dynmask_score": recipe.score_rate}
        optimizer = adamw(model, loop, recipe.weight_decay, recipe.betas, scaled)
        trainer = DmaTrainer(model, recipe, options.compile)
        trainer.choose_backends()
        feed = Feed(batches, recipe, ranks)
        last = fit(loop, model, optimizer, feed, trainer.step, out, ranks, options.resume, out.name)
    finally:
        batches.close()
    round_weights(model)
    if ranks.index == 0:
        save(model, recipe, last, out / "model.safetensors")
    return model, last


def save(model: nn.Module, recipe: NeedleRecipe, last: dict[str, Any], path: Path) -> None:
    """Write the weights, those of the scores in float32, the recipe and the last log row."""
    tensors = {
        name: p.detach().contiguous() if "dynmask_score" in name else p.detach().bfloat16()
        for name, p in model.named_parameters()
    }
    about = {"recipe": json.dumps(asdict(recipe)), "training": json.dumps(last)}
    write_atomically(path, lambda beside: save_file(tensors, str(beside), about))


def load(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load what :func:`save` wrote and return the last log row."""
    with safe_open(str(path), framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
        return json.loads(file.metadata()["training"])


def round_weights(model: nn.Module) -> None:
    """Round all weights but the scores' to bf16, as a saved model has them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dynmask_score" not in name:
                parameter.copy_(parameter.bfloat16())


def test(
    recipe: NeedleRecipe, model: Any, last: dict[str, Any], shared: Path, minutes: float
) -> Iterator[dict[str, Any]]:
    """Yield one row for each length and width, the shortest first, until time is over."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    until, begun = time.monotonic() + 60 * minutes, False
    model.eval()
    for length, count in sorted(recipe.tests):
        widths: list[int | None] = [None if recipe.mixer == "full" else recipe.width]
        if recipe.mixer == "dma" and length <= 16_384:
            widths += [*recipe.other_widths, None]
        prompts = evaluation.load(shared, length, count, 1)
        for width in widths:
            if begun and time.monotonic() > until:
                return
            if width is not None and width < recipe.window + recipe.sinks:
                continue
            retention = None if width is None else recipe.retention(width)
            reader = evaluation.Reader(model, recipe.rope_theta, retention, recipe.bias)
            row = evaluation.evaluate(reader, tokenizer, prompts, until)
            name = "all keys" if width is None else f"w {width}"
            print(f"{length:9,} {name:9} {row['accuracy']:7.1%} n {row['n']} "
                  f"{row['seconds']} s", flush=True)  # fmt: skip
            begun = True
            yield {"width": width, **row, "training": last}


def run(name: str, options: argparse.Namespace) -> None:
    """Train and test one variant, and append its rows."""
    recipe = settled(name, options)
    out: Path = options.out / (name if recipe.seed == 1 else f"{name}-{recipe.seed}")
    out.mkdir(parents=True, exist_ok=True)
    shared = options.out / "shared"
    if options.test_only:
        model = dma_model(recipe)
        last = load(model, out / "model.safetensors")
        model = model.to(options.device)
    else:
        while not (shared / "tokenizer.json").is_file():  # the first process writes the text
            time.sleep(0.5)
        model, last = train(recipe, load_corpus(shared), out, options)
    if int(os.environ.get("RANK", "0")):
        return
    base = continued(NeedleRecipe()) if options.start else NeedleRecipe()
    changed = {k: v for k, v in asdict(recipe).items()
               if v != getattr(base, k) and k not in ("workers", "tests")}  # fmt: skip
    for row in test(recipe, model, last, shared, options.test_minutes):
        about = provenance(options.device, options.commit)
        append_row(options.results, {"recipe": "needle_dma", "variant": name, "seed": recipe.seed,
                   "start": options.start and options.start.name, "changed": changed,
                   "minutes": recipe.minutes, "steps": options.steps, **row, **about})  # fmt: skip


def settled(name: str, options: argparse.Namespace) -> NeedleRecipe:
    """Return the recipe that the command line asks for."""
    recipe = recipe_of(name, options.smoke, go_on=options.start is not None)
    recipe = replace(recipe, seed=options.seed)
    if options.minutes:
        recipe = replace(recipe, minutes=options.minutes)
    if options.workers:
        recipe = replace(recipe, workers=options.workers)
    if options.lengths:
        tests = tuple((n, dict(recipe.tests).get(n, 22)) for n in options.lengths)
        recipe = replace(recipe, tests=tests)
    return with_settings(recipe, options.set)


def prepare(options: argparse.Namespace, recipe: NeedleRecipe) -> BaseProcess:
    """Write the text that variants share, and let a process write the prompts meanwhile."""
    shared = options.out / "shared"
    context = multiprocessing.get_context("spawn")
    workers = 1 if options.smoke else max(2, (os.cpu_count() or 1) // 3)
    if options.test_only:  # nothing else wants the processors
        workers = os.cpu_count() or 1
    arguments = (shared, TOKENIZER, dict(recipe.tests), 1, workers)
    process = context.Process(target=evaluation.prepare, args=arguments)
    process.start()
    if not options.test_only and not (shared / "text.safetensors").is_file():
        given = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        save_corpus(shared, build_corpus(
            recipe.characters, recipe.characters_per_source, recipe.vocabulary, given
        ))  # fmt: skip
    return process


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--variant", default="dma", choices=VARIANTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="several of them")
    parser.add_argument("--parallel", action="store_true", help="beside each other")
    parser.add_argument("--jobs", type=int, default=8, help="variants beside each other at most")
    parser.add_argument("--minutes", type=float, help="training of each (default: 8)")
    parser.add_argument("--test-minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="so many steps in place of minutes")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompts to test")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "needle_dma")
    parser.add_argument("--results", type=Path, default=RESULTS / "needle_dma.jsonl")
    parser.add_argument("--start", type=Path, metavar="MODEL",
                        help="go on from this model of the reference's shape")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--test-only", action="store_true", help="test what --out holds")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, help="processes that write data")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="table and plot of what there is")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "needle_dma.png")
    options = parser.parse_args()
    if options.report:
        rows = read_rows(options.results)
        print(needle_report.table(rows))
        needle_report.plot(rows, options.plot)
        return
    names = options.variants or [options.variant]
    if options.smoke and options.results.parent == RESULTS:
        options.results = options.out / "needle_dma.jsonl"
    recipe = settled(names[0], options)
    first = not (options.child or int(os.environ.get("RANK", "0")))
    writer = prepare(options, recipe) if first else None
    if options.parallel and len(names) > 1:
        base = [word for word in sys.argv[1:] if word != "--parallel"]
        jobs = min(options.jobs, len(names))
        workers = max(1, ((os.cpu_count() or 2) - 2) // jobs)
        commands = [[sys.executable, __file__, *base, "--variants", name, "--child",
                     "--workers", str(options.workers or workers)] for name in names]  # fmt: skip
        logs = [options.out / name / "output.log" for name in names]
        codes = in_parallel(commands, logs, jobs)
        for name, code, log in zip(names, codes, logs, strict=True):
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            print(f"--- {name}: exit status {code}\n{tail}", flush=True)
    else:
        if options.device is None:
            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.compile is None:
            options.compile = options.device.startswith("cuda")
        for name in names:
            run(name, options)
    if writer is not None:
        writer.join()


if __name__ == "__main__":
    main()
