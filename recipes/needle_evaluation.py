"""Needle far beyond training, read in chunks with a cache of w keys per kv head.

Prompts are made once, by worker processes, and kept in a folder that all variants share. A reader
goes through them 8,192 tokens at a time; per layer a :class:`dynmask.cache.KeyStore` keeps the
live keys alone, so that memory at a million tokens is that of the first chunk. Beside the answers
it reports which share of the asked fact's tokens each head still held when the question came:
what is not held cannot be answered, and what is held and not answered is the model's miss.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dma_decoder import rotary_tables
from reference_data import EOS
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from train_reference import _norm, _rotate, after_attention, before_attention, write_atomically
from transformers import AutoTokenizer

from dynmask import LifetimeMask, attention
from dynmask.cache import KeyStore
from dynmask.evals.needle import Needle
from dynmask.evals.task import Item
from dynmask.nn import Retention

CHUNK = 8_192
"""Tokens of each sequence that are read at a time."""

ROWS_OF_A_STEP = 131_072
"""Tokens of all sequences that are read at a time."""

ANSWER_TOKENS = 12


# ------------------------------------------------------------------------------------- the prompts


@dataclass(frozen=True)
class Prompt:
    """An item as tokens [n]; tokens ``fact`` hold the asked sentence, ``value`` its value."""

    ids: np.ndarray
    item: Item
    fact: tuple[int, int]
    value: tuple[int, int]


_tokenizer: Any = None


def _begin(path: str) -> None:
    global _tokenizer
    os.nice(10)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = AutoTokenizer.from_pretrained(path)


def _write(task: tuple[int, int, int]) -> tuple[list[int], dict[str, Any]]:
    """Return one prompt's tokens and what is known about it, filled to exactly ``length``."""
    index, length, seed = task

    def ids(text: str) -> list[int]:
        return _tokenizer(text)["input_ids"]

    item = Needle()._item(_tokenizer, index, length, seed)
    name, answer = item.meta["name"], item.answers[0]
    start = next(
        place
        for place in _places(item.prompt, name)
        if answer in item.prompt[place:].split("\n", 1)[0]
        or answer in item.prompt[:place].rsplit("\n", 1)[-1]
    )
    begin = item.prompt.rfind("\n", 0, start) + 1
    end = item.prompt.index("\n", start)
    where = item.prompt.index(answer, begin)
    fact = (len(ids(item.prompt[:begin])), len(ids(item.prompt[:end])))
    value = (len(ids(item.prompt[:where].rstrip())), len(ids(item.prompt[: where + len(answer)])))
    tokens = ids(item.prompt)
    # All prompts of a length are read in one batch: a few tokens of text are put before the first.
    missing = length - len(tokens)
    middle = len(tokens) // 2
    tokens = [tokens[0], *tokens[middle : middle + missing], *tokens[1:]]
    known = {"answer": answer, "meta": item.meta, "fact": [x + missing for x in fact],
             "value": [x + missing for x in value]}  # fmt: skip
    return tokens, known


def _places(text: str, word: str) -> list[int]:
    places, place = [], text.find(word)
    while place >= 0:
        places.append(place)
        place = text.find(word, place + 1)
    return places


def prepare(folder: Path, tokenizer: Path, counts: dict[int, int], seed: int, workers: int) -> None:
    """Write the prompts of every length that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = {
        n: count for n, count in counts.items() if not _file(folder, n, count, seed).exists()
    }
    tasks = [(i, n, seed) for n, count in sorted(missing.items()) for i in range(count)]
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(str(tokenizer),)
    ) as pool:
        done = iter(pool.map(_write, tasks))
        for length, count in sorted(missing.items()):
            rows = [next(done) for _ in range(count)]
            arrays = {"ids": np.array([ids for ids, _ in rows], np.uint16)}
            about = {"items": json.dumps([known for _, known in rows])}
            write_atomically(
                _file(folder, length, count, seed),
                lambda path, arrays=arrays, about=about: save_file(arrays, str(path), about),
            )


def _file(folder: Path, length: int, count: int, seed: int) -> Path:
    return folder / f"needle-{length}-{count}-{seed}.safetensors"


def load(folder: Path, length: int, count: int, seed: int, wait: float = 900) -> list[Prompt]:
    """Return the prompts of a length; waits for the process that writes them."""
    path, started = _file(folder, length, count, seed), time.monotonic()
    while not path.exists():
        if time.monotonic() - started > wait:
            raise RuntimeError(f"prompts: expected {path}, found none; run prepare() first")
        time.sleep(0.5)
    with safe_open(str(path), framework="np") as file:
        ids, items = file.get_tensor("ids"), json.loads(file.metadata()["items"])
    return [
        Prompt(row, Item("", (known["answer"],), f"{length} tokens", known["meta"]),
               tuple(known["fact"]), tuple(known["value"]))
        for row, known in zip(ids, items, strict=True)
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- the reader


class AllKeys:
    """The other end of :class:`KeyStore`: every key is kept, in one tensor of a given length."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor | None, bias: Any = None
    ) -> Tensor:
        """Attention of new tokens over all keys so far and themselves."""
        if not self.seen:
            shape = (*key.shape[:2], self.length, key.shape[-1])
            self.key, self.value = key.new_empty(shape), value.new_empty(shape)
            self.scores = torch.zeros(shape[:3], device=key.device)
        n = key.shape[2]
        here = slice(self.seen, self.seen + n)
        self.key[:, :, here], self.value[:, :, here] = key, value
        if scores is not None:
            self.scores[:, :, here] = scores
        self.seen += n
        added = bias(self.scores[:, :, : self.seen]) if bias is not None else None
        mask = LifetimeMask.causal(self.seen, n, device=key.device)
        return attention(
            query, self.key[:, :, : self.seen], self.value[:, :, : self.seen], mask, added
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.key.numel() * self.key.element_size()


class Reader:
    """A trained model that reads in chunks; ``retention`` None keeps every key."""

    def __init__(self, model: Any, theta: float, retention: Retention | None, bias: bool) -> None:
        self.model, self.theta, self.retention, self.bias = model, theta, retention, bias
        self.device = model.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.layers = model.model.layers

    def start(self, length: int) -> None:
        """Begin new sequences of up to ``length`` tokens."""
        self.seen = 0
        self.stores = [
            AllKeys(length) if self.retention is None else KeyStore(self.retention)
            for _ in self.layers
        ]

    def read(self, ids: Tensor) -> Tensor:
        """Read tokens [b, n] and return the last one's logits [b, vocabulary]."""
        batch, n = ids.shape
        where = torch.arange(self.seen, self.seen + n, device=self.device).repeat(batch)
        dim = self.model.config.head_dim
        cos, sin = rotary_tables(where, dim, self.theta, self.dtype)
        x = F.embedding(ids.flatten(), self.model.model.embed_tokens.weight)
        for layer, store in zip(self.layers, self.stores, strict=True):
            a, m = layer.self_attn, layer.mlp
            q, k, v = before_attention(
                x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight,
                a.v_proj.weight, cos, sin,
            )  # fmt: skip
            query, key, value = (p.unflatten(0, (batch, n)).transpose(1, 2) for p in (q, k, v))
            score = getattr(a, "dynmask_score", None)
            scores = key.new_zeros(key.shape[:3], dtype=torch.float32)
            if score is not None:
                plain = _rotate(k, cos, -sin).unflatten(0, (batch, n)).transpose(1, 2)
                scores = score(plain, value)
            bias = score.bias if score is not None and self.bias else None
            mixed = store.attend(query, key, value, scores, bias=bias)
            mixed = mixed.transpose(1, 2).reshape(batch * n, -1)
            x = after_attention(
                x, mixed, a.o_proj.weight, layer.post_attention_layernorm.weight,
                m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
            )  # fmt: skip
        self.seen += n
        last = x.view(batch, n, -1)[:, -1]
        last = _norm(last, self.model.model.norm.weight).to(self.dtype)
        return F.linear(last, self.model.model.embed_tokens.weight.to(self.dtype)).float()

    @torch.inference_mode()
    def answer(self, ids: Tensor, chunk: int = CHUNK) -> tuple[list[list[int]], list[Tensor]]:
        """Return what follows prompts [b, n] greedily, and the positions held when they ended.

        Positions are [b, g, slots] of each layer, none where every key is held.
        """
        self.start(ids.shape[1] + ANSWER_TOKENS)
        logits = None
        for part in ids.split(chunk, dim=1):
            logits = self.read(part)
        held = [store.positions.clone() for store in self.stores if isinstance(store, KeyStore)]
        found: list[Tensor] = []
        for _ in range(ANSWER_TOKENS):
            assert logits is not None
            found.append(logits.argmax(-1))
            logits = self.read(found[-1][:, None])
        rows = torch.stack(found, dim=1).tolist()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows], held


def recalled(held: list[Tensor], spans: list[tuple[int, int]]) -> np.ndarray:
    """Return the share of each row's span that each head holds: [row, layer, head]."""
    rows = []
    for row, (start, stop) in enumerate(spans):
        inside = [((p[row] >= start) & (p[row] < stop)).sum(-1) / (stop - start) for p in held]
        rows.append(torch.stack(inside).cpu().numpy())
    return np.stack(rows)


def evaluate(
    reader: Reader, tokenizer: Any, prompts: list[Prompt], until: float, batch: int | None = None
) -> dict[str, Any]:
    """Return accuracy, what was held, time and memory; stops early at ``until`` (monotonic)."""
    length = len(prompts[0].ids)
    most = max(1, ROWS_OF_A_STEP // min(length, CHUNK))
    if reader.retention is None:
        most = max(1, min(most, 2**21 // length))
    most = min(batch or most, len(prompts))
    cuda = reader.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    right: list[float] = []
    facts: list[np.ndarray] = []
    values: list[np.ndarray] = []
    wrong: list[dict[str, Any]] = []
    started = time.monotonic()
    for first in range(0, len(prompts), most):
        some = prompts[first : first + most]
        ids = torch.from_numpy(np.stack([p.ids for p in some]).astype(np.int64))
        answers, held = reader.answer(ids.to(reader.device))
        for prompt, answer in zip(some, answers, strict=True):
            text = tokenizer.decode(answer)
            right.append(Needle().score(prompt.item, text))
            if right[-1] < 1:
                wrong.append({**prompt.item.meta, "expected": prompt.item.answers[0],
                              "received": text})  # fmt: skip
        if held:
            facts.append(recalled(held, [p.fact for p in some]))
            values.append(recalled(held, [p.value for p in some]))
        if time.monotonic() > until:
            break
    row: dict[str, Any] = {
        "length": length, "n": len(right), "accuracy": sum(right) / len(right),
        "interval": wilson(sum(right), len(right)),
        "seconds": round(time.monotonic() - started, 1), "batch": most,
        "cache_bytes_per_sequence": sum(s.nbytes for s in reader.stores) // min(most, len(some)),
        "wrong": wrong[:8],
    }  # fmt: skip
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if facts:
        good = np.array(right) == 1
        for name, table in (("fact", np.concatenate(facts)), ("value", np.concatenate(values))):
            row[f"{name}_recall"] = table.mean(0).round(3).tolist()  # [layer][head]
            for case, chosen in (("right", good), ("wrong", ~good)):
                if chosen.any():
                    # the head that holds most of it: no answer without one
                    best = table[chosen].max((1, 2)).mean()
                    row[f"{name}_recall_best_head_{case}"] = round(float(best), 3)
    return row


def wilson(right: float, n: int, z: float = 1.96) -> list[float]:
    """Return the Wilson interval of a share."""
    share, extra = right / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * (share * (1 - share) / n + extra / (4 * n)) ** 0.5
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]
