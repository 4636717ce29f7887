"""Half precision: what decides which tokens there are, and the losses that train it, stay in float32."""

import sys
from unittest import mock

import pytest
import torch
from conftest import half_on_cpu, hooked, randomize, sample, tiny_segmentor
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmseg.registry import MODELS
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, pytest.param(torch.float16, marks=half_on_cpu))
DECIDING = {'learned', 'selection', 'losses', 'distributions', 'doubt'}


LOSSES = [dict(type=f'{kind}Loss') for kind in ('GeneralizedBatchShaping', 'BatchShaping', 'TokenBudget', 'Purity')]
DOUBT = [*LOSSES, dict(type='DoubtLoss')]


def segmentor(train_tokens='trimmed', losses=LOSSES, layers=2, kind='ContextGate', **backbone):
    gate = dict(type=kind, init_coarse=0.5)
    if kind == 'GlanceGate':
        gate['blocks'] = 1
    shape = dict(num_layers=layers, out_indices=layers - 1)
    backbone.update(gate=gate, gate_loss=losses, train_tokens=train_tokens, **shape)
    model = MODELS.build(tiny_segmentor(dict(dropout_ratio=0), **backbone)).train()
    randomize(model)
    return hooked(model)


def batch():
    labels = torch.randint(0, 4, (2, 2, 2)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels[0, :32, :16] = 0
    return torch.randn(2, 3, 64, 64), [sample(label) for label in labels]


class ResultTypes(TorchFunctionMode):
    """Notes the floating types of what torch gives back to each file of the package."""

    def __init__(self):
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and not frame.f_globals.get('__name__', '').startswith('mmseg_msvit.'):
            frame = frame.f_back
        if frame and isinstance(out, torch.Tensor) and out.is_floating_point():
            self.seen.add((frame.f_globals['__name__'].split('.')[-1], out.dtype))
        return out


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize(
    'train_tokens, kind',
    [('all', 'ContextGate'), ('trimmed', 'ContextGate'), ('active', 'ContextGate'), ('trimmed', 'GlanceGate')],
)
def test_decisions_and_gate_losses_are_in_float32_under_autocast(dtype, train_tokens, kind):
    found = []
    for enabled in (False, True):  # a model for each: gate losses remember what they saw
        torch.manual_seed(0)
        model, (images, samples) = segmentor(train_tokens, DOUBT, kind=kind), batch()
        with torch.autocast('cpu', dtype, enabled=enabled), ResultTypes() as types:
            found.append(model(images, samples, mode='loss'))
        seen = {kind for name, kind in types.seen if name in DECIDING - {'doubt'}}
        assert seen == {torch.float32} and {name for name, _ in types.seen} >= DECIDING
        assert (('blocks', dtype) in types.seen) == enabled
    wanted, mixed = found
    assert mixed['gate.tokens'] == wanted['gate.tokens'] and mixed['gate.coarse_fraction'] not in (0, 1)
    for name, value in wanted.items():
        near = 0.05 if name in ('decode.loss_ce', 'gate.loss_doubt') else 1e-5  # those see the blocks
        if name.startswith(('gate.loss', 'decode.loss')):
            assert mixed[name].dtype == torch.float32 and mixed[name].item() == pytest.approx(value.item(), rel=near)
    model.parse_losses(mixed)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', HALVES)
def test_two_hundred_steps_of_mixed_precision_are_finite_and_learn(dtype):
    """With activation checkpointing and clipped gradients; in bfloat16 by MMEngine's wrapper, which wants a GPU."""
    model, (images, samples) = segmentor(layers=1, with_cp=True), batch()
    optimizer = dict(optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), clip_grad=dict(max_norm=1.0))
    with pytest.raises(AssertionError, match='only available training on gpu'):
        AmpOptimWrapper(**optimizer)
    with mock.patch('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True):
        wrapper = AmpOptimWrapper(dtype='bfloat16', **optimizer)
    if dtype == torch.float16:
        wrapper = OptimWrapper(**optimizer)
    losses = []
    for _ in range(200):
        with wrapper.optim_context(model), torch.autocast('cpu', dtype):
            loss, _ = model.parse_losses(model(images, samples, mode='loss'))
        wrapper.update_params(loss)
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 0.7 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', HALVES)
def test_the_residual_stream_is_the_librarys_under_autocast(dtype):
    """It is in float32: what half precision cannot hold is left in it."""
    shape = dict(img_size=64, embed_dims=64, num_layers=4, num_heads=2, out_indices=(1, 3), patch_bias=True)
    source = MODELS.build(dict(type='VisionTransformer', final_norm=True, **shape))
    source.init_weights()
    randomize(source, 0.02)
    with torch.no_grad():
        for layer in source.layers[:2]:
            layer.ffn.layers[1].bias[7] = 4e4
    model = MODELS.build(dict(type='MSViT', gate=dict(type='FixedGate'), final_norm=True, **shape))
    model.load_state_dict(source.state_dict())
    source.eval()  # mmseg's returns nothing
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast('cpu', dtype):
        found, wanted = model.eval()(images), source(images)
    assert wanted[0].max() > torch.finfo(torch.float16).max
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
