"""Writes any plain ViT's weights with the names that mmseg's ViT and MSViT use.

    python tools/convert_vit.py SRC DST

SRC may be of timm, DeiT, DINO, DINOv2, MAE, CLIP's image tower, the official Segmenter, transformers, mmpretrain, mmseg
(.pth, .safetensors) or AugReg (.npz). Layer scale is folded into the projections before it. Register tokens, SwiGLU,
relative and rotary positions are refused: mmseg's ViT has none. MSViT reads all of these itself; this is for mmseg's
own ViT, and for looking at a checkpoint.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from mmseg_msvit.tooling.command_line import write_whole
from mmseg_msvit.weights.checkpoint import refuse_not_finite
from mmseg_msvit.weights.layouts import fold_layer_scale, rename
from mmseg_msvit.weights.reading import read_checkpoint, unwrap
from mmseg_msvit.weights.resampling import resample_positions, source_grid

# Tensors that mmseg's ViT has no place for, and without which the features are others.
FOREIGN = ('register_tokens', 'ffn.w12.weight', 'relative_position_bias_table')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src')
    parser.add_argument('dst', type=Path)
    args = parser.parse_args()
    layout, tensors, others = rename(unwrap(read_checkpoint(args.src)))
    foreign = [name for name in tensors if name.endswith(FOREIGN)]
    if foreign or 'pos_embed' not in tensors:
        parser.error(f"SRC: wanted what mmseg's ViT has, got {(foreign or ['no pos_embed'])[0]}: MSViT reads this file")
    refuse_not_finite(tensors)
    fold_layer_scale(tensors)  # mmseg's ViT has none
    table = tensors['pos_embed']
    _, grid = source_grid(table.shape[1])
    tensors['pos_embed'], _ = resample_positions(table, grid, 'bicubic')  # its own grid: as mmseg's, with cls alone
    write_whole(args.dst, partial(torch.save, tensors))
    print(f'{args.dst}: {len(tensors)} tensors from the layout of {layout}; {len(others)} are not of the ViT')


if __name__ == '__main__':
    main()
