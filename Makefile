# A fresh machine needs two commands: `make demo` and `make test`. Both build .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= all
DEMO ?= demo_out
# Test processes: compiling is mostly one thread, so two fill two cores. More need 4 GB of memory each.
# A worker that crashes ends the run: with a new one, xdist may wait for ever.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: env demo test test-fast lint format clean

env: $(VENV)/.installed-$(EXTRAS)

$(VENV)/.installed-$(EXTRAS): setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, found {sys.version}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# Environment, sample tiles, a short pretraining, kNN against random init, export, pictures. The variable asks for huge
# pages, with which a step on a CPU takes a seventh less (docs/performance.md); elsewhere it means nothing.
demo:
	@$(MAKE) --no-print-directory env EXTRAS=demo
	GLIBC_TUNABLES="$${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" $(BIN)/python -m terrafm_jax.demo --out $(DEMO)

# Compiling is most of it: only what is compared with a reference is compiled as users have it (tests/conftest.py).
test: env
	TERRAFM_TEST_COMPILE=quick $(PYTEST) -m "not reference"
	$(PYTEST) -m reference

test-fast: env
	TERRAFM_TEST_COMPILE=quick $(PYTEST) -m "not slow and not reference"
	$(PYTEST) -m "reference and not slow"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
