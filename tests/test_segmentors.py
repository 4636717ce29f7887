"""Whole segmentors in company that they seldom have: flips at test time, cascades, images of other channels."""

import pytest
import torch
from conftest import SMALL, hooked, randomize, sample
from mmengine.config import ConfigDict
from mmseg.registry import MODELS

from mmseg_msvit.measuring.flops import HeadMacs, operator_macs

CLASSES = 5
PREPROCESSOR = dict(type='SegDataPreProcessor', mean=[0] * 3, std=[50] * 3, size_divisor=None)
HEADS = {
    'grid': dict(type='FCNHead', num_convs=0, concat_input=False, in_channels=32, channels=32, num_classes=CLASSES),
    'tokens': dict(
        type='TokenSegmenterHead', in_channels=32, channels=32, num_classes=CLASSES, num_layers=1, num_heads=2,
        embed_dims=16,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize('kind', HEADS)
@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
def test_time_augmentation_is_the_mean_over_views_turned_back(kind, scales):
    backbone = dict(SMALL, type='MSViT', scales=scales, gate=dict(type='VarianceGate'), out_type=kind)
    backbone['out_detail'] = 'none'  # of smooth cells of random weights all have one class
    segmentor = dict(
        type='EncoderDecoder',
        backbone=backbone,
        decode_head=HEADS[kind],
        data_preprocessor=PREPROCESSOR,
        test_cfg=dict(mode='whole'),
    )
    tta = MODELS.build(ConfigDict(type='SegTTAModel', module=segmentor)).eval()
    randomize(tta)
    image = torch.randint(0, 255, (3, 70, 101), dtype=torch.uint8)
    samples = []
    for turned in (False, True):
        view = sample(torch.zeros(70, 101, dtype=torch.long))
        shapes = dict(ori_shape=(70, 101), img_shape=(70, 101), pad_shape=(70, 101), img_path='')
        view.set_metainfo(dict(flip=turned, flip_direction='horizontal' if turned else None, **shapes))
        samples.append([view])
    (found,) = tta.test_step(dict(inputs=[[image], [image.flip(2)]], data_samples=samples))
    pixels = image.float()[None] / 50
    views = [tta.module.encode_decode(x, [dict(img_shape=(70, 101))]) for x in (pixels, pixels.flip(3))]
    wanted = (views[0].softmax(1) + views[1].flip(3).softmax(1)).argmax(1)
    assert torch.equal(found.pred_sem_seg.data, wanted) and len(wanted.unique()) > 1


def test_a_cascade_trains_the_gate_and_predicts():
    heads = [
        dict(HEADS['grid'], type='TokenLinearHead', in_index=1),
        dict(type='OCRHead', in_channels=32, in_index=0, channels=16, ocr_channels=8, num_classes=CLASSES),
    ]
    backbone = dict(SMALL, type='MSViT', out_type=('grid', 'tokens'), gate_loss=[dict(type='PurityLoss')])
    model = MODELS.build(
        ConfigDict(
            type='CascadeEncoderDecoder',
            num_stages=2,
            backbone=backbone,
            decode_head=heads,
            test_cfg=dict(mode='whole'),
        )
    ).train()
    hooked(model)
    samples = [sample(torch.randint(0, CLASSES, (70, 90))) for _ in range(2)]
    images = torch.randn(2, 3, 70, 90)
    losses = model(images, samples, mode='loss')
    assert {'decode_0.loss_ce', 'decode_1.loss_ce', 'gate.loss_purity'} <= set(losses)
    model.parse_losses(losses)[0].backward()
    assert model.backbone.gate.mlp[-1].weight.grad.abs().sum() > 0
    assert model.eval()(images, mode='tensor').shape == (2, CLASSES, 5, 6)
    count, grid = HeadMacs(model), torch.randn(1, 32, 5, 6)
    wanted = operator_macs(model.decode_head[1], [grid, grid], torch.randn(1, CLASSES, 5, 6))
    assert count((5, 6), 12)['head'] == wanted + model.decode_head[0].macs(11)  # 11 tokens beside cls
    assert count((5, 6))['head'] == wanted + model.decode_head[0].macs(30)


@pytest.mark.parametrize('channels', [1, 2, 4])
@pytest.mark.parametrize('gate', ['MLPGate', 'ContextGate', 'VarianceGate'])
def test_images_of_any_channels(channels, gate):
    options = dict(in_channels=channels, gate=dict(type=gate), coarse_embed='resize+detail', out_detail='residual')
    backbone = MODELS.build(dict(SMALL, type='MSViT', **options))
    randomize(backbone)
    images = torch.randn(2, channels, 50, 64, requires_grad=True)
    backbone.train()(images)[-1].square().sum().backward()
    assert (images.grad != 0).all()
    with pytest.raises(ValueError, match=f'in_channels={channels}, H, W.*got .2, {channels + 1}'):
        backbone(torch.randn(2, channels + 1, 50, 64))
