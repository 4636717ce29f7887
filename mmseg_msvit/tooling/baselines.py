"""What an MSViT is compared with: the dense ViT with the same blocks, and gates that are told what to answer."""

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..gates.gate import CERTAIN
from ..tokens.candidates import uniform_tokens
from ..tokens.embedding import pad_to_regions
from ..tokens.token_map import Grid, PackedTokens, TokenMap
from ..vit.mixed_scale import MixedScale


def first_values(config: Config) -> nn.Module:
    """A config's segmentor with random weights, no pretrained ones."""
    config.model.pretrained = None
    config.model.backbone.pop('init_cfg', None)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def force_gate(backbone: MixedScale, coarse_ratio: float) -> None:
    """Makes gates answer coarse for a random share of the regions, at their own cost and with a gradient.

    Args:
        backbone: the model.
        coarse_ratio: the probability of coarse of each region; 0 is all fine, 1 all coarse.
    """

    def answer(module, args, logits):
        coin = torch.rand(logits.shape, device=logits.device) < coarse_ratio
        return torch.where(coin, CERTAIN, -CERTAIN) + (logits - logits.detach())

    backbone.select.token_budget = None
    for gate in backbone.gates:
        gate.register_forward_hook(answer)


def all_fine(backbone: MixedScale, images: int, grid: Grid, device: torch.device) -> TokenMap:
    """The map of so many images of (h, w) cells whose tokens are all fine."""
    return uniform_tokens(backbone.sides, 0, backbone.select.prefix, images, grid, device)


def dense_forward(backbone: MixedScale, images: Tensor) -> tuple:
    """The dense ViT with the same blocks, in its fastest form: a convolution, the whole grid, fused attention.

    Args:
        backbone: the model.
        images: (B, C, H, W).

    Returns:
        (B, embed_dims, h, w), or :class:`.PackedTokens`, for each output: what the backbone returns, without cls.
    """
    images, (h, w) = pad_to_regions(images, backbone.patch_size, 1)
    embed = backbone.patch_embed
    tokens = all_fine(backbone, len(images), (h, w), images.device)
    x = F.conv2d(images, embed.projection.weight, embed.projection.bias, embed.projection.stride)
    x = x.flatten(2).mT  # (B, h * w, C)
    x = x if embed.norm is None else embed.norm(x)
    position = backbone.position(tokens)
    if position is not None:
        x = x + position[-1 - h * w : -1]
    prefix = backbone.prefix_tokens(0.0 if position is None else position[-1:])
    x = torch.cat((prefix.expand(len(x), -1, -1), x), 1).flatten(0, 1)  # (N, C)
    x = backbone.drop_after_pos(x)
    x = backbone.pre_ln(x) if backbone.pre_norm else x

    def output(number: int, x: Tensor, tokens: TokenMap):
        if backbone.out_types[number] == 'tokens':
            return PackedTokens(x, tokens)
        return x.unflatten(0, (len(images), -1))[:, tokens.prefix :].mT.unflatten(2, (h, w)).contiguous()

    x = [x]
    return tuple(backbone.encode(x, tokens, output))
