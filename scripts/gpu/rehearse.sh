#!/usr/bin/env bash
# Rehearses `measure.sh --first` on a CPU, with small models, as a GPU machine without a network would run it: from nothing
# but what carry.sh has packed, in an environment without this project's own packages.
#   scripts/gpu/rehearse.sh [FOLDER]      run carry.sh first; FOLDER (a temporary one) keeps the copy, log and results
#   MACHINE=…/bin/python scripts/gpu/rehearse.sh     an environment with torch, transformers, accelerate, peft and matplotlib,
#                                                    such as the GPU machine's own versions; default: those of .venv
# Compiled wheels are exchanged for those of the Python at hand where it is another one. Exit status 1 where a row failed, one
# is missing, or the results would not come back (8 files of 16 MiB). MINUTES (20) is the time that --first is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath -m "${1:-$(mktemp -d)}") here=$PWD
compgen -G '.wheels/*.whl' >/dev/null || { echo "rehearse.sh: there is no .wheels; run scripts/gpu/carry.sh" >&2; exit 2; }

rm -rf "$folder/checkout" "$folder/out" "$folder/measure"
mkdir -p "$folder/checkout" "$folder/out"
git ls-files -z | xargs -0 cp --parents -t "$folder/checkout"
cp -r .wheels "$folder/checkout/"
rm -rf "$folder/checkout/.wheels/site"

python=${MACHINE:-$folder/machine/bin/python}
if [ -z "${MACHINE:-}" ]; then
    rm -rf "$folder/machine"
    .venv/bin/python -m venv "$folder/machine"
    .venv/bin/python - "$folder/machine" <<'PYTHON'
"""Link the distributions that the GPU machine has, with all that they need, from this environment into a bare one."""
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

(site,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
wanted, there = ["torch", "transformers", "accelerate", "peft", "matplotlib", "pillow", "numpy"], set()
while wanted:
    name = wanted.pop().lower().replace("_", "-")
    try:
        found = distribution(name)
    except PackageNotFoundError:
        continue
    if name in there:
        continue
    there.add(name)
    needs = [Requirement(line) for line in found.requires or []]
    wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    for top in {Path(file).parts[0] for file in found.files or [] if ".." not in str(file)}:
        link, target = site / top, Path(str(found.locate_file(top)))
        if target.exists() and not link.exists():
            link.symlink_to(target)
assert not there & {"diffusers", "bitsandbytes"}
print("machine:", ", ".join(f"{name} {distribution(name).version}" for name in sorted(there)))
PYTHON
fi

tag=cp$("$python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
for wheel in "$folder"/checkout/.wheels/*-cp3*.whl; do
    case $(basename "$wheel") in *-"$tag"-* | *-abi3-*) continue ;; esac
    name=$(basename "$wheel" | cut -d- -f1) version=$(basename "$wheel" | cut -d- -f2)
    rm "$wheel"
    .venv/bin/python -m pip download -qq --no-deps --only-binary=:all: --python-version "${tag#cp}" \
        --dest "$folder/checkout/.wheels" "$name==$version" 2>/dev/null
    echo "exchanged: $name $version for $tag"
done

alone=() # no network, where this user may cut it off
if unshare -rn true 2>/dev/null; then alone=(unshare -rn); fi
cd "$folder/checkout"
env -i PATH="$PATH" HOME="$folder" OUT="$folder/out" PYTHON="$python" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
    ${alone[@]+"${alone[@]}"} scripts/gpu/measure.sh --first --size small --minutes "${MINUTES:-20}" --out "$folder/measure" \
    2>&1 | tee "$folder/log"

"$here/.venv/bin/python" - "$folder" <<'PYTHON'
"""Every point of --first has a row, none failed, and all of it would come back."""
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
wrong = [f"{row['what']}: {row['error']}\n{row.get('stderr', '')}" for row in rows if "error" in row]
wrong += [f"no row of point {point}" for point in {0, 1, 2, 3, 4} - {row["point"] for row in rows}]
if (folder / "checkout" / ".wheels" / "peer").is_dir() and not any(row["point"] == 7 for row in rows):
    wrong.append("no row of diffusers' script")
files = [path for path in (folder / "out").rglob("*") if path.is_file()]
if len(files) > 8 or max(path.stat().st_size for path in files) > 16 * 2**20:
    wrong.append("more than 8 files, or one of more than 16 MiB")
print(f"{len(rows)} rows, {len(wrong)} problems, {len(files)} file(s) to bring back; everything lies in {folder}")
print(*wrong, sep="\n")
sys.exit(bool(wrong))
PYTHON
