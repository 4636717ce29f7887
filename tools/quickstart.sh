#!/usr/bin/env bash
# From nothing to a trained MSViT: makes the environment, draws a small data set, trains, tests, and shows the gate.
#
#   bash tools/quickstart.sh             # at most 6 minutes on 2 CPU cores after the installation
#
# Everything lands in .venv, data/toy_scenes and work_dirs/quickstart of the project.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
source .venv/bin/activate
export PYTHONUNBUFFERED=1

config=configs/toy/segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py
work=work_dirs/quickstart
say() { printf '\n[quickstart %3ds] %s\n' "$SECONDS" "$*"; }
SECONDS=0

# Runs a command with its whole output in a log, and shows the lines that tell how far it is.
logged() {
  local log=$1
  shift
  if ! "$@" 2>&1 | tee "$log" | { grep --line-buffered -E 'Iter\((train|val|test)\)' || true; }; then
    tail -n 40 "$log" >&2
    echo "quickstart.sh: '$*' failed, see $log" >&2
    return 1
  fi
}

say "1/5 the data set: scenes of 256x256 pixels with 7 classes (half a minute)"
unset TOY_SCENES
python tools/dataset_converters/toy_scenes.py data/toy_scenes

say "2/5 training: 400 steps of a ViT with 6 layers of width 128 (2 to 4 minutes)"
rm -rf "$work"
mkdir -p "$work"
logged "$work/train.log" mim train mmsegmentation "$config" --work-dir "$work" --yes

say "3/5 testing the checkpoint"
logged "$work/test.log" mim test mmsegmentation "$config" --checkpoint "$work/iter_400.pth" --work-dir "$work/test" --yes

say "4/5 what the gate does"
python -W ignore tools/analyze_gate.py "$config" "$work/iter_400.pth" --out "$work/gate.json" --html "$work/gate.html" |
  tee "$work/gate.log"

say "5/5 pictures"
python -W ignore tools/show_tokens.py "$config" "$work/iter_400.pth" data/toy_scenes/images/val/0003.png \
  --truth data/toy_scenes/annotations/val --out "$work/pictures"

say "done: labels of the training scenes oriented the gate (PurityLoss), beside batch shaping"
python - "$work" <<'END'
import glob
import json
import sys

import cv2
import numpy as np

work = sys.argv[1]
miou = json.load(open(max(glob.glob(f'{work}/test/*/*.json'))))['mIoU']
gate = json.load(open(f'{work}/gate.json'))
files = sorted(glob.glob('data/toy_scenes/annotations/val/*.png'))
pixels = sum(np.bincount(cv2.imread(f, cv2.IMREAD_UNCHANGED).ravel(), minlength=7) for f in files)
commonest = 100 * pixels.max() / pixels.sum() / len(pixels)
print(f'mIoU                  {miou:.1f}  (always the commonest class: {commonest:.1f})')
print(f'tokens of an image    {gate["tokens"]:.1f} of {gate["dense_tokens"]:.0f}')
print(f'coarse regions        {gate["coarse"]:.1%}')
print(f'  of uniform regions  {gate["coarse_of_uniform"]:.1%}')
print(f'  of mixed regions    {gate["coarse_of_mixed"]:.1%}')
print(f'picture and report    {work}/pictures/0003.png, {work}/gate.html')
if miou < 5 * commonest:
    sys.exit('quickstart.sh: the model has not learned: wanted at least five times the mIoU of the commonest class')
if gate['coarse_of_uniform'] < gate['coarse_of_mixed'] + 0.5:
    sys.exit('quickstart.sh: the gate is not conditional: wanted uniform regions coarse far oftener than mixed ones')
END
