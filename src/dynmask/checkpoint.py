"""Files that interrupted work goes on from, and how any file is written: whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import bad

__all__ = ["read_checkpoint", "unreadable", "write_atomically"]


def read_checkpoint(path: Path, name: str, left: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a checkpoint; nothing of it is trusted yet.

    Args:
        path: of the file.
        name: under which the description lies in the file's metadata.
        left: what leaves such a file, for the error.

    Raises:
        ValueError: a file that is none, of another kind, or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})[name])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if not isinstance(about, dict):
            raise TypeError(type(about).__name__)
    except Exception as error:
        raise unreadable(path, left, error) from error
    return about, tensors


def unreadable(path: Path, left: str, error: Exception) -> ValueError:
    """The error about a checkpoint that cannot be read."""
    return bad(
        "checkpoint",
        f"a file that {left} left",
        f"{path}, which cannot be read ({type(error).__name__})",
        "Delete it, or name another file.",
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: an interruption leaves no half-written file."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a card is as readable as any file of its owner's.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
