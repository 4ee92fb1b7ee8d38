"""Finished results on disk, so that a long evaluation survives an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .report import atomic_write

__all__ = ["Journal", "policy_fingerprint"]


class Journal:
    """Finished results, one JSON object a line.

    The first line identifies the run; results under another identity are discarded, never mixed.
    A line that was cut off by a crash is ignored, and so is what follows it.

    Args:
        path: the file, or None to keep nothing.
        identity: what must be equal for results to be taken over.
        resume: whether to take over at all; if not, the file starts anew.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: str, resume: bool = True
    ) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.file = None
        if path is None:
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if resume and target.is_file():
            self.found = _results(target, identity)
        lines = [json.dumps({"identity": identity})]
        lines += [json.dumps({"key": key, "result": found}) for key, found in self.found.items()]
        atomic_write(target, "\n".join(lines) + "\n")
        self.file = open(target, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a result taken over from an earlier run, or None."""
        return self.found.get(key)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Append one finished result."""
        if self.file is not None:
            self.file.write(json.dumps({"key": key, "result": result}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def _results(path: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Return the results of a journal, none if it belongs to another run."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not records or records[0] != {"identity": identity}:
        return {}
    return {record["key"]: record["result"] for record in records[1:]}


def policy_fingerprint(policy: Any) -> str:
    """Return a policy's class and plain settings, and a short hash of all that it holds.

    Equal policies have equal fingerprints in every process; ``None`` is ``"own attention"``.
    """
    if policy is None:
        return "own attention"
    digest = hashlib.sha256()
    for part in _parts(policy):
        digest.update(part)
    plain = ""
    if dataclasses.is_dataclass(policy):
        told = {item.name: getattr(policy, item.name) for item in dataclasses.fields(policy)}
        shown = (f"{k}={v}" for k, v in told.items() if isinstance(v, bool | int | float | str))
        plain = f"({', '.join(shown)})"
    return f"{type(policy).__name__}{plain}:{digest.hexdigest()[:12]}"


def _parts(value: Any) -> Iterable[bytes]:
    """Yield the content of a value in a fixed order."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, torch.nn.Module):
        yield type(value).__name__.encode()
        yield from _parts(dict(value.state_dict()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for field in dataclasses.fields(value):
            yield field.name.encode()
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}]".encode()
        for part in value:
            yield from _parts(part)
    else:
        yield repr(value).encode()
