# Every target makes its own environment: .venv, from one of the two locks. PYTHON picks the interpreter (3.11 to 3.13),
# ACCELERATOR the lock: cpu, cuda, or auto, which looks for a GPU on this machine. TORCH=any takes torch's CUDA build into
# an environment for CPUs where pip finds no other.
PYTHON ?= python3
ACCELERATOR ?= auto
TORCH ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# One thread per process: the multi-rank tests would otherwise fight for the cores. The quickstart sets its own.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1
# Each worker of the tests keeps one core and up to 2 GB of memory busy; the group of tests that start ranks, all cores.
WORKERS ?= 2
WORKERS_OF_TESTS := --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

# What meets megatron-core, whose version the interpreter decides.
MEETS_MEGATRON := $(addprefix tests/unit/,model runtime optim checkpoint train) tests/distributed tests/parity \
	tests/integration/test_pretrain.py
SHORTLY := $(addprefix tests/unit/,model runtime optim) tests/distributed/test_golden.py tests/parity/test_plain_decoder.py
OTHER_VENV = .venv$(shell "$(PYTHON)" -c 'import sys; print("%d%d" % sys.version_info[:2])')

.PHONY: help check build test test-fast test-megatron test-python test-gpu test-slurm mutants soak quickstart clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

check: $(INSTALLED) ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: $(INSTALLED) ## the environment and the C++ extension

test: $(INSTALLED) ## all CPU tests, in WORKERS=2 processes
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(WORKERS_OF_TESTS)

test-fast: $(INSTALLED) ## those that take no seconds each, for the inner loop
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(WORKERS_OF_TESTS) -m "not gpu and not slurm and not slow"

test-megatron: $(INSTALLED) ## those that meet megatron-core; SHORT=1 for the quickest of them
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(WORKERS_OF_TESTS) $(if $(SHORT),$(SHORTLY),$(MEETS_MEGATRON))

test-python: ## test-megatron in an environment of its own: PYTHON=python3.12 or 3.13
	$(MAKE) VENV="$(OTHER_VENV)" ACCELERATOR=cpu test-megatron

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

$(INSTALLED): pyproject.toml setup.py $(wildcard megatron_ext/data/*.cpp) constraints-cpu.txt constraints-cuda.txt .ci/install .ci/cpu_torch.py
	.ci/install "$(PYTHON)" "$(VENV)" "$(ACCELERATOR)" "$(TORCH)"
