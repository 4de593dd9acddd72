# Every target sets itself up in .venv; `make setup` alone does nothing when that is done.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart

# The first Python 3.11 or 3.12 that really runs; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: help setup quickstart test test-all test-extras lint format clean

help:
	@echo "make quickstart  train DeCLIP on drawn scenes, score it, write runs/quickstart/report.html"
	@echo "make test        run the tests (make test-all adds a whole quickstart, five minutes)"
	@echo "make test-extras test what needs Apache Beam or PyTorch's libraries, in an environment of its own"
	@echo "make lint        ruff check and format check"
	@echo "make setup       only create .venv and install everything"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed and was not found; install one, or: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (about a minute, once)…"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

# Huge pages for malloc, where the kernel grants them on request: a tenth faster, the same numbers.
quickstart: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
quickstart: setup
	$(BIN)/python -m declip_jax.main --config configs/quickstart.py --workdir $(QUICKSTART)
	$(BIN)/python -m declip_jax.report $(QUICKSTART)

test: setup
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

# Apart, because Beam holds back protobuf and others.
test-extras: $(VENV)-extras/.installed
	$(VENV)-extras/bin/python -m pytest -n auto --dist loadfile tests/test_beam.py \
		tests/test_captioner.py tests/test_peers.py tests/test_tokenizer_files.py tests/test_interop_docs.py

$(VENV)-extras/.installed: pyproject.toml | setup
	$(BIN)/python -m venv $(VENV)-extras
	$(VENV)-extras/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,beam,captions,torch]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-extras runs .pytest_cache .ruff_cache *.egg-info
