#!/usr/bin/env bash
# Measures speed and memory at real size, all points in one command, and prints one table.
#   scripts/gpu/measure.sh --first                      the most valuable numbers, in 9.3 minutes on a fast GPU
#   scripts/gpu/measure.sh                              everything, on the GPU (hours; see --minutes)
#   scripts/gpu/measure.sh --out runs/measure --minutes 9    stops in time; the same command continues where it stopped
#   scripts/gpu/measure.sh --only 1,2                   some points
#   scripts/gpu/measure.sh --size small                 a dry run on the CPU, in minutes
# docs/performance.md explains the points. Wheels in .wheels/ (scripts/gpu/carry.sh) are installed first, without a network.
# PYTHON names the interpreter.
set -euo pipefail
export MEASURE_BEGAN=$EPOCHSECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if compgen -G '.wheels/*.whl' >/dev/null; then
    site=${WHEELS_SITE:-.wheels/site}
    if [ ! -e "$site/installed" ]; then
        began=${EPOCHREALTIME/,/.}
        "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .wheels/*.whl 2>/dev/null &&
            touch "$site/installed" || echo "measure.sh: .wheels/ is not for this Python; going on without it" >&2
        INSTALL_SECONDS=$(awk -v a="$began" -v b="${EPOCHREALTIME/,/.}" 'BEGIN { printf "%.1f", b - a }')
        export INSTALL_SECONDS
    fi
    [ ! -e "$site/installed" ] || export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
exec "$python" -m scripts.bench "$@"
