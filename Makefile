# make demo   train a small LLaDA-MoE on this machine and see it fill in text
# make test   run the test suite
# make lint   check style and import rules
# make clean  remove the environments and caches (runs/ and data/ stay)
# PYTHON=python3.12 chooses another interpreter, with an environment of its own (.venv-3.12); ARGS is passed on, for example
# make demo ARGS="--corpus my_texts/", make test ARGS="tests/launch -x". Tests run in three processes (tests/workers.py);
# make test ARGS="-n 0" runs them in one.

SHELL := /bin/bash
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
NEW_ENOUGH := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info >= (3, 11)))' 2>/dev/null)
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(VERSION))
BIN := $(VENV)/bin
WORKERS := $(if $(findstring no:xdist,$(ARGS)),,-n 3 --dist loadgroup --no-loadscope-reorder)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

ifneq ($(MAKECMDGOALS),clean)
ifneq ($(NEW_ENOUGH),1)
$(error $(PYTHON) is $(if $(VERSION),Python $(VERSION),not there); Python 3.11 or newer is needed, for example: make $(MAKECMDGOALS) PYTHON=python3.12)
endif
endif

demo: $(VENV)/.installed
	$(BIN)/python -m llada_megatron.launch.demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-* build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where a distribution leaves ensurepip out of its Python, that Python's pip puts one into the environment.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV) >/dev/null || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV) (Python $(VERSION), $(CONSTRAINTS)); the first time takes a few minutes"
	$(PIP) -e . -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[dev]' -c $(CONSTRAINTS)
	@touch $@
