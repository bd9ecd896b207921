# make demo     install and run the main job in one process, no servers      (TASK=mnist with FEDMQ_DATA set)
# make test     install what the tests need - servers too - and run them all
# make check    what CI runs: lint, types, tests
# make bench    the tables of the README

PYTHON ?= python3
TASK ?= digits
BIN := .venv/bin
VENV := .venv/installed

.PHONY: demo test check lint bench servers clean

demo: $(VENV)
	$(BIN)/fedmq demo --task $(TASK)

test: $(VENV) servers
	$(BIN)/python -m pytest

check: lint test

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV) servers
	$(BIN)/fedmq bench

servers:
	@bash ops/install_servers.sh

$(VENV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedMQ needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
