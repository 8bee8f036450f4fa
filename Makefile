# `make test` and `make demo` need Python >= 3.11 and nothing else: they build .venv on first use.
#
#   make test ARGS="-k kl"            pass options to pytest
#   make test PYTHON_BIN=python3      use an interpreter that has everything already; nothing is installed
#   make gpu                          on a machine with a GPU, with its own python3: tests, then the benchmark
#
# Environment variables of pip and uv are respected (UV_TORCH_BACKEND=cpu picks torch's CPU build, for one).

PYTHON     ?= python3
VENV       ?= .venv
PYTHON_BIN ?=
ARGS       ?=

ifeq ($(PYTHON_BIN),)
  RUN       := $(VENV)/bin/python
  PYTEST    := $(RUN) -P -m pytest -n 2 --benchmark-disable
  installed  = $(VENV)/.installed-$(1)
else
  RUN       := PYTHONPATH="$(CURDIR)" $(PYTHON_BIN)
  PYTEST    := $(RUN) -m pytest
  installed  =
endif

.PHONY: test lint demo audit bench gpu clean

test: $(call installed,test)
	$(PYTEST) $(ARGS)

lint: $(call installed,test)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

# threads with nothing to do soon sleep rather than spin, which costs minutes where something else runs, too
demo: export GOMP_SPINCOUNT ?= 1000
demo: $(call installed,demo)
	$(RUN) -m fused_tdpo demo $(ARGS)

audit: $(call installed,test)
	$(RUN) benchmarks/audit.py $(ARGS)

bench: $(call installed,bench)
	$(RUN) benchmarks/run.py $(ARGS)

# in parallel where pytest-xdist happens to be installed: kernels take ten times as long to compile as to run
gpu: PYTHON_BIN := $(or $(PYTHON_BIN),$(PYTHON))
gpu:
	$(MAKE) test PYTHON_BIN=$(PYTHON_BIN) ARGS="$(shell $(PYTHON_BIN) -c 'import xdist' 2>/dev/null && echo --numprocesses=8)"
	$(MAKE) bench PYTHON_BIN=$(PYTHON_BIN) ARGS="--gpu $(ARGS)"

clean:
	rm -rf $(VENV) build dist *.egg-info

# uv installs in seconds; where it cannot be had, pip does the same in a minute. uv ignores pip's settings: hand it pip's wheel
# folders, if any are set
$(VENV)/.installed-%: export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	{ $| -m pip install -q uv && $| -m uv pip install -q --python $| -c constraints.txt -e '.[$*]'; } \
	|| $| -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, not {sys.version}: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
