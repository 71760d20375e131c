#!/usr/bin/env bash
# Everything that has to hold before a change lands: ruff, pyright and all tests, in a .venv made here (or found here).
#   scripts/test.sh                    all of it
#   scripts/test.sh tests/test_kron.py -k compiles    the checks, and only these tests
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 takes .venv as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "test.sh: $*" >&2
    exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11, 3.12 or 3.13, found $(python3 --version 2>/dev/null || echo none); name one with PYTHON=…"
}

python=.venv/bin/python
if ! supported $python; then
    base=$(find_python)
    rm -rf .venv
    "$base" -m venv .venv >/dev/null 2>&1 || fail "$base cannot make a virtual environment (Debian: apt install python3-venv)"
fi

stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "${SKIP_INSTALL:-0}" != 1 ] && [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "installing into .venv (a few minutes the first time; log: .venv/install.log)"
    $python -m pip install -c constraints.txt -e '.[test]' >.venv/install.log 2>&1 ||
        fail "pip could not install (no network?): $(grep -m 1 -i error .venv/install.log || tail -n 1 .venv/install.log)"
    echo "$stamp" >.venv/installed
fi

export OMP_NUM_THREADS=1
step() {
    echo "== $*"
    "$@"
}
step .venv/bin/ruff check .
step .venv/bin/ruff format --check .
step .venv/bin/pyright --pythonpath $python
step $python -m pytest "$@"
