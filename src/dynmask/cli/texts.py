"""Texts that a calibration reads, and the documents that are cut from them."""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .common import read_text

__all__ = ["documents", "texts"]

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")


def texts(paths: Iterable[str], field: str) -> Iterator[str]:
    """Yield the text of every source; the built-in one if there is no path.

    Raises:
        ValueError: if a path holds nothing, or a line of JSON lacks the field.
    """
    paths = list(paths)
    if not paths:
        from dynmask.evals.text import haystack_lines

        yield "\n".join(haystack_lines())
    for path in paths:
        for file in _files(path):
            if file.suffix == ".jsonl":
                yield "\n\n".join(_json_lines(file, field))
            else:
                yield read_text(file)


def _files(path: str) -> list[Path]:
    found = Path(path)
    if found.is_dir():
        files = sorted(f for f in found.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    elif found.is_file():
        files = [found]
    else:
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file())
    if not files:
        raise ValueError(
            f"--text: expected a file, a folder with {', '.join(SUFFIXES)} files or a pattern that "
            f"matches some, received {path!r}; check the path"
        )
    return files


def _json_lines(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{file}:{number}: expected a JSON object with the text field {field!r}, received "
                f"{line[:60]!r}; name the right one with --field"
            )
        yield text


def documents(tokenizer: Any, sources: Iterable[str], length: int, n: int, seed: int) -> list[Any]:
    """Return up to ``n`` pieces of ``length`` tokens, drawn from all sources with ``seed``.

    A beginning-of-sequence token that the tokenizer adds stands before every piece.
    """
    import torch

    pieces = []
    for source in sources:
        ids = list(tokenizer(source, verbose=False)["input_ids"])
        bos = tokenizer.bos_token_id
        front = [bos] if bos is not None and ids[:1] == [bos] else []
        ids = ids[len(front) :]
        step = length - len(front)
        pieces += [
            torch.tensor(front + ids[start : start + step])
            for start in range(0, len(ids) - step + 1, step)
        ]
    order = sorted(random.Random(seed).sample(range(len(pieces)), min(n, len(pieces))))
    return [pieces[index] for index in order]
