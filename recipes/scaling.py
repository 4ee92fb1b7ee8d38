"""Perplexity of full attention, a sliding window, NSA, MLA and DMA at three sizes.

    python recipes/scaling.py --budget 10             # minutes; cells in order of importance
    python recipes/scaling.py --report                # table, and docs/scaling.png
    python recipes/scaling.py --smoke

Every model is the same decoder with another mixer, at about 10M, 30M and 80M parameters, trained
on the same tokens of the project's text (code, documentation and docstrings of permissively
licensed software) at 4,096 tokens a sequence, w 512, and tested on text that was held out. The
learning rate is chosen per mixer at the smallest size from one grid, and falls with the width. DMA
stands there three times: a quarter of w for the newest keys, three quarters, and a bias that grows
with the score instead of a bounded one.
A cell that was stopped goes on from its checkpoint; one that has a row is not run again.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dma_common import RESULTS, ROOT, Loop, Ranks, adamw, fit, read_rows, run_cells, seed_of

# isort: split
import torch
import torch.nn.functional as F
from dma_decoder import Decoder, Shape, describe
from reference_data import build_corpus
from tokenizers import Tokenizer
from torch import Tensor
from train_reference import load_corpus, save_corpus

from benchmarks.tables import perplexities

TOKENIZER = ROOT / "models" / "dynmask-reference" / "tokenizer.json"
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1)
MIXERS: dict[str, dict[str, Any]] = {
    "full": {"mixer": "full"},
    "dma": {"mixer": "dma"},
    "dma wide window": {"mixer": "dma", "window": 384},
    "dma linear": {"mixer": "dma", "form": "linear", "start": 0.0},
    "window": {"mixer": "window"},
    "mla": {"mixer": "mla"},
    "nsa": {"mixer": "nsa"},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32,
              "intermediate": 96},
    "10M": {"hidden": 256, "layers": 12, "heads": 4, "kv_heads": 2, "intermediate": 768},
    "30M": {"hidden": 512, "layers": 10, "heads": 8, "kv_heads": 2, "intermediate": 1_408},
    "80M": {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 4, "intermediate": 2_048},
}  # fmt: skip
BUCKETS = 8


@dataclass(frozen=True)
class Cell:
    """One training run; ``tokens`` in all, ``step_tokens`` of them a step."""

    size: str
    mixer: str
    seed: int
    rate: float
    tokens: int = 16_000_000
    step_tokens: int = 16_384
    length: int = 4_096
    width: int = 512
    folder: str = ""

    def shape(self) -> Shape:
        """Return the decoder of this cell."""
        sizes = SIZES[self.size]
        settings = {
            "window": 128, "latent": 64 * sizes["kv_heads"], "rope_theta": 5e5,
            **sizes, **MIXERS[self.mixer],
        }  # fmt: skip
        settings["window"] = settings["window"] * self.width // 512
        return Shape(vocabulary=4_096, width=self.width, **settings)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this cell's row from the others'."""
        return (self.size, self.mixer, self.seed, self.rate, self.tokens, self.step_tokens,
                self.length, self.width)  # fmt: skip

    def __str__(self) -> str:
        return f"{self.size} {self.mixer} seed {self.seed} rate {self.rate}"


def text(folder: Path) -> tuple[Tensor, Tensor]:
    """Return (training tokens, held-out tokens) of the corpus in a folder, uint16."""
    corpus = load_corpus(folder)
    parts = [torch.from_numpy(ids.astype("int32")) for ids in (corpus.code, corpus.prose)]
    cut = [len(part) * 19 // 20 for part in parts]  # whole documents but for the one at the cut
    return (
        torch.cat([part[:n] for part, n in zip(parts, cut, strict=True)]),
        torch.cat([part[n:] for part, n in zip(parts, cut, strict=True)]),
    )


def sequences(tokens: Tensor, rows: int, length: int, *seed: object) -> Tensor:
    """Return ``rows`` stretches of ``length`` + 1 tokens from random places."""
    generator = torch.Generator().manual_seed(seed_of(*seed))
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(length + 1)]


def token_losses(model: Decoder, ids: Tensor) -> Tensor:
    """Return each next token's cross-entropy [b, n] of ids [b, n + 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model.logits(model(ids[:, :-1]))
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1)


def train(cell: Cell, device: str, until: float) -> dict[str, Any] | None:
    """Train and test one cell, or go on with it; None when it had to stop before its end."""
    known, held_out = text(Path(cell.folder) / "text")
    cuda = device.startswith("cuda")
    torch.manual_seed(seed_of("scaling", cell.seed))
    model = Decoder(cell.shape(), compiled=cuda).to(device)
    hidden = SIZES[cell.size]["hidden"]
    steps = max(1, cell.tokens // cell.step_tokens)
    loop = Loop(seed=cell.seed, steps=steps, learning_rate=cell.rate * min(1.0, 256 / hidden),
                warmup_steps=max(1, steps // 20), decay_from=0.6)  # fmt: skip
    optimizer = adamw(model, loop, 0.1, (0.9, 0.95))
    rows = max(1, cell.step_tokens // cell.length)

    def feed(step: int, progress_of: Any) -> Tensor:
        if time.time() > until:
            raise KeyboardInterrupt
        return sequences(known, rows, cell.length, cell.seed, step).to(device).long()

    def loss_of(ids: Tensor, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss = token_losses(model, ids).mean()
        return loss + model.retention_loss(), {"text": loss.detach()}

    folder = Path(cell.folder) / "-".join(map(str, cell.key))
    try:
        last = fit(loop, model, optimizer, feed, loss_of, folder, Ranks(device), resume=True,
                   name=str(cell))  # fmt: skip
    except SystemExit:
        return None
    model.eval()
    with torch.no_grad():
        found = [
            token_losses(model, sequences(held_out, rows, cell.length, "test", index)
                         .to(device).long())
            for index in range(max(1, 524_288 // cell.step_tokens if cuda else 2))
        ]  # fmt: skip
    losses = torch.cat(found)
    buckets = losses.mean(0).view(BUCKETS, -1).mean(1)
    perplexity = math.exp(float(losses.mean()))
    return {"perplexity": perplexity, "loss": float(losses.mean()),
            "loss_by_position": [round(float(x), 4) for x in buckets],
            "tested_tokens": losses.numel(), "seconds": last["seconds"], "steps": last["step"],
            "says": f"perplexity {perplexity:.3f}", **describe(model)}  # fmt: skip


def order(options: argparse.Namespace, results: list[dict[str, Any]]) -> list[Cell]:
    """Return the cells that can run now: first the grid of rates, then sizes, then seeds."""
    done = {tuple(row["key"]): row for row in results}

    def cell(size: str, mixer: str, seed: int, rate: float) -> Cell:
        return Cell(size, mixer, seed, rate, options.tokens, options.step_tokens, options.length,
                    options.width, str(options.out))  # fmt: skip

    mixers, small = options.mixers, options.sizes[0]
    grid = [cell(small, m, SEEDS[0], rate) for rate in RATES for m in mixers]
    best: dict[str, float] = {}
    for m in mixers:
        tried = [done.get(c.key, {}) for c in grid if c.mixer == m]
        if all("perplexity" in row for row in tried):
            best[m] = min(tried, key=lambda row: row["perplexity"])["rate"]
    rest = [cell(size, m, seed, best[m])
            for seed in SEEDS for size in options.sizes for m in mixers if m in best]  # fmt: skip
    return [c for c in [*grid, *rest] if c.key not in done]


def table(rows: list[dict[str, Any]]) -> str:
    """Return a markdown table: mean over seeds, and each of them where there are several."""
    found = perplexities(rows)
    lines = ["| size | " + " | ".join(MIXERS) + " |", "|" + "---|" * (1 + len(MIXERS))]
    for size in SIZES:
        cells = []
        for mixer in MIXERS:
            values = found.get((size, mixer), [])
            text = f"{sum(values) / len(values):.3f}" if values else "-"
            if len(values) > 1:
                text += f" ({', '.join(f'{v:.3f}' for v in values)})"
            cells.append(text)
        if any(part != "-" for part in cells):
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
    ran = {row["mixer"] for row in rows if "perplexity" in row}
    errors = {(r["mixer"], r["error"]) for r in rows if "error" in r and r["mixer"] not in ran}
    return "\n".join([*lines, "", *(f"{mixer} did not run: {why}" for mixer, why in errors)])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw perplexity over parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    found = perplexities(rows)
    count = {(row["size"], row["mixer"]): row["parameters"] for row in rows if "parameters" in row}
    for index, mixer in enumerate(MIXERS):
        points = sorted((count[s, m], v) for (s, m), v in found.items() if m == mixer)
        if points:
            sizes, values = [p for p, _ in points], [v for _, v in points]
            middle = [sum(v) / len(v) for v in values]
            ends = ([m - min(v) for m, v in zip(middle, values, strict=True)],
                    [max(v) - m for m, v in zip(middle, values, strict=True)])  # fmt: skip
            axis.errorbar(sizes, middle, ends, label=mixer, color=f"C{index}", marker="o",
                          capsize=2)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("parameters")
    axis.set_ylabel("perplexity of held-out text")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    row = next((row for row in rows if "perplexity" in row), None)
    if row:
        axis.set_title(f"{row['length']:,} tokens, w {row['width']}, {row['tokens'] / 1e6:.0f}M "
                       f"tokens of training, {row['device']['name']}", fontsize=9)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run cells, or report what has been run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--budget", type=float, default=60.0, help="minutes")
    parser.add_argument("--jobs", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--sizes", nargs="+", default=["10M", "30M", "80M"], choices=SIZES)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--tokens", type=int, default=16_000_000, help="of training, in all")
    parser.add_argument("--step-tokens", type=int, default=16_384)
    parser.add_argument("--length", type=int, default=4_096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--characters", type=int, default=80_000_000, help="of text")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "scaling")
    parser.add_argument("--results", type=Path, default=RESULTS / "scaling.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.png")
    parser.add_argument("--report", action="store_true", help="table and plot of what there is")
    parser.add_argument("--resume", action="store_true", help="as always: work is kept")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.tokens, options.step_tokens = ["smoke"], 2_048, 512
        options.length, options.width, options.characters = 256, 64, 900_000
        options.budget = min(options.budget, 0.8)
        if options.results.parent == RESULTS:
            options.results = options.out / "scaling.jsonl"
            options.plot = options.out / "scaling.png"
    if not options.report:
        folder = options.out / "text"
        if not (folder / "text.safetensors").is_file():
            given = Tokenizer.from_file(str(TOKENIZER))
            save_corpus(folder, build_corpus(
                options.characters, options.characters // 10, 4_096, given
            ))  # fmt: skip
        run_cells(lambda rows: order(options, rows), train, "scaling", options.results,
                  options.budget, options.jobs, options.commit)  # fmt: skip
    rows = read_rows(options.results)
    print(table(rows))
    if rows:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
