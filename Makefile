# Two commands from a fresh clone, with python3 and make only:
#   make quickstart   the whole chain, offline, on a CPU, and where its report is
#   make test         the fast tests
PYTHON ?= python3
VENV   ?= .venv
SEED   ?= 0

RUN   := $(VENV)/bin/python
PIP   := $(RUN) -m pip install -qq -c constraints.txt
STAMP := $(VENV)/.installed
PY    := src recipes tests $(wildcard benchmarks)

# Nothing below the install asks the network for anything; one thread, so that the same seed gives the same bits.
OFFLINE    := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow mutations check words docs bench format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP) ## build .venv (every other target does it by itself)

# torch first and alone: it decides the size of everything that follows. An environment whose pip does not answer was left
# half made, and is made again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is missing or older than Python 3.10: name a newer one with make PYTHON=..."; exit 2; }
	@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || \
	    { echo "$(VENV) exists and is no virtual environment: remove it, or choose another place with make VENV=..."; exit 2; }
	@echo "Installing into $(VENV) (about 2 minutes) ..."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## raw text to a PPO-tuned chat model in about 5 minutes (SEED=1 for another seed)
	@$(OFFLINE) $(RUN) -m rlhf_recipes quickstart --seed $(SEED) --output_dir runs/quickstart --overwrite true

test: $(STAMP) ## the fast tests; one that waits for ever fails after ten minutes, and says where it waited
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest -m 'not slow' -n 2 --dist loadscope --timeout 600

test-slow: $(STAMP) ## the tests that take minutes
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest -m slow

mutations: $(STAMP) ## break each formula of PPO on purpose and see which tests turn red
	@$(OFFLINE) $(ONE_THREAD) $(RUN) tests/mutations.py

check: $(STAMP) ## lint, format, types, and the rules of the house
	@$(RUN) -m ruff check $(PY)
	@$(RUN) -m ruff format --check $(PY)
	@$(RUN) -m mypy
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest tests/test_layers.py tests/test_house.py

words: $(STAMP) ## list words of the former private dialect that remain (tests/dialect.py)
	@$(RUN) tests/dialect.py

docs: $(VENV)/.docs ## build the documentation as a site into site/; a broken link is an error
	@rm -rf build/docs && mkdir -p build/docs
	@tar cf - --exclude __pycache__ --exclude logs README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs recipes \
	    benchmarks/README.md benchmarks/*.py benchmarks/results | tar xf - -C build/docs
	@$(VENV)/bin/zensical build --strict --clean

# Needs Python 3.11. Only this target installs it.
$(VENV)/.docs: $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

bench: $(STAMP) ## speed and memory against TRL 1.12, a plain loop and the machine: from half an hour to an hour and a half, results in benchmarks/results
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/ppo_speed.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/pretrain_speed.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/startup.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/packing.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/decoding.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/growth.py

format: $(STAMP) ## let ruff mend what it can
	@$(RUN) -m ruff check --fix $(PY)
	@$(RUN) -m ruff format $(PY)

clean: ## remove caches and builds; keeps .venv and runs
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	@find src recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
