"""From a frozen model to sparse answers over a long document: what ``make demo`` runs.

Loads the reference model of this repository, calibrates DAM on it, hides facts in about 8,000
tokens of real prose, asks for one of them with full attention and with every mask, and prints one
table. Then it asks the first question once more with caches that hold nothing but the keys that
are still read, and says how large they are and whether the answer stays. Pictures and the report
go to ``demo-output/``. Needs a CPU and a few minutes.

    python examples/demo.py                       # the whole demo
    python examples/demo.py --length 2048 --n 3   # a short one
    python examples/demo.py --task lines          # records instead of prose
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "dynmask-reference"
RETAINED = ROOT / "models" / "dynmask-reference-retained"
WIDTHS = (512, 256)  # keys that a head of the retained policy keeps, on average
PICTURE_TOKENS = 4096  # masks are drawn on a shorter prompt: patterns show, and drawing is quick


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="calibrate, ask, compare and draw")
    parser.add_argument("--model", default=str(MODEL), help="folder of the model")
    parser.add_argument("--retained", default=str(RETAINED), help="folder of its retained card")
    parser.add_argument("--out", default="demo-output", help="folder for pictures and report")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the document")
    parser.add_argument("--n", type=int, default=3, help="questions")
    parser.add_argument("--task", choices=["needle", "lines"], default="needle")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if not (Path(options.model) / "config.json").is_file():
        print(f"demo: no model in {options.model}; pass --model FOLDER", file=sys.stderr)
        return 2
    began = time.perf_counter()
    say("loading libraries and the model")
    import torch
    import transformers

    import dynmask
    from dynmask.cli.calibrate import documents
    from dynmask.evals.engine import Interrupted, evaluate
    from dynmask.evals.gallery import mask_gallery, record_masks
    from dynmask.evals.lines import Lines
    from dynmask.evals.needle import Needle
    from dynmask.evals.plots import draw_report
    from dynmask.evals.text import haystack_lines
    from dynmask.policies import Pooled, Streaming, VerticalSlash

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()
    out = Path(options.out)

    say("calibrating DAM: averaging the model's attention over 8 documents of 512 tokens")
    prose = ["\n".join(haystack_lines())]
    card = dynmask.calibrate(model, documents(tokenizer, prose, 512, 8, options.seed))
    card.save_pretrained(out / "dam-card")

    policies = {
        "full": None,
        "streaming": Streaming(sinks=64, window=1024),
        **retained(model, options.retained),
        "dam": card.policy(),
        "vertical_slash": VerticalSlash(verticals=200, slashes=1000),
        "pooled": Pooled(block=64, top_p=0.95),
    }
    task = Needle(depths=(0.1, 0.3, 0.5, 0.7, 0.9)) if options.task == "needle" else Lines()
    say(f"asking {options.n} questions over {options.length:,} tokens under {len(policies)} masks")
    try:
        report = evaluate(
            model,
            tokenizer,
            policies,
            task,
            n=options.n,
            length=options.length,
            seed=options.seed,
            measure_rows=16,
            timing_items=1,
            timing_tokens=16,
        )
    except Interrupted as interrupt:
        print(interrupt.report.table())
        return 130

    first = report.items[: len(policies)]
    item = task.items(tokenizer, 1, options.length, options.seed)[0]
    end = " ".join(item.prompt[-110:].split())
    print(f"\nthe first document ends: ... {end} [{first[0].answers[0]}]")
    for answer in first:
        verdict = "right" if answer.score == 1 else "wrong"
        print(f"  {answer.policy:<15} {verdict}  {first_line(answer.text)}")
    print("\n" + report.table() + "\n")
    report.save(out)

    say("asking the first question again, each cache holding only the keys that are still read")
    print("\n".join(caches(model, tokenizer, policies, item)) + "\n")

    say("drawing the masks")
    pictures = draw_report(report, out)
    short = task.items(tokenizer, 1, min(PICTURE_TOKENS, options.length), options.seed)[0].prompt
    ids = tokenizer(short, return_tensors="pt")["input_ids"]
    for name, policy in policies.items():
        if policy is None:
            continue
        masks, _ = record_masks(model, ids, policy)
        title = f"{name} on a {task.name} prompt"
        pictures.append(
            mask_gallery(masks, out / f"masks-{name}.png", title=title, caption=report.caption(1))
        )
    for path in pictures:
        print(path)
    say(
        f"done in {time.perf_counter() - began:.0f} s; table, JSON, card and pictures are in {out}/"
    )
    return 0


def retained(model: Any, folder: str) -> dict[str, Any]:
    """The policies of a retained card, or none where it was made for another model."""
    import dynmask

    try:
        card = dynmask.MaskCard.from_pretrained(folder)
        card.check(model)
    except ValueError as error:
        say(f"without the retained policy: {error}")
        return {}
    return {f"retained_{w}": card.policy(width=w, budget="per_head") for w in WIDTHS}


def caches(model: Any, tokenizer: Any, policies: dict[str, Any], item: Any) -> list[str]:
    """What ``generate`` answers, and how large its cache is at the end, full and bounded."""
    from transformers import DynamicCache

    import dynmask
    from dynmask.policies.base import evicts

    inputs = tokenizer(item.prompt, return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]

    def ask(cache: Any) -> str:
        settings = {"max_new_tokens": item.max_new_tokens, "do_sample": False}
        output = model.generate(**inputs, past_key_values=cache, **settings)
        return first_line(tokenizer.decode(output[0, tokens:], skip_special_tokens=True))

    cache = DynamicCache(config=model.config)
    expected = ask(cache)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[union-attr]
    lines = [
        f"the cache at the end of the first document, {tokens:,} tokens:",
        f"  {'full':<15} {whole / 2**20:5.1f} MiB",
    ]
    same: list[tuple[int, str]] = []
    for name, policy in policies.items():
        if not evicts(policy):
            continue
        with dynmask.sparsify(model, policy) as run:
            bounded = dynmask.BoundedCache(run)
            answer = ask(bounded)
        ratio = whole / bounded.nbytes
        times = f"{ratio:.{0 if ratio >= 10 else 1}f} times smaller"
        verdict = "same answer" if answer == expected else f"another answer: {answer}"
        lines.append(f"  {name:<15} {bounded.nbytes / 2**20:5.1f} MiB  {times}, {verdict}")
        if answer == expected:
            same.append((bounded.nbytes, f"{name}: cache {times}, same answer"))
    return [*lines, "", min(same)[1]] if same else lines


def first_line(text: str) -> str:
    """The first line of an answer."""
    return (text.strip().splitlines() or ["(nothing)"])[0]


def say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
