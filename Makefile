# `make demo` trains a Vision Mamba on real images and draws what it learned; `make test` runs the tests.
# Both create .venv on first use and need nothing but Python 3.10 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DATA ?= digits
OUT ?= runs/demo_$(DATA)
SHORT ?=

.PHONY: demo test test-contract lint format bench clean

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m zoo.tools.demo --data $(DATA) --output $(OUT) $(if $(SHORT),--short)

test: $(VENV)/.installed
	$(VENV)/bin/pytest -n 2

# timm's own tests on every model: minutes, and the network once
test-contract: $(VENV)/.installed
	$(RUN) tests/timm_contract.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(RUN) -m zoo.tools.benchmark ops

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
