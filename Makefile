# make quickstart   the whole main job, small: corpus, tokenizer, training, export, generation
# make test         every test
# make check        lint, format, types, import rules
# make clean        remove what these made; runs/ stays
#
# The first call installs into .venv. Choices, as in `make test PYTHON=python3.12`:
#   PYTHON        interpreters to try for .venv, 3.10 or later
#   TORCH_INDEX   package index that torch alone comes from: https://download.pytorch.org/whl/cpu, .../cu128; empty: pip's own

PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10
TORCH_INDEX ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test check clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	@$(VENV)/bin/python launchers/quickstart.py

test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest --quiet

check: $(INSTALLED)
	@$(VENV)/bin/ruff check --quiet
	@$(VENV)/bin/ruff format --check --quiet
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m pytest --quiet tests/test_import_rules.py

clean:
	rm -rf $(VENV) quickstart_run build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: none of [$(PYTHON)] is Python 3.10 or later; say make PYTHON=/path/to/python" >&2; exit 1

# torch comes first and without its dependencies, which its index need not have; the second line fetches those as well
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); the first time takes minutes ..."
	@if [[ -n "$(TORCH_INDEX)" ]]; then $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch; fi
	@$(PIP) install -c constraints.txt -e '.[train,data,hf,dev]'
	@touch $@
