# A plain `pip install torch` on Linux brings CUDA libraries of several GB. One release is therefore installed first, by
# version, before anything that only requires torch can choose one. For another release, or a local build label such as
# 2.13.0+cpu: `make demo TORCH_VERSION=...`.
TORCH_VERSION ?= 2.13.0

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-docs test-fresh test-lowest figures lint format build clean

help:
	@echo "make demo        tag the images in examples/images"
	@echo "make test        run the linter and the fast tests"
	@echo "make test-slow   run the slow tests"
	@echo "make test-docs   run every command of the pages in docs/"
	@echo "make test-fresh  load a pushed model in an environment without this package"
	@echo "make test-lowest run the fast tests with the lowest versions that setup.py allows"
	@echo "make figures     draw the figures of README and docs"
	@echo "make lint        run ruff check and ruff format --check"
	@echo "make format      fix what ruff can fix"
	@echo "make build       build wheel and sdist in dist/"
	@echo "make clean       remove the environment and everything built"

# These load only files of this repository, so they need no model hub.
demo test test-slow test-docs test-fresh test-lowest: export HF_HUB_OFFLINE := 1

# One thread for each of the two processes of the tests.
test test-lowest: export OMP_NUM_THREADS := 1

# As in `optsg tag`: when several threads end, MKL may otherwise release their memory in an endless loop.
test test-slow test-docs test-lowest: export MKL_DISABLE_FAST_MM := 1

demo: $(VENV)/.installed-demo
	$(BIN)/optsg tag --model checkpoints/optsg-icon-small examples/images

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-docs: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow tests/test_docs.py

test-fresh: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow tests/test_fresh_environment.py

test-lowest: $(LOWEST)/.installed-$(TORCH_VERSION)
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

figures: $(VENV)/.installed-test
	$(BIN)/python docs/figures/tagged_examples.py
	$(BIN)/python docs/figures/decoding_times.py

build: $(VENV)/.installed-test
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	$(if $(PYTHON),,$(error No Python 3.10 or newer found; name one with `make PYTHON=/path/to/python3`))
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-$(TORCH_VERSION): | $(BIN)/python
	$(BIN)/python -m pip install "torch==$(TORCH_VERSION)"
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.installed-demo: setup.py pyproject.toml $(VENV)/.torch-$(TORCH_VERSION)
	$(BIN)/python -m pip install --editable ".[video]"
	touch $@

$(VENV)/.installed-test: setup.py pyproject.toml $(VENV)/.torch-$(TORCH_VERSION)
	$(BIN)/python -m pip install --editable ".[test]"
	touch $@

# torch comes first and without its dependencies: uv keeps what is installed, and would keep their newest versions.
$(LOWEST)/.installed-$(TORCH_VERSION): setup.py pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install uv
	$(LOWEST)/bin/python -m pip install --no-deps "torch==$(TORCH_VERSION)"
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[test]"
	touch $@
