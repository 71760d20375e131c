#!/usr/bin/env bash
# Teaches the embedded model a poodle and shows it: no GPU, no weights to download, a few minutes on two cores.
#   scripts/quickstart.sh          run it again and it reuses what is there
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 takes .venv as it is; STEPS=100 trains for less (300).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
prepare_venv .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model is faster on one thread than on two
bin=.venv/bin run=runs/toybox steps=${STEPS:-300}

if [ -f $run/toybox.safetensors ]; then
    echo "$run/toybox.safetensors is there already: not trained again (remove $run to start over)"
else
    echo "teaching the embedded model a poodle: $steps steps at 64 x 64"
    resume=()
    [ -d $run/resume ] && resume=(--resume)
    $bin/krona-train --config configs/toybox.yaml --set "train.steps=$steps" ${resume[@]+"${resume[@]}"} || exit
fi

echo "drawing six prompts with the base model and with the adapter"
$bin/krona-sample $run "A [V] dog on the beach" "A [V] dog in the snow" "A [V] dog in the forest" \
    "A [V] dog at night" "A [V] dog on a red background" "A [V] dog in the mountains" \
    --num-images 2 --base --sheet --output $run/pictures || exit

sheet=$(ls -t $run/pictures/sheet-*.png | head -n 1)
cat <<TEXT

what it learnt:   $PWD/$sheet
the whole story:  $PWD/$run/report.html
the adapter:      $PWD/$run/toybox.safetensors

next, your own photos on SDXL (a GPU with 8 GB or more):
  .venv/bin/krona-train init path/to/photos --class dog --config dog.yaml   # writes a commented YAML
  .venv/bin/krona-train --config dog.yaml --check      # what would happen; loads nothing
  .venv/bin/krona-train --config dog.yaml
  .venv/bin/krona-sample runs/dog "A [V] dog on the beach"
TEXT
