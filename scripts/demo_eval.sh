#!/usr/bin/env bash
# Train, sample, evaluate, compare with LoRA and report, all on the embedded model, without a download.
#   scripts/demo_eval.sh [FOLDER]      about 5 minutes on 2 cores; open the two report.html that it prints at the end
# PYTHON names an interpreter that has the package installed (.venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
folder=${1:-runs/demo}
steps=${STEPS:-300}
began=$SECONDS
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD

train() { # NAME --set …: a run of its own in the background
    local name=$1
    shift
    "$python" -m diffusekrona_train --config configs/toybox.yaml --set "output=$folder/$name" --set "train.steps=$steps" \
        --set train.checkpoint_every=100 --set validation.every=100 --set "data.cache_dir=$folder/cache-$name" --overwrite \
        "$@" >"$folder/$name.log" 2>&1
}

mkdir -p "$folder"
echo "== training a Kronecker adapter and a LoRA of rank 4, side by side ($folder/krona.log, lora.log)"
train krona &
krona=$!
train lora --set adapter.type=lora --set adapter.rank=4 &
lora=$!
wait $krona || { tail -n 5 "$folder/krona.log" >&2; exit 1; }
wait $lora || { tail -n 5 "$folder/lora.log" >&2; exit 1; }

echo "== generating images, base model beside the adapter"
"$python" -m diffusekrona_train.cli.sample "$folder/krona" "A [V] dog on the beach" "A [V] dog at night" \
    --num-images 3 --base --sheet --output "$folder/pictures" | tail -n 2

echo "== which checkpoint is best"
"$python" -m diffusekrona_train.cli.evaluate best "$folder/krona" --num-images 2

echo "== KronA against LoRA"
"$python" -m diffusekrona_train.cli.evaluate compare "$folder/krona" "$folder/lora" --num-images 4 \
    --prompt "A [V] dog" --prompt "A [V] dog on the beach" --prompt "A [V] dog in the snow" --output "$folder/comparison"

echo "== done in $((SECONDS - began)) s: open $folder/krona/report.html and $folder/comparison/report.html"
