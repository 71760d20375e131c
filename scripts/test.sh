#!/usr/bin/env bash
# Everything that has to hold before a change lands: ruff, codespell, pyright, the documentation and all tests, in a .venv
# made here (or found here).
#   scripts/test.sh                    all of it
#   scripts/test.sh --all              with the long forms of tests, such as every case of the fault matrix
#   scripts/test.sh tests/test_kron.py -k compiles    the checks, and only these tests
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 takes .venv as it is.
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
    echo "not checked: report pages in a browser (no Chromium here)"
fi
