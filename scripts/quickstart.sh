#!/usr/bin/env bash
# Train the embedded model on a poodle and show the result: no GPU, no weights to download, a few minutes on two cores.
#   scripts/quickstart.sh                        run it again to continue; finished work is reused
#   scripts/quickstart.sh --model toybox-flow    the same with the embedded flow transformer
#   scripts/quickstart.sh --studio               the same in the browser: opens krona-studio, which trains the poodle
# PYTHON names the interpreter for a new .venv; SKIP_INSTALL=1 uses .venv as it is; STEPS=100 trains for fewer steps (300).
set -euo pipefail
model=toybox package=.
case "$*" in
    "") ;;
    --studio) package='.[studio]' ;;
    "--model toybox" | "--model toybox-flow") model=$2 ;;
    *)
        echo "error: $*: give nothing, --studio, or --model with toybox or toybox-flow" >&2
        exit 2
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
prepare_venv "$package"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model is faster on one thread than on two
bin=.venv/bin run=runs/$model steps=${STEPS:-300}
if [ "$package" != . ]; then
    exec $bin/krona-studio runs --demo
fi

if [ -f $run/$model.safetensors ]; then
    echo "$run/$model.safetensors exists: not trained again (to start over, remove $run)"
else
    echo "training the embedded model on a poodle: $steps steps at 64 x 64"
    resume=()
    [ -d $run/resume ] && resume=(--resume)
    $bin/krona-train --config configs/$model.yaml --set "train.steps=$steps" ${resume[@]+"${resume[@]}"} || exit
fi

echo "generating images for six prompts, with the base model and with the adapter"
$bin/krona-sample $run "A [V] dog on the beach" "A [V] dog in the snow" "A [V] dog in the forest" \
    "A [V] dog at night" "A [V] dog on a red background" "A [V] dog in the mountains" \
    --num-images 2 --base --sheet --output $run/pictures || exit

sheet=$(ls -t $run/pictures/sheet-*.png | head -n 1)
cat <<TEXT

contact sheet:  $PWD/$sheet
report:         $PWD/$run/report.html
adapter:        $PWD/$run/$model.safetensors

next: your own photos, on SDXL (needs an NVIDIA GPU, about 8 GB or more by estimate)
  .venv/bin/krona-train init path/to/photos --class dog --config dog.yaml   # writes a commented YAML
  .venv/bin/krona-train --config dog.yaml --check      # photos, captions, layers, memory; loads no model
  .venv/bin/krona-train --config dog.yaml
  .venv/bin/krona-sample runs/dog "A [V] dog on the beach"
TEXT
