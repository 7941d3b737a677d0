# Each target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The tests start hundreds of servers. Where this is set, each would compile all of its modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test lab check bench bench-lab docs minimum fuzz soak clean

help:            ## List the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)   ## Every part at work on the built-in mediated device; no hardware, no root
	$(BIN)/vfiod demo

test: $(READY)   ## Everything that needs no emulator: types, style, layers, unit, integration, interop, fuzz
	$(BIN)/python -m compileall -q protocol server client  # servers cannot: their sandbox lets them write no file
	$(BIN)/python -m pytest -m "not lab and not qemu" tests

lab: $(READY)    ## The real kernel and the real QEMU, under emulation; installs what they need (apt, as root)
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/lab/setup
	$(BIN)/python -m compileall -q protocol server client tests  # the guests read these files, and are slow
	VFIOD_LAB_REQUIRED=1 $(BIN)/python -m pytest -m "lab or qemu" tests/lab tests/interop

check: $(READY)  ## Types, style and layers only
	$(BIN)/python -m pytest tests/unit/test_checks.py

bench: $(READY)  ## Ratios to peers measured in the same run; no pass or fail
	$(BIN)/python -m tests.bench

bench-lab: $(READY) ## The same to the kernel's own VFIO, in the lab's machine "bench"
	$(BIN)/python -m tests.lab run bench -- 'python -m tests.bench --only kernel'

docs: $(READY)   ## Write again what is written from the code: references, manual pages, the schema
	$(BIN)/python -m vfiod.protocol.reference > docs/commands.md
	$(BIN)/python -m vfiod.server.interrupts.tables > docs/platform-interrupts.md
	$(BIN)/python -m vfiod.protocol.settings_reference markdown > docs/configuration.md
	$(BIN)/python -m vfiod.protocol.settings_reference schema > docs/vfiod.schema.json
	$(BIN)/python -m vfiod.client.manual docs/man

fuzz: $(READY)   ## A long run of the fuzz tests and of every target (an hour or more); by atheris if it is there
	VFIOD_FUZZ_EXAMPLES=5000 $(BIN)/python -m pytest tests/fuzz --ignore tests/fuzz/test_targets.py
	VFIOD_EVERY_LINE=1 $(BIN)/python -m pytest tests/integration/client/test_interrupted.py
	$(BIN)/python -m tests.fuzz --seconds 60

soak: $(READY)   ## 100,000 hotplugs, interrupts and mappings on one server (ten minutes to half an hour); draws docs/pictures/soak.svg
	$(BIN)/python -m tests.soak --svg docs/pictures/soak.svg

minimum:         ## The tests on the oldest dependencies that pyproject.toml allows
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-minimum/bin/python -m pip install --quiet --editable . --group test --constraint tests/minimum.txt
	.venv-minimum/bin/python -m pytest -m "not lab and not qemu" tests --ignore tests/unit/test_checks.py \
	    --deselect tests/unit/client/test_methods.py::test_a_type_checker_sees_them  # mypy is none of them

clean:           ## Remove what the targets made
	rm -rf $(VENV) .venv-minimum .lab .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# pip 25.1 is the first that installs dependency groups.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "vfiod needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y python3-venv && $(PYTHON) -m venv $(VENV); } \
	    || { echo "Python's venv module is missing: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@
