# One line for each intention; CI runs the same lines.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
EXTRAS := edge,train,export,serve,ray,dev

.PHONY: help setup browser demo test test-gpu lint format bench

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv with all that the other lines need

$(VENV)/.ready: pyproject.toml constraints.txt deploy/triton_server.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton --requirement deploy/triton_server.txt
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

bench: setup  ## measure labelling, peers, scale, pseudo-labels, engines and serving; write the book
	$(BIN)/python -m benchmarks.labelling --rounds 1
	$(BIN)/python -m benchmarks.peers --limit 48 --rounds 1
	$(BIN)/python -m benchmarks.scale --rounds 1
	$(BIN)/python -m benchmarks.label_pass --limit 8 --rounds 1
	$(BIN)/python -m benchmarks.engines --models ViT-B-32,student --rounds 1
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.report
