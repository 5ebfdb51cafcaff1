# `make demo` and `make test` install what they need into .venv, then do their job. Nothing else is needed first.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# PyTorch's own index of CPU builds: asked only where the configured package index has no CPU build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ONLY ?=
BIN = .venv/bin

.PHONY: demo test test-faults bench install clean

demo: install
	@$(BIN)/streamdpo demo

test: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/check.sh

# The long form of the fault suite: 50 seeds of kills on each backend, outages of minutes, 10,000 simulated schedules.
# It takes about an hour on 2 cores, and ends with a table of all faults, which is build/faults.json too.
test-faults: install
	@rm -rf build/faults && mkdir -p build/faults
	@STREAMDPO_FAULTS=long STREAMDPO_FAULT_ROWS=build/faults/tests.json OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/pytest -m fault; tests=$$?; \
	$(BIN)/python -m tests.simulation --seeds 10000 --processes 2 --rows build/faults/simulation.json; \
	simulation=$$?; \
	$(BIN)/python -m tests.fault_table build/faults build/faults.json && [ $$tests = 0 ] && [ $$simulation = 0 ]

bench: install
	@$(BIN)/python -m tests.bench $(ONLY)

install:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is missing: install python3.11 and python3.11-venv."; exit 3; }
	@$(PYTHON) deploy/install.py .venv --torch-cpu-index $(TORCH_CPU_INDEX)

clean:
	rm -rf .venv build runs
