# make demo: set everything up, calibrate the packaged demo model, show what it does
# make test: set everything up, run the tests
# make evidence: every defence and control on the demo's test things, as in the README
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo evidence test check clean

demo: $(READY)
	$(BIN)/shiftdc-export demo --output demo-shiftdc --force
	$(BIN)/shiftdc-export evaluate demo-shiftdc --split development --limit 90 --no-attach --output demo-slice

evidence: $(READY)
	$(BIN)/shiftdc-export demo --output demo-shiftdc --force
	$(BIN)/shiftdc-export evaluate demo-shiftdc --defence all --output demo-evidence

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# seen by the tests alone, which say why (tests/with_torchvision.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/test-only torchvision
	touch $@

clean:
	rm -rf $(VENV) demo-shiftdc demo-slice demo-evidence
