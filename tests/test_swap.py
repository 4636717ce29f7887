"""The three-line swap over every config that mmseg ships with its VisionTransformer, BEiT or MAE."""

from pathlib import Path

import mmseg
import pytest
import torch
from conftest import sample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS

from mmseg_msvit.gates.from_outside import find_msvit

SHIPPED = Path(mmseg.__file__).parent / '.mim/configs'
# SAN's image encoder does not pad (patch_pad=0), so that its grid is rounded down; MSViT's covers every pixel. With
# patch_pad='corner' the encoder swaps, and the same images, multiples of the patch, give the same grid.
UNPADDED = 'san'
SWAPS = {'VisionTransformer': 'MSViT', 'BEiT': 'MSBEiT', 'MAE': 'MSMAE'}


def vit_configs():
    names = []
    for path in sorted(SHIPPED.rglob('*.py')):
        name = str(path.relative_to(SHIPPED))
        if name.startswith(('_base_', UNPADDED)):
            continue
        if any(word in name for word in ('vit', 'dpt', 'deit', 'beit/', 'mae/')) and 'mobilevit' not in name:
            names.append(name)
    return names


def shrink(backbone):
    """As many layers as the outputs ask for and no more, so that ViT-L fits a test."""
    outputs = backbone.get('out_indices', -1)
    deepest = backbone.get('num_layers', 12) - 1
    if isinstance(outputs, (list, tuple)):
        backbone.num_layers = len(outputs)
        backbone.out_indices = tuple(range(len(outputs)))
    else:
        backbone.num_layers = 2
        if outputs == deepest:
            backbone.out_indices = 1


def load(name):
    config = Config.fromfile(SHIPPED / name)
    model = config.model
    model.pretrained = None
    model.backbone.pop('init_cfg', None)
    return model


def test_list_is_not_empty_and_finds_what_is_swapped():
    names = vit_configs()
    assert {name.split('/')[0] for name in names} >= {'vit', 'segmenter', 'setr', 'dpt', 'beit', 'mae'} and len(
        names
    ) >= 30
    assert {load(name).backbone.type for name in names} == set(SWAPS)


@pytest.mark.slow
@pytest.mark.parametrize('name', vit_configs())
def test_forward_and_backward(name):
    cfg = load(name)
    cfg.backbone.type = SWAPS[cfg.backbone.type]
    shrink(cfg.backbone)
    model = revert_sync_batchnorm(MODELS.build(cfg)).train()
    classes = cfg.decode_head.num_classes
    samples = [sample(torch.randint(0, classes, (64, 96))) for _ in range(2)]
    losses = model(torch.randn(2, 3, 64, 96), samples, mode='loss')
    losses.update(find_msvit(model).pop_gate_losses(samples))
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    attention = model.backbone.layers[0].attn
    weight = attention.attn.in_proj_weight if hasattr(attention, 'attn') else attention.qkv.weight
    assert weight.grad.abs().sum() > 0
    assert model.backbone.gate.mlp[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('pad, works', [(0, False), ('corner', True)])
def test_san_has_to_pad(pad, works):
    encoder = Config.fromfile(SHIPPED / 'san/san-vit-b16_coco-stuff164k-640x640.py').model.image_encoder
    encoder.update(type='MSViT', patch_pad=pad, act_cfg=dict(type='GELU'))
    if not works:
        with pytest.raises(ValueError, match="patch_pad must be 'corner'"):
            MODELS.build(encoder)
        return
    outputs = MODELS.build(encoder)(torch.randn(1, 3, 64, 96))
    assert [(grid.shape[1:], cls.shape) for grid, cls in outputs] == [((768, 4, 6), (1, 768))] * 4
