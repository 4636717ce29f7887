"""Time, memory and MACs of a config's MSViT against the dense ViT with the same blocks, and against other configs.

    python tools/benchmark.py configs/msvit/segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py \\
        --against DENSE_CONFIG --gate random:0.5 --json out.json

Weights are random, images distinct: those of --images, or drawn street scenes. All variants take turns on the same
batches (A B C A B C ...), and each ratio is the median of the ratios within a round, with its quartiles: machines are
noisy, rounds are not. Ratios are to "dense", the same blocks called on the whole grid with fused attention.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mmseg_msvit import MSViT
from mmseg_msvit.flops import HeadMacs, batch_macs, dense_macs
from mmseg_msvit.gates import CERTAIN
from mmseg_msvit.inspection import find_msvit, record_tokens

sys.path.insert(0, str(Path(__file__).parent / 'dataset_converters'))
from toy_scenes import scene  # noqa: E402


def load_images(folder, count: int, size: int) -> torch.Tensor:
    """``count`` distinct images (count, 3, size, size), roughly normalised."""
    if folder is None:
        images = [scene(np.random.default_rng(i), size)[0] for i in range(count)]
    else:
        paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
        if len(paths) < count:
            raise SystemExit(f'--images: wanted {count} images, got {len(paths)} in {folder}')
        images = [cv2.resize(cv2.imread(str(p))[..., ::-1], (size, size)) for p in paths[:count]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().sub(127.5).div(64)


def build(config: str):
    """A config's segmentor with random weights."""
    config = Config.fromfile(config)
    config.model.pretrained = None
    config.model.backbone.pop('init_cfg', None)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def force_gate(backbone: MSViT, gate: str) -> None:
    """Makes a gate answer ``fine``, ``coarse`` or ``random:P``, at its own cost and with a gradient."""
    if gate == 'own':
        return
    kind, _, share = gate.partition(':')
    share = {'fine': 0.0, 'coarse': 1.0}.get(kind) if kind != 'random' else float(share or 0.5)
    if share is None:
        raise SystemExit(f'--gate: wanted own, fine, coarse or random:P, got {gate}')

    def answer(module, args, logits):
        coin = torch.rand(logits.shape, device=logits.device) < share
        return torch.where(coin, CERTAIN, -CERTAIN) + (logits - logits.detach())

    backbone.gate.register_forward_hook(answer)


def dense(backbone: MSViT, images: torch.Tensor) -> tuple:
    """The dense ViT with MSViT's own blocks: convolution, whole grid, fused attention."""
    x, (h, w) = backbone.patch_embed(images)  # (B, h * w, C)
    x = torch.cat((backbone.cls_token.expand(len(x), -1, -1), x), 1)
    position = backbone.pos_embed
    if (h, w) != backbone.table:
        position = backbone.resize_pos_embed(position, (h, w), backbone.table, backbone.interpolate_mode)
    x = x + position
    outputs = []
    for i, layer in enumerate(backbone.layers):
        attention = layer.attn.attn
        qkv = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, n, d)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(out)
        x = x + layer.ffn.dropout_layer(layer.ffn.layers(layer.norm2(x)))
        if i == len(backbone.layers) - 1 and backbone.final_norm:
            x = backbone.norm1(x)
        if i in backbone.out_indices:
            outputs.append(x[:, 1:].mT.unflatten(2, (h, w)).contiguous())
    return tuple(outputs)


def training_step(forward, model):
    """Forward and backward, with fresh gradients."""

    def step(images):
        model.zero_grad(set_to_none=True)
        outputs = forward(images)
        sum(o.float().square().mean() for o in outputs).backward()

    return step


def peak_memory(function, images) -> float:
    """MiB that a call has in use at its peak beyond what was in use before."""
    if images.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(images)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function(images)
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())['traceEvents']
    used = peak = 0
    for event in sorted((e for e in events if e.get('name') == '[memory]'), key=lambda e: e['ts']):
        used += event['args']['Bytes']
        peak = max(peak, used)
    return peak / 2**20


def timed(function, images) -> float:
    """Seconds of one call."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def variants(args) -> dict:
    """Name -> (function of a batch, model, MACs of an image or None to count them) of what is compared."""
    training = args.mode == 'train'
    found = {}

    def add(name, model, forward):
        found[name] = (training_step(forward, model) if training else torch.no_grad()(forward), model)

    def pick(model):
        if args.part == 'encoder':
            return model.backbone
        return lambda images: [model(images, mode='tensor')]

    torch.manual_seed(0)
    base = build(args.config)
    find_msvit(base)
    base.backbone.select.train_tokens = args.train_tokens[0]

    def twin():
        model = build(args.config)
        model.load_state_dict(base.state_dict())
        return model

    for name in args.train_tokens if training else ['MSViT']:
        model = twin()
        model.backbone.select.train_tokens = name if training else 'active'
        force_gate(model.backbone, args.gate)
        add(f'MSViT {name}' if training else name, model, pick(model))
        if not training and args.part == 'encoder':
            add('its gate and tokens', model, lambda images, b=model.backbone: [b.embed(*b.tokenize(images))])
    if not training:
        model = twin()
        model.backbone.gate = MODELS.build(dict(type='FixedGate', coarse=False))
        add('all fine', model, pick(model))
    if args.part == 'encoder':
        model = twin()
        add('dense', model, partial(dense, model.backbone))
    for config in args.against:
        model = build(config)
        add(Path(config.split('::')[-1]).stem if len(args.against) > 1 else 'against', model, pick(model))
    for _, model in found.values():
        model.train(training).to(args.device)
    return found


def measure(args, batch: int) -> list:
    """One row for each variant."""
    compared = variants(args)
    pool = load_images(args.images, batch * max(args.repeat, 2), args.size).to(args.device)
    batches = pool.split(batch)
    kind = torch.device(args.device).type

    def run(name, function, images):
        torch.manual_seed(0)  # the same coins for all that toss any
        with torch.autocast(kind, torch.bfloat16, enabled=args.amp):
            return function(compared[name][0], images)

    seconds = {name: [] for name in compared}
    with Progress(transient=True) as progress:
        task = progress.add_task(f'batch {batch}', total=(args.repeat + 1) * len(compared))
        for i in range(-1, args.repeat):  # the first round warms up
            for name in compared:
                t = run(name, timed, batches[i])
                progress.advance(task)
                if i >= 0:
                    seconds[name].append(t)

    reference = 'dense' if 'dense' in compared else 'against'
    rows = []
    for name, (_, model) in compared.items():
        grid = (-(-args.size // model.backbone.patch_size),) * 2
        with record_tokens(model) if isinstance(model.backbone, MSViT) else nullcontext([]) as seen:
            memory = run(name, peak_memory, batches[0])
        parts = [dense_macs(model.backbone, grid)] * batch
        if seen:
            parts = batch_macs(model.backbone, seen[0])
        if name == 'its gate and tokens':
            parts = [dict(p, encoder=0) for p in parts]
        if args.part == 'segmentor':
            head = HeadMacs(model)(grid)
            parts = [{**p, **head} for p in parts]
        ratios = [a / b for a, b in zip(seconds[name], seconds[reference])] if reference in compared else []
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            dict(
                name=name,
                batch=batch,
                tokens=sum(seen[0].lengths) / batch if seen else grid[0] * grid[1] + 1,
                gmacs=sum(sum(p.values()) for p in parts) / batch / 1e9,
                seconds=statistics.median(seconds[name]),
                ratio=statistics.median(ratios) if ratios else None,
                quartiles=[quartiles[0], quartiles[2]] if ratios else None,
                memory_mib=memory,
                all_seconds=seconds[name],
            )
        )
    base = next((row for row in rows if row['name'] == reference), None)
    for row in rows:
        row['gmacs_ratio'] = row['gmacs'] / base['gmacs'] if base else None
        row['memory_ratio'] = row['memory_mib'] / base['memory_mib'] if base else None
        row['ratio_of'] = {
            other: statistics.median(a / b for a, b in zip(seconds[row['name']], seconds[other])) for other in compared
        }
    return rows


def show(rows: list, title: str) -> None:
    """Prints the table."""
    table = Table(title=title)
    for column in ('', 'batch', 'tokens', 'GMACs', 'x dense', 'ms', 'x dense', '(quartiles)', 'MiB', 'x dense'):
        table.add_column(column, justify='left' if column == '' else 'right', no_wrap=True)

    def number(x, digits=2):
        return '' if x is None else f'{x:.{digits}f}'

    for row in rows:
        low, high = row['quartiles'] or (None, None)
        table.add_row(
            row['name'], str(row['batch']), number(row['tokens'], 0), number(row['gmacs']), number(row['gmacs_ratio']),
            number(row['seconds'] * 1000, 0), number(row['ratio']), f'{number(low)}-{number(high)}',
            number(row['memory_mib'], 0), number(row['memory_ratio']),
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config with an MSViT')
    parser.add_argument('--against', nargs='*', default=[], help='more configs, such as the dense twin')
    parser.add_argument('--gate', default='own', help="own (the config's), fine, coarse, or random:P")
    parser.add_argument('--mode', choices=('test', 'train'), default='test')
    parser.add_argument('--part', choices=('encoder', 'segmentor'), default='encoder')
    parser.add_argument(
        '--train-tokens', nargs='*', default=['active', 'trimmed'], choices=('active', 'trimmed', 'all')
    )
    parser.add_argument('--batch', nargs='*', type=int, default=[1], help='batch sizes')
    parser.add_argument('--size', type=int, default=512, help='pixels along a side')
    parser.add_argument('--repeat', type=int, default=7, help='rounds that count')
    parser.add_argument('--images', help='folder with images; drawn scenes without it')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--json', type=Path, help='file for the numbers')
    args = parser.parse_args()

    init_default_scope('mmseg')
    MMLogger.get_instance('benchmark', log_level='WARNING')  # else every tensor's initialisation is printed
    rows = [row for batch in args.batch for row in measure(args, batch)]
    device = (
        torch.cuda.get_device_name() if args.device.startswith('cuda') else f'{torch.get_num_threads()} CPU threads'
    )
    show(rows, f'{args.part}, {args.mode}, {args.size}x{args.size}, gate {args.gate}, {device}')
    if args.json:
        machine = dict(platform=platform.platform(), device=device, torch=torch.__version__)
        record = {**vars(args), 'json': str(args.json), 'machine': machine, 'rows': rows}
        args.json.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
