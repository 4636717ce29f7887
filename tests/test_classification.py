"""MSViT as mmpretrain's backbone: a gate learned by a classifier, carried into a segmentor."""

import os
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, randomize, run
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS

CONFIG = 'configs/imagenet/msvit-s_8xb128-20e_in1k.py'
FROZEN = 'configs/msvit/segmenter_msvit-s_frozen-gate_mask_8xb1-160k_ade20k-512x512.py'
TINY = dict(embed_dims=32, num_layers=2, num_heads=2)


@pytest.fixture
def registry():
    """mmpretrain's registry, with its scope as the default one."""
    from mmpretrain.registry import MODELS as PRETRAIN

    import mmseg_msvit.classification  # noqa: F401

    init_default_scope('mmpretrain')
    return PRETRAIN


def build(registry, **kwargs):
    return registry.build({'type': 'MSViT', 'img_size': 64, **TINY, **kwargs})


def test_all_fine_is_mmpretrains_vit(registry, tmp_path):
    from mmpretrain.models import VisionTransformer

    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128)
    source = VisionTransformer(arch=arch, img_size=64, patch_size=16, out_type='cls_token')
    randomize(source)
    source.eval()
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
    model = build(registry, gate=dict(type='FixedGate', coarse=False), init_cfg=init)
    model.init_weights()
    images = torch.randn(3, 3, 64, 64)
    (out,) = model.eval()(images)
    torch.testing.assert_close(out, source(images)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('train_tokens', ['trimmed', 'all'])
def test_the_task_reaches_the_gate_through_cls(registry, train_tokens):
    model = build(registry, train_tokens=train_tokens).train()
    randomize(model)
    (out,) = model(torch.randn(4, 3, 64, 64))
    out.square().sum().backward()
    assert out.shape == (4, 32)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.gate.parameters())


def test_what_a_classifier_cannot_do_is_refused(registry):
    with pytest.raises(ValueError, match="train_tokens must be 'trimmed' or 'all'"):
        build(registry, train_tokens='active')
    build(registry, train_tokens='active', gate=dict(type='MLPGate', frozen=True))
    with pytest.raises(ValueError, match='with_cls_token must be True'):
        build(registry, with_cls_token=False)
    for options in (dict(out_detail='residual'), dict(out_type='tokens')):
        with pytest.raises(ValueError, match="no out_detail='residual' and no out_type='tokens'"):
            build(registry, **options)


@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT / 'configs/imagenet').glob('*.py')))
def test_configs_build(registry, name):
    config = Config.fromfile(ROOT / 'configs/imagenet' / name)
    model = registry.build({**config.model, 'data_preprocessor': config.data_preprocessor})
    assert model.backbone.gate_learns and model.backbone.embed_dims == model.head.in_channels
    assert config.train_cfg.max_epochs == 20
    assert f'#   mim train mmpretrain configs/imagenet/{name} ' in (ROOT / 'configs/imagenet' / name).read_text()


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Six images in ImageNet's layout."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    (root / 'meta').mkdir()
    for split in ('train', 'val'):
        lines = []
        for i in range(6):
            file = root / split / f'n{i % 2}' / f'{i}.jpg'
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), rng.integers(0, 256, (80, 90, 3), dtype=np.uint8))
            lines.append(f'n{i % 2}/{i}.jpg {i % 2}\n')
        (root / 'meta' / f'{split}.txt').write_text(''.join(lines))
    return root


@pytest.fixture(scope='module')
def classifier(imagenet, tmp_path_factory):
    """The checkpoint of a few steps of the ImageNet config, by mmpretrain's own training tool."""
    work = tmp_path_factory.mktemp('work')
    options = [f'model.backbone.{key}={value}' for key, value in TINY.items()]
    options += ['model.backbone.init_cfg=None', 'model.head.in_channels=32', 'train_cfg.max_epochs=2']
    for part in ('train', 'val', 'test'):
        options += [f'{part}_dataloader.dataset.data_root={imagenet}', f'{part}_dataloader.num_workers=0']
        options += [f'{part}_dataloader.persistent_workers=False', f'{part}_dataloader.batch_size=2']
    options += ['default_hooks.logger.interval=1', 'optim_wrapper.optimizer.lr=0.01']
    command = [sys.executable, '-m', 'mim', 'train', 'mmpretrain', CONFIG, '--work-dir', work]
    return work / 'epoch_2.pth', run(*command, '--cfg-options', *options)


def test_toy_run_of_the_imagenet_config(classifier):
    _, log = classifier
    assert 'gate.loss_gbas' in log and 'gate.coarse_fraction' in log and 'gate.tokens' in log
    assert 'accuracy/top1' in log and 'msvit/tokens_mean' in log


@pytest.mark.parametrize('positions', [64, 224])
def test_its_gate_goes_frozen_into_a_segmentation_config(classifier, positions, monkeypatch):
    path, _ = classifier
    monkeypatch.setitem(os.environ, 'MSVIT_GATE', str(path))
    config = Config.fromfile(ROOT / FROZEN)
    config.model.pretrained = None
    config.model.backbone.update(img_size=positions, init_cfg=None, **TINY)
    config.model.decode_head.update(in_channels=32, embed_dims=32, num_heads=2, channels=32)
    model = MODELS.build(config.model)
    model.init_weights()
    source = torch.load(path, weights_only=False)['state_dict']
    gate = model.backbone.gate
    for name, tensor in gate.state_dict().items():
        if name != 'pos_embed' or positions == 224:
            assert torch.equal(tensor, source[f'backbone.gate.{name}'])
    assert not any(p.requires_grad for p in gate.parameters())
    assert config.custom_hooks == []

    outputs = model.train()(torch.randn(2, 3, 64, 64), mode='tensor')
    outputs.square().sum().backward()
    assert all(p.grad is None for p in gate.parameters())
    assert model.backbone.patch_embed.projection.weight.grad.abs().sum() > 0


def test_the_whole_classifier_is_a_segmentors_pretrained_backbone(classifier, registry):
    path, _ = classifier
    config = Config.fromfile(ROOT / CONFIG)
    config.model.backbone.update(init_cfg=None, **TINY)
    config.model.head.in_channels = 32
    classify = registry.build({**config.model, 'data_preprocessor': config.data_preprocessor})
    load_checkpoint(classify, str(path), strict=True)

    init_default_scope('mmseg')
    options = {**SMALL, **TINY, 'img_size': 224, 'out_indices': -1, 'norm_cfg': dict(type='LN', eps=1e-6)}
    segment = MODELS.build(
        dict(type='MSViT', output_cls_token=True, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **options)
    )
    segment.init_weights()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ((_, cls),) = segment.eval()(images)
        torch.testing.assert_close(cls, classify.backbone.eval()(images)[0])


@pytest.mark.parametrize('hook', ['GateLossHook', 'ViTWeightsHook'])
def test_load_from_takes_an_mmpretrain_classifier_with_its_head(hook, registry, tmp_path):
    from mmengine.runner import Runner
    from mmpretrain.models import ImageClassifier, VisionTransformer

    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128)
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    source = ImageClassifier(backbone=dict(type='VisionTransformer', arch=arch, img_size=64), head=head)
    randomize(source)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'vit.pth')
    fine = dict(type='FixedGate', coarse=False)
    backbone = dict(type='MSViT', img_size=64, gate=fine, **TINY)
    runner = Runner.from_cfg(
        Config(
            dict(
                model=dict(type='ImageClassifier', backbone=backbone, head=head),
                work_dir=str(tmp_path),
                default_scope='mmpretrain',
                experiment_name=f'load-from-mmpretrain-{hook}',
                custom_hooks=[dict(type=hook)],
            )
        )
    )
    runner.load_checkpoint(str(tmp_path / 'vit.pth'))
    images = torch.randn(2, 3, 64, 64)
    source.eval()
    assert isinstance(source.backbone, VisionTransformer)
    with torch.no_grad():
        torch.testing.assert_close(runner.model.eval()(images), source(images), rtol=1e-4, atol=1e-4)
