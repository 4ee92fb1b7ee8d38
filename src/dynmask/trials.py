"""Trials of gates: their costs, and the journal that an interrupted calibration goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynmask.checkpoint import unreadable, write_atomically
from dynmask.errors import bad
from dynmask.judge import Judge
from dynmask.policies.gated import Gates

__all__ = ["Trials", "known_of", "read_journal"]

_JOURNAL = "dynmask_budgets"


class Trials:
    """The cost, with a progress bar of trials, and a journal that is written as they come."""

    def __init__(self, judge: Judge, path: Path | None, identity: Any, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.judge, self.path, self.identity = judge, path, identity
        self.bar = tqdm(desc="trials", unit="trial", disable=not shown)

    def __enter__(self) -> Callable[[Gates, float], float]:
        """Return the cost."""
        if self.path is not None:
            self._write()  # a path that cannot be written fails before the work
        return self._cost

    def __exit__(self, *error: object) -> None:
        """Leave the journal whole, also on Ctrl-C."""
        self.bar.close()
        if self.path is not None:
            self._write()

    def _cost(self, gates: Gates, most: float) -> float:
        before = self._measured()
        found = self.judge.cost(gates, most)
        self.bar.update()
        self.bar.set_postfix_str(f"kl {found:.4f}")
        if self.path is not None and self._measured() > before and self._measured() % 20 == 0:
            self._write()
        return found

    def _measured(self) -> int:
        """Gates of which something is known."""
        return len(self.judge.known) + len(self.judge.above)

    def _write(self) -> None:
        assert self.path is not None
        content = {
            _JOURNAL: 2, "identity": self.identity,
            "known": self.judge.known, "above": self.judge.above,
        }  # fmt: skip
        write_atomically(self.path, json.dumps(content).encode())


def read_journal(path: Path) -> tuple[Any, list[dict[str, float]]]:
    """Which calibration an earlier one was, what it measured, and what it knows to be above.

    Raises:
        ValueError: another file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = [
            {str(name): float(kl) for name, kl in content[kind].items()}
            for kind in ("known", "above")
        ]
        return content["identity"] if content[_JOURNAL] == 2 else None, known
    except Exception as error:
        raise unreadable(path, "a calibration of gates", error) from error


def known_of(path: Path, identity: Any) -> list[dict[str, float]]:
    """What an earlier run of the same calibration measured, and what it knows to be above."""
    its, known = read_journal(path)
    if its != identity:
        raise bad(
            "checkpoint",
            "one of the same model, documents, settings and seed",
            f"{path}, which is of another run",
            "Delete it, or name another file.",
        )
    return known
