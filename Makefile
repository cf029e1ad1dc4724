# Everything runs in .venv, which the first command makes from requirements.txt; `make clean` removes it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# The newest Python that JAX has wheels for; .venv-newest is left out, with a line, where there is none.
PYTHON_NEWEST ?= $(shell for p in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# What `test-jax` runs on the lowest and the newest releases.
CORE := activity aggregate collective compiled edge_cases estimator_objects helpers measure pass primitives shard_map
JAX := $(shell grep '^jax==' requirements.txt)

.PHONY: demo test test-all test-jax coverage lint types bench clean

demo: .venv/stamp
	$(BIN)/python -m experiments demo

test: .venv/stamp
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/stamp
	$(BIN)/python -m pytest

# The core tests on the lowest and on the newest releases that are supported.
test-jax: .venv-lowest/stamp $(if $(PYTHON_NEWEST),.venv-newest/stamp)
	PYTHONPATH=. .venv-lowest/bin/python -m pytest -m "not slow" $(CORE:%=tests/test_%.py)
ifneq ($(PYTHON_NEWEST),)
	PYTHONPATH=. .venv-newest/bin/python -m pytest -m "not slow" $(CORE:%=tests/test_%.py)
else
	@echo "No Python 3.13 on the PATH or in pyenv: the core tests did NOT run on the newest JAX; name one with make PYTHON_NEWEST=..."
endif

coverage: .venv/stamp
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture

types: .venv/stamp
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/stamp
	$(BIN)/python -m benchmarks.crossover --out benchmarks/results/crossover.json
	$(BIN)/python -m benchmarks.engine --out benchmarks/results/engine.json
	$(BIN)/python -m benchmarks.aggregate --out benchmarks/results/aggregate.json
	$(BIN)/python -m benchmarks.scaling --out benchmarks/results/scaling.json
	$(BIN)/python -m benchmarks.seeds --out benchmarks/results/seeds.json
	$(BIN)/python -m benchmarks.kills --out benchmarks/results/kills.json
	$(BIN)/python -m benchmarks.weighted --out benchmarks/results/weighted.json
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.tables

# Where there is an NVIDIA GPU, JAX's plugin for it goes in too.
.venv/stamp: requirements.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Expected Python 3.11, 3.12 or 3.13 on the PATH, found none; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	if command -v nvidia-smi >/dev/null; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(subst jax==,jax[cuda13]==,$(JAX))"; fi
	touch $@

.venv-lowest/stamp: PYTHON_OF = $(PYTHON)
.venv-newest/stamp: PYTHON_OF = $(PYTHON_NEWEST)
.venv-%/stamp: requirements-%.txt
	$(PYTHON_OF) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-$*.txt
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .cache
