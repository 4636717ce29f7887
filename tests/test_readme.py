"""The configs of README and docs are built as they stand there, and run."""

import re

import pytest
import timm
import torch
from conftest import ROOT, hooked, randomize, sample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import load_state_dict
from mmseg.registry import MODELS

from mmseg_msvit.gates.from_outside import find_msvit
from mmseg_msvit.weights.whole_models import load_segmentor

PAGES = ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))
BLOCKS = [block for page in PAGES for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)]
SWAPS = [block for block in BLOCKS if '_base_' in block]


def test_all_families_are_there():
    types = re.findall(r"type='(MS\w+)'", ''.join(SWAPS))
    assert set(types) == {'MSViT', 'MSBEiT', 'MSLoRAModel'} and len(SWAPS) == 5


@pytest.mark.parametrize('text', SWAPS)
@pytest.mark.parametrize('scales', [None, 3])
def test_swap(text, scales):
    config = Config.fromstring(text, '.py')
    backbone = config.model.backbone.get('module', config.model.backbone)  # in a LoRA
    init = backbone.pop('init_cfg', {})
    assert (config.model.pretrained or init['checkpoint']).endswith('.pth')
    config.model.pretrained = None
    patch = backbone.get('patch_size', 16)
    if scales:
        backbone.scales = (patch, 2 * patch, 4 * patch)
    outputs = backbone.get('out_indices', 11)
    # as deep as a test needs
    backbone.num_layers = len(outputs) if isinstance(outputs, (list, tuple)) else 2
    backbone.out_indices = tuple(range(backbone.num_layers)) if isinstance(outputs, (list, tuple)) else 1
    model = revert_sync_batchnorm(MODELS.build(config.model)).train()
    samples = [sample(torch.randint(0, 150, (60, 100))) for _ in range(2)]
    losses = model(torch.randn(2, 3, 60, 100), samples, mode='loss')
    losses.update(find_msvit(model).pop_gate_losses(samples))
    total, _ = model.parse_losses(losses)
    total.backward()
    assert all(p.grad is not None for gate in model.backbone.gates for p in gate.parameters())
    build_optim_wrapper(model, config.optim_wrapper)
    hooked(model)  # its gate learns


def test_without_a_config(tmp_path, monkeypatch):
    [text] = (block for block in BLOCKS if 'load_backbone' in block)
    monkeypatch.chdir(tmp_path)
    source = timm.create_model('vit_small_patch14_dinov2', depth=2, img_size=70)
    torch.save(source.state_dict(), re.search(r"'(.*\.pth)'", text).group(1))
    names = dict(images=torch.randn(2, 3, 70, 98))
    exec(text, names)
    assert names['features'].shape == (2, 384, 5, 7)
    cost = names['cost']
    assert cost['tokens'] < cost['dense_tokens'] == 36 and cost['total'] < cost['dense_total']


@pytest.mark.parametrize('how', ['tools', 'mmengine'])
def test_a_trained_segmentor_whose_vit_is_not_mmsegs(how, tmp_path):
    [text] = (block for block in BLOCKS if 'backbone = dict(\n    _delete_=True' in block)
    base = "_base_ = 'mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py'"
    config = Config.fromstring(f'{base}\n{text}', '.py')
    config.model.backbone.num_layers, config.model.pretrained = 2, None
    model, vit = MODELS.build(config.model).eval(), timm.create_model('vit_small_patch14_dinov2', depth=2).eval()
    randomize(vit)
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith('decode_head.')}
    weights = {**head, **{f'backbone.vit.{name}': tensor for name, tensor in vit.state_dict().items()}}
    if how == 'tools':
        torch.save(weights, tmp_path / 'trained.pth')
        load_segmentor(model, str(tmp_path / 'trained.pth'))
    else:
        load_state_dict(model, weights, strict=True)
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        wanted = vit.forward_features(images)[:, 1:]  # (1, h * w, C)
        features = model.backbone(images)[-1]
    torch.testing.assert_close(features, wanted.mT.view_as(features), rtol=1e-4, atol=1e-4)
