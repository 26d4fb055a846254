# From a bare Python >= 3.11: `make setup` makes .venv and installs everything, `make reproduce` races the systems and
# renders the report, `make test` runs the tests. Another interpreter: make PYTHON=python3.12 ...
#
# PyPI's torch is built for CUDA 13, which needs an NVIDIA driver >= 580 and cards from Turing on. Where this machine has
# an older one, `make setup` takes torch's index for it by itself; make setup TORCH_INDEX=cu126 takes that index anywhere
# (a login node without GPUs, say), as does a URL or a folder of wheels; TORCH_INDEX=pypi takes PyPI's in any case.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.moebench-installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
RUN ?=
ARGS ?=
TORCH_INDEX ?=
TORCH := torch==2.13.0
TORCH_RANGE := torch>=2.11,<2.14
TORCH_FROM := $(VENV)/.torch-index
# set where another index is asked for than the one that the installed torch is from
OTHER := $(if $(TORCH_INDEX),$(if $(filter $(TORCH_INDEX),$(shell cat $(TORCH_FROM) 2>/dev/null)),,other-index))

.PHONY: setup reproduce test test-long test-goldens lint clean other-index
.DEFAULT_GOAL := setup

setup: $(STAMP)
	@:

# torch first, so that nothing below drags in another build. The real packages come last and one by one: one
# that cannot be installed costs its own rows only, and `moebench doctor` names it.
$(STAMP): pyproject.toml $(OTHER)
	@$(PY) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	    found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
	    echo "moebench needs Python 3.11 or newer, but $(PYTHON) is $${found:-not there}; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }; \
	  echo "==> new environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@before=$$(cat $(TORCH_FROM) 2>/dev/null); index="$(TORCH_INDEX)"; \
	index=$${index:-$${before:-$$($(PY) -I harness/devices.py)}}; index=$${index:-pypi}; \
	[ "$${before:-$$index}" = "$$index" ] || $(PY) -m pip uninstall -y -q torch; \
	case "$$index" in \
	  pypi) set -- "$(TORCH)";; \
	  *://*) set -- "$(TORCH_RANGE)" --index-url "$$index";; \
	  */*) set -- "$(TORCH_RANGE)" --no-index --find-links "$$index";; \
	  *) set -- "$(TORCH_RANGE)" --index-url "https://download.pytorch.org/whl/$$index";; \
	esac; \
	echo "==> torch, from $$index"; \
	$(PY) -m pip install --disable-pip-version-check "$$@" && echo "$$index" > $(TORCH_FROM) || { \
	  echo "torch: '$$index': not to be had from there; name a mirror: make setup TORCH_INDEX=URL (or a folder of wheels, or pypi)" >&2; exit 2; }
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
	@made=$$($(VENV)/bin/moebench run --suite auto $(if $(RUN),--name $(RUN))); status=$$?; [ -n "$$made" ] || exit $$status; \
	  echo "$$made"; $(VENV)/bin/moebench report summary --run "$$(basename "$${made%%:*}")" || exit; exit $$status

# Tests run side by side, so that each takes one thread; and what they start need not compile the project's files again
# where an environment (many containers) says that nothing compiled is to be kept.
test test-long test-goldens: export OMP_NUM_THREADS := 1
test test-long test-goldens: export OPENBLAS_NUM_THREADS := 1
test test-long test-goldens: export PYTHONDONTWRITEBYTECODE :=

# In three processes; what measures time runs before them and alone. One test under a debugger: make test ARGS="-n0 --pdb ..."
# The last -m counts, so that ARGS may hold another one.
test: setup
	$(PY) -m pytest -n 3 -m "not long" $(ARGS)

# Proofs that last: a shorter test of `make test` has an eye on the same behaviour. What lasts a minute or more of them
# is marked `minutes` too: make test-long ARGS='-m "long and not goldens and not minutes"' leaves it out.
test-long: setup
	$(PY) -m pytest -n 3 -m "long and not goldens" $(ARGS)

# Numbers of all studies, as they were frozen (python -m tests.goldens).
test-goldens: setup
	$(PY) -m pytest -n 2 -m goldens $(ARGS)

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
