#!/usr/bin/env bash
# Build the native kernels with the sanitisers of addresses and undefined behaviour (gcc), and run the tests that use
# them on that build: a read or a write beside a buffer ends the run with the line that does it.
#
#     bash scripts/test_sanitized.sh [options of pytest]
#
# Works from any directory; uses .venv, and builds in a temporary folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_installed test dev,quantised
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
cp -r "$root/hf_frmerge" "$root/tests" "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$build"
rm -f "$build"/hf_frmerge/kernels/_native*.so # a build that fails must not leave the plain one to be tested

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all"
cd "$build"
say "Building with $sanitize"
CC=gcc CFLAGS="$sanitize -fno-omit-frame-pointer -g" LDFLAGS="$sanitize" \
    "$venv/bin/python" setup.py -q build_ext --inplace --build-temp "$build/objects"
ls hf_frmerge/kernels/_native*.so >/dev/null || fail "The kernels were not built."

say "Running: python -m pytest tests/kernels tests/checkpoints/tensors $*"
# Python itself is not built so: the libraries come first, and what it keeps to its end is no leak of ours. Of a page that
# is gone (SIGBUS) the kernels make an error themselves. What is found is printed by C, which pytest must not keep.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH="$build:$build/tests" \
    "$venv/bin/python" -m pytest -p no:cacheprovider --capture=sys tests/kernels tests/checkpoints/tensors "$@"
