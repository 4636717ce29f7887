"""Looking at the tokens of a running model, from outside."""

from contextlib import contextmanager
from typing import ContextManager, Iterator, List, Optional, Tuple, Union
from weakref import WeakSet

import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .evaluation import in_evaluation
from .mixed_scale import MixedScale
from .selection import Decision
from .tokens import TokenMap, shrunk_grid


def find_msvit(model: nn.Module) -> MixedScale:
    """The one backbone of a model that has tokens of several scales: an MSViT, MSBEiT or MSMAE.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, MixedScale)]
    if len(found) != 1:
        raise ValueError(f'the model must have one MSViT backbone, got {len(found)}')
    return found[0]


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


@contextmanager
def deciding_by(
    model: nn.Module,
    threshold: Union[float, Tensor],
    token_budget: Union[float, Tensor, None] = None,
    input_scale: Optional[float] = None,
) -> Iterator[None]:
    """Inside the ``with`` block the gates decide by these, at test time; then all is as it was.

    Args:
        model: a backbone or a segmentor.
        threshold: of :class:`.TokenSelector`; a tensor is for an export.
        token_budget: likewise.
        input_scale: the backbone's; None leaves it.
    """
    backbone = find_msvit(model)
    select = backbone.select
    before = select.threshold, select.token_budget, backbone.input_scale
    select.threshold, select.token_budget = threshold, token_budget
    backbone.input_scale = backbone.input_scale if input_scale is None else input_scale
    try:
        yield
    finally:
        select.threshold, select.token_budget, backbone.input_scale = before


def as_dense(model: nn.Module) -> ContextManager[None]:
    """Inside the ``with`` block no region is coarse and images keep their size, at test time: the dense model."""
    return deciding_by(model, 1.0, input_scale=1.0)  # no probability is above it


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation of whole images inside the ``with`` block, unseen by any metric; then the model is as it was.

    Args:
        model: a segmentor. Slide inference is off, so that an image is one forward pass.
    """
    test_cfg, observers = model.test_cfg, MixedScale.observers
    model.test_cfg = ConfigDict(test_cfg or {}, mode='whole')
    MixedScale.observers = WeakSet()
    try:
        with torch.no_grad(), in_evaluation(model):
            yield
    finally:
        model.test_cfg, MixedScale.observers = test_cfg, observers


def look(model: nn.Module, data: dict) -> Tuple[SegDataSample, TokenMap, Decision]:
    """What a segmentor makes of one image, in one piece, by :func:`evaluating`, its tokens and the gates' decision.

    Args:
        model: a segmentor with an MSViT.
        data: what a test pipeline made of the image.
    """
    with evaluating(model), record_tokens(model) as seen:
        (sample,) = model.test_step(pseudo_collate([data]))
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
