"""How other libraries name a plain ViT's tensors, and what those are called here.

Pure functions of tensors by name; :mod:`.checkpoint` reads the files and fits the tensors to a backbone.
"""

import re
from typing import Dict, List, Tuple

import torch
from torch import Tensor

# Averaged weights, which those who made a file evaluate, are preferred to those beside them.
AVERAGED = ('state_dict_ema', 'model_ema', 'ema', 'teacher')

# Layout -> keys that tell it, and what to call its tensors here.
LAYOUTS: Dict[str, Tuple[Tuple[str, str], List[Tuple[str, str]]]] = {
    'mmseg': (('patch_embed.projection.weight', 'layers.0.attn.attn.in_proj_weight'), []),
    'mmpretrain': (
        ('patch_embed.projection.weight', 'layers.0.attn.qkv.weight'),
        [
            (r'^pre_norm\.', 'ln_pre.'),
            (r'^(layers\.\d+\.)?norm(\d)\.', r'\1ln\2.'),
            (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
            (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
        ],
    ),
    'timm': (
        ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight'),
        [
            (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
            (r'^norm_pre\.', 'ln_pre.'),
            (r'^norm\.', 'ln1.'),
            (r'^blocks\.', 'layers.'),
            (r'^(layers\.\d+\.)norm(\d)\.', r'\1ln\2.'),
            (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
            (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
            (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
            (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
            (r'^(layers\.\d+)\.(ls1\.gamma|gamma_1)$', r'\1.attn.gamma1.weight'),
            (r'^(layers\.\d+)\.(ls2\.gamma|gamma_2)$', r'\1.ffn.gamma2.weight'),
        ],
    ),
    'clip': (
        ('conv1.weight', 'transformer.resblocks.0.attn.in_proj_weight'),
        [
            (r'^conv1\.', 'patch_embed.projection.'),
            (r'^class_embedding$', 'cls_token'),
            (r'^positional_embedding$', 'pos_embed'),
            (r'^ln_pre\.', 'ln_pre.'),
            (r'^ln_post\.', 'ln1.'),
            (r'^transformer\.resblocks\.', 'layers.'),
            (r'\.ln_(\d)\.', r'.ln\1.'),
            (r'\.attn\.', '.attn.attn.'),
            (r'\.mlp\.c_fc\.', '.ffn.layers.0.0.'),
            (r'\.mlp\.c_proj\.', '.ffn.layers.1.'),
            (r'\.ls_1\.gamma$', '.attn.gamma1.weight'),
            (r'\.ls_2\.gamma$', '.ffn.gamma2.weight'),
        ],
    ),
}


def rename(tensors: Dict[str, Tensor]) -> Tuple[str, Dict[str, Tensor], List[str]]:
    """Recognises the layout and gives the ViT's tensors their names here.

    Returns:
        The layout, the renamed tensors, and the names of those that are not of the ViT.

    Raises:
        ValueError: no known layout, or several ViTs of which none is an average of weights.
    """
    if 'Transformer/encoderblock_0/LayerNorm_0/scale' in tensors:
        return ('AugReg', *_rename_augreg(tensors))
    layout, prefix = _choose(tensors)
    renamed, others = {}, []
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            others.append(name)
            continue
        short = name[len(prefix) :]
        for pattern, replacement in LAYOUTS[layout][1]:
            short = re.sub(pattern, replacement, short)
        renamed[short] = tensor
    if layout == 'clip':
        renamed['cls_token'] = renamed['cls_token'].view(1, 1, -1)
        renamed['pos_embed'] = renamed['pos_embed'][None]
    return layout, renamed, others


def _choose(tensors: Dict[str, Tensor]) -> Tuple[str, str]:
    """The layout of the one ViT among the tensors, or of the averaged one, and the prefix of its names."""
    found = [
        (layout, name[: -len(block)])
        for layout, ((patch, block), _) in LAYOUTS.items()
        for name in tensors
        if name.endswith(block) and name[: -len(block)] + patch in tensors
    ]
    if not found:
        raise ValueError(
            f'checkpoint: wanted a ViT in the layout of {", ".join(LAYOUTS)} or AugReg, got {len(tensors)} tensors '
            f'such as {sorted(tensors)[:4]}'
        )
    averaged = [(layout, prefix) for layout, prefix in found if set(AVERAGED) & set(prefix.split('.'))]
    for candidates in (found, averaged):
        if len(candidates) == 1:
            return candidates[0]
    prefixes = sorted(prefix for _, prefix in found)
    raise ValueError(
        f'checkpoint: wanted one ViT, got {len(found)}, whose names begin with {prefixes}: '
        "choose one by init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)"
    )


def fold_layer_scale(tensors: Dict[str, Tensor]) -> int:
    """Multiplies each layer scale into the projection before it, in place, which leaves features as they are.

    Args:
        tensors: by their names here, where ``attn.gamma1.weight`` (C,) scales the rows of ``attn.attn.out_proj`` and
            ``ffn.gamma2.weight`` (C,) those of ``ffn.layers.1``.

    Returns:
        The number of layer scales folded.
    """
    folded = 0
    for name in list(tensors):
        found = re.fullmatch(r'(layers\.\d+\.)(attn\.gamma1|ffn\.gamma2)\.weight', name)
        if found is None:
            continue
        linear = found[1] + ('attn.attn.out_proj' if found[2] == 'attn.gamma1' else 'ffn.layers.1')
        if f'{linear}.weight' not in tensors:
            continue  # a block of another kind, which is refused by its other tensors
        gamma = tensors.pop(name)
        for kind in ('weight', 'bias'):
            if f'{linear}.{kind}' in tensors:
                projection = tensors[f'{linear}.{kind}']  # (C, D) or (C,)
                tensors[f'{linear}.{kind}'] = gamma.float().view(-1, *[1] * (projection.ndim - 1)) * projection
        folded += 1
    return folded


def _rename_augreg(tensors: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], List[str]]:
    """AugReg's arrays: kernels are (in, out), attention has its heads apart."""
    found, used = {}, set()

    def take(name):
        used.add(name)
        return tensors[name]

    found['patch_embed.projection.weight'] = take('embedding/kernel').permute(3, 2, 0, 1).contiguous()
    found['patch_embed.projection.bias'] = take('embedding/bias')
    found['cls_token'] = take('cls')
    found['pos_embed'] = take('Transformer/posembed_input/pos_embedding')
    for kind, ours in (('scale', 'weight'), ('bias', 'bias')):
        found[f'ln1.{ours}'] = take(f'Transformer/encoder_norm/{kind}')
    block = 0
    while f'Transformer/encoderblock_{block}/LayerNorm_0/scale' in tensors:
        theirs, ours = f'Transformer/encoderblock_{block}/', f'layers.{block}.'
        for number, norm in (('0', 'ln1'), ('2', 'ln2')):
            found[f'{ours}{norm}.weight'] = take(f'{theirs}LayerNorm_{number}/scale')
            found[f'{ours}{norm}.bias'] = take(f'{theirs}LayerNorm_{number}/bias')
        attention = f'{theirs}MultiHeadDotProductAttention_1/'
        qkv = ('query', 'key', 'value')
        kernels = [take(f'{attention}{name}/kernel').flatten(1).T for name in qkv]  # 3 x (C, C)
        found[f'{ours}attn.attn.in_proj_weight'] = torch.cat(kernels)
        found[f'{ours}attn.attn.in_proj_bias'] = torch.cat([take(f'{attention}{name}/bias').flatten() for name in qkv])
        found[f'{ours}attn.attn.out_proj.weight'] = take(f'{attention}out/kernel').flatten(0, 1).T.contiguous()
        found[f'{ours}attn.attn.out_proj.bias'] = take(f'{attention}out/bias')
        for dense, layer in (('Dense_0', '0.0'), ('Dense_1', '1')):
            found[f'{ours}ffn.layers.{layer}.weight'] = take(f'{theirs}MlpBlock_3/{dense}/kernel').T.contiguous()
            found[f'{ours}ffn.layers.{layer}.bias'] = take(f'{theirs}MlpBlock_3/{dense}/bias')
        block += 1
    return found, [name for name in tensors if name not in used]
