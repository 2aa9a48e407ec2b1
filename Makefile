# Everything a newcomer needs: `make demo` and `make test`. Both build the environment when it is missing: the demo
# installs what a user needs, and the tests add the developers' tools to it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_DIR ?= runs/demo

.PHONY: demo test lint types docs unit package clean

demo: $(VENV)/installed-for-use
	$(BIN)/tdlrt demo --out $(DEMO_DIR) --overwrite

test: lint types docs unit

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --dist loadfile

# The wheel of the library in an environment that holds torch and safetensors alone; then, as its extra
# `cli`, the wheel of the lab beside it.
package: $(VENV)/installed
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist .
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist lab
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/clean
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt dist/tdlrt-*.whl
	build/clean/bin/python -I tests/packaging/smoke.py
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt dist/tdlrt_lab-*.whl 'tdlrt[cli]'
	build/clean/bin/python -I lab/tests/packaging/smoke.py

# torch first and pinned: a looser request would pull another build of it with the other packages. Then both
# packages in one command: each requires the other, and neither is to come from an index.
$(VENV)/installed-for-use: pyproject.toml lab/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,export]' --editable ./lab
	touch $@

$(VENV)/installed: $(VENV)/installed-for-use
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' --editable ./lab
	touch $@

clean:
	rm -rf $(VENV) build dist
