# The two that matter:
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
WORKERS := 2
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

# Files are divided among WORKERS processes; much of the suite waits for processes that it starts.
test: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# Tests without an engine or a server, in under a minute.
test-unit: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m unit $(ARGS)

coverage: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term --cov-report=xml $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/book.py

# The stamps stand inside the environment, so they go when it goes. One that is older than
# pyproject.toml or than the interpreter means: install again.
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

# What runs, to the last package and its hashes, for macOS and Linux and every Python that glmd takes.
# `make lock ARGS=--upgrade` takes what is newest.
lock: setup-lock
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock $(ARGS)

# Whether anything in it is known to be weak.
audit: setup-lock
	$(BIN)/pip-audit --requirement requirements.lock --disable-pip --require-hashes

# The book, in site/.
book: setup-dev
	$(BIN)/zensical build --strict --clean

# The picture of the page, docs/page.png; it takes two minutes and needs Chromium.
picture: $(VENV)/.installed-dev $(VENV)/.installed-clients
	$(BIN)/python tools/picture.py

wheel: setup-dev
	rm -rf dist
	$(BIN)/python -m build --wheel

# Install the wheel with all it depends on into an empty environment, and serve from there.
smoke-wheel: wheel
	tools/smoke-wheel $(BIN)/python dist/glmd-*.whl

# Ten minutes of mixed load with faults at random; see tools/soak.
soak: setup
	$(BIN)/python tools/soak $(ARGS)

clean:
	rm -rf $(VENV) $(NODE_CLIENTS)/node_modules dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
