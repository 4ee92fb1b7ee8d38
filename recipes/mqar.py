"""Multi-query associative recall for full attention, a sliding window, NSA, MLA and DMA.

    python recipes/mqar.py --budget 8                 # minutes; cells in order of importance
    python recipes/mqar.py --report                   # tables, docs/mqar.png and the goals
    python recipes/mqar.py --tries                    # what else might teach DMA's scores
    python recipes/mqar.py --smoke

The task is zoology's (arXiv 2312.04927): ``k1 v1 ... kD vD``, then a region where every key stands
once more and its value is the answer; gaps follow a g^(a - 1) with a = 0.01, all else is random
tokens. Every model is the same decoder of two layers with another mixer, of equal width, trained
on equal data for equal steps. Before each mixer stands the same short convolution over the two
tokens before: without it, finding the token before takes most of the training (on a GPU full
attention answered 17 % of the first case after 2,000 steps; with it, on a CPU, 98 % of 16 pairs
in 64 tokens, vocabulary 2,048, after 200). The learning rate is chosen from one grid, at the first
case with the first seed, per mixer and width. A run that ends is taken up again by the same
command: cells that have a row are not run again. Cells are small: while NVIDIA's multi-process
service runs (``nvidia-cuda-mps-control -d``), those of ``--jobs`` share a GPU and take no turns.

The cases say what a cache of w keys can hold. ``scarce``: w is half of the values, so storing
everything is impossible and a choice that does not know the question must lose answers;
``published``: as many keys as values (512 pairs, w 512), where keeping all values suffices;
``ample``: room for keys and values. Full attention, NSA and MLA keep something of
every token and are no peers of equal memory. ``mla, equal cache`` is one: its latent and rotary
key take what w keys and values take at the case's length. ``nsa`` reads w keys, half of them in
chosen blocks; its kernels always take the first block and the last two, so with w 32 there is no
choice left. ``nsa, w chosen`` has w keys in its blocks, 128 at least, the window beside them, and
heads as wide as the others'. NSA and MLA are flash-linear-attention's layers
(``pip install flash-linear-attention``); where they do not run, their row says why.

``--tries`` trains DMA anew in four cells, each time with one thing changed, at the rate that the
grid found for it: rows go to ``mqar_tries.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dma_common import (
    RESULTS,
    ROOT,
    Captured,
    Loop,
    adamw,
    read_rows,
    run_cells,
    seed_of,
    set_rate,
)

# isort: split
import torch
import torch.nn.functional as F
from dma_decoder import Decoder, Shape, describe
from torch import Tensor, nn

from benchmarks.headline import record
from benchmarks.tables import recall, recall_tries, recalled
from dynmask.masks import LifetimeMask
from dynmask.nn import DynamicMaskAttention, Retention

VOCABULARY = 8_192
POWER = 0.01
RATES = (1e-2, 3e-3)
SEEDS = (0, 1, 2)
WIDTHS = (128, 64, 256)
TESTS = 8  # batches

MIXERS: dict[str, dict[str, Any]] = {
    "full": {"mixer": "full"},
    "dma": {"mixer": "dma"},
    "window": {"mixer": "window"},
    "mla": {"mixer": "mla"},
    "dma as published": {"mixer": "dma", "form": "exp", "start": 0.1, "window": 0,
                         "retention_weight": 0.0},
    "nsa": {"mixer": "nsa"},
    "nsa, w chosen": {"mixer": "nsa"},
    "mla, equal cache": {"mixer": "mla"},
}  # fmt: skip

MIXER_NAMES = {
    "window": "a sliding window", "nsa": "NSA", "nsa, w chosen": "NSA that chooses w keys",
    "mla": "MLA", "mla, equal cache": "MLA of equal cache",
}  # fmt: skip


@dataclass(frozen=True)
class Try:
    """What is changed about DMA's training.

    Attributes:
        settings: of the decoder.
        score_rate: learning rate of A and dt_proj, in that of the others.
        noise: Gumbel noise on the scores that choose in training, in their spread.
        narrowing: every key is read in the shorter stages; at the full length the width halves
            step by step, from all keys down to w at 85 % of the steps.
        steps: in those of the others.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    score_rate: float = 1.0
    noise: float = 0.0
    narrowing: bool = False
    steps: int = 1


TRIES = {
    "loss x 10": Try({"retention_weight": 0.5}),
    "1,024 rows judge": Try({"retention_rows": 1_024}),
    "one sink": Try({"sinks": 1}),
    "exp": Try({"form": "exp", "start": 0.1}),
    "scores learn 10 x as fast": Try(score_rate=10.0),
    "scores learn 0.1 x as fast": Try(score_rate=0.1),
    "exploration": Try(noise=1.0),
    "width from N down": Try(narrowing=True),
    "eight tokens before": Try({"shifts": 8}),
    "steps x 3": Try(steps=3),
}
TRIED = (("scarce", 512, 128), ("scarce", 2_048, 64), ("scarce", 2_048, 128),
         ("published", 8_192, 64))  # fmt: skip
"""Case, length and model width of the cells that tries are made in."""


@dataclass(frozen=True)
class Case:
    """A task: its length, its pairs, and the keys that a query reads at most."""

    name: str
    length: int
    pairs: int
    width: int

    def __post_init__(self) -> None:
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"pairs: expected a quarter of {self.length} tokens at most, received "
                f"{self.pairs}; the query region must hold every key and its value"
            )


CASES = (
    Case("scarce", 512, 64, 32),
    Case("published", 8_192, 512, 512),
    Case("scarce", 2_048, 256, 128),
    Case("scarce", 8_192, 512, 256),
    Case("ample", 2_048, 64, 136),
    Case("published", 4_096, 512, 512),
)


@dataclass(frozen=True)
class Cell:
    """One training run."""

    case: Case
    mixer: str
    hidden: int
    seed: int
    rate: float
    steps: int = 1_500
    tokens: int = 16_384  # of a step
    trial: str = ""

    @property
    def tried(self) -> Try:
        """What is changed."""
        return TRIES[self.trial] if self.trial else Try()

    def shape(self) -> Shape:
        """Return the decoder of this cell."""
        case, heads, dim = self.case, max(1, self.hidden // 64), min(64, self.hidden)
        settings = {
            "window": 4, "sinks": 0, "retention_rows": 128, "retention_after": 8,
            "latent": self.hidden // 2, "shifts": 2, **MIXERS[self.mixer], **self.tried.settings,
        }  # fmt: skip
        if self.mixer == "nsa, w chosen":
            settings["selected"] = max(128, case.width)  # eight blocks, three of them not chosen
        if self.mixer == "mla, equal cache":  # numbers a token, as of w keys and values
            numbers = 2 * case.width * heads * dim // case.length
            rotary = max(2, numbers // 4)
            settings |= {"rotary": rotary, "latent": max(1, numbers - rotary)}
        return Shape(
            vocabulary=VOCABULARY, hidden=self.hidden, layers=2, heads=heads, kv_heads=heads,
            head_dim=dim, intermediate=2 * self.hidden, width=case.width, **settings,
        )  # fmt: skip

    def stage(self, progress: float) -> tuple[int, int]:
        """Return (length, pairs) of this point: short first, the case itself from 65 % on.

        Before that as many pairs as fit: with few candidates a model learns to guess.
        """
        lengths = [self.case.length]
        while lengths[-1] > 64:
            lengths.append(lengths[-1] // 2)
        lengths.reverse()
        at = len(lengths) - 1
        if progress < 0.4:
            at = 0
        elif progress < 0.65:
            at = min(at, 1 + int((progress - 0.4) / 0.25 * (at - 1)))
        length = lengths[at]
        pairs = self.case.pairs
        return length, pairs if length == self.case.length else min(pairs, length // 4)

    def width(self, progress: float) -> int:
        """Return the keys that a query of DMA reads at this point."""
        length, width = self.stage(progress)[0], self.case.width
        if not self.tried.narrowing or progress >= 0.85:
            return width
        if length < self.case.length:
            return max(length, width)
        halvings = math.log2(length / width) * (0.85 - progress) / 0.2
        return min(length, width * 2 ** math.ceil(halvings))

    def __str__(self) -> str:
        case = self.case
        return (f"{case.name} {case.length} {self.mixer} width {self.hidden} seed {self.seed} "
                f"rate {self.rate}" + (f", {self.trial}" if self.trial else ""))  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this cell's row from the others'."""
        return (*asdict(self.case).values(), self.mixer, self.hidden, self.seed, self.rate,
                self.steps, self.tokens, *([self.trial] if self.trial else []))  # fmt: skip


@dataclass(frozen=True)
class Exploring(Retention):
    """Keeps keys whose score is high, or might be: noise of ``noise`` spreads is added."""

    noise: float = 0.0

    def mask(self, scores: Tensor, queries: int | None = None) -> LifetimeMask:
        """The mask of noisy scores [b, g, k]."""
        gumbel = -torch.empty_like(scores).exponential_().log()
        return super().mask(scores + self.noise * scores.std() * gumbel, queries)


def mqar(
    rows: int, length: int, pairs: int, generator: torch.Generator, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids [rows, length], where [rows, pairs], answers [rows, pairs]).

    Token ``where`` is a key for the second time; after it the model is to say ``answers``. Keys of
    a row are distinct numbers of 1 to V/2 - 1, values distinct ones of V/2 to V - 1.

    Args:
        rows, length, pairs: sizes; the pairs take a quarter of the length at most.
        generator: of the device where the tensors are made.
        vocabulary: V.
    """
    device, half = generator.device, vocabulary // 2

    def distinct(count: int) -> Tensor:
        """``pairs`` different numbers below ``count``, in random order."""
        noise = torch.rand(rows, count, generator=generator, device=device)
        return noise.topk(pairs, dim=-1).indices

    keys, values = distinct(half - 1) + 1, distinct(half) + half
    space = (length - 2 * pairs) // 2
    weight = POWER * torch.arange(1, space + 1, device=device).double() ** (POWER - 1)
    # the largest of log weight + Gumbel noise: draws without replacement, in their order
    noise = torch.empty(rows, space, device=device, dtype=torch.float64)
    noise = noise.exponential_(generator=generator)
    gaps = (weight.log() - noise.log()).topk(pairs, dim=-1).indices
    ids = torch.randint(vocabulary, (rows, length), generator=generator, device=device)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    where = 2 * pairs + 2 * gaps
    ids.scatter_(1, where, keys)
    return ids, where, values


def answers_loss(model: Decoder, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (mean loss of the answers, share of right ones)."""
    ids, where, values = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        hidden = model(ids)
        asked = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.logits(asked.flatten(0, 1))
    right = (logits.argmax(-1) == values.flatten()).float().mean()
    return F.cross_entropy(logits, values.flatten()), right


def keep(model: nn.Module, width: int, noise: float = 0.0) -> None:
    """Let DMA layers keep ``width`` keys, and explore while ``noise`` is not 0."""
    for layer in model.modules():
        if isinstance(layer, DynamicMaskAttention):
            old = layer.retention
            settings = {"width": width, "window": old.window, "sinks": old.sinks}
            layer.retention = Exploring(**settings, noise=noise) if noise else Retention(**settings)


def train(cell: Cell, device: str, until: float) -> dict[str, Any] | None:
    """Train and test one cell; None when the time was over before its end."""
    torch.manual_seed(seed_of("mqar", cell.seed))
    model = Decoder(cell.shape()).to(device)
    loop = Loop(seed=cell.seed, steps=cell.steps, learning_rate=cell.rate,
                warmup_steps=max(1, cell.steps // 20), decay_from=0.7)  # fmt: skip
    tried = cell.tried
    scaled = None if tried.score_rate == 1 else {".score.": tried.score_rate}
    optimizer = adamw(model, loop, 0.1, (0.9, 0.98), scaled)
    generator = torch.Generator(device)
    if device.startswith("cuda"):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(cell.rate, device=device)

    def step_on(*batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss, right = answers_loss(model, batch)
        (loss + model.retention_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return right.detach()

    run, width = Captured(step_on), 0
    started = time.monotonic()
    curve: list[tuple[int, int, Tensor]] = []
    for step in range(cell.steps):
        progress = step / cell.steps
        length, pairs = cell.stage(progress)
        generator.manual_seed(seed_of("mqar", cell.seed, step))
        torch.manual_seed(seed_of("rows", cell.seed, step))
        set_rate(optimizer, loop.rate(step, progress))
        if width != cell.width(progress):  # what was captured reads another number of keys
            run, width = Captured(step_on), cell.width(progress)
            keep(model, width, tried.noise)
        right = run(*mqar(max(1, cell.tokens // length), length, pairs, generator))
        if step % max(1, cell.steps // 20) == 0:
            curve.append((step, length, right))
            if time.time() > until:
                return None
    model.eval()
    keep(model, cell.case.width)
    case, right, asked = cell.case, [], 0
    with torch.no_grad():
        for index in range(TESTS):
            generator.manual_seed(seed_of("test", cell.seed, index))
            rows = max(1, cell.tokens // case.length)
            right.append(answers_loss(model, mqar(rows, case.length, case.pairs, generator))[1])
            asked += rows * case.pairs
    accuracy = float(torch.stack(right).mean())
    return {"accuracy": accuracy, "questions": asked, "says": f"{accuracy:.1%}",
            "curve": [(step, length, round(float(r), 4)) for step, length, r in curve],
            "seconds": round(time.monotonic() - started, 1), "eager": run.why_not,
            **describe(model)}  # fmt: skip


# --------------------------------------------------------------------------------------- the cells


def order(
    steps: int,
    tokens: int,
    results: list[dict[str, Any]],
    hidden: list[int],
    mixers: list[str],
) -> list[Cell]:
    """Return the cells that can run now, the important first.

    First the grid of learning rates, at the first case; the other cells take the best of it.
    """
    done = {tuple(row["key"]): row for row in results}
    grid = [Cell(CASES[0], m, h, SEEDS[0], rate, steps, tokens)
            for h in hidden for m in mixers for rate in RATES]  # fmt: skip
    open_grid = [cell for cell in grid if cell.key not in done]
    best: dict[tuple[str, int], float] = {}
    for m, h in itertools.product(mixers, hidden):
        tried = [done[c.key] for c in grid if (c.mixer, c.hidden) == (m, h) and c.key in done]
        if len(tried) == len(RATES) and all("accuracy" in row for row in tried):
            best[m, h] = max(tried, key=lambda row: row["accuracy"])["rate"]
    rest = [
        Cell(case, m, h, seed, best[m, h], steps, tokens)
        for seed in SEEDS for h in hidden for case in CASES for m in mixers if (m, h) in best
    ]  # fmt: skip
    return [*open_grid, *(cell for cell in rest if cell.key not in done)]


def tries(steps: int, tokens: int, results: list[dict[str, Any]]) -> list[Cell]:
    """Return the cells of all tries, at the rates of DMA's rows; a cell without rows has the first.

    The first cell of every try comes before the second of any.
    """
    cases = {(case.name, case.length): case for case in CASES}
    cells = []
    for (*case, hidden), trial in itertools.product(TRIED, TRIES):
        found = [row for row in results if row.get("accuracy") and row["seed"] == SEEDS[0]
                 and (row["steps"], row["tokens"]) == (steps, tokens)
                 and (row["mixer"], row["hidden"]) == ("dma", hidden)
                 and tuple(row["case"].values()) == tuple(asdict(CASES[0]).values())]  # fmt: skip
        best = max(found, key=lambda row: row["accuracy"], default={"rate": RATES[0]})
        cell = Cell(cases[*case], "dma", hidden, SEEDS[0], best["rate"], steps, tokens, trial)
        cells.append(replace(cell, steps=steps * cell.tried.steps))
    return cells


# -------------------------------------------------------------------------------------- the report


def errors(rows: list[dict[str, Any]]) -> list[str]:
    """Say why mixers did not run."""
    ran = {row["mixer"] for row in rows if "accuracy" in row}
    found = {(r["mixer"], r["error"]) for r in rows if "error" in r and r["mixer"] not in ran}
    return [f"{mixer} did not run: {why}" for mixer, why in sorted(found)]


def record_goals(rows: list[dict[str, Any]]) -> None:
    """Write to headline.jsonl how DMA stands to the others in its worst cell."""
    found = {name: sum(seeds) / len(seeds) for name, seeds in recalled(rows).items()}
    cells = {(*name[:4], name[5]) for name in found if name[4] == "dma"}

    def of(cell: tuple[Any, ...], mixer: str) -> float | None:
        return found.get((*cell[:4], mixer, cell[4]))

    notes = {
        "window": "",
        "nsa": "reads w keys, keeps every one",
        "nsa, w chosen": "keeps every key",
        "mla": "keeps a latent of every token",
        "mla, equal cache": "its latent takes what w keys and values take",
    }
    for mixer, note in notes.items():
        ahead = {
            cell: found[*cell[:4], "dma", cell[4]] - other
            for cell in cells
            if (other := of(cell, mixer)) is not None
        }
        if not ahead:
            continue
        worst = min(ahead, key=ahead.__getitem__)
        name, length, pairs, width, hidden = worst
        record(
            issue=3, goal=f"MQAR, DMA minus {MIXER_NAMES[mixer]}, the worst of their cells",
            metric="accuracy", value=round(ahead[worst], 4), target=0.0, better="higher",
            device=None, origin=next(r for r in rows if r["mixer"] == mixer and "accuracy" in r),
            command="python recipes/mqar.py --report",
            note=f"{name}, {length:,} tokens, {pairs} pairs, w {width}, model width {hidden}; "
                 f"{sum(x > 0 for x in ahead.values())} of {len(ahead)} cells ahead"
                 + (f"; {note}" if note else ""),
        )  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over model width, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = recalled(rows)
    cases = [case for case in CASES if any(n[:4] == tuple(asdict(case).values()) for n in found)]
    columns = min(3, len(cases)) or 1
    lines = math.ceil(len(cases) / columns) or 1
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharey=True
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        for index, mixer in enumerate(MIXERS):
            points = {h: found.get((*asdict(case).values(), mixer, h)) for h in sorted(WIDTHS)}
            points = {h: v for h, v in points.items() if v}
            if points:
                middle = [100 * sum(v) / len(v) for v in points.values()]
                down = [m - 100 * min(v) for m, v in zip(middle, points.values(), strict=True)]
                up = [100 * max(v) - m for m, v in zip(middle, points.values(), strict=True)]
                axis.errorbar(list(points), middle, (down, up), label=mixer, color=f"C{index}",
                              marker="o", capsize=2)  # fmt: skip
        axis.set_title(f"{case.name}: {case.length:,} tokens, {case.pairs} pairs, w {case.width}",
                       fontsize=9)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(WIDTHS), [str(h) for h in sorted(WIDTHS)])
        axis.set_xlabel("model width")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers, %")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    labelled = axes.flat[0].get_legend_handles_labels()
    figure.legend(*labelled, loc="lower center", ncols=len(MIXERS), fontsize=7)
    device = ", ".join(sorted({row["device"]["name"] for row in rows if "device" in row}))
    figure.suptitle(f"MQAR, two layers, mean and range over seeds, {device}", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run cells, or report what has been run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--budget", type=float, default=60.0, help="minutes")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a step")
    parser.add_argument("--hidden", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--results", "--out", type=Path, help="mqar.jsonl, mqar_tries.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "mqar.png")
    parser.add_argument("--tries", action="store_true", help="of DMA alone, one thing changed")
    parser.add_argument("--report", action="store_true", help="table and plot of what there is")
    parser.add_argument("--resume", action="store_true", help="as always: rows are kept")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    options = parser.parse_args()
    for option in ("hidden", "mixers", "plot") if options.tries else ():
        if getattr(options, option) != parser.get_default(option):
            parser.error(f"--{option}: expected none with --tries, whose cells are its own and "
                         "are not drawn; leave it out")  # fmt: skip
    name = "mqar_tries.jsonl" if options.tries else "mqar.jsonl"
    options.results = options.results or RESULTS / name
    if options.smoke:
        options.steps, options.tokens, options.hidden, options.jobs = 3, 512, [64], 1
        options.budget = min(options.budget, 0.7)
        if options.results.parent == RESULTS:
            folder = Path(tempfile.mkdtemp(prefix="mqar-"))
            options.results, options.plot = folder / name, folder / "mqar.png"
            print(f"rows and plot go to {folder}", flush=True)
    if options.tries:
        base = [] if options.smoke else read_rows(RESULTS / "mqar.jsonl")
        if not options.report:
            cells = tries(options.steps, options.tokens, base)
            run_cells(
                lambda rows: [c for c in cells if list(c.key) not in [r["key"] for r in rows]],
                train, "mqar", options.results, options.budget, options.jobs, options.commit,
            )  # fmt: skip
        print(recall_tries(read_rows(options.results), base))
        return
    if not options.report:
        run_cells(
            lambda rows: order(options.steps, options.tokens, rows, options.hidden, options.mixers),
            train, "mqar", options.results, options.budget, options.jobs, options.commit,
        )  # fmt: skip
    rows = read_rows(options.results)
    print("\n".join([recall(rows), *errors(rows)]))
    if rows:
        plot(rows, options.plot)
    if options.results.parent == RESULTS:
        record_goals(rows)


if __name__ == "__main__":
    main()
