from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, sample
from mmengine.config import ConfigDict
from mmseg.registry import HOOKS, METRICS, MODELS

from mmseg_msvit import MSViT
from mmseg_msvit.inspection import looking_at, record_tokens


def segmentor(**backbone):
    return MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(type='MSViT', gate_loss=[dict(type='PurityLoss', loss_weight=2.0)], **backbone, **SMALL),
            decode_head=dict(type='FCNHead', in_channels=32, channels=8, num_classes=4, num_convs=1, in_index=1),
            test_cfg=dict(mode='whole'),
        )
    )


def batch():
    return torch.randn(2, 3, 64, 64), [sample(torch.randint(0, 4, (64, 64))) for _ in range(2)]


def test_adds_the_gate_losses_in_training_and_leaves_no_trace_after_it():
    model = segmentor().train()
    inputs, samples = batch()
    before = set(model(inputs, samples, mode='loss'))
    hook, runner = HOOKS.build(dict(type='GateLossHook')), SimpleNamespace(model=model)
    hook.before_train(runner)
    losses = model(inputs, samples, mode='loss')
    assert set(losses) - before == {'gate.loss_purity', 'gate.coarse_fraction', 'gate.tokens'}
    total, log = model.parse_losses(losses)
    wanted = sum(v for k, v in losses.items() if 'loss' in k)
    torch.testing.assert_close(total, wanted)
    total.backward()
    assert model.backbone.gate.mlp[-1].weight.grad.abs().sum() > 0
    assert isinstance(model(inputs, mode='tensor'), torch.Tensor)
    hook.after_train(runner)
    assert set(model(inputs, samples, mode='loss')) == before
    assert not model._forward_hooks


def test_reads_the_loss_of_this_forward_and_no_other():
    model = segmentor().train()
    inputs, samples = batch()
    HOOKS.build(dict(type='GateLossHook')).before_train(SimpleNamespace(model=model))
    purity = model(inputs, samples, mode='loss')['gate.loss_purity']
    logits = model.backbone.gate(inputs, (2, 2))
    torch.testing.assert_close(purity, model.backbone.gate_losses[0](logits, samples))


def test_wants_one_msvit():
    with pytest.raises(ValueError, match='the model must have one MSViT backbone, got 0'):
        HOOKS.build(dict(type='GateLossHook')).before_train(SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_looking_at_a_model_leaves_it_as_it_was_and_chance_to_itself():
    slide = ConfigDict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    model = segmentor(gate=dict(type='RandomGate')).train()
    model.test_cfg = slide
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    metric = METRICS.build(dict(type='TokenMetric'))
    masks = []
    for _ in range(3):
        with looking_at(model), record_tokens(model) as seen:
            model(torch.randn(1, 3, 128, 128), mode='predict')
        masks.append(seen[0].coarse)
        assert len(seen) == 1 and seen[0].grid == (8, 8)  # the whole image
    assert not all(torch.equal(mask, masks[0]) for mask in masks)
    assert [module.training for module in model.modules()] == modes and model.test_cfg is slide
    assert not metric.recorder.passes
    with pytest.raises(KeyError), looking_at(model):
        raise KeyError
    assert model.training and metric.recorder in MSViT.observers
