"""A model's gates from outside: which they are, and how they decide for a while."""

from contextlib import contextmanager
from typing import ContextManager, Iterator, Optional, Union
from weakref import WeakSet

import torch
from mmengine.config import ConfigDict
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..modes import in_evaluation
from .gated import Gated


def find_msvit(model: nn.Module, name: Optional[str] = None) -> Gated:
    """The backbone of a model that has tokens of several scales: an MSViT, MSBEiT or MSMAE.

    Of several, as in a distillation, the segmentor's own ``backbone`` is meant, or else the one whose gate learns.

    Args:
        model: perhaps in a wrapper for several processes.
        name: of the module in the model, where that is not clear.

    Raises:
        ValueError: there is none, none of that name, or it is not clear which is meant.
    """
    while is_model_wrapper(model):
        model = model.module
    found = {path: module for path, module in model.named_modules() if isinstance(module, Gated)}
    if name is not None:
        if name not in found:
            raise ValueError(f'backbone: wanted the name of an MSViT in the model, one of {list(found)}, got {name!r}')
        return found[name]
    if not found:
        raise ValueError('the model must have an MSViT backbone, got none')
    learning = [module for module in found.values() if module.gate_learns]
    own = [module for path, module in found.items() if path == 'backbone']
    for candidates in (list(found.values()), own, learning):
        if len(candidates) == 1:
            return candidates[0]
    raise ValueError(
        f'the model must have one MSViT backbone whose gate learns, got {list(found)}: name the one that is meant, by '
        f'backbone={next(iter(found))!r} in GateLossHook, and in paramwise_cfg where rates decay by layer'
    )


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
    test_cfg, observers = model.test_cfg, Gated.observers
    model.test_cfg = ConfigDict(test_cfg or {}, mode='whole')
    Gated.observers = WeakSet()
    try:
        with torch.no_grad(), in_evaluation(model):
            yield
    finally:
        model.test_cfg, Gated.observers = test_cfg, observers
