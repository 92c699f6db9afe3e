# make demo    distil the built-in teacher and open the report that it prints
# make test    run the tests
# make lint    check style
# make peft-suite   run PEFT's own tests on LoRaD; they are fetched from PyPI
# make setup   only the virtual environment (the others call it)
# make clean   remove the environment and all caches; runs/ stays

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The first Python that fits; or say: make setup PYTHON=/path/to/python
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(p) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(p))))
# Two --quiet leave only errors; without --no-compile pip compiles thousands of files that nobody imports
PIP := $(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' requirements-lock.txt)

.PHONY: setup demo test lint peft-suite clean

setup: $(READY)

$(READY): pyproject.toml requirements-lock.txt
	@test -n "$(PYTHON)" || { echo "wadi needs Python 3.10 to 3.13; found: $$(python3 --version 2>&1)" >&2; exit 1; }
	@echo "setup: $$($(PYTHON) --version), environment in $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then \
		echo "setup: torch $(TORCH)"; \
		$(PIP) torch==$(TORCH); \
	else \
		echo "setup: torch $(TORCH) for the CPU (no NVIDIA GPU found)"; \
		$(PIP) --no-deps --retries 2 --extra-index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)+cpu; \
	fi
	@echo "setup: wadi and what it needs, versions of requirements-lock.txt"
	@$(PIP) --constraint requirements-lock.txt --editable ".[control,data,tensorboard,dev]"
	@touch $@

demo: setup
	@$(BIN)/wadi demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: setup
	@echo "test: pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile

peft-suite: setup
	@$(BIN)/python peft_suite/run.py --numprocesses 2

lint: setup
	@echo "lint: ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

clean:
	@echo "clean: $(VENV) and caches"
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
