"""What an MSViT is compared with: the dense ViT with the same blocks, and gates that are told what to answer."""

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn

from .backbone import MSViT
from .gates import CERTAIN


def first_values(config: Config) -> nn.Module:
    """A config's segmentor with random weights, no pretrained ones."""
    config.model.pretrained = None
    config.model.backbone.pop('init_cfg', None)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def force_gate(backbone: MSViT, coarse_ratio: float) -> None:
    """Makes a gate answer coarse for a random share of the regions, at its own cost and with a gradient.

    Args:
        backbone: the model.
        coarse_ratio: the probability of coarse of each region; 0 is all fine, 1 all coarse.
    """

    def answer(module, args, logits):
        coin = torch.rand(logits.shape, device=logits.device) < coarse_ratio
        return torch.where(coin, CERTAIN, -CERTAIN) + (logits - logits.detach())

    backbone.gate.register_forward_hook(answer)


def dense_forward(backbone: MSViT, images: Tensor) -> tuple:
    """The dense ViT with MSViT's own blocks, in its fastest form: convolution, whole grid, fused attention.

    Args:
        backbone: the model, with a cls token.
        images: (B, C, H, W).

    Returns:
        What the backbone returns: (B, embed_dims, h, w) for each output.
    """
    x, (h, w) = backbone.patch_embed(images)  # (B, h * w, C)
    x = torch.cat((backbone.cls_token.expand(len(x), -1, -1), x), 1)  # (B, 1 + h * w, C)
    position = backbone.pos_embed
    if (h, w) != backbone.table:
        position = backbone.resize_pos_embed(position, (h, w), backbone.table, backbone.interpolate_mode)
    x = x + position
    outputs = []
    for i, layer in enumerate(backbone.layers):
        attention = layer.attn.attn
        qkv = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, n, d)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(out)
        x = x + layer.ffn.dropout_layer(layer.ffn.layers(layer.norm2(x)))
        if i == len(backbone.layers) - 1 and backbone.final_norm:
            x = backbone.norm1(x)
        if i in backbone.out_indices:
            outputs.append(x[:, 1:].mT.unflatten(2, (h, w)).contiguous())  # (B, C, h, w)
    return tuple(outputs)
