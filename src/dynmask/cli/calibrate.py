"""``dynmask calibrate``: learn a model's masks from its own attention."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import (
    OK,
    add_model_options,
    check_output_folder,
    load,
    positions_of,
    positive,
    say,
)
from .texts import documents, texts

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "learn masks from a model's attention and write them as a small card"
DESCRIPTION = """\
Run a frozen model over some documents, average its attention maps, and keep the
diagonals and columns that it uses (DAM, arXiv 2506.11104). The result is a mask
card: one small file of data for exactly this model, used as --policy dam:FOLDER.

With --policy retained small score heads are trained instead, minutes on a GPU; the
model stays as it is. They tell which keys later queries will look for, so that
--policy retained:FOLDER,width=512 reads and keeps 512 keys at any length.

With --policy gated every attention map (layer x head) gets the smallest budget whose
effect on the model's own predictions is within its share of --max-kl: --policy
gated:FOLDER reads sinks, a window and the columns that the newest queries look at,
diagonals beside them (--slashes), or blocks that each part of the text chooses for
itself (--blocks), or what the score heads of a retained card keep (--scores). While it
runs, a guard looks whether each map keeps as much attention as it did here, and widens
those that do not.
"""
EPILOG = """\
examples:
  dynmask calibrate --model models/dynmask-reference --out my-card
  dynmask calibrate --model Qwen/Qwen3-0.6B --text notes/ --text 'books/*.txt' --out qwen-card
  dynmask calibrate --model MODEL --text data.jsonl --documents 64 --length 1024 --out card
  dynmask calibrate --model MODEL --policy retained --text long/ --minutes 3 --out kept-card
  dynmask calibrate --model MODEL --policy gated --text long/ --max-kl 0.02 --out gated-card
  dynmask calibrate --model MODEL --policy gated --text long/ --encoder --out gated-card
  dynmask calibrate --model MODEL --policy gated --text long/ --slashes --out gated-card
  dynmask calibrate --model MODEL --policy gated --text long/ --scores kept-card --out gated-card

Documents that are shorter than --length tokens are joined with the next ones of the
same source; what is left over is not used.
"""

OPTIONS = {
    "dam": ("length", "tau", "mu", "lam", "amplifier", "min_support"),
    "retained": (
        "minutes", "steps", "lengths", "tokens", "head", "width", "window", "sinks", "checkpoint",
    ),
    "gated": (
        "max_kl", "density", "judged", "decoded", "lengths", "sinks", "checkpoint", "guard",
        "encoder", "rank", "teacher", "steps", "soft", "strength", "blocks", "scores", "decode",
        "slashes",
    ),
}  # fmt: skip
"""Which options say something about which policy."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(command)
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the card goes")
    command.add_argument("--force", action="store_true", help="replace a card that is there")
    data = command.add_argument_group("documents")
    data.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="PATH",
        help="a text or JSON-lines file, a folder of them, or a quoted pattern; may be repeated "
        "(default: Python's own language reference, which needs no file)",
    )
    data.add_argument(
        "--field", default="text", help="the JSON-lines field that holds the text (text)"
    )
    data.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help="how many to use, of each length (32; retained: 2000; gated: 2)",
    )
    command.add_argument(
        "--policy",
        choices=tuple(OPTIONS),
        default="dam",
        help="what the card is for: dam, retained, which trains score heads, or gated, which "
        "chooses budgets (dam)",
    )
    dam = command.add_argument_group("DAM settings (defaults as published)")
    dam.add_argument("--length", type=positive, default=512, help="tokens per document, L (512)")
    dam.add_argument("--tau", type=float, default=0.3, help="threshold of the true mask (0.3)")
    dam.add_argument(
        "--mu", type=float, default=0.8, help="share of a pattern that must be kept (0.8)"
    )
    dam.add_argument(
        "--lam", type=float, default=0.5, help="exponent of the Box-Cox amplifier (0.5)"
    )
    dam.add_argument(
        "--amplifier", default="box_cox", metavar="NAME", help="how weights are amplified (box_cox)"
    )
    dam.add_argument(
        "--min-support",
        type=positive,
        metavar="N",
        help="cells that a pattern needs; 1 is the paper's rule (64)",
    )
    kept = command.add_argument_group("settings of retained, some of them of gated")
    kept.add_argument(
        "--minutes", type=float, default=3.0, help="how long the score heads are trained (3)"
    )
    kept.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="train so many steps, however long it takes (gated, of --encoder: 200)",
    )
    kept.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="TOKENS",
        default=[2048, 4096, 16384],
        help="sequence lengths, as far as model and text go (2048 4096 16384)",
    )
    kept.add_argument("--tokens", type=positive, default=65536, help="tokens of a step (65536)")
    kept.add_argument(
        "--head",
        choices=("pair", "value"),
        default="pair",
        help="scores from key and value by a small network, or linear from values (pair)",
    )
    kept.add_argument("--width", type=positive, default=512, help="keys kept by default (512)")
    kept.add_argument("--window", type=positive, default=128, help="newest keys kept (128)")
    kept.add_argument("--sinks", type=int, default=4, help="first keys kept (4)")
    kept.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="written while working, on Ctrl-C too; the work goes on from it if it is there",
    )
    gated = command.add_argument_group("settings of gated, beside --lengths and --sinks")
    gated.add_argument(
        "--max-kl",
        type=float,
        default=0.02,
        metavar="NATS",
        help="divergence from the full model that is allowed at a judged token (0.02)",
    )
    gated.add_argument(
        "--density",
        type=float,
        metavar="SHARE",
        help="the smallest divergence that keeps the density at or below this, up to --max-kl",
    )
    gated.add_argument(
        "--judged",
        type=positive,
        default=64,
        metavar="N",
        help="tokens of a document that are judged (64)",
    )
    gated.add_argument(
        "--decoded",
        action="store_true",
        help="judge the end of each document alone, as it is decoded after a prompt: what follows "
        "the prompt reads every key. Sparser cards, for generating (judge tokens all over)",
    )
    gated.add_argument(
        "--decode",
        choices=("full", "select", "keep"),
        default="full",
        help="with --decoded: what these tokens read, and decoded ones under the card (full: all)",
    )
    gated.add_argument(
        "--guard",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="attention by which a map may fall short, on a prompt, of the least that it kept "
        "here, before it is widened for that prompt; 1 never widens (0.25)",
    )
    gated.add_argument(
        "--blocks",
        action="store_true",
        help="also offer blocks that each query block chooses: sparser on long inputs, and lost "
        "records where columns did not (docs/findings.md); --encoder implies it",
    )
    gated.add_argument(
        "--slashes",
        action="store_true",
        help="also offer diagonals beside columns: keys at the same distance from every query, for "
        "maps that repeat a pattern",
    )
    gated.add_argument(
        "--scores",
        metavar="CARD",
        help="a retained card of this model: also offer maps that evict by its score heads; their "
        "keys are freed under decode=select and decode=keep",
    )
    gated.add_argument(
        "--encoder",
        action="store_true",
        help="first train a small encoder that tells which blocks a block will look at; it is "
        "kept in layers where it foretells held-out documents better",
    )
    gated.add_argument(
        "--rank",
        type=positive,
        default=16,
        metavar="N",
        help="size of the encoder, which may have 1 %% of the model's parameters (16)",
    )
    gated.add_argument(
        "--teacher",
        choices=("mass", "effect"),
        default="mass",
        help="what the encoder learns: the attention of a block, or what losing it changes (mass)",
    )
    gated.add_argument(
        "--soft",
        action="store_true",
        help="add a bias to the logits of chosen columns, the lower the less they are looked at; "
        "the card says what it changes. No map chooses blocks or diagonals then",
    )
    gated.add_argument(
        "--strength", type=float, default=1.0, help="factor of the bias of --soft (1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and save the card."""
    folder = Path(arguments.out)
    from dynmask.card import FILE_NAME

    if (folder / FILE_NAME).exists() and not arguments.force:
        raise ValueError(
            f"--out: expected a folder without a card, received {folder}, which has one; "
            "choose another folder or pass --force to replace it"
        )
    _refuse_other_options(arguments)
    if arguments.policy != "dam":
        return {"retained": _retained, "gated": _gated}[arguments.policy](arguments, folder)
    from dynmask.calibrate import DamSettings, calibrate

    count = arguments.documents or 32
    given: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("length", "tau", "mu", "lam", "amplifier")
    }
    # A card of short documents cannot ask for more cells than they have.
    given["min_support"] = arguments.min_support or min(DamSettings.min_support, arguments.length)
    settings = DamSettings(**given)
    sources = list(texts(arguments.text, arguments.field))
    check_output_folder(arguments.out)
    model, tokenizer = load(arguments)
    pieces = documents(tokenizer, sources, arguments.length, count, arguments.seed)
    if not pieces:
        raise ValueError(
            f"--text: expected at least one document of {arguments.length} tokens, received none "
            "that long; pass more text or a smaller --length"
        )
    if len(pieces) < count:
        say(f"note: the text gives {len(pieces)} documents of {arguments.length} tokens")
    card = calibrate(
        model, pieces, settings=settings, seed=arguments.seed, progress=not arguments.quiet
    )
    hint = f"use it with --policy dam:{folder}, draw it with dynmask inspect {folder}"
    return _save(card, folder, arguments.json, hint)


def _refuse_other_options(arguments: argparse.Namespace) -> None:
    """Raise ``ValueError`` for an option that the policy would ignore."""
    command = argparse.ArgumentParser()
    add_arguments(command)
    own = OPTIONS[arguments.policy]
    for name in {name for names in OPTIONS.values() for name in names if name not in own}:
        if getattr(arguments, name) != command.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')}: expected with another --policy than "
                f"{arguments.policy}, which it says nothing about; leave it out"
                + (" and pass --lengths" if name == "length" else "")
            )


def _retained(arguments: argparse.Namespace, folder: Path) -> int:
    """Train score heads and save their card."""
    from dynmask.calibrate import calibrate
    from dynmask.retrofit import RetainedSettings

    names = ("steps", "minutes", "tokens", "head", "width", "window", "sinks")
    given = {name: getattr(arguments, name) for name in names}
    wanted = sorted(set(arguments.lengths))
    RetainedSettings(**given, lengths=tuple(wanted))
    model, pieces, lengths = _pieces(arguments, wanted, arguments.documents or 2000)
    card = calibrate(
        model,
        pieces,
        policy="retained",
        settings=RetainedSettings(**given, lengths=tuple(lengths)),
        seed=arguments.seed,
        checkpoint=arguments.checkpoint,
        progress=not arguments.quiet,
    )
    hint = f"use it with --policy retained:{folder},width={arguments.width}"
    return _save(card, folder, arguments.json, hint)


def _gated(arguments: argparse.Namespace, folder: Path) -> int:
    """Choose the budget of every map and save the card."""
    from dynmask.budgets import GatedSettings, calibrate_gates, offered
    from dynmask.card import MaskCard

    _refuse_idle(arguments, "encoder", {"steps": None, "teacher": "mass", "rank": 16})
    _refuse_idle(arguments, "soft", {"strength": 1.0})
    _refuse_idle(arguments, "decoded", {"decode": "full"})
    names = (
        "max_kl", "density", "judged", "sinks", "guard", "encoder", "rank", "teacher", "soft",
        "strength", "decode",
    )  # fmt: skip
    settings = GatedSettings(
        **{name: getattr(arguments, name) for name in names},
        late=1.0 if arguments.decoded else GatedSettings.late,
        steps=arguments.steps or GatedSettings.steps,
        budgets=offered(
            arguments.blocks or arguments.encoder,
            arguments.scores is not None,
            arguments.slashes,
        ),
    )
    wanted = sorted(set(arguments.lengths))
    if arguments.decoded and wanted[0] <= arguments.judged:
        raise ValueError(
            f"--lengths: expected more than the {arguments.judged} judged tokens with --decoded, "
            f"received {wanted[0]}; a document begins with a prompt"
        )
    if arguments.decode != "full" and arguments.judged < 2:
        raise ValueError(
            f"--judged: expected at least 2 with --decode {arguments.decode}, received "
            f"{arguments.judged}; the prompt predicts the first of them"
        )
    scores = None if arguments.scores is None else MaskCard.from_pretrained(arguments.scores)
    model, pieces, _ = _pieces(arguments, wanted, arguments.documents or 2)
    card = calibrate_gates(
        model,
        pieces,
        settings,
        scores=scores,
        decoded=[settings.judged - 1] * len(pieces) if arguments.decoded else None,
        seed=arguments.seed,
        checkpoint=arguments.checkpoint,
        progress=not arguments.quiet,
    )
    if not _chose(card):
        say(
            f"note: every map has the same budget, beside which documents of {card.length:,} "
            "tokens are short: they chose nothing; pass longer --lengths"
        )
    return _save(card, folder, arguments.json, f"use it with --policy gated:{folder}")


def _chose(card: Any) -> bool:
    """Whether some map has another budget than the others, or reads few of the documents' keys."""
    from dynmask.masks import LifetimeMask

    names = ("window", "columns", "blocks", "kept", "slashes")
    tables = {name: card.tensors[name] for name in names if name in card.tensors}
    alike = all(bool((table == table.flatten()[0]).all()) for table in tables.values())
    first = {name: int(table.flatten()[0]) for name, table in tables.items()}
    if not alike or first["window"] == LifetimeMask.INF or first["blocks"]:
        return True
    return 4 * (first["window"] + first["columns"] + first.get("kept", 0)) < card.length


def _refuse_idle(arguments: argparse.Namespace, option: str, others: dict[str, Any]) -> None:
    """Raise ``ValueError`` for options that say nothing without ``option``."""
    for name, default in others.items():
        if not getattr(arguments, option) and getattr(arguments, name) != default:
            raise ValueError(
                f"--{name}: expected with --{option}, received without; add it, or leave it out"
            )


def _pieces(
    arguments: argparse.Namespace, wanted: list[int], count: int
) -> tuple[Any, list[Any], list[int]]:
    """The model, ``count`` documents of each length that text and model allow, and the lengths."""
    from dynmask.calibrate import check_checkpoint

    check_checkpoint(arguments.policy, arguments.checkpoint)
    sources = list(texts(arguments.text, arguments.field))
    check_output_folder(arguments.out)
    model, tokenizer = load(arguments)
    limit = positions_of(model) or wanted[-1]
    pieces: list[Any] = []
    lengths: list[int] = []
    for length in wanted:
        own = documents(tokenizer, sources, length, count, arguments.seed)
        if length <= limit and own:
            lengths.append(length)
            pieces += own
    if not lengths:
        raise ValueError(
            f"--text: expected at least one document of {wanted[0]} tokens and a model of as many "
            f"positions, received none of that length or {limit} positions; pass more text or "
            "smaller --lengths"
        )
    if lengths != wanted:
        say(f"note: text and model go as far as lengths of {', '.join(map(str, lengths))} tokens")
    return model, pieces, lengths


def _save(card: Any, folder: Path, as_json: bool, hint: str) -> int:
    path = card.save_pretrained(folder)
    if as_json:
        print(json.dumps({"card": str(path), **card.header}, indent=1))
        return OK
    from .inspect import describe_card

    print(describe_card(card))
    print(f"\ncard: {path}")
    say(hint)
    return OK
