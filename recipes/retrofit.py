"""The retrofit: score heads for the frozen reference model, and what a cache of w keys answers.

One GPU trains both heads and evaluates them in about ten minutes::

    python recipes/retrofit.py --minutes 2.5 --seconds 560

Two kinds of score head are trained on generated documents by the retention loss alone; the model
stays as it is. The pair head's card goes to ``models/dynmask-reference-retained``. Then the same
questions are asked under full attention, the cards, StreamingLLM, SnapKV and H2O with the same
number of keys: rows go to ``benchmarks/results/retrofit.jsonl``, a plot to ``docs/retrofit.png``.
``--seconds`` ends the evaluation cleanly when the time is over, ``--resume`` goes on with a
training that was interrupted and with rows that are missing, ``--smoke`` runs everything in a
minute on a CPU.

Answers are scored in one forward pass: the right answer is appended to its prompt, and it counts
when every one of its tokens is the likeliest, which is when greedy decoding would have written it.
Every policy is asked while that pass goes over the answer; SnapKV is told where the prompt ends.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from reference_data import BOS, Author, Corpus, build_corpus  # noqa: E402
from torch import Tensor  # noqa: E402

from dynmask.evals.lines import Lines  # noqa: E402
from dynmask.evals.needle import Needle  # noqa: E402
from dynmask.evals.provenance import machine  # noqa: E402
from dynmask.evals.report import paired_difference, proportion_interval  # noqa: E402
from dynmask.evals.task import Item, Task  # noqa: E402
from dynmask.evals.text import stream  # noqa: E402
from dynmask.retrofit import RetainedSettings  # noqa: E402

MODEL = ROOT / "models" / "dynmask-reference"
RESULTS = ROOT / "benchmarks" / "results" / "retrofit.jsonl"
KINDS = (
    "full", "retained pair", "streaming", "retained value", "snapkv", "h2o",
    "retained pair per head",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained and asked.

    ``documents`` are (tokens, how many); a document is facts hidden in text with questions at its
    end (a share ``facts`` of them), or records with questions among or after them. ``minutes`` is
    the training time of the pair head, ``value_minutes`` that of the linear one. ``cells`` are
    (task, prompt length): "needle" hides 6 facts in prose, "document" ``document_facts`` of them,
    numbers and codes, "lines" is a list of records. ``widths`` are asked in this order.
    """

    seed: int = 1
    documents: tuple[tuple[int, int], ...] = (
        (2_048, 4_000), (4_096, 2_000), (16_384, 1_000), (32_768, 400),
    )  # fmt: skip
    facts: float = 0.6
    characters: int = 24_000_000
    characters_per_source: int = 2_000_000
    minutes: float = 2.0
    value_minutes: float = 0.8
    steps: int | None = None
    tokens: int = 65_536
    rows: int = 32
    late: float = 0.25
    learning_rate: float = 2e-3
    cells: tuple[tuple[str, int], ...] = tuple(
        (task, length)
        for length in (32_768, 16_384, 8_192, 4_096)
        for task in ("needle", "document", "lines")
        if task != "lines" or length in (4_096, 16_384)
    )
    document_facts: int = 24
    items: int = 48
    widths: tuple[int, ...] = (256, 512, 1_024, 128, 2_048)
    evaluated_tokens: int = 262_144
    """Tokens of the prompts that are answered at once."""

    def settings(self, head: str) -> RetainedSettings:
        """Return how a head is trained."""
        return RetainedSettings(
            steps=self.steps,
            minutes=self.minutes if head == "pair" else self.value_minutes,
            lengths=tuple(length for length, _ in self.documents),
            tokens=self.tokens,
            rows=self.rows,
            late=self.late,
            learning_rate=self.learning_rate,
            head="pair" if head == "pair" else "value",
        )

    def task(self, name: str) -> Task:
        """Return a task."""
        if name == "lines":
            return Lines()
        return Needle() if name == "needle" else Needle(facts=self.document_facts, values="mixed")


def smoke(recipe: Recipe) -> Recipe:
    """Return the recipe at toy sizes: it must run through, not learn."""
    return replace(
        recipe, documents=((256, 12), (512, 12)), characters=600_000, characters_per_source=200_000,
        steps=4, tokens=1_024, rows=8, cells=(("needle", 512), ("lines", 256)), items=2,
        widths=(256,), evaluated_tokens=2_048,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ the documents


class Writer(Author):
    """Writes one document a sequence: facts in text, or records."""

    def sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, classes) of a document of ``length`` tokens."""
        self.ids, self.spans = [], []
        self.add([BOS], 0)
        if rng.random() < self.share:
            self.facts(rng, length)
        else:
            rng.choice((self.interleaved, self.asked_at_end))(rng, length)
        while len(self.ids) < length:  # the questions of a short list are over early
            self.asked_at_end(rng, length)
        return np.array(self.ids[:length], dtype=np.uint16), np.zeros(length, np.uint8)


_writer: Writer | None = None


def write(seed: int, length: int, first: int, count: int) -> list[np.ndarray]:
    """Return some documents of one length; runs in a worker that was forked with the writer."""
    assert _writer is not None
    return [_writer.sequence(stream("retrofit", seed, length, i), length)[0]
            for i in range(first, first + count)]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """An item as token ids: its prompt, and the answer that should follow."""

    prompt: np.ndarray
    answer: np.ndarray
    item: Item


def questions(recipe: Recipe, model: str, task: str, length: int) -> list[Question]:
    """Return the questions of a cell."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for item in recipe.task(task).items(tokenizer, recipe.items, length, recipe.seed):
        # As every task words its answers: after a space, but for those that come in brackets.
        text = item.answers[0] if item.prompt.endswith("<") else " " + item.answers[0]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = tokenizer(item.prompt)["input_ids"]
        found.append(Question(np.array(prompt, np.int32), np.array(answer, np.int32), item))
    return found


def in_pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, how many) of pieces of at most ``size``."""
    for first in range(0, count, size):
        yield first, min(size, count - first)


# ----------------------------------------------------------------------------------- the evaluation


def policy_of(kind: str, width: int, cards: dict[str, str], prompts: tuple[int, ...]) -> Any:
    """Return a policy that reads ``width`` keys; None for full attention."""
    from dynmask.card import MaskCard
    from dynmask.policies import H2O, SnapKV, Streaming

    if kind.startswith("retained"):
        budget = "per_head" if kind.endswith("per head") else "even"
        card = MaskCard.from_pretrained(cards["value" if "value" in kind else "pair"])
        return card.policy(width=width, budget=budget)
    if kind == "streaming":
        return Streaming(sinks=4, window=width - 4)
    if kind == "snapkv":
        return SnapKV(width, prompts=prompts)
    return H2O(width, block=min(64, width // 4)) if kind == "h2o" else None


def wanted(recipe: Recipe) -> list[tuple[str, int]]:
    """Return (kind, width) of everything that a cell is asked under, what matters most first.

    Width 0 stands for every key. Widths of one's own for each head start from the card's smallest.
    """
    pairs = [("full", 0)]
    for kind in KINDS[1:]:
        pairs += [(kind, w) for w in recipe.widths if "retained" not in kind or w >= 256]
    return pairs


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, task: Task, asked: Sequence[Question], policy: Any
) -> tuple[list[float], float | None]:
    """Return the scores of some questions, asked at once, and the density of the masks.

    Shorter rows are filled at the end, behind their answers, where nothing looks back from.
    """
    from dynmask.evals.generation import attend

    rows = [np.concatenate([q.prompt, q.answer]) for q in asked]
    ids = torch.full((len(rows), max(map(len, rows))), BOS, dtype=torch.int64)
    for row, known in zip(ids, rows, strict=True):
        row[: len(known)] = torch.from_numpy(known.astype(np.int64))
    with attend(model, policy, measure=policy is not None) as run:
        hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False)[0]
        density = run.summary()["prefill"]["density"] if run is not None else None
    scores = []
    for states, question in zip(hidden, asked, strict=True):
        first = len(question.prompt) - 1
        # One token more than the answer: a number that would go on is another number.
        states = states[first : first + len(question.answer) + 1]
        chosen = model.lm_head(states).float().argmax(-1).tolist()
        right = chosen[:-1] == question.answer.tolist()
        text = tokenizer.decode(chosen, skip_special_tokens=True)
        scores.append(task.score(question.item, text) if right else 0.0)
    return scores, density


def evaluate(
    recipe: Recipe,
    cell: tuple[str, int],
    asked: list[Question],
    pairs: list[tuple[str, int]],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Ask one cell's questions under every policy, as long as there is time; append each row."""
    from dma_common import append_row

    torch.set_num_threads(max(1, int(options["threads"])))
    model, tokenizer = load(options["model"], options["device"])
    task, size = recipe.task(cell[0]), max(1, recipe.evaluated_tokens // cell[1])
    here = machine(model.device)
    here["commit"] = options["commit"] or here["commit"]
    rows: list[dict[str, Any]] = []
    base: list[float] | None = None
    for kind, width in pairs:
        if time.time() > options["until"]:
            break
        scores: list[float] = []
        densities: list[float] = []
        for first, count in in_pieces(len(asked), size):
            some = asked[first : first + count]
            policy = policy_of(kind, width, options["cards"], tuple(len(q.prompt) for q in some))
            found, density = answer(model, tokenizer, task, some, policy)
            scores += found
            densities += [1.0 if density is None else density] * count
        base = scores if kind == "full" else base
        accuracy = sum(scores) / len(scores)
        row = {
            "task": cell[0], "length": cell[1], "policy": kind, "width": width or None,
            "n": len(scores), "accuracy": accuracy,
            "accuracy_interval": proportion_interval(sum(scores), len(scores)),
            "density": sum(densities) / len(densities), "seed": recipe.seed,
        }  # fmt: skip
        if base is not None:
            difference, interval, _ = paired_difference(scores, base, recipe.seed)
            row |= {"difference": difference, "difference_interval": interval}
        rows.append(row | here)
        append_row(Path(options["results"]), rows[-1])
        name = f"{kind} {width}" if width else kind
        print(
            f"{cell[0]:9s} {cell[1]:6,d}  {name:28s} {accuracy:6.1%} of {len(scores)}", flush=True
        )
    return rows


def load(path: str, device: str) -> tuple[Any, Any]:
    """Return the model, in evaluation mode, and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- the outcome


def name_of(row: dict[str, Any]) -> tuple[str, int, str, int]:
    """Return what identifies a row."""
    return row["task"], row["length"], row["policy"], row["width"] or 0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against keys kept: a row of panels for each task, a column for each length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(3.1 * len(lengths), 2.5 * len(tasks) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), len(lengths), squeeze=False, sharey=True)
    widths = sorted({row["width"] for row in rows if row["width"]})
    lines: dict[str, Any] = {}
    for i, task in enumerate(tasks):
        for j, length in enumerate(lengths):
            axes = grid[i][j]
            here = [r for r in rows if (r["task"], r["length"]) == (task, length)]
            axes.set_visible(bool(here))
            for color, kind in enumerate(KINDS):
                found = sorted(
                    (r["width"] or 0, r["accuracy"]) for r in here if r["policy"] == kind
                )
                if not found:
                    continue
                if kind == "full":
                    lines[kind] = axes.axhline(found[0][1], color="0.3", linestyle="--", lw=1)
                    continue
                style = {"color": f"C{color - 1}", "marker": "o", "ms": 3.5, "lw": 1.3}
                lines[kind] = axes.plot(*zip(*found, strict=True), **style)[0]
            axes.set_xscale("log", base=2)
            axes.set_xticks(widths, [str(w) for w in widths], fontsize=7)
            axes.set_ylim(-0.04, 1.04)
            axes.set_title(f"{task}, {length:,} tokens", fontsize=9)
            axes.grid(alpha=0.25)
            if j == 0:
                axes.set_ylabel("share of right answers", fontsize=8)
            if i == len(tasks) - 1:
                axes.set_xlabel("keys kept per kv head and layer", fontsize=8)
    device = ", ".join(sorted({row["device"]["name"] for row in rows}))
    title = f"frozen reference model, n = {min(r['n'] for r in rows)} a point, {device}"
    figure.suptitle(title, fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=7, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def record_goals(rows: list[dict[str, Any]]) -> None:
    """Write the numbers that were asked for into the headline file."""
    from benchmarks.headline import record

    for task, length, width, target in (
        ("needle", 16_384, 256, -0.01), ("needle", 32_768, 512, -0.01),
        ("document", 16_384, 1_024, -0.02),
    ):  # fmt: skip
        kinds = ("retained pair", "retained pair per head")
        found = [r for r in rows if name_of(r) in {(task, length, kind, width) for kind in kinds}]
        for row in found:
            if row.get("difference") is None:
                continue
            record(
                issue=3,
                goal=f"retrofit of the frozen reference model, {task} at {length:,}, w {width}"
                + (", a width for each head" if row["policy"].endswith("head") else ""),
                metric="accuracy minus full attention's",
                value=row["difference"],
                target=target,
                better="higher",
                device=None,
                origin=row,
                command="python recipes/retrofit.py",
                note=f"accuracy {row['accuracy']:.3f}, n {row['n']}",
            )


# --------------------------------------------------------------------------------------- everything


def train(recipe: Recipe, documents: list[Tensor], options: argparse.Namespace) -> dict[str, str]:
    """Train both heads and save their cards; return the cards' folders."""
    import dynmask

    model, _ = load(str(options.model), options.device)
    folders = {"pair": options.out, "value": options.work / "value-card"}
    for head, folder in folders.items():
        checkpoint = options.work / f"{head}.safetensors"
        if not options.resume:
            checkpoint.unlink(missing_ok=True)
        card = dynmask.calibrate(
            model, documents, policy="retained", settings=recipe.settings(head),
            seed=recipe.seed, checkpoint=checkpoint,
        )  # fmt: skip
        card.save_pretrained(folder)
        settings = card.header["settings"]
        print(f"{head}: {settings['trained_steps']} steps, loss {settings['loss']}, {card}",
              flush=True)  # fmt: skip
    return {head: str(folder) for head, folder in folders.items()}


def run(recipe: Recipe, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write documents and questions, train, evaluate; return all rows."""
    global _writer
    from tokenizers import Tokenizer

    from benchmarks.headline import rows_of

    began = time.perf_counter()
    if not options.resume:
        options.results.unlink(missing_ok=True)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    corpus: Corpus = build_corpus(recipe.characters, recipe.characters_per_source, size, tokenizer)
    _writer = Writer(corpus, recipe.facts)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = max(1, (os.cpu_count() or 2) - 2)
    # Forked before the device is touched, so that the workers share the text.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        pieces = [
            pool.submit(write, recipe.seed, length, first, count)
            for length, total in sorted(recipe.documents, reverse=True)
            for first, count in in_pieces(total, max(1, 65_536 // length))
        ]
        asked: dict[tuple[str, int], Future[list[Question]]] = {
            cell: pool.submit(questions, recipe, str(options.model), *cell) for cell in recipe.cells
        }
        documents = [
            torch.from_numpy(ids.astype(np.int32)) for piece in pieces for ids in piece.result()
        ]
        tokens = sum(map(len, documents))
        print(f"{len(documents):,} documents, {tokens / 1e6:.1f}M tokens, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        cards = {"pair": str(options.out), "value": str(options.work / "value-card")}
        if not options.evaluate_only:
            cards = train(recipe, documents, options)
        print(f"trained, {time.perf_counter() - began:.0f} s", flush=True)
        ready = {cell: future.result() for cell, future in asked.items()}
    until = options.started + options.seconds if options.seconds else float("inf")
    shared = {
        "model": str(options.model), "device": options.device, "cards": cards, "until": until,
        "results": str(options.results), "commit": options.commit, "threads": options.threads,
    }  # fmt: skip
    done = {name_of(row) for row in rows_of(options.results)}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = []
        for cell, found in ready.items():
            pairs = [p for p in wanted(recipe) if (*cell, *p) not in done or p[0] == "full"]
            if any(kind != "full" for kind, _ in pairs):
                running.append(pool.submit(evaluate, recipe, cell, found, pairs, shared))
        for future in as_completed(running):
            future.result()
    print(f"evaluated, {time.perf_counter() - began:.0f} s", flush=True)
    return rows_of(options.results)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    recipe = Recipe()
    parser.add_argument("--minutes", type=float, help=f"for the pair head ({recipe.minutes})")
    parser.add_argument(
        "--value-minutes", type=float, help=f"for the linear head ({recipe.value_minutes})"
    )
    parser.add_argument("--seconds", type=float, help="no new evaluation after so many")
    parser.add_argument("--items", type=int, help=f"questions of a cell ({recipe.items})")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "dynmask-reference-retained",
                        help="folder of the pair head's card")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "retrofit",
                        help="folder of checkpoints and of the linear head's card")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "retrofit.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=4, help="cells evaluated at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each job")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    parser.add_argument("--evaluate-only", action="store_true", help="with cards that are there")
    parser.add_argument("--draw-only", action="store_true", help="plot and headline from the rows")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    options = parser.parse_args()
    options.started = time.time()
    given = {"minutes": options.minutes, "value_minutes": options.value_minutes,
             "items": options.items}  # fmt: skip
    recipe = smoke(recipe) if options.smoke else recipe
    recipe = replace(recipe, **{name: value for name, value in given.items() if value})
    from benchmarks.headline import rows_of, write_rows

    rows = rows_of(options.results) if options.draw_only else run(recipe, options)
    newest = {name_of(row): row for row in rows}
    order = wanted(recipe)
    rows = sorted(
        newest.values(),
        key=lambda r: (r["task"], r["length"], KINDS.index(r["policy"]), r["width"] or 0),
    )
    write_rows(options.results, rows)
    draw(rows, options.plot)
    if options.results == RESULTS:
        record_goals(rows)
    missing = len(recipe.cells) * len(order) - len(rows)
    print(f"done: {len(rows)} rows in {options.results}"
          + (f", {missing} left out for want of time" if missing > 0 else ""))  # fmt: skip


if __name__ == "__main__":
    main()
