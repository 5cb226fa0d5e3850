# What contributors and CI run. PYTHON chooses the interpreter; its environment needs `make install` first.
PYTHON ?= python
TORCH ?= 2.11 2.12 2.13 2.14 2.15
SPHINX = $(PYTHON) -m sphinx -W --keep-going -E

.PHONY: help install test lint bench docs wheels

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):  *## /\1@/p' $(MAKEFILE_LIST) | while IFS=@ read -r name text; do printf 'make %-8s %s\n' "$$name" "$$text"; done

install:  ## install the packages in place, with all that the commands below need
	$(PYTHON) -m pip install -e ".[test,docs,dev]"

# passive: busy waiting of one process's threads would take the other's cores.
test:  ## run the tests, by two processes
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n 2

lint:  ## check style and types, as CI does
	$(PYTHON) -m pre_commit run --all-files --show-diff-on-failure

bench:  ## measure the ops beside their peers
	$(PYTHON) -m pytest benchmarks --benchmark-only

docs:  ## build the documentation in build/docs and run its examples
	$(SPHINX) -b html docs build/docs
	$(SPHINX) -b doctest docs build/doctest
	$(PYTHON) docs/sentences.py

# --no-deps: compiling needs torch's headers and libraries alone.
wheels:  ## build a wheel in dist/ for PYTHON and each torch of TORCH
	set -e; for version in $(TORCH); do \
	  work=$$(mktemp -d); $(PYTHON) -m venv $$work; \
	  $$work/bin/pip install -q build "setuptools>=77" ninja pybind11; \
	  $$work/bin/pip install -q --no-deps "torch==$$version.*"; \
	  $$work/bin/python -m build --wheel --no-isolation; rm -rf $$work; \
	done
