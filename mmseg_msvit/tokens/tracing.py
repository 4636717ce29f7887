"""What a model does otherwise while ``torch.export`` looks: it knows no size and no number."""

from functools import lru_cache, wraps
from typing import Callable

import torch
from torch import Tensor


def traced() -> bool:
    """Whether ``torch.export`` is looking, to whom sizes and numbers of tokens are symbols.

    Not ``torch.compile``: its graph breaks where tokens are counted, and then it knows numbers and fuses attention.
    """
    # Earlier ones know one word for both (2.2 to 2.6), or none (2.1).
    asked = getattr(torch.compiler, 'is_exporting', None) or getattr(torch.compiler, 'is_compiling', None)
    return asked is not None and asked()


def remembered(function: Callable) -> Callable:
    """``lru_cache`` of a function of sizes; not in a traced model, whose symbols have no hash."""
    cached = lru_cache(maxsize=64)(function)

    @wraps(function)
    def call(*args):
        return function(*args) if traced() else cached(*args)

    return call


def first(x: Tensor, n: int, dim: int) -> Tensor:
    """The first n along a dimension. A traced model takes them by number: it cannot know whether they are all."""
    return x.index_select(dim, torch.arange(n, device=x.device)) if traced() else x.narrow(dim, 0, n)
