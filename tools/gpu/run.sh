#!/usr/bin/env bash
# Measure one part of what needs a GPU. Each part takes less than seven minutes on one H100.
#
#   tools/gpu/run.sh PART [DIR]                     PART: smoke, table-3, decode, training, model,
#                                                   recovery or engines
#   SIZE=tiny DEVICE=cpu tools/gpu/run.sh PART DIR  a rehearsal on a CPU
#
# The result is DIR/gpu-PART.json; DIR is docs/measurements unless it is given. The parts `model` and
# `recovery` prune the model in the folder MODEL with the texts TRAIN and VALID (by default the
# demo's), and write DIR/gpu-model/: the criteria of Table 2, and refit, distillation and depth.
#
# Packages that the machine lacks may lie as wheels in .wheels/, large ones in pieces:
# split -b 60M WHEEL .wheels/NAME.whl.part-
set -euo pipefail
cd "$(dirname "$0")/../.."
part=${1:?which part: smoke, table-3, decode, training, model or engines}
folder=${2:-docs/measurements}
output=$folder/gpu-$part.json
device=${DEVICE:-cuda}
size=${SIZE:-7b}
python=${PYTHON:-python3}
site=$PWD/.wheels/site
export PYTHONPATH=$site:$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

if [ -d .wheels ] && [ ! -d "$site" ]; then
  for first in .wheels/*.part-aa; do
    if [ -e "$first" ]; then cat "${first%aa}"* > "${first%.part-aa}"; fi
  done
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" .wheels/*.whl
fi

suite() {
  "$python" -m tools.gpu.suite "$@" --size "$size" --device "$device" --output "$output"
}

# The options of the cells: a real small model on a GPU, or something that ends in a minute.
model() {
  local table=$1 rows=$2
  shift 2
  local assets=lpdeploy/demo/assets steps=(--steps 150 --batch-size 16 --seq-len 512 "$@")
  local cells=(--ratios 0.2,0.5 --jobs 4 --rows "$rows")
  if [ "$size" = tiny ]; then
    steps=(--steps 4 --batch-size 2 --micro-batch-size 2 --seq-len 64 --calibration-samples 4)
    cells=(--ratios 0.5 --rows "${rows##*,}" --jobs 1)
  fi
  "$python" -m lpdeploy paper "$table" "${MODEL:-$assets/story-llama-1M}" \
    --data "${TRAIN:-$assets/train.txt}" --perplexity "${VALID:-$assets/valid.txt}" \
    --eval-seq-len 512 --seeds 1 "${cells[@]}" --output "$folder/gpu-model" \
    -- "${steps[@]}" --device "$device"
}

case $part in
  smoke) "$python" -m tools.gpu.smoke --device "$device" --output "$output" ;;
  table-3 | decode) suite "$part" ;;
  training) suite pruning pruning-offload pruning-65b ;;
  model) model 2 dense,magnitude,wanda,gradient,lora-8bit,gate,random,lora --lr 3e-4 ;;
  recovery) model recovery one-shot,one-shot-refit,one-shot-depth,fast,all-width,all ;;
  engines) suite onnx ort trt ;;
  *) echo "There is no part '$part'." >&2; exit 2 ;;
esac
