# One command each for a person on a fresh machine: every target does its own set-up and then runs.
#   make serve      start the server (PORT=8000, SERVE_FLAGS='MODEL --tbt-slo-ms 50')
#   make test       the default test suite        make test-all   the slow tests too
#   make check      ruff (lint, format) and mypy  make bench      load a running server (BENCH_FLAGS)
# Nothing is installed outside .venv. A second run finds its stamp and costs nothing.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: serve test test-all check bench setup clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The pin that CI runs; 2.11 to 2.13 work. Where there is no GPU the CPU build is wanted (200 MB, not 3 GB): it is tried first
# under its full version, which pip finds when its own settings name PyTorch's CPU wheels (pip config set
# global.extra-index-url ..., PIP_FIND_LINKS, or TORCH_PIP_FLAGS here); otherwise the default build is taken, which runs too.
TORCH ?= torch==2.13.0
TORCH_PIP_FLAGS ?=
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)

PORT ?= 8000
SERVE_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=

serve: $(VENV)/.installed-run
	@exec $(PY) -m server serve --port $(PORT) $(or $(SERVE_FLAGS),--config configs/embedded.yaml)

test: $(VENV)/.installed-test
	$(PY) -m pytest -m "not slow" $(TEST_FLAGS)

test-all: $(VENV)/.installed-test
	$(PY) -m pytest $(TEST_FLAGS)

check: $(VENV)/.installed-check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.installed-bench
	@exec $(PY) -m server bench serve --url http://127.0.0.1:$(PORT) $(BENCH_FLAGS)

setup: $(VENV)/.installed-test $(VENV)/.installed-check $(VENV)/.installed-bench

clean:
	rm -rf $(VENV) build bench-results .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- set-up -----------------------------------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Braid needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "could not make a virtual environment; Debian and Ubuntu need: apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(VENV) holds $$($(PY) --version), too old: remove the folder and run make again" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-torch: $(VENV)/.created
	@echo "installing $(TORCH); the first time this downloads 200 MB or more"
	@if [ "$(HAS_GPU)" != yes ] && case "$(TORCH)" in *+*) false;; esac \
	  && $(PY) -m pip install --quiet $(TORCH_PIP_FLAGS) '$(TORCH)+cpu' 2>/dev/null; then \
	  echo "installed $(TORCH)+cpu"; \
	else \
	  [ "$(HAS_GPU)" = yes ] || echo "pip knows no CPU-only build of $(TORCH); taking the default one (see the head of the Makefile)"; \
	  $(PY) -m pip install $(TORCH_PIP_FLAGS) '$(TORCH)'; \
	fi
	@touch $@

# Only the dependencies are installed: the packages run from the tree, so no wheel is built and no egg-info appears.
# torch is left out here, so that TORCH=... of the line above holds.
$(VENV)/.installed-run: $(VENV)/.installed-torch pyproject.toml
	@$(call install,)
$(VENV)/.installed-test: $(VENV)/.installed-run
	@$(call install,test)
$(VENV)/.installed-check: $(VENV)/.installed-test
	@$(call install,check)
$(VENV)/.installed-bench: $(VENV)/.installed-run
	@$(call install,bench)

define install
set -e; echo "installing the $(if $(1),$(1),runtime) dependencies"; \
$(PY) -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; g = sys.argv[1]; print("\n".join(d for d in (p["optional-dependencies"][g] if g else p["dependencies"]) if not d.startswith("torch=")))' "$(1)" >$@.txt; \
$(PY) -m pip install --quiet -r $@.txt; touch $@
endef
