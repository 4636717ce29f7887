"""Tokens and compute of a test set, counted beside mIoU."""

from typing import Any, Dict, List, MutableMapping, Sequence
from weakref import WeakValueDictionary

import numpy as np
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS

from .backbone import MSViT
from .flops import batch_macs, dense_macs
from .tokens import TokenBatch

PERCENTILES = (5, 50, 95)


def summarize(values: Sequence[float]) -> Dict[str, float]:
    """``mean``, ``p5``, ``p50`` and ``p95`` of a data set's values."""
    values = np.asarray(values, dtype=float)
    return dict(mean=float(values.mean()), **{f'p{p}': float(np.percentile(values, p)) for p in PERCENTILES})


class Recorder:
    """Counts each forward pass until a metric takes them.

    All metrics share one, which lives as long as they: a runner has a metric for validation and one for test, and the
    idle one must not collect the other's images.
    """

    def __init__(self):
        self.passes: List[List[Dict[str, int]]] = []

    def __call__(self, backbone: MSViT, tokens: TokenBatch) -> None:
        dense = dense_macs(backbone, tokens.grid)
        dense_tokens = tokens.grid[0] * tokens.grid[1] + int(tokens.with_cls)
        self.passes.append(
            [
                dict(
                    tokens=count,
                    dense_tokens=dense_tokens,
                    encoder=macs['encoder'],
                    dense_encoder=dense['encoder'],
                    backbone=sum(macs.values()),
                    dense_backbone=sum(dense.values()),
                )
                for count, macs in zip(tokens.active_counts().tolist(), batch_macs(backbone, tokens))
            ]
        )

    def take(self) -> List[List[Dict[str, int]]]:
        """A list for each pass, with a dict for each image; forgets them."""
        passes, self.passes = self.passes, []
        return passes


_RECORDER: MutableMapping[str, Recorder] = WeakValueDictionary()


@METRICS.register_module()
class TokenMetric(BaseMetric):
    """Tokens and GMACs of the images of a data set, next to ``IoUMetric`` in an evaluator.

    ``val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='TokenMetric')]``. All windows of a slide
    inference and all views of test-time augmentation count as the image's. Under a sampler that repeats images to fill
    the last batch, or on several ranks, each image counts once.

    Results, for ``tokens`` (cls token included) and ``encoder_gmacs`` (the blocks alone, as the paper counts):
    ``_mean``, ``_p5``, ``_p50``, ``_p95``, and ``_of_dense``, the sum over the sum of the dense ViT's in percent. And
    ``backbone_gmacs_of_dense`` with gate and embedding.
    """

    default_prefix = 'msvit'

    def __init__(self, collect_device: str = 'cpu', prefix: str = None):
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.recorder = _RECORDER.setdefault('recorder', Recorder())
        MSViT.observers.add(self.recorder)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Takes what was seen as the passes of these images.

        Raises:
            RuntimeError: no MSViT has run, or one over another number of images.
        """
        passes = self.recorder.take()
        sizes = sorted({len(counted) for counted in passes})
        if sizes != [len(data_samples)]:
            raise RuntimeError(
                f'TokenMetric wanted forward passes of an MSViT over {len(data_samples)} images, got '
                f'{f"some over {sizes}" if sizes else "none: the model has no MSViT"}'
            )
        for image in zip(*passes):
            self.results.append({key: sum(part[key] for part in image) for key in image[0]})

    def compute_metrics(self, results: List[Dict[str, int]]) -> Dict[str, float]:
        """See the class."""
        total = {key: sum(image[key] for image in results) for key in results[0]}
        metrics = {}
        for name, key, unit in (('tokens', 'tokens', 1), ('encoder_gmacs', 'encoder', 1e9)):
            statistics = summarize([image[key] / unit for image in results])
            metrics.update({f'{name}_{what}': round(value, 3) for what, value in statistics.items()})
            metrics[f'{name}_of_dense'] = round(100 * total[key] / total[f'dense_{key}'], 2)
        metrics['backbone_gmacs_of_dense'] = round(100 * total['backbone'] / total['dense_backbone'], 2)
        return metrics
