# Every target makes its own environment: .venv, from one of the two locks. PYTHON picks the interpreter (3.11 or 3.12),
# ACCELERATOR the lock: cpu, cuda, or auto, which looks for a GPU on this machine.
PYTHON ?= python3
ACCELERATOR ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# One thread per process: the multi-rank tests would otherwise fight for the cores. The quickstart sets its own.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1

.PHONY: help check build test test-gpu test-slurm mutants soak quickstart clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

check: $(INSTALLED) ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: $(INSTALLED) ## the environment and the C++ extension

test: $(INSTALLED) ## all CPU tests
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest

test-gpu: $(INSTALLED) ## the tests that need a GPU
	@nvidia-smi -L || { echo "error: make test-gpu needs a GPU; nvidia-smi finds none" >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu

test-slurm: $(INSTALLED) ## the scripts in slurm/ under a real Slurm, which this starts and ends
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -m slurm tests/slurm

mutants: $(INSTALLED) ## plant known bugs one by one: does a test catch each? ONLY='part of a name' picks some
	$(BIN)/python -m tests.mutants $(if $(ONLY),"$(ONLY)")

soak: $(INSTALLED) ## kill a small run 100 times: is a checkpoint lost, does a bit change? Goes on where it was interrupted
	$(TEST_ENVIRONMENT) $(BIN)/python -m tests.soak

quickstart: $(INSTALLED) ## the whole way on this machine: media, tokens, decoder, Hugging Face, pictures
	$(BIN)/python examples/quickstart.py

clean: ## remove the environment and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info megatron_ext/data/*.so .pytest_cache .ruff_cache .hypothesis
	find megatron_ext tokenizer_train tools tests examples -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py megatron_ext/data/_clusters.cpp megatron_ext/data/_packing.cpp constraints-cpu.txt constraints-cuda.txt .ci/install
	.ci/install "$(PYTHON)" "$(VENV)" "$(ACCELERATOR)"
	@touch $@
