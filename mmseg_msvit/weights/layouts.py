"""How other libraries name a plain ViT's tensors, and what those are called here.

Pure functions of tensors by name; :mod:`.reading` reads the files, :mod:`.checkpoint` fits the tensors to a backbone.
"""

import re
from typing import Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

# Where files keep averaged weights. Their makers evaluate these, so they are preferred to those beside them.
AVERAGED = ('state_dict_ema', 'model_ema', 'ema', 'teacher')

Patterns = Tuple[Tuple[str, str], ...]


class Layout(NamedTuple):
    """A way to name tensors: the names of two tells it, and patterns give all of them their names here.

    A tensor that here is one and there several has its pieces' places in brackets, as ``w12.weight[0]``.
    """

    name: str
    patch: str
    block: str
    patterns: Patterns


MMPRETRAIN: Patterns = (
    (r'^pre_norm\.', 'ln_pre.'),
    (r'^(layers\.\d+\.)?norm(\d)\.', r'\1ln\2.'),
    (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
    (r'\.attn\.q_bias$', '.attn.attn.in_proj_bias[0]'),
    (r'\.attn\.v_bias$', '.attn.attn.in_proj_bias[2]'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.(attn|ffn)\.gamma(\d)\.weight$', r'.gamma_\2'),
)
TIMM: Patterns = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^(reg_token|storage_tokens)$', 'register_tokens'),
    (r'^norm_pre\.', 'ln_pre.'),
    (r'^norm\.', 'ln1.'),
    (r'^blocks\.', 'layers.'),
    (r'^(layers\.\d+\.)norm(\d)\.', r'\1ln\2.'),
    (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
    (r'\.attn\.q_bias$', '.attn.attn.in_proj_bias[0]'),
    (r'\.attn\.v_bias$', '.attn.attn.in_proj_bias[2]'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'\.mlp\.(w12|w3)\.', r'.ffn.\1.'),
    (r'\.mlp\.(w1|fc1_g)\.(\w+)$', r'.ffn.w12.\2[0]'),
    (r'\.mlp\.(w2|fc1_x)\.(\w+)$', r'.ffn.w12.\2[1]'),
    (r'\.ls(\d)\.gamma$', r'.gamma_\1'),
)
CLIP: Patterns = (
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
    (r'\.ls_(\d)\.gamma$', r'.gamma_\1'),
)
# Of ViT, DINOv2, DINOv3 and BEiT, on disk and, from transformers 5 on, in memory.
TRANSFORMERS: Patterns = (
    (r'^embeddings\.patch_embeddings\.(projection\.)?', 'patch_embed.projection.'),
    (r'^embeddings\.position_embeddings$', 'pos_embed'),
    (r'^embeddings\.', ''),
    (r'^(layernorm|norm)\.', 'ln1.'),
    (r'^(encoder\.|model\.)?layers?\.', 'layers.'),
    (r'\.(norm1|layernorm_before)\.', '.ln1.'),
    (r'\.(norm2|layernorm_after)\.', '.ln2.'),
    (r'\.attention\.(attention\.query|q_proj)\.(\w+)$', r'.attn.attn.in_proj_\2[0]'),
    (r'\.attention\.(attention\.key|k_proj)\.(\w+)$', r'.attn.attn.in_proj_\2[1]'),
    (r'\.attention\.(attention\.value|v_proj)\.(\w+)$', r'.attn.attn.in_proj_\2[2]'),
    (r'\.attention\.(output\.dense|o_proj)\.', '.attn.attn.out_proj.'),
    (r'\.(attention\.attention\.)?relative_position_bias\.', '.attn.'),
    (r'\.mlp\.gate_proj\.(\w+)$', r'.ffn.w12.\1[0]'),
    (r'\.(mlp\.fc1|mlp\.up_proj|intermediate\.dense)\.', '.ffn.layers.0.0.'),
    (r'\.(mlp\.fc2|mlp\.down_proj|output\.dense)\.', '.ffn.layers.1.'),
    (r'\.mlp\.weights_in\.', '.ffn.w12.'),
    (r'\.mlp\.weights_out\.', '.ffn.w3.'),
    (r'\.(layer_scale(\d)\.lambda1|lambda_(\d))$', r'.gamma_\2\3'),
)

_HF_PATCH = 'embeddings.patch_embeddings.projection.weight'
LAYOUTS = (
    Layout('mmseg', 'patch_embed.projection.weight', 'layers.0.attn.attn.in_proj_weight', ()),
    Layout('mmpretrain', 'patch_embed.projection.weight', 'layers.0.attn.qkv.weight', MMPRETRAIN),
    Layout('timm', 'patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', TIMM),
    # DINOv2 while it trains: blocks in chunks, each counted through.
    Layout(
        'timm', 'patch_embed.proj.weight', 'blocks.0.0.attn.qkv.weight', ((r'^blocks\.\d+\.(\d)', r'blocks.\1'), *TIMM)
    ),
    Layout('clip', 'conv1.weight', 'transformer.resblocks.0.attn.in_proj_weight', CLIP),
    Layout('transformers', _HF_PATCH, 'encoder.layer.0.attention.attention.query.weight', TRANSFORMERS),
    Layout('transformers', _HF_PATCH, 'encoder.layer.0.attention.q_proj.weight', TRANSFORMERS),
    Layout('transformers', _HF_PATCH, 'layers.0.attention.q_proj.weight', TRANSFORMERS),
    Layout('transformers', 'embeddings.patch_embeddings.weight', 'layer.0.attention.q_proj.weight', TRANSFORMERS),
    Layout('transformers', 'embeddings.patch_embeddings.weight', 'model.layer.0.attention.q_proj.weight', TRANSFORMERS),
)


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
        for pattern, replacement in layout.patterns:
            short = re.sub(pattern, replacement, short)
        renamed[short] = tensor
    if layout.name == 'clip':
        renamed['cls_token'] = renamed['cls_token'].view(1, 1, -1)
        renamed['pos_embed'] = renamed['pos_embed'][None]
    _name_gated(renamed)
    _mask_biases(renamed)
    _share_relative(renamed)
    if 'register_tokens' in renamed and not renamed['register_tokens'].numel():
        del renamed['register_tokens']  # transformers writes them for a model without any
    return layout.name, _join(renamed), others


def _name_gated(tensors: Dict[str, Tensor]) -> None:
    """Tells a SwiGLU from an MLP where both have the same names, in place.

    It is one if there is a gate beside the first layer, or if the first layer has two outputs for each input of the
    second.
    """
    for name in [name for name in tensors if re.fullmatch(r'layers\.\d+\.ffn\.layers\.1\.weight', name)]:
        ffn = name[: -len('layers.1.weight')]
        first = tensors.get(f'{ffn}layers.0.0.weight')
        apart = f'{ffn}w12.weight[0]' in tensors
        packed = first is not None and first.ndim == 2 and first.shape[0] == 2 * tensors[name].shape[-1]
        if not apart and not packed:
            continue
        for kind in ('weight', 'bias'):
            for old, new in (('layers.0.0', f'w12.{kind}[1]' if apart else f'w12.{kind}'), ('layers.1', f'w3.{kind}')):
                if f'{ffn}{old}.{kind}' in tensors:
                    tensors[f'{ffn}{new}'] = tensors.pop(f'{ffn}{old}.{kind}')


def _mask_biases(tensors: Dict[str, Tensor]) -> None:
    """DINOv3 multiplies the bias of q, k and v by a mask: here, in place, once and for all."""
    for name in [name for name in tensors if name.endswith('in_proj_bias_mask')]:
        mask, name = tensors.pop(name), name[: -len('_mask')]
        tensors[name] = torch.where(mask != 0, tensors[name], 0)


def _share_relative(tensors: Dict[str, Tensor]) -> None:
    """Gives each block the table of relative positions that all of a BEiT's blocks may share, in place."""
    shared = [n for n in tensors if n.endswith('relative_position_bias_table') and not n.startswith('layers.')]
    for name in shared:
        table = tensors.pop(name)
        for block in {found[0] for found in map(re.compile(r'layers\.\d+\.').match, tensors) if found}:
            tensors[f'{block}attn.relative_position_bias_table'] = table


def _join(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Joins the pieces of tensors. The bias of the keys may be missing, which then is zero."""
    joined, pieces = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r'(.+)\[(\d)\]', name)
        if found is None:
            joined[name] = tensor
        else:
            pieces.setdefault(found[1], {})[int(found[2])] = tensor
    for name, parts in pieces.items():
        if name.endswith('in_proj_bias') and 1 not in parts:
            parts[1] = torch.zeros_like(parts[0])
        joined[name] = torch.cat([parts[i] for i in sorted(parts)])
    return joined


def vits_among(tensors: Dict[str, Tensor]) -> List[Tuple[Layout, str]]:
    """The layout and the prefix of the names of each ViT among the tensors."""
    return [
        (layout, name[: -len(layout.block)])
        for layout in LAYOUTS
        for name in tensors
        if name.endswith(layout.block) and name[: -len(layout.block)] + layout.patch in tensors
    ]


def _choose(tensors: Dict[str, Tensor]) -> Tuple[Layout, str]:
    """The layout of the one ViT among the tensors, or of the averaged one, and the prefix of its names."""
    found = vits_among(tensors)
    if not found:
        names = ', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))
        lora = '. LoRA: merge it first, by tools/merge_lora.py' if any('.lora_' in name for name in tensors) else ''
        raise ValueError(
            f'checkpoint: wanted a ViT in the layout of {names} or AugReg, got {len(tensors)} tensors '
            f'such as {sorted(tensors)[:4]}{lora}'
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
        tensors: by their names here, where ``gamma_1`` (C,) scales the rows of ``attn.attn.out_proj`` and ``gamma_2``
            (C,) those of the FFN's last layer.

    Returns:
        The number of layer scales folded.
    """
    folded = 0
    for name in list(tensors):
        found = re.fullmatch(r'(layers\.\d+\.)gamma_([12])', name)
        if found is None:
            continue
        last = ('attn.attn.out_proj',) if found[2] == '1' else ('ffn.layers.1', 'ffn.w3')
        linear = next((found[1] + part for part in last if f'{found[1]}{part}.weight' in tensors), None)
        if linear is None:
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
    found, others = {}, dict(tensors)
    take = others.pop
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
    return found, list(others)
