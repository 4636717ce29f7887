"""One test set through several models, each at several thresholds of its gate: mIoU, tokens, MACs and time."""

import statistics
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from matplotlib.figure import Figure
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric
from rich.progress import track
from torch import nn

from ..gates.from_outside import deciding_by
from ..measuring.flops import PLAIN_VITS, HeadMacs, add_up, inference_cost, pass_costs
from ..measuring.inspection import check_one_pass, record_tokens
from ..vit.mixed_scale import MixedScale
from .command_line import InputError, about
from .models import load_config, load_model
from .testset import image_path, iou_metric, load_testset, read_image
from .timing import timed


@dataclass
class Run:
    """A trained model of a curve."""

    name: str
    config: str
    checkpoint: str


class Variant:
    """A run at a threshold, and what has been measured of it.

    Args:
        run: the model's name, config and checkpoint.
        model: the loaded model; variants of one run share it.
        heads: counts its neck and head.
        iou: its metric.
        threshold: of the gate; None for a dense ViT.
    """

    def __init__(self, run: Run, model: nn.Module, heads: HeadMacs, iou: IoUMetric, threshold: Optional[float]):
        self.run, self.model, self.heads, self.iou, self.threshold = run, model, heads, iou, threshold
        self.seconds: List[float] = []
        self.images: List[Dict[str, int]] = []

    def test(self, data: dict, counts: bool = True) -> None:
        """Runs one image, and unless it only warms up, counts it."""
        if not counts:
            check_one_pass(self.model, data)
        if self.threshold is None:
            seconds, result = self._timed(data)
            cost = inference_cost(self.model, self.heads, data)
        else:
            with deciding_by(self.model, self.threshold), record_tokens(self.model) as seen:
                seconds, result = self._timed(data)
            cost = add_up([c for tokens, _ in seen for c in pass_costs(self.model.backbone, tokens, self.heads)])
        if counts:
            self.seconds.append(seconds)
            self.images.append(cost)
            self.iou.process(data, [sample.to_dict() for sample in result])

    @torch.no_grad()
    def _timed(self, data: dict) -> tuple:
        batch = pseudo_collate([deepcopy(data)])  # the model writes into its samples
        return timed(self.model.test_step, batch, next(self.model.parameters()).device)

    def point(self, reference: 'Variant') -> dict:
        """What has been measured: means over the images, median of time and of its ratio to the reference's."""
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


def measure(runs: Sequence[Run], thresholds: Sequence[float], device: str) -> Tuple[List[dict], Variant]:
    """One point for each run and threshold; variants take turns on each image, so that ratios of their times hold.

    Returns:
        The points, and the variant whose time is 1: a dense ViT if there is one, else the first.

    Raises:
        InputError: a config or checkpoint cannot be used, or the configs have not one test set.
    """
    datasets: Dict[str, BaseDataset] = {}
    variants = []
    for run in runs:
        config = load_config(run.config)
        model = load_model(config, run.checkpoint, device, PLAIN_VITS)
        if run.config not in datasets:
            datasets[run.config] = load_testset(config)
        heads = HeadMacs(model)
        for threshold in thresholds if isinstance(model.backbone, MixedScale) else [None]:
            variants.append(Variant(run, model, heads, iou_metric(config, datasets[run.config]), threshold))
    names = {
        config: [Path(dataset.get_data_info(i)['img_path']).name for i in range(len(dataset))]
        for config, dataset in datasets.items()
    }
    images = next(iter(names.values()))
    if any(other != images for other in names.values()):
        got = ', '.join(f'{len(other)} images from {other[0]} on in {config}' for config, other in names.items())
        raise InputError(f'wanted configs with one test set, got {got}')

    MMLogger.get_instance('sweep', log_level='WARNING')  # else IoUMetric prints a table for each variant
    for i in track(range(-1, len(images)), 'images'):
        with about(image_path(next(iter(datasets.values())), max(i, 0))):
            data = {config: read_image(dataset, max(i, 0)) for config, dataset in datasets.items()}
            for variant in variants:
                variant.test(data[variant.run.config], counts=i >= 0)  # the first image once more, to warm up
    reference = next((v for v in variants if v.threshold is None), variants[0])
    return [variant.point(reference) for variant in variants], reference


def curves(points: Sequence[dict]) -> Dict[str, List[dict]]:
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


def draw_curves(curves: Dict[str, List[dict]]) -> Figure:
    """mIoU over GMACs and over time, side by side.

    Args:
        curves: by :func:`curves`.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(
        panels,
        (('gmacs', 'GMACs of an image, backbone and head'), ('milliseconds', 'milliseconds of an image, median')),
    ):
        for i, (name, curve) in enumerate(curves.items()):
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
    return figure
