"""Importing dynmask needs torch only, and does nothing else."""

import json
import subprocess
import sys

OPTIONAL = ["transformers", "huggingface_hub", "matplotlib", "triton", "safetensors"]


def run(code: str) -> str:
    """Standard output of a fresh interpreter; nothing may be said on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    return done.stdout


def test_import_loads_no_optional_package():
    loaded = json.loads(
        run(
            "import json, sys, torch; before = set(sys.modules)\n"
            "import dynmask\n"
            "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
        )
    )
    assert "dynmask" in loaded
    assert not set(loaded) & set(OPTIONAL)


def test_import_works_without_the_optional_packages():
    """A None in sys.modules makes the import of that name fail."""
    run(f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\nimport dynmask")


def test_import_changes_no_global_state():
    run(
        "import torch\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),\n"
        "            torch.get_rng_state().tolist(), torch.cuda.is_initialized())\n"
        "before = state()\n"
        "import dynmask\n"
        "assert state() == before"
    )


def test_functions_are_not_shadowed_by_their_modules():
    """`dynmask.calibrate` is the function whichever is imported first, likewise `attention`."""
    run(
        "from dynmask.calibrate import DamSettings\n"
        "from dynmask.attention import attention\n"
        "import dynmask\n"
        "assert callable(dynmask.calibrate) and callable(dynmask.attention)\n"
        "assert dynmask.DamSettings is DamSettings"
    )


def test_public_names_resolve():
    import dynmask

    assert dynmask.__version__
    assert all(getattr(dynmask, name) is not None for name in dynmask.__all__)
