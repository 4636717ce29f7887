"""Weights of any plain ViT into MSViT: the keys tell the layout, positions are resampled, all is reported.

Known are mmseg and mmpretrain (a backbone alone or a whole model), timm and what shares its names (DeiT, DINO, MAE, the
official Segmenter), CLIP's image tower, and AugReg's ``.npz``. Nothing in a file is executed while it is read.
"""

import math
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.runner import CheckpointLoader
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn

# mmseg's ViT and CLIP's have none, which is a bias of zero.
PATCH_BIAS = 'patch_embed.projection.bias'
# The share of the backbone's own tensors that a checkpoint must have.
ENOUGH = 0.9
# What mmengine puts beside the weights of a training checkpoint. Read as empty shells: the weights need none of it.
SHELLED = re.compile(r'mmengine\.logging\.history_buffer\.HistoryBuffer|numpy\..*|builtins\.getattr|collections\..*')
# Where checkpoints keep their weights, in the order of preference.
WRAPPERS = ('state_dict', 'model', 'teacher', 'model_state_dict')

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
        ],
    ),
}


@dataclass
class Report:
    """What became of a checkpoint's tensors; ``str`` of it is the table for the log.

    Attributes:
        layout: where the names come from.
        matched: names taken as they are.
        resized: name -> how it was changed.
        initial: names of the model that the checkpoint does not have: they keep their first values.
        unused: names of the checkpoint that the model does not have, or has in another shape.
    """

    layout: str
    matched: List[str] = field(default_factory=list)
    resized: Dict[str, str] = field(default_factory=dict)
    initial: List[str] = field(default_factory=list)
    unused: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        resized = [f'{name} {how}' for name, how in self.resized.items()]
        rows = [('matched', self.matched), ('resized', resized), ('left at initialisation', self.initial)]
        rows.append(('not used', self.unused))
        lines = [f'weights in the layout of {self.layout}']
        for title, names in rows:
            # Everything matched is no news: its count says it. The rest is named by groups.
            shown = '' if title == 'matched' else ', '.join(names if title == 'resized' else _grouped(names))
            lines.append(f'  {title:<22} {len(names):>4}  {shown}'.rstrip())
        return '\n'.join(lines)


def _grouped(names: List[str]) -> List[str]:
    """Counts names below one parent, so that a head's tensors take one word."""
    groups: Dict[str, int] = {}
    for name in names:
        parent = '.'.join(name.split('.')[:2]) if name.count('.') > 1 else name
        groups[parent] = groups.get(parent, 0) + 1
    return [parent if count == 1 else f'{parent}.* ({count})' for parent, count in groups.items()]


def read_checkpoint(path: str) -> dict:
    """Reads a file or address without executing anything in it.

    Args:
        path: ``.safetensors``, ``.npz``, or a torch checkpoint; local, ``http(s)://``, or one of mmengine's schemes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or wants more than tensors.
    """
    if path.startswith(('http://', 'https://')):
        file = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(path).path).name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(path, str(file))  # which moves a whole file there, or none
        return read_checkpoint(str(file))
    if '://' in path:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'checkpoint: wanted a file, got {path}, which is not there')
    try:
        if file.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(file)
        if file.suffix == '.npz':
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return _read_torch(file)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        if isinstance(error, _WantsMore):
            raise
        raise ValueError(f'checkpoint: wanted a whole checkpoint, got {path}, which cannot be read: {error}') from error


class _WantsMore(ValueError):
    """A pickle that would run code."""


class _Shell:
    """Stands for an object that is not needed."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _read_torch(file: Path) -> dict:
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        more = [name for name in wanted if not SHELLED.fullmatch(name)]
        if more or not wanted:
            raise _WantsMore(
                f'checkpoint: wanted tensors, got {file}, whose pickle asks for {", ".join(more) or "unknown objects"} '
                'and could run code. If you trust it, read it by torch.load(..., weights_only=False) and save its '
                'state dict alone'
            ) from None
        with torch.serialization.safe_globals([(_Shell, name) for name in wanted]):
            return torch.load(file, map_location='cpu', weights_only=True)


def unwrap(checkpoint: dict) -> Dict[str, Tensor]:
    """The tensors of a checkpoint, out of whatever they are wrapped in."""
    for name in WRAPPERS:
        if isinstance(checkpoint.get(name), dict):
            return unwrap(checkpoint[name])
    return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def rename(tensors: Dict[str, Tensor]) -> Tuple[str, Dict[str, Tensor], List[str]]:
    """Recognises the layout and gives the ViT's tensors their names here.

    Returns:
        The layout, the renamed tensors, and the names of those that are not of the ViT.

    Raises:
        ValueError: no known layout.
    """
    if 'Transformer/encoderblock_0/LayerNorm_0/scale' in tensors:
        return ('AugReg', *_rename_augreg(tensors))
    for layout, (anchors, rules) in LAYOUTS.items():
        prefixes = [name[: -len(anchors[1])] for name in tensors if name.endswith(anchors[1])]
        prefixes = [prefix for prefix in prefixes if prefix + anchors[0] in tensors]
        if not prefixes:
            continue
        prefix = prefixes[0]
        renamed, others = {}, []
        for name, tensor in tensors.items():
            if not name.startswith(prefix):
                others.append(name)
                continue
            short = name[len(prefix) :]
            for pattern, replacement in rules:
                short = re.sub(pattern, replacement, short)
            renamed[short] = tensor
        if layout == 'clip':
            renamed['cls_token'] = renamed['cls_token'].view(1, 1, -1)
            renamed['pos_embed'] = renamed['pos_embed'][None]
        return layout, renamed, others
    raise ValueError(
        f'checkpoint: wanted a ViT in the layout of {", ".join(LAYOUTS)} or AugReg, got {len(tensors)} tensors '
        f'such as {sorted(tensors)[:4]}'
    )


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


def resample_positions(source: Tensor, table: Tuple[int, int], mode: str) -> Tuple[Tensor, Optional[str]]:
    """A source's position table on the model's grid.

    Args:
        source: (1, extra + cells, C), where extra are the positions of cls and distillation tokens, 0 to 2 of them.
        table: (gh, gw) of the model.
        mode: interpolation mode.

    Returns:
        (1, 1 + gh * gw, C), and what was done, None for nothing. Without a cls position in the source it is zero: the
        source adds none to its cls token.

    Raises:
        ValueError: the source's grid is neither the model's nor a square.
    """
    count = source.shape[1]
    if count == 1 + table[0] * table[1]:
        return source, None
    if count == table[0] * table[1]:
        return torch.cat((torch.zeros_like(source[:, :1]), source), 1), 'without cls'
    for extra in (1, 0, 2):
        side = math.isqrt(count - extra)
        if side * side == count - extra:
            break
    else:
        raise ValueError(
            f'checkpoint: wanted pos_embed of a square grid or of {table}, with at most 2 more tokens, got {count}'
        )
    cls = source[:, :1] if extra else torch.zeros_like(source[:, :1])
    cells = torch.cat((cls, source[:, extra:]), 1)
    how = f'{side}x{side} -> {table[0]}x{table[1]}' + ('' if extra == 1 else f', {extra} extra positions')
    return VisionTransformer.resize_pos_embed(cells, table, (side, side), mode), how


def fit(backbone: nn.Module, tensors: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Report]:
    """A state dict for the backbone out of the tensors of any known layout.

    Raises:
        ValueError: less than 90 % of the backbone's own tensors, those of gate and gate losses aside, are there.
    """
    layout, renamed, others = rename(tensors)
    report = Report(layout, unused=others)
    target = backbone.state_dict()
    fitted = {}
    if 'pos_embed' in renamed:
        positions, how = resample_positions(renamed['pos_embed'].float(), backbone.table, backbone.interpolate_mode)
        renamed['pos_embed'] = positions
        if how is not None:
            report.resized['pos_embed'] = how
    for name, tensor in renamed.items():
        if name not in target:
            report.unused.append(name)
        elif tensor.shape != target[name].shape:
            report.unused.append(f'{name} {tuple(tensor.shape)}, wanted {tuple(target[name].shape)}')
        else:
            fitted[name] = tensor
            if name not in report.resized:
                report.matched.append(name)
    if PATCH_BIAS in target and PATCH_BIAS not in renamed:
        fitted[PATCH_BIAS] = torch.zeros_like(target[PATCH_BIAS])
        report.resized[PATCH_BIAS] = 'is zero: the source has none'
    report.initial = [name for name in target if name not in fitted]
    own = [name for name in target if not name.startswith(('gate.', 'gate_losses.', 'coarse_detail.'))]
    share = sum(name in fitted for name in own) / len(own)
    if share < ENOUGH:
        raise ValueError(
            f'checkpoint: wanted at least {ENOUGH:.0%} of the backbone, got {share:.0%} of its tensors. Is it of '
            f'another width, depth or patch size?\n{report}'
        )
    return fitted, report
