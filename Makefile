# Main targets:
#
#   make serve                          set up and serve the demo checkpoint on 127.0.0.1:8000
#   make serve MODEL=FOLDER_OR_HUB_ID PORT=8001
#   make test                           set up and run the whole suite (make test-unit: under a minute)
#
# They need Python >= 3.11 with pip and venv, and make. Everything is installed into .venv; a
# second run finds it there and installs nothing. ARGS goes to `glmd serve` or to pytest.

VENV := .venv
BIN := $(VENV)/bin
HOST := 127.0.0.1
PORT := 8000
MODEL := demo
ARGS :=
WORKERS := 3
NODE_CLIENTS := tests/clients
INSTALL := $(if $(shell command -v uv 2>/dev/null),\
	uv pip install --python $(BIN)/python,\
	$(BIN)/python -m pip install --disable-pip-version-check)

.PHONY: help serve test test-unit coverage lint format book soak lock audit setup setup-dev setup-parity setup-clients setup-lock picture wheel smoke-wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile
	@echo "Others: test-unit, coverage, lint, format, book, soak, picture, wheel, smoke-wheel, clean."

serve: setup
	$(BIN)/glmd serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# WORKERS processes share the test files, in their order: by number of tests, long files of few tests would be last.
# Much of the time, the suite waits for processes that it starts.
test: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Tests without an engine or a server, in under a minute.
test-unit: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m unit $(ARGS)

coverage: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-report=xml $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/book.py

# Stamp files in the environment: older than pyproject.toml or the interpreter, they cause a new
# installation.
setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev
setup-parity: $(VENV)/.installed-parity
setup-lock: $(VENV)/.installed-lock
setup-clients: $(VENV)/.installed-clients $(NODE_CLIENTS)/node_modules/.package-lock.json

$(BIN)/python:
	@PYTHON="$(PYTHON)" tools/make-venv $(VENV)

$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(BIN)/python
	$(INSTALL) --editable ".[$*]"
	@touch $@ $(VENV)/.installed

$(NODE_CLIENTS)/node_modules/.package-lock.json: $(NODE_CLIENTS)/package-lock.json
	npm --prefix $(NODE_CLIENTS) ci
	@touch $@

# Pin all runtime dependencies with hashes, for macOS, Linux and all supported versions of Python.
# `make lock ARGS=--upgrade` takes the newest versions.
lock: setup-lock
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock $(ARGS)

# Check the pinned versions for known vulnerabilities.
audit: setup-lock
	$(BIN)/pip-audit --requirement requirements.lock --disable-pip --require-hashes

# Build the documentation in site/.
book: setup-dev
	$(BIN)/zensical build --strict --clean

# Take the screenshots of the page in docs/; needs two minutes and Chromium.
picture: $(VENV)/.installed-dev $(VENV)/.installed-clients
	$(BIN)/python tools/picture.py

wheel: setup-dev
	rm -rf dist
	$(BIN)/python -m build --wheel

# Install the wheel with its dependencies into an empty environment, and serve from there.
smoke-wheel: wheel
	tools/smoke-wheel $(BIN)/python dist/glmd-*.whl

# Ten minutes of mixed load with faults at random; see tools/soak.
soak: setup
	$(BIN)/python tools/soak $(ARGS)

clean:
	rm -rf $(VENV) $(NODE_CLIENTS)/node_modules dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
