"""Tasks of the lm-evaluation-harness under policies: its questions and scores, our measures.

The harness (package ``lm_eval``, 0.4.12 or later) asks every request of a task while a policy is
at work in the model, one request at a time, so that nothing is padded. Its data is the user's: the
tasks load it as they always do. What a policy costs is measured as everywhere else, by
:func:`dynmask.evals.evaluate` on the first prompts of the task.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dynmask.policies.base import looks_ahead

from .engine import Interrupted, check_policies, evaluate, progress_bar
from .generation import attend, is_full, needed_cache, own_summary
from .journal import Journal, policy_fingerprint
from .provenance import environment
from .report import ItemResult, Report, Row, paired_difference, proportion_interval
from .task import Item

__all__ = ["Harness", "harness", "require"]

MEASURED = (
    "density_decode", "kl", "agreement", "prefill_seconds", "ms_per_token", "selection_seconds",
    "peak_memory_bytes", "cache_bytes",
)  # fmt: skip
COUNTED = ("density", "kept_mass", "kept_mass_p5", "density_per_head", "kept_mass_per_head")


def require() -> tuple[Any, Any, Any]:
    """Return the harness, its task manager and its wrapper of Hugging Face models.

    Raises:
        RuntimeError: if the package, or what its wrapper needs, is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(
            f"lm_eval: expected the lm-evaluation-harness, received no module {error.name!r}; "
            "install it with pip install 'dynmask[lm-eval]'"
        ) from error
    return lm_eval, TaskManager, HFLM


@dataclass(frozen=True)
class Harness:
    """Which tasks of the harness are asked, and how.

    Args:
        tasks: names of the harness's tasks or groups of tasks, one or more.
        folder: a folder with the user's own task files (YAML), or None.
        shots: examples before each question; the task's own number when None.
        lengths: prompt lengths in tokens, for tasks that generate their data by length (RULER).

    Raises:
        ValueError: on no task, a folder that is none, or fewer than 0 examples.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    shots: int | None = None
    lengths: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise ValueError(
                f"tasks: expected names of the harness's tasks, received {self.tasks!r}; "
                "lm_eval ls tasks lists them"
            )
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(
                f"folder: expected a folder of task files, received {self.folder!r}; check the path"
            )
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots: expected 0 or more, received {self.shots}; pass 0")

    @property
    def name(self) -> str:
        """The task's name in tables and files."""
        return "lm_eval_" + "_".join(name.replace("/", "-") for name in self.tasks)


def harness(
    model: torch.nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Any],
    what: Harness,
    *,
    n: int | None = None,
    seed: int = 0,
    measure_rows: int = 32,
    timing: bool = True,
    timing_items: int = 2,
    timing_tokens: int = 16,
    impl: str = "auto",
    journal: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Report:
    """Ask tasks of the harness under every policy and report scores, quality and cost.

    An item's score is the first metric of its task that is a share (0 to 1, more is better);
    what else the harness reports of a task is in the rows' ``metrics``. Accuracies are compared
    on the same items. Density and kept mass are those of all requests; divergence, seconds and
    memory come from greedy runs on the first prompts.

    Args:
        model: a Hugging Face causal language model, in eval mode on its device.
        tokenizer: its tokenizer.
        policies: a name for the table -> a policy, or None for the model's own attention.
        what: the tasks.
        n: at most this many items of each task, its first ones; all of them when None.
        seed: seed of the harness.
        measure_rows: query rows per layer whose attention mass is measured; 0: none.
        timing: whether to run the timed pass on the first prompts.
        timing_items: prompts of each task that the timed pass uses; divergence too.
        timing_tokens: tokens decoded in the timed pass.
        impl: the attention implementation.
        journal: a JSON-lines file to which every finished task is appended.
        resume: take finished tasks from the journal when its settings are the same.
        progress: show progress bars on stderr.

    Raises:
        RuntimeError: if the package is missing.
        ValueError: on an unknown task, or a policy that does not fit, before any work.
        Interrupted: on Ctrl-C, with the report of what was finished.
    """
    package, manager_type, wrapper = require()
    if not policies:
        raise ValueError("policies: expected at least one, received none; pass {'full': None}")
    check_policies(model, policies)
    manager = _manager(manager_type, what, model)
    header = environment(model)
    header["versions"]["lm_eval"] = getattr(package, "__version__", None)
    header["settings"] = {
        "task": what.name,
        "task_settings": asdict(what),
        "policies": {name: policy_fingerprint(policy) for name, policy in policies.items()},
        "n": n,
        "seed": seed,
        "measure_rows": measure_rows,
        "timing_items": timing_items if timing else 0,
        "timing_tokens": timing_tokens,
        "impl": impl,
    }
    book = Journal(journal, _identity(header), resume)
    ask = partial(
        _ask, package, wrapper, manager, model, tokenizer, what, n, seed, measure_rows, impl,
        progress,
    )  # fmt: skip
    found: dict[tuple[str, str], dict[str, Any]] = {}
    costs: list[Report] = []
    try:
        with progress_bar(len(what.tasks) * len(policies), what.name, progress) as bar:
            for task in what.tasks:
                for name, policy in policies.items():
                    bar.set_postfix_str(f"{task}, {name}")
                    key = f"{header['settings']['policies'][name]}/{task}"
                    record = book.get(key)
                    if record is None:
                        record = ask(task, policy)
                        book.put(key, record)
                    found[task, name] = record
                    bar.update()
        if timing:
            costs = [
                evaluate(
                    model,
                    tokenizer,
                    policies,
                    _Prompts(task, tuple(found[task, next(iter(policies))]["prompts"])),
                    n=timing_items,
                    length=1,
                    seed=seed,
                    measure_rows=0,
                    timing_items=timing_items,
                    timing_tokens=timing_tokens,
                    impl=impl,
                    journal=None if journal is None else _beside(Path(journal), task),
                    resume=resume,
                    progress=progress,
                )
                for task in what.tasks
            ]
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_report(what, header, policies, found, [], False)) from interrupt
    finally:
        book.close()
    return _report(what, header, policies, found, costs, True)


def _manager(manager_type: Any, what: Harness, model: Any) -> Any:
    """Return the harness's task manager, after a look whether it knows the tasks."""
    known = {"max_seq_lengths": list(what.lengths)} if what.lengths else {}
    source = str(getattr(model.config, "_name_or_path", "") or "")
    manager = manager_type(include_path=what.folder, metadata={"tokenizer": source, **known})
    unknown = [task for task in what.tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"tasks: expected tasks that the lm-evaluation-harness knows, received {unknown}; "
            "lm_eval ls tasks lists them, and a folder of your own is named by its path"
        )
    return manager


def _ask(
    package: Any,
    wrapper: Any,
    manager: Any,
    model: torch.nn.Module,
    tokenizer: Any,
    what: Harness,
    n: int | None,
    seed: int,
    measure_rows: int,
    impl: str,
    progress: bool,
    task: str,
    policy: Any,
) -> dict[str, Any]:
    """Run one task under one policy; JSON-serialisable."""
    with (
        attend(model, policy, impl, measure=True, measure_rows=measure_rows) as run,
        _decoding(model, run),
    ):
        asked = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=1)
        if not progress:
            for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(asked, method, partial(getattr(asked, method), disable_tqdm=True))
        result = package.simple_evaluate(
            asked,
            tasks=[task],
            limit=n,
            num_fewshot=what.shots,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        measured = None if run is None else run.summary()["prefill"]
    items, prompts = [], []
    for name, samples in result["samples"].items():
        once = _once(samples)
        shares = _shares(once, result.get("higher_is_better", {}).get(name, {}))
        items += [_item(name, sample, shares) for sample in once]
        prompts += [str(sample["arguments"][0][0]) for sample in once]
    if measured is None:
        longest = max((len(tokenizer(prompt)["input_ids"]) for prompt in prompts), default=1)
        measured = own_summary(model, longest, 0, measure_rows)["prefill"]
    return {
        "items": items,
        "metrics": {name: _metrics(values) for name, values in result["results"].items()},
        "prompts": [prompt for prompt in prompts if prompt],
        "measured": {key: measured[key] for key in COUNTED},
    }


@contextmanager
def _decoding(model: Any, run: Any) -> Iterator[None]:
    """The model's ``generate``, which the harness calls, decodes by the rule of a run's policy."""
    own = model.generate
    held = vars(model).get("generate")

    def generate(*args: Any, **given: Any) -> Any:
        cache = needed_cache(run)
        return own(*args, **({} if cache is None else {"past_key_values": cache}), **given)

    model.generate = generate
    try:
        yield
    finally:
        if held is None:
            del model.generate
        else:
            model.generate = held


def _once(samples: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return every document's sample under the task's first filter."""
    several = list(samples)
    first = several[0]["filter"] if several else None
    return [sample for sample in several if sample["filter"] == first]


def _shares(samples: Sequence[Mapping[str, Any]], better: Mapping[str, Any]) -> list[str]:
    """Return the metrics that are a share of which more is better, in the order of the task.

    RULER's tasks say -1 where a metric is not about an item.
    """
    names = samples[0]["metrics"] if samples else []
    values = {name: [_number(sample.get(name)) for sample in samples] for name in names}
    return [
        name
        for name in names
        if better.get(name, True) and all(v is not None and v <= 1 for v in values[name])
        and all(v == -1 or v >= 0 for v in values[name] if v is not None)
    ]  # fmt: skip


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _item(task: str, sample: Mapping[str, Any], shares: Sequence[str]) -> dict[str, Any]:
    """Return what came of one document: its score and its metric, what was said and expected."""
    metric = next((name for name in shares if sample[name] >= 0), None)
    said, expected = _words(sample)
    return {
        "group": task if metric is None else f"{task}, {metric}",
        "task": task,
        "metric": metric,
        "index": int(sample["doc_id"]),
        "score": None if metric is None else float(sample[metric]),
        "text": said,
        "answers": [expected],
    }


def _words(sample: Mapping[str, Any]) -> tuple[str, str]:
    """Return what was said and what was expected; of several choices the likeliest was said."""
    target, arguments, answers = sample["target"], sample["arguments"], sample["filtered_resps"]
    if len(arguments) > 1 and all(isinstance(answer, list | tuple) for answer in answers):
        best = max(range(len(answers)), key=lambda i: float(answers[i][0]))
        right = (
            arguments[target][1] if isinstance(target, int) and target < len(arguments) else target
        )
        return str(arguments[best][1]).strip(), str(right).strip()
    said = answers[0] if answers else ""
    expected = ", ".join(map(str, target)) if isinstance(target, list | tuple) else str(target)
    return said if isinstance(said, str) else json.dumps(said, default=str), expected


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return a task's aggregated metrics by name, without standard errors and marks of absence."""
    found = {}
    for name, value in values.items():
        known = isinstance(value, int | float) and math.isfinite(value) and value != -1
        if known and "_stderr" not in name and name not in ("sample_len", "name"):
            found[name.removesuffix(",none")] = float(value)
    return found


def _report(
    what: Harness,
    header: dict[str, Any],
    policies: Mapping[str, Any],
    found: Mapping[tuple[str, str], Mapping[str, Any]],
    costs: Sequence[Report],
    complete: bool,
) -> Report:
    items = [
        ItemResult(
            policy=name,
            group=item["group"],
            index=item["index"],
            score=item["score"],
            text=item["text"],
            answers=tuple(item["answers"]),
            meta={"task": item["task"]},
            prompt_tokens=0,
            new_tokens=0,
        )
        for (_, name), record in found.items()
        for item in record["items"]
        if item["score"] is not None
    ]
    cost = {(report.task, row.policy): row for report in costs for row in report.rows}
    make = partial(_row, policies=policies, found=found, items=items, cost=cost, header=header)
    groups = dict.fromkeys(
        (task, item["task"], item["group"], item["metric"])
        for (task, _), record in found.items()
        for item in record["items"]
    )
    rows = [
        row
        for task, part, group, metric in groups
        for name in policies
        if (row := make(task, part, group, metric, name)) is not None
    ]
    timing = tuple(timed for report in costs for timed in report.timing)
    return Report(what.name, header, tuple(rows), tuple(items), complete, timing)


def _row(
    task: str,
    part: str,
    group: str,
    metric: str | None,
    name: str,
    *,
    policies: Mapping[str, Any],
    found: Mapping[tuple[str, str], Mapping[str, Any]],
    items: Sequence[ItemResult],
    cost: Mapping[tuple[str, str], Row],
    header: Mapping[str, Any],
) -> Row | None:
    record = found.get((task, name))
    if record is None:
        return None
    base = next((other for other, policy in policies.items() if is_full(policy)), None)
    mine, theirs = (_scores(items, group, who) for who in (name, base))
    shared = [index for index in mine if index in theirs] if base not in (None, name) else []
    difference = interval = method = None
    if shared:
        difference, interval, method = paired_difference(
            [mine[index] for index in shared],
            [theirs[index] for index in shared],
            header["settings"]["seed"],
        )
    n = len(mine) or sum(item["group"] == group for item in record["items"])
    right = sum(mine.values()) if mine else None
    metrics = {
        key: value for key, value in record["metrics"].get(part, {}).items() if key != metric
    }
    measured = cost.get((task, name))
    policy = policies[name]
    return Row(
        policy=name,
        group=group,
        n=n,
        causal=not looks_ahead(policy),
        right=right,
        accuracy=None if right is None else right / n,
        accuracy_interval=None if right is None else proportion_interval(right, n),
        difference=difference,
        difference_interval=interval,
        difference_method=method,
        metrics=metrics or None,
        **record["measured"],
        **({} if measured is None else {key: getattr(measured, key) for key in MEASURED}),
    )


def _scores(items: Iterable[ItemResult], group: str, name: str | None) -> dict[int, float]:
    return {item.index: item.score for item in items if item.policy == name and item.group == group}


@dataclass(frozen=True)
class _Prompts:
    """The first prompts of a task, as a task of our own that is never scored."""

    name: str
    prompts: tuple[str, ...]

    def items(self, tokenizer: Any, n: int, length: int, seed: int) -> list[Item]:
        return [Item(prompt, (), self.name, {}, 8) for prompt in self.prompts[:n]]

    def score(self, item: Item, text: str) -> float:
        return 0.0


def _beside(journal: Path, task: str) -> Path:
    return journal.with_name(f"{journal.stem}.{task.replace('/', '-')}.cost.jsonl")


def _identity(header: Mapping[str, Any]) -> str:
    """Return a hash of what every result depends on beside its policy and its task."""
    settings = dict(header["settings"])
    asked = {key: value for key, value in settings["task_settings"].items() if key != "tasks"}
    decisive = [
        asked,
        *(settings[key] for key in ("n", "seed", "measure_rows", "impl")),
        header["model"]["fingerprint"],
        *(header[key] for key in ("device", "dtype", "versions", "commit")),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
