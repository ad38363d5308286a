# Two commands do everything on a fresh machine: `make finetune` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes, a file of tests in each at a time: as many as two cores carry.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# glibc backs large allocations with large pages: training on a CPU takes a third less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: finetune test quick test-optimized test-gpu-compile gpu-bound test-wheel lint format clean

finetune: $(VENV)/.demo  ## train the embedded demo; ARGS="--run-dir runs/mine" adds options
	$(BIN)/python -m train.finetune $(ARGS)

test: $(VENV)/.test lint  ## lint, type check, all tests, and those of programs as users run them
	$(PYTEST) $(ARGS)
	$(MAKE) test-optimized

quick: $(VENV)/.test lint  ## lint, type check and the quick tests, in under two minutes
	$(PYTEST) -m "not slow" $(ARGS)

# Other tests switch most of XLA's optimizations off, which takes half of the time.
test-optimized: $(VENV)/.test  ## tests of model, inference and training step with all optimizations
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m optimized

# In an environment of its own: see tests/gpu/conftest.py.
GPU_VENV := .venv-gpu
GPU_ENV := JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_ENABLE_COMPILATION_CACHE=false \
	TF_CPP_MIN_LOG_LEVEL=3

test-gpu-compile:  ## compile all programs for GPUs, without one, and check what they need
	$(MAKE) VENV=$(GPU_VENV) $(GPU_VENV)/.gpu-compile
	$(GPU_ENV) $(GPU_VENV)/bin/python -m pytest -n 2 tests/gpu $(ARGS)

gpu-bound:  ## bounds of the programs on a GPU, without one; ARGS="--card a100"
	$(MAKE) VENV=$(GPU_VENV) $(GPU_VENV)/.gpu-compile
	$(GPU_ENV) $(GPU_VENV)/bin/python -m benchmarks.gpu_bound $(ARGS)

test-wheel: $(VENV)/.test  ## build a wheel, install it elsewhere and use it
	$(BIN)/python -m tests.build_wheel

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(GPU_VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# One stamp file for each set of extras; made again when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
