"""Trains a dense segmentor's twins with mixed-scale tokens in several ways, for as many steps as it, and tests each.

    python tools/lab/variants.py CONFIG CHECKPOINT [CHECKPOINT ...] --converted FOLDER [FOLDER ...] --out variants

CONFIG is that of the dense segmentor, each CHECKPOINT a seed of it, 0, 1 and so on, and each FOLDER what
tools/fit_gate.py --full-size made of it: its gate is that of the variants "fitted". A variant is trained from the
weights that CONFIG begins with, and run over the test set with all tokens fine, then with as many as --budget allows;
"dense" is trained all fine, and within the budget sees smaller images: what --crop does by itself.
What is finished is not done again: the same command goes on where it stopped. Writes variants.json and variants.md.
"""

import argparse
import json
import re
import statistics
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Optional

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from torch.nn import Module

from mmseg_msvit.gates.from_outside import as_dense
from mmseg_msvit.measuring.flops import PLAIN_VITS
from mmseg_msvit.tooling.command_line import (
    DEVICE,
    InputError,
    claim,
    digest,
    file_digest,
    one_line_errors,
    positive,
    write_json,
)
from mmseg_msvit.tooling.conversion import dense_backbone
from mmseg_msvit.tooling.dense_pass import find_test_images, gather
from mmseg_msvit.tooling.gate_fitting import gate_logits, shared_size
from mmseg_msvit.tooling.lab.arena import dense, play, score_random, smaller
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader

BASE = Path(__file__).parents[2] / 'configs/_base_/msvit.py'
CONTEXT = dict(type='ContextGate')
SHAPING = dict(type='GeneralizedBatchShapingLoss')
DOUBT = dict(type='DoubtLoss')
# What the backbone of a variant has; a coarse half of the regions is 62 % of the tokens.
VARIANTS = {
    'dense': dict(gate=dict(type='FixedGate')),
    'fitted': {},
    'fitted, dense at first': {},
    'doubt': dict(gate=CONTEXT, gate_loss=DOUBT, train_tokens='active'),
    'doubt, dense at first': dict(
        gate=dict(CONTEXT, init_coarse=0.05), gate_loss=dict(DOUBT, target_warmup=300), train_tokens='active'
    ),
    'purity': dict(
        gate=CONTEXT, gate_loss=[dict(type='PurityLoss'), dict(SHAPING, loss_weight=0.1)], train_tokens='active'
    ),
    'paper': dict(gate=dict(type='MLPGate'), gate_loss=SHAPING, train_tokens='trimmed'),
    'random': dict(gate=dict(type='RandomGate', coarse_ratio=0.5)),
    'coarse': dict(gate=dict(type='FixedGate', coarse=True)),
}
DETAILS = {'': {}, ' + detail': dict(coarse_embed='resize+detail', out_detail='residual')}


def variant_config(converted: Path, name: str, crop: Optional[int]) -> Config:
    """The config of a variant: the converted model's with another gate, and a hook where that learns.

    Args:
        converted: folder with the converted model.
        name: of ``VARIANTS``, perhaps with an end of ``DETAILS``.
        crop: pixels along a training image's side; None for the config's own.
    """
    config = load_config(str(converted / 'train.py'))
    kind, plus, rest = name.partition(' + ')
    if kind != 'fitted, dense at first':
        hooks = config.get('custom_hooks', [])
        config.custom_hooks = [hook for hook in hooks if hook['type'] != 'DenseFirstHook']
    backbone = config.model.backbone
    changes = deepcopy({**VARIANTS[kind], **DETAILS[plus + rest]})
    config.model.backbone = ConfigDict({**backbone, **changes})
    if 'gate_loss' in changes:
        config.custom_hooks = [*config.get('custom_hooks', []), dict(type='GateLossHook')]
        wrapper = config.optim_wrapper
        own = wrapper.get('paramwise_cfg') or {}
        if wrapper.get('constructor') == 'MSViTLayerDecayConstructor':
            wrapper.paramwise_cfg = dict(own, gate_lr_mult=10.0)
        else:  # which know no gate
            keys = Config.fromfile(BASE).gate_keys
            wrapper.paramwise_cfg = dict(own, custom_keys={**keys, **own.get('custom_keys', {})})
    if crop is not None:
        config.model.data_preprocessor.size = (crop, crop)
        for transform in config.train_dataloader.dataset.pipeline:
            if transform['type'] == 'RandomCrop':
                transform['crop_size'] = (crop, crop)
    return config


def train(config: Config, seed: int, folder: Path) -> str:
    """Trains to the end, from where an earlier run stopped, and gives the path of the checkpoint."""
    last = folder / f'iter_{config.train_cfg.max_iters}.pth'
    if not last.is_file():
        config = deepcopy(config)
        config.work_dir, config.randomness = str(folder), dict(seed=seed)
        if (folder / 'last_checkpoint').exists():
            config.resume, config.load_from = True, None  # which mmengine would resume, and not what is in the folder
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
        config.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1)
        Runner.from_cfg(config).train()
    return str(last)


def over_test_set(model: Module, config: Config) -> tuple:
    """The test set through a model, as :func:`.dense_pass.gather` gives it."""
    return gather(model, FileReader(config), *find_test_images(config), 'mixed')


def test(config: Config, checkpoint: str, name: str, budget: float, device: str) -> list:
    """Results of the test set: all fine, then within the budget on whole images and on those of ``shared_size``.

    "Dense" has no coarse tokens: within the budget are smaller images.
    """
    model = load_model(config, checkpoint, device)
    with as_dense(model):
        examples, windows = over_test_set(model, config)
    results = [replace(dense(model, examples), chooser='fine')]
    kind = name.partition(' + ')[0]
    score = score_random if kind in ('random', 'coarse') else gate_logits
    if kind == 'dense':
        return [asdict(result) for result in (*results, smaller(model, examples, windows, budget))]
    for size in (1.0,) if kind == 'coarse' else (1.0, shared_size(budget)):
        model.backbone.input_scale = size
        spent = None if kind == 'coarse' else budget
        results.append(play(model, examples, windows, 'mixed', score(model, examples, windows), spent))
    return [asdict(result) for result in results]


def test_dense(config: Config, checkpoint: str, device: str) -> float:
    """The mIoU of the dense segmentor."""
    model = load_model(config, checkpoint, device, PLAIN_VITS)
    dense_backbone(model, config.filename)
    return dense(model, over_test_set(model, config)[0]).miou


def markdown(runs: list) -> str:
    """The table: means over seeds, and their standard deviation."""
    groups = {}
    for run in runs:
        for result in run['results']:
            key = (run['name'], run['crop'], result['chooser'], result['size'])
            groups.setdefault(key, []).append(dict(result, lost=run['dense'] - result['miou']))
    head = '| variant | crop | tokens | images at | encoder MACs | mIoU | below dense | seeds |'
    lines = [head, '| --- ' * 8 + '|']
    for (name, crop, _, size), group in groups.items():
        means = {key: statistics.fmean(r[key] for r in group) for key in ('tokens', 'encoder', 'miou', 'lost')}
        spread = f' +- {statistics.stdev(r["lost"] for r in group):.2f}' if len(group) > 1 else ''
        lines.append(
            f'| {name} | {crop or ""} | {means["tokens"]:.0%} | {size:.2f} | {means["encoder"]:.0%} '
            f'| {means["miou"]:.2f} | {means["lost"]:.2f}{spread} | {len(group)} |'
        )
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='of the dense segmentor')
    parser.add_argument('checkpoints', nargs='+', help='of the dense segmentor, one for each seed')
    names = ['dense', *(kind + detail for kind in VARIANTS if kind != 'dense' for detail in DETAILS)]
    parser.add_argument('--variants', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--converted', nargs='+', type=Path, required=True, help='by tools/fit_gate.py, one for each')
    parser.add_argument('--crop', type=positive, help="pixels of a training image's side; else the config's")
    parser.add_argument('--budget', type=float, default=0.62, help='share of the dense tokens')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/variants'))
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    if len(args.converted) != len(args.checkpoints):
        wanted, got = len(args.checkpoints), len(args.converted)
        raise InputError(f'--converted: wanted a folder for each checkpoint, {wanted}, got {got}')
    file, base = args.out / 'variants.json', load_config(args.config)
    for seed, (checkpoint, converted) in enumerate(zip(args.checkpoints, args.converted)):
        claim(
            args.out / f'of_{seed}.json', checkpoint=file_digest(checkpoint), config=digest(base.pretty_text),
            converted=file_digest(str(converted / 'checkpoint.pth')), budget=args.budget,
            trained=digest(load_config(str(converted / 'train.py')).pretty_text),
        )  # fmt: skip
    runs = json.loads(file.read_text()) if file.exists() else []
    for name in args.variants:
        for seed, (checkpoint, converted) in enumerate(zip(args.checkpoints, args.converted)):
            key = dict(name=name, seed=seed, crop=args.crop)
            if any(key.items() <= run.items() for run in runs):
                continue
            config = variant_config(converted, name, args.crop)
            words = [*re.findall(r'\w+', name), args.crop, seed]
            folder = args.out / '_'.join(str(word) for word in words if word is not None)
            results = test(config, train(config, seed, folder), name, args.budget, args.device)
            known = [run['dense'] for run in runs if run['seed'] == seed]
            top = known[0] if known else test_dense(base, checkpoint, args.device)
            runs.append(dict(key, dense=top, results=results))
            write_json(file, runs)
            print(runs[-1], flush=True)
    (args.out / 'variants.md').write_text(markdown(runs))
    print(markdown(runs))


if __name__ == '__main__':
    with one_line_errors():
        main()
