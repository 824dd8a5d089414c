# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz slurm gpu signals docs lint format clean

# The environment is complete when the stamp is newer than what it was made from.
$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hcnet needs Python 3.10 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.stamp
	$(BIN)/hcnet pretrain --size pico
	$(BIN)/hcnet report
	$(BIN)/hcnet report --format html --output results/report.html
	@echo "Open results/report.html in a browser for curves, pictures and provenance."

test: $(VENV)/.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Hostile and damaged files, 10,000 random ones for each test; `make test` has 40 fixed ones.
fuzz: $(VENV)/.stamp
	HCNET_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz --numprocesses 2 --timeout 0

# All that a real Slurm on this machine does to the cells of a study; `make test` has one quick test of it.
slurm: $(VENV)/.stamp
	HCNET_SLURM=1 $(BIN)/python -m pytest tests/test_real_slurm.py --timeout 3000 -s

# What a GPU computes, then how fast, in results/tables/speed-gpu*.md; under ten minutes on one card, no network.
gpu: $(VENV)/.stamp
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: PyTorch sees no CUDA device on this machine, so there is nothing to test")'
	$(BIN)/python -m pytest tests/gpu --timeout 300
	$(BIN)/hcnet bench --models t,reference,swin_tiny_patch4_window7_224,convnext_tiny --mode infer,train \
	    --precision fp32,bf16 --batch-size 64 --rounds 5 --device cuda --output results/tables/speed-gpu.md
	$(BIN)/hcnet bench --models t,convnext_tiny --mode infer,train --precision bf16 --compile --batch-size 64 \
	    --rounds 5 --device cuda --output results/tables/speed-gpu-compiled.md

# Signals at random moments to 2 processes under torchrun; HCNET_SIGNALS is the number of moments of each signal.
signals: $(VENV)/.stamp
	HCNET_SIGNALS=$${HCNET_SIGNALS:-10} $(BIN)/python -m pytest tests/test_signals_at_random.py --timeout 0 -s

# README, docs/ and the generated references as pages in build/site; fails at a link that leads nowhere.
docs: $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
