"""Multiply-accumulates of a segmentor, those of its backbone as a function of each image's tokens.

Counted are matrix products: linear layers, convolutions, and both products of the attention. Norms, activations,
softmax, resizing and the moving of tokens are not, as is usual.
"""

from copy import deepcopy
from typing import Callable, Dict, List, Optional, Tuple

import torch
from mmengine.dataset import pseudo_collate
from mmseg.models.backbones import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .backbone import MSViT
from .tokens import TokenBatch, region_grid

PARTS = ('gate', 'embedding', 'encoder', 'neck', 'head')


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


def batch_macs(backbone: MSViT, tokens: TokenBatch) -> List[Dict[str, int]]:
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


def operator_macs(function: Callable, *args) -> int:
    """MACs of the operators that a call executes, attention in its plain form, since fused kernels would count zero."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


class HeadMacs:
    """MACs of a segmentor's neck and decode head, which see the dense grid and cost the same for any tokens.

    Counted on copies without data, once for each grid.

    Args:
        model: a segmentor, :class:`mmseg.models.EncoderDecoder`.

    Raises:
        ValueError: the model has no single decode head.
    """

    def __init__(self, model: nn.Module):
        head = getattr(model, 'decode_head', None)
        if not hasattr(head, 'forward') or isinstance(head, nn.ModuleList):
            raise ValueError(f'the model must be a segmentor with one decode_head, got {type(model).__name__}')
        self.backbone = model.backbone
        self.neck = deepcopy(model.neck).to('meta').eval() if model.with_neck else None
        self.head = deepcopy(head).to('meta').eval()
        self.known: Dict[Tuple[int, int], Dict[str, int]] = {}

    def __call__(self, grid: Tuple[int, int]) -> Dict[str, int]:
        """``neck`` and ``head`` for one image of (h, w) cells."""
        if grid not in self.known:
            dims = self.backbone.patch_embed.embed_dims
            x = torch.empty(1, dims, *grid, device='meta')
            if self.backbone.output_cls_token:
                x = [x, torch.empty(1, dims, device='meta')]
            features = (x,) * (len(self.backbone.out_indices) + int(self.backbone.out_origin))
            neck = 0
            if self.neck is not None:
                neck = operator_macs(self.neck, features)
                with torch.no_grad():
                    features = self.neck(features)
            self.known[grid] = dict(neck=neck, head=operator_macs(self.head, features))
        return self.known[grid]


def image_grid(backbone: VisionTransformer, height: int, width: int) -> Tuple[int, int]:
    """(h, w), the cells of an image of (height, width) pixels."""
    return -(-height // backbone.patch_size), -(-width // backbone.patch_size)


def cost(
    backbone: VisionTransformer,
    grid: Tuple[int, int],
    tokens: int,
    macs: Dict[str, int],
    heads: Optional[HeadMacs] = None,
) -> Dict[str, int]:
    """What one pass over one image costs, and what it would cost the dense ViT.

    Args:
        backbone: the model.
        grid: (h, w) cells of the image.
        tokens: its tokens, cls included.
        macs: those of the backbone, by part.
        heads: counts neck and head; without it they are left out.

    Returns:
        ``tokens``, MACs of each part and in ``total``; and the dense ViT's, each name with ``dense_`` before it.
    """
    after = heads(grid) if heads else {}
    found = {}
    for kind, count, parts in (
        ('', tokens, macs),
        ('dense_', grid[0] * grid[1] + int(backbone.with_cls_token), dense_macs(backbone, grid)),
    ):
        parts = {**parts, **after}
        found.update({f'{kind}{key}': value for key, value in parts.items()})
        found.update({f'{kind}tokens': count, f'{kind}total': sum(parts.values())})
    return found


def pass_costs(backbone: MSViT, tokens: TokenBatch, heads: Optional[HeadMacs] = None) -> List[Dict[str, int]]:
    """:func:`cost` of each image of a batch, as its tokens are at test time."""
    counts = tokens.active_counts().tolist()
    macs = batch_macs(backbone, tokens)
    return [cost(backbone, tokens.grid, count, parts, heads) for count, parts in zip(counts, macs)]


def dense_cost(backbone: VisionTransformer, grid: Tuple[int, int], heads: Optional[HeadMacs] = None) -> Dict[str, int]:
    """:func:`cost` of a ViT that has all tokens."""
    cells = grid[0] * grid[1]
    return cost(backbone, grid, cells + int(backbone.with_cls_token), dense_macs(backbone, grid), heads)


def add_up(passes: List[Dict[str, int]]) -> Dict[str, int]:
    """An image's cost from those of its passes."""
    return {key: sum(part[key] for part in passes) for key in passes[0]}


@torch.no_grad()
def inference_cost(model: nn.Module, heads: HeadMacs, data: dict) -> Dict[str, int]:
    """:func:`cost` of an image in the segmentor's own inference, whose windows add up; only the gate runs.

    Args:
        model: a segmentor with an MSViT or a dense ViT.
        heads: of the model.
        data: what the test pipeline made of the image.
    """
    backbone, passes = model.backbone, []

    def encode_decode(inputs, batch_img_metas):
        """In place of the segmentor's: counts a window (1, C, H, W)."""
        if isinstance(backbone, MSViT):
            passes.extend(pass_costs(backbone, backbone.tokenize(inputs)[1], heads))
        else:
            passes.append(dense_cost(backbone, image_grid(backbone, *inputs.shape[2:]), heads))
        return inputs.new_zeros(len(inputs), model.out_channels, *inputs.shape[2:])

    model.encode_decode = encode_decode
    try:
        batch = model.data_preprocessor(pseudo_collate([data]), training=False)
        model.inference(batch['inputs'], [sample.metainfo for sample in batch['data_samples']])
    finally:
        del model.encode_decode
    return add_up(passes)


def share_cost(backbone: MSViT, heads: HeadMacs, grid: Tuple[int, int], share: float) -> Dict[str, int]:
    """:func:`cost` of an image of which a share of the regions is coarse; at odd edges as if all had equal cells."""
    hc, wc = region_grid(grid, backbone.side)
    coarse = round(share * hc * wc)
    fine = round(grid[0] * grid[1] * (1 - coarse / (hc * wc)))
    tokens = coarse + fine + int(backbone.with_cls_token)
    return cost(backbone, grid, tokens, msvit_macs(backbone, grid, coarse, fine), heads)
