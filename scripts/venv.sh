# Sourced by quickstart.sh and test.sh: makes .venv in the root of the repository and installs the package into it.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
constraints="$root/constraints.txt"

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }

fail() {
    printf 'Error: %s\n' "$*" >&2
    exit 1
}

# The versions of constraints.txt need it; the package itself does with 3.10.
lowest_python=3.11

# The first Python of at least that, or the one named by $PYTHON.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (${lowest_python/./, }))" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python $lowest_python or newer is needed; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

make_venv() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null && return
    local python
    python="$(find_python)"
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check -c "$constraints" "$@"; }

# On Linux without an NVIDIA GPU, PyPI's torch would bring gigabytes of CUDA libraries along, so the CPU build is taken
# from PyTorch's own index. Where pip was told to look elsewhere (a mirror, a folder of wheels), that decides.
install_torch() {
    local configured
    configured="$("$venv/bin/python" -m pip config list)"
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! [[ "$configured" =~ index-url|find-links ]]
    then
        pip_install torch --index-url https://download.pytorch.org/whl/cpu
    else
        pip_install torch
    fi
}

# ensure_installed NAME EXTRA [COMMAND]: install the package with an extra, and run a command of further installs.
# A stamp of all that decides what is installed makes the next run skip this.
ensure_installed() {
    local stamp="$venv/.installed-$1" extra="$2" wanted
    make_venv
    wanted="$(cd "$root" && cat pyproject.toml setup.py "$constraints" scripts/venv.sh hf_frmerge/kernels/*.[ch] | cksum)"
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    say "Installing PyTorch (${constraints##*/} pins it; a few minutes the first time)"
    install_torch
    say "Installing hf_frmerge[$extra] and what it needs"
    pip_install -e "$root[$extra]"
    if [ $# -gt 2 ]; then "${@:3}"; fi
    echo "$wanted" >"$stamp"
}
