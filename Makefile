# Two commands: `make race` and `make test`. Both set up .venv first, once; tests need more in it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
FOR_TESTS := .venv/.for-tests
TORCH := 2.13.0

.PHONY: race test quick lint setup clean

race: $(INSTALLED)
	$(BIN)/steepest race

test: $(FOR_TESTS)
	$(BIN)/python -m pytest -n auto --dist loadfile

# Without the tests that compile, spawn processes or train for more than a few seconds.
quick: $(FOR_TESTS)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

lint: $(FOR_TESTS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(FOR_TESTS)

# Where no GPU is seen, the CPU build of torch is taken if pip's indexes offer one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "steepest needs Python 3.11 or later; set PYTHON=path/to/it.")'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null \
	  || $(BIN)/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null \
	  || echo "pip's indexes have no CPU build of torch $(TORCH): installing the default build, which may be large."
	$(BIN)/pip install --quiet --constraint constraints.txt torch==$(TORCH) --editable '.[bench]'
	touch $@

$(FOR_TESTS): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==$(TORCH) --editable '.[bench,data,dev]'
	touch $@

clean:
	rm -rf .venv
