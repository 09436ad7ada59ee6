#!/usr/bin/env bash
# Install into .venv and run the tests.
#
#     bash scripts/test.sh [options of pytest]
#
# Works from any directory. A second run skips the installation.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Quantised models need a newer Python and torch than the package, so they are not in `dev`.
ensure_installed test dev,quantised
cd "$root"
say "Running: python -m pytest -n 2 $*"
exec "$venv/bin/python" -m pytest -n 2 "$@"
