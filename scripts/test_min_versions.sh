#!/usr/bin/env bash
# Install the lowest versions pyproject.toml allows (constraints-min.txt) into a fresh .venv-min, build the package as a
# user would, and run a part of the tests that touches every library.
#
#     bash scripts/test_min_versions.sh [options of pytest]
#
# Takes about ten minutes, half of them for pip. The tests import the installed package, not this checkout. torch is at
# the one version of constraints.txt: an older one would bring gigabytes of CUDA libraries from PyPI.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

venv="$root/.venv-min"
constraints="$root/constraints-min.txt"
tests=(
    tests/checkpoints
    tests/cli/test_commands.py
    tests/cli/test_demo.py
    tests/demo
    tests/evaluation/text/test_forward.py
    tests/hub/test_hub_server.py
    tests/hub/test_push.py
    tests/hub/test_round_trip.py
    tests/kernels
    tests/merging/outputs/test_factor_output.py
    tests/merging/test_hub_inputs.py
    tests/merging/callbacks/test_reporting.py
    tests/methods
    tests/report/test_figures.py
    tests/test_merger.py
)

make_venv
say "Installing the lowest versions"
install_torch
pip_install "$root[demo,fast,report,tensorboard]" hypothesis pytest pytest-timeout pytest-xdist scipy

# Away from the checkout, so that `import hf_frmerge` finds what was installed.
away="$(mktemp -d)"
trap 'rm -rf "$away"' EXIT
cp -r "$root/tests" "$root/model_cards" "$root/scripts" "$root/pyproject.toml" "$away"
cd "$away"
say "Running the tests"
"$venv/bin/python" -m pytest -n 2 -q "$@" "${tests[@]}"
