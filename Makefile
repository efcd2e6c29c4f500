# Every target but `clean` works on a fresh machine: it makes .venv and installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
KERNELS := src/hansa/sparse/kernels.cpp src/hansa/sparse/build.py

.PHONY: setup demo test acceptance lint audit docs bench clean

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hansa needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv .venv
	@touch $@

# torch is installed first and by its exact version, so that nothing else chooses its build.
.venv/.installed: .venv/.python pyproject.toml constraints.txt hatch_build.py $(KERNELS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/.installed

demo: setup
	$(BIN)/hansa demo

test: setup
	$(BIN)/python -m pytest

# Claims about learning that take minutes of training.
acceptance: setup
	$(BIN)/python -m pytest -m acceptance -n 0

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -r src -c pyproject.toml

# Known weaknesses of the pinned versions, by the database of PyPA; it needs the network, and fails
# where that has nothing to say of a package.
audit: .venv/.python
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# The documentation as a site, in build/site; any web server shows it, this machine's included:
# .venv/bin/python -m http.server -d build/site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python benchmarks/personalisation.py --quick
	$(BIN)/python benchmarks/simulation.py --quick
	$(BIN)/python benchmarks/scaling.py --quick
	$(BIN)/python benchmarks/sparse_training.py --quick --threads 1
	$(BIN)/python benchmarks/worldlm.py --quick
	$(BIN)/python benchmarks/curation.py --quick
	$(BIN)/python benchmarks/safeguard.py --quick
	$(BIN)/python benchmarks/audit.py --quick
	$(BIN)/python benchmarks/fuzz.py --quick

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
