# `make quickstart` and `make test` need only Python with venv, and a package registry that pip knows.
# The package is installed editable, and a stamp file remembers each installation: sources may change
# freely; only a change of pyproject.toml or constraints.txt installs again.

VENV := .venv
BIN := $(VENV)/bin
# Processes run the tests, each a file at a time: three, because servers' tests wait a lot, and two
# for the slow ones, some of which measure memory. `make test PYTEST_FLAGS="-n 0"` takes one.
PYTEST_FLAGS ?=
PYTEST := -m pytest --dist loadfile

# The name of the stamp that says which version of Python made the environment.
VERSION_STAMP := import sys; print("$(VENV)/.created-%d.%d" % sys.version_info[:2])

# Without PYTHON=..., whatever interpreter made .venv is kept. With it, an environment that another
# version made is rebuilt.
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
CREATED := $(VENV)/.created
else
CREATED := $(shell $(PYTHON) -c '$(VERSION_STAMP)')
$(if $(CREATED),,$(error cannot run the Python named by PYTHON=$(PYTHON)))
endif
# An older release of the Tinker SDK, put before the newest one by the tests that need it.
OLD_SDK := 0.25.0
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed

# PIP_* settings of the caller (an index, a folder of wheels, certificates) stay in force.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-rl test check slow cookbook chaos real rl bench clean

help: ## list the targets
	@echo "usage: make <target> [PYTHON=python3.12] [PYTEST_FLAGS=...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 17

quickstart: $(RUNTIME) ## install what a user needs, then train the quickstart's adapters
	$(BIN)/manylora quickstart

quickstart-rl: $(RUNTIME) ## install what a user needs, then train two adapters by rewards
	$(BIN)/manylora train examples/rl_run/run.yaml

test: check ## install what a developer needs, then run every check and every test but the slow ones
	@echo "==> Tests"
	$(BIN)/python $(PYTEST) -n 3 $(PYTEST_FLAGS)

check: $(DEV) ## lint, formatting, types, and which room may import which
	@echo "==> Lint"
	$(BIN)/ruff check .
	@echo "==> Formatting"
	$(BIN)/ruff format --check .
	@echo "==> Types"
	$(BIN)/pyrefly check
	@echo "==> Imports between rooms"
	$(BIN)/lint-imports --no-logo

slow: $(DEV) ## run the tests marked slow
	$(BIN)/python $(PYTEST) -n 2 -m slow $(PYTEST_FLAGS)

cookbook: $(DEV) ## run every recipe of tinker-cookbook that is tested, against a server
	$(BIN)/python -m pytest tests/cookbook -m "not slow" $(PYTEST_FLAGS)

chaos: $(DEV) ## kill the server at random under eight tenants, fifty times
	$(BIN)/python -m pytest tests/wire/test_chaos.py -m chaos $(PYTEST_FLAGS)

real: $(DEV) ## train, serve and sample a real base of 135 million parameters, which pip fetches
	$(BIN)/python -m pytest tests/real -m real $(PYTEST_FLAGS)

rl: $(DEV) ## learn four rewards at once, every preset, and with samples of older weights
	$(BIN)/python -m pytest tests/rl -m rl $(PYTEST_FLAGS)

bench: $(DEV) ## measure many adapters at once against one after the other
	$(BIN)/python -m benchmarks.multi_tenant

clean: ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "manylora needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> Making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.created $$($(BIN)/python -c '$(VERSION_STAMP)')

$(RUNTIME): pyproject.toml constraints.txt $(CREATED)
	@echo "==> Installing manylora and what it needs (mostly PyTorch; a few minutes the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt $(CREATED)
	@echo "==> Installing manylora with its tests' tools (mostly PyTorch; a few minutes the first time)"
	$(PIP_INSTALL) -e '.[dev,cookbook]'
	$(PIP_INSTALL) --no-deps tinker-cookbook
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/sdk-$(OLD_SDK) tinker==$(OLD_SDK)
	@touch $(RUNTIME) $@
