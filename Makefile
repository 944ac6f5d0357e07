# The same four targets locally, in CI and in the README. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo check test faults clean

setup: .venv/ready

# pip and not uv: on this ground torch's CPU build is found by pip's configuration only.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/memory3 demo

check: setup
	$(BIN)/ruff format --check memory3 tests
	$(BIN)/ruff check memory3 tests
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest

# The fault campaign on banks in full: it takes many minutes. Its small form is one of the tests.
faults: setup
	$(BIN)/python tests/faults.py

clean:
	rm -rf .venv runs build dist demo-bank
