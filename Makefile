# Every target sets itself up in .venv; `make setup` alone does nothing when that is done.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart

# Versions known to work together, as .ci/constraints/newest.txt; none: the newest that there are.
CONSTRAINTS ?=
INSTALL = -m pip install --quiet --disable-pip-version-check

# The first Python from 3.11 to 3.14 that really runs; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.14 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

# Two sessions: most tests need one device, and then compile faster; see tests/conftest.py.
PYTEST = -m pytest -n auto --dist worksteal
define run-tests
JAX_NUM_CPU_DEVICES=1 $(BIN)/python $(PYTEST) -m "not mesh$(1)" $(2); one=$$?; \
$(BIN)/python $(PYTEST) -m "mesh$(1)" $(shell grep -l mark.mesh $(or $(2),tests/test_*.py)) && exit $$one
endef

.PHONY: help setup quickstart test test-all test-compiled test-extras lint format clean

help:
	@echo "make quickstart  train DeCLIP on drawn scenes, score it, write runs/quickstart/report.html"
	@echo "make test        run the tests (make test-all adds a whole quickstart, five minutes)"
	@echo "make test-extras test what needs Apache Beam or PyTorch's libraries, in an environment of its own"
	@echo "make test-compiled  test what depends on the versions of JAX and its compiler"
	@echo "make lint        ruff check and format check"
	@echo "make setup       only create .venv and install everything"
	@echo "PYTHON=python3.13 chooses the interpreter, CONSTRAINTS=.ci/constraints/newest.txt versions"

# Made anew where other versions are asked for; without a word of versions, what is there will do.
INSTALLED := $(if $(CONSTRAINTS),$(VENV)/.installed-$(notdir $(CONSTRAINTS)),$(firstword \
	$(wildcard $(VENV)/.installed*) $(VENV)/.installed))

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 to 3.14 is needed and was not found; install one, or: make PYTHON=/path/to/python3.13 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (about a minute, once)…"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test]'
	@rm -f $(VENV)/.installed*
	@touch $@

# Huge pages for malloc, where the kernel grants them on request: a tenth faster, the same numbers.
quickstart: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
quickstart: setup
	$(BIN)/python -m declip_jax.main --config configs/quickstart.py --workdir $(QUICKSTART)
	$(BIN)/python -m declip_jax.report $(QUICKSTART)

test: setup
	$(call run-tests, and not slow)

test-all: setup
	$(call run-tests)

# What depends on the versions of JAX and its compiler.
test-compiled: setup
	$(call run-tests, and not slow,$(addprefix tests/test_,golden.py parallel.py checkpoint.py train.py))

# Apart, because Beam holds back protobuf and others.
test-extras: $(VENV)-extras/.installed
	JAX_NUM_CPU_DEVICES=1 $(VENV)-extras/bin/python $(PYTEST) tests/test_beam.py \
		tests/test_captioner.py tests/test_peers.py tests/test_tokenizer_files.py tests/test_interop_docs.py

$(VENV)-extras/.installed: pyproject.toml | setup
	$(BIN)/python -m venv $(VENV)-extras
	$(VENV)-extras/bin/python $(INSTALL) -e '.[test,beam,captions,torch]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-extras $(VENV)-newest runs .pytest_cache .ruff_cache *.egg-info
