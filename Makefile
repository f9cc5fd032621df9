# Everything runs from an environment of its own in .venv; nothing but Python 3.11+, make and a package
# registry is needed. Another torch: make test TORCH="torch==2.13.0 torchvision==0.28.0"
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch torchvision
BIN    := $(VENV)/bin
JOBS   ?= 2
# The tests and benchmarks start modelcli hundreds of times. Without bytecode files each start would compile all of it.
unexport PYTHONDONTWRITEBYTECODE

TESTS = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not sweep"

# The oldest pair that pyproject.toml allows. It has wheels for Python 3.11 to 3.13: PYTHON=python3.13 picks one.
OLDEST      := torch==2.6.0 torchvision==0.21.0
VENV_OLDEST := .venv-oldest

# A plain file per step: a second run reuses the environment, and a changed pyproject.toml mends it. The stamp's
# name carries the choice of torch, so that another choice is not mistaken for this one.
STAMP     := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
DEV_STAMP := $(STAMP)-dev

.PHONY: help demo test test-long test-oldest tests-alone check fix golden readme docs bench fuzz torture clean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(TORCH) --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade $(TORCH) --editable '.[dev]'
	@npm install --silent --no-save --no-audit --no-fund --fetch-retries 0 --fetch-timeout 20000 --prefix $(VENV)/npm axe-core@4 2>/dev/null \
		|| echo "no axe-core from npm: the tests of the accessibility of pages skip what it would check"
	@touch $@

demo: $(STAMP) ## install, and run the story of the README, each command before its output
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/story.sh

test: check ## install, check, and run the tests
	$(TESTS)

test-long: check ## the tests and the sweeps over every torchvision builder and many model types
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-oldest: ## the tests on the oldest torch and torchvision that modelcli takes, in .venv-oldest
	$(MAKE) tests-alone VENV=$(VENV_OLDEST) TORCH='$(OLDEST)'

tests-alone: $(DEV_STAMP)
	$(TESTS)

check: $(DEV_STAMP) ## format, lint, types, layers
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

fix: $(DEV_STAMP) ## mend what can be mended
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

golden: $(DEV_STAMP) ## write the golden files anew; read the diff before you commit it
	GOLDEN=write $(BIN)/python -m pytest -q tests/render/test_golden.py

readme: $(DEV_STAMP) ## write the tables of the README anew that are made from declarations
	$(BIN)/python -m tests.cli.readme_tables

docs: $(DEV_STAMP) ## make the pictures of the README anew, from real runs; the page of a model needs Chromium
	$(BIN)/python -m tests.cli.readme_pictures

bench: $(DEV_STAMP) ## how long things take, as ratios to stated peers
	$(BIN)/python -m tests.benchmarks.bench_reading
	$(BIN)/python -m tests.benchmarks.bench_writing
	$(BIN)/python -m tests.benchmarks.bench_peers
	$(BIN)/python -m tests.benchmarks.bench_state_dicts
	$(BIN)/python -m tests.benchmarks.bench_ranks
	$(BIN)/python -m tests.benchmarks.bench_report
	$(BIN)/python -m tests.benchmarks.simulated_ranks
	$(BIN)/python -m tests.benchmarks.bench_distributed

fuzz: $(DEV_STAMP) ## a million damaged inputs for every parser and language, and beside torch; fewer: make fuzz INPUTS=1000
	$(BIN)/python -m tests.fuzz

torture: $(DEV_STAMP) ## writers killed at random moments, 200 times by each of three signals; fewer: make torture TIMES=30 (10 by each)
	$(BIN)/python -m tests.torture

clean: ## remove the environment and what tools left
	rm -rf $(VENV) $(VENV_OLDEST) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
