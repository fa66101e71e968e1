# These commands do everything on a machine with Python >= 3.11 and make:
#   make quickstart            train and improve a small image generator on real digits, about five minutes
#   make test                  lint, format check, all tests but the next ones
#   make test-faults           the tests that kill, stop, fill and damage things
#   make docs                  the documentation as a site, in site/index.html
# They create .venv and install into it when needed. PYTHON=/path/to/python uses an existing environment as it is.

RECIPE ?= class
QUICKSTART_FLAGS ?=
VENV := .venv
INSTALLED := $(VENV)/.installed

ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(INSTALLED)
endif

.PHONY: quickstart test test-faults docs lint format install clean

quickstart: $(READY)
	$(RUN) -m grpo quickstart --recipe $(RECIPE) $(QUICKSTART_FLAGS)

# Two tests at a time, each on one thread: tests are small, and threads that wait for each other on busy cores take most
# of the time. Tests of one file stay together, which keeps what they share.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

test-faults: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m faults

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet
	@echo "site/index.html"

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(READY)

$(INSTALLED): pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$(python3 --version)" >&2; exit 1; }
	@echo "Installing into $(VENV): PyTorch and its libraries, about 6 GB, some minutes"
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
