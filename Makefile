# make quickstart   builds the data, pretrains a small UniFluid, scores it     (20 minutes on two cores)
# make test         lint and tests
# make test-interop the parity tests that need other code bases installed, in .venv-interop (3 GB)
# make test-faults  breaks training runs in a hundred ways and compares what comes out   (ten minutes)
# make test-slow    the tests that take minutes each: the notebooks
# make test-demo    drives the demo in headless Chromium; DEMO_MODEL=... and SCREENSHOTS=docs for the
#                   README's pictures
# make test-plans   compiles every recipe for its TPU topologies: three quarters of an hour
# make lint         ruff alone
# make clean        removes the environment and caches; keeps data_cache/ and runs/
#
# All of it happens in .venv, which is made when missing and brought up to date when setup.py changes.

VENV := .venv
INTEROP := .venv-interop
BIN := $(VENV)/bin
RUN := runs/quickstart

# The first Python 3.12 that really runs: under pyenv the name alone does not say so.
PYTHON ?= $(shell for python in python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: quickstart test test-slow test-demo test-interop test-faults test-plans lint clean

# glibc would hand the memory of a step back to the kernel after each; keeping it saves a tenth.
quickstart: export MALLOC_MMAP_MAX_ = 0
quickstart: export MALLOC_TRIM_THRESHOLD_ = 17179869184
quickstart: export MALLOC_ARENA_MAX = 1
# Every command keeps what is already done and goes on from there.
quickstart: $(VENV)/installed-data,eval
	$(BIN)/unifluid data build easy_vqa openmoji
	test -d $(RUN)_initial || $(BIN)/unifluid convert --config=experiments/quickstart.py \
		--siglip=unifluid_jax/assets/siglip_small --out=$(RUN)_initial
	$(BIN)/unifluid train --config=experiments/quickstart.py --workdir=$(RUN)
	$(BIN)/unifluid evaluate --workdir=$(RUN)

# As many workers as cores; a file stays on one worker, for its fixtures' sake.
test: lint
	$(BIN)/python -m pytest -n logical --dist loadfile

test-interop: $(INTEROP)/installed
	$(INTEROP)/bin/python -m data.tokenizers data_cache
	$(INTEROP)/bin/python -m pytest -m interop

test-faults: $(VENV)/installed-test
	$(BIN)/python tests/faults.py --faults=100

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

test-demo: export DEMO_MODEL := $(DEMO_MODEL)
test-demo: export SCREENSHOTS := $(SCREENSHOTS)
test-demo: $(VENV)/installed-test
	$(BIN)/python -m pytest -m demo tests/test_demo_browser.py

test-plans: $(VENV)/installed-test,tpu
	$(BIN)/python -m pytest -m "" tests/test_plan.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(INTEROP) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed-%: setup.py pyproject.toml $(VENV)/made
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .[$*]
	@touch $@

$(VENV)/made: .python-version
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.12 found: install it (pyenv install 3.12), or make PYTHON=path/to/python3.12"; \
		exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# By uv: pip tries versions of the gemma package's dependencies for longer than ten minutes.
$(INTEROP)/installed: setup.py pyproject.toml .python-version
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check uv
	$(INTEROP)/bin/uv pip install --quiet --python $(INTEROP)/bin/python --editable .[gemma,test]
	@touch $@

# A half-made environment must not count as made.
.DELETE_ON_ERROR:
