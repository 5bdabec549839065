# make run: a Product-of-Experts language model from text to release; make test: every check and the tests. Both set up.
PYTHON ?= python3.11
VENV := .venv
TOOLS := .venv-tools
BIN := $(VENV)/bin
PIP := pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup tools run check test test-slow docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=python3"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) torch
	$(BIN)/$(PIP) -e '.[dev]'
	@touch $@

# Checkers and the docs builder stand in an environment of their own that sees the first one: the embedded corpus reads
# the descriptions of installed packages, and a run's data should not change with the tools of who edits the code.
tools: $(TOOLS)/.installed

$(TOOLS)/.installed: $(VENV)/.installed
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@cd $(VENV)/lib/python3*/site-packages && pwd > "$(CURDIR)/$$(cd $(CURDIR) && ls -d $(TOOLS)/lib/python3*/site-packages)/project.pth"
	$(TOOLS)/bin/$(PIP) -e '.[checks,docs]'
	@touch $@

run: setup
	$(BIN)/cognica-poe run tiny --out runs/tiny

check: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TOOLS)/bin/lint-imports
	$(TOOLS)/bin/mypy
	$(TOOLS)/bin/codespell

test: check
	$(TOOLS)/bin/python -m pytest -m "not slow"

test-slow: tools
	$(TOOLS)/bin/python -m pytest -m slow

docs: tools
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --strict

clean:
	rm -rf runs site build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
