# The two commands: `make up` serves, `make test` checks everything. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help setup up test lint types unit protos bench nano clean

help:
	@echo "make up [ARGS='--port 8100']  a whole cluster on this machine, ready to chat"
	@echo "make test                     lint, types and every test"
	@echo "make setup | lint | types | unit | protos | bench NAME=... | clean"
	@echo "make nano                     train the demonstration model anew"

# One stamp for what serving needs, one for what checking needs on top; both are made anew when the dependencies change.
$(VENV)/serve.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ossia needs Python 3.11 or newer: name one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[worker]'
	@touch $@

$(VENV)/check.stamp: $(VENV)/serve.stamp tests/deploy/chart-tools.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[worker,dev,clients]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement tests/deploy/chart-tools.txt
	@touch $@

# checkov needs older releases of what the project uses, so it lives apart.
$(VENV)/checkov.stamp: $(VENV)/serve.stamp tests/deploy/checkov.txt
	@test -x $(VENV)/checkov/bin/python || $(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement tests/deploy/checkov.txt
	@touch $@

# What the examples for Node and their tests run with.
$(VENV)/node.stamp: $(VENV)/serve.stamp examples/node/package.json
	@./tests/install_system_packages.sh
	@npm install --prefix examples/node --no-package-lock --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

# At once: they stand on what serving needs, and not on each other.
setup: $(VENV)/serve.stamp
	@$(MAKE) --no-print-directory --jobs 3 $(VENV)/check.stamp $(VENV)/checkov.stamp $(VENV)/node.stamp
	@./tests/install_system_packages.sh

up: $(VENV)/serve.stamp
	@$(BIN)/ossia up $(ARGS)

test: setup lint types unit

lint: $(VENV)/check.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/check.stamp
	$(BIN)/mypy

# Two at a time, file by file: much of a test is waiting for processes to start, to die or to notice.
unit: $(VENV)/check.stamp
	$(BIN)/pytest --numprocesses 2 --dist loadfile

protos: $(VENV)/check.stamp
	$(BIN)/python -m protos.generate

bench: $(VENV)/check.stamp
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

# Hours on two cores (the card says how many); goes on where it was stopped.
nano: $(VENV)/serve.stamp
	$(BIN)/python -m models.nano.train --folder build/nano $(ARGS)
	$(BIN)/python -m models.nano.export build/nano/state.0.pt models/nano/ossia-nano.safetensors
	$(BIN)/python -m models.nano.eval

clean:
	rm -rf $(VENV)
