# Every target sets itself up: `make test` on a fresh clone makes .venv, installs, and runs. Needs Python 3.11+.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   ARGS="..."          passed on to what the target runs: make test ARGS="tests/adapters -x"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo serve test lint check proto bench churn loadtest install
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo $(ARGS)

serve: $(VENV)/.installed
	$(BIN)/lorikeet serve $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/buf lint
	PYTHON=$(CURDIR)/$(BIN)/python scripts/proto --check

# What the design promises and a machine can check: who may import whom, and the types.
check: $(VENV)/.installed-dev
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: $(VENV)/.installed-dev
	PYTHON=$(CURDIR)/$(BIN)/python scripts/proto

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.engine $(ARGS)

# Clients on adapters that change under their feet, every answer compared with PEFT's; some minutes.
churn: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.churn $(ARGS)

# A short load on a server of its own with the embedded base; ARGS="compare" for the comparison of ways to serve.
loadtest: $(VENV)/.installed-dev
	$(BIN)/python -m loadtest $(or $(ARGS),run)

install: $(VENV)/.installed-dev

# torch goes first and alone: a CPU build that is already there, or that pip's configured index offers, is kept.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	@touch $@
