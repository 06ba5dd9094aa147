# make demo   aligns a small LLaVA on this machine      make test   runs all tests
# Both make the environment (.venv) first if it is missing.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo test lint setup clean

demo: setup
	$(VENV)/bin/raylign align jobs/configs/demo.yaml --overwrite

test: setup
	$(PYTHON) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup:
	@sh cluster/environment/setup.sh $(VENV)

clean:
	rm -rf $(VENV) runs
