# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help demo test test-slow clean

help:
	@echo "make demo   set up, train on scikit-learn's digits, certify; shows where the picture is"
	@echo "make test   set up, lint, check types, run the tests"
	@echo "make test-slow   the tests that take a minute or more each"
	@echo "make clean  remove the environment and the demo's run"
	@echo "VENV=DIR and PYTHON=python3.12 choose the environment and the interpreter (Python >= 3.11)."

$(VENV)/.scripts: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("lipjax needs Python >= 3.11; give PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.tests: $(VENV)/.scripts tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

demo: $(VENV)/.scripts
	$(RUN) train.py --config=configs/digits.py --workdir=runs/digits
	$(RUN) certify.py --workdir=runs/digits
	@echo "The picture: runs/digits/certification/curve.png"

test: $(VENV)/.tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2

test-slow: $(VENV)/.tests
	$(RUN) -m pytest -m slow

clean:
	rm -rf $(VENV) runs/digits
