"""headline.jsonl: one row for every number that was asked for, rewritten when measured again."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from dynmask.evals.provenance import machine

FILE = Path(__file__).parent / "results" / "headline.jsonl"


def record(
    issue: int,
    goal: str,
    metric: str,
    value: float,
    target: float,
    better: str,
    device: Any,
    note: str = "",
    command: str = "",
    origin: dict[str, Any] | None = None,
    path: Path = FILE,
) -> dict[str, Any]:
    """Write one row, in place of the one for the same goal.

    Args:
        issue, goal, metric: identify the row.
        value: measured.
        target: asked for.
        better: "higher" or "lower".
        device: torch.device that the number was measured on.
        note: what bounds a number that was not reached.
        command: what was run; this process's command line when empty.
        origin: date, commit, versions and device of a measurement made earlier.
        path: the file to write.
    """
    here = origin or machine(device)
    row = {
        "issue": issue,
        "goal": goal,
        "metric": metric,
        "value": value,
        "target": target,
        "better": better,
        "met": value >= target if better == "higher" else value <= target,
        "device": here["device"]["name"],
        "threads": here["device"]["threads"],
        "versions": here["versions"],
        "commit": here["commit"],
        "command": command or "python " + " ".join(sys.argv),
        "date": here["date"],
    }
    if note:
        row["note"] = note
    rows = [
        r for r in rows_of(path) if (r["issue"], r["goal"], r["metric"]) != (issue, goal, metric)
    ]
    write_rows(path, sorted([*rows, row], key=lambda r: (r["issue"], r["goal"], r["metric"])))
    return row


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; none when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
