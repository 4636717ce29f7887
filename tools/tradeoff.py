"""Draws mIoU over GMACs and over measured time, for several models and thresholds of the gate.

    python tools/tradeoff.py MSViT=CONFIG,CHECKPOINT dense=DENSE_CONFIG,CHECKPOINT --out tradeoff
    python tools/tradeoff.py MSViT=CONFIG dense=DENSE_CONFIG --seeds 0 1 2 --out tradeoff    # trains each first

Each name is a curve: one point for each threshold, since one checkpoint of an MSViT can be run at any; a dense ViT has
one point. Runs of the same name, and seeds, are averaged, and their standard deviation drawn. The test set goes through
all variants image by image (A B C A B C ...), so that the ratios of their times hold on a noisy machine. Training is
resumed where it stopped. Writes tradeoff.png and tradeoff.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import torch
from get_flops import add_up, pass_record
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmseg.apis import init_model
from mmseg.evaluation import IoUMetric
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import DATASETS
from rich.progress import track

from mmseg_msvit import MSViT
from mmseg_msvit.flops import HeadMacs
from mmseg_msvit.inspection import record_tokens


@dataclass
class Run:
    """A trained model of a curve."""

    name: str
    config: str
    checkpoint: str


def parse(text: str) -> tuple:
    """``NAME=CONFIG`` or ``NAME=CONFIG,CHECKPOINT`` to the three, None for no checkpoint."""
    name, found, rest = text.partition('=')
    config, _, checkpoint = rest.partition(',')
    if not (found and name and config):
        raise argparse.ArgumentTypeError(f'wanted NAME=CONFIG or NAME=CONFIG,CHECKPOINT, got {text!r}')
    return name, config, checkpoint or None


def train(config: str, seed: int, folder: Path) -> str:
    """Trains a config with a seed, or goes on where that stopped; the last checkpoint."""
    done, text = folder / 'done', Config.fromfile(config).pretty_text
    if done.exists() and done.read_text() != text:
        raise SystemExit(f'{config} has changed since it was trained in {folder}: take another --out, or remove that')
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f'training {config}, seed {seed}: {folder}/train.log', flush=True)
        command = [sys.executable, '-m', 'mim', 'train', 'mmsegmentation', config, '--work-dir', str(folder), '--yes']
        command += ['--resume'] if (folder / 'last_checkpoint').exists() else []
        with open(folder / 'train.log', 'a') as log:
            subprocess.run([*command, '--cfg-options', f'randomness.seed={seed}'], check=True, stdout=log, stderr=log)
        done.write_text(text)
    return (folder / 'last_checkpoint').read_text().strip()


class Variant:
    """A run at a threshold, and what has been measured of it.

    Args:
        run: the model's name, config and checkpoint.
        model: the loaded model; variants of one run share it.
        heads: counts its neck and head.
        metainfo: of the test set.
        threshold: of the gate; None for a dense ViT.
    """

    def __init__(self, run: Run, model, heads: HeadMacs, metainfo: dict, threshold: Optional[float]):
        self.run, self.model, self.heads, self.threshold = run, model, heads, threshold
        self.iou = IoUMetric(iou_metrics=['mIoU'])
        self.iou.dataset_meta = metainfo
        self.seconds: List[float] = []
        self.images: List[Dict[str, int]] = []

    def test(self, data: dict, counts: bool = True) -> None:
        """Runs one image, and unless it only warms up, counts it."""
        backbone, sizes = self.model.backbone, []
        if self.threshold is not None:
            backbone.select.threshold = self.threshold
        handle = backbone.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
        try:
            if isinstance(backbone, MSViT):
                with record_tokens(self.model) as seen:
                    seconds, result = self._timed(data)
            else:
                seconds, result = self._timed(data)
                seen = [None] * len(sizes)
        finally:
            handle.remove()
        if counts:
            self.seconds.append(seconds)
            self.images.append(
                add_up([pass_record(backbone, self.heads, size, tokens) for size, tokens in zip(sizes, seen)])
            )
            self.iou.process(data, [sample.to_dict() for sample in result])

    @torch.no_grad()
    def _timed(self, data: dict) -> tuple:
        data = deepcopy(data)  # the model writes into its samples
        device = next(self.model.parameters()).device
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = self.model.test_step(data)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, result

    def point(self, reference: 'Variant') -> dict:
        """What the JSON holds of this variant."""
        mean = {key: statistics.fmean(image[key] for image in self.images) for key in self.images[0]}
        return dict(
            name=self.run.name,
            config=self.run.config,
            checkpoint=self.run.checkpoint,
            threshold=self.threshold,
            miou=float(self.iou.compute_metrics(self.iou.results)['mIoU']),
            tokens=mean['tokens'],
            dense_tokens=mean['dense_tokens'],
            gmacs=mean['total'] / 1e9,
            encoder_gmacs=mean['encoder'] / 1e9,
            milliseconds=1000 * statistics.median(self.seconds),
            time_ratio=statistics.median(a / b for a, b in zip(self.seconds, reference.seconds)),
        )


def measure(runs: List[Run], thresholds: List[float], device: str) -> List[dict]:
    """One point for each run and threshold."""
    variants, datasets = [], {}
    for run in runs:
        model = init_model(run.config, run.checkpoint, device=device)
        if not isinstance(model.backbone, VisionTransformer):
            raise SystemExit(f'{run.config}: wanted an MSViT or VisionTransformer, got {type(model.backbone).__name__}')
        if run.config not in datasets:
            datasets[run.config] = DATASETS.build(Config.fromfile(run.config).test_dataloader.dataset)
        if isinstance(model.backbone, MSViT):
            model.backbone.select.token_budget = None  # it would take the threshold's place
        heads, metainfo = HeadMacs(model), datasets[run.config].metainfo
        for threshold in thresholds if isinstance(model.backbone, MSViT) else [None]:
            variants.append(Variant(run, model, heads, metainfo, threshold))
    sizes = {config: len(dataset) for config, dataset in datasets.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f'wanted configs with one test set, got sets of {sizes} images')

    MMLogger.get_instance('tradeoff', log_level='WARNING')  # else IoUMetric prints a table for each variant
    for i in track(range(-1, next(iter(sizes.values()))), 'images'):
        data = {config: pseudo_collate([dataset[max(i, 0)]]) for config, dataset in datasets.items()}
        for variant in variants:
            variant.test(data[variant.run.config], counts=i >= 0)  # the first image once more, to warm up
    reference = next((v for v in variants if v.threshold is None), variants[0])
    print(f'times are ratios to {reference.run.name}', end='')
    print('' if reference.threshold is None else f' at threshold {reference.threshold:g}')
    return [variant.point(reference) for variant in variants]


def curves(points: List[dict]) -> Dict[str, List[dict]]:
    """Name -> its points, averaged over the runs of one threshold, with their number and the spread of their mIoU."""
    groups: Dict[tuple, List[dict]] = {}
    for point in points:
        groups.setdefault((point['name'], point['threshold']), []).append(point)
    found: Dict[str, List[dict]] = {}
    for (name, threshold), group in groups.items():
        values = ('miou', 'tokens', 'gmacs', 'encoder_gmacs', 'milliseconds', 'time_ratio')
        mean = {key: statistics.fmean(p[key] for p in group) for key in values}
        spread = statistics.stdev([p['miou'] for p in group]) if len(group) > 1 else 0.0
        found.setdefault(name, []).append(dict(threshold=threshold, **mean, miou_std=spread, runs=len(group)))
    for curve in found.values():
        curve.sort(key=lambda point: point['gmacs'])
    return found


def draw(found: Dict[str, List[dict]], path: Path) -> None:
    """Both plots, side by side."""
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(
        panels,
        (('gmacs', 'GMACs of an image, backbone and head'), ('milliseconds', 'milliseconds of an image, median')),
    ):
        for i, (name, curve) in enumerate(found.items()):
            x, y, spread = ([point[what] for point in curve] for what in (key, 'miou', 'miou_std'))
            marker = 's' if curve[0]['threshold'] is None else 'o'
            axes.errorbar(
                x, y, yerr=spread if any(spread) else None, marker=marker, capsize=3, label=name, color=f'C{i}'
            )
            for point in curve:
                if point['threshold'] is not None:
                    axes.annotate(
                        f'{point["threshold"]:g}', (point[key], point['miou']), xytext=(4, -11),
                        textcoords='offset points', fontsize=8, color=f'C{i}',
                    )  # fmt: skip
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.03 * axes.get_xlim()[1])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('mIoU')
    panels[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=parse, help='NAME=CONFIG,CHECKPOINT, or NAME=CONFIG to train it')
    parser.add_argument('--thresholds', nargs='+', type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='for what is trained')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/tradeoff'), help='folder for results and training')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, config, checkpoint in args.runs:
        if checkpoint:
            runs.append(Run(name, config, checkpoint))
        else:
            for seed in args.seeds:
                folder = args.out / name / Path(config).stem / f'seed_{seed}'
                runs.append(Run(name, config, train(config, seed, folder)))
    points = measure(runs, args.thresholds, args.device)
    found = curves(points)
    (args.out / 'tradeoff.json').write_text(json.dumps(dict(points=points, curves=found), indent=2) + '\n')
    draw(found, args.out / 'tradeoff.png')
    print(f'{"":<16} threshold   mIoU   tokens   GMACs      ms   time ratio')
    for name, curve in found.items():
        for p in curve:
            threshold = '' if p['threshold'] is None else f'{p["threshold"]:g}'
            print(
                f'{name:<16} {threshold:>9} {p["miou"]:>6.2f} {p["tokens"]:>8.1f} {p["gmacs"]:>7.2f} '
                f'{p["milliseconds"]:>7.1f} {p["time_ratio"]:>12.2f}'
            )
    print(f'{args.out}/tradeoff.png')


if __name__ == '__main__':
    main()
