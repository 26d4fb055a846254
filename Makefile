# From a bare Python >= 3.11: `make setup` makes .venv and installs everything, `make reproduce` races the systems and
# renders the report, `make test` runs the tests. Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.moebench-installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
RUN ?= quick
ARGS ?=

.PHONY: setup reproduce test lint clean
.DEFAULT_GOAL := setup

setup: $(STAMP)
	@:

# torch first and pinned, so that nothing below drags in another build. The real packages come last and one by one: one
# that cannot be installed costs its own rows only, and `moebench doctor` names it.
$(STAMP): pyproject.toml
	@$(PY) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	    found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	    echo "moebench needs Python 3.11 or newer, but $(PYTHON) is $${found:-not there}; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }; \
	  echo "==> new environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "==> torch"
	@$(PY) -m pip install --disable-pip-version-check torch==2.13.0
	@echo "==> moebench, its tests, and what reads checkpoints"
	@$(PY) -m pip install --disable-pip-version-check -e ".[huggingface,test]"
	@for package in $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["packages"])'); do \
	  echo "==> real package $$package"; \
	  $(PY) -m pip install --disable-pip-version-check "$$package" || \
	    echo "==> WARNING: $$package could not be installed; its systems will be refused (moebench doctor says how to get it)"; \
	done
	@touch $@
	@echo "==> installed; $(VENV)/bin/moebench doctor shows what this machine can do"

reproduce: setup
	$(VENV)/bin/moebench run --suite quick --name $(RUN)
	$(VENV)/bin/moebench report summary --run $(RUN)

# In two processes; what measures time runs before them and alone. One test under a debugger: make test ARGS="-n0 --pdb ..."
test: setup
	$(PY) -m pytest -n 2 $(ARGS)

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
