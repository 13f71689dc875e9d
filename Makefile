# Needs Python 3.11 or later, pip, make and a C++ compiler; everything else is installed into $(VENV), at the versions of constraints.txt.

PYTHON ?= python3
VENV   ?= .venv
# Test processes. 0 runs the tests in one process, with as many threads as torch likes.
WORKERS ?= 2
# More arguments for pytest or the benchmark: make test ARGS="tests/optim -k lion".
ARGS ?=
# A further package index for torch: that of its ROCm builds, say.
TORCH_INDEX ?=
COMPARE ?= code-lm --methods adamw,lion,muon --trials 6 --tune-steps 150 --steps 300 --seeds 5 --out runs/compare --workers 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROJECT := pyproject.toml constraints.txt hatch_build.py tools/lazy_stubs.py

.DEFAULT_GOAL := help
.PHONY: help venv compare test bench gpu-check lint format docs stubs clean

help:
	@echo "make compare  install and weigh AdamW, Lion and Muon against each other; results in runs/compare"
	@echo "make test     install and run the tests"
	@echo "make bench    install and measure step times beside other libraries'"
	@echo "make gpu-check  ten minutes on your GPU, and a JSON file to send back"
	@echo "make lint     ruff, pyright, the import contracts, and whether the site builds"
	@echo "make format   mend what ruff can mend"
	@echo "make docs     build the site into build/site"
	@echo "make stubs    after adding a rule: let type checkers see it"
	@echo "make venv     only set up $(VENV)"
	@echo "make clean    delete caches and builds; $(VENV) and runs/ stay"

# Set-up. A stamp in $(VENV) says what has been installed, so that it is done again only after a change of what it depends on.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"poise needs Python 3.11 or later, this is {v.major}.{v.minor}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch alone and first: the version that constraints.txt names, whatever the other packages would choose.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

# What the optimizers need to run.
$(VENV)/.core: $(PROJECT) $(VENV)/.torch
	$(PIP) numpy safetensors
	@touch $@

$(VENV)/.compare: $(PROJECT) $(VENV)/.torch
	$(PIP) --editable '.[compare]'
	@touch $@

$(VENV)/.test: $(PROJECT) $(VENV)/.torch
	$(PIP) --editable '.[compare,evolve,hf,peers,test]'
	@touch $@ $(VENV)/.compare

# timm asks for torchvision, which its optimizers have no use for, and whose published builds do not fit every build of torch.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) --no-deps timm
	@touch $@

# The type checker reads what the tests import, so it needs all of that as well.
$(VENV)/.lint: $(PROJECT) $(VENV)/.torch
	$(PIP) --editable '.[compare,evolve,hf,peers,test,lint,docs]'
	@touch $@ $(VENV)/.compare $(VENV)/.test

# The page of results.json is made from its schema, which needs what compares.
$(VENV)/.docs: $(PROJECT) $(VENV)/.torch
	$(PIP) --editable '.[compare,docs]'
	@touch $@ $(VENV)/.compare

venv: $(VENV)/.compare

compare: $(VENV)/.compare
	$(BIN)/poise compare $(COMPARE)

# With several test processes each takes one thread: two that fight over two cores are slower than either alone.
test: $(VENV)/.test
	$(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/step_time.py $(ARGS)

# A PYTHON that was named and has torch is used as it is, and so is the torch of a $(VENV) that has one: what fits a GPU is its
# owner's choice. Only an environment without torch gets one.
HAS_TORCH := -c 'import torch, numpy, safetensors'
NAMED := $(filter-out file,$(origin PYTHON))

gpu-check:
	@python="$(BIN)/python"; \
	if [ -n "$(NAMED)" ] && $(PYTHON) $(HAS_TORCH) 2>/dev/null; then python="$(PYTHON)"; \
	elif ! "$$python" $(HAS_TORCH) 2>/dev/null; then $(MAKE) --no-print-directory $(VENV)/.core || exit; fi; \
	"$$python" benchmarks/gpu_check.py $(ARGS)

# Every check runs, whatever the one before it said.
lint: $(VENV)/.lint stubs
	@failed=; export NO_MKDOCS_2_WARNING=1; \
	check() { echo "== $$*"; "$(BIN)/$$@" || failed="$$failed, $$*"; }; \
	check ruff check .; \
	check ruff format --check .; \
	check pyright --pythonpath $(BIN)/python; \
	check lint-imports; \
	check mkdocs build --strict; \
	if [ -n "$$failed" ]; then echo "lint: failed: $${failed#, }"; exit 1; else echo "lint: good"; fi

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

stubs: $(BIN)/python
	@$(BIN)/python tools/lazy_stubs.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
