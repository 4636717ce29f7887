"""Looking at the tokens of a running model, from outside."""

from contextlib import contextmanager
from copy import deepcopy
from typing import ContextManager, Iterator, List, Optional, Tuple, Union
from weakref import WeakSet

import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import is_model_wrapper
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..modes import in_evaluation
from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap, shrunk_grid
from ..vit.mixed_scale import MixedScale


def find_msvit(model: nn.Module, name: Optional[str] = None) -> MixedScale:
    """The backbone of a model that has tokens of several scales: an MSViT, MSBEiT or MSMAE.

    Of several, as in a distillation, the one whose gate learns is meant, or else the segmentor's own ``backbone``.

    Args:
        model: perhaps in a wrapper for several processes.
        name: of the module in the model, where that is not clear.

    Raises:
        ValueError: there is none, none of that name, or it is not clear which is meant.
    """
    while is_model_wrapper(model):
        model = model.module
    found = {path: module for path, module in model.named_modules() if isinstance(module, MixedScale)}
    if name is not None:
        if name not in found:
            raise ValueError(f'backbone: wanted the name of an MSViT in the model, one of {list(found)}, got {name!r}')
        return found[name]
    if not found:
        raise ValueError('the model must have an MSViT backbone, got none')
    learning = [module for module in found.values() if module.gate_learns]
    own = [module for path, module in found.items() if path == 'backbone']
    for candidates in (list(found.values()), learning, own):
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f'the model must have one MSViT backbone whose gate learns, got {list(found)}: name the one that is meant, as '
        f"by dict(type='GateLossHook', backbone={next(iter(found))!r})"
    )


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
    passes: List[int] = []
    handle = model.backbone.register_forward_hook(lambda module, args, out: passes.append(1))
    try:
        with evaluating(model):
            model.extract_feat(batch['inputs'])
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
