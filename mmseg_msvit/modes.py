"""Evaluation mode for a while."""

from contextlib import contextmanager
from typing import Iterator

from torch import nn


@contextmanager
def in_evaluation(*parts: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block these are in evaluation mode; afterwards each module is in the mode that it was in.

    Not by ``module.eval()``, which a :class:`.MixedScale` reports to its observers as the begin of an evaluation.
    """
    training = [module for part in parts for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
