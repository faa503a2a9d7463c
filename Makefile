# make demo    pictures in a minute: compares samplers and steering on the embedded Shapes model
# make test    the test suite
# make lint    ruff, formatting, and types of an installed copy
# make bench   the measurements behind the README's figures
# Each target makes .venv if it is missing and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= out
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench format clean

demo: $(VENV)/.installed
	$(BIN)/diffplug compare -o $(OUT)

# One process a core, one thread a process.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	rm -rf build
	$(PIP) install -q --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.shapes_model
	$(BIN)/python -m benchmarks.fidelity --steps 10 --strength 30

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "diffplug needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install -q -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install -q -e '.[dev,all]'
	touch $@ $(VENV)/.installed
