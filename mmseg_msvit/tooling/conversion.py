"""A dense segmentor becomes one with tokens of several scales.

The weights of ViT and head stay (:func:`convert`), and :func:`write` leaves a config and a whole checkpoint, which
everything takes that takes a segmentor's. Between the two :mod:`.gate_fitting` fits the gate.
"""

import os
from functools import partial
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import torch
from mmengine.config import Config, ConfigDict
from mmseg.models.decode_heads import FCNHead, SegmenterMaskTransformerHead
from mmseg.registry import MODELS
from torch import nn

from ..gates.gate import FixedGate
from ..gates.learned import LearnedGate
from ..gates.scores import ScoreGate
from ..labels import Classes
from ..vit.mixed_scale import MixedScale
from ..weights.whole_models import OF_GATES
from .command_line import InputError, write_whole
from .models import merge_first
from .testset import place_of_resize, resize_step

# The mixed-scale backbone that takes over a dense one's weights, by the dense one's class.
STANDS_IN = {'VisionTransformer': 'MSViT', 'BEiT': 'MSBEiT', 'MAE': 'MSMAE'}
STANDS_IN.update({kind: kind for kind in STANDS_IN.values()})
KINDS = dict(
    context='ContextGate', glance='GlanceGate', mlp='MLPGate', variance='VarianceGate', entropy='EntropyGate',
    reconstruction='ReconstructionGate', gradient='GradientGate', frequency='FrequencyGate',
)  # fmt: skip
# A gate that looks through blocks does so through one in so many of the ViT's, which cost a twentieth of all.
BLOCKS_PER_GLANCED = 4
# What a converted model's folder holds, and the words in its config by which it is known.
WRITTEN = ('config.py', 'checkpoint.pth', 'train.py', 'picture.png')
SIGNATURE = 'with a gate that was fitted to it'
ON_SMALLER = 'on smaller images.'


def dense_backbone(model: nn.Module, path: str) -> nn.Module:
    """The dense ViT of a segmentor.

    Raises:
        InputError: it has no plain ViT, or one whose gate, budget or size is not that of all fine tokens.
    """
    backbone = model.backbone
    kind = type(backbone).__name__
    if kind not in STANDS_IN:
        advice = merge_first(model) or (
            ". A plain ViT in a wrapper can be written as an MSViT with gate=dict(type='FixedGate'): docs/recipes.md"
        )
        raise InputError(f'CONFIG: wanted a backbone of type {", ".join(STANDS_IN)}, got {kind} in {path}{advice}')
    if isinstance(backbone, MixedScale):
        gate = backbone.gate
        if not isinstance(gate, FixedGate) or gate.coarse:
            raise InputError(
                "CONFIG: wanted a dense ViT, an MSViT with gate=dict(type='FixedGate', coarse=False), got one with "
                f'{type(gate).__name__} in {path}'
            )
        budget, size = backbone.select.token_budget, backbone.input_scale
        if budget is not None or size != 1:
            raise InputError(
                f'CONFIG: wanted a dense ViT, token_budget=None and input_scale=1, got {budget} and {size} in {path}'
            )
    return backbone


def head_on_tokens(dense: nn.Module) -> Optional[str]:
    """The head over tokens that takes over a segmentor's weights; None where there is none, or others read its grid."""
    head, backbone = dense.decode_head, dense.backbone
    alone = not dense.with_neck and not dense.with_auxiliary_head and not getattr(backbone, 'out_origin', False)
    if not alone or len(backbone.out_indices) > 1 or getattr(backbone, 'output_cls_token', False):
        return None
    if type(head) is FCNHead and head.num_convs == 0 and not head.concat_input and head.input_transform is None:
        return 'TokenLinearHead'
    return 'TokenSegmenterHead' if type(head) is SegmenterMaskTransformerHead else None


def convert(
    config: Config, dense: nn.Module, gate: Optional[str], scales: Sequence[int], on_tokens: bool = False
) -> Tuple[nn.Module, dict]:
    """The segmentor with a mixed-scale backbone in the dense one's place, gates at their first values.

    Args:
        config: of the dense segmentor.
        dense: that segmentor.
        gate: one of ``KINDS``; None for all tokens fine, as where images alone are to be smaller.
        scales: pixels along a token's side.
        on_tokens: whether the head becomes the one that :func:`head_on_tokens` names.

    Returns:
        The model in evaluation mode, and what the config's backbone becomes.

    Raises:
        InputError: the scales do not fit the backbone's patches, or what it has learned for coarse tokens.
    """
    own, detailed = config.model.backbone, getattr(dense.backbone, 'details', [])
    if detailed and dense.backbone.scales != tuple(scales):
        raise InputError(
            f"--scales: wanted {dense.backbone.scales}, for which the dense model has coarse_embed='resize+detail', "
            f'got {tuple(scales)}'
        )
    changes = dict(type=STANDS_IN[type(dense.backbone).__name__], scales=tuple(scales))
    if changes['type'] == 'MSViT' and not isinstance(dense.backbone, MixedScale):
        changes['patch_bias'] = True  # zero where the dense one has none; pretrained files have one, which mmseg drops
    kind = MODELS.get(KINDS[gate]) if gate else FixedGate
    changes['gate'] = dict(type=kind.__name__)
    if issubclass(kind, LearnedGate):
        changes['gate']['frozen'] = True
    if issubclass(kind, ScoreGate):
        changes['gate']['coarse_ratio'] = None
    if gate == 'glance':
        changes['gate']['blocks'] = max(1, len(dense.backbone.layers) // BLOCKS_PER_GLANCED)
    head = {}
    if on_tokens:
        changes['out_type'] = 'tokens'
        head = dict(decode_head={**config.model.decode_head, 'type': head_on_tokens(dense)})
    kept = {name: value for name, value in own.items() if name not in ('gate', *changes)}
    try:
        model = MODELS.build(ConfigDict({**config.model, 'backbone': {**kept, **changes}, **head}))
    except ValueError as error:
        raise InputError(f'--scales: {error}') from error
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith(OF_GATES) for name in loaded.missing_keys), loaded
    return model.to(next(dense.parameters()).device).eval(), changes


def check_out(out: Path, *inputs: str) -> None:
    """Refuses a folder in which :func:`write` would replace what it has not written itself.

    Args:
        out: the folder, which need not be there.
        inputs: files that are read, which are not to be replaced in any case.

    Raises:
        InputError: it would replace such a file.
    """
    there = [out / name for name in WRITTEN if (out / name).exists()]
    text = (out / 'config.py').read_text(errors='replace') if (out / 'config.py').is_file() else ''
    known = SIGNATURE in text or ON_SMALLER in text
    read = {Path(path).resolve() for path in inputs}
    lost = [path for path in there if not known or path.resolve() in read]
    if lost:
        raise InputError(
            f'--out: wanted a new folder, or one of this tool, got {out}, where {", ".join(p.name for p in lost)} '
            'would be replaced: remove it, or choose another'
        )


def write(config: Config, model: nn.Module, changes: dict, classes: Classes, out: Path) -> None:
    """Writes ``checkpoint.pth``, then ``config.py`` and ``train.py``; each is there as a whole or not at all.

    ``train.py``, which a model without a gate has not, is for training, with the gate as it is here. It begins with the
    weights that the dense segmentor's config begins with, and with all tokens fine (:class:`.DenseFirstHook`); if the
    gate looks through blocks, with these here, for it knows no others.

    Args:
        config: of the dense segmentor, which the new one inherits from.
        model: the converted one, with its threshold.
        changes: by :func:`convert`.
        classes: their names and colours, which go into the checkpoint.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    gated = not isinstance(model.backbone.gate, FixedGate)
    threshold = dict(threshold=model.backbone.select.threshold) if gated else {}
    backbone = dict(changes, gate={**changes['gate'], **threshold})
    if model.backbone.input_scale != 1:
        backbone['input_scale'] = model.backbone.input_scale
    if 'gate' in config.model.backbone:
        backbone['gate']['_delete_'] = True
    base = config.filename
    base = base if '::' in base else os.path.relpath(base, out)
    fitted = '{{ fileDirname }}/checkpoint.pth'
    imports = (config.get('custom_imports') or {}).get('imports') or []
    imports = [name for name in ([imports] if isinstance(imports, str) else imports) if name != 'mmseg_msvit']
    head = f', decode_head=dict(type={type(model.decode_head).__name__!r})' if 'out_type' in changes else ''
    what = f'{SIGNATURE}. A higher threshold is more tokens.' if gated else ON_SMALLER
    lines = [
        f'# {Path(base).name} {what}',
        f'_base_ = {base!r}',
        f'custom_imports = dict(imports={[*imports, "mmseg_msvit"]}, allow_failed_imports=False)',
        f'model = dict(backbone={backbone!r}{head})',
        f'load_from = {fitted!r}',
    ]
    learned = isinstance(model.backbone.gate, LearnedGate)
    weights = dict(init_cfg=dict(type='Pretrained', checkpoint=fitted, prefix='backbone.gate.')) if learned else {}
    hooks = [*map(dict, config.get('custom_hooks') or []), dict(type='DenseFirstHook')]
    anew = [
        '# config.py to be trained from the weights that its base begins with, dense for the first half of the',
        '# steps; the gate stays as it is.',
        "_base_ = './config.py'",
        f'model = dict(backbone=dict(gate={weights!r}))',
        f'custom_hooks = {hooks!r}',
        f'load_from = {config.get("load_from")!r}',
    ]
    if model.backbone.gate.blocks:
        anew = [
            '# config.py to be trained further; its gate knows the blocks as they are here: fit it again afterwards.',
            "_base_ = './config.py'",
        ]
    _write_files(model, classes, out, {'config.py': lines, **({'train.py': anew} if gated else {})})


def write_smaller(config: Config, model: nn.Module, size: float, classes: Classes, out: Path) -> None:
    """Writes ``config.py``, whose test pipeline makes images smaller by a factor, and ``checkpoint.pth``.

    Args:
        config: of a segmentor with any backbone.
        model: that segmentor.
        size: the factor.
        classes: as of :func:`write`.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = config.filename if '::' in config.filename else os.path.relpath(config.filename, out)
    dataset = {**_on_smaller(config.test_dataloader.dataset.to_dict(), size), '_delete_': True}
    lines = [
        f'# {Path(base).name} {ON_SMALLER}',
        f'_base_ = {base!r}',
        f'test_dataloader = dict(dataset={dataset!r})',
        "load_from = '{{ fileDirname }}/checkpoint.pth'",
    ]
    _write_files(model, classes, out, {'config.py': lines})


def _on_smaller(dataset: dict, size: float) -> dict:
    """A data set's config, or that of what wraps some, with smaller images."""
    found = dict(dataset)
    if 'dataset' in found:
        found['dataset'] = _on_smaller(found['dataset'], size)
    if 'datasets' in found:
        found['datasets'] = [_on_smaller(each, size) for each in found['datasets']]
    if 'pipeline' in found:
        steps = [getattr(step['type'], '__name__', str(step['type']).split('.')[-1]) for step in found['pipeline']]
        place = place_of_resize(steps)
        found['pipeline'] = [*found['pipeline'][:place], resize_step(size), *found['pipeline'][place:]]
    return found


def _write_files(model: nn.Module, classes: Classes, out: Path, texts: Dict[str, Sequence[str]]) -> None:
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    meta = dict(dataset_meta=dict(classes=classes.names, palette=classes.palette))
    write_whole(out / 'checkpoint.pth', partial(torch.save, dict(meta=meta, state_dict=weights)))
    for name, text in texts.items():
        write_whole(out / name, lambda path, text=text: path.write_text('\n'.join(text) + '\n'))
