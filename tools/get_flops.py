"""Counts tokens and GMACs of a segmentor over the images of its test set, by part and against the dense ViT.

    python tools/get_flops.py CONFIG CHECKPOINT --json flops.json     # an MSViT: what the gate does with each image
    python tools/get_flops.py CONFIG --shape 512 512                  # without images: for shares of coarse regions
    python tools/get_flops.py DENSE_CONFIG                            # a VisionTransformer: the dense number

Images go through the config's test pipeline and its whole or slide inference, whose windows add up. Of the model only
the gate runs: all else follows from the tokens. A MAC is a multiply-accumulate of a matrix product or convolution;
a FLOP count is twice that.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List, Optional

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.apis import init_model
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import DATASETS
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmseg_msvit import MSViT
from mmseg_msvit.flops import HeadMacs, batch_macs, dense_macs, msvit_macs
from mmseg_msvit.metrics import summarize
from mmseg_msvit.tokens import TokenBatch, region_grid

PARTS = ('gate', 'embedding', 'encoder', 'neck', 'head')
SHARES = (0, 0.25, 0.5, 0.75, 1)


def cells(backbone: VisionTransformer, height: int, width: int) -> tuple:
    """(h, w), the grid of an image."""
    return -(-height // backbone.patch_size), -(-width // backbone.patch_size)


def record(backbone: VisionTransformer, heads: HeadMacs, grid: tuple, tokens: int, macs: Dict[str, int]) -> dict:
    """What one pass over one image costs, and what it would cost the dense ViT."""
    dense = {**dense_macs(backbone, grid), **heads(grid)}
    macs = {**macs, **heads(grid)}
    return dict(
        tokens=tokens,
        **{part: macs[part] for part in PARTS},
        total=sum(macs.values()),
        dense_tokens=dense_tokens(backbone, grid),
        **{f'dense_{part}': dense[part] for part in PARTS},
        dense_total=sum(dense.values()),
    )


def dense_tokens(backbone: VisionTransformer, grid: tuple) -> int:
    return grid[0] * grid[1] + int(backbone.with_cls_token)


def pass_record(backbone: VisionTransformer, heads: HeadMacs, size: tuple, tokens: Optional[TokenBatch]) -> dict:
    """The record of a pass over one image of (H, W) pixels; a dense ViT has no TokenBatch."""
    grid = cells(backbone, *size)
    if tokens is None:
        return record(backbone, heads, grid, dense_tokens(backbone, grid), dense_macs(backbone, grid))
    (macs,) = batch_macs(backbone, tokens)
    return record(backbone, heads, grid, int(tokens.active_counts()), macs)


def add_up(passes: List[Dict[str, int]]) -> Dict[str, int]:
    """An image's record from those of its passes."""
    return {key: sum(part[key] for part in passes) for key in passes[0]}


@torch.no_grad()
def count(model, dataset) -> List[Dict[str, int]]:
    """One record for each image: the sum over the passes of its inference."""
    backbone, heads = model.backbone, HeadMacs(model)
    passes = []

    def encode_decode(inputs, batch_img_metas):
        """In place of the segmentor's: counts a window of one image."""
        tokens = backbone.tokenize(inputs)[1] if isinstance(backbone, MSViT) else None
        passes.append(pass_record(backbone, heads, inputs.shape[2:], tokens))
        return inputs.new_zeros(len(inputs), model.out_channels, *inputs.shape[2:])

    model.encode_decode = encode_decode
    images = []
    try:
        for i in track(range(len(dataset)), 'images'):
            batch = model.data_preprocessor(pseudo_collate([dataset[i]]), training=False)
            model.inference(batch['inputs'], [sample.metainfo for sample in batch['data_samples']])
            images.append(add_up(passes))
            passes.clear()
    finally:
        del model.encode_decode
    return images


def shape_records(model, height: int, width: int) -> Dict[str, dict]:
    """Name -> record, for shares of coarse regions in one image; for a dense ViT one record."""
    backbone, heads = model.backbone, HeadMacs(model)
    grid = cells(backbone, height, width)
    if not isinstance(backbone, MSViT):
        return {'dense': pass_record(backbone, heads, (height, width), None)}
    hc, wc = region_grid(grid, backbone.side)
    found = {}
    for share in SHARES:
        coarse = round(share * hc * wc)
        fine = round(grid[0] * grid[1] * (1 - coarse / (hc * wc)))  # at odd edges as if all regions had equal cells
        macs = msvit_macs(backbone, grid, coarse, fine)
        found[f'{share:.0%} coarse'] = record(backbone, heads, grid, coarse + fine + int(backbone.with_cls_token), macs)
    return found


def summary(images: List[Dict[str, int]]) -> dict:
    """Statistics over images: of tokens, and in GMACs of each part and of the total; means of the dense model."""
    found = {'images': len(images)}
    for key, unit in (('tokens', 1), *((key, 1e9) for key in (*PARTS, 'total'))):
        dense = sum(image[f'dense_{key}'] for image in images) / unit / len(images)
        found[key] = summarize([image[key] / unit for image in images])
        found[key]['dense'] = dense
        found[key]['of_dense'] = found[key]['mean'] / dense if dense else None
    return found


def show(rows: Dict[str, list], columns: list, title: str) -> None:
    table = Table(title=title)
    for column in ('', *columns):
        table.add_column(column, justify='right' if column else 'left', no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *values)
    Console(width=110).print(table)


def number(value: Optional[float], share: bool = False) -> str:
    return '' if value is None else f'{value:.1%}' if share else f'{value:.1f}' if value >= 100 else f'{value:.3g}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?', help='without it weights, a learned gate too, have their first values')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='one image size in place of a data set')
    parser.add_argument('--json', type=Path, help='file for the numbers')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()

    model = init_model(args.config, args.checkpoint, device=args.device)
    if not isinstance(model.backbone, VisionTransformer):
        raise SystemExit(f'CONFIG: wanted an MSViT or a VisionTransformer, got {type(model.backbone).__name__}')
    if args.shape:
        result = shape_records(model, *args.shape)
        rows = {
            name: [
                f'{r["tokens"]}',
                *(number(r[part] / 1e9) for part in (*PARTS, 'total')),
                number(r['total'] / r['dense_total'], share=True),
            ]
            for name, r in result.items()
        }
        show(rows, ['tokens', *PARTS, 'total', 'of dense'], f'GMACs of an image of {args.shape[0]}x{args.shape[1]}')
    else:
        if args.checkpoint is None and isinstance(model.backbone, MSViT) and model.backbone.gate_learns:
            print('no CHECKPOINT: the gate has not learned anything, its tokens mean nothing')
        dataset = DATASETS.build(Config.fromfile(args.config).test_dataloader.dataset)
        result = summary(count(model, dataset))
        rows = {
            key if key == 'tokens' else f'{key} GMACs': [
                *(number(result[key][what]) for what in ('mean', 'p5', 'p50', 'p95', 'dense')),
                number(result[key]['of_dense'], share=True),
            ]
            for key in ('tokens', *PARTS, 'total')
        }
        show(rows, ['mean', 'p5', 'p50', 'p95', 'dense', 'of dense'], f'{result["images"]} images')
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = dict(config=args.config, checkpoint=args.checkpoint, shape=args.shape, **result)
        args.json.write_text(json.dumps(numbers, indent=2) + '\n')


if __name__ == '__main__':
    main()
