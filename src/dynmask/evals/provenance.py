"""How a number was measured: versions, device, commit and the model's identity."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..fingerprints import fingerprint

__all__ = ["environment", "machine", "model_name"]


def environment(model: torch.nn.Module) -> dict[str, Any]:
    """Return versions, device, dtype, commit, date and the model's identity for a report."""
    parameter = next(model.parameters())
    return {
        **machine(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "model": {
            "name": model_name(model),
            "architecture": type(model).__name__,
            "parameters": sum(tensor.numel() for tensor in model.parameters()),
            "fingerprint": fingerprint(model),
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return date, commit, versions and device: what every measured number carries."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers", "dynmask")},
        },
        "device": {
            "type": device.type,
            "name": _device_name(device),
            "threads": torch.get_num_threads(),
        },
    }


def model_name(model: torch.nn.Module) -> str:
    """Return the last part of the model's path or hub name, or its class."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return Path(path).resolve().name if path else type(model).__name__


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit this file is tracked in, ``+changes`` added for a changed tree."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # Installed into an environment inside somebody else's repository, this file is untracked,
        # and that repository's commit would say nothing about this code.
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
