# Every target but gpu makes the environment first (.venv, from requirements*.txt), so each works on a fresh clone.
#   make env PYTHON=/path/to/python3.12     another Python than the first fitting one
#   make test ARGS="tests/model -x"         arguments for pytest; likewise for demo and bench
SHELL := /bin/bash
.DEFAULT_GOAL := help
export BOV_VENV ?= $(CURDIR)/.venv
PY = $(BOV_VENV)/bin/python
ARGS ?=

.PHONY: help env demo test faults lint format bench gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## create or update the virtual environment
	@PYTHON="$(PYTHON)" tools/setup_env.sh

demo: env  ## train BoV and baseline on this machine's text, export, evaluate, draw
	$(PY) tools/demo.py $(ARGS)

test: env  ## run the test suite
	@tools/setup_env.sh --transformers5 || echo "make test: without transformers 5, its tests are skipped"
	$(PY) -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

faults: env  ## kill, cut off and damage real runs, and say what became of them
	$(PY) -m pytest -s --durations=15 tests/faults $(ARGS)

lint: env  ## check style and types, without changing anything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: env  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: env  ## measure this machine: training step, attention, loader, table lookups
	$(PY) tools/bench.py $(ARGS)

# Without `env`: a machine with a GPU keeps the torch that it has, and may have no network.
gpu:  ## measure and test on one GPU; needs a Python with torch, PYTHON=/path/to/it
	$(or $(PYTHON),python3) tools/gpu.py $(ARGS)
