# `make demo` and `make test` set up their own virtual environment; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := 5.15.1
MIDDLE := 5.17.0
# As many processes as CI has cores, of one thread each.
PYTEST := -m pytest -q -n 2 --dist worksteal
test test-versions: export OMP_NUM_THREADS ?= 1

.PHONY: demo test check style test-versions clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready  ## convert the bundled model, verify it, generate from both
	$(BIN)/hf-mla demo

test: $(VENV)/ready  ## linter, type checker, docstrings, tests, examples
	$(MAKE) check
	$(BIN)/python $(PYTEST)

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet hf_mla conversion

style: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests on the oldest supported, a middle and the newest Transformers, each in its own environment.
test-versions:
	for version in $(OLDEST) $(MIDDLE) newest; do \
	  $(PYTHON) -m venv $(VENV)-$$version && \
	  grep -v '^transformers' constraints.txt > $(VENV)-$$version/constraints.txt && \
	  $(VENV)-$$version/bin/pip install --quiet --constraint $(VENV)-$$version/constraints.txt --upgrade --editable '.[dev]' \
	    "transformers$$(test $$version = newest || echo ==$$version)" && \
	  $(VENV)-$$version/bin/python $(PYTEST) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info
