"""Multiply-accumulates of a segmentor, those of its backbone as a function of each image's tokens.

Counted are matrix products: linear layers, convolutions, and both products of the attention. Norms, activations,
softmax, resizing and the moving of tokens are not, as is usual.
"""

from copy import deepcopy
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from mmengine.dataset import pseudo_collate
from mmseg.models.backbones import BEiT, VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..gates.scores import VarianceGate
from ..tokens.selection import TokenSelector
from ..tokens.token_map import Grid, TokenMap, region_grid, shrunk_grid
from ..versions import unfused_attention
from ..vit.blocks import block_of
from ..vit.mixed_scale import MixedScale

# mmseg's, whose blocks can be counted.
PLAIN_VITS = (VisionTransformer, BEiT)
PARTS = ('gate', 'embedding', 'encoder', 'neck', 'head')


def prefix_length(backbone: nn.Module) -> int:
    """The cls token and registers of a plain ViT, mixed-scale or not."""
    if isinstance(backbone, MixedScale):
        return backbone.select.prefix
    return int(getattr(backbone, 'with_cls_token', True))  # mmseg's BEiT and MAE always have one


def encoder_macs(backbone: nn.Module, tokens: int) -> int:
    """MACs of a plain ViT's blocks over one image's tokens, the prefix among them.

    Raises:
        TypeError: its layers are of an unknown class.
    """
    layers = backbone.layers
    if not isinstance(backbone, MixedScale):
        layers = [block_of(layer) for layer in layers]
    return sum(layer.macs(tokens) for layer in layers)


def dense_macs(backbone: nn.Module, grid: Grid) -> Dict[str, int]:
    """MACs of the dense ViT of the same shape for one image of (h, w) cells, by the same parts."""
    cells = grid[0] * grid[1]
    return dict(
        gate=0,
        embedding=cells * backbone.patch_embed.projection.weight.numel(),
        encoder=encoder_macs(backbone, cells + prefix_length(backbone)),
    )


class _Watching(TorchFunctionMode):
    """Changes nothing; but while one watches, ``nn.MultiheadAttention`` is no single operator, unknown to counters."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def operator_macs(function: Callable, *args) -> int:
    """MACs of the operators that a call executes, attention in its plain form, since fused kernels would count zero."""
    with torch.no_grad(), unfused_attention(), _Watching(), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() // 2


class HeadMacs:
    """MACs of a segmentor's neck and decode head, or of a cascade's heads.

    A head on tokens says by its ``macs`` what so many cost. All else sees the dense grid and costs the same for any
    tokens: it is counted on copies without data, once for each grid.

    Args:
        model: a segmentor, :class:`mmseg.models.EncoderDecoder`.

    Raises:
        ValueError: the model has no decode head.
    """

    def __init__(self, model: nn.Module):
        head = getattr(model, 'decode_head', None)
        if not isinstance(head, nn.Module):
            raise ValueError(f'the model must be a segmentor with a decode_head, got {type(model).__name__}')
        self.backbone = model.backbone
        self.neck = deepcopy(model.neck).to('meta').eval() if model.with_neck else None
        heads = head if isinstance(head, nn.ModuleList) else [head]
        self.heads = [head if hasattr(head, 'macs') else deepcopy(head).to('meta').eval() for head in heads]
        self.known: Dict[Grid, Dict[str, int]] = {}

    def __call__(self, grid: Grid, tokens: Optional[int] = None) -> Dict[str, int]:
        """``neck`` and ``head`` for one image of (h, w) cells and so many tokens, cls among them; None for all fine."""
        if grid not in self.known:
            self.known[grid] = self._on_grid(grid)
        found = dict(self.known[grid])
        covering = grid[0] * grid[1] if tokens is None else tokens - prefix_length(self.backbone)
        found['head'] += sum(head.macs(covering) for head in self.heads if hasattr(head, 'macs'))
        return found

    @torch.no_grad()
    def _on_grid(self, grid: Grid) -> Dict[str, int]:
        """What does not depend on the tokens."""
        dims = self.backbone.patch_embed.embed_dims
        x = torch.empty(1, dims, *grid, device='meta')
        if getattr(self.backbone, 'output_cls_token', False):
            x = [x, torch.empty(1, dims, device='meta')]
        features = (x,) * (len(self.backbone.out_indices) + int(getattr(self.backbone, 'out_origin', False)))
        found = dict(neck=0, head=0)
        if self.neck is not None:
            found['neck'] = operator_macs(self.neck, features)
            features = self.neck(features)
        before = ()  # in a cascade each head but the first sees the logits of the one before it
        for head in self.heads:
            if hasattr(head, 'macs'):
                before = (torch.empty(1, head.out_channels, *grid, device='meta'),)
            else:
                found['head'] += operator_macs(head, features, *before)
                before = (head(features, *before),) if len(self.heads) > 1 else ()
        return found


def cost(
    backbone: nn.Module,
    grid: Grid,
    tokens: int,
    macs: Dict[str, int],
    heads: Optional[HeadMacs] = None,
    dense_grid: Optional[Grid] = None,
) -> Dict[str, int]:
    """What one pass over one image costs, and what it would cost the dense ViT.

    Args:
        backbone: the model.
        grid: (h, w) cells of the image.
        tokens: its tokens, cls included.
        macs: those of the backbone, by part.
        heads: counts neck and head; without it they are left out.
        dense_grid: the cells of the image for the dense ViT, where they are others.

    Returns:
        ``tokens``, MACs of each part and in ``total``; and the dense ViT's, each name with ``dense_`` before it.
    """
    whole, found = dense_grid or grid, {}
    for kind, cells, count, parts in (
        ('', grid, tokens, macs),
        ('dense_', whole, whole[0] * whole[1] + prefix_length(backbone), dense_macs(backbone, whole)),
    ):
        parts = {**parts, **(heads(cells, count) if heads else {})}
        found.update({f'{kind}{key}': value for key, value in parts.items()})
        found.update({f'{kind}tokens': count, f'{kind}total': sum(parts.values())})
    return found


def pass_costs(backbone: MixedScale, tokens: TokenMap, heads: Optional[HeadMacs] = None) -> List[Dict[str, int]]:
    """What each image of a batch costs, as its tokens are at test time, and what it would cost the dense ViT.

    Args:
        backbone: which made the tokens.
        tokens: of the batch.
        heads: counts neck and head; without it they are left out.

    Returns:
        For each image a dict of ``tokens`` (cls token and registers among them), multiply-accumulates of each part
        (``gate``, ``embedding``, ``encoder``) and in ``total``; and of the dense ViT, with ``dense_`` before each name.
    """
    counts = tokens.active_counts().tolist()
    macs = backbone.macs(tokens)
    return [cost(backbone, tokens.grid, count, parts, heads, tokens.dense_grid) for count, parts in zip(counts, macs)]


def head_costs(head: nn.Module, tokens: TokenMap) -> List[Dict[str, int]]:
    """MACs of a head on tokens for each image of a batch, and of all fine ones: ``head`` and ``dense_head``."""
    counts = (tokens.active_counts() - tokens.prefix).tolist()
    dense = head.macs(tokens.dense_length - tokens.prefix)
    return [dict(head=head.macs(count), dense_head=dense) for count in counts]


def dense_cost(backbone: nn.Module, grid: Grid, heads: Optional[HeadMacs] = None) -> Dict[str, int]:
    """:func:`cost` of a ViT that has all tokens."""
    cells = grid[0] * grid[1]
    return cost(backbone, grid, cells + prefix_length(backbone), dense_macs(backbone, grid), heads)


def add_up(costs: Sequence[Dict[str, int]]) -> Dict[str, int]:
    """The cost of all together: of an image's passes, or of a data set's images."""
    return {key: sum(cost[key] for cost in costs) for key in costs[0]}


@torch.no_grad()
def of_windows(model: nn.Module, data: dict, function: Callable[[Tensor], Any]) -> list:
    """What a function says of each window (1, C, H, W) of an image, as the segmentor's own inference cuts them.

    Args:
        model: a segmentor.
        data: what the test pipeline made of the image.
        function: of what the backbone would see.
    """
    found = []

    def encode_decode(inputs, batch_img_metas):
        found.append(function(inputs))
        return inputs.new_zeros(len(inputs), model.out_channels, *inputs.shape[2:])

    model.encode_decode = encode_decode
    try:
        batch = model.data_preprocessor(pseudo_collate([data]), training=False)
        model.inference(batch['inputs'], [sample.metainfo for sample in batch['data_samples']])
    finally:
        del model.encode_decode
    return found


def inference_cost(model: nn.Module, heads: HeadMacs, data: dict) -> Dict[str, int]:
    """:func:`cost` of an image in the segmentor's own inference, whose windows add up; only the gate runs.

    Args:
        model: a segmentor with an MSViT or a dense ViT.
        heads: of the model.
        data: what the test pipeline made of the image.
    """
    backbone = model.backbone

    def of_window(inputs: Tensor) -> Dict[str, int]:
        if isinstance(backbone, MixedScale):
            return pass_costs(backbone, backbone.tokenize(inputs)[1], heads)[0]
        return dense_cost(backbone, region_grid(inputs.shape[2:], backbone.patch_size), heads)

    return add_up(of_windows(model, data, of_window))


def share_cost(backbone: MixedScale, heads: HeadMacs, grid: Grid, share: float) -> Dict[str, int]:
    """:func:`cost` of an image of which a share of the regions is coarse, at each level of those that are left.

    Args:
        backbone: the model.
        heads: of the model.
        grid: (h, w), the cells of the image as the dense ViT has it.
        share: of regions that are coarse.
    """
    gates, dense_grid, grid = [], grid, shrunk_grid(grid, backbone.input_scale)
    for side in backbone.sides[1:]:  # in a blank image all regions vary alike: these gates then choose by place
        image = torch.zeros(1, 1, *(regions * side for regions in region_grid(grid, side)))
        gates.append(partial(VarianceGate(1, side, coarse_ratio=share), image))
    tokens, _ = TokenSelector(backbone.sides, prefix=backbone.select.prefix).eval()(gates, grid, dense_grid)
    return pass_costs(backbone, tokens, heads)[0]
