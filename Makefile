# Every target sets up what it needs in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NEWEST_TRANSFORMERS = 5.23.0
PYTEST_WORKERS ?= 2

.PHONY: help test demo lint compat wheel-check train clean

help:
	@echo "make demo         find facts hidden in a real document with the bundled model"
	@echo "make test         lint, type check and all tests"
	@echo "make compat       the tests that touch transformers, with the newest one tested"
	@echo "make wheel-check  the wheel in an empty environment, outside this folder"
	@echo "make train        train the bundled model anew (needs a GPU)"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/tsa demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

compat:
	grep -v '^transformers==' constraints.txt > .newest-constraints.txt
	echo 'transformers==$(NEWEST_TRANSFORMERS)' >> .newest-constraints.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -c .newest-constraints.txt torch
	.venv-newest/bin/python -m pip install -q -c .newest-constraints.txt -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal \
		tests/integrations tests/calibration tests/evaluation tests/test_*.py

wheel-check:
	scripts/wheel-check.sh $(PYTHON)

train: $(VENV)/installed
	$(BIN)/python -m training --out build/model

clean:
	rm -rf $(VENV) .venv-newest .newest-constraints.txt build dist
