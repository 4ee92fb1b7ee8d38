"""The reference model under every policy: official LongEval files, own lines and needle.

    python recipes/evaluate_reference.py --longeval FOLDER                # on this machine's GPU
    python recipes/evaluate_reference.py --longeval FOLDER --device cpu --n 5

FOLDER holds the official LongEval files ``200_lines.jsonl`` to ``800_lines.jsonl``, which are not
part of this repository. The own tasks are asked with full attention alone. Rows go to
``benchmarks/results/reference.jsonl``, and full attention's accuracies to ``headline.jsonl``
beside it. DAM is calibrated here, on prose that no question is about. Accuracy only: seconds are
measured by ``make demo`` and ``make benchmark``.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

RESULTS = ROOT / "benchmarks" / "results"
LINES = (200, 400, 600, 800)
TASKS = (*(f"longeval {n}" for n in LINES), "lines", "needle")
LENGTH = 32768  # prompts of the own tasks
TARGETS = {"longeval": 0.96, "lines": 0.95, "needle": 0.95}
KEEP = (
    "policy", "group", "n", "accuracy", "accuracy_interval", "difference", "difference_interval",
    "density", "density_decode", "kept_mass", "kept_mass_p5", "kl", "agreement",
)  # fmt: skip


def policies(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The policies that are compared."""
    import dynmask
    from dynmask.cli.texts import documents
    from dynmask.evals.text import haystack_lines
    from dynmask.policies import Gated, Pooled, Streaming, VerticalSlash

    texts = documents(tokenizer, ["\n".join(haystack_lines())], 512, 16, 0)
    published = dynmask.DamSettings(min_support=1)  # tau 0.3, mu 0.8, L 512, every pattern
    card = dynmask.calibrate(model, texts, settings=published, progress=False)
    # every card that recipes/gated_card.py left
    cards = sorted((ROOT / "models").glob("dynmask-reference-gated*"))
    gated = {path.name.replace("dynmask-reference-", ""): dynmask.MaskCard.from_pretrained(path)
             .policy() for path in cards}  # fmt: skip
    return {
        "full": None,
        "dam (as published)": card.policy(),
        "streaming 64+1024": Streaming(64, 1024),
        "vertical_slash 200+1000": VerticalSlash(200, 1000),
        "pooled 64 top_p=0.95": Pooled(64, 0.95),
        "gated (zero-shot)": Gated(),
        **gated,
    }


def run(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One task under every policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynmask.evals.engine import evaluate
    from dynmask.evals.lines import Lines
    from dynmask.evals.longeval import LongEval
    from dynmask.evals.needle import Needle

    torch.set_num_threads(max(1, options.threads))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    kind, _, count = name.partition(" ")
    task: Any = {"lines": Lines, "needle": Needle}.get(kind, lambda: None)()
    if task is None:
        path = Path(options.longeval) / f"{count}_lines.jsonl"
        # An answer is six tokens; a mask that lost it would fill the official hundred with noise.
        task = LongEval(path, max_new_tokens=24)
    chosen: dict[str, Any] = {"full": None}
    if kind == "longeval" and options.policies != ["full"]:
        chosen = policies(model, tokenizer)
        if options.policies:
            chosen = {name: chosen[name] for name in options.policies}
    report = evaluate(
        model,
        tokenizer,
        chosen,
        task,
        n=options.n,
        length=LENGTH,
        measure_rows=16,
        timing=False,
        impl=options.impl,
        progress=options.jobs == 1,
    )
    here = {key: report.header[key] for key in ("date", "commit", "versions", "device", "dtype")}
    here["commit"] = options.commit or here["commit"]
    rows = []
    for row in report.rows:
        data = asdict(row)
        rows.append({"task": name, **{key: data[key] for key in KEEP}, **here})
    return rows


def record_goals(rows: list[dict[str, Any]]) -> None:
    """Full attention's accuracy on every task, beside what was asked for."""
    from benchmarks.headline import record

    for row in rows:
        if row["policy"] != "full":
            continue
        kind = row["task"].split()[0]
        where = row["task"] + " lines" if kind == "longeval" else f"own {kind} at {LENGTH:,} tokens"
        record(
            issue=1,
            goal=f"reference model, full attention, {where}",
            metric="accuracy",
            value=row["accuracy"],
            target=TARGETS[kind],
            better="higher",
            device=None,
            origin=row,
            command="python recipes/evaluate_reference.py --longeval FOLDER",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "dynmask-reference"))
    parser.add_argument("--longeval", required=True, help="folder of the official files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--impl", default="auto", help='"reference", the dense oracle, is quick on a GPU'
    )
    parser.add_argument("--n", type=int, default=50, help="items of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="some of the policies")
    parser.add_argument("--jobs", type=int, default=1, help="tasks evaluated at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each job")
    parser.add_argument("--commit", default=None, help="what is run, where git cannot tell")
    parser.add_argument("--out", default=str(RESULTS / "reference.jsonl"))
    options = parser.parse_args()

    from benchmarks.headline import rows_of, write_rows

    out = Path(options.out)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, name, options): name for name in options.tasks}
        for done in as_completed(waiting):
            rows = done.result()
            new = {(row["task"], row["policy"]) for row in rows}
            kept = [row for row in rows_of(out) if (row["task"], row["policy"]) not in new]
            write_rows(out, sorted([*kept, *rows], key=lambda row: TASKS.index(row["task"])))
            for row in rows:
                print(
                    f"{row['task']:14s} {row['policy']:28s} {row['accuracy']:6.1%} of {row['n']}, "
                    f"density {row['density']:.1%}, mass {row['kept_mass']:.1%}",
                    flush=True,
                )
            if out.parent == RESULTS:
                record_goals(rows)


if __name__ == "__main__":
    main()
