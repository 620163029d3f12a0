# make PYTHON=python3.12 VENV=path chooses the interpreter and the folder of the environment.
PYTHON ?=
VENV ?= .venv
ARGS ?=
# make reproduce
TABLE ?=
TEXTS ?=
DRY ?=
SETUP = PYTHON='$(PYTHON)' VENV='$(VENV)' scripts/setup.sh
IN = OMP_WAIT_POLICY=PASSIVE '$(VENV)/bin/python' -m

.PHONY: help setup setup-dev setup-demo demo window reproduce gpu-evidence browser test test-online test-vllm lint format-check style types docs build clean

help:
	@echo "make demo    install what the demo needs (about a minute), fetch the default model (93 MB),"
	@echo "             prune it, show the result"
	@echo "make window  install the same, serve the default model on a free port, print the page's link;"
	@echo "             ARGS='--open --sparsity 0.5' passes flags to dart-llm serve"
	@echo "make test    set up and run the tests in two processes; ARGS='-k name' selects tests,"
	@echo "             ARGS='-m full' runs every combination of methods, shapes and dtypes"
	@echo "make docs    build the site in build/site, failing on warnings; ARGS=serve shows it live"
	@echo "make build   build a wheel and an sdist in build/dist, and try them in a clean environment"
	@echo "make reproduce TABLE=name  run a published table's commands again; without TABLE list tables;"
	@echo "             TEXTS=folder, TEXTS=hub and DRY=1: see docs/measurements.md"
	@echo "make gpu-evidence  on a machine with a CUDA GPU, run contract tests and time decoding, and write"
	@echo "             benchmarks/results/gpu-CARD.json and .md; ARGS='--models smollm2-135m' is shorter"
	@echo "make test-online  run the tests that need the hub: data sets and a model (about 1 GB)"
	@echo "make test-vllm  test the plug-in for vLLM in .venv-vllm (VLLM_VENV=path), which is created first:"
	@echo "             3.3 GB, five minutes; ARGS=--if-changed: only if it changed since it last passed"
	@echo "make setup   create the environment in $(VENV) and install dart-llm with all its extras"
	@echo "make lint    check format, style, imports and types"
	@echo "make clean   remove the environment, builds and caches; results stay"
	@echo "Variables: PYTHON=python3.12 (default: python3), VENV=path (default: .venv)"

setup:
	@$(SETUP) all

setup-dev:
	@$(SETUP) dev

setup-demo:
	@$(SETUP) demo

demo: setup-demo
	@'$(VENV)/bin/dart-llm' demo
	@echo "next: . $(VENV)/bin/activate"

window: setup-demo
	@'$(VENV)/bin/dart-llm' serve --port 0 --method dart --sparsity 0.1 $(ARGS)

reproduce: setup
	@OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=2000 '$(VENV)/bin/python' benchmarks/reproduce.py $(TABLE) \
	  $(if $(TEXTS),--texts '$(TEXTS)') $(if $(DRY),--dry-run)

gpu-evidence:
	@$(SETUP) gpu
	@OMP_WAIT_POLICY=PASSIVE '$(VENV)/bin/python' benchmarks/gpu_evidence.py $(ARGS)

browser:
	@scripts/browser.sh

test: setup-dev
	@OMP_NUM_THREADS=1 $(IN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-online: setup-dev
	@DART_TEST_ONLINE=1 HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 $(IN) pytest tests/models/test_online.py $(ARGS)

test-vllm:
	@PYTHON='$(PYTHON)' scripts/test_vllm.sh $(ARGS)

format-check: setup-dev
	@$(IN) ruff format --check .
	@'$(VENV)/bin/clang-format' --dry-run --Werror src/dart_llm/native/csrc/* tests/native/*.cpp tests/native/*.h

style: setup-dev
	@$(IN) ruff check .
	@'$(VENV)/bin/lint-imports'

types: setup-dev
	@$(IN) mypy

docs: setup-dev
	@'$(VENV)/bin/python' benchmarks/tables.py --check
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true '$(VENV)/bin/mkdocs' $(or $(ARGS),build) --strict

build: setup-dev
	@scripts/try_build.sh '$(VENV)/bin/python'

lint: format-check style types

clean:
	@if [ -f '$(VENV)/.dart-llm-created' ]; then rm -rf '$(VENV)'; fi
	@if [ -f .venv-vllm/.dart-llm-created ]; then rm -rf .venv-vllm; fi
	@rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
