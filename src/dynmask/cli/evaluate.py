"""``dynmask evaluate``: quality and cost of several policies, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmask.evals.ruler import TASKS as RULER_TASKS

from .common import (
    INTERRUPTED,
    OK,
    POLICY_HELP,
    add_model_options,
    check_output_folder,
    load,
    policy_label,
    positive,
    read_text,
    resolve_policy,
    say,
)

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "compare policies on a task: right answers, density, mass kept, speed, memory"
DESCRIPTION = """\
Ask a model the same questions under several policies and print one table: right
answers, density (kept pairs / causal pairs), attention mass kept, prefill seconds,
milliseconds a decoded token, the cache and peak memory. With --out the report is written as
JSON with versions and device, and as pictures; an interrupted run resumes there.

tasks:
  needle      facts hidden in real prose, one asked, over a grid of depths
  lines       a long list of records, one asked: every record is a distractor
  ruler       13 RULER-style tasks, --n items of each; ruler_vt, ruler_cwe, ...: only one
  longeval    official LongEval files (pass them with --longeval-file)
  perplexity  how well long text is predicted, by position (own text with --text)
"""
EPILOG = """\
examples:
  dynmask evaluate --model MODEL --task needle --length 4096 8192 --n 22 --out results \\
      --policy full --policy streaming --policy dam:my-card
  dynmask evaluate --model MODEL --task longeval --longeval-file 200_lines.jsonl --n 50
  dynmask evaluate --model MODEL --task perplexity --text book.txt --length 16384
  dynmask evaluate --model MODEL --task needle --length 16384 --policy full \
      --policy retained:my-card,width=256 --policy retained:my-card,width=1024
"""

RULER = ("ruler", *(f"ruler_{name}" for name in RULER_TASKS))
TASKS = ("lines", "needle", *RULER, "longeval", "perplexity")
DEFAULT_LENGTH = 8192


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(command)
    command.add_argument(
        "--task", required=True, choices=TASKS, metavar="TASK", help="what is asked, see above"
    )
    command.add_argument(
        "--policy",
        action="append",
        metavar="POLICY",
        help=f"{POLICY_HELP}; may be repeated (default: full and streaming)",
    )
    command.add_argument(
        "--length",
        type=positive,
        nargs="+",
        metavar="TOKENS",
        help=f"prompt length, or several ({DEFAULT_LENGTH}; longeval: as the file has them)",
    )
    command.add_argument(
        "--n", type=positive, metavar="N", help="items per length or file (20; perplexity: 4)"
    )
    command.add_argument(
        "--longeval-file", nargs="+", default=[], metavar="FILE", help="official LongEval files"
    )
    command.add_argument("--text", metavar="FILE", help="the text that perplexity reads")
    command.add_argument(
        "--out", metavar="FOLDER", help="write table, JSON, pictures and the journal here"
    )
    command.add_argument(
        "--impl", default="auto", help="attention implementation: auto, cpu, reference, ... (auto)"
    )
    measures = command.add_argument_group("measuring")
    measures.add_argument(
        "--measure-rows",
        type=int,
        default=32,
        metavar="N",
        help="query rows per layer whose kept attention mass is measured; 0: none (32)",
    )
    measures.add_argument("--no-timing", action="store_true", help="skip the timed pass")
    measures.add_argument(
        "--timing-items", type=positive, default=2, metavar="N", help="items that are timed (2)"
    )
    measures.add_argument(
        "--timing-tokens",
        type=positive,
        default=16,
        metavar="N",
        help="tokens decoded when timing, never fewer (16)",
    )
    measures.add_argument("--no-plots", action="store_true", help="draw no pictures")
    measures.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take finished items of an earlier run with the same settings from --out",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, write."""
    specs = list(dict.fromkeys(arguments.policy or ["full", "streaming"]))
    policies = {policy_label(spec): resolve_policy(spec) for spec in specs}
    if len(policies) < len(specs):
        raise ValueError(
            f"--policy: expected cards in folders of different names, received {specs}; rename one"
        )
    ask = _task(arguments)
    if arguments.out and not arguments.no_plots:
        from dynmask.evals.plots import figure_of

        figure_of()  # a missing matplotlib is told now, not after the run
    if arguments.out:
        check_output_folder(arguments.out)
    model, tokenizer = load(arguments)
    from dynmask.evals.engine import Interrupted

    _warn_of_length(model, arguments)
    code = OK
    try:
        report = ask(model, tokenizer, policies)
    except Interrupted as interrupt:
        report, code = interrupt.report, INTERRUPTED
        say("\nstopped: reporting what was finished")
    print(report.to_json() if arguments.json else report.table())
    sys.stdout.flush()
    if arguments.out and report.rows:
        _write(report, arguments)
    return code


def _write(report: Any, arguments: argparse.Namespace) -> None:
    path = report.save(arguments.out)
    written = [path, path.with_suffix(".txt")]
    if not arguments.no_plots:
        from dynmask.evals.plots import draw_report

        written += draw_report(report, arguments.out)
    say("written: " + " ".join(str(file) for file in written))


def _task(arguments: argparse.Namespace) -> Any:
    """Return what runs the task; its options are checked before a model is loaded."""
    if arguments.longeval_file and arguments.task != "longeval":
        raise ValueError(
            f"--longeval-file: expected with --task longeval, received with --task "
            f"{arguments.task}; leave it out"
        )
    if arguments.text and arguments.task != "perplexity":
        raise ValueError(
            f"--text: expected with --task perplexity, received with --task {arguments.task}; "
            "leave it out"
        )
    if arguments.task == "perplexity":
        return _perplexity(arguments)
    from dynmask.evals.engine import evaluate

    task, lengths = _questions(arguments)
    journal = Path(arguments.out) / f"{arguments.task}.journal.jsonl" if arguments.out else None

    def ask(model: Any, tokenizer: Any, policies: dict[str, Any]) -> Any:
        return evaluate(
            model,
            tokenizer,
            policies,
            task,
            n=arguments.n or 20,
            length=lengths,
            seed=arguments.seed,
            measure_rows=arguments.measure_rows,
            timing=not arguments.no_timing,
            timing_items=arguments.timing_items,
            timing_tokens=arguments.timing_tokens,
            impl=arguments.impl,
            journal=journal,
            resume=arguments.resume,
            progress=not arguments.quiet,
        )

    return ask


def _questions(arguments: argparse.Namespace) -> tuple[Any, list[int]]:
    """Return the task and its lengths."""
    lengths = arguments.length or [DEFAULT_LENGTH]
    if arguments.task == "lines":
        from dynmask.evals.lines import Lines

        return Lines(), lengths
    if arguments.task == "needle":
        from dynmask.evals.needle import Needle

        return Needle(), lengths
    if arguments.task in RULER:
        from dynmask.evals.ruler import Ruler

        only = arguments.task.removeprefix("ruler").removeprefix("_")
        return Ruler((only,)) if only else Ruler(), lengths
    from dynmask.evals.longeval import LongEval

    if not arguments.longeval_file:
        raise ValueError(
            "--longeval-file: expected at least one official LongEval file, received none; "
            "pass for example --longeval-file 200_lines.jsonl"
        )
    files = tuple(LongEval(path) for path in arguments.longeval_file)
    return _Files(files), [arguments.length[0] if arguments.length else 2**31 - 1]


def _perplexity(arguments: argparse.Namespace) -> Any:
    text = read_text(Path(arguments.text)) if arguments.text else None
    lengths = arguments.length or [DEFAULT_LENGTH]
    if len(lengths) > 1:
        raise ValueError(
            f"--length: expected one length for perplexity, received {lengths}; positions up to "
            "the longest are reported in buckets anyway"
        )
    from dynmask.evals.perplexity import perplexity

    def ask(model: Any, tokenizer: Any, policies: dict[str, Any]) -> Any:
        return perplexity(
            model,
            tokenizer,
            policies,
            text=text,
            n=arguments.n or 4,
            length=lengths[0],
            measure_rows=arguments.measure_rows,
            impl=arguments.impl,
            progress=not arguments.quiet,
        )

    return ask


@dataclass(frozen=True)
class _Files:
    """Several LongEval files as one task; each is a group of its own in the table."""

    files: tuple[Any, ...]

    @property
    def name(self) -> str:
        return "longeval"

    def items(self, tokenizer: Any, n: int, length: int, seed: int) -> list[Any]:
        return [item for file in self.files for item in file.items(tokenizer, n, length, seed)]

    def score(self, item: Any, text: str) -> float:
        return self.files[0].score(item, text)


def _warn_of_length(model: Any, arguments: argparse.Namespace) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths: Sequence[int] = arguments.length or [DEFAULT_LENGTH]
    if limit is not None and max(lengths) > limit and arguments.task != "longeval":
        say(f"note: --length {max(lengths)} is beyond the {limit} positions the model was made for")
