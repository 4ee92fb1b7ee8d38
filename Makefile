# make demo | test | check | benchmark need nothing but Python 3.11 or later: they make .venv first.
#
#   PYTHON=python3.12      the interpreter that a new environment is made from
#   VENV=/some/folder      where the environment lives
#   TORCH="torch==2.13.0"  pip's arguments for PyTorch, e.g. with an index of CPU-only wheels
#   PY=python3             use this interpreter as it is and make no environment at all (for a
#                          machine without a network where the dependencies are installed)
#   ARGS="-k card"         passed on to pytest, the demo or the benchmark
#   GPU_ARGS="--peers"     passed on to the GPU half of the benchmark, which runs where a GPU is

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
ARGS ?=
GPU_ARGS ?=

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.dynmask-installed
else
ENVIRONMENT :=
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-gpu check format benchmark clean

help:
	@echo "make demo       calibrate the reference model, answer questions, print a table, draw the masks"
	@echo "make test       the tests (make test-slow, make test-gpu: the rest of them)"
	@echo "make check      lint, formatting and types (make format repairs the first two)"
	@echo "make benchmark  measure on this machine"
	@echo "make clean      remove the environment and everything that was built"

env: $(ENVIRONMENT)

# PyTorch comes first and alone: resolved together with the rest, pip may prefer another build of it.
# Its GPU builds bring the triton they fit; where none came, take the one the kernels were measured with.
$(VENV)/.dynmask-installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "dynmask needs Python 3.11 or later, $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip show --quiet triton 2>/dev/null || $(VENV)/bin/python -m pip install --quiet $(TRITON)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(ENVIRONMENT)
	$(PY) examples/demo.py $(ARGS)

test: $(ENVIRONMENT)
	$(PY) -m pytest -q $(ARGS)

test-slow: $(ENVIRONMENT)
	$(PY) -m pytest -q -m 'slow and not gpu' $(ARGS)

test-gpu: $(ENVIRONMENT)
	$(PY) -m pytest -q -m gpu $(ARGS)

check: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

benchmark: $(ENVIRONMENT)
	$(PY) benchmarks/run.py $(ARGS)
	$(PY) benchmarks/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -maxdepth 2 -name '*.egg-info' -type d -prune -exec rm -rf {} +
