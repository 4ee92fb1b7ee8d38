"""The gated policy beside full attention: official LongEval files, own tasks, RULER-style tasks.

    python recipes/evaluate_gated.py --longeval FOLDER                      # the reference model
    python recipes/evaluate_gated.py --model models/dynmask-reference-64k \\
        --tasks "lines 65536" "needle 65536" "ruler 32768"
    python recipes/evaluate_gated.py --policies vertical_slash gated:columns=1024 retained:CARD
    python recipes/evaluate_gated.py --plot "longeval 600"       # docs/generator.png
    python recipes/evaluate_gated.py --goals                 # what was asked for, from the rows
    python recipes/evaluate_gated.py --baselines --timed --tasks "longeval 600" --longeval FOLDER
    python recipes/evaluate_gated.py --baselines --timed --only h2o quest --tasks "lines 16384"
    python recipes/evaluate_gated.py --baselines --plot "longeval 600"  # docs/baselines.png
    python recipes/evaluate_gated.py --journal runs/answers ...         # goes on where it stopped

Policies are full attention, the zero-shot gates (``Gated()`` as it comes) and the card that
``recipes/gated_card.py`` left beside the model, or those of ``--cards``, the first of which the
goals are about; with ``--decode`` these again, decoding another way. With ``--policies`` it is
full attention and what is named, in the words of ``dynmask evaluate``. With ``--baselines`` it is
the list of ``benchmarks/baselines.py``, or of it full attention and ``--only`` some, by label or
policy; their rows go to ``benchmarks/results/baselines.jsonl``. ``--timed`` adds a pass that
measures seconds, milliseconds a token and memory: let nothing else run beside it. With ``--jobs``
tasks are evaluated side by side; one at a time they may be stopped by Ctrl-C, and what was
answered is kept; with ``--journal`` the same command goes on from there. A row of
``benchmarks/results/generator_tasks.jsonl`` is one of a model, task, group and policy; a later run
replaces it. "ruler:vt+cwe 32768" asks two of RULER's tasks. FOLDER holds the official files
``200_lines.jsonl`` to ``800_lines.jsonl``, which are not part of this repository.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "models" / "dynmask-reference"
LONGEVAL = tuple(f"longeval {n}" for n in (200, 400, 600, 800))
ZERO_SHOT, CARD = "gated (zero-shot)", "gated (card)"
ANSWER_TOKENS = 12  # an official answer is six; a mask that lost it would go on and on
KEEP = (
    "policy", "n", "accuracy", "accuracy_interval", "difference", "difference_interval",
    "density", "density_decode", "kept_mass", "kept_mass_p5", "kl", "agreement", "widened",
)  # fmt: skip
TIMED = ("prefill_seconds", "ms_per_token", "peak_memory_bytes", "cache_bytes")
TASK_ROWS, BASELINE_ROWS = (RESULTS / f"{name}.jsonl" for name in ("generator_tasks", "baselines"))

Row = dict[str, Any]


def task_of(name: str, folder: str | None) -> tuple[Any, int]:
    """The task of a name such as "lines 65536" or "ruler:vt+cwe 32768", and its prompt length."""
    from dynmask.evals.document_qa import DocumentQA
    from dynmask.evals.lines import Lines
    from dynmask.evals.longeval import LongEval
    from dynmask.evals.needle import Needle
    from dynmask.evals.ruler import Ruler

    kind, _, size = name.partition(" ")
    if kind == "longeval":
        if folder is None:
            raise ValueError("--longeval: expected the folder of the official files, received none")
        return LongEval(Path(folder) / f"{size}_lines.jsonl", max_new_tokens=ANSWER_TOKENS), 2**20
    kinds: dict[str, Any] = {
        "lines": Lines, "needle": Needle, "ruler": Ruler, "document_qa": DocumentQA,
    }  # fmt: skip
    some = kind.startswith("ruler:")
    if (not some and kind not in kinds) or not size.isdecimal():
        raise ValueError(
            f"--tasks: expected one of {', '.join(kinds)}, ruler:NAME+NAME, and its tokens, as in "
            f'"lines 16384", received {name!r}'
        )
    task = Ruler(tuple(kind.removeprefix("ruler:").split("+"))) if some else kinds[kind]()
    return task, int(size)


def decoding(label: str, decode: str) -> str:
    """The label of gates whose decoding is another than the policy's own."""
    return f"{label[:-1]}, decode={decode})"


MADE = {
    CARD: "card", decoding(CARD, "keep"): "card, decode=keep",
    decoding(CARD, "select"): "card, decode=select",
    ZERO_SHOT: "without calibration",
    decoding(ZERO_SHOT, "select"): "without calibration, decode=select",
}  # fmt: skip
"""What goals call the policies that they are about."""


def gated_policies(options: argparse.Namespace) -> dict[str, Any]:
    """The gates without calibration, and those of the cards."""
    import dynmask
    from dynmask.policies import Gated

    policies: dict[str, Any] = {ZERO_SHOT: Gated()}
    for index, path in enumerate(options.cards):
        label = CARD if index == 0 else f"gated ({path.name})"
        policies[label] = dynmask.MaskCard.from_pretrained(path).policy()
    for label, policy in list(policies.items()):
        for decode in options.decode:
            policies[decoding(label, decode)] = replace(policy, decode=decode)
    return policies


def baselines(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Label and text form of the baselines that were asked for, and labels of those left out.

    Left out are those whose card is not beside the model.
    """
    from benchmarks.baselines import BASELINES

    cards = {"gated": options.cards[0] if options.cards else None,
             "retained": options.model.with_name(f"{options.model.name}-retained")}  # fmt: skip
    there = {kind: str(path) for kind, path in cards.items() if path and path.is_dir()}
    asked = [
        one
        for one in BASELINES
        if not options.only or {one.label, one.kind} & {"full", *options.only}
    ]
    specs: dict[str, str] = {}
    missing: list[str] = []
    for one in asked:
        try:
            specs[one.label] = one.spec.format(**there)
        except KeyError:
            missing.append(one.label)
    return specs, missing


def slug(name: str) -> str:
    """A task's name as that of a file."""
    return re.sub(r"[^\w-]+", "-", name)


def run(name: str, options: argparse.Namespace) -> list[Row]:
    """One task under every policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynmask.cli.common import resolve_policy
    from dynmask.evals.engine import Interrupted, evaluate

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    task, length = task_of(name, options.longeval)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    policies: dict[str, Any] = {} if options.no_full else {"full": None}
    if options.baselines:
        specs = baselines(options)[0].items()
        own = {label: resolve_policy(spec) for label, spec in specs if label != "full"}
    elif options.policies:
        own = {spec: resolve_policy(spec) for spec in options.policies}
    else:
        own = gated_policies(options)
    policies |= own
    few = options.ruler_n if name.startswith("ruler") else options.n
    try:
        report = evaluate(
            model, tokenizer, policies, task, n=few, length=length, measure_rows=16,
            timing=options.timed, progress=options.jobs == 1,
            journal=options.journal and options.journal / f"{slug(name)}.jsonl",
        )  # fmt: skip
    except Interrupted as stop:  # what was answered counts
        report = stop.report
    here = {key: report.header[key] for key in ("date", "commit", "versions", "device", "dtype")}
    here["commit"] = options.commit or here["commit"]
    wrong: dict[tuple[str, str], list[int]] = {}
    for item in report.items:
        if item.score < 1:
            wrong.setdefault((item.policy, item.group), []).append(item.index)
    kind, _, size = name.partition(" ")
    some = kind.removeprefix("ruler:") if kind.startswith("ruler:") else ""
    alone = f"{some}, " if some and "+" not in some else ""  # the others' groups say their task
    return [
        {"model": options.model.name, "task": f"ruler {size}" if some else name,
         "group": alone + row.group,
         **{key: asdict(row)[key] for key in (*KEEP, *(TIMED if options.timed else ()))},
         "wrong": wrong.get((row.policy, row.group), []), **here}
        for row in report.rows
    ]  # fmt: skip


def means(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    """Accuracy, density and items of each (model, task, policy), means over its groups."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["task"], row["policy"]), []).append(row)
    return {
        name: {
            "accuracy": statistics.mean(row["accuracy"] for row in some),
            "density": statistics.mean(row["density"] for row in some),
            "n": sum(row["n"] for row in some), "first": some[0],
            "groups": {row["group"] for row in some},
        }
        for name, some in found.items()
    }  # fmt: skip


def record_goals(rows: list[Row]) -> None:
    """Write what was asked for to headline.jsonl, from the rows."""
    from benchmarks.headline import record

    found = means(rows)

    def compare(task: str, policy: str, model: str = MODEL.name) -> tuple[Row, Row] | None:
        ours, full = found.get((model, task, policy)), found.get((model, task, "full"))
        if ours is None or full is None or ours["groups"] != full["groups"]:
            return None  # means over different groups say nothing of each other
        return ours, full

    def write(goal: str, metric: str, value: float, target: float, ours: Row, full: Row) -> None:
        better = "lower" if metric == "density" else "higher"
        note = (f"{ours['accuracy']:.1%} at density {ours['density']:.2%}, full attention "
                f"{full['accuracy']:.1%}, n {ours['n']}")  # fmt: skip
        record(issue=4, goal=goal, metric=metric, value=round(value, 4), target=target,
               better=better, device=None, note=note, origin=ours["first"],
               command="python recipes/evaluate_gated.py")  # fmt: skip

    minus = "accuracy minus full attention's"
    for policy, made in MADE.items():
        for task in LONGEVAL:
            if both := compare(task, policy):
                ours, full = both
                goal = f"gated {made}, {task} lines"
                write(goal, minus, ours["accuracy"] - full["accuracy"], -0.01, ours, full)
        both = compare("longeval 600", policy)
        if both and policy != ZERO_SHOT:
            goal = f"gated {made}, 16,500 tokens (longeval 600)"
            write(goal, "density", both[0]["density"], 0.04, *both)
    if both := compare("longeval 600", ZERO_SHOT):
        ours, full = both
        goal = "gated without calibration, 16,500 tokens (longeval 600)"
        write(goal, minus, ours["accuracy"] - full["accuracy"], -0.02, ours, full)
        write(goal, "density", ours["density"], 0.08, ours, full)
    harder = f"{MODEL.name}-64k"
    limits = {"lines 65536": 0.02, "needle 65536": 0.02, "ruler 32768": 0.08}
    for (task, limit), (policy, made) in itertools.product(limits.items(), MADE.items()):
        if both := compare(task, policy, harder):
            ours, full = both
            kind, size = task.split()
            goal = f"gated {made}, own {kind} at {int(size):,} tokens, harder reference"
            write(goal, minus, ours["accuracy"] - full["accuracy"], -0.01, ours, full)
            write(goal, "density", ours["density"], limit, ours, full)


def show(rows: list[Row]) -> None:
    """Print one line for each task and policy."""
    for (model, task, policy), row in means(rows).items():
        print(f"{model:24s} {task:16s} {policy:28s} {row['accuracy']:6.1%} of {row['n']}, density "
              f"{row['density']:.2%}", flush=True)  # fmt: skip


def draw(
    rows: list[Row], model: str, task: str, path: Path, names: list[str] | None,
    alone: bool = False,
) -> None:  # fmt: skip
    """Draw right answers and divergence of a task's policies against what they read.

    Unless alone, those of other policies that ``recipes/evaluate_reference.py`` measured stand
    beside them.
    """
    from benchmarks.headline import rows_of
    from dynmask.evals.plots import pareto_of

    some = [row for row in rows if (row["model"], row["task"]) == (model, task)]
    if not some:
        raise SystemExit(f"--plot: expected a task with rows of {model}, received {task!r}; "
                         "evaluate it first (--out says where rows are)")  # fmt: skip
    if model == MODEL.name and not alone:
        beside = rows_of(RESULTS / "reference.jsonl")
        some += [row for row in beside if row["task"] == task and row["policy"] != "full"]
    known = {row["policy"] for row in some}
    wrong = sorted(set(names or ()) - known)
    if wrong:
        raise SystemExit(
            f"--policies: expected some of {', '.join(sorted(known))}, received {', '.join(wrong)}"
        )
    some = [row for row in some if not names or row["policy"] in names]
    devices = ", ".join(sorted({row["device"]["name"] for row in some}))
    counts = ", ".join(str(n) for n in sorted({row["n"] for row in some}))
    pareto_of(
        some, path, title=f"{task}: quality against density",
        caption=f"{model}, n {counts}, {devices}; recipes/evaluate_gated.py",
    )  # fmt: skip


def main() -> None:
    """Evaluate, or write the goals of what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--cards", type=Path, nargs="*", help="default: MODEL-gated, if it is there"
    )
    parser.add_argument(
        "--decode",
        nargs="+",
        default=[],
        choices=("full", "select", "keep"),
        help="decoding so as well",
    )
    parser.add_argument("--policies", nargs="+", metavar="SPEC", help="these, and no gated ones")
    parser.add_argument(
        "--baselines", action="store_true", help="the policies of benchmarks/baselines.py"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the baselines these, by label or policy"
    )
    parser.add_argument(
        "--timed", action="store_true", help="measure seconds and memory in a pass of their own"
    )
    parser.add_argument(
        "--no-full", action="store_true", help="full attention is known: keep its rows"
    )
    parser.add_argument("--tasks", nargs="+", default=list(LONGEVAL), metavar="TASK")
    parser.add_argument("--longeval", help="folder of the official files")
    parser.add_argument("--n", type=int, default=50, help="items of a task")
    parser.add_argument("--ruler-n", type=int, default=10, help="items of each RULER-style task")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--journal", type=Path, metavar="FOLDER", help="what was answered: go on from it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="tasks evaluated at a time")
    parser.add_argument("--threads", type=int, help="threads of each job (PyTorch's own choice)")
    parser.add_argument("--commit", default=None, help="what is run, where git cannot tell")
    parser.add_argument(
        "--out", type=Path, help="default: generator_tasks.jsonl or baselines.jsonl of the results"
    )
    parser.add_argument(
        "--goals", action="store_true", help="write the goals of the rows, and stop"
    )
    parser.add_argument(
        "--plot", metavar="TASK", help="draw the rows of a task (of --policies), and stop"
    )
    parser.add_argument(
        "--out-plot", type=Path, help="where to; default: generator.png or baselines.png of docs"
    )
    options = parser.parse_args()
    options.out = options.out or (BASELINE_ROWS if options.baselines else TASK_ROWS)

    from benchmarks.headline import rows_of, write_rows

    if options.plot:
        picture = "baselines.png" if options.baselines else "generator.png"
        draw(rows_of(options.out), options.model.name, options.plot,
             options.out_plot or ROOT / "docs" / picture, options.policies,
             alone=options.baselines)  # fmt: skip
        return
    if options.goals:
        show(rows_of(options.out))
        record_goals(rows_of(options.out))
        return
    given = options.cards
    if options.cards is None:
        beside = options.model.with_name(f"{options.model.name}-gated")
        options.cards = [beside] if beside.is_dir() else []
    if options.policies and (options.decode or given):
        parser.error("--policies: expected neither --decode nor --cards beside it, received one")
    if options.baselines and (options.policies or options.decode):
        parser.error("--baselines: expected no --policies or --decode beside it, received one")
    if options.only and not options.baselines:
        parser.error("--only: expected --baselines, of which it takes some, received none")
    if options.timed and options.jobs > 1:
        parser.error(f"--timed: expected one task at a time, received --jobs {options.jobs}")
    from benchmarks.baselines import BASELINES
    from dynmask.policies import parse

    known = {name for one in BASELINES for name in (one.label, one.kind)}
    if wrong := sorted(set(options.only or ()) - known):
        parser.error(f"--only: expected some of {', '.join(sorted(known))}, received "
                     f"{', '.join(wrong)}")  # fmt: skip
    if options.baselines:
        specs, missing = baselines(options)
        if missing:
            print(f"note: left out, for there is no card of theirs beside {options.model}: "
                  f"{'; '.join(missing)}", file=sys.stderr)  # fmt: skip
    else:
        specs = {spec: spec for spec in options.policies or ()}
    try:  # a name that is none fails before the work
        for name in options.tasks:
            task_of(name, options.longeval)
        for spec in specs.values():
            if spec != "full":
                parse(spec)
    except ValueError as error:
        parser.error(str(error))

    def keep(rows: list[Row]) -> None:
        name = ("model", "task", "policy", "group")
        new = {tuple(row[key] for key in name) for row in rows}
        old = rows_of(options.out)
        kept = [row for row in old if tuple(row[key] for key in name) not in new]
        write_rows(options.out, [*kept, *rows])
        show(rows)

    if options.jobs == 1:
        for name in options.tasks:
            keep(run(name, options))
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(run, name, options) for name in options.tasks]
            for done in as_completed(waiting):
                keep(done.result())
    if options.out == TASK_ROWS:
        record_goals(rows_of(options.out))


if __name__ == "__main__":
    main()
