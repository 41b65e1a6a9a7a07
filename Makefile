# One line for each intention; CI runs the same lines.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
EXTRAS := edge,train,export,dev

.PHONY: help setup browser demo test test-gpu lint format bench

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv with all that the other lines need

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

browser:  ## install a headless Chromium for the gallery's tests (Debian or Ubuntu, as root)
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

demo: setup  ## make 300 scenes, label them, print mAP, write a gallery
	$(BIN)/cliplet demo

test: setup  ## run all tests that need no GPU
	$(BIN)/pytest -n auto --dist loadfile

test-gpu: setup  ## run the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu

lint: setup  ## style, types, dead comments
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cliplet train export deploy benchmarks

format: setup  ## bring the sources into the one format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench: setup  ## measure labelling against a plain open_clip loop and pseudo-labels against one crop at a time
	$(BIN)/python -m benchmarks.label
	$(BIN)/python -m benchmarks.label_memory
	$(BIN)/python -m benchmarks.label_pass
	$(BIN)/python -m benchmarks.report
