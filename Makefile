# Two commands do everything on a fresh machine: `make finetune` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# glibc backs large allocations with large pages: training on a CPU takes a third less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: finetune test lint format clean

finetune: $(VENV)/.demo  ## train the embedded demo; ARGS="--run-dir runs/mine" adds options
	$(BIN)/python -m train.finetune $(ARGS)

test: $(VENV)/.test lint  ## lint, type check and all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# One stamp file for each set of extras; made anew when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
