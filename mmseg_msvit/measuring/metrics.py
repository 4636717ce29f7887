"""Tokens and compute of a test set, counted beside mIoU."""

from collections import deque
from typing import Any, Dict, List, MutableMapping, Optional, Sequence
from weakref import WeakSet, WeakValueDictionary

import numpy as np
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS
from torch import nn

from ..tokens.token_map import TokenMap
from ..vit.mixed_scale import MixedScale
from .flops import PARTS, add_up, head_costs, pass_costs

PERCENTILES = (5, 50, 95)


def summarize(values: Sequence[float]) -> Dict[str, float]:
    """``mean``, ``p5``, ``p50`` and ``p95`` of a data set's values."""
    values = np.asarray(values, dtype=float)
    return dict(mean=float(values.mean()), **{f'p{p}': float(np.percentile(values, p)) for p in PERCENTILES})


def summarize_costs(images: List[Dict[str, int]]) -> Dict[str, Any]:
    """Statistics over the images of a data set.

    Args:
        images: the cost of each, by :mod:`.flops`, with neck and head.

    Returns:
        ``images``, their number; and for ``tokens``, and in GMACs for each part and ``total``, what :func:`summarize`
        gives, the mean of the ``dense`` ViT, and the share ``of_dense``, None of nothing.
    """
    found: Dict[str, Any] = {'images': len(images)}
    for key, unit in (('tokens', 1), *((key, 1e9) for key in (*PARTS, 'total'))):
        dense = sum(image[f'dense_{key}'] for image in images) / unit / len(images)
        found[key] = summarize([image[key] / unit for image in images])
        found[key]['dense'] = dense
        found[key]['of_dense'] = found[key]['mean'] / dense if dense else None
    return found


# A recorder holds so many forward passes: in an evaluation those of a batch, one for each of its windows and views.
MOST_PASSES = 4096


class Recorder:
    """Keeps the forward passes of an evaluation until a metric takes them.

    All metrics share one, which lives as long as they: a runner has a metric for validation and one for test, and the
    idle one must not collect the other's images.
    """

    def __init__(self):
        self.passes = deque(maxlen=MOST_PASSES)  # of what nobody ever takes, the oldest are lost
        self.metrics: WeakSet = WeakSet()

    def begin(self) -> None:
        """Forgets what an evaluation that was interrupted, or had no metric, has left."""
        self.passes.clear()
        for metric in self.metrics:
            metric.results.clear()

    def __call__(self, part: nn.Module, tokens: TokenMap) -> None:
        """Sees a backbone, or a head on the tokens of the backbone before it."""
        self.passes.append((part, tokens))

    def take(self) -> List[List[Dict[str, int]]]:
        """A list for each pass, with a dict for each of its images; forgets them.

        Raises:
            RuntimeError: there were so many that some were lost.
        """
        if len(self.passes) == MOST_PASSES:
            raise RuntimeError(f'TokenMetric wanted fewer than {MOST_PASSES} forward passes for a batch, got as many')
        found: List[List[Dict[str, int]]] = []
        for part, tokens in self.passes:
            if isinstance(part, MixedScale):
                found.append(pass_costs(part, tokens))
            elif found:
                found[-1] = [{**image, **head} for image, head in zip(found[-1], head_costs(part, tokens))]
        self.passes.clear()
        return found


_RECORDER: MutableMapping[str, Recorder] = WeakValueDictionary()


@METRICS.register_module()
class TokenMetric(BaseMetric):
    """Tokens and GMACs of the images of a data set, next to ``IoUMetric`` in an evaluator.

    ``val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='TokenMetric')]``. All windows of a slide
    inference and all views of test-time augmentation count as the image's. Under a sampler that repeats images to fill
    the last batch, or on several ranks, each image counts once. An evaluation begins where the model is set to
    evaluation mode, as every loop does first: what was left before does not count. Predictions of your own in the
    middle of one would: make them inside :func:`~mmseg_msvit.gates.from_outside.evaluating`.

    Results, for ``tokens`` (cls token included) and ``encoder_gmacs`` (the blocks alone, as the paper counts, and not
    what a gate runs of them): ``_mean``, ``_p5``, ``_p50``, ``_p95``, and ``_of_dense``, the sum over the sum of the
    dense ViT's in percent; the same for ``head_gmacs`` of a head on tokens. And ``backbone_gmacs_of_dense`` with gate
    and embedding.

    Args:
        collect_device: where results of several ranks are gathered, as for every metric of mmengine.
        prefix: of the results' names; None for ``msvit``.
        collect_dir: for ``collect_device='cpu'``.
    """

    default_prefix = 'msvit'

    def __init__(self, collect_device: str = 'cpu', prefix: Optional[str] = None, collect_dir: Optional[str] = None):
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.recorder = _RECORDER.setdefault('recorder', Recorder())
        self.recorder.metrics.add(self)
        MixedScale.observers.add(self.recorder)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Takes what was seen as the passes of these images.

        Raises:
            RuntimeError: no MSViT has run, or one over another number of images, or too often.
        """
        passes = self.recorder.take()
        sizes = sorted({len(counted) for counted in passes})
        if sizes != [len(data_samples)]:
            raise RuntimeError(
                f'TokenMetric wanted forward passes of an MSViT over {len(data_samples)} images, got '
                f'{f"some over {sizes}" if sizes else "none: no MSViT has run, or another TokenMetric took them"}'
            )
        self.results += map(add_up, zip(*passes))

    def compute_metrics(self, results: List[Dict[str, int]]) -> Dict[str, float]:
        """See the class."""
        total = add_up(results)
        metrics = {}
        counted = [('tokens', 'tokens', 1), ('encoder_gmacs', 'encoder', 1e9)]
        if 'head' in total:
            counted.append(('head_gmacs', 'head', 1e9))
        for name, key, unit in counted:
            statistics = summarize([image[key] / unit for image in results])
            metrics.update({f'{name}_{what}': _short(value) for what, value in statistics.items()})
            metrics[f'{name}_of_dense'] = _short(100 * total[key] / total[f'dense_{key}'])
        metrics['backbone_gmacs_of_dense'] = _short(100 * total['total'] / total['dense_total'])
        return metrics


def _short(value: float) -> float:
    """Five digits, for a log line."""
    return float(f'{value:.5g}')
