# `make run` and `make test` need Python 3.11 to 3.13, make and pip, and nothing else: they build .venv first.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; \
	done)
SCENARIO ?= quickstart
BENCH ?= peers
# More than the two cores that they need: some tests mostly wait for processes of their own.
JOBS ?= 3

# One thread a process: the matrices are small, and the tests run side by side.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install run test lint types faults audit bench docs wheel clean

help:  ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

install: .venv/installed  ## Make .venv and install the locked versions into it

run: .venv/installed  ## Train a federation: make run SCENARIO=quickstart
	.venv/bin/grpo-fed run $(SCENARIO)

test: .venv/installed  ## Run the tests: make test JOBS=3 ARGS='-k blocks'
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/installed  ## Check style and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: .venv/installed  ## Check types, strictly
	.venv/bin/mypy

faults: .venv/installed  ## Let a dozen faults of all kinds happen to runs on this machine
	.venv/bin/python -m benchmarks.faults --part short

audit: .venv/installed  ## Search for secrets, and for known weaknesses of the locked dependencies
	.venv/bin/python .ci/audit.py

bench: .venv/installed  ## Measure, beside others: make bench BENCH=peers ARGS=--help
	.venv/bin/python -m benchmarks.$(BENCH) $(ARGS)

docs: .venv/docs  ## Write the site of the documentation to build/site; links are checked
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet
	@echo "build/site/index.html"

wheel: .venv/installed  ## Build a wheel, to be installed by pip install dist/grpo_fed-....whl
	.venv/bin/python -c 'from hatchling.build import build_wheel; print("dist/" + build_wheel("dist"))'

clean:  ## Remove .venv and caches
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A Python without ensurepip (as Debian ships it) cannot put pip into a new environment: pip outside does it then.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: name one with make PYTHON=..." >&2; exit 1; }
	@echo "installing into .venv; the first time takes minutes"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

.venv/docs: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@
