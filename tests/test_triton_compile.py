"""Every Triton kernel compiles for a Hopper GPU, as it is run there; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynmask.kernels import ops

ROOT = Path(__file__).parent.parent
MULTIPROCESSOR = 227 * 1024
"""Shared memory that the programs on one multiprocessor of a Hopper GPU can have."""


@pytest.mark.skipif(not ops.has_triton(), reason="needs triton")
def test_the_kernels_compile_for_hopper(tmp_path):
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(built) >= 16
    for name in ("rows backward lists", "keys backward lists"):
        assert built[name]["wgmma"], "the matrix units' fast path"
    for name in ("prefill lists", "prefill blocks"):
        assert built[name]["wgmma"], "the matrix units' fast path"
        # two programs hide each other's softmax; see docs/performance.md
        assert 2 * built[name]["shared"] <= MULTIPROCESSOR, built[name]
    assert max(line["shared"] for line in built.values()) <= MULTIPROCESSOR
