# make train: install, meta-train on the embedded data set, evaluate.   make test: install, run the tests.
PYTHON ?= python3
METADIST := .venv/bin/metadist

.PHONY: train test lint clean
train: .venv/installed
	$(METADIST) train quickstart

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; say make PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch .venv/installed

clean:
	rm -rf .venv
