# install, demo, test, lint, format: each makes .venv by itself when it is missing, or older than pyproject.toml.
#
#   make test
#   make test TORCH="torch==2.13.0"                     that build of PyTorch first, instead of what pip chooses
#   make test CONSTRAINTS=constraints/oldest.txt        the oldest dependencies
#   make test PYTEST_ARGS="tests/unit -k cache"

PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.stamp
# PyTorch by pip, whose settings may name a build of it. The rest by uv, which is faster, unless pip has an index of its own, which uv doesn't
# look at; where uv is missing or fails, by pip.
# Python compiles what it imports, which is far less than what is installed.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
OWN_INDEX := $(BIN)/python -m pip config list | grep -q '\.index-url='
UV := $(BIN)/uv pip install --python $(BIN)/python $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Each worker holds PyTorch and models of its own, 1 to 2 GB: one per core, at most four.
# A file stays with one worker: what its tests share is made once. Files come in their order, the long ones of e2e first.
XDIST := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Freed memory stays with the process: what is given back and asked for again costs page faults, up to a third of the time.
MALLOC := MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432
WANTED := $(TORCH) $(CONSTRAINTS)

.PHONY: demo test lint format install

install: $(STAMP)

demo: $(STAMP)
	@$(MALLOC) $(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(STAMP)
	@$(MALLOC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) $(PYTEST_ARGS)

lint: $(STAMP)
	@failed=0; \
	$(BIN)/ruff check --quiet || failed=1; \
	$(BIN)/ruff format --check --quiet || failed=1; \
	$(BIN)/basedpyright --pythonpath $(BIN)/python || failed=1; \
	exit $$failed

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

# What a .venv was made with is in its stamp; other wishes bring it up to date. What is installed already stays.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(strip $(WANTED)))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "installing into .venv (the first time takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@{ $(PIP) "$(TORCH)" && { { ! $(OWN_INDEX) && $(PIP) uv && $(UV) --editable ".[dev]"; } || $(PIP) --editable ".[dev]"; }; } > .venv/install.log 2>&1 || { tail -n 25 .venv/install.log; exit 1; }
	@echo "$(strip $(WANTED))" > $@
