"""What a converted segmentor makes of images, beside the dense one's predictions and beside labels."""

from copy import deepcopy
from typing import Iterator, List, Sequence, Tuple

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.evaluation import IoUMetric
from rich.progress import track
from torch import Tensor, nn

from ..labels import IGNORE_INDEX, count_answers
from ..measuring.flops import add_up, pass_costs
from ..measuring.inspection import record_tokens
from .command_line import about
from .dense_pass import Example, evenly

# Images through the fitted model, evenly spread over all, for the table.
CHECKED = 100


def predict(model: nn.Module, examples: Sequence[Example], title: str) -> Iterator[Tuple[Example, Tensor, dict]]:
    """What the converted model makes of images, in the segmentor's own inference: example, (H, W) class ids, costs."""
    for example in track(examples, title):
        file = example.data['data_samples'].get('img_path', 'an image')
        with about(file), torch.no_grad(), record_tokens(model) as seen:
            (sample,) = model.test_step(pseudo_collate([deepcopy(example.data)]))
        costs = add_up([image for tokens, _ in seen for image in pass_costs(model.backbone, tokens)])
        yield example, sample.pred_sem_seg.data[0].cpu(), costs


def label_areas(prediction: Tensor, labels: np.ndarray, classes: int) -> tuple:
    """Pixels of each class in the intersection of a prediction and labels (H, W), and in the union, (K,) each."""
    truth = torch.from_numpy(labels.astype(np.int64))
    return IoUMetric.intersect_and_union(prediction.long(), truth, classes, IGNORE_INDEX)[:2]


def mean_iou(areas: Sequence[tuple]) -> float:
    """In percent, over the classes that are there, of the areas of all images together."""
    intersect, union = (torch.stack(area).sum(0) for area in zip(*areas))
    return 100 * (intersect / union)[union > 0].mean().item()


def compare(model: nn.Module, examples: List[Example]) -> List[dict]:
    """What the dense and the converted model make of images.

    Args:
        model: the converted one, settled.
        examples: by :func:`.dense_pass.gather`; ``CHECKED`` of them are looked at.

    Returns:
        A row for each: ``name``, and means of an image: ``tokens``, ``gmacs`` of the backbone, ``agreement`` with the
        dense model in percent of the pixels, and ``miou`` where each image has labels, else None.
    """
    chosen = evenly(examples, CHECKED)
    right, costs, areas = [], [], {'dense': [], 'converted': []}
    classes = count_answers(model.decode_head)
    for example, prediction, cost in predict(model, chosen, 'converted'):
        costs.append(cost)
        right.append((prediction == example.prediction).float().mean().item())
        if example.labels is not None:
            for name, found in (('dense', example.prediction), ('converted', prediction)):
                areas[name].append(label_areas(found, example.labels, classes))

    def row(name: str, prefix: str, agreement: float) -> dict:
        miou = mean_iou(areas[name]) if len(areas[name]) == len(chosen) else None
        tokens, macs = (np.mean([cost[f'{prefix}{key}'] for cost in costs]) for key in ('tokens', 'total'))
        return dict(name=name, tokens=float(tokens), gmacs=float(macs) / 1e9, agreement=100 * agreement, miou=miou)

    return [row('dense', 'dense_', 1.0), row('converted', '', float(np.mean(right)))]
