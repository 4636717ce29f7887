"""Adds what a LoRA has learned to the ViT that it is of: a plain segmentor, which all tools take.

    python tools/merge_lora.py CONFIG CHECKPOINT --out merged

CONFIG's backbone is a LoRAModel of mmpretrain, or an MSLoRAModel, around any ViT, and CHECKPOINT is of its training.
Writes config.py, whose backbone is that ViT, and checkpoint.pth into --out; its answers are the same. Needs mmpretrain.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from mmpretrain.models import LoRAModel

from mmseg_msvit.lora import merge_lora
from mmseg_msvit.tooling.command_line import InputError, one_line_errors, write_whole
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.weights.reading import read_checkpoint, unwrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='folder for the merged model')
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f'--out: wanted a new folder, got {args.out}, which is there')
    config = load_config(args.config)
    model = load_model(config, args.checkpoint, 'cpu', LoRAModel)
    whole = unwrap(read_checkpoint(args.checkpoint))
    if 'Pretrained' not in str(model.backbone.module.init_cfg) and not any(
        '.original_layer.' in name for name in whole
    ):
        raise InputError(
            'CONFIG: wanted the weights that the LoRA was trained on, which are not in its checkpoint, by '
            "module=dict(init_cfg=dict(type='Pretrained', checkpoint=...)) in the backbone, got init_cfg="
            f'{model.backbone.module.init_cfg}: the ViT would be a random one'
        )
    model = merge_lora(model)
    vit = {**config.model.backbone.module, '_delete_': True}
    for name in ('init_cfg', 'pretrained'):  # the checkpoint has these weights
        vit.pop(name, None)
    args.out.mkdir(parents=True)
    base = args.config if '::' in args.config else os.path.relpath(args.config, args.out)
    lines = [
        f'# {Path(base).name} with its LoRA merged.',
        f'_base_ = {base!r}',
        f'model = dict(backbone={vit!r})',
        "load_from = '{{ fileDirname }}/checkpoint.pth'",
    ]
    write_whole(args.out / 'checkpoint.pth', partial(torch.save, dict(state_dict=model.state_dict())))
    write_whole(args.out / 'config.py', lambda path: path.write_text('\n'.join(lines) + '\n'))
    print(f'{args.out}/config.py and checkpoint.pth')


if __name__ == '__main__':
    with one_line_errors():
        main()
