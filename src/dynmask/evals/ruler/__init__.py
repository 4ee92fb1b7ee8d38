"""RULER-style tasks: the 13 configurations of RULER (arXiv 2404.06654), generated offline.

Structure and parameters are the published ones: what is hidden, how often, how many tokens an
answer may have, how answers are scored. Words, sentences and documents are the project's own:
prose is that of :class:`dynmask.evals.Needle` instead of essays, and the questions of ``qa_1``
and ``qa_2`` are about invented people and bridges instead of SQuAD and HotpotQA. Scores are
therefore comparable between policies and models, not with published RULER numbers.
"""

from __future__ import annotations

from .base import Draft, Family, Material
from .suite import TASKS, Ruler, write

__all__ = ["TASKS", "Draft", "Family", "Material", "Ruler", "write"]
