"""A backbone from weights alone, for whom has no config: its shape is read from the tensors."""

import logging
import math
import os
import re
from functools import partial
from operator import mul
from typing import Dict, Union

from mmengine.logging import print_log
from torch import Tensor

from .vit.beit import MSMAE, MSBEiT
from .vit.blocks import swiglu_width
from .vit.mixed_scale import MixedScale
from .vit.msvit import MSViT
from .weights.checkpoint import GATES, PATCH_WEIGHT, fit
from .weights.layouts import rename
from .weights.reading import read_checkpoint, tensors_below
from .weights.resampling import grids_of_regions, source_grid

# A tensor of a gate -> its class.
GATE_OF = {'gate.embed.weight': 'MLPGate', 'gate.patch.weight': 'ContextGate', 'gate.glance_in.weight': 'GlanceGate'}
# Up to this width, and in DINOv2-g, heads are 64 wide; of wider ViTs each has its own.
HEAD_DIMS, LARGEST, DINOV2_G = 64, 1024, 1536


def load_backbone(checkpoint: Union[str, os.PathLike, dict], prefix: str = '', **options) -> MixedScale:
    """A backbone with the weights of a plain ViT, DINOv2, DINOv3, BEiT or MAE, in evaluation mode.

        >>> import timm, torch
        >>> from mmseg_msvit import load_backbone, pass_costs, record_tokens
        >>> vit = timm.create_model('vit_tiny_patch16_224', depth=2, img_size=64)  # with pretrained=True for weights
        >>> images = torch.randn(1, 3, 64, 64)  # (B, 3, H, W), normalised as the weights want it

        >>> backbone = load_backbone(vit.state_dict())  # or a file, or an address
        >>> with torch.no_grad(), record_tokens(backbone) as seen:
        ...     features = backbone(images)[-1]  # (B, C, h, w)
        >>> cost = pass_costs(backbone, seen[0][0])[0]  # of the first image

        >>> features.shape, cost['tokens'], cost['dense_tokens'], f'{cost["total"] / cost["dense_total"]:.0%}'
        (torch.Size([1, 192, 4, 4]), 11, 17, '65%')

    Width, depth, MLP, patch size, grid of positions, registers, layer scale and the family are those of the weights,
    and so is a gate, if there is one. Without a gate the half of the regions that vary least is coarse
    (``VarianceGate``), without any training. Weights do not tell the following, which are options: a gate's threshold;
    scales that do not double; a converted model's ``input_scale``, and ``out_detail='none'``, which are in a config
    alone; the heads, taken to be 64 wide, as up to ViT-L and in DINOv2-g all are; the activation, taken to be GELU
    (OpenAI's CLIP wants ``act_cfg=dict(type='QuickGELU')``); the norms' eps, 1e-5 for CLIP and DINOv3, else 1e-6; how
    the library resamples positions, by antialiasing for ViTs with registers; and rotary positions, of which DINOv3's
    alone are known.

    Args:
        checkpoint: a file, an address or a state dict, in any layout that :mod:`.layouts` knows; or a whole segmentor
            with such a ViT.
        prefix: of the names of one among several ViTs.
        **options: of :class:`MSViT`, :class:`MSBEiT` or :class:`MSMAE`, in the place of what is read or taken, such as
            ``num_heads=12``, ``scales=(14, 28, 56)`` or ``gate=dict(type='FixedGate')`` for the dense ViT. To another
            ``patch_size`` the embedding is resampled, for other ``in_channels`` repeated.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it is neither a file nor a state dict.
        ValueError: it holds no plain ViT, or one that it alone does not tell enough of; the message names what to give.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    if not isinstance(checkpoint, dict):
        raise TypeError(
            f'checkpoint must be a file, an address or a state dict, got {type(checkpoint).__name__}; of a model give '
            'model.state_dict()'
        )
    tensors = tensors_below(checkpoint, prefix)
    layout, renamed, _ = rename(tensors)
    arguments = {**_of_all(renamed, options), **_of_family(layout, renamed, options), **options}
    backbone = family(renamed)(**arguments)
    backbone.init_weights()
    fitted, report = fit(
        backbone, tensors, resample_patch='patch_size' in options, repeat_channels='in_channels' in options
    )
    new = [name for name in report.initial if name.startswith(GATES)]
    if new and 'gate' not in options and arguments['gate']['type'] != 'VarianceGate':
        raise ValueError(
            f'scales: wanted as many levels as the checkpoint has gates for, got {backbone.scales}, for which it lacks '
            f'{", ".join(new[:4])}; give gate=... for other gates'
        )
    backbone.load_state_dict(fitted, strict=False)
    print_log(str(report), logger='current', level=logging.DEBUG)
    return backbone.eval()


def family(tensors: Dict[str, Tensor]) -> type:
    """The class of the backbone for a ViT's tensors by their names here."""
    if not any(name.endswith('relative_position_bias_table') for name in tensors):
        return MSViT
    return MSMAE if 'pos_embed' in tensors else MSBEiT


def _of_all(tensors: Dict[str, Tensor], given: dict) -> dict:
    """Arguments that all families have."""
    shape = tuple(tensors[PATCH_WEIGHT].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f'checkpoint: wanted an embedding of square patches (C, channels, p, p), got {shape}')
    dims, channels, patch, _ = shape
    patch = given.get('patch_size', patch)
    levels = _count(tensors, 'coarser_gates') + 1
    kind = next((kind for name, kind in GATE_OF.items() if name in tensors), 'VarianceGate')
    looks_through = dict(blocks=int(tensors['gate.looks_through'])) if kind == 'GlanceGate' else {}
    return dict(
        patch_size=patch,
        in_channels=channels,
        embed_dims=dims,
        num_layers=_count(tensors, 'layers'),
        num_heads=given['num_heads'] if 'num_heads' in given else _heads(tensors, dims),
        mlp_ratio=given['mlp_ratio'] if 'mlp_ratio' in given else _mlp_ratio(tensors, dims),
        norm_cfg=dict(type='LN', eps=1e-6),
        patch_norm='patch_embed.norm.weight' in tensors,
        final_norm='ln1.weight' in tensors,
        scales=tuple(patch * 2**level for level in range(levels + 1)),
        gate=dict(type=kind, **looks_through),
        coarse_embed='resize+detail' if 'coarse_detail.weight' in tensors else 'resize',
        out_detail='residual' if 'out_details.0.weight' in tensors else 'smooth',
    )


def _of_family(layout: str, tensors: Dict[str, Tensor], given: dict) -> dict:
    """The image size, and arguments that not all families have."""
    patch = given.get('patch_size', tensors[PATCH_WEIGHT].shape[-1])
    if 'pos_embed' in tensors:
        gate = tensors.get('gate.pos_embed')
        side = given['scales'][1] // patch if 'scales' in given else 2
        likely = () if gate is None else grids_of_regions(gate.shape[2:], side)
        _, grid = source_grid(tensors['pos_embed'].shape[1], likely=likely)
        if gate is None and any(name.startswith('gate.') for name in tensors) and 'img_size' not in given:
            size = 'x'.join(str(cells * patch) for cells in grid)
            print_log(f'img_size is taken as {size}: give it if the model had another', 'current', logging.WARNING)
    elif family(tensors) is MSBEiT:
        offsets = len(tensors['layers.0.attn.relative_position_bias_table']) - 3  # and three of cls
        grid = ((math.isqrt(offsets) + 1) // 2,) * 2
    else:
        grid = (16, 16)  # there is no table
    found = dict(img_size=tuple(cells * patch for cells in grid))
    if family(tensors) is not MSViT:
        return found
    registers = tensors['register_tokens'].shape[1] if 'register_tokens' in tensors else 0
    scaled = 'layers.0.gamma_1' in tensors
    gated = 'layers.0.ffn.w12.weight' in tensors
    rotary = 'pos_embed' not in tensors
    dinov3 = rotary and registers and 'cls_token' in tensors
    if 'rope' not in given and ((rotary and not dinov3) or (gated and not scaled)):
        have = 'positions neither as a table nor as DINOv3' if rotary else 'a SwiGLU without layer scale, as EVA-02'
        raise ValueError(
            f'checkpoint: wanted a ViT with a table of positions, or DINOv3, got {have}, whose positions may be of a '
            "kind that is not known here. If they are not, say so by rope=None or rope='dinov3'"
        )
    return dict(
        found,
        with_cls_token='cls_token' in tensors,
        pre_norm='ln_pre.weight' in tensors,
        layer_scale_init_value=1e-5 if scaled else 0,
        num_register_tokens=registers,
        ffn_type='swiglu' if gated else 'mlp',
        rope='dinov3' if rotary else None,
        interpolate_mode='bicubic-antialias' if registers else 'bicubic',
        norm_cfg=dict(type='LN', eps=1e-5 if rotary or layout == 'clip' else 1e-6),
    )


def _count(tensors: Dict[str, Tensor], name: str) -> int:
    """Modules of a list."""
    return len({found[1] for found in map(re.compile(rf'{name}\.(\d+)\.').match, tensors) if found})


def _heads(tensors: Dict[str, Tensor], dims: int) -> int:
    table = tensors.get('layers.0.attn.relative_position_bias_table')
    if table is not None:
        return table.shape[1]
    if dims % HEAD_DIMS or (dims > LARGEST and dims != DINOV2_G):
        raise ValueError(
            f'num_heads: the weights do not tell it, and ViTs of width {dims} have no common one: give num_heads=...'
        )
    return dims // HEAD_DIMS


def _mlp_ratio(tensors: Dict[str, Tensor], dims: int) -> int:
    gated, plain = (tensors.get(f'layers.0.ffn.{name}.weight') for name in ('w3', 'layers.1'))
    if gated is None and plain is None:
        return 4  # of blocks of another kind, which are refused by their names
    hidden = (plain if gated is None else gated).shape[1]
    width = partial(mul, dims) if gated is None else partial(swiglu_width, dims)
    for ratio in range(1, 17):
        if width(ratio) == hidden:
            return ratio
    raise ValueError(f'checkpoint: wanted a ViT whose MLP is a whole multiple of its width {dims}, got {hidden}')
