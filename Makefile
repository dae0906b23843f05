# make study   the main job in a fresh environment: PRESET=smoke|quick|full (quick is the default), JOBS=2 processes
# make test    the test suite;  make compiled, make slow  those left out
# make coverage  test and compiled at once, as .ci/run does; fails under 97 % of the lines and branches
# make lint, docs, bench, clean
# On Linux without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages.
PYTHON ?= python3
PRESET ?= quick
JOBS ?= 2
ARGS ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: study test compiled slow coverage lint docs bench mutants clean
.DELETE_ON_ERROR:

study: $(VENV)/.examples
	$(BIN)/python -u examples/sodef_mnist.py --preset $(PRESET) --jobs $(JOBS) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow and not compiled" $(ARGS)

compiled: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m compiled --timeout 900 $(ARGS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "slow and not compiled" --timeout 600 $(ARGS)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" --timeout 900 --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict odelayers
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

# One table a file, into benchmarks/results/; ARGS="--rounds 3" for a quick look. bars.py reads what the others wrote.
bench: $(VENV)/.peers
	for table in forward_backward conv_field fixed_grid sde stiffness_spread stiff growth jacobians spectra memory bars; do \
	  $(BIN)/python -u benchmarks/$$table.py $(ARGS) || exit 1; done

# A seeded sample of mutants of the mathematics against the fast tests; resumes, writes benchmarks/results/mutants.*
mutants: $(VENV)/.dev
	$(BIN)/python -u tests/mutation_check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file per extra: what is installed already is not installed again until its files change.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "odelayers needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# torch first and alone: without its pin an install may take gigabytes of other CUDA packages.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[$*]'
	touch $@

# The peers of the benchmarks. torchdyn comes without what it asks for: torchvision, a trainer and a notebook, of which
# its integrators use nothing; what they do use stands in the extra. Where they do not all install each is tried alone:
# one that does not install stops nothing, is named under the tables, and is tried again by the next `make bench`.
$(VENV)/.peers: $(VENV)/.examples
	if $(INSTALL) --editable '.[bench]' && $(INSTALL) --no-deps torchdyn; then touch $@; else \
	  for peer in torchode diffrax torchcde attrs '--no-deps torchdyn'; do $(INSTALL) $$peer || true; done; fi
