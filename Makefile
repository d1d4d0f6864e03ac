# Two commands do all the set-up: `make demo` and `make test`. (Without compiling: Python compiles what it imports.)
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help demo test test-slow test-versions docs clean

help:
	@echo "make demo   set up, certify a network that comes along, train another, certify it; says which pages to open"
	@echo "make test   set up, lint, check types, run the tests"
	@echo "make test-slow   the tests that take a minute or more each"
	@echo "make test-versions   the core tests on the oldest supported versions, and on the newest if there is a newer Python"
	@echo "make docs   the documents as a site, in site/index.html"
	@echo "make clean  remove the environment, the demo's runs and the site"
	@echo "VENV=DIR and PYTHON=python3.12 choose the environment and the interpreter (Python >= 3.11)."

$(VENV)/.scripts: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("lipjax needs Python >= 3.11; give PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.tests: $(VENV)/.scripts tests/requirements.txt
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r tests/requirements.txt
	touch $@

# First a network that comes along, so that there is a page at once; then one of your own.
demo: $(VENV)/.scripts
	$(RUN) certify.py --network=digits-dense --data=digits --epsilon=0.5 --modes=global,local --nocurve --workdir=runs/shipped
	$(RUN) train.py --config=configs/digits_dense.py --workdir=runs/demo
	$(RUN) certify.py --workdir=runs/demo
	@echo "The pages to open: runs/shipped/certification/report.html and runs/demo/certification/report.html"

test: $(VENV)/.tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

test-slow: $(VENV)/.tests
	$(RUN) -m pytest -m slow

test-versions: $(VENV)/.tests
	rm -rf $(VENV)/versions
	$(RUN) tests/versions.py $(VENV)/versions

docs: $(VENV)/.tests
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs/shipped runs/demo site
