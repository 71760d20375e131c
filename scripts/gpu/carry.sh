#!/usr/bin/env bash
# Downloads into .wheels/ what a GPU machine without a network lacks to run this project; measure.sh installs from there.
#   scripts/gpu/carry.sh                   for Python 3.12 on x86-64 Linux, with bitsandbytes' library for CUDA 13.0
#   PYTHON_VERSION=3.13 CUDA=128 PLATFORM=aarch64 scripts/gpu/carry.sh
#   WITHOUT="" scripts/gpu/carry.sh        for a machine that has torch alone: 16 MiB more
#   scripts/gpu/carry.sh --list            only print the packages and versions
#   scripts/gpu/carry.sh --rehearse [FOLDER]       afterwards: try on a CPU what was packed
#   PEER=…/train_dreambooth_lora_sdxl.py scripts/gpu/carry.sh      diffusers' script from a file; without, from GitHub's tag
#   SPRITES=build/toybox scripts/gpu/carry.sh      where toybox's emoji packages are or go (npm fetches them); that is the default
# Versions: constraints.txt. WITHOUT names packages that the machine has (by default what comes with an installation of
# transformers). Checkout and wheels together may weigh LIMIT (64) MiB: more is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Runs `measure.sh --first` on a CPU, with small models, as a GPU machine without a network would: from nothing but what is
# packed, in an environment without this project's own packages. FOLDER (a temporary one) keeps the copy, log and results.
# MACHINE=…/bin/python names an environment with torch, transformers, accelerate, peft and matplotlib, such as the GPU
# machine's own versions; default: those of .venv. Compiled wheels are exchanged for those of the Python at hand where it is
# another one. Exit status 1 where a row failed, one is missing, or the results would not come back (8 files of 16 MiB).
# MINUTES (20) is the time that --first is given.
rehearse() {
    local folder here=$PWD python tag wheel name version alone
    folder=$(realpath -m "${1:-$(mktemp -d)}")
    compgen -G '.wheels/*.whl' >/dev/null || { echo "carry.sh: there is no .wheels to rehearse with; run scripts/gpu/carry.sh first" >&2; exit 2; }

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
for name, point in {"peer": 7, "world": 8}.items():
    if (folder / "checkout" / ".wheels" / name).is_dir() and not any(row["point"] == point for row in rows):
        wrong.append(f"no row of {name}")
files = [path for path in (folder / "out").rglob("*") if path.is_file()]
if len(files) > 8 or max(path.stat().st_size for path in files) > 16 * 2**20:
    wrong.append("more than 8 files, or one of more than 16 MiB")
print(f"{len(rows)} rows, {len(wrong)} problems, {len(files)} file(s) to bring back; everything lies in {folder}")
print(*wrong, sep="\n")
sys.exit(bool(wrong))
PYTHON
}
if [ "${1:-}" = --rehearse ]; then
    shift
    rehearse "$@"
    exit
fi

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
version=${PYTHON_VERSION:-3.12} cuda=${CUDA:-130} machine=${PLATFORM:-x86_64}

# What krona-train and the measurements import, and a machine with torch, numpy, pillow and matplotlib may lack. Not here:
# datasets and pyarrow, imported only where photos come from a data set, and hf-xet, which speeds up downloads from the hub.
packages="
    accelerate annotated-doc annotated-types anyio bitsandbytes certifi charset-normalizer click diffusers
    einops filelock h11 httpcore2 httpx2 huggingface_hub idna importlib_metadata lazy-importer lycoris_lora
    markdown-it-py mdurl peft psutil pydantic pydantic_core Pygments PyYAML regex requests rich safetensors
    shellingham tokenizers toml tqdm transformers truststore typer typing-inspection urllib3 zipp
"
# transformers and huggingface_hub stay or go together: their versions belong to each other
without=${WITHOUT-transformers tokenizers huggingface_hub accelerate safetensors peft psutil einops regex}
pinned=()
for name in $packages; do
    case " $without " in *" $name "*) continue ;; esac
    line=$(grep -i "^${name//[-_]/[-_]}==" constraints.txt) || {
        echo "carry.sh: constraints.txt has no version of $name" >&2
        exit 1
    }
    pinned+=("$line")
done
if [ "${1:-}" = --list ]; then
    printf '%s\n' "${pinned[@]}"
    exit
fi

platforms=()
for libc in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${libc}_$machine"); done
platforms+=(--platform "manylinux2014_$machine" --platform "manylinux1_$machine")

rm -rf .wheels
mkdir .wheels
"$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "$version" "${platforms[@]}" --dest .wheels "${pinned[@]}"

# bitsandbytes brings a library for each CUDA release: one of them is needed, and the one for no GPU at all.
"$python" - "$cuda" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

(wheel,) = Path(".wheels").glob("bitsandbytes-*.whl")
kept = {f"libbitsandbytes_cuda{sys.argv[1]}.so", "libbitsandbytes_cpu.so"}
slim = wheel.with_suffix(".slim")
with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as new:
    libraries = {name for name in old.namelist() if re.search(r"/libbitsandbytes_\w+\.so$", name)}
    dropped = {name for name in libraries if name.split("/")[-1] not in kept}
    if len(libraries) - len(dropped) < len(kept):
        sys.exit(f"carry.sh: bitsandbytes has no library for CUDA {sys.argv[1]}, only {', '.join(sorted(libraries))}")
    for entry in old.infolist():
        if entry.filename in dropped:
            continue
        data = old.read(entry)
        if entry.filename.endswith(".dist-info/RECORD"):
            lines = data.decode().splitlines(keepends=True)
            data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
        new.writestr(entry, data)
slim.replace(wheel)
PYTHON

# diffusers' own script, of the version that is carried, to be timed beside ours
release=$(sed -n 's/^diffusers==//p' constraints.txt) peer=.wheels/peer/train_dreambooth_lora_sdxl.py
mkdir .wheels/peer
if [ -n "${PEER:-}" ]; then
    cp "$PEER" $peer
else
    curl -fsS -o $peer "https://raw.githubusercontent.com/huggingface/diffusers/v$release/examples/dreambooth/${peer##*/}" ||
        { rmdir .wheels/peer && echo "carry.sh: going on without diffusers' script; PEER=… names a file of it" >&2; }
fi

# toybox's small world in one file, for the machine to train toybox-flow on
mkdir .wheels/world
PYTHONPATH=. "$python" scripts/toybox/sprites.py .wheels/world/sprites.npz "${SPRITES:-build/toybox}" ||
    { rmdir .wheels/world && echo "carry.sh: going on without toybox's sprites; toybox-flow will not be trained further" >&2; }

files=(.wheels/*.whl) beside=()
for file in .wheels/peer/*.py .wheels/world/*.npz; do [ ! -f "$file" ] || beside+=("$file"); done
kilobytes() { du -ck "$@" | tail -n 1 | cut -f 1; }
mapfile -d '' -t tracked < <(git ls-files -z)
wheels=$(kilobytes "${files[@]}" ${beside[@]+"${beside[@]}"}) checkout=$(printf '%s\0' "${tracked[@]}" | du -ck --files0-from=- | tail -n 1 | cut -f 1)
du -k "${files[@]}" "${tracked[@]}" | sort -rn | head -n 8 | awk '{ printf "%8.1f MiB  %s\n", $1 / 1024, $2 }'
awk -v n=${#files[@]} -v wheels="$wheels" -v checkout="$checkout" -v limit="${LIMIT:-64}" 'BEGIN {
    both = (wheels + checkout) / 1024
    printf "%8.1f MiB  %d wheels and what goes with them, %.1f MiB with the checkout\n", wheels / 1024, n, both
    if (both > limit) { printf "carry.sh: that is over %d MiB; name more packages in WITHOUT\n", limit > "/dev/stderr"; exit 1 }
}'
