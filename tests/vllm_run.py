"""Processes of vLLM for the tests: their environment, one engine's answers, a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

PLUGINS = """[vllm.general_plugins]
dynmask = dynmask.integrations.vllm:register
dynmask_test_ops = tests.vllm_ops:register
"""


def environment(folder: Path, **own: str) -> dict[str, str]:
    """The environment of a vLLM process on a CPU that finds this checkout's plugin.

    An entry point is found by the metadata of an installed package: here that of one in ``folder``.
    """
    metadata = folder / "plugins" / "dynmask_tests-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dynmask-tests\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(PLUGINS)
    paths = [str(ROOT / "src"), str(ROOT), str(metadata.parent)]
    left = {k: v for k, v in os.environ.items() if not k.startswith(("DYNMASK_", "TRITON_"))}
    return left | {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **own,
    }


def ask(
    folder: Path,
    model: str | Path,
    prompts: list[list[int]],
    tokens: int,
    own: dict[str, str],
    check: bool = True,
    **engine: Any,
) -> tuple[list[list[int]], str]:
    """Greedy tokens of a new engine, and what it said on standard error.

    Args:
        folder: for files.
        model: of the engine.
        prompts: token ids.
        tokens: to generate for each.
        own: environment variables.
        check: fail where the engine does; else the answer is empty.
        engine: further arguments of ``vllm.LLM``.
    """
    question, answer = folder / "question.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    engine = {"model": str(model), "dtype": "float32", "max_num_seqs": 4} | engine
    asked = {"engine": engine, "prompts": prompts, "tokens": tokens}
    question.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_child", str(question), str(answer)],
        env=environment(folder, **own), cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode:
        assert not check, said[-4000:]
        return [], said
    return json.loads(answer.read_text(encoding="utf-8")), said


__all__ = ["ROOT", "ask", "environment"]
