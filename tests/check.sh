#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tests. `make test` installs and calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
pytest "$@"
