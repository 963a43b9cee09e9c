# `make run` is the main job, `make test` the tests; both set up .venv first where that is needed.
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RUN ?= runs/digits

# Where Python is told to keep no bytecode, as in many containers, starting takes 25 s of which 15 compile packages.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run run-detect run-segment after-training test test-coreml test-executorch lint bench docs setup clean
.DEFAULT_GOAL := run

setup: .venv/ready

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Muntin needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python"; exit 2; }
	@echo "Setting up .venv with $$($(PYTHON) --version): 6 GB the first time, seconds from uv's cache"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[all,dev]"
	@touch $@

run: .venv/ready  ## train, evaluate, export, predict, measure and report on handwritten digits
	@echo "== Training on scikit-learn's handwritten digits into $(RUN)"
	@$(BIN)/muntin train --data digits --out $(RUN) --resume  # starts where nothing is there
	@echo "== Evaluating on the test split"
	@$(BIN)/muntin eval $(RUN)
	@echo "== Exporting to ONNX and comparing with PyTorch"
	@$(BIN)/muntin export $(RUN) --to onnx
	@echo "== Predicting held-out images"
	@$(BIN)/muntin predict $(RUN) $(RUN)/held_out --out $(RUN)/predictions.csv
	@echo "== Measuring latency"
	@$(BIN)/muntin bench $(RUN)
	@echo "== Writing the report"
	@$(BIN)/muntin report $(RUN)

run-detect: RUN = runs/detect
run-detect: .venv/ready  ## detection and instance segmentation on built-in scenes of digits, from nothing to an exported model
	@echo "== Training Mask R-CNN on built-in scenes into $(RUN)"
	@$(BIN)/muntin train --task instance --data scenes --out $(RUN) --resume
	@$(MAKE) --no-print-directory after-training RUN=$(RUN)

run-segment: RUN = runs/segment
run-segment: .venv/ready  ## semantic segmentation on built-in scenes of digits, from nothing to an exported model
	@echo "== Training a segmenter on built-in scenes into $(RUN)"
	@$(BIN)/muntin train --task segment --data scenes --out $(RUN) --resume
	@$(MAKE) --no-print-directory after-training RUN=$(RUN)

after-training:
	@echo "== Evaluating on the test split"
	@$(BIN)/muntin eval $(RUN)
	@echo "== Exporting to ONNX and comparing with PyTorch"
	@$(BIN)/muntin export $(RUN) --to onnx
	@echo "== Predicting held-out images"
	@$(BIN)/muntin predict $(RUN) $(RUN)/held_out --out $(RUN)/predictions
	@echo "== Measuring latency"
	@$(BIN)/muntin bench $(RUN)
	@echo "== Writing the report"
	@$(BIN)/muntin report $(RUN)

test: .venv/ready  ## tests that need no network and no GPU
	@echo "Running the tests"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-coreml: .venv-coreml/ready  ## Core ML export, in an environment of its own: its converter fails with newer numpy
	@echo "Running the tests of Core ML export"
	@.venv-coreml/bin/python -m pytest tests/test_coreml.py

test-executorch: .venv-executorch/ready  ## ExecuTorch export, in an environment of its own: it pins many packages
	@echo "Running the tests of ExecuTorch export"
	@.venv-executorch/bin/python -m pytest tests/test_executorch.py

.venv-%/ready: pyproject.toml | .venv/ready
	@echo "Setting up .venv-$*"
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-$*
	@$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --editable ".[$*]" "pytest>=8.3"
	@touch $@

lint: .venv/ready  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/ready  ## what benchmarks/results holds: parity, peers, profiles, claims, exports, start-up, digits: hours
	@$(BIN)/python benchmarks/parity.py
	@$(BIN)/python benchmarks/peers.py
	@$(BIN)/python benchmarks/profiles.py
	@$(BIN)/python benchmarks/training.py
	@$(BIN)/python benchmarks/growth.py
	@$(BIN)/python benchmarks/claims.py
	@$(BIN)/python benchmarks/exports.py
	@$(BIN)/python benchmarks/rmt_memory.py
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/digits.py --search
	@$(BIN)/python benchmarks/digits.py
	@$(BIN)/python benchmarks/digits_windows.py

docs: .venv/ready  ## the generated tables and pictures
	@$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .venv-coreml .venv-executorch build dist
