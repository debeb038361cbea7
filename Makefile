# `make help` lists the targets. All of them use .venv, which the first one creates with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
RUN_TOOLS := $(VENV)/run-tools
DEV_TOOLS := $(VENV)/dev-tools
# tests wait for signals and other processes: three keep two cores busy
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format settings tensorboard clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(RUN_TOOLS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { echo "error: Python 3.10 to 3.13 is required; select one with make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) .
	@touch $@

$(DEV_TOOLS): $(RUN_TOOLS)
	$(INSTALL) '.[dev]'
	@touch $@

demo: $(RUN_TOOLS) ## train on the built-in images: minutes on two CPU cores, downloads packages only
	$(BIN)/python -m cifar10_tl.train experiment=quickstart
	@echo "Before other commands: source $(VENV)/bin/activate"

test: $(DEV_TOOLS) ## run all tests
	$(PYTEST)

test-fast: $(DEV_TOOLS) ## run the tests that are not marked slow
	$(PYTEST) -m 'not slow'

lint: $(DEV_TOOLS) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_TOOLS) ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: $(RUN_TOOLS) ## regenerate docs/settings.md from the comments in conf/
	$(BIN)/python docs/settings.py

tensorboard: $(RUN_TOOLS) ## show all runs in a browser
	$(BIN)/tensorboard --host localhost --logdir outputs --samples_per_plugin=images=1000

clean: ## remove .venv and caches, keep data and outputs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
