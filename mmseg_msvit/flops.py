"""Multiply-accumulates of a backbone as a function of an image's tokens.

Counted are matrix products: linear layers, convolutions, and both products of the attention. Norms, activations,
softmax, resizing and the moving of tokens are not, as is usual.
"""

from typing import Dict, Tuple

from mmseg.models.backbones import VisionTransformer
from torch import nn

from .backbone import MSViT
from .tokens import TokenBatch, region_grid


def linear_macs(module: nn.Module) -> int:
    """MACs for one token of all linear layers in a module, those of ``nn.MultiheadAttention`` included."""
    macs = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            macs += part.in_features * part.out_features
        elif isinstance(part, nn.MultiheadAttention):
            macs += part.in_proj_weight.numel()
    return macs


def encoder_macs(layers: nn.ModuleList, tokens: int) -> int:
    """MACs of transformer blocks over one image's tokens, the cls token among them.

    Per block n * (weights of its linear layers) + 2 n^2 C: linear in the tokens, but for the attention.
    """
    return sum(
        tokens * linear_macs(layer) + 2 * tokens**2 * part.embed_dim
        for layer in layers
        for part in layer.modules()
        if isinstance(part, nn.MultiheadAttention)
    )


def msvit_macs(backbone: MSViT, grid: Tuple[int, int], coarse: int, fine: int) -> Dict[str, int]:
    """MACs of MSViT at test time for one image.

    Args:
        backbone: the model.
        grid: (h, w) fine cells of the image.
        coarse: its active coarse tokens.
        fine: its active fine tokens.

    Returns:
        ``gate``, ``embedding`` and ``encoder``.
    """
    hc, wc = region_grid(grid, backbone.side)
    weight = backbone.patch_embed.projection.weight.numel()
    tokens = coarse + fine + int(backbone.with_cls_token)
    embedding = tokens * weight
    if backbone.coarse_detail is not None:
        embedding += coarse * (backbone.side**2 * weight + backbone.coarse_detail.weight.numel())
    return dict(
        gate=hc * wc * linear_macs(backbone.gate),
        embedding=embedding,
        encoder=encoder_macs(backbone.layers, tokens),
    )


def batch_macs(backbone: MSViT, tokens: TokenBatch) -> list:
    """:func:`msvit_macs` of each image of a batch, as its tokens are at test time."""
    coarse = tokens.coarse.flatten(1).sum(1).tolist()
    active = tokens.active_counts().tolist()
    cls = int(tokens.with_cls)
    return [msvit_macs(backbone, tokens.grid, c, n - c - cls) for c, n in zip(coarse, active)]


def dense_macs(backbone: VisionTransformer, grid: Tuple[int, int]) -> Dict[str, int]:
    """MACs of the dense ViT of the same shape for one image of (h, w) cells, by the same parts."""
    cells = grid[0] * grid[1]
    tokens = cells + int(backbone.with_cls_token)
    return dict(
        gate=0,
        embedding=cells * backbone.patch_embed.projection.weight.numel(),
        encoder=encoder_macs(backbone.layers, tokens),
    )
