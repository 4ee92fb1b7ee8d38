"""Train the reference model on to 65,536 tokens and to harder questions.

One NVIDIA H100 trains it in under eight minutes from ``models/dynmask-reference``::

    python recipes/train_harder.py --prepare runs/text        # once, on any machine: 25 MB of text
    python recipes/train_harder.py --text runs/text --minutes 7.5 --out models/dynmask-reference-64k

Its documents are those of the reference and five more families (``harder_data.py``): many keys and
values, chains of assignments, two kinds of counting, and linked documents. The rotary base rises
with the length. At the end full attention is evaluated on the 13 RULER-style tasks, lines and
needle at four lengths; ``--evaluation-minutes`` bounds it and ``--evaluate-only`` goes on with it.
Interrupt the recipe at any time: the same command with ``--resume`` goes on. ``--smoke`` does
everything in a minute on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harder_data import ANSWERS, FAMILIES, WEIGHTS, HarderAuthor
from harder_evaluation import cells, evaluate
from reference_data import ANSWER, TEXT, Batches, Corpus, build_corpus
from tokenizers import Tokenizer
from torch import Tensor
from train_reference import (
    Recipe,
    Trainer,
    _phase,
    load_corpus,
    save_corpus,
    save_model,
    train,
    write_atomically,
    write_json,
)
from transformers import AutoConfig

from dynmask.errors import bad
from dynmask.evals.ruler import TASKS

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class HarderRecipe(Recipe):
    """What is trained; the fields of the reference's recipe, and these.

    ``mix`` are shares of the documents by family; the others are the reference's. The shape of the
    model is that of the model it starts from. The rotary base is 0.0424 T^1.628 for T = 65,536.
    """

    minutes: float = 7.5
    seed: int = 3
    stages: tuple[tuple[int, float], ...] = (
        (1_032, 0.2), (2_064, 0.2), (4_128, 0.1), (8_256, 0.15), (33_024, 0.15), (66_048, 0.2),
    )  # fmt: skip
    shorter: float = 0.3
    mix: tuple[tuple[str, float], ...] = (
        ("needles", 0.2), ("traces", 0.12), ("common", 0.14), ("frequent", 0.07),
        ("documents", 0.17),
    )  # fmt: skip
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    decay_from: float = 0.4
    rope_theta: float = 2_900_000.0
    characters: int = 36_000_000
    characters_per_source: int = 3_000_000
    evaluation_items: int = 10
    evaluation_rounds: int = 3
    evaluation_lengths: tuple[int, ...] = (65_536, 32_768, 4_096, 16_384)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, shares = [name for name, _ in self.mix], [share for _, share in self.mix]
        if not set(names) <= set(FAMILIES) or min([*shares, 0]) < 0 or sum(shares) > 1:
            raise bad(
                "mix", f"families among {list(FAMILIES)} with shares from 0 that add up to at "
                "most 1", self.mix, "Name known families and scale the shares."
            )  # fmt: skip


def smoke(recipe: HarderRecipe) -> HarderRecipe:
    """Return the recipe at toy sizes: it must run through, not learn."""
    return replace(
        recipe, minutes=0.25, tokens=2_064, stages=((516, 0.5), (1_032, 0.5)), warmup_steps=5,
        workers=1, characters=1_500_000, characters_per_source=500_000, checkpoint_minutes=0.1,
        evaluation_items=1, evaluation_rounds=1, evaluation_lengths=(768,),
    )  # fmt: skip


def shortened(recipe: HarderRecipe, longest: int) -> HarderRecipe:
    """Return the recipe without the stages of longer sequences than that."""
    kept = [(length, share) for length, share in recipe.stages if length <= longest]
    if not kept:
        least = min(length for length, _ in recipe.stages)
        raise bad("--longest", f"at least the {least} tokens of the first stage", longest,
                  "Raise it.")  # fmt: skip
    total = sum(share for _, share in kept)
    return replace(recipe, stages=tuple((length, share / total) for length, share in kept))


def shaped(recipe: HarderRecipe, start: Path) -> HarderRecipe:
    """Return the recipe in the shape of the model that is trained on."""
    config = AutoConfig.from_pretrained(start)
    return replace(
        recipe, hidden=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
    )  # fmt: skip


class HarderTrainer(Trainer):
    """The reference's trainer with the classes of the harder families."""

    class_weights = WEIGHTS

    @staticmethod
    def figures(length: int, table: Tensor) -> dict[str, float]:
        """Return the shares of right answer tokens and the loss of text, of a length."""
        amount, summed, right = table.T.tolist()
        shares = {
            f"{name}_{length}": round(right[kind] / amount[kind], 4)
            for name, kind in {"answers": ANSWER, **ANSWERS}.items()
            if amount[kind]
        }
        return {**shares, f"text_loss_{length}": round(summed[TEXT] / max(amount[TEXT], 1), 4)}


def text_of(recipe: HarderRecipe, start: Path, folder: Path) -> Corpus:
    """Return the text that a folder holds; read it from this machine first if there is none."""
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    if (folder / "text.safetensors").is_file():
        corpus = load_corpus(folder)
        if corpus.tokenizer.to_str() != tokenizer.to_str():
            raise bad("--text", f"text in the tokens of {start}", str(folder),
                      "Prepare it again with this --start.")  # fmt: skip
        return corpus
    corpus = build_corpus(
        recipe.characters, recipe.characters_per_source, recipe.vocabulary, tokenizer
    )
    save_corpus(folder, corpus)
    return corpus


def run_phase(recipe: HarderRecipe, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, save the model, and return what is known about it and its earlier phases."""
    out, started = options.out, time.perf_counter()
    (out / "work").mkdir(parents=True, exist_ok=True)
    corpus = text_of(recipe, options.start, options.text or out / "work")
    text = len(corpus.code) + len(corpus.prose)
    print(f"text: {text / 1e6:.1f}M tokens, {time.perf_counter() - started:.0f} s", flush=True)
    earlier = json.loads((options.start / "evaluation.json").read_text(encoding="utf-8"))["phases"]
    # Workers are forked before the device is touched.
    author = HarderAuthor(corpus, recipe.mix, recipe.facts)
    batches = Batches(author, recipe.seed, recipe.tokens, recipe.workers, 2 * recipe.workers + 2)
    try:
        model = train(recipe, corpus, batches, out, options.device, options, HarderTrainer,
                      len(earlier) + 1)  # fmt: skip
    finally:
        batches.close()
    save_model(model, corpus.tokenizer, recipe, out)
    with open(out / "training.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    phase = {"recipe": asdict(recipe), "training": last, "sources": corpus.sources}
    phase |= {"device": device_name(options.device), "text_tokens": text}
    return [*earlier, phase]


def device_name(device: str) -> str:
    """Return the device as the model card calls it."""
    return f"one {torch.cuda.get_device_name()}" if device.startswith("cuda") else "a CPU"


# ----------------------------------------------------------------------------------- the outcome


def score_table(rows: list[dict[str, Any]]) -> str:
    """Return scores by task and length; in brackets the items of a cell."""
    lengths = sorted({row["length"] for row in rows if not row["task"].startswith("longeval")})
    found = {(row["task"], row["length"]): row for row in rows}
    lines = ["| task | " + " | ".join(f"{length:,}" for length in lengths) + " |",
             "|---" * (len(lengths) + 1) + "|"]  # fmt: skip
    for task in [*TASKS, "lines", "needle"]:
        told = [found.get((task, length)) for length in lengths]
        shown = [f"{row['score']:.1%} ({row['items']})" if row else "-" for row in told]
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    means = []
    for length in lengths:
        scores = [found[task, length]["score"] for task in TASKS if (task, length) in found]
        means.append(f"{sum(scores) / len(scores):.1%}" if len(scores) == len(TASKS) else "-")
    return "\n".join([*lines, "| **mean of the 13** | " + " | ".join(means) + " |"])


def official_table(rows: list[dict[str, Any]]) -> str:
    """Return the scores on official LongEval files, if there are any."""
    found = [row for row in rows if row["task"].startswith("longeval")]
    if not found:
        return ""
    lines = [
        f"| {row['group']} | {row['prompt_tokens']:,.0f} | {row['score']:.1%} ({row['items']}) |"
        for row in sorted(found, key=lambda row: row["prompt_tokens"])
    ]
    head = "\nLongEval: the official files, never trained or tuned on.\n\n| file | tokens | right |"
    return "\n".join([head, "|---|---|---|", *lines, ""])


def model_card(report: dict[str, Any], start: Path) -> str:
    """Return the model card."""
    *earlier, phase = report["phases"]
    recipe, rows = phase["recipe"], report["rows"]
    trained = "\n".join(_phase(index, part) for index, part in enumerate(earlier, 1))
    minutes = phase["training"]["seconds"] / 60
    longest = max(length for length, _ in recipe["stages"])
    stages = ", ".join(f"{length:,} ({share:.0%})" for length, share in recipe["stages"])
    mix = ", ".join(f"{name} {share:.0%}" for name, share in recipe["mix"])
    sources = {
        (source["name"], source["licence"])
        for part in report["phases"] for source in part.get("sources", ())
    }  # fmt: skip
    listed = "\n".join(f"| {name} | {licence} |" for name, licence in sorted(sources))
    return f"""---
license: apache-2.0
library_name: transformers
tags: [dynmask, sparse-attention, long-context, retrieval, tiny]
---
# dynmask-reference-64k

`{start.name}` trained on: the same shape, sequences of up to {longest:,} tokens, and harder
questions: many keys and values, chains of assignments, counting, linked documents. It exists to
test and to show attention masks on tasks that take more than one lookup. It is no assistant: it
knows nothing but how to answer from its context.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/dynmask-reference-64k")
model = AutoModelForCausalLM.from_pretrained("models/dynmask-reference-64k")
```

## Shape
{recipe["layers"]} layers, width {recipe["hidden"]}, {recipe["heads"]} query heads and
{recipe["kv_heads"]} key and value heads of {recipe["head_dim"]}, SwiGLU {recipe["intermediate"]},
RMSNorm, rotary base {recipe["rope_theta"]:,.0f}, tied embeddings; byte-level BPE of
{recipe["vocabulary"]:,} entries whose digits stand alone. Weights in bf16, safetensors.

## Results
Full attention, greedy, after the cast to bf16 and a reload, on words, names and prose that
training never used; the number of items in brackets. RULER-style tasks score the share of the
references that are named, lines and needle whole answers.

{score_table(rows)}
{official_table(rows)}
## How it was trained
`recipes/train_harder.py` on {phase["device"]} in {minutes:.1f} minutes,
{phase["training"]["step"]:,} steps of {recipe["tokens"]:,} tokens, AdamW (betas
{tuple(recipe["betas"])}, weight decay {recipe["weight_decay"]}), learning rate
{recipe["learning_rate"]}, decayed over the last {1 - recipe["decay_from"]:.0%} of the time, bf16.
Sequence lengths by share of the time: {stages}; after the first stage {recipe["shorter"]:.0%} of
the steps use a shorter length. Documents by family: {mix}; the others are the reference's. Answers
weigh most in the loss.

Wordings of questions, sentences and assignments are composed at random for every document, and are
never those of the evaluated tasks; words are never held-out ones. The model it starts from had seen
the wordings of lines and needle:

{trained}

`training.jsonl` is the log, `evaluation.json` has every figure and some wrong answers.

## Text
{phase["text_tokens"] / 1e6:.0f}M tokens of source code, documentation and docstrings of
permissively licensed software, read from the machine that prepared them, and those of the earlier
phases. The text of `pydoc_data`, the haystack of the tasks, is excluded.

| source | licence as its metadata states |
|---|---|
{listed}

## Licence and use
Apache-2.0. For testing, demonstrating and teaching sparse attention. It may repeat fragments of the
sources above and must not be used as a source of facts.
"""


def keep(report: dict[str, Any], out: Path, start: Path) -> None:
    """Write ``evaluation.json`` and the model card."""
    write_json(out / "evaluation.json", report)
    card = model_card(report, start)
    write_atomically(out / "README.md", lambda beside: beside.write_text(card, encoding="utf-8"))


def run_evaluation(
    recipe: HarderRecipe, report: dict[str, Any], options: argparse.Namespace
) -> None:
    """Evaluate what is missing, within the time, and write every row as it comes."""
    wanted = cells(recipe.evaluation_lengths, recipe.evaluation_items, recipe.evaluation_rounds,
                   options.longeval)  # fmt: skip

    def write(rows: list[dict[str, Any]]) -> None:
        keep({**report, "rows": rows}, options.out, options.start)

    try:
        evaluate(wanted, report["rows"], options.out, options.device, options.evaluation_minutes,
                 write, min(8, recipe.workers))  # fmt: skip
    except KeyboardInterrupt:
        sys.exit("\nstopped; run the same command with --evaluate-only to go on")


def settings(options: argparse.Namespace) -> HarderRecipe:
    """Return the recipe that the options ask for."""
    if not (options.start / "evaluation.json").is_file():
        raise bad("--start", "a folder of a trained model with its evaluation.json",
                  str(options.start), "Pass models/dynmask-reference.")  # fmt: skip
    recipe = replace(HarderRecipe(), seed=options.seed)
    if options.smoke:
        recipe = smoke(recipe)
    names = {"minutes": "minutes", "tokens": "tokens", "learning_rate": "rate",
             "workers": "workers", "evaluation_items": "items"}  # fmt: skip
    if options.longest:
        recipe = shortened(recipe, options.longest)
    given = {field: getattr(options, name) for field, name in names.items()}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value})
    if options.evaluate:
        recipe = replace(recipe, evaluation_lengths=tuple(options.evaluate))
    return shaped(recipe, options.start)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    # fmt: off
    parser.add_argument("--start", type=Path, default=ROOT / "models" / "dynmask-reference")
    parser.add_argument("--out", type=Path, default=Path("models/dynmask-reference-64k"))
    parser.add_argument("--minutes", type=float, help="training time (default: 7.5)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER",
                        help="tokenise the text of this machine into FOLDER, and stop")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="text prepared earlier")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--evaluation-minutes", type=float, default=1.5,
                        help="no cell is begun after that; 0 for no evaluation")
    parser.add_argument("--evaluate-only", action="store_true", help="go on with the evaluation")
    parser.add_argument("--evaluate", type=int, nargs="+", metavar="TOKENS",
                        help="prompt lengths of the evaluation, the most important first")
    parser.add_argument("--items", type=int, help="items of a cell in a round (default: 10)")
    parser.add_argument("--longeval", help="folder of official LongEval files, for evaluation")
    parser.add_argument("--longest", type=int, help="leave out the stages of longer sequences")
    parser.add_argument("--tokens", type=int, help="tokens of a step (default: 132,096)")
    parser.add_argument("--rate", type=float, help="learning rate (default: 1.5e-3)")
    parser.add_argument("--workers", type=int, help="processes that write documents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--log-seconds", type=float, default=5.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    # fmt: on
    options = parser.parse_args()
    if options.compile is None:
        options.compile = options.device.startswith("cuda")
    recipe = settings(options)
    torch.set_float32_matmul_precision("high")
    if options.prepare:
        corpus = text_of(recipe, options.start, options.prepare)
        print(f"{(len(corpus.code) + len(corpus.prose)) / 1e6:.1f}M tokens in {options.prepare}")
        return
    if options.evaluate_only:
        report = json.loads((options.out / "evaluation.json").read_text(encoding="utf-8"))
    else:
        phases, rows = run_phase(recipe, options), []
        versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
        versions["python"] = sys.version.split()[0]
        device = device_name(options.device)
        report = {"device": device, "versions": versions, "phases": phases, "rows": rows}
        keep(report, options.out, options.start)
    run_evaluation(recipe, report, options)
    print(f"done: {options.out}", flush=True)


if __name__ == "__main__":
    main()
