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

# The long form of the fault suite: outages of minutes, and 20,000 simulated schedules (about an hour on 2 cores).
test-faults: install
	@mkdir -p build
	@STREAMDPO_FAULTS=long OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest tests/faults
	@$(BIN)/python -m tests.simulation --seeds 20000 --processes 2 --json build/faults.json

bench: install
	@$(BIN)/python -m tests.bench $(ONLY)

install:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is missing: install python3.11 and python3.11-venv."; exit 3; }
	@$(PYTHON) deploy/install.py .venv --torch-cpu-index $(TORCH_CPU_INDEX)

clean:
	rm -rf .venv build runs
