"""What a ViT's first blocks make of an image that is all coarse, for gates that look through them."""

import torch
from torch import Tensor, nn

from ..modes import in_evaluation
from ..tokens.candidates import uniform_tokens
from ..tokens.token_map import Grid, region_grid
from .gate import Gate


@torch.no_grad()
def glance(backbone: nn.Module, images: Tensor, grid: Grid, gate: Gate) -> Tensor:
    """What the blocks that a gate looks through make of images, with one token for each of the gate's regions.

    No gradient reaches the ViT from here. As all that decides, this is in float32 also under AMP; and it has neither
    dropout nor stochastic depth, in training either.

    Args:
        backbone: a :class:`.MixedScale`.
        images: (B, C, H, W), padded to whole regions.
        grid: (h, w), their cells without padding.
        gate: one of the backbone's.

    Returns:
        (B, embed_dims, hc, wc).
    """
    level = backbone.scales.index(gate.region)
    tokens = uniform_tokens(backbone.sides, level, backbone.select.prefix, images.shape[0], grid, images.device)
    blocks = backbone.layers[: gate.blocks]
    with torch.autocast(images.device.type, enabled=False), in_evaluation(backbone.drop_after_pos, *blocks):
        x, places = backbone.embed(images.to(backbone.cls_token.dtype), tokens), backbone.places(tokens)  # (N, C)
        for layer in blocks:
            x = layer(x, tokens, places)
    x = x.unflatten(0, (images.shape[0], -1))[:, tokens.prefix :]  # (B, hc * wc, C)
    return x.mT.unflatten(2, region_grid(grid, backbone.sides[level]))
