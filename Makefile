# Each target makes its own virtual environment; it is made anew only where a requirement file has changed.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.11
SEED ?= 0
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet --no-deps

# Threads that wait must not spin: on a busy machine of two cores that costs a factor of five.
export OMP_WAIT_POLICY := passive
# Tests start hundreds of processes: what all of them import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format clean-venv
.DELETE_ON_ERROR:

help:
	@echo "make quickstart [SEED=0]   train a small policy with CLIPO on this machine, about 10 minutes on two cores"
	@echo "make test                  all tests; needs no GPU"
	@echo "make check                 format, lint, types, layers"
	@echo "make format                format all files"
	@echo "make clean-venv            remove $(VENV)"

quickstart: $(VENV)/cpu.stamp
	@$(BIN)/python examples/quickstart/run.py --seed $(SEED)

test: $(VENV)/dev.stamp
	@tests/install_slurm.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --no-loadscope-reorder

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --project .
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean-venv:
	rm -rf $(VENV)

# pip is the last thing that `python -m venv` puts there, so an environment with pip is a whole one.
$(VENV)/made.stamp:
	@test -x $(BIN)/pip || { \
	  for python in $(PYTHON) python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; then \
	      echo "making $(VENV) with $$($$python --version)"; \
	      exec $$python -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "make: the pinned packages need Python 3.11; none of '$(PYTHON)', 'python3', 'python' is one." >&2; \
	  echo "      Install it with its venv module, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/cpu.stamp: $(VENV)/made.stamp requirements/cpu.txt setup.py
	@echo "installing requirements/cpu.txt into $(VENV): about 2 minutes, 3 GB"
	@$(INSTALL) --requirement requirements/cpu.txt
	@$(BIN)/python requirements/check_cpu.py
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/cpu.stamp requirements/dev.txt
	@echo "installing requirements/dev.txt into $(VENV)"
	@$(INSTALL) --requirement requirements/dev.txt
	@touch $@
