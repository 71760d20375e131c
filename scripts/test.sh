#!/usr/bin/env bash
# Run every check that a change must pass: ruff, codespell, the documentation, pyright and all tests. Makes .venv, or uses
# the one that exists.
#   scripts/test.sh                    everything
#   scripts/test.sh --all              also the long forms of tests, such as every case of the fault matrix
#   scripts/test.sh tests/test_kron.py -k compiles    the checks, and only these tests
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 uses .venv as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh
prepare_venv '.[test]'

export OMP_NUM_THREADS=1
step() {
    echo "== $*"
    "$@"
}
step .venv/bin/ruff check .
step .venv/bin/ruff format --check .
step .venv/bin/codespell
step "$python" -m scripts.docs
step .venv/bin/zensical build --strict
step .venv/bin/pyright --pythonpath "$python"
step "$python" -m pytest -n 2 --dist loadfile "$@"   # one-thread processes
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "not checked: report pages and the studio in a browser (Chromium is not installed)"
fi
