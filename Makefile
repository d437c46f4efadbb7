# Two commands from a fresh clone, with python3 and make only:
#   make quickstart   the whole pipeline, offline, on a CPU; prints where its report is
#   make test         the fast tests
PYTHON ?= python3
VENV   ?= .venv
SEED   ?= 0
# The torch of the two version jobs, which is installed first. The pinned torch is also the lowest that is allowed.
OLDEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
NEWEST_TORCH ?= torch
OLDEST       ?= .venv-oldest
NEWEST       ?= .venv-newest

RUN   := $(VENV)/bin/python
PIP   := $(RUN) -m pip install -qq -c constraints.txt
STAMP := $(VENV)/.installed
DOCS  := $(VENV)/.installed-docs
PY    := src recipes tests $(wildcard benchmarks)

# No target opens a connection after its install; one thread, so that the same seed gives the same bits.
OFFLINE    := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
FAST       := -m 'not slow' -n 2 --dist loadscope --timeout 600

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow test-all test-oldest test-newest mutations check check-extras words docs bench format clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP) ## build .venv (every other target does it by itself)

# torch comes first and alone: its size decides how long the rest takes. An environment whose pip does not answer is
# incomplete and is built again.
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

test: $(STAMP) ## the fast tests, at most 5 minutes on 2 cores; a test that hangs fails after 10 minutes with its stack
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest $(FAST)

test-slow: $(STAMP) ## the slow tests, each of which takes up to minutes
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest -m slow

test-all: test test-slow ## the fast and the slow tests

# Direct dependencies, torch among them, at the lowest release that pyproject.toml allows; all others at their newest.
test-oldest: ## the fast tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -qq uv $(OLDEST_TORCH)
	@$(OLDEST)/bin/python -m uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct \
	    --python $(OLDEST)/bin/python --extra dev --extra tensorboard pyproject.toml -o $(OLDEST)/all.txt
	@grep -vE '^(torch|triton|nvidia-.*|cuda-.*|uv)==' $(OLDEST)/all.txt > $(OLDEST)/lowest.txt
	@$(OLDEST)/bin/python -m pip install -qq -c $(OLDEST)/lowest.txt -e '.[dev,tensorboard]'
	@$(OFFLINE) $(ONE_THREAD) $(OLDEST)/bin/python -m pytest $(FAST)

# `make test-newest NEWEST_TORCH=torch==2.13.0` saves a download of gigabytes from PyPI.
test-newest: ## the fast tests with the newest versions that PyPI has, in .venv-newest
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq -U pip
	@$(NEWEST)/bin/python -m pip install -qq $(NEWEST_TORCH)
	@$(NEWEST)/bin/python -m pip install -qq -U -e '.[dev,tensorboard]'
	@$(OFFLINE) $(ONE_THREAD) $(NEWEST)/bin/python -m pytest $(FAST)

mutations: $(STAMP) ## break each formula of PPO on purpose and list the tests that fail
	@$(OFFLINE) $(ONE_THREAD) $(RUN) tests/mutations.py

check: $(STAMP) ## lint, format, types, and the rules of the layout
	@$(RUN) -m ruff check $(PY)
	@$(RUN) -m ruff format --check $(PY)
	@$(RUN) -m mypy
	@$(OFFLINE) $(ONE_THREAD) $(RUN) -m pytest tests/test_layers.py tests/test_house.py tests/test_packaging.py

check-extras: $(STAMP) ## resolve every extra against constraints.txt, and every lower bound (needs the network, 1 minute)
	@$(RUN) tests/programs/check_extras.py

words: $(STAMP) ## list words that CONTRIBUTING.md replaces by plain ones (tests/dialect.py)
	@$(RUN) tests/dialect.py

$(DOCS): $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

docs: $(DOCS) ## build the documentation as a site in site/ (Python 3.11); a broken link is an error
	@rm -rf build/docs && mkdir -p build/docs
	@tar cf - --exclude __pycache__ --exclude logs README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs recipes \
	    benchmarks/README.md benchmarks/*.py benchmarks/results | tar xf - -C build/docs
	@$(VENV)/bin/zensical build --strict --clean

bench: $(STAMP) ## speed and memory against TRL 1.12, a plain loop and the machine: 30 to 90 minutes, into benchmarks/results
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/ppo_speed.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/pretrain_speed.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/startup.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/packing.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/decoding.py
	@$(OFFLINE) $(ONE_THREAD) $(RUN) benchmarks/growth.py

format: $(STAMP) ## let ruff format the code and fix what it can
	@$(RUN) -m ruff check --fix $(PY)
	@$(RUN) -m ruff format $(PY)

clean: ## remove caches, builds and the environments of the version jobs; keeps .venv and runs
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info $(OLDEST) $(NEWEST)
	@find src recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
