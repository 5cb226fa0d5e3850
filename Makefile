# What contributors and CI run. PYTHON chooses the interpreter; its environment needs `make install` first.
PYTHON ?= python
SPHINX = $(PYTHON) -m sphinx -W --keep-going -E

.PHONY: help install test lint bench docs

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
