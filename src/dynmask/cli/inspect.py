"""``dynmask inspect``: show what a card's or a prompt's masks let through."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import (
    OK,
    POLICY_HELP,
    add_model_options,
    add_prompt_options,
    load,
    policy_label,
    positive,
    read_prompt,
    resolve_policy,
    say,
    use_threads,
)

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "describe_card", "run"]

HELP = "describe and draw the masks of a card, or of a policy on a prompt"
DESCRIPTION = """\
Describe a mask card, or run a policy on a prompt, and draw one panel per layer and
head of what the masks let through.
"""
EPILOG = """\
examples:
  dynmask inspect my-card --out masks.png
  dynmask inspect --model MODEL --policy vertical_slash --file long.txt --out masks.png

Without --out nothing is drawn. The suffix of --out decides the format (png, pdf, svg).
"""

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.add_argument("card", nargs="?", metavar="CARD", help="folder or hub name of a card")
    add_model_options(command, required=False)
    add_prompt_options(command)
    command.add_argument("--policy", metavar="POLICY", help=POLICY_HELP)
    command.add_argument("--out", metavar="FILE", help="draw the masks into this file")
    command.add_argument(
        "--length",
        type=positive,
        metavar="TOKENS",
        help="length at which a card is drawn (four times its capture length)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Describe and draw."""
    if (arguments.card is None) == (arguments.model is None):
        raise ValueError(
            "inspect: expected a card, or --model with --policy and a prompt, received "
            f"{'neither' if arguments.card is None else 'both'}; see dynmask inspect --help"
        )
    if arguments.out and Path(arguments.out).suffix.lower() not in FORMATS:
        raise ValueError(
            f"--out: expected a file name ending in {', '.join(FORMATS)}, received "
            f"{arguments.out!r}; add a suffix"
        )
    return _card(arguments) if arguments.card is not None else _prompt(arguments)


def _card(arguments: argparse.Namespace) -> int:
    use_threads(arguments)
    from dynmask.card import MaskCard

    card = MaskCard.from_pretrained(arguments.card)
    if arguments.json:
        print(json.dumps(card.header, indent=1))
    else:
        print(describe_card(card))
    if arguments.out:
        from dynmask.evals.gallery import card_pictures, mask_gallery

        length = arguments.length or 4 * card.length
        model = card.header["model"]
        path = mask_gallery(
            card_pictures(card, length),
            arguments.out,
            title=f"{card.header['policy']} card {Path(arguments.card).name}",
            caption=(
                f"{model['architecture']} {model['fingerprint'][:12]}, "
                f"n = {card.header['data']['documents']} documents, "
                f"seed {card.header['data'].get('seed')}"
            ),
        )
        say(f"written: {path}")
    return OK


def _prompt(arguments: argparse.Namespace) -> int:
    if not arguments.policy:
        raise ValueError("--policy: expected with --model, received none; pass --policy streaming")
    policy = resolve_policy(arguments.policy)
    if policy is None:
        from dynmask.policies import Causal

        policy = Causal()
    prompt = read_prompt(arguments)
    model, tokenizer = load(arguments, [policy])
    from dynmask.evals.gallery import mask_gallery, record_masks
    from dynmask.evals.provenance import environment

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    pictures, summary = record_masks(
        model, ids, policy, measure_rows=32, draw=arguments.out is not None
    )
    found = summary["prefill"]
    if arguments.json:
        result = {"policy": arguments.policy, "tokens": ids.shape[1], **found}
        print(json.dumps(result, indent=1))
    else:
        print(f"policy {arguments.policy} on {ids.shape[1]:,} tokens")
        print(_per_head(found["density_per_head"], found["kept_mass_per_head"]))
    if arguments.out:
        about = environment(model)
        path = mask_gallery(
            pictures,
            arguments.out,
            title=policy_label(arguments.policy),
            caption=(
                f"{about['model']['name']}, n = 1 prompt, {about['device']['name']}, "
                f"{about['dtype']}, seed {arguments.seed}"
            ),
        )
        say(f"written: {path}")
    return OK


def describe_card(card: Any) -> str:
    """Return a card's header and, per head, its density and kept mass, as text."""
    header = card.header
    model, data = header["model"], header["data"]
    lines = [
        f"mask card   {header['policy']}, written by dynmask {header['version']}, "
        f"tensors {card.digest[:12]}",
        f"model       {model['architecture']}, {model['layers']} layers, {model['heads']} heads, "
        f"{model['kv_heads']} kv heads, fingerprint {model['fingerprint'][:12]}",
        f"data        {data['documents']} documents, {data['tokens']:,} tokens",
        f"settings    {card.settings}",
        *_gates(card),
        "",
        f"{'patterns' if header['policy'] == 'dam' else 'masks'} over {card.length} positions:",
        _per_head(card.density, card.kept_mass),
    ]
    return "\n".join(lines)


def _gates(card: Any) -> list[str]:
    """Return what each map of a gated card reads, one line per layer, and what that costs."""
    from dynmask.card_kinds import judged_of, origin_of

    header, tensors = card.header, card.tensors
    if header["policy"] != "gated":
        return []
    block = header["settings"].get("block", 64)
    origin = origin_of(header)
    lines = [
        f"divergence  {header['kl']:.4g} nats, {header['trials']} trials{judged_of(header)}",
        *([f"score heads {origin.replace('`', '')}"] if origin else []),
        "",
        f"gates of heads 0 to {tensors['window'].shape[1] - 1}: window + columns, window + blocks "
        f"x {block}, or window + keys kept by score (s); diagonals (d) beside columns and a "
        "share of the input come on top",
    ]
    for layer, windows in enumerate(tensors["window"].tolist()):
        cells = []
        for head, window in enumerate(windows):
            columns, blocks, kept, slashes = (
                int(tensors[name][layer, head]) if name in tensors else 0
                for name in ("columns", "blocks", "kept", "slashes")
            )
            share = float(tensors["share"][layer, head])
            chosen = f"{blocks}x{block}" if blocks else f"{kept}s" if kept else f"{columns}"
            text = f"{window}+{chosen}" + (f"+{slashes}d" if slashes else "")
            dense = window == 2**31 - 1
            cells.append("dense" if dense else text + (f"+{share:.0%}" if share else ""))
        lines.append(f"{layer:>5}  " + "  ".join(f"{cell:>11}" for cell in cells))
    return lines


def _per_head(density: list[Any], mass: list[Any] | None) -> str:
    """Return one line per layer: density / kept mass of every head, in per cent."""
    heads = max(len(layer or ()) for layer in density)
    lines = [f"{'layer':>5}  density / attention mass kept of heads 0 to {heads - 1}, %"]
    for layer, values in enumerate(density):
        if values is None:
            lines.append(f"{layer:>5}  -")
            continue
        shares = mass[layer] if mass and mass[layer] else [None] * len(values)
        cells = [
            f"{100 * value:5.1f} / {'-' if share is None else format(100 * share, '5.1f')}"
            for value, share in zip(values, shares, strict=True)
        ]
        lines.append(f"{layer:>5}  " + "  ".join(cells))
    every = [value for layer in density for value in layer or ()]
    kept = [value for layer in mass or () for value in layer or ()]
    total = f" mean  {100 * sum(every) / len(every):5.1f}"
    lines.append(total + (f" / {100 * sum(kept) / len(kept):5.1f}" if kept else ""))
    return "\n".join(lines)
