# make demo: set everything up, calibrate the packaged demo model, show what it does
# make test: set everything up, run the tests
# make bench: the table of the README's section "Speed", on one CPU thread
# make evidence: every defence and control on the demo's test split, as in the README
# make families: every image-text-to-text type of transformers the whole way, into docs/families.md; goes on where it stopped
# make mutants MUTANTS='exporter.evaluation.verdict*': which broken lines the tests do not notice (docs/mutants.md)
# make published SHIFTDC_PUBLISHED=FOLDER: small files of published checkpoints, which are no part of this project, the whole way
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: bench demo evidence families mutants published test check clean

demo: $(READY)
	$(BIN)/shiftdc-export demo --output demo-shiftdc --force
	$(BIN)/shiftdc-export evaluate demo-shiftdc --split development --limit 90 --no-attach --output demo-slice

evidence: $(READY)
	$(BIN)/shiftdc-export demo --output demo-shiftdc --force
	$(BIN)/shiftdc-export evaluate demo-shiftdc --defence all --output demo-evidence

bench: $(READY)
	for name in directions baking replies evaluation startup table; do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.$$name || exit 1; done

test: $(READY)
	$(BIN)/python -m pytest

families: $(READY)
	$(BIN)/python tests/support/families_report.py $(FAMILIES)

mutants: $(READY)
	$(BIN)/mutmut run --max-children 2 $(MUTANTS)
	$(BIN)/mutmut results

published: $(READY)
	$(BIN)/python tests/support/vocabularies.py $(VENV)/vocabularies
	SHIFTDC_VOCABULARIES=$(abspath $(VENV)/vocabularies) $(BIN)/python -m pytest -n 2 --dist loadscope tests/pipeline/test_published.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/vulture

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# seen by the tests alone, which say why (tests/support/with_torchvision.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/test-only torchvision timm
	touch $@

clean:
	rm -rf $(VENV) demo-shiftdc demo-slice demo-evidence mutants
