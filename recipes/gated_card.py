"""The gated card of the reference model: budgets of every map, chosen by their effect.

    python recipes/gated_card.py                                # two minutes on a GPU
    python recipes/gated_card.py --max-kl 0.005 0.02 0.08       # a card for each: a Pareto curve
    python recipes/gated_card.py --smoke

Documents are written as for the model's training (``reference_data.py``): facts in text, and
records, with training's words and wordings, which the tasks that the card is tested on do not
share. Each ends where an answer begins; judged are that token and a few spread over the text. The
card goes to ``models/dynmask-reference-gated``; ``recipes/evaluate_reference.py`` asks it.
Interrupt at any time: what was measured is kept beside the card and read by the next run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from reference_data import ANSWER, BOS, NOTHING, Author, build_corpus  # noqa: E402
from torch import Tensor  # noqa: E402

MODEL = ROOT / "models" / "dynmask-reference"
SPREAD = 7  # judged tokens of the text beside the answer's


def documents(
    author: Author, lengths: list[int], count: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return documents of each length, facts and records in turn, and their judged positions."""
    found: list[Tensor] = []
    judged: list[Tensor] = []
    for length in lengths:
        for index in range(count):
            rng = random.Random(f"gated/{seed}/{length}/{index}")
            author.ids, author.spans = [], []
            author.add([BOS], NOTHING)
            (author.facts if index % 2 == 0 else author.asked_at_end)(rng, length)
            author.cut(length)
            end = begins_of_answers(author.spans)[-1]
            found.append(torch.tensor(author.ids[:end]))
            spread = sorted(rng.sample(range(end - 1), SPREAD))
            judged.append(torch.tensor([*spread, end - 1]))
    return found, judged


def begins_of_answers(spans: list[tuple[int, int]]) -> list[int]:
    """Return where answers begin."""
    at, found = 0, []
    for length, kind in spans:
        if kind == ANSWER:
            found.append(at)
        at += length
    return found


def main() -> None:
    """Calibrate, and say what each map got."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "dynmask-reference-gated")
    parser.add_argument("--max-kl", type=float, nargs="+", default=[0.02])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4_096, 16_384])
    parser.add_argument("--documents", type=int, default=4, help="of each length")
    parser.add_argument("--no-blocks", action="store_true", help="offer columns alone")
    parser.add_argument("--pool", type=int, default=1)
    parser.add_argument("--least", type=float, default=1e-3)
    parser.add_argument("--characters", type=int, default=12_000_000, help="of text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynmask.budgets import BUDGETS, COLUMN_BUDGETS, GatedSettings, calibrate_gates

    if options.smoke:
        options.lengths, options.documents, options.characters = [384], 2, 400_000
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    model = model.to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    corpus = build_corpus(
        options.characters, options.characters // 6, len(tokenizer), tokenizer.backend_tokenizer
    )
    texts, judged = documents(Author(corpus), options.lengths, options.documents, options.seed)
    budgets = COLUMN_BUDGETS if options.no_blocks else BUDGETS
    for allowed in options.max_kl:
        settings = GatedSettings(
            max_kl=allowed, least=options.least, pool=options.pool,
            budgets=budgets[-2:] if options.smoke else budgets,
        )  # fmt: skip
        out = options.out
        if len(options.max_kl) > 1:
            out = out.with_name(f"{out.name}-{allowed:g}")
        out.mkdir(parents=True, exist_ok=True)
        journal = out / "trials.json"
        started = time.perf_counter()
        card = calibrate_gates(
            model, texts, settings, seed=options.seed, judged=judged, checkpoint=journal
        )
        card.save_pretrained(out)
        journal.unlink()
        report(card, time.perf_counter() - started, out)


def report(card: Any, seconds: float, out: Path) -> None:
    """Print what each map reads."""
    from dynmask.masks import LifetimeMask

    header, density = card.header, torch.tensor(card.header["density"]).mean()
    print(f"{out}: density {density:.2%} at {card.length:,} tokens, kl {header['kl']:.4f} of "
          f"{header['settings']['allowed']:g}, {header['trials']} trials, "
          f"{seconds:.0f} s")  # fmt: skip
    tensors = card.tensors
    block = header["settings"]["block"]
    tables = (tensors[name].tolist() for name in ("window", "columns", "blocks"))
    for layer, numbers in enumerate(zip(*tables, strict=True)):
        maps = [
            "dense" if w == LifetimeMask.INF else f"{w}+{b}x{block}" if b else f"{w}+{c}"
            for w, c, b in zip(*numbers, strict=True)
        ]
        print(f"  layer {layer}: " + "  ".join(f"{text:>9}" for text in maps))


if __name__ == "__main__":
    main()
