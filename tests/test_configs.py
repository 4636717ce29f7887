"""Every segmentation config loads, builds and makes one training step; the real images go through the pipelines."""

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, sample
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS

from mmseg_msvit.gates.from_outside import find_msvit

CONFIGS = [path.relative_to(ROOT) for path in sorted((ROOT / 'configs').rglob('*.py'))]
# Classification has a test file of its own.
CONFIGS = [str(path) for path in CONFIGS if path.parts[1] not in ('_base_', 'imagenet')]
SWAPS = [name for name in CONFIGS if 'msvit' in name]


def load(name):
    config = Config.fromfile(ROOT / name)
    config.model.pretrained = None
    config.model.backbone.pop('init_cfg', None)
    return config


@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_makes_a_step(name):
    config = load(name)
    if 'msvit-l' in name:  # as deep as a test needs
        config.model.backbone.update(num_layers=2, out_indices=1)
    if 'frozen-gate' in name:
        config.model.backbone.gate.pop('init_cfg')
    model = revert_sync_batchnorm(MODELS.build(config.model))
    model.init_weights()
    model.train()
    classes = config.model.decode_head.num_classes
    samples = [sample(torch.randint(0, classes, (96, 64))) for _ in range(2)]
    losses = model(torch.randn(2, 3, 96, 64), samples, mode='loss')
    if name in SWAPS:
        gate = find_msvit(model).pop_gate_losses(samples, model)
        assert any('loss' in key for key in gate) != ('frozen-gate' in name)
        losses.update(gate)
    total, _ = model.parse_losses(losses)
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    build_optim_wrapper(model, config.optim_wrapper)


@pytest.mark.parametrize('name', SWAPS)
def test_opens_with_its_command_and_is_thin(name):
    lines = (ROOT / name).read_text().splitlines()
    assert any(line.startswith('#   mim train mmsegmentation') for line in lines[:6]) and name in '\n'.join(lines[:6])
    assert len(lines) <= 25
    config = load(name)
    assert config.default_scope == 'mmseg' and config.custom_imports['imports'] == ['mmseg_msvit']
    assert [hook['type'] for hook in config.custom_hooks] == ([] if 'frozen-gate' in name else ['GateLossHook'])


@pytest.mark.parametrize('name', [n for n in SWAPS if n.split('/')[1] in ('toy', 'camvid')])
def test_swap_changes_the_backbone_alone(name):
    ours, twin = load(name).model, load(name.replace('msvit', 'vit').replace('-3s', '')).model
    assert twin.backbone.type == 'VisionTransformer' and twin.backbone.patch_bias is True
    for key, value in twin.backbone.items():
        assert key == 'type' or ours.backbone[key] == value
    assert {k: v for k, v in ours.items() if k != 'backbone'} == {k: v for k, v in twin.items() if k != 'backbone'}


@pytest.mark.parametrize('name', [n for n in SWAPS if n.split('/')[1] == 'dinov2'])
def test_the_dense_twin_of_dinov2_differs_by_its_gate(name):
    ours, twin = load(name).model, load(name.replace('msvit-', '').replace('token-', '')).model
    if 'token-mask' in name:  # the head's type and what it reads, and nothing else
        assert ours.backbone.pop('out_type') == 'tokens' and ours.decode_head.type == 'TokenSegmenterHead'
        ours.decode_head.type = twin.decode_head.type
    assert twin.backbone.gate == dict(type='FixedGate', coarse=False)
    assert {k: v for k, v in ours.items() if k != 'backbone'} == {k: v for k, v in twin.items() if k != 'backbone'}
    differing = {k for k in {**ours.backbone, **twin.backbone} if ours.backbone.get(k) != twin.backbone.get(k)}
    assert differing == {'gate', 'gate_loss', 'train_tokens'}
    # what a linear probe of DINOv2 falls short without
    assert ours.backbone.final_norm and ours.backbone.norm_cfg.eps == 1e-6 and ours.data_preprocessor.bgr_to_rgb
    assert ours.data_preprocessor.mean == [123.675, 116.28, 103.53] and ours.backbone.img_size == 518


def real(config, split, root):
    dataset = config[f'{split}_dataloader'].dataset
    dataset.data_root = str(root)
    return DATASETS.build(dataset)


def test_camvid_images(shared):
    root = shared('data/camvid')
    config = load('configs/camvid/segmenter_msvit-mini_mask_1xb8-4k_camvid-256x256.py')
    sizes = {split: len(real(config, split, root)) for split in ('train', 'val', 'test')}
    assert sizes == dict(train=367, val=101, test=233)
    model = MODELS.build(config.model).eval()
    test = real(config, 'test', root)
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([test[0]]))
    assert result.pred_sem_seg.data.shape == (1, 360, 480)  # 360 is no multiple of 16
    train = real(config, 'train', root)
    torch.manual_seed(0)
    batch = model.data_preprocessor(pseudo_collate([train[0], train[1]]), training=True)
    losses = model.train()(**batch, mode='loss')
    losses.update(find_msvit(model).pop_gate_losses(batch['data_samples']))
    assert all(value.isfinite().all() for value in losses.values())


def test_dinov2_sees_whole_patches_of_camvid(shared):
    config = load('configs/dinov2/segmenter_dinov2-s14_fcn_1xb4-600_camvid-252x252.py')
    sample = real(config, 'test', shared('data/camvid'))[0]
    assert sample['inputs'].shape[1:] == (364, 490) and sample['data_samples'].ori_shape == (360, 480)
    assert sample['data_samples'].gt_sem_seg.shape == (360, 480)


def test_camvid_folder_by_environment(monkeypatch):
    monkeypatch.setenv('CAMVID', '/somewhere/else')
    config = load('configs/camvid/upernet_msvit-mini_1xb8-4k_camvid-256x256.py')
    for split in ('train', 'val', 'test'):
        assert config[f'{split}_dataloader'].dataset.data_root == '/somewhere/else'


def test_ade20k_images(shared):
    root = shared('data/ade20k_samples')
    config = load('configs/msvit/segmenter_msvit-t_mask_8xb1-160k_ade20k-512x512.py')
    dataset = real(config, 'test', root)
    assert len(dataset) == 3
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([dataset[0]]))
    assert result.pred_sem_seg.data.shape[1:] == result.ori_shape == result.gt_sem_seg.data.shape[1:]
    assert result.gt_sem_seg.data.unique().max() <= 255 and 255 in result.gt_sem_seg.data  # reduce_zero_label


def test_gate_and_priors_have_rates_of_their_own():
    config = load('configs/msvit/upernet_msvit-deit-s16_8xb2-160k_ade20k-512x512.py')
    config.model.backbone.scales = (16, 32, 64)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    group = {id(p): g for g in optimizer.param_groups for p in g['params']}
    rate = config.optim_wrapper.optimizer.lr
    for name, parameter in model.named_parameters():
        kind = group[id(parameter)]
        assert kind['lr'] == pytest.approx(rate * (10 if '.gate' in name or '.coarser_gates' in name else 1)), name
        if 'gate_losses' in name or 'pos_embed' in name or 'cls_token' in name:
            assert kind['weight_decay'] == 0, name


def test_cityscapes_layout(tmp_path):
    """Files in Cityscapes' layout go through the config's own pipeline."""
    rng = np.random.default_rng(0)
    for kind in ('leftImg8bit', 'gtFine'):
        (tmp_path / kind / 'val/aachen').mkdir(parents=True)
    image = cv2.resize(rng.integers(0, 256, (8, 16, 3), np.uint8), (256, 128))
    cv2.imwrite(str(tmp_path / 'leftImg8bit/val/aachen/aachen_0_0_leftImg8bit.png'), image)
    labels = rng.integers(0, 19, (128, 256), np.uint8)
    cv2.imwrite(str(tmp_path / 'gtFine/val/aachen/aachen_0_0_gtFine_labelTrainIds.png'), labels)
    config = load('configs/msvit/segmenter_msvit-s_mask_8xb1-80k_cityscapes-768x768.py')
    config.test_dataloader.dataset.pipeline[1].scale = (1024, 512)
    dataset = real(config, 'test', tmp_path)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([dataset[0]]))
    assert result.pred_sem_seg.data.shape == (1, 128, 256)
    assert (result.gt_sem_seg.data[0].numpy() == labels).all()


def test_a_test_image_that_is_stretched_to_whole_patches_is_predicted_in_place(shared):
    """Classes by column: each pixel must get the class of the cell that it lies in."""
    config = load('configs/dinov2/segmenter_dinov2-s14_fcn_1xb4-600_camvid-252x252.py')
    config.model.backbone.update(num_layers=1, out_indices=0)
    model = MODELS.build(config.model).eval()
    data = real(config, 'test', shared('data/camvid'))[0]
    columns = torch.arange(35)
    logits = torch.nn.functional.one_hot(columns % 11, 11).T[None, :, None].expand(1, 11, 26, 35).float()
    model.decode_head.conv_seg.register_forward_hook(lambda *args: logits)
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([data]))
    centre = ((columns + 0.5) * 480 / 35).long()
    assert torch.equal(result.pred_sem_seg.data[0, 180, centre], columns % 11)
