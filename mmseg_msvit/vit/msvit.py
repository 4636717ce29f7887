"""MSViT: mmseg's vision transformer, and the plain ViTs of its shape beyond mmseg, over tokens of several scales."""

from typing import Optional, Union

import torch
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..tokens.positions import rotary
from ..tokens.token_map import TokenMap
from .blocks import Block, Places, block_of
from .mixed_scale import MixedScale

FFN_TYPES = ('mlp', 'swiglu')
ROPES = (None, 'dinov3')


@MODELS.register_module()
class MSViT(MixedScale, VisionTransformer):
    """Vision transformer with dynamic mixed-scale tokens (Havtorn et al. 2023, arXiv:2307.02321).

    Takes every argument of mmseg's :class:`VisionTransformer`, with its defaults except ``patch_bias=True``, and those
    of :class:`MixedScale`, and returns what mmseg's returns: a tuple with (B, embed_dims, h, w) for each of
    ``out_indices``, h = ceil(H / patch_size). Its state dict has mmseg's keys, and those of what is added.

    Args:
        patch_bias: whether the patch embedding has a bias, as those of timm, DeiT and AugReg have.
        qkv_bias: as mmseg's; ``'qv'`` for one without the keys' part, as DINOv3 has.
        layer_scale_init_value: where positive, each branch is scaled by a learned vector, ``gamma_1`` and ``gamma_2``,
            and stochastic depth is on both, as in DINOv2.
        ffn_type: ``'mlp'``, or ``'swiglu'`` as in DINOv2-g, whose hidden width is 2/3 of ``mlp_ratio * embed_dims``.
        rope: ``'dinov3'`` for its rotary positions in the place of the table.
        norm_outputs: whether the final norm is over each of ``out_indices``, and not over the last block's alone, as in
            DINOv2's ``get_intermediate_layers`` and transformers' ``Dinov2Backbone``.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        *args,
        patch_bias: bool = True,
        qkv_bias: Union[bool, str] = True,
        layer_scale_init_value: float = 0,
        ffn_type: str = 'mlp',
        rope: Optional[str] = None,
        norm_outputs: bool = False,
        **kwargs,
    ):
        if ffn_type not in FFN_TYPES:
            raise ValueError(f'ffn_type must be one of {FFN_TYPES}, got {ffn_type!r}')
        if rope not in ROPES:
            raise ValueError(f'rope must be one of {ROPES}, got {rope!r}')
        if qkv_bias not in (True, False, 'qv'):
            raise ValueError(f"qkv_bias must be True, False or 'qv', got {qkv_bias!r}")
        if kwargs.get('patch_pad', args[2] if len(args) > 2 else 'corner') != 'corner':
            raise ValueError("patch_pad must be 'corner': the grid of regions begins at the image's corner")
        self._of_block = dict(
            layer_scale_init_value=layer_scale_init_value,
            swiglu_ratio=kwargs.get('mlp_ratio', 4) if ffn_type == 'swiglu' else None,
            key_bias=qkv_bias != 'qv',
        )
        self.rope, self.norm_outputs = rope, norm_outputs
        super().__init__(*args, patch_bias=patch_bias, qkv_bias=bool(qkv_bias), **kwargs)
        if norm_outputs and not self.final_norm:
            raise ValueError('norm_outputs=True wants final_norm=True: it is that norm')
        if rope == 'dinov3':
            # It is no parameter and in no state dict: there for mmseg's initialisation only, and added to nothing.
            del self.pos_embed
            self.register_buffer('pos_embed', torch.zeros(1, 1, self.embed_dims), persistent=False)

    def block(self, layer: nn.Module) -> Block:
        return block_of(layer, **self._of_block)

    def position(self, tokens: TokenMap) -> Optional[Tensor]:
        return None if self.rope == 'dinov3' else super().position(tokens)

    def places(self, tokens: TokenMap) -> Places:
        if self.rope is None:
            return Places()
        return Places(rotary=rotary(tokens, self.embed_dims // self.layers[0].attn.num_heads))
