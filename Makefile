# Every target sets up what it needs: on a fresh machine, python3 and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed
# Read from constraints.txt, so that the version is written down once.
TORCH := $(shell grep '^torch==' constraints.txt)

# Two test workers with one thread each: small models gain nothing from more, and oversubscribed cores lose a lot.
WORKERS ?= 2
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint docs format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

# torch goes in first and alone: a build that is already there (CPU-only, another CUDA) then stays as it is.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,glue]'
	touch $@

demo: $(STAMP)  ## train a small BERT on generated sentences and prune it
	$(BIN)/python glue_scripts/run_glue.py --task_name demo

test: $(STAMP)  ## run the fast tests (every module, some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)  ## run the slow tests too, but not the exhaustive ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not exhaustive"

test-all: $(STAMP)  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS)  ## build the pages of docs/ into site/
	$(BIN)/mkdocs build --strict --quiet

format: $(STAMP)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete the environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist site *.egg-info
