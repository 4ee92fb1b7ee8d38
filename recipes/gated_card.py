"""The gated card of the reference model: budgets of every map, chosen by their effect.

    python recipes/gated_card.py                                # a minute on a GPU
    python recipes/gated_card.py --max-kl 0.005 0.02 0.08       # a card for each: a Pareto curve
    python recipes/gated_card.py --harder                       # of the harder reference
    python recipes/gated_card.py --scores models/dynmask-reference-retained --decode select
    python recipes/gated_card.py --smoke

Documents are written as for the model's training (``reference_data.py``): facts in text, and
records, with training's words and wordings, which the tasks that the card is tested on do not
share. Each ends with an answer, whose tokens are judged: others ask for what no columns can give
(``--beside``; ``docs/findings.md``). The card goes to ``models/dynmask-reference-gated``;
``recipes/evaluate_gated.py`` asks it. With ``--harder`` it is that of
``models/dynmask-reference-64k``: longer documents, its own families among them
(``harder_data.py``), and no window below 512, for those read their neighbourhood.
Their text is this machine's packages, so another machine makes another card, as good as this one's;
``--text`` names text that ``train_harder.py --prepare`` wrote, as for the shipped cards.
With ``--scores`` maps may evict by the score heads of that card; ``--decode`` judges what that
costs an answer.
Interrupt at any time: what was measured is kept beside the card and read by the next run.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from harder_data import FAMILIES, HarderAuthor  # noqa: E402
from harder_wording import Phrases  # noqa: E402
from reference_data import ANSWER, BOS, NOTHING, Author, build_corpus  # noqa: E402
from torch import Tensor  # noqa: E402
from train_reference import load_corpus  # noqa: E402

MODEL = ROOT / "models" / "dynmask-reference"
LATE = 64  # positions before the answer that they are drawn from
SHORTEST = 512  # tokens of a document that has room for an answer

Write = Callable[[random.Random, int], None]


def writers(author: Author, recall: bool = False) -> list[Write]:
    """Return what writes documents of each kind: facts, records, and the author's families."""
    found: list[Write] = [author.facts, author.asked_at_end]
    if isinstance(author, HarderAuthor) and not recall:
        for family, _ in author.mix:
            found.append(lambda rng, goal, f=family: f(author, Phrases(rng, author.words), goal))
    return found


def documents(
    author: Author, lengths: list[int], count: int, seed: int, beside: int = 0,
    recall: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[int]]:  # fmt: skip
    """Return documents of each length, kinds in turn, judged positions, and how much is answer.

    A document ends before the last token of its last answer. Judged are the tokens of that answer
    and ``beside`` of those before it.
    """
    found: list[Tensor] = []
    judged: list[Tensor] = []
    decoded: list[int] = []
    kinds = writers(author, recall)
    for length in lengths:
        for index in range(count):
            for attempt in itertools.count():  # a text may be full before its first question
                rng = random.Random(f"gated/{seed}/{length}/{index}/{attempt}")
                author.ids, author.spans = [], []
                author.add([BOS], NOTHING)
                kinds[index % len(kinds)](rng, length)
                author.cut(length)
                asked = answers(author.spans)
                if asked:
                    break
            begin, stop = asked[-1]
            found.append(torch.tensor(author.ids[: stop - 1]))
            some = rng.sample(range(max(begin - 1 - LATE, 0), begin - 1), beside)
            judged.append(torch.tensor([*sorted(some), *range(begin - 1, stop - 1)]))
            decoded.append(stop - 1 - begin)
    return found, judged, decoded


def answers(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return from where to where answers go."""
    at, found = 0, []
    for length, kind in spans:
        if kind >= ANSWER:
            found.append((at, at + length))
        at += length
    return found


def author_of(options: argparse.Namespace, tokenizer: Any) -> Author:
    """Return who writes the documents: text that was prepared, or that of this machine."""
    if options.text is not None:
        corpus = load_corpus(options.text)
    else:
        corpus = build_corpus(
            options.characters, options.characters // 6, len(tokenizer), tokenizer.backend_tokenizer
        )
    if options.harder:
        return HarderAuthor(corpus, [(name, 0.1) for name in FAMILIES], 0.25)
    return Author(corpus)


def settings_of(options: argparse.Namespace, allowed: float) -> Any:
    """Return how a card's budgets are chosen; ValueError for what cannot be."""
    from dynmask.budgets import GatedSettings, offered

    every = offered(options.blocks or options.encoder, options.scores is not None, options.slashes)
    most = max(budget.window for budget in every)
    if not 0 <= options.least_window <= most:
        raise ValueError(f"--least-window: expected 0 to {most}, received {options.least_window}")
    budgets = tuple(budget for budget in every if budget.window >= options.least_window)
    if options.smoke:
        kinds = ([b for b in budgets if getattr(b, name)][:1] for name in ("kept", "slashes"))
        budgets = (*itertools.chain(*kinds), *budgets[-2:])
    return GatedSettings(
        max_kl=allowed, density=options.density, least=options.least, pool=options.pool,
        encoder=options.encoder, budgets=budgets, decode=options.decode,
    )  # fmt: skip


def main() -> None:
    """Calibrate, and say what each map got."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the model, its name and -gated")
    parser.add_argument("--harder", action="store_true", help="the harder reference, see above")
    parser.add_argument("--text", type=Path, help="prepared by train_harder.py --prepare")
    parser.add_argument("--max-kl", type=float, nargs="+", help="default: 0.005; 0.02")
    parser.add_argument(
        "--density", type=float, help="of the longest documents, at most; by the least divergence"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 4096 16384; 8192 32768")
    parser.add_argument("--documents", type=int, help="of each length (default: 6; 7)")
    parser.add_argument("--beside", type=int, default=0, help="judged tokens before the answer")
    parser.add_argument("--recall", action="store_true", help="with --harder: no families of its")
    parser.add_argument("--blocks", action="store_true", help="offer blocks too")
    parser.add_argument("--encoder", action="store_true", help="train what scores the blocks")
    parser.add_argument("--slashes", action="store_true", help="offer diagonals beside columns too")
    parser.add_argument("--scores", type=Path, help="retained card: offer maps that evict by it")
    parser.add_argument(
        "--decode", choices=("full", "select", "keep"), default="full",
        help="what answers read, as the card will be used (full: every key)",
    )  # fmt: skip
    parser.add_argument("--pool", type=int, default=1)
    parser.add_argument("--least-window", type=int, help="of a budget (default: 0; 512)")
    parser.add_argument("--least", type=float, default=1e-3)
    parser.add_argument("--characters", type=int, default=12_000_000, help="of text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run through?")
    options = parser.parse_args()
    if not 0 <= options.beside <= LATE:
        parser.error(f"--beside: expected 0 to {LATE} tokens, received {options.beside}")
    if options.recall and not options.harder:
        parser.error("--recall: expected --harder, whose families it leaves out; received it alone")
    if options.documents is not None and options.documents < 1:
        parser.error(f"--documents: expected at least 1, received {options.documents}")
    if options.lengths and min(options.lengths) < SHORTEST:
        parser.error(f"--lengths: expected at least {SHORTEST}, received {min(options.lengths)}")
    if len(set(options.max_kl or ())) < len(options.max_kl or ()):
        parser.error(f"--max-kl: expected different numbers, received {options.max_kl}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynmask.budgets import calibrate_gates
    from dynmask.card import MaskCard

    options.model = options.model or (MODEL.with_name(f"{MODEL.name}-64k") if options.harder
                                      else MODEL)  # fmt: skip
    options.out = options.out or options.model.with_name(f"{options.model.name}-gated")
    options.lengths = options.lengths or ([8_192, 32_768] if options.harder else [4_096, 16_384])
    options.documents = options.documents or (7 if options.harder else 6)
    options.max_kl = options.max_kl or [0.02 if options.harder else 0.005]
    if options.least_window is None:
        options.least_window = 512 if options.harder else 0
    if options.smoke:
        options.lengths, options.characters = [512], 400_000
        options.documents = min(options.documents, 7 if options.harder else 2)
    scores = None if options.scores is None else MaskCard.from_pretrained(options.scores)
    try:
        asked = [settings_of(options, allowed) for allowed in options.max_kl]
    except ValueError as error:
        parser.error(str(error))
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    model = model.to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    author = author_of(options, tokenizer)
    texts, judged, decoded = documents(
        author, options.lengths, options.documents, options.seed, options.beside, options.recall
    )
    for allowed, settings in zip(options.max_kl, asked, strict=True):
        out = options.out
        if len(options.max_kl) > 1:
            out = out.with_name(f"{out.name}-{allowed:g}")
        out.mkdir(parents=True, exist_ok=True)
        journal = out / "trials.json"
        started = time.perf_counter()
        card = calibrate_gates(
            model, texts, settings, seed=options.seed, judged=judged, decoded=decoded,
            scores=scores, checkpoint=journal,
        )  # fmt: skip
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
    none = torch.zeros_like(tensors["window"])
    names = ("window", "columns", "blocks", "kept", "slashes")
    tables = (tensors.get(name, none).tolist() for name in names)
    for layer, numbers in enumerate(zip(*tables, strict=True)):
        maps = [
            "dense" if w == LifetimeMask.INF
            else f"{w}+{b}x{block}" if b
            else f"{w}+{k}s" if k  # kept by score
            else f"{w}+{c}+{d}d" if d  # diagonals
            else f"{w}+{c}"
            for w, c, b, k, d in zip(*numbers, strict=True)
        ]  # fmt: skip
        print(f"  layer {layer}: " + "  ".join(f"{text:>9}" for text in maps))


if __name__ == "__main__":
    main()
