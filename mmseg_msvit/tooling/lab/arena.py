"""Ways of choosing coarse regions against each other, on one trained dense segmentor with nothing retrained.

A chooser gives each region of each coarse level a score: those with the highest are coarse. A budget sets one threshold
for all images and levels, so that all choosers spend the same tokens, and the test set goes through the segmentor once.
The share that is recovered of the gap between all coarse and dense is what carries over between data sets.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...gates.doubt import region_doubt
from ...gates.from_outside import deciding_by
from ...labels import count_answers
from ...measuring.flops import add_up
from ...tokens.embedding import pad_to_regions, patchify, shrink
from ...tokens.token_map import Grid, region_grid, shrunk_grid
from ..comparison import label_areas, mean_iou, predict
from ..dense_pass import Example, Window, pixels
from ..gate_fitting import find_threshold

# Of each window, of each coarse level, the finest first: (1, hc, wc).
Scores = List[List[Tensor]]


@dataclass
class Result:
    """A test set under one choice of tokens.

    Attributes:
        chooser: its name.
        scales: pixels along a token's side.
        size: of the images, as a share of their height and width.
        budget: the share of the dense ViT's tokens that was asked for; None for what has no choice.
        tokens: share of the dense ViT's tokens.
        encoder: MACs of the blocks, as a share of the dense ViT's.
        backbone: likewise, with gate and embedding.
        miou: in percent.
    """

    chooser: str
    scales: List[int]
    size: float
    budget: Optional[float]
    tokens: float
    encoder: float
    backbone: float
    miou: float


def score_random(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """By chance, the same chance each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.rand(1, *region_grid(_grid(model, window), side), generator=generator) for side in _sides(model)]
        for window in windows
    ]


def score_variance(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> Scores:
    """Regions whose pixels vary least are coarse."""
    backbone, scores = model.backbone, []
    for window in windows:
        image = shrink(pixels(model, examples[window.example], window)[None], backbone.patch_size, backbone.input_scale)
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
    scores = []
    for window in windows:
        shares = F.adaptive_avg_pool2d(window.shares[None], _grid(model, window))
        scores.append([-region_doubt(shares, side)[0] * _area(model, side) for side in _sides(model)])
    return scores


CHOOSERS: Dict[str, Callable] = dict(random=score_random, variance=score_variance, doubt=score_doubt)


def _sides(model: nn.Module) -> Sequence[int]:
    return model.backbone.sides[1:]


def _grid(model: nn.Module, window: Window) -> Grid:
    return shrunk_grid(tuple(window.shares.shape[1:]), model.backbone.input_scale)


def _area(model: nn.Module, side: int) -> float:
    """The weight of a region's doubt: a larger one leaves more area in doubt, and its coarse token saves no more."""
    return (side / _sides(model)[0]) ** 2


def as_logits(scores: Scores) -> Scores:
    """The rank of each score among all, as a logit, so that a threshold of probabilities can part any two of them."""
    flat = torch.cat([level.flatten().cpu() for levels in scores for level in levels])
    ranks = torch.empty(len(flat), dtype=torch.float64)
    ranks[flat.argsort(stable=True)] = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    parts = (ranks / (len(flat) + 1)).logit().split([level.numel() for levels in scores for level in levels])
    parts = iter(parts)
    return [[next(parts).view_as(level) for level in levels] for levels in scores]


@contextmanager
def told(model: nn.Module, scores: Sequence[List[Tensor]]) -> Iterator[None]:
    """Inside the ``with`` block the gates answer with these scores, each forward pass with those of the next window."""
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
        model: by :func:`.conversion.convert`.
        examples: by :func:`.dense_pass.gather`, with labels.
        windows: likewise.
        chooser: its name.
        scores: of each window.
        budget: the share of the dense tokens; None for all coarse.
    """
    logits, threshold = as_logits(scores), 0.0
    if budget is not None:
        threshold, _ = find_threshold(model.backbone, windows, logits, budget)
    costs, areas = [], []
    with told(model, logits), deciding_by(model, threshold):
        for example, prediction, cost in predict(model, examples, f'{chooser} {budget or ""}'):
            costs.append(cost)
            areas.append(label_areas(prediction, example.labels, count_answers(model.decode_head)))
    total = add_up(costs)
    return Result(
        chooser,
        list(model.backbone.scales),
        model.backbone.input_scale,
        budget,
        *(total[key] / total[f'dense_{key}'] for key in ('tokens', 'encoder', 'total')),
        mean_iou(areas),
    )


def dense(model: nn.Module, examples: Sequence[Example]) -> Result:
    """What the dense model has predicted already."""
    areas = [label_areas(example.prediction, example.labels, count_answers(model.decode_head)) for example in examples]
    return Result('dense', [model.backbone.patch_size], 1.0, None, 1.0, 1.0, 1.0, mean_iou(areas))


def smaller(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window], budget: float) -> Result:
    """The dense model on smaller images, of about so many cells as the budget allows.

    Args:
        model: by :func:`.conversion.convert`.
        examples: by :func:`.dense_pass.gather`, with labels.
        windows: likewise.
        budget: the share of the dense tokens.
    """
    model.backbone.input_scale = budget**0.5
    result = play(model, examples, windows, 'smaller', score_random(model, examples, windows), 1.0)
    return replace(result, budget=budget)
