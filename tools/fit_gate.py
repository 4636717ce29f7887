"""Turns a trained dense segmentor into one with tokens of several scales, in minutes and without labels.

    python tools/fit_gate.py CONFIG CHECKPOINT --out converted                   # from CONFIG's training images
    python tools/fit_gate.py CONFIG CHECKPOINT --out converted --images FOLDER   # from any others
    python tools/fit_gate.py CONFIG CHECKPOINT --out converted --budget 0.4 --scales 16 32 64

CONFIG's backbone is a VisionTransformer, BEiT or MAE of mmseg, or an MSViT, MSBEiT or MSMAE with a FixedGate. Its
weights and the head's stay as they are; a gate learns where this very model needs its fine tokens. Part of what is
saved comes from images that are a little smaller; --full-size leaves them as they are. On the dense grid coarse tokens
are blended with their neighbours, and a linear head reads tokens, which changes no answer. Writes config.py and
checkpoint.pth into --out, train.py, which trains with this gate, and picture.png, and compares both models on at most
100 of the images.
"""

import argparse
from pathlib import Path

import cv2
import torch

from mmseg_msvit.measuring.visualization import draw_image
from mmseg_msvit.tooling.command_line import DEVICE, InputError, one_line_errors, positive, print_table
from mmseg_msvit.tooling.comparison import compare
from mmseg_msvit.tooling.conversion import KINDS, check_out, convert, dense_backbone, head_on_tokens, write
from mmseg_msvit.tooling.dense_pass import TARGETS, find_images, gather
from mmseg_msvit.tooling.gate_fitting import check_budget, find_threshold, fit, gate_logits, shared_size
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='folder for the converted model')
    parser.add_argument('--images', type=Path, help="folder of images; without it those of the config's training set")
    parser.add_argument('--limit', type=positive, default=500, help='of images, at most')
    parser.add_argument(
        '--target', choices=TARGETS, default='mixed', help="mixed: the model's own doubt; labels: truth"
    )
    parser.add_argument(
        '--gate',
        choices=tuple(KINDS),
        default='context',
        help="context: sees pixels around each region; glance: what the ViT's first blocks make of them; mlp: a "
        'region; the others are not fitted: they score the pixels of a region by hand',
    )
    parser.add_argument('--budget', type=float, default=0.6, help='share of the dense tokens that is kept on average')
    parser.add_argument('--full-size', action='store_true', help='save tokens by coarse regions alone')
    parser.add_argument('--scales', type=positive, nargs='+', help="pixels of a token's side, as 16 32 64; None: two")
    parser.add_argument('--steps', type=positive, default=1000, help='of the optimizer, each of 8 images')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()
    if not 0 < args.budget < 1:
        raise InputError(f'--budget: wanted a share of the tokens, in (0, 1), got {args.budget:g}')

    check_out(args.out, args.config, args.checkpoint)
    torch.manual_seed(0)
    config = load_config(args.config)
    dense = load_model(config, args.checkpoint, args.device, torch.nn.Module)
    patch = dense_backbone(dense, args.config).patch_size
    linear = head_on_tokens(dense) == 'TokenLinearHead'  # which answers the same on tokens, and faster
    model, changes = convert(config, dense, args.gate, args.scales or (patch, 2 * patch), linear)
    reader = FileReader(config)
    images, truths = find_images(config, args.images, args.limit)
    try:
        examples, windows = gather(dense, reader, images, truths, args.target)
    except InputError as error:
        unneeded = str(error).startswith('truth:') and args.target == 'mixed'
        raise InputError(f'{error}{". No labels are needed: --images FOLDER reads none" * unneeded}') from error
    backbone = model.backbone
    size = 1.0 if args.full_size else shared_size(args.budget)
    check_budget(backbone, windows, args.budget, size)
    fit(model, examples, windows, args.budget, args.steps)
    backbone.input_scale = size
    logits = gate_logits(model, examples, windows)
    backbone.select.threshold, share = find_threshold(backbone, windows, logits, args.budget)
    write(config, model, changes, reader.classes, args.out)

    settled = f'at {backbone.input_scale:.0%} of their size, threshold {backbone.select.threshold:.4g}'
    rows = []
    for row in compare(model, examples):
        miou = '' if row['miou'] is None else f'{row["miou"]:.2f}'
        agreement = f'{row["agreement"]:.2f} % of pixels'
        rows.append([row['name'], f'{row["tokens"]:.1f}', f'{row["gmacs"]:.3g}', agreement, miou])
    title = f'{len(images)} images, which the gate was fitted to, {settled}: {share:.1%} of the dense tokens'
    print_table(title, ['tokens', 'backbone GMACs', 'as the dense model', 'mIoU'], rows)
    shown = examples[len(examples) // 2]
    cv2.imwrite(str(args.out / 'picture.png'), draw_image(model, shown.data, reader.palette, shown.labels)[..., ::-1])
    print(f'{args.out}/config.py and checkpoint.pth; train.py trains with this gate; picture.png shows one image')


if __name__ == '__main__':
    with one_line_errors():
        main()
