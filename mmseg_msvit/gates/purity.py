"""Whether a region is of one class, as the ground truth says, and the gate loss that learns it."""

import warnings
from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from mmseg.registry import MODELS
from torch import Tensor

from ..labels import IGNORE_INDEX, check_labels, one_class
from ..tokens.embedding import patchify
from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap
from .losses import GateLoss

# Images with labels of one class alone, after which PurityLoss warns: what is rare is in none of the first few.
ALIKE = 200


@MODELS.register_module()
class PurityLoss(GateLoss):
    """Cross-entropy of the logit against "the region is of one class", read from the segmentor's ground truth.

    Chosen here, after content-aware token sharing (Lu, de Geus and Dubbelman 2023), whose policy is trained so.

    Args:
        purity: a region counts as of one class if at least this share of its labelled pixels is.
        ignore_index: label of the pixels that do not count, any integer. Regions without a labelled pixel
            have no part in the loss.
    """

    default_name = 'loss_purity'
    reads_labels = True

    def __init__(self, purity: float = 0.95, ignore_index: int = IGNORE_INDEX, **kwargs):
        super().__init__(**kwargs)
        if not 0 < purity <= 1:
            raise ValueError(f'purity must be in (0, 1], got {purity}')
        self.purity = purity
        self.ignore_index = ignore_index
        self._begun, self._seen = 0, set()

    def begin(self) -> None:
        super().begin()
        self._begun, self._seen = 0, set()

    def of_step(self, decision: Decision, tokens: TokenMap, data_samples: Sequence, images: Tensor) -> Tensor:
        for sample in data_samples:
            if 'gt_sem_seg' in sample:
                try:
                    check_labels(sample.gt_sem_seg.data, images.shape[2:])
                except ValueError as error:
                    raise ValueError(f'PurityLoss reads labels region by region. {error}') from None
        return super().of_step(decision, tokens, data_samples, images)

    def forward(self, logits: Tensor, data_samples: Sequence) -> Tensor:
        if not data_samples or any('gt_sem_seg' not in sample for sample in data_samples):
            raise ValueError('PurityLoss needs data_samples with gt_sem_seg: train it in a segmentor, or leave it out')
        if len(data_samples) != len(logits):
            raise ValueError(
                f'PurityLoss wanted as many data_samples as images, got {len(data_samples)} for {len(logits)}'
            )
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data_samples])  # (B, H, W)
        self._watch(labels)
        share, labelled = region_purity(labels, logits.shape[1:], self.region, self.ignore_index)
        target = (share >= self.purity).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
        # The ranks' mean, which DDP makes, is then that over all labelled regions, of which ranks have unlike numbers.
        total = labelled.sum()
        all_reduce(total)
        return self.loss_weight * (loss * labelled).sum() * get_world_size() / total.clamp(min=1)

    @torch.no_grad()
    def _watch(self, labels: Tensor) -> None:
        """Warns where a training begins with labels of one class; does not look again once there were two."""
        if self._begun < ALIKE:
            found = set(labels.unique().tolist())
            self._seen |= {IGNORE_INDEX if label == self.ignore_index else label for label in found}
            self._begun += len(labels)
            why = one_class(self._seen)
            if why is None:
                self._begun = ALIKE
            elif self._begun >= ALIKE:
                warnings.warn(
                    f'PurityLoss teaches the gate to be coarse everywhere: in the first {self._begun} images {why}',
                    stacklevel=2,
                )


def region_purity(
    labels: Tensor, grid: Tuple[int, int], region: int, ignore_index: int = IGNORE_INDEX
) -> Tuple[Tensor, Tensor]:
    """Share of the commonest class among the labelled pixels of each region.

    Args:
        labels: (B, H, W) integers, no larger than the region grid.
        grid: (hc, wc).
        region: pixels along a region's side.
        ignore_index: label of unlabelled pixels.

    Returns:
        (B, hc, wc) shares, 0 where nothing is labelled, and (B, hc, wc) bool, whether anything is.
    """
    hc, wc = grid
    right, below = wc * region - labels.shape[2], hc * region - labels.shape[1]
    if right < 0 or below < 0:
        raise ValueError(
            f'grid {tuple(grid)} of {region}-pixel regions does not cover labels of (H, W) = {tuple(labels.shape[1:])}'
        )
    padded = F.pad(labels.long(), (0, right, 0, below), value=ignore_index)
    pixels = patchify(padded[:, None], region).sort(-1).values  # (B, hc, wc, R * R), equal ones side by side
    place = torch.arange(pixels.shape[-1], device=labels.device)
    begins = F.pad(pixels[..., 1:] != pixels[..., :-1], (1, 0), value=True)
    run = place - (place * begins).cummax(-1).values + 1  # length of the run of equal labels up to each pixel
    labelled = pixels != ignore_index
    total = labelled.sum(-1)  # (B, hc, wc)
    return (run * labelled).amax(-1) / total.clamp(min=1), total > 0
