"""Time, memory and MACs of a config's MSViT against the dense ViT with the same blocks, and against other configs.

    python tools/benchmark.py configs/msvit/segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py \\
        --against DENSE_CONFIG --gate random:0.5 --json out.json

Weights are random, images distinct: those of --images, or drawn street scenes. All variants take turns on the same
batches (A B C A B C ...), and each ratio is the median of the ratios within a round, with its quartiles: machines are
noisy, rounds are not. Ratios are to "dense", the same blocks called on the whole grid with fused attention; those of
--part segmentor, in test with upsampling and argmax, to --against, or without it to the same model all fine.
"""

import argparse
import platform
import statistics
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
import torch
from mmengine.logging import MMLogger

from mmseg_msvit.measuring.flops import PLAIN_VITS, HeadMacs, dense_macs, prefix_length
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.tokens.token_map import region_grid
from mmseg_msvit.tooling.baselines import dense_forward, first_values, force_gate
from mmseg_msvit.tooling.command_line import DEVICE, InputError, one_line_errors, positive, print_table, write_json
from mmseg_msvit.tooling.models import check_backbone, load_config
from mmseg_msvit.tooling.timing import in_turns, paired_ratios, peak_memory
from mmseg_msvit.tooling.toy_scenes import scene
from mmseg_msvit.vit.mixed_scale import MixedScale


def load_images(folder, count: int, height: int, width: int) -> torch.Tensor:
    """``count`` distinct images (count, 3, height, width), roughly normalised."""
    if folder is None:
        images = [scene(np.random.default_rng(i), max(height, width))[0][:height, :width] for i in range(count)]
    else:
        paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
        if len(paths) < count:
            raise InputError(f'--images: wanted {count} images, got {len(paths)} in {folder}')
        pictures = [cv2.imread(str(p)) for p in paths[:count]]
        broken = [str(path) for path, picture in zip(paths, pictures) if picture is None]
        if broken:
            raise InputError(f'--images: wanted pictures, got {broken[0]}, which cannot be read')
        images = [cv2.resize(picture[..., ::-1], (width, height)) for picture in pictures]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().sub(127.5).div(64)


def parse_gate(text: str) -> Optional[float]:
    """``own``, ``fine``, ``coarse`` or ``random:P`` to the share of coarse, None for the config's own gate."""
    kind, _, share = text.partition(':')
    known = {'own': None, 'fine': 0.0, 'coarse': 1.0}
    try:
        found = float(share or 0.5) if kind == 'random' else known[text]
        if found is None or 0 <= found <= 1:
            return found
    except (KeyError, ValueError):
        pass
    raise InputError(f'--gate: wanted own, fine, coarse or random:P, P in [0, 1], got {text}')


def training_step(forward, model):
    """Forward and backward, with fresh gradients."""

    def step(images):
        model.zero_grad(set_to_none=True)
        outputs = forward(images)
        sum(o.float().square().mean() for o in outputs).backward()

    return step


def variants(args) -> dict:
    """Name -> (function of a batch, model) of what is compared."""
    training = args.mode == 'train'
    found = {}

    def add(name, model, forward):
        found[name] = (training_step(forward, model) if training else torch.no_grad()(forward), model)

    def pick(model):
        if args.part == 'encoder':
            return lambda images: [getattr(output, 'x', output) for output in model.backbone(images)]
        return lambda images: [model(images, mode='tensor')] if training else model.predict(images)

    def build(path, **changes):
        config = load_config(path)
        config.model.backbone = {**config.model.backbone, **changes}
        if args.scales and path == args.config:
            config.model.backbone.scales = tuple(args.scales)
        config.model.test_cfg = dict(mode='whole')
        model = first_values(config)
        check_backbone(model, MixedScale if path == args.config else PLAIN_VITS, path)
        return model

    share = parse_gate(args.gate)
    torch.manual_seed(0)
    base = build(args.config)
    base.backbone.select.train_tokens = args.train_tokens[0]

    def twin(**changes):
        model = build(args.config, **changes)
        model.load_state_dict(base.state_dict(), strict=not changes)
        return model

    def gated():
        model = twin()
        if share is not None:
            force_gate(model.backbone, share)
        return model

    for name in args.train_tokens if training else ['MSViT']:
        model = gated()
        model.backbone.select.train_tokens = name if training else 'active'
        add(f'MSViT {name}' if training else name, model, pick(model))
        if not training and args.part == 'encoder':
            add('its gate and tokens', model, lambda images, b=model.backbone: [b.embed(*b.tokenize(images)[:2])])
        if not training and args.part == 'segmentor':
            add('its backbone', model, lambda images, b=model.backbone: b(images))
            add('its logits', model, lambda images, m=model: m(images, mode='tensor'))
    if args.compile:
        model = gated()
        model.backbone.compile()
        add('compiled', model, pick(model))
    if not training:
        model = twin(gate=dict(type='FixedGate'), token_budget=None, input_scale=1.0)
        add('all fine', model, pick(model))
    if args.part == 'encoder':
        model = twin()
        add('dense', model, partial(dense_forward, model.backbone))
    for config in args.against:
        model = build(config)
        add(Path(config.split('::')[-1]).stem if len(args.against) > 1 else 'against', model, pick(model))
    for _, model in found.values():
        model.train(training).to(args.device)
    return found


def measure(args, batch: int) -> list:
    """One row for each variant."""
    compared = variants(args)
    height, width = args.size[0], args.size[-1]
    pool = load_images(args.images, batch * max(args.repeat, 2), height, width).to(args.device)
    batches = pool.split(batch)
    kind = torch.device(args.device).type

    def with_amp(function):
        return torch.autocast(kind, torch.bfloat16, enabled=args.amp)(function)

    functions = {name: with_amp(function) for name, (function, _) in compared.items()}
    seconds = in_turns(functions, batches[: args.repeat], warm_up=batches[-1])

    reference = next((name for name in ('dense', 'against', 'all fine') if name in compared), None)
    rows = []
    for name, (_, model) in compared.items():
        grid = region_grid((height, width), model.backbone.patch_size)
        with record_tokens(model) if isinstance(model.backbone, MixedScale) else nullcontext([]) as seen:
            torch.manual_seed(0)  # the coins of the rounds
            memory = peak_memory(functions[name], batches[0])
        parts = [dense_macs(model.backbone, grid)] * batch
        if seen:
            tokens = seen[0][0]
            # A training step computes its inactive tokens, too: where each cell has one row, none counts as inactive.
            parts = model.backbone.macs(replace(tokens, cover=tokens.cover[:1]))
        if name == 'its gate and tokens':
            parts = [dict(p, encoder=0) for p in parts]
        if args.part == 'segmentor' and name != 'its backbone':
            counts = seen[0][0].active_counts().tolist() if seen else [None] * batch
            heads, cells = HeadMacs(model), seen[0][0].grid if seen else grid
            parts = [{**p, **heads(cells, count)} for p, count in zip(parts, counts)]
        ratio = low = high = None
        if reference in compared:
            ratio, low, high = paired_ratios(seconds[name], seconds[reference])
        rows.append(
            dict(
                name=name,
                batch=batch,
                tokens=sum(seen[0][0].lengths) / batch if seen else grid[0] * grid[1] + prefix_length(model.backbone),
                gmacs=sum(sum(p.values()) for p in parts) / batch / 1e9,
                seconds=statistics.median(seconds[name]),
                ratio=ratio,
                quartiles=None if ratio is None else [low, high],
                memory_mib=memory,
                all_seconds=seconds[name],
            )
        )
    base = next((row for row in rows if row['name'] == reference), None)
    for row in rows:
        row['gmacs_ratio'] = row['gmacs'] / base['gmacs'] if base else None
        row['memory_ratio'] = row['memory_mib'] / base['memory_mib'] if base else None
        row['ratio_of'] = {other: paired_ratios(seconds[row['name']], seconds[other])[0] for other in compared}
    return rows


def show(rows: list, title: str) -> None:
    """Prints the table."""

    def number(x, digits=2):
        return '' if x is None else f'{x:.{digits}f}'

    lines = []
    for row in rows:
        low, high = row['quartiles'] or (None, None)
        lines.append([
            row['name'], str(row['batch']), number(row['tokens'], 0), number(row['gmacs']), number(row['gmacs_ratio']),
            number(row['seconds'] * 1000, 0), number(row['ratio']), f'{number(low)}-{number(high)}',
            number(row['memory_mib'], 0), number(row['memory_ratio']),
        ])  # fmt: skip
    columns = ['batch', 'tokens', 'GMACs', 'x dense', 'ms', 'x dense', '(quartiles)', 'MiB', 'x dense']
    print_table(title, columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config with an MSViT')
    parser.add_argument('--against', nargs='*', default=[], help='more configs, such as the dense twin')
    parser.add_argument('--gate', default='own', help="own (the config's), fine, coarse, or random:P")
    parser.add_argument('--scales', nargs='+', type=positive, help="pixels of a token's side, in the config's place")
    parser.add_argument('--mode', choices=('test', 'train'), default='test')
    parser.add_argument('--part', choices=('encoder', 'segmentor'), default='encoder')
    parser.add_argument(
        '--train-tokens', nargs='*', default=['active', 'trimmed'], choices=('active', 'trimmed', 'all')
    )
    parser.add_argument('--batch', nargs='*', type=positive, default=[1], help='batch sizes')
    parser.add_argument(
        '--size', nargs='+', type=positive, default=[512], metavar='PIXELS', help='height and width, or one for both'
    )
    parser.add_argument('--repeat', type=positive, default=7, help='rounds that count')
    parser.add_argument('--compile', action='store_true', help='also with its backbone compiled by torch')
    parser.add_argument('--images', help='folder with images; drawn scenes without it')
    parser.add_argument('--device', default=DEVICE)
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--json', type=Path, help='file for the numbers')
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error(f'--size: wanted one number or two, got {args.size}')

    MMLogger.get_instance('benchmark', log_level='WARNING')  # else every tensor's initialisation is printed
    rows = [row for batch in args.batch for row in measure(args, batch)]
    device = (
        torch.cuda.get_device_name() if args.device.startswith('cuda') else f'{torch.get_num_threads()} CPU threads'
    )
    show(rows, f'{args.part}, {args.mode}, {args.size[0]}x{args.size[-1]}, gate {args.gate}, {device}')
    if args.json:
        machine = dict(platform=platform.platform(), device=device, torch=torch.__version__)
        write_json(args.json, {**vars(args), 'json': str(args.json), 'machine': machine, 'rows': rows})


if __name__ == '__main__':
    with one_line_errors():
        main()
