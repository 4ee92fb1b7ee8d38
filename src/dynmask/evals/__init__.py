"""Evaluations: one task is one file; a report says what a mask cost and what it kept.

``evaluate`` asks a task's questions under several policies; ``dynmask.evals.perplexity`` reads
long text; ``dynmask.evals.harness`` asks the lm-evaluation-harness's tasks; ``write_page``,
``dynmask.evals.plots`` and ``dynmask.evals.gallery`` draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .document_qa import DocumentQA
    from .engine import Interrupted, evaluate
    from .lines import Lines
    from .longeval import LongEval
    from .needle import Needle
    from .page import write_page
    from .report import Report
    from .ruler import Ruler
    from .task import Item, Task

__all__ = [
    "DocumentQA",
    "Interrupted",
    "Item",
    "Lines",
    "LongEval",
    "Needle",
    "Report",
    "Ruler",
    "Task",
    "evaluate",
    "write_page",
]

_FILES = {
    "DocumentQA": ".document_qa",
    "Interrupted": ".engine",
    "Item": ".task",
    "Lines": ".lines",
    "LongEval": ".longeval",
    "Needle": ".needle",
    "Report": ".report",
    "Ruler": ".ruler",
    "Task": ".task",
    "evaluate": ".engine",
    "write_page": ".page",
}


def __getattr__(name: str) -> object:
    """Load a file when something of it is first asked for: a task's words need no model."""
    if name not in _FILES:
        raise AttributeError(f"module 'dynmask.evals' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FILES[name], __name__), name)
