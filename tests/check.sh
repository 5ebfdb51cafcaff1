#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tests. `make test` installs and calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE # several test processes share the cores: none may spin while it waits
ruff check .
ruff format --check .
mypy
pytest "$@"
