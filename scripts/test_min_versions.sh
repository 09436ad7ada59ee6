#!/usr/bin/env bash
# Install the lowest versions pyproject.toml allows (constraints-min.txt) into .venv-min, with the lowest Python there is,
# and run the tests.
#
#     bash scripts/test_min_versions.sh [options of pytest]
#
# Works from any directory. A second run skips the installation. Where pip takes torch from PyPI (see install_torch), that
# brings 3 GB of CUDA libraries: an old CPU build is in PyTorch's own index only.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

venv="$root/.venv-min"
constraints="$root/constraints-min.txt"
lowest_python=3.10
PYTHON="${PYTHON:-python3.10 ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.10.*/bin/python python3.11 python3}"

ensure_installed min dev
cd "$root"
say "Running: python -m pytest -n 2 $*"
exec "$venv/bin/python" -m pytest -n 2 "$@"
