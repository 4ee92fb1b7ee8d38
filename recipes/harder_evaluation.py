"""Evaluation of the harder reference: 13 RULER-style tasks, lines and needle, quickly.

Prompts of a cell (a task at a length) are read one by one, without a mask, and answered together.
Cells come in rounds of a few items, the whole grid once before any cell a second time: when the
time is over, every cell has its share.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dynmask.evals.lines import Lines
from dynmask.evals.longeval import LongEval
from dynmask.evals.needle import Needle
from dynmask.evals.ruler import TASKS, Ruler
from dynmask.evals.task import Item, Task


@dataclass(frozen=True)
class Cell:
    """A round of items of a task at a prompt length; the round is the seed."""

    label: str
    task: Task
    items: int
    length: int
    round: int


def cells(lengths: Sequence[int], items: int, rounds: int, longeval: str | None) -> list[Cell]:
    """Return every cell, the first round of all of them first; lengths in the order given."""
    tasks: dict[str, Task] = {name: Ruler((name,)) for name in TASKS}
    tasks |= {"lines": Lines(), "needle": Needle()}
    found: list[Cell] = []
    for turn in range(1, rounds + 1):
        for length in lengths:
            found += [Cell(label, task, items, length, turn) for label, task in tasks.items()]
        for path in sorted(Path(longeval).glob("*.jsonl")) if longeval and turn == 1 else ():
            task = LongEval(path, max_new_tokens=24)  # an answer has six
            found.append(Cell(f"longeval {path.stem}", task, 2 * items, max(lengths), turn))
    return found


@torch.inference_mode()
def replies(model: Any, prompts: Sequence[Tensor], new_tokens: int, stop: int) -> list[list[int]]:
    """Return what the model says greedily to prompts [tokens], without the ``stop`` token.

    Every prompt is read alone, so that attention needs no mask; then all are answered at once,
    their keys and values padded on the left.
    """
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(sizes.max())
    read, chosen = [], []
    for prompt in prompts:
        out = model(input_ids=prompt[None].to(model.device), use_cache=True, logits_to_keep=1)
        chosen.append(out.logits[0, -1].argmax())
        read.append([(layer.keys, layer.values) for layer in out.past_key_values.layers])
    cache = joined(read, longest)
    tokens = torch.stack(chosen)
    mask = (torch.arange(longest, device=model.device) >= longest - sizes[:, None]).long()
    said = [tokens]
    done = tokens == stop
    for step in range(new_tokens - 1):
        if bool(done.all()):
            break
        mask = F.pad(mask, (0, 1), value=1)
        out = model(input_ids=tokens[:, None], attention_mask=mask, past_key_values=cache,
                    position_ids=(sizes + step)[:, None])  # fmt: skip
        tokens = out.logits[:, -1].argmax(-1)
        done |= tokens == stop
        said.append(tokens)
    rows = torch.stack(said, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def joined(read: list[list[tuple[Tensor, Tensor]]], longest: int) -> DynamicCache:
    """Return one cache of [prompt][layer] keys and values, padded on the left; empties ``read``."""
    cache = DynamicCache()
    for index in range(len(read[0])):
        pairs = [layers.pop(0) for layers in read]
        keys, values = (
            torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
            for parts in zip(*pairs, strict=True)
        )
        cache.update(keys, values, index)
    return cache


def measured(cell: Cell, model: Any, tokenizer: Any) -> dict[str, Any] | None:
    """Return the row of one cell, or None where its length has no room for the question."""
    started = time.perf_counter()
    try:
        items = cell.task.items(tokenizer, cell.items, cell.length, cell.round)
    except ValueError:
        return None
    prompts = [torch.tensor(tokenizer(item.prompt)["input_ids"]) for item in items]
    most = max(item.max_new_tokens for item in items)
    said = replies(model, prompts, most, tokenizer.eos_token_id)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    scores = [cell.task.score(item, text) for item, text in zip(items, texts, strict=True)]
    return {
        "task": cell.label, "group": items[0].group, "length": cell.length, "rounds": 1,
        "items": len(items), "score": sum(scores) / len(items),
        "prompt_tokens": sum(map(len, prompts)) / len(items),
        "seconds": round(time.perf_counter() - started, 1),
        "wrong": [mistake(item, text) for item, text, score in zip(items, texts, scores,
                  strict=True) if score < 1][:4],
    }  # fmt: skip


def mistake(item: Item, text: str) -> dict[str, Any]:
    """Return what is kept of an item that was not answered in full."""
    return {**item.meta, "expected": list(item.answers), "received": text}


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with the row of another round taken in."""
    same = ("task", "group", "length")
    for index, row in enumerate(rows):
        if all(row[name] == new[name] for name in same):
            total = row["items"] + new["items"]
            means = {
                name: (row["items"] * row[name] + new["items"] * new[name]) / total
                for name in ("score", "prompt_tokens")
            }
            joined = {
                **row, **means, "items": total, "rounds": row["rounds"] + 1,
                "seconds": round(row["seconds"] + new["seconds"], 1),
                "wrong": [*row["wrong"], *new["wrong"]][:4],
            }  # fmt: skip
            return [*rows[:index], joined, *rows[index + 1 :]]
    return [*rows, new]


_loaded: tuple[Any, Any] | None = None


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a folder: bf16 on a GPU."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _start(folder: Path, device: str) -> None:
    global _loaded
    torch.set_num_threads(1)
    _loaded = load(folder, device)


def _work(cell: Cell, until: float) -> tuple[Cell, dict[str, Any] | None]:
    assert _loaded is not None
    return cell, None if time.time() > until else measured(cell, *_loaded)


def outcomes(
    wanted: list[Cell], folder: Path, device: str, until: float, workers: int
) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
    """Yield cells with their rows as they are done; None for those that time or room did not fit.

    On a GPU several processes share it, since most of the time goes into writing prompts.
    """
    if not device.startswith("cuda"):
        loaded = load(folder, device)
        for cell in wanted:
            yield cell, None if time.time() > until else measured(cell, *loaded)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (folder, device)) as pool:
        futures = [pool.submit(_work, cell, until) for cell in wanted]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def evaluate(
    wanted: list[Cell], rows: list[dict[str, Any]], folder: Path, device: str, minutes: float,
    keep: Callable[[list[dict[str, Any]]], None], workers: int = 8,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows with those cells taken in that are new and that the time allows.

    ``keep`` gets the rows after every cell, so that an interrupted evaluation goes on from there.
    Once ``minutes`` are over no cell is begun.
    """
    done = {(row["task"], row["length"]): row["rounds"] for row in rows}
    missing = [cell for cell in wanted if cell.round > done.get((cell.label, cell.length), 0)]
    until = time.time() + 60 * minutes
    bar = tqdm(total=len(missing), unit="cell", mininterval=2, desc="evaluation")
    for cell, row in outcomes(missing, folder, device, until, workers) if minutes > 0 else ():
        bar.update()
        if row is not None:
            rows = merged(rows, row)
            bar.set_postfix_str(f"{cell.label} {cell.length:,}: {row['score']:.0%}")
            keep(rows)
    bar.close()
    return rows
