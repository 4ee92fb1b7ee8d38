"""``dynmask evaluate``: quality and cost of several policies, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    positions_of,
    positive,
    read_prompt,
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
JSON with versions and device, as pictures, and as report.html: one page to look at that
works offline, with all reports of the folder. An interrupted run resumes there.

tasks:
  needle        facts hidden in real prose, one asked, over a grid of depths
  lines         a long list of records, one asked: every record is a distractor
  document_qa   questions about a long document in chapters, --n of each kind
  ruler         13 RULER-style tasks, --n items of each; ruler_vt, ruler_cwe, ...: only one
  longeval      official LongEval files (pass them with --longeval-file)
  perplexity    how well long text is predicted, by position (own text with --text)
  lm_eval:TASK  a task of the lm-evaluation-harness (package lm_eval) with the data that it
                loads; several as lm_eval:TASK,TASK; your own with --lm-eval-folder
"""
EPILOG = """\
examples:
  dynmask evaluate --model MODEL --task needle --length 4096 8192 --n 22 --out results \\
      --policy full --policy streaming --policy dam:my-card
  dynmask evaluate --model MODEL --task longeval --longeval-file 200_lines.jsonl --n 50
  dynmask evaluate --model MODEL --task perplexity --text book.txt --length 16384
  dynmask evaluate --model MODEL --task needle --length 16384 --policy full \\
      --policy retained:my-card,width=256 --policy retained:my-card,width=1024
  dynmask evaluate --model MODEL --task lm_eval:arc_easy --n 100 --out results
"""

RULER = ("ruler", *(f"ruler_{name}" for name in RULER_TASKS))
TASKS = ("lines", "needle", "document_qa", *RULER, "longeval", "perplexity")
HARNESS = "lm_eval:"
DEFAULT_LENGTH = 8192
EXAMPLES = 8  # items that are looked at for one to show
MIDDLE = (0.2, 0.8)  # where evidence tells more in a picture of masks than at either end


def task_name(text: str) -> str:
    """Parse the name of a task."""
    if text not in TASKS and not (text.startswith(HARNESS) and text != HARNESS):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(TASKS)} or {HARNESS}TASK, received {text!r}"
        )
    return text


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(command)
    command.add_argument(
        "--task", required=True, type=task_name, metavar="TASK", help="what is asked, see above"
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
        "--n",
        type=positive,
        metavar="N",
        help="items per length or file (20; perplexity: 4; lm_eval: all)",
    )
    command.add_argument(
        "--longeval-file", nargs="+", default=[], metavar="FILE", help="official LongEval files"
    )
    command.add_argument("--text", metavar="FILE", help="the text that perplexity reads")
    command.add_argument(
        "--lm-eval-folder", metavar="FOLDER", help="folder of own task files for lm_eval"
    )
    command.add_argument(
        "--shots", type=int, metavar="N", help="lm_eval: examples before each question"
    )
    command.add_argument(
        "--out", metavar="FOLDER", help="write table, JSON, page, pictures and the journal here"
    )
    page = command.add_argument_group("page (with --out)")
    prompt = page.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="show the masks on this prompt (default: on an item)"
    )
    prompt.add_argument("--file", metavar="FILE", help="show the masks on the prompt of this file")
    page.add_argument("--no-page", action="store_true", help="write no report.html")
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
    ask, example = _task(arguments)
    prompt = _own_prompt(arguments)
    if arguments.out and not arguments.no_plots:
        from dynmask.evals.plots import figure_of

        figure_of()  # a missing matplotlib is told now, not after the run
    if arguments.out:
        check_output_folder(arguments.out)
    model, tokenizer = load(arguments, policies.values())
    from dynmask.evals.engine import Interrupted

    _warn_of_length(model, arguments)
    code = OK
    try:
        report = ask(model, tokenizer, policies)
    except Interrupted as interrupt:
        report, code = interrupt.report, INTERRUPTED
        say("\nstopped: reporting what was finished")
    report = replace(report, header={**report.header, "command": arguments.command_line})
    print(report.to_json() if arguments.json else report.table())
    sys.stdout.flush()
    if not arguments.out or not report.rows:
        return code
    _write(report, arguments)
    if not arguments.no_page:
        if report.complete:
            shown = prompt or example(tokenizer)
            report, code = _with_reading(report, model, tokenizer, policies, shown, arguments)
        _write_page(report, arguments)
    return code


@dataclass(frozen=True)
class _Shown:
    """A prompt whose masks the page shows, where it is from, and what it asks for."""

    prompt: str
    source: str
    answers: tuple[str, ...] = ()


def _own_prompt(arguments: argparse.Namespace) -> _Shown | None:
    """Return the user's prompt, if there is one."""
    if arguments.prompt is None and arguments.file is None:
        return None
    if not arguments.out or arguments.no_page:
        option = "--prompt" if arguments.prompt is not None else "--file"
        raise ValueError(
            f"{option}: expected with --out and without --no-page, since the page shows its "
            "masks, received it alone; add --out FOLDER"
        )
    source = "your prompt" if arguments.file is None else f"your file {Path(arguments.file).name}"
    return _Shown(read_prompt(arguments), source)


def _with_reading(
    report: Any,
    model: Any,
    tokenizer: Any,
    policies: dict[str, Any],
    shown: _Shown | None,
    arguments: argparse.Namespace,
) -> tuple[Any, int]:
    """Return the report with what the policies read of a prompt, and the exit code."""
    if shown is None:
        return report, OK
    from dynmask.evals.reading import reading

    try:
        found = reading(
            model,
            tokenizer,
            policies,
            shown.prompt,
            source=shown.source,
            answers=shown.answers,
            measure_rows=arguments.measure_rows,
            impl=arguments.impl,
            progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        say("\nstopped: the page has no masks")
        return report, INTERRUPTED
    report = replace(report, reading=found)
    report.save(arguments.out)
    return report, OK


def _write(report: Any, arguments: argparse.Namespace) -> None:
    path = report.save(arguments.out)
    written = [path, path.with_suffix(".txt")]
    if not arguments.no_plots:
        from dynmask.evals.plots import draw_report

        written += draw_report(report, arguments.out)
    say("written: " + " ".join(str(file) for file in written))


def _write_page(report: Any, arguments: argparse.Namespace) -> None:
    from dynmask.evals.page import reports_of, write_page

    several = reports_of(arguments.out, report)
    say(f"written: {write_page(several, Path(arguments.out) / 'report.html')}")


def _task(arguments: argparse.Namespace) -> Any:
    """Return what runs the task, and what picks the prompt that the page shows.

    Options are checked before a model is loaded.
    """
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
    for_harness = arguments.lm_eval_folder is not None or arguments.shots is not None
    if for_harness and not arguments.task.startswith(HARNESS):
        option = "--shots" if arguments.lm_eval_folder is None else "--lm-eval-folder"
        raise ValueError(
            f"{option}: expected with --task {HARNESS}TASK, received with --task "
            f"{arguments.task}; leave it out"
        )
    if arguments.task == "perplexity":
        return _perplexity(arguments)
    if arguments.task.startswith(HARNESS):
        return _harness(arguments)
    from dynmask.evals.engine import evaluate

    task, lengths = _questions(arguments)
    journal = Path(arguments.out) / f"{arguments.task}.journal.jsonl" if arguments.out else None

    def example(tokenizer: Any) -> _Shown:
        """Return the first item whose evidence stands in the middle, else the first one."""
        few = min(arguments.n or 20, EXAMPLES)
        items = task.items(tokenizer, few, lengths[-1], arguments.seed)
        inside = (i for i in items if MIDDLE[0] <= i.meta.get("depth", -1) <= MIDDLE[1])
        item = next(inside, items[0])
        return _Shown(item.prompt, f"item {items.index(item)} of {task.name}", item.answers)

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

    return ask, example


def _harness(arguments: argparse.Namespace) -> Any:
    from dynmask.evals.harness import Harness, harness, require

    require()  # a missing package is told now, not after the model is loaded
    names = tuple(arguments.task.removeprefix(HARNESS).split(","))
    what = Harness(names, arguments.lm_eval_folder, arguments.shots, tuple(arguments.length or ()))
    journal = Path(arguments.out) / f"{what.name}.journal.jsonl" if arguments.out else None

    def ask(model: Any, tokenizer: Any, policies: dict[str, Any]) -> Any:
        return harness(
            model,
            tokenizer,
            policies,
            what,
            n=arguments.n,
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

    return ask, lambda tokenizer: None


def _questions(arguments: argparse.Namespace) -> tuple[Any, list[int]]:
    """Return the task and its lengths."""
    lengths = arguments.length or [DEFAULT_LENGTH]
    if arguments.task == "lines":
        from dynmask.evals.lines import Lines

        return Lines(), lengths
    if arguments.task == "needle":
        from dynmask.evals.needle import Needle

        return Needle(), lengths
    if arguments.task == "document_qa":
        from dynmask.evals.document_qa import DocumentQA

        return DocumentQA(), lengths
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

    def example(tokenizer: Any) -> _Shown:
        """Return the beginning of the text."""
        from dynmask.evals.text import haystack_lines

        whole = text if text is not None else "\n".join(haystack_lines())
        ids = tokenizer(whole, verbose=False)["input_ids"][: lengths[0]]
        start = tokenizer.decode(ids, skip_special_tokens=True)
        return _Shown(start, "the beginning of the text")

    return ask, example


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
    limit = positions_of(model)
    lengths: Sequence[int] = arguments.length or [DEFAULT_LENGTH]
    own = arguments.task == "longeval" or arguments.task.startswith(HARNESS)
    if limit is not None and max(lengths) > limit and not own:
        say(f"note: --length {max(lengths)} is beyond the {limit} positions the model was made for")
