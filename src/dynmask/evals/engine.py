"""Runs policies over the items of a task on a model: the same items for all, cost and quality.

Quality and cost are measured apart. The scoring pass answers every item greedily and counts what
the masks let through; the timed pass measures nothing but time and memory, on a few items, and
never stops a generation early. There a policy that evicts has a cache of the keys that are left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dynmask.policies.base import looks_ahead

from .generation import (
    Generation,
    attend,
    bounded_cache,
    divergence,
    greedy,
    is_full,
    needed_cache,
    own_summary,
    stop_tokens,
    text_config,
)
from .journal import Journal, policy_fingerprint
from .memory import PeakMemory
from .provenance import environment
from .report import ItemResult, Report, Row, paired_difference, proportion_interval
from .task import Item, Task

__all__ = ["Interrupted", "evaluate"]

# Measures of a row that are means over its items, and medians over its timed items.
MEANS = (
    "density",
    "density_decode",
    "kept_mass",
    "kept_mass_p5",
    "kept_mass_decode",
    "kl",
    "agreement",
    "widened",
    "selection_seconds",
)
MEDIANS = ("prefill_seconds", "ms_per_token")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an evaluation; ``report`` holds what was finished."""

    def __init__(self, report: Report) -> None:
        super().__init__("evaluation interrupted")
        self.report = report


def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Any],
    task: Task,
    *,
    n: int = 20,
    length: int | Sequence[int] = 8192,
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
    """Answer the task's items under every policy and report quality and cost.

    Every policy gets the same items. A policy of ``None`` is the model as it is, with its own
    attention: the dense baseline. The first ``None`` or causal policy is what the others are
    compared with: differences of accuracy are paired, and divergence of the next-token
    distribution is counted at the answers. Items run one after the other, all policies for each,
    so an interrupted run still compares like with like.

    Args:
        model: a Hugging Face causal language model, in eval mode on its device.
        tokenizer: its tokenizer.
        policies: a name for the table -> a policy, or None for the model's own attention.
        task: where the items come from and how answers are scored.
        n: items per length.
        length: prompt length in tokens, or several.
        seed: seed of the items.
        measure_rows: query rows per layer and prompt whose attention mass is measured; 0: none.
        timing: whether to run the timed pass.
        timing_items: items per group that the timed pass uses; medians are reported.
        timing_tokens: tokens decoded in the timed pass, never fewer.
        impl: the attention implementation, as in ``dynmask.sparsify``.
        journal: a JSON-lines file to which every finished item is appended.
        resume: take finished items from the journal when its settings are the same; otherwise,
            or when false, the journal starts anew.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: on an empty or unfitting policy, or counts that are too small, before any work.
        Interrupted: on Ctrl-C, with the report of what was finished.
    """
    lengths = [length] if isinstance(length, int) else list(length)
    _check(model, policies, lengths, measure_rows, timing_items, timing_tokens)
    items = [item for tokens in lengths for item in task.items(tokenizer, n, tokens, seed)]
    header = environment(model)
    header["settings"] = {
        "task": task.name,
        "task_settings": _plain(task),
        "policies": {name: policy_fingerprint(policy) for name, policy in policies.items()},
        "n": n,
        "length": lengths,
        "seed": seed,
        "measure_rows": measure_rows,
        "timing_items": timing_items if timing else 0,
        "timing_tokens": timing_tokens,
        "impl": impl,
        "own_attention": getattr(model.config, "_attn_implementation", None),
        "memory": "peak during prefill and decode above the level before it, cache included, by "
        + PeakMemory(next(model.parameters()).device).method,
    }
    run = _Run(model, tokenizer, policies, task, items, header["settings"])
    book = Journal(journal, _identity(header), resume)
    complete = False
    try:
        run.score(book, measure_rows, impl, progress)
        if timing:
            run.time(book, timing_items, timing_tokens, impl, progress)
        complete = True
    except KeyboardInterrupt as interrupt:
        raise Interrupted(run.report(header, complete)) from interrupt
    finally:
        book.close()
    return run.report(header, complete)


class _Run:
    """The state of one evaluation: what is asked, and the results so far."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        policies: Mapping[str, Any],
        task: Task,
        items: list[Item],
        settings: dict[str, Any],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.policies = policies
        self.task = task
        self.items = items
        self.settings = settings
        self.device = next(model.parameters()).device
        self.stop = stop_tokens(model, tokenizer)
        self.baseline = next((name for name, policy in policies.items() if is_full(policy)), None)
        self.results: dict[tuple[str, int], ItemResult] = {}
        self.timings: dict[tuple[str, int], dict[str, Any]] = {}
        self.warm: set[tuple[str, str]] = set()

    def ids(self, item: Item) -> Tensor:
        return torch.tensor([list(self.tokenizer(item.prompt)["input_ids"])], device=self.device)

    def key(self, kind: str, name: str, item: Item) -> str:
        """Return the name of a result in the journal: new items and policies add to old ones."""
        against = self.baseline if kind == "item" else None
        question = [item.prompt, list(item.answers), item.max_new_tokens]
        prints = self.settings["policies"]
        return "/".join([kind, prints[name], prints.get(against, "-"), _hash(question)[:16]])

    def order(self) -> list[str]:
        """The names of the policies, the baseline first: the others are compared with it."""
        names = list(self.policies)
        return sorted(names, key=lambda name: name != self.baseline)

    def score(self, book: Journal, measure_rows: int, impl: str, progress: bool) -> None:
        with progress_bar(len(self.items) * len(self.policies), self.task.name, progress) as bar:
            for index, item in enumerate(self.items):
                reference: Generation | None = None
                ids = self.ids(item)
                for name in self.order():
                    bar.set_postfix_str(name)
                    key = self.key("item", name, item)
                    record = book.get(key)
                    if record is not None:
                        result = _item_from(record, name, index)
                    else:
                        if reference is None and self.baseline not in (None, name):
                            # A resumed run has the baseline's answer but not its logits.
                            reference = self.generate(self.baseline, item, ids, impl)
                        result, answer = self.answer(
                            name, index, item, ids, measure_rows, impl, reference
                        )
                        if name == self.baseline:
                            reference = answer
                        book.put(key, asdict(result))
                    self.results[name, index] = result
                    bar.update()

    def generate(self, name: str | None, item: Item, ids: Tensor, impl: str) -> Generation:
        with attend(self.model, self.policies[name] if name else None, impl) as run:
            return self.greedily(run, item, ids)

    def greedily(self, run: Any, item: Item, ids: Tensor) -> Generation:
        return greedy(
            self.model,
            ids,
            item.max_new_tokens,
            stop=self.stop,
            keep_logits=True,
            cache=needed_cache(run),
        )

    def answer(
        self,
        name: str,
        index: int,
        item: Item,
        ids: Tensor,
        measure_rows: int,
        impl: str,
        reference: Generation | None,
    ) -> tuple[ItemResult, Generation]:
        """Answer one item under one policy, counting what its masks let through."""
        policy = self.policies[name]
        measures = {"measure": True, "measure_rows": measure_rows}
        with attend(self.model, policy, impl, **measures) as run:
            answer = self.greedily(run, item, ids)
            measured = (
                run.summary()
                if run is not None
                else own_summary(self.model, ids.shape[1], len(answer.tokens), measure_rows)
            )
        self.warm.add((name, item.group))
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        prefill, decode = measured["prefill"], measured["decode"]
        kl, agreement = (None, None) if reference is None else divergence(reference, answer)
        result = ItemResult(
            policy=name,
            group=item.group,
            index=index,
            score=float(self.task.score(item, text)),
            text=text,
            answers=tuple(item.answers),
            meta=dict(item.meta),
            prompt_tokens=ids.shape[1],
            new_tokens=len(answer.tokens),
            density=prefill["density"],
            density_decode=decode["density"],
            kept_mass=prefill["kept_mass"],
            kept_mass_p5=prefill["kept_mass_p5"],
            kept_mass_decode=decode["kept_mass"],
            kl=kl,
            agreement=agreement,
            widened=measured.get("guard", {}).get("share"),
            density_per_head=prefill["density_per_head"],
            kept_mass_per_head=prefill["kept_mass_per_head"],
            selection_seconds=measured.get("selection_seconds"),
        )
        return result, answer

    def time(
        self, book: Journal, timing_items: int, new_tokens: int, impl: str, progress: bool
    ) -> None:
        """Time prefill and decode; policies take turns, so that a slow minute hits all of them."""
        chosen: list[int] = []
        for group in dict.fromkeys(item.group for item in self.items):
            members = [i for i, item in enumerate(self.items) if item.group == group]
            chosen += members[:timing_items]
        with progress_bar(len(chosen) * len(self.policies), "timing", progress) as bar:
            for index in chosen:
                item, ids = self.items[index], self.ids(self.items[index])
                for name in self.policies:
                    bar.set_postfix_str(name)
                    key = self.key("timing", name, item)
                    timed = book.get(key)
                    if timed is None:
                        timed = self.timed(name, item, ids, new_tokens, impl)
                        book.put(key, timed)
                    self.timings[name, index] = {"policy": name, "index": index, **timed}
                    bar.update()

    def timed(
        self, name: str, item: Item, ids: Tensor, new_tokens: int, impl: str
    ) -> dict[str, Any]:
        policy = self.policies[name]
        if (name, item.group) not in self.warm:
            # The scoring pass warms up what it runs; a resumed run may have scored nothing.
            with attend(self.model, policy, impl) as active:
                greedy(self.model, ids, 2, cache=needed_cache(active))
            self.warm.add((name, item.group))
        with attend(self.model, policy, impl) as active, PeakMemory(self.device) as memory:
            run = greedy(self.model, ids, new_tokens, cache=bounded_cache(active))
        return {
            "group": item.group,
            "prompt_tokens": ids.shape[1],
            "new_tokens": len(run.tokens),
            "prefill_seconds": run.prefill_seconds,
            "ms_per_token": run.ms_per_token,
            "peak_memory_bytes": memory.bytes,
            "cache_bytes": run.cache_bytes,
        }

    def report(self, header: dict[str, Any], complete: bool) -> Report:
        groups = dict.fromkeys(item.group for item in self.items)
        rows = [
            row
            for group in groups
            for name in self.policies
            if (row := self.row(name, group)) is not None
        ]
        order = {name: position for position, name in enumerate(self.policies)}
        items = sorted(self.results.values(), key=lambda item: (item.index, order[item.policy]))
        timing = tuple(self.timings[key] for key in sorted(self.timings, key=lambda key: key[1]))
        return Report(self.task.name, header, tuple(rows), tuple(items), complete, timing)

    def row(self, name: str, group: str) -> Row | None:
        items = self.of(name, group)
        if not items:
            return None
        scores = [item.score for item in items.values()]
        difference = interval = method = None
        base = self.of(self.baseline, group) if self.baseline not in (None, name) else {}
        shared = [index for index in items if index in base]
        if shared:
            difference, interval, method = paired_difference(
                [items[index].score for index in shared],
                [base[index].score for index in shared],
                self.settings["seed"],
            )
        timed = [t for (who, _), t in self.timings.items() if who == name and t["group"] == group]
        values = list(items.values())
        policy = self.policies[name]
        means: dict[str, Any] = {key: mean(getattr(item, key) for item in values) for key in MEANS}
        medians: dict[str, Any] = {key: _median(t[key] for t in timed) for key in MEDIANS}
        return Row(
            policy=name,
            group=group,
            n=len(items),
            causal=not looks_ahead(policy),
            right=sum(scores),
            accuracy=sum(scores) / len(scores),
            accuracy_interval=proportion_interval(sum(scores), len(scores)),
            difference=difference,
            difference_interval=interval,
            difference_method=method,
            **means,
            **medians,
            peak_memory_bytes=max((t["peak_memory_bytes"] for t in timed), default=None),
            cache_bytes=max(
                (t["cache_bytes"] for t in timed if t.get("cache_bytes")), default=None
            ),
            density_per_head=mean_per_head(item.density_per_head for item in values),
            kept_mass_per_head=mean_per_head(item.kept_mass_per_head for item in values),
        )

    def of(self, name: str | None, group: str) -> dict[int, ItemResult]:
        return {
            index: result
            for (who, index), result in sorted(self.results.items(), key=lambda pair: pair[0][1])
            if who == name and result.group == group
        }


def _identity(header: dict[str, Any]) -> str:
    """Return a hash of what every result of a run depends on beside its policy and its item."""
    settings = header["settings"]
    decisive = {
        "settings": {
            key: settings[key]
            for key in ("task", "task_settings", "measure_rows", "timing_tokens", "impl", "memory")
        },
        "model": header["model"]["fingerprint"],
        **{key: header[key] for key in ("device", "dtype", "versions", "commit")},
    }
    return _hash(decisive)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _item_from(record: dict[str, Any], name: str, index: int) -> ItemResult:
    """Return a journal's result under the name and the number that it has in this run."""
    answers = tuple(record["answers"])
    return ItemResult(**{**record, "policy": name, "index": index, "answers": answers})


def _check(
    model: torch.nn.Module,
    policies: Mapping[str, Any],
    lengths: Sequence[int],
    measure_rows: int,
    timing_items: int,
    timing_tokens: int,
) -> None:
    if not policies:
        raise ValueError(
            "policies: expected at least one, received none; pass for example "
            "{'full': None, 'streaming': Streaming()}"
        )
    if not lengths:
        raise ValueError("length: expected a number of tokens or several, received none; pass 8192")
    if measure_rows < 0 or timing_items < 1 or timing_tokens < 2:
        raise ValueError(
            f"expected measure_rows >= 0, timing_items >= 1 and timing_tokens >= 2 (the first "
            f"token belongs to the prefill), received {measure_rows}, {timing_items} and "
            f"{timing_tokens}; raise the one that is too small"
        )
    check_policies(model, policies)


def check_policies(model: torch.nn.Module, policies: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the first policy that does not fit ``model``."""
    config = text_config(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name, policy in policies.items():
        if policy is None:
            continue
        if not callable(policy) or not hasattr(policy, "check"):
            raise ValueError(
                f"policies[{name!r}]: expected a policy or None, received "
                f"{type(policy).__name__}; make one with dynmask.policies.parse('streaming')"
            )
        try:
            policy.check(config.num_hidden_layers, heads, kv_heads)
            if getattr(policy, "card", None) is not None:
                policy.card.check(model)
        except ValueError as error:
            raise ValueError(f"policies[{name!r}]: {error}") from error


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that were measured, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def mean_per_head(tables: Iterable[list[Any] | None]) -> list[Any] | None:
    """Return the mean of tables of layers x heads, or None when there is none.

    A layer that was not measured (one without attention) is None.
    """
    known = [table for table in tables if table and any(table)]
    if not known:
        return None
    return [
        [sum(heads) / len(heads) for heads in zip(*layer, strict=True)] if all(layer) else None
        for layer in zip(*known, strict=True)
    ]


def _plain(task: Task) -> dict[str, Any]:
    """Return the settings of a task as JSON-serialisable data."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        return {"repr": type(task).__name__}
    return json.loads(json.dumps(asdict(task), default=str))


class _Silent:
    """A progress bar that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass


def progress_bar(total: int, title: str, progress: bool) -> Any:
    """Return a progress bar on stderr, or one that shows nothing."""
    if not progress:
        return _Silent()
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="answer", leave=False)
