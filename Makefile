# Every command sets up what it needs first: a virtual environment in .venv, holding the locked packages and this project.
#
#   make PYTHON=python3.12 train      use another Python (the first use makes .venv; `make clean` to change later)
#   make ARGS="-k packing -x" test    hand arguments on to pytest

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m uv pip install --python $(PY)
CHECKED := --require-hashes --only-binary :all:
COMPILE := $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command "make lock"
LOCKS := requirements
PROMPT ?= def

# A worker a core; the tests of a file run one after another on one of them.
WORKERS ?= logical
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# Training and tests of these commands are for the CPU. On an accelerator: JAX_PLATFORMS= make ..., or the launchers.
export JAX_PLATFORMS ?= cpu

.PHONY: help train test test-full lint format types check setup setup-dev lock clean

help:
	@echo 'make train      set up, train configs/tiny.py on this CPU into runs/tiny, show a sample'
	@echo 'make test       set up, run the tests; make test-full runs the slow ones too'
	@echo 'make setup      make .venv with what the project needs; make setup-dev: and what its tests need'
	@echo 'make check      formatting, lint and types, changing nothing (make lint, make types: one of them)'
	@echo 'make format     put the code into its format'
	@echo 'make lock       choose the newest packages that setup.cfg allows, and lock them'
	@echo 'make clean      remove .venv and caches; runs stay'

train: setup
	$(PY) -m launch.train --config=configs/tiny.py --workdir=runs/tiny
	$(PY) -m launch.generate --workdir=runs/tiny --prompt="$(PROMPT) "

test: setup-dev
	$(PYTEST) -m "not slow" $(ARGS)

test-full: setup-dev
	$(PYTEST) $(ARGS)

check: setup-dev
	$(PY) -m ruff format --check .
	$(MAKE) --no-print-directory lint types

lint: setup-dev
	$(PY) -m ruff check .

format: setup-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix-only .

types: setup-dev
	$(PY) -m mypy

# --- the environment -------------------------------------------------------------------------------------------------

setup: $(VENV)/setup.done
setup-dev: $(VENV)/setup-dev.done

# Another Python is only looked for where python3 will not do.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

$(PY):
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo >&2 \
	  'lm_jax needs Python 3.11 or newer, and "$(or $(PYTHON),python3)" is not. Where there is one: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  '$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv. Or use another: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# uv installs in seconds what takes pip minutes. It brings certificates of its own and does not read pip's settings. Where
# only the system's certificates or only those settings lead to the packages (a company's mirror), the next one serves,
# from the same lock and hashes.
define install_lock
	$(INSTALL) $(CHECKED) -r $(1) || $(INSTALL) --system-certs $(CHECKED) -r $(1) || \
	  $(PY) -m pip install $(CHECKED) --no-deps -r $(1)
endef

$(VENV)/bootstrap.done: $(PY) $(LOCKS)/bootstrap.lock
	$(PY) -m pip install --quiet --disable-pip-version-check $(CHECKED) --no-deps -r $(LOCKS)/bootstrap.lock
	@touch $@

$(VENV)/setup.done: $(VENV)/bootstrap.done $(LOCKS)/run.lock setup.cfg pyproject.toml
	$(call install_lock,$(LOCKS)/run.lock)
	$(INSTALL) --quiet --offline --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/setup-dev.done: $(VENV)/setup.done $(LOCKS)/dev.lock
	$(call install_lock,$(LOCKS)/dev.lock)
	@touch $@

# bootstrap.lock: what installs. run.lock: what the project needs. dev.lock: that, and the tools. Versions are chosen with
# every extra in view, so that each of them can be added to what is locked.
lock: $(VENV)/bootstrap.done
	printf 'setuptools>=77\nuv\n' | $(COMPILE) --upgrade --output-file $(LOCKS)/bootstrap.lock -
	$(COMPILE) --upgrade --all-extras --output-file $(VENV)/everything.lock setup.cfg
	$(COMPILE) --upgrade --constraint $(VENV)/everything.lock --output-file $(LOCKS)/run.lock setup.cfg
	$(COMPILE) --upgrade --constraint $(VENV)/everything.lock --output-file $(LOCKS)/dev.lock --extra dev setup.cfg

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
