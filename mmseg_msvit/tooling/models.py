"""A segmentor, from what a user of a tool gives: a config and a checkpoint."""

from pathlib import Path
from typing import Optional, Tuple, Union

from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmseg.apis import init_model
from torch import nn

from ..labels import check_heads
from ..vit.mixed_scale import MixedScale
from ..weights.whole_models import load_segmentor
from .command_line import InputError, first_line


def load_config(path: str) -> Config:
    """Reads the config of a segmentor, and enters its scope of names.

    Raises:
        InputError: there is no such file, or no model in it.
    """
    if '::' in path:  # as mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py
        config = get_config(path)
    elif Path(path).is_file():
        config = Config.fromfile(path)
    else:
        raise InputError(f'CONFIG: wanted a file, got {path}, which is not there')
    if 'backbone' not in config.get('model', {}):
        raise InputError(f'CONFIG: wanted a segmentor, got {path} without a model that has a backbone')
    init_default_scope(config.get('default_scope', 'mmseg'))
    return config


def load_model(
    config: Config, checkpoint: Optional[str], device: str, wanted: Union[type, Tuple[type, ...]] = MixedScale
) -> nn.Module:
    """Builds a segmentor, in evaluation mode; without a checkpoint its weights have their first values.

    Args:
        config: by :func:`load_config`.
        checkpoint: a training checkpoint or bare weights.
        device: where it goes.
        wanted: the class of its backbone, or several.

    Raises:
        InputError: the backbone is of another class, or the checkpoint cannot be read.
    """
    if checkpoint is not None and '://' not in checkpoint and not Path(checkpoint).is_file():
        raise InputError(f'CHECKPOINT: wanted a file, got {checkpoint}, which is not there')
    model = init_model(config, device='cpu')
    check_backbone(model, wanted, config.filename)
    try:
        check_heads(model)
    except ValueError as error:
        raise InputError(f'CONFIG: {error}') from error
    if checkpoint is not None:
        try:
            load_segmentor(model, checkpoint)
        except (OSError, ValueError) as error:
            raise InputError(
                f'CHECKPOINT: wanted weights of {config.filename}, got {checkpoint}, which cannot be read: '
                f'{first_line(error)}'
            ) from error
    return model.to(device)


def check_backbone(model: nn.Module, wanted: Union[type, Tuple[type, ...]], path: str) -> None:
    """Refuses a model whose backbone is of another class than is wanted, with the path of its config.

    Raises:
        InputError: the backbone is of another class.
    """
    if not isinstance(model.backbone, wanted):
        got = type(model.backbone).__name__
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        names = ' or '.join('MSViT' if kind is MixedScale else kind.__name__ for kind in kinds)
        raise InputError(f'CONFIG: wanted a backbone of type {names}, got {got} in {path}{merge_first(model)}')


def merge_first(model: nn.Module) -> str:
    """For an error: what to do with a LoRA of mmpretrain's."""
    is_lora = hasattr(type(model.backbone), 'apply_lora')
    return '. LoRA: merge it first, by tools/merge_lora.py CONFIG CHECKPOINT --out merged' if is_lora else ''
