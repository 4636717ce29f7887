"""Gates: one logit of "coarse" for each region of an image.

A gate takes images padded to whole regions, and their region grid, and returns float32 logits (B, hc, wc). Whether a
region is coarse is decided from the logit by the backbone's token selector. A backbone of several coarse levels has a
gate for each, and asks them from the coarsest down. Here are what all of them share, and those that see nothing.
"""

from typing import Callable, Optional, Tuple, Union

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from ..tokens.tracing import first

# A decided gate's logit: sigmoid(20) is 1 - 2e-9, so that it is beyond any threshold that one would set.
CERTAIN = 20.0


class Gate(BaseModule):
    """Base of all gates. The backbone gives the first four arguments, a config the others.

    Args:
        in_channels: channels C of the images.
        region: pixels R along a region's side.
        grid: (gh, gw), the region grid of the backbone's ``img_size``.
        embed_dims: the backbone's width.
        temperature: T of m = sigmoid((logit + logistic noise) / T) in training; chosen here, no source gives it.
        threshold: a region is coarse at test time iff sigmoid(logit) > threshold.
        init_cfg: mmengine's, of first weights.
    """

    # How many of the ViT's blocks it looks through; one that looks through none sees pixels.
    blocks = 0
    # Whether its weights, if it has any, are to stay as they are.
    frozen = False

    def __init__(
        self,
        in_channels: int = 3,
        region: int = 32,
        grid: Tuple[int, int] = (16, 16),
        embed_dims: int = 384,
        temperature: float = 1.0,
        threshold: float = 0.5,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.region = region
        self.grid = tuple(grid)
        self.embed_dims = embed_dims
        self.temperature = temperature
        self.threshold = threshold

    def check(self, images: Tensor, grid: Tuple[int, int]) -> None:
        """Refuses what is not of the region grid.

        Raises:
            ValueError: the images have other channels or another size than the region grid says.
        """
        if self.blocks:
            seen, wanted = 'features', (self.embed_dims, *grid)
        else:
            seen, wanted = 'images', (self.in_channels, grid[0] * self.region, grid[1] * self.region)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f'grid {tuple(grid)} of {self.region}-pixel regions wants {seen} of (C, H, W) = {wanted}, '
                f'got {tuple(images.shape[1:])}'
            )

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        """Logits of coarse.

        Args:
            images: (B, C, hc * R, wc * R); of a gate that looks through blocks, what they make of these if each region
                is one token, (B, embed_dims, hc, wc).
            grid: (hc, wc).
            left: (B, hc, wc) bool, the regions that are not part of a coarser token; None for all. What a gate says
                of others changes nothing.

        Returns:
            (B, hc, wc) float32.
        """
        raise NotImplementedError

    def macs(self, grid: Tuple[int, int]) -> int:
        """Multiply-accumulates of one image of (hc, wc) regions, without those of the blocks that it looks through."""
        raise NotImplementedError


def ask(gate: Gate, images: Tensor, glance: Callable, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
    """A gate's logits (B, hc, wc).

    Args:
        gate: who is asked.
        images: (B, C, H, W); finer regions of padding alone, which the coarsest ones bring, are cut off.
        glance: takes the gate to what it sees, if that is not these.
        grid: (hc, wc).
        left: as for the gate.
    """
    if gate.blocks:
        return gate(glance(gate), grid, left)
    height, width = (regions * gate.region for regions in grid)
    return gate(first(first(images, height, 2), width, 3), grid, left)


class ForcedGate(Gate):
    """Base of the gates that compute nothing to speak of."""

    def macs(self, grid: Tuple[int, int]) -> int:
        return 0


@MODELS.register_module()
class FixedGate(ForcedGate):
    """The same answer everywhere: all coarse, or all fine, which is the dense ViT.

    Args:
        coarse: the answer.
    """

    def __init__(self, *args, coarse: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.coarse = coarse

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        return images.new_full((images.shape[0], *grid), CERTAIN if self.coarse else -CERTAIN, dtype=torch.float32)


def sure(order: Tensor, limit: Union[float, Tensor], end: int) -> Tensor:
    """Logits of regions that stand in an order from 0 to ``end``: coarse below a limit, and the surer the farther off.

    All are sure. That they differ is for a ``token_budget``, which takes equal ones in the order of their places.
    """
    return torch.where(order < limit, CERTAIN, -CERTAIN) * (1 + (order - limit).abs() / end) / 2


def check_ratio(coarse_ratio: float) -> float:
    """The ratio, which is one.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= coarse_ratio <= 1:
        raise ValueError(f'coarse_ratio must be in [0, 1], got {coarse_ratio}')
    return coarse_ratio


@MODELS.register_module()
class RandomGate(ForcedGate):
    """Coarse by chance, each region by itself, so that images differ in their number of tokens. A baseline.

    Args:
        coarse_ratio: the probability of coarse, at each level of those that are left.
    """

    def __init__(self, *args, coarse_ratio: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.coarse_ratio = check_ratio(coarse_ratio)

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        coin = torch.rand(images.shape[0], *grid, device=images.device)
        return sure(coin, self.coarse_ratio, 1)
