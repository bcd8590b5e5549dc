# `make test` and `make demo` work from a fresh clone: they make .venv, install pinned packages,
# build the kernels and run.
#
#   PYTHON=python3.12   the Python that makes .venv (3.10 or newer)
#   TORCH=torch==2.14.1 the torch that goes into a new .venv
#   VENV=0              use PYTHON's own packages: nothing is installed, no network is needed
#   ARGS="-k quantize"  passed on by test, demo and bench
#   MAX_JOBS=1          compile with fewer processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= 1
ARGS ?=

ifdef MAX_JOBS
export MAX_JOBS
endif
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build test lint bench bench-attention bench-noise demo gpu-check clean

ifeq ($(VENV),0)
PY := $(PYTHON)
CLANG_FORMAT ?= clang-format
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
packages =
else
PY := .venv/bin/python
CLANG_FORMAT ?= .venv/bin/clang-format
PIP := $(PY) -m pip --disable-pip-version-check --quiet
packages = $(foreach group,$(1),.venv/.installed-$(group))
endif

# Ends with a message that names the modules of $(1) that $(PY) lacks.
needs = @$(PY) -c 'import importlib.util as u, sys; \
lacking = [m for m in "$(1)".split() if u.find_spec(m) is None]; \
lacking and sys.exit(f"make $@: {sys.executable} lacks " + ", ".join(lacking) + \
"; install them there, or run without VENV=0")'

help:
	@echo "make test   run the tests"
	@echo "make demo   train and sample on handwritten digits, into out/demo"
	@echo "make bench  compare with other implementations, into benchmarks/results"
	@echo "make bench-attention  the part of it about attention and modulation"
	@echo "make bench-noise  the part about noising, losses and samplers' steps"
	@echo "make gpu-check  on a machine with a GPU: device tests and benchmarks, into benchmarks/results"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make build  compile the kernels in place"
	@echo "make venv   make .venv with everything that building needs"
	@echo "make clean  remove what was built (not .venv)"
	@sed -n 's/^#   \([A-Z_]*=\)/  \1/p' Makefile

venv: $(call packages,torch build)

build: $(call packages,torch build)
	$(call needs,torch numpy setuptools)
	$(PY) setup.py --quiet build_ext --inplace
ifneq ($(VENV),0)
	@$(MAKE) --no-print-directory --silent .venv/.installed-vqkernels
endif

test: build $(call packages,test triton triton-3.6)
	$(call needs,pytest)
	$(PY) -m pytest tests $(ARGS)

demo: build $(call packages,demo)
	$(PY) -m vqkernels demo $(ARGS)

bench: build $(call packages,bench)
	$(PY) -m benchmarks $(ARGS)

bench-attention: build $(call packages,bench)
	$(PY) -m benchmarks --name attention --ops attention,ada_layer_norm,gated_residual,gated_residual_ada_layer_norm,bias_gelu,qk_norm_rope,DiTBlock $(ARGS)

bench-noise: build $(call packages,bench)
	$(PY) -m benchmarks --name noise --ops diffuse,diffusion_loss,denoise_step,scheduler_step,sampling_loop $(ARGS)

# Takes the packages that are there, objects from vqkernels/lib or built on the spot, no network.
gpu-check: check_python = $(if $(filter 0,$(VENV)),$(PYTHON),$(or $(wildcard .venv/bin/python),$(PYTHON)))
gpu-check:
	@$(check_python) -c 'import importlib.util as u, sys; \
	lacking = [m for m in ("torch", "numpy", "pytest") if u.find_spec(m) is None]; \
	lacking and sys.exit("make $@: " + sys.executable + " lacks " + ", ".join(lacking))'
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(check_python) -m benchmarks.gpu_check $(ARGS)

lint: $(call packages,torch build lint)
	$(call needs,ruff mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror \
		$$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info vqkernels/lib .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# What is below makes .venv. A group is installed again when its list has changed.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
		sys.exit("vqkernels needs Python 3.10 or newer, and $(PYTHON) is " + \
		sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed-torch: | .venv/bin/python
	$(PIP) install "$(TORCH)"
	@touch $@

# A torch for GPUs brings the Triton that fits it.
.venv/.installed-triton: requirements/triton.txt .venv/.installed-torch
	@$(PY) -c "import triton" 2>/dev/null || $(PIP) install -r $<
	@touch $@

# The oldest Triton that kernels must compile under; on a path of its own, for tests/compile alone.
.venv/.installed-triton-3.6: .venv/.installed-triton
	@$(PY) -c "import triton; exit(not triton.__version__.startswith('3.6.'))" 2>/dev/null || \
		[ "$$(uname -s)" != Linux ] || \
		$(PIP) install --no-deps --upgrade --target .venv/triton-3.6 triton==3.6.0
	@touch $@

.venv/.installed-%: requirements/%.txt requirements/constraints.txt .venv/.installed-torch
	$(PIP) install -r $<
	@touch $@

.venv/.installed-vqkernels: pyproject.toml setup.py .venv/.installed-build
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
