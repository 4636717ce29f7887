"""Looking at the tokens of a running model, from outside."""

from contextlib import contextmanager
from copy import deepcopy
from typing import Iterator, List, Tuple

import torch
from mmengine.dataset import pseudo_collate
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..gates.from_outside import evaluating, find_msvit
from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap, shrunk_grid
from ..vit.mixed_scale import MixedScale


@contextmanager
def record_tokens(model: nn.Module) -> Iterator[List[Tuple[TokenMap, Decision]]]:
    """A list that fills with the tokens and the decision of each forward pass inside the ``with`` block.

    Slide inference and test-time augmentation make several of them for an image.

    Args:
        model: a backbone or a segmentor.
    """
    seen: List[Tuple[TokenMap, Decision]] = []
    handle = find_msvit(model).select.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def check_one_pass(model: nn.Module, data: dict) -> None:
    """Refuses a segmentor that runs its backbone several times on an image, as those for pairs of images do.

    Args:
        model: a segmentor.
        data: what a test pipeline made of an image.

    Raises:
        ValueError: it does, or it does not run it at all.
    """
    batch = model.data_preprocessor(pseudo_collate([deepcopy(data)]), training=False)
    height, width = (model.test_cfg or {}).get('crop_size') or batch['inputs'].shape[
        2:
    ]  # a window, where it sees those
    passes: List[int] = []
    handle = model.backbone.register_forward_hook(lambda module, args, out: passes.append(1))
    try:
        with evaluating(model):
            model.extract_feat(batch['inputs'][..., :height, :width])
    finally:
        handle.remove()
    refuse_passes(model, len(passes))


def refuse_passes(model: nn.Module, passes: int) -> None:
    """Raises a ValueError unless a segmentor has run its backbone once on an image."""
    if passes != 1:
        raise ValueError(
            f'model: wanted a segmentor that runs its backbone once on an image, got {type(model).__name__}, which '
            f'runs it {passes} times. The tools do not know which pass is of what; TokenMetric, in an evaluator, '
            'counts them all'
        )


def look(model: nn.Module, data: dict) -> Tuple[SegDataSample, TokenMap, Decision]:
    """What a segmentor makes of one image, in one piece, by :func:`evaluating`, its tokens and the gates' decision.

    Args:
        model: a segmentor with an MSViT.
        data: what a test pipeline made of the image.

    Raises:
        ValueError: by :func:`refuse_passes`.
    """
    with evaluating(model), record_tokens(model) as seen:
        (sample,) = model.test_step(pseudo_collate([data]))
    refuse_passes(model, len(seen))
    ((tokens, decision),) = seen
    return sample, tokens, decision


def seen_size(backbone: MixedScale, tokens: TokenMap, sample: SegDataSample) -> Tuple[int, int]:
    """(height, width) in pixels of an image as the backbone has embedded it, without what pads it.

    Args:
        backbone: of a segmentor.
        tokens: of the image, in one piece.
        sample: what the segmentor made of it, with the shapes of the image and of what the preprocessor padded it to.
    """
    image, padded = sample.img_shape[:2], sample.metainfo.get('pad_shape', sample.img_shape)[:2]
    if tokens.dense_grid is None:
        return tuple(image)
    cells = shrunk_grid(tokens.dense_grid, backbone.input_scale)
    embedded = [n * backbone.patch_size for n in cells]  # without what fills the regions
    height, width = (max(1, round(part * to / whole)) for part, to, whole in zip(image, embedded, padded))
    return height, width


def coarse_regions(backbone: MixedScale, tokens: TokenMap) -> Tensor:
    """(B, hc, wc) bool, which regions of the finest coarse level have no fine tokens."""
    side = backbone.sides[1]
    return tokens.levels()[:, ::side, ::side] > 0
