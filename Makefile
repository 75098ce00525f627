# Everything a newcomer needs: `make train` and `make test` set up .venv by themselves, once.  `make help` lists the rest.
#
#   PYTHON       the interpreter that makes .venv (3.11 or newer; the lock is made for 3.11)
#   TORCH_INDEX  where torch comes from
#   ARGS         more arguments, as in: make train ARGS="seed=1"   make test ARGS="-k resume"

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := smax,mpe,mujoco,mamujoco,atari,box2d,wandb,video,joblib,study,ray,submitit,rliable,dev,docs
TORCH_FROM := --retries 1 --timeout 20 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Debian keeps what `python -m venv` needs in a package of its own.
ADD_VENV = { test -x /usr/bin/apt-get && package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])') \
	&& echo "Installing $$package …" && root=$$(test $$(id -u) = 0 || echo sudo) \
	&& $$root apt-get update -qq && $$root apt-get install -y -qq $$package >/dev/null; }

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow check bench format docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

train: $(STAMP) ## train MAPPO on the SMAX map 3m: a few minutes on two cores
	$(BIN)/marl-memory train experiment=quickstart $(ARGS)

test: $(STAMP) ## the tests (slow ones left out)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP) ## the slow tests: wheels, long trainings
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow $(ARGS)

check: $(STAMP) ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP) ## speed beside plain PyTorch, raw environments and, with BENCHMARL_PYTHON, BenchMARL; exit code 1 if a bound is missed
	$(BIN)/python -m benchmarks --json build/bench.json $(ARGS)

format: $(STAMP) ## format, and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## the documentation, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

install: $(STAMP) ## only set up .venv

# The stamp is written last: an interrupted installation is taken up again.  torch comes first and alone, so that the
# other index is asked for nothing else; where it cannot be reached, pip goes on with what it finds elsewhere.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "marl_memory needs Python 3.11 or newer.  On Debian: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is not Python 3.11 or newer: set PYTHON=…" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(ADD_VENV) \
		|| { echo "$(PYTHON) cannot make virtual environments.  On Debian: sudo apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) …"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing torch, then the rest of requirements.lock (some minutes the first time) …"
	@$(PIP) install --quiet --no-deps $(TORCH_FROM) "$$(grep '^torch==' requirements.lock)"
	@$(PIP) install --quiet -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# torch keeps the version that the lock has: to change it, edit that line first.  A CUDA build is refused.
lock: ## renew requirements.lock from pyproject.toml, in a temporary environment
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(TORCH_FROM) "$$(grep '^torch==' requirements.lock)"
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check ".[$(EXTRAS)]"
	grep '^#' requirements.lock > build/lock/new
	build/lock/bin/python -m pip --disable-pip-version-check freeze --all --exclude pip --exclude marl-memory \
		| sed 's/+[a-z0-9.]*$$//' | tr 'A-Z_' 'a-z-' | LC_ALL=C sort >> build/lock/new
	@! grep -E '^(nvidia|cuda)-' build/lock/new || { echo "torch came with CUDA: is $(TORCH_INDEX) in reach?" >&2; exit 1; }
	mv build/lock/new requirements.lock
	rm -rf build/lock

clean: ## remove .venv and caches (never runs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
