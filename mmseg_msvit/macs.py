"""What all parts count multiply-accumulates by."""

from torch import nn


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in a module: their MACs for one token."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
