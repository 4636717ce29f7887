"""Counts tokens and GMACs of a segmentor over the images of its test set, by part and against the dense ViT.

    python tools/get_flops.py CONFIG CHECKPOINT --json flops.json     # an MSViT: what the gate does with each image
    python tools/get_flops.py CONFIG --shape 512 512                  # without images: for shares of coarse regions
    python tools/get_flops.py DENSE_CONFIG                            # a VisionTransformer: the dense number

Images go through the config's test pipeline and its whole or slide inference, whose windows add up. Of the model only
the gate runs: all else follows from the tokens. A MAC is a multiply-accumulate of a matrix product or convolution;
a FLOP count is twice that.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Optional

from mmseg_msvit.gates.learned import LearnedGate
from mmseg_msvit.measuring.flops import PARTS, PLAIN_VITS, HeadMacs, dense_cost, inference_cost, share_cost
from mmseg_msvit.measuring.inspection import check_one_pass
from mmseg_msvit.measuring.metrics import summarize_costs
from mmseg_msvit.tokens.token_map import region_grid
from mmseg_msvit.tooling.command_line import DEVICE, about, one_line_errors, positive, print_table, write_json
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import image_path, load_testset, over_images, read_image
from mmseg_msvit.vit.mixed_scale import MixedScale

SHARES = (0, 0.25, 0.5, 0.75, 1)


def number(value: Optional[float], share: bool = False) -> str:
    return '' if value is None else f'{value:.1%}' if share else f'{value:.1f}' if value >= 100 else f'{value:.3g}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?', help='without it weights, a learned gate too, have their first values')
    parser.add_argument(
        '--shape', nargs=2, type=positive, metavar=('H', 'W'), help='one image size in place of a data set'
    )
    parser.add_argument('--json', type=Path, help='file for the numbers')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    config = load_config(args.config)
    dataset = None if args.shape else load_testset(config)
    model = load_model(config, args.checkpoint, args.device, PLAIN_VITS)
    heads, gated = HeadMacs(model), isinstance(model.backbone, MixedScale)
    if args.shape:
        grid = region_grid(args.shape, model.backbone.patch_size)
        if gated:
            result = {f'{share:.0%} coarse': share_cost(model.backbone, heads, grid, share) for share in SHARES}
        else:
            result = {'dense': dense_cost(model.backbone, grid, heads)}
        rows = [
            [
                name,
                f'{r["tokens"]}',
                *(number(r[part] / 1e9) for part in (*PARTS, 'total')),
                number(r['total'] / r['dense_total'], share=True),
            ]
            for name, r in result.items()
        ]
        title = f'GMACs of an image of {args.shape[0]}x{args.shape[1]}'
        print_table(title, ['tokens', *PARTS, 'total', 'of dense'], rows)
    else:
        if args.checkpoint is None and gated and any(isinstance(gate, LearnedGate) for gate in model.backbone.gates):
            print('no CHECKPOINT: the gate has not learned anything, its tokens mean nothing')
        with about(image_path(dataset, 0)):
            check_one_pass(model, read_image(dataset, 0))
        result = summarize_costs(over_images(dataset, partial(inference_cost, model, heads)))
        rows = [
            [
                key if key == 'tokens' else f'{key} GMACs',
                *(number(result[key][what]) for what in ('mean', 'p5', 'p50', 'p95', 'dense')),
                number(result[key]['of_dense'], share=True),
            ]
            for key in ('tokens', *PARTS, 'total')
        ]
        print_table(f'{result["images"]} images', ['mean', 'p5', 'p50', 'p95', 'dense', 'of dense'], rows)
    if args.json:
        write_json(args.json, dict(config=args.config, checkpoint=args.checkpoint, shape=args.shape, **result))


if __name__ == '__main__':
    with one_line_errors():
        main()
