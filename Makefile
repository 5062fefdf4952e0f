# Everything happens in .venv; `make` alone says what there is.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-gpu docs clean

help:
	@echo "make demo       train RigL beside dense, small-dense, static and SET on handwritten digits"
	@echo "make test       lint, type-check and run all tests"
	@echo "make test-gpu   run the GPU kernels in Triton's interpreter and compile them, without a GPU"
	@echo "make docs       build the documentation into site/"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regrow needs Python 3.11 or later, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/regrow compare --methods dense,small_dense,static,set,rigl --densities 0.1 --seeds 3 --out runs/demo

test: .venv/installed
	$(BIN)/ruff format --check src tests benchmarks experiments
	$(BIN)/ruff check src tests benchmarks experiments
	$(BIN)/mypy
	$(BIN)/pytest --quiet --numprocesses 2 --dist loadfile --doctest-modules

test-gpu: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt triton
	TRITON_INTERPRET=1 $(BIN)/pytest --quiet tests/gpu

docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site runs
