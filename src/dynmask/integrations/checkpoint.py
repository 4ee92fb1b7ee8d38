"""Which weights the files of a model hold, without loading them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..fingerprints import fingerprint_of, sampled

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Numbers of a safetensors file that a fingerprint is made of."""

MOST_TABLE_BYTES = 2**27


class Entry:
    """One tensor of a file: its shape, and its numbers by their place."""

    def __init__(self, path: Path, start: int, entry: dict[str, Any]) -> None:
        self.path, self.shape = path, tuple(entry["shape"])
        self.dtype = DTYPES.get(entry["dtype"])
        self._start = start + entry["data_offsets"][0]

    def read(self, file: BinaryIO, places: list[int]) -> Tensor:
        """The numbers at some places of the flattened tensor."""
        assert self.dtype is not None
        size = self.dtype.itemsize
        parts = []
        for place in places:
            file.seek(self._start + place * size)
            parts.append(file.read(size))
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=self.dtype)


def checkpoint_folder(name: str) -> Path | None:
    """The folder of a model's files, where they are here: a path, or a hub name in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the hub has many ways to say that it has nothing
        return None


def fingerprint_of_files(folder: str | os.PathLike[str]) -> str | None:
    """What :func:`dynmask.fingerprints.fingerprint` says of the model in a folder.

    Sixteen numbers of each parameter are read. Returns None where files and model name their
    weights differently, so that nothing can be said: converted experts, other formats.
    """
    model = _empty(folder)
    if model is None:
        return None
    entries = _entries(Path(folder))
    wanted = sorted(model.named_parameters())
    for name, parameter in wanted:
        entry = entries.get(name)
        if entry is None or entry.dtype is None or entry.shape != tuple(parameter.shape):
            return None
    return fingerprint_of(model, _samples(entries, wanted))


def _samples(
    entries: dict[str, Entry], wanted: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, tuple[int, ...], list[float]]]:
    """Name, shape and sample of each parameter."""
    files: dict[Path, BinaryIO] = {}
    try:
        for name, _ in wanted:
            entry = entries[name]
            if entry.path not in files:
                files[entry.path] = entry.path.open("rb")
            count = 1
            for n in entry.shape:
                count *= n
            read = sampled(count, lambda at, e=entry: e.read(files[e.path], at))  # type: ignore[misc]
            yield name, entry.shape, read
    finally:
        for file in files.values():
            file.close()


def _empty(folder: str | os.PathLike[str]) -> Any:
    """The model of a folder without weights; None where transformers cannot make it."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ImportError, OSError, ValueError, KeyError, AttributeError):
        return None


def _entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder's safetensors files by name."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_TABLE_BYTES:
                return {}
            try:
                table = json.loads(file.read(length))
            except ValueError:
                return {}
        for name, entry in table.items():
            if name != "__metadata__":
                found[name] = Entry(path, 8 + length, entry)
    return found


__all__ = ["checkpoint_folder", "fingerprint_of_files"]
