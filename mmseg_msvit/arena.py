"""Ways of choosing coarse regions against each other, on one trained dense segmentor with nothing retrained.

A chooser gives each region of each coarse level a score, the higher the rather coarse. For a budget one threshold over
all images and levels is set, so that all choosers spend the same tokens, and the test set goes through the segmentor
once. The share that is recovered of the gap between all coarse and dense is what carries over between data sets.
"""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.evaluation import IoUMetric
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from .dense_pass import Example, Window, pixels
from .doubt import region_doubt
from .embedding import pad_to_regions, patchify
from .flops import add_up, dense_macs, image_grid, pass_costs
from .gate_fitting import answers, threshold_within
from .gate_losses import IGNORE_INDEX
from .inspection import record_tokens
from .tokens import region_grid

# Of each window, of each coarse level, the finest first: (1, hc, wc).
Scores = List[List[Tensor]]


@dataclass
class Result:
    """A test set under one choice of tokens.

    Attributes:
        chooser: its name.
        scales: pixels along a token's side.
        budget: the share of the dense ViT's tokens that was asked for; None for what has no choice.
        tokens: share of the dense ViT's tokens.
        encoder: MACs of the blocks, as a share of the dense ViT's.
        backbone: likewise, with gate and embedding.
        miou: in percent.
    """

    chooser: str
    scales: List[int]
    budget: Optional[float]
    tokens: float
    encoder: float
    backbone: float
    miou: float


def score_random(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """By chance, the same chance each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.rand(1, *region_grid(window.shares.shape[1:], side), generator=generator) for side in _sides(model)]
        for window in windows
    ]


def score_variance(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """Regions whose pixels vary least are coarse."""
    backbone, scores = model.backbone, []
    for window in windows:
        image = pixels(model, examples[window.example], window)[None]
        padded, grid = pad_to_regions(image, backbone.patch_size, backbone.sides[-1])
        levels = []
        for scale, side in zip(backbone.scales[1:], _sides(model)):
            hc, wc = region_grid(grid, side)
            regions = patchify(padded[..., : hc * scale, : wc * scale], scale)  # (1, hc, wc, C * R * R)
            spread = regions.unflatten(-1, (image.shape[1], -1)).var(-1, correction=0).mean(-1)  # (1, hc, wc)
            levels.append(-spread * _area(model, side))
        scores.append(levels)
    return scores


def score_doubt(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """The oracle: regions of which the dense model has least doubt are coarse. It needs the dense pass."""
    return [
        [-region_doubt(window.shares[None], side)[0] * _area(model, side) for side in _sides(model)]
        for window in windows
    ]


@torch.no_grad()
def score_gates(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """The logits of the model's own gates."""
    return [answers(model.backbone, pixels(model, examples[window.example], window)[None]) for window in windows]


CHOOSERS: Dict[str, Callable] = dict(random=score_random, variance=score_variance, doubt=score_doubt)


def _sides(model: nn.Module) -> Sequence[int]:
    return model.backbone.sides[1:]


def _area(model: nn.Module, side: int) -> float:
    """What a region's doubt counts for: all of its area is left with it, while a coarse token saves the same."""
    return (side / _sides(model)[0]) ** 2


def as_logits(scores: Scores) -> Scores:
    """Ranks of scores among all, as logits: a threshold between any two of them is one of probabilities."""
    flat = torch.cat([level.flatten() for levels in scores for level in levels])
    ranks = torch.empty(len(flat), dtype=torch.float64)
    ranks[flat.argsort(stable=True)] = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    parts = (ranks / (len(flat) + 1)).logit().split([level.numel() for levels in scores for level in levels])
    parts = iter(parts)
    return [[next(parts).view_as(level) for level in levels] for levels in scores]


@contextmanager
def told(model: nn.Module, scores: Sequence[List[Tensor]]) -> Iterator[None]:
    """Inside the ``with`` block the gates answer these of one window after the other."""
    handles = []
    for level, gate in enumerate(model.backbone.gates):
        queue = iter([levels[level] for levels in scores])
        handles.append(gate.register_forward_hook(lambda m, args, out, queue=queue: next(queue).to(out.device)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def play(
    model: nn.Module,
    examples: Sequence[Example],
    windows: Sequence[Window],
    chooser: str,
    scores: Scores,
    budget: Optional[float],
) -> Result:
    """Runs the images with the regions coarse whose scores are highest.

    Args:
        model: by :func:`.gate_fitting.convert`.
        examples: by :func:`.dense_pass.gather`, with labels.
        windows: likewise.
        chooser: its name.
        scores: of each window.
        budget: the share of the dense tokens; None for all coarse.
    """
    logits, threshold = as_logits(scores), 0.0
    if budget is not None:
        threshold, _ = threshold_within(model.backbone, windows, logits, budget)
    model.backbone.select.threshold = threshold
    costs, areas = [], []
    for number, example in enumerate(track(examples, f'{chooser} {budget or ""}')):
        mine = [levels for window, levels in zip(windows, logits) if window.example == number]
        with told(model, mine), record_tokens(model) as seen:
            (sample,) = model.test_step(pseudo_collate([deepcopy(example.data)]))
        costs.append(add_up([cost for tokens, _ in seen for cost in pass_costs(model.backbone, tokens)]))
        areas.append(_areas(sample.pred_sem_seg.data[0].cpu(), example, model.num_classes))
    total = add_up(costs)
    return Result(
        chooser,
        list(model.backbone.scales),
        budget,
        *(total[key] / total[f'dense_{key}'] for key in ('tokens', 'encoder', 'total')),
        _miou(areas),
    )


def dense(model: nn.Module, examples: Sequence[Example]) -> Result:
    """What the dense model has predicted already."""
    areas = [_areas(example.prediction, example, model.num_classes) for example in examples]
    return Result('dense', [model.backbone.patch_size], None, 1.0, 1.0, 1.0, _miou(areas))


@torch.no_grad()
def smaller(model: nn.Module, examples: Sequence[Example], encoder: float) -> Result:
    """The dense model on smaller images, of as many cells as keep the encoder within this share of its MACs.

    Args:
        model: the dense segmentor, in whole inference.
        examples: by :func:`.dense_pass.gather`, with labels.
        encoder: the share.
    """
    backbone = model.backbone
    macs, full, tokens, areas = 0, 0, 0, []
    for example in track(examples, f'smaller {encoder:g}'):
        size = example.data['inputs'].shape[1:]
        grid = image_grid(backbone, *size)
        whole = dense_macs(backbone, grid)['encoder']
        for cells in range(grid[0], 0, -1):
            less = cells, round(cells * grid[1] / grid[0])
            if dense_macs(backbone, less)['encoder'] <= encoder * whole:
                break
        data = deepcopy(example.data)
        shape = [n * backbone.patch_size for n in less]
        resized = F.interpolate(data['inputs'][None].float(), shape, mode='bilinear', antialias=True)[0]
        data['inputs'] = resized.round().clamp(0, 255).to(torch.uint8)
        data['data_samples'].set_metainfo(dict(img_shape=tuple(shape)))
        (sample,) = model.test_step(pseudo_collate([data]))
        areas.append(_areas(sample.pred_sem_seg.data[0].cpu(), example, model.num_classes))
        macs, full = macs + dense_macs(backbone, less)['encoder'], full + whole
        tokens += (less[0] * less[1]) / (grid[0] * grid[1]) / len(examples)
    return Result('smaller', [backbone.patch_size], None, tokens, macs / full, macs / full, _miou(areas))


def _areas(prediction: Tensor, example: Example, classes: int) -> tuple:
    labels = torch.from_numpy(example.labels.astype(np.int64))
    return IoUMetric.intersect_and_union(prediction.long(), labels, classes, IGNORE_INDEX)[:2]


def _miou(areas: Sequence[tuple]) -> float:
    intersect, union = (torch.stack(area).sum(0) for area in zip(*areas))
    return 100 * (intersect / union)[union > 0].mean().item()
