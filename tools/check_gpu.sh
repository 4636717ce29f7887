#!/usr/bin/env bash
# Whether all is as it should be on your GPU, in five minutes: the project's own tests run on CPU. Prints what is equal
# to what, and how fast it is; ends with 1 where something is not.
#
#   bash tools/check_gpu.sh        # in the environment where mmseg_msvit is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ $gpus == 0 ]]; then
  echo 'check_gpu.sh: wanted a CUDA device, torch finds none' >&2
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

echo '1/3 attention, a model and mixed precision'
python -W ignore tools/check_gpu.py
if ((gpus > 1)); then
  echo '2/3 two processes'
  python -W ignore -m torch.distributed.run --nproc_per_node 2 tools/check_gpu.py
else
  echo '2/3 two processes: left out, there is one GPU'
fi
echo '3/3 speed of ViT-S/16 at 512x512, a random half of the regions coarse, bfloat16'
for mode in test train; do
  python -W ignore tools/benchmark.py configs/msvit/segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py \
    --against mmseg::segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py \
    --gate random:0.5 --batch 1 8 --amp --device cuda --mode "$mode"
done
