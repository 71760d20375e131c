# Sourced by quickstart.sh and test.sh: make or find .venv in the project folder and install into it.
#   prepare_venv .            the package
#   prepare_venv '.[test]'    the package and what the tests need
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 uses .venv as it is. Sets $python.

fail() {
    echo "$(basename "$0"): $*" >&2
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
    fail "needs Python 3.11, 3.12 or 3.13, but found $(found=$(python3 --version 2>/dev/null) || :; echo "${found:-none}"); name one with PYTHON=…"
}

prepare_venv() {
    local wanted=$1 base stamp
    python=.venv/bin/python
    if ! supported $python; then
        base=$(find_python) || exit 1
        rm -rf .venv
        "$base" -m venv .venv >/dev/null 2>&1 ||
            fail "$base cannot make a virtual environment (Debian: apt install python3-venv)"
    fi
    stamp="$wanted $(cat pyproject.toml constraints.txt | cksum)"
    if [ "${SKIP_INSTALL:-0}" = 1 ] || grep -qxF "$stamp" .venv/installed 2>/dev/null; then
        return
    fi
    echo "installing into .venv (a few minutes the first time; log: .venv/install.log)"
    $python -m pip install -c constraints.txt -e "$wanted" >.venv/install.log 2>&1 ||
        fail "pip could not install (no network?): $(grep -m 1 -i error .venv/install.log || tail -n 1 .venv/install.log)"
    echo "$stamp" >>.venv/installed
}
