"""Heads on tokens: mmseg's heads where all tokens are fine, and on any tokens what mmseg's says of each image's own."""

import copy
import json

import pytest
import torch
from conftest import SMALL, force_random_logits, no_noise, randomize, sample, use_plain_attention
from mmengine.config import ConfigDict
from mmseg.registry import METRICS, MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmseg_msvit.measuring.flops import HeadMacs, pass_costs
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.tokens.out_detail import smooth_coarse
from mmseg_msvit.tokens.token_map import PackedTokens

CLASSES = 5
MASK = dict(in_channels=32, channels=32, num_classes=CLASSES, num_layers=2, num_heads=2, embed_dims=16)
LINEAR = dict(in_channels=32, channels=32, num_classes=CLASSES, num_convs=0, concat_input=False, dropout_ratio=0.3)
KINDS = {'mask': ('SegmenterMaskTransformerHead', MASK), 'linear': ('FCNHead', LINEAR)}
ON_TOKENS = {'SegmenterMaskTransformerHead': 'TokenSegmenterHead', 'FCNHead': 'TokenLinearHead'}
FINE = dict(type='FixedGate', coarse=False)
THREE = (16, 32, 64)


def build(kind, on_tokens=True, test_cfg=None, auxiliary=None, **backbone):
    """A small segmentor with random weights, gate included, in eval mode."""
    name, options = KINDS[kind]
    if on_tokens:
        name, backbone = ON_TOKENS[name], dict(out_type='tokens', **backbone)
    model = MODELS.build(
        ConfigDict(
            type='EncoderDecoder',
            backbone=dict(SMALL, type='MSViT', **backbone),
            decode_head=dict(options, type=name),
            auxiliary_head=auxiliary,
            test_cfg=test_cfg or dict(mode='whole'),
        )
    )
    model.init_weights()
    randomize(model)
    return model.eval()


def twins(kind, **backbone):
    """The same weights with mmseg's head on the grid, and with ours on tokens."""
    ours = build(kind, **backbone)
    theirs = build(kind, on_tokens=False, **{k: v for k, v in backbone.items() if k != 'out_type'})
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(model, images, weight):
    images = images.clone().requires_grad_()
    torch.manual_seed(3)
    logits = model(images, mode='tensor')
    (logits * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits, {**found, 'images': images.grad}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('options', [{}, dict(num_register_tokens=2, scales=THREE)])
def test_all_fine_is_mmsegs_head(kind, options):
    ours, theirs = (model.double() for model in twins(kind, gate=FINE, **options))
    images, weight = torch.randn(3, 3, 70, 90).double(), torch.randn(3, CLASSES, 5, 6).double()
    got, wanted = gradients(ours, images, weight), gradients(theirs, images, weight)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-10, atol=1e-10)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize('scales', [(16, 32), THREE])
@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
def test_linear_is_fcn_on_any_tokens_in_training_too(scales, mode):
    """Dropout, coins of the gate, and the gradient that reaches it, are those of the head on the grid."""
    ours, theirs = (model.double().train() for model in twins('linear', scales=scales, train_tokens=mode))
    images, weight = torch.randn(3, 3, 70, 90).double(), torch.randn(3, CLASSES, 5, 6).double()
    for model in (ours, theirs):
        force_random_logits(model.backbone, 3, (5, 6))
    got, wanted = gradients(ours, images, weight), gradients(theirs, images, weight)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-10, atol=1e-10)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    assert any('gate' in name for name in wanted[1])


@torch.no_grad()
@pytest.mark.parametrize('scales', [(16, 32), THREE])
@pytest.mark.parametrize('size', [(128, 128), (70, 100)])
def test_masks_are_what_mmsegs_head_says_of_each_images_tokens(scales, size):
    """Block-diagonal: an image's tokens, laid out as a row of cells, through mmseg's own head."""
    ours, theirs = twins('mask', scales=scales, num_register_tokens=1, out_detail='none')
    force_random_logits(ours.backbone, 4, (-(-size[0] // 16), -(-size[1] // 16)))
    packed = ours.backbone(torch.randn(4, 3, *size))[-1]
    masks, tokens = ours.decode_head([packed]), packed.tokens
    assert len(set(tokens.lengths)) > 1
    for image, rows in enumerate(packed.x.split(tokens.lengths)):
        alone = theirs.decode_head([rows[2:].T[None, :, None]])[0, :, 0]  # (K, n), after cls and a register
        first = int(tokens.cu_seqlens[image]) + 2
        torch.testing.assert_close(masks[image], alone[:, tokens.cover[0, image] - first], rtol=1e-4, atol=1e-5)
    smooth = ours.decode_head([packed._replace(smoothed=ours.backbone.sides)])
    assert torch.equal(smooth, smooth_coarse(masks, tokens, ours.backbone.sides)) and not torch.equal(smooth, masks)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_is_its_rows_in_any_order(kind):
    model = build(kind)
    images = torch.randn(4, 3, 64, 96)
    logits = torch.randn(4, 2, 3) * 5
    logits[0], logits[1] = 9, -9  # all coarse beside all fine

    def run(chosen):
        handle = model.backbone.gate.register_forward_hook(lambda m, a, out: logits[chosen])
        out = model(images[chosen], mode='tensor')
        handle.remove()
        return out

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(run([2, 0, 3, 1]), whole[[2, 0, 3, 1]], rtol=1e-4, atol=1e-5)
    for i in range(4):
        torch.testing.assert_close(run([i]), whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('scales', [(16, 32), THREE])
@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
def test_training_output_is_the_packed_test_output(kind, scales, mode, monkeypatch):
    monkeypatch.setitem(KINDS, 'mask', ('SegmenterMaskTransformerHead', dict(MASK, drop_path_rate=0.0)))
    monkeypatch.setitem(KINDS, 'linear', ('FCNHead', dict(LINEAR, dropout_ratio=0.0)))
    model = build(kind, scales=scales, train_tokens=mode)
    force_random_logits(model.backbone, 3, (5, 7))
    images = torch.randn(3, 3, 70, 100)
    with torch.no_grad():
        wanted = model(images, mode='tensor')
    no_noise(monkeypatch)
    torch.testing.assert_close(model.train()(images, mode='tensor'), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
def test_a_training_step_reaches_every_parameter(kind, mode):
    model = build(kind, train_tokens=mode).train()
    force_random_logits(model.backbone, 2, (4, 6))
    samples = [sample(torch.randint(0, CLASSES, (64, 96))) for _ in range(2)]
    losses = model(torch.randn(2, 3, 64, 96), samples, mode='loss')
    assert losses['decode.loss_ce'] > 0 and 'decode.acc_seg' in losses
    gate = model.backbone.pop_gate_losses(samples)
    losses['decode.loss_ce'].backward(retain_graph=True)
    assert model.backbone.gate.last.bias.grad.abs().sum() > 0  # the task's own gradient
    sum(value for name, value in gate.items() if 'loss' in name).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    before = copy.deepcopy(model.decode_head.state_dict())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(not torch.equal(before[name], value) for name, value in model.decode_head.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_state_dicts_are_mmsegs_both_ways(kind):
    ours, theirs = build(kind), build(kind, on_tokens=False)
    assert ours.decode_head.state_dict().keys() == theirs.decode_head.state_dict().keys()
    for source, target in ((ours, theirs), (theirs, ours)):
        randomize(source)
        target.load_state_dict(source.state_dict())
        for name, value in source.decode_head.state_dict().items():
            assert torch.equal(target.decode_head.state_dict()[name], value)


def test_first_values_are_mmsegs():
    heads = []
    for name in ('SegmenterMaskTransformerHead', 'TokenSegmenterHead'):
        torch.manual_seed(0)
        heads.append(MODELS.build(dict(MASK, type=name)))
        heads[-1].init_weights()
    theirs, ours = (head.state_dict() for head in heads)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_macs_are_those_of_the_operators(kind, monkeypatch):
    use_plain_attention(monkeypatch)  # fused attention counts zero on CPU
    ours, theirs = twins(kind, num_register_tokens=1)
    force_random_logits(ours.backbone, 3, (5, 7))
    packed = ours.backbone(torch.randn(3, 3, 70, 100))
    with FlopCounterMode(display=False) as counter:
        ours.decode_head(packed)
    heads = HeadMacs(ours)
    costs = pass_costs(ours.backbone, packed[-1].tokens, heads)
    assert sum(cost['head'] for cost in costs) == counter.get_total_flops() / 2
    assert len({cost['head'] for cost in costs}) > 1
    dense = HeadMacs(theirs)((5, 7))
    assert {cost['dense_head'] for cost in costs} == {dense['head']} == {heads((5, 7))['head']}


@torch.no_grad()
def test_slide_inference_and_the_metric_that_counts_its_windows():
    counter = METRICS.build(dict(type='TokenMetric'))
    slide = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    ours, theirs = twins('mask', gate=FINE)
    ours.test_cfg = theirs.test_cfg = ConfigDict(slide)
    images = torch.randn(2, 3, 64, 96)
    got = ours.predict(images)
    counter.process({}, [{}, {}])
    for a, b in zip(got, theirs.predict(images)):
        torch.testing.assert_close(a.seg_logits.data, b.seg_logits.data, rtol=1e-4, atol=1e-5)
    result = counter.evaluate(2)
    assert result['msvit/head_gmacs_of_dense'] == 100 and result['msvit/tokens_mean'] == 2 * 17
    assert result['msvit/head_gmacs_mean'] == pytest.approx(2 * ours.decode_head.macs(16) / 1e9, rel=1e-4)


@torch.no_grad()
def test_metric_counts_the_tokens_of_the_head():
    counter = METRICS.build(dict(type='TokenMetric'))
    model = build('mask')
    force_random_logits(model.backbone, 2, (4, 6))
    with record_tokens(model) as seen:
        model.predict(torch.randn(2, 3, 64, 96))
    counter.process({}, [{}, {}])
    macs = [model.decode_head.macs(n - 1) for n in seen[0][0].lengths]
    result = counter.evaluate(2)
    assert result['msvit/head_gmacs_mean'] == pytest.approx(sum(macs) / 2e9, rel=1e-4)
    assert result['msvit/head_gmacs_of_dense'] == pytest.approx(50 * sum(macs) / model.decode_head.macs(24), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('count', [0, 1, 4])
@pytest.mark.parametrize('mode', ['test', 'all', 'trimmed'])
def test_other_leading_rows_leave_cells_and_their_tokens(count, mode):
    model = build('mask', train_tokens='all' if mode == 'test' else mode, num_register_tokens=1)
    force_random_logits(model.backbone, 3, (5, 7))
    with torch.enable_grad():
        packed = model.train(mode != 'test').backbone(torch.randn(3, 3, 70, 100))[-1]
    x, tokens = packed.x, packed.tokens
    leading, x2 = tokens.split_prefix(x)
    assert torch.equal(tokens.join_prefix(leading, x2), x)
    assert torch.equal(leading, x[tokens.prefix_rows()])
    moved = tokens.with_prefix(count)
    queries = torch.randn(3, count, 32)
    joined = moved.join_prefix(queries, x2)
    assert torch.equal(joined[moved.prefix_rows()], queries) and len(joined) == len(moved.level)
    assert torch.equal(moved.to_grid(joined), tokens.to_grid(x))
    assert moved.cu_seqlens.dtype == torch.int32 and moved.cu_seqlens.diff().tolist() == moved.lengths
    assert (moved.active_counts() - count).tolist() == (tokens.active_counts() - 2).tolist()
    for name in ('level', 'center', 'size', 'weight'):
        before, after = getattr(tokens, name), getattr(moved, name)
        if before is not None:
            assert torch.equal(tokens.split_prefix(before)[1], moved.split_prefix(after)[1])
    assert (moved.level[moved.prefix_rows()] == -1).all() and (moved.size[moved.prefix_rows()] == 0).all()
    if moved.weight is not None:
        assert (moved.weight[moved.prefix_rows()] == 1).all()


def test_an_auxiliary_head_gets_its_grid():
    auxiliary = dict(type='FCNHead', in_channels=32, channels=8, num_classes=CLASSES, num_convs=1, in_index=0)
    options = dict(LINEAR, type='TokenLinearHead', in_index=0)
    for out_type, head in ((('grid', 'tokens'), auxiliary), ('tokens', options)):
        model = build('mask', auxiliary=head, gate=FINE)
        model.backbone.out_types = (out_type,) * 2 if isinstance(out_type, str) else out_type
        samples = [sample(torch.randint(0, CLASSES, (64, 64)))]
        losses = model.train()(torch.randn(1, 3, 64, 64), samples, mode='loss')
        assert losses['aux.loss_ce'] > 0 and losses['decode.loss_ce'] > 0


def test_out_type_of_each_output():
    model = MODELS.build(dict(SMALL, type='MSViT', out_type=('grid', 'tokens'))).eval()
    grid, packed = model(torch.randn(2, 3, 64, 64))
    assert grid.shape == (2, 32, 4, 4) and isinstance(packed, PackedTokens)
    assert packed.x.shape == (sum(packed.tokens.lengths), 32)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(out_type='cells'), "out_type must be one of .*'tokens'.*cells"),
        (dict(out_type=('grid',)), 'out_type .* 2 of them'),
        (dict(out_type='tokens', out_detail='residual'), "out_detail other than 'residual'"),
        (dict(out_type='tokens', output_cls_token=True), 'output_cls_token=False'),
    ],
)
def test_out_types_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(SMALL, type='MSViT', **options))


@pytest.mark.parametrize('kind', KINDS)
def test_grids_are_refused_with_what_to_set(kind):
    model = build(kind)
    model.backbone.out_types = ('grid', 'grid')
    with pytest.raises(TypeError, match=r"out_type='tokens'.* got a grid \(1, 32, 4, 4\)"):
        model(torch.randn(1, 3, 64, 64), mode='tensor')


def test_heads_that_cannot_be():
    with pytest.raises(ValueError, match='num_convs=0'):
        MODELS.build(dict(LINEAR, type='TokenLinearHead', num_convs=1))
    transform = dict(input_transform='resize_concat', in_index=(0, 1), in_channels=(16, 16))
    with pytest.raises(ValueError, match='input_transform must be None'):
        MODELS.build(dict(LINEAR, type='TokenLinearHead', **transform))


@torch.no_grad()
def test_classes_are_last_in_memory_at_test_time_alone():
    """So that upsampling and argmax, which the segmentor does, go over classes that lie side by side."""
    model = build('mask', gate=FINE)
    images = torch.randn(2, 3, 64, 96)
    last = dict(memory_format=torch.channels_last)
    packed = model.backbone(images)
    assert model.decode_head(packed).is_contiguous(**last)
    metas = [dict(img_shape=(64, 96))] * 2
    assert model.encode_decode(images, metas).is_contiguous(**last)
    assert model.train().decode_head(packed).is_contiguous()


@pytest.mark.slow
def test_tools_take_a_model_with_a_head_on_tokens(config, scenes, tool, tmp_path):
    config.model.backbone.update(gate=dict(type='FixedGate', coarse=False), out_type='tokens')
    config.model.backbone.pop('gate_loss')
    config.model.decode_head.type = 'TokenSegmenterHead'
    path, checkpoint = tmp_path / 'config.py', tmp_path / 'weights.pth'
    config.dump(str(path))
    torch.save(MODELS.build(config.model).state_dict(), checkpoint)
    out = tmp_path / 'converted'
    options = ['--steps', 2, '--limit', 2, '--budget', 0.6, '--full-size', '--device', 'cpu']
    assert tool('fit_gate.py', path, checkpoint, '--out', out, *options) is None
    converted = out / 'config.py', out / 'checkpoint.pth'
    assert tool('get_flops.py', *converted, '--json', tmp_path / 'f.json') is None
    found = json.loads((tmp_path / 'f.json').read_text())
    assert 0 < found['head']['of_dense'] < 1
    assert tool('show_tokens.py', *converted, scenes / 'images/val', '--out', tmp_path / 'pictures') is None
    assert tool('analyze_gate.py', *converted, '--out', tmp_path / 'a.json') is None
    assert json.loads((tmp_path / 'a.json').read_text())['images'] == 3
    curve = ['--thresholds', 0, 1, '--device', 'cpu', '--out', tmp_path / 'curve']
    assert tool('tradeoff.py', f'ours={converted[0]},{converted[1]}', *curve) is None
    low, high = json.loads((tmp_path / 'curve/tradeoff.json').read_text())['curves']['ours']
    assert low['tokens'] < high['tokens'] == 37
    rest = [point['gmacs'] - point['encoder_gmacs'] for point in (low, high)]  # the head follows the tokens
    assert rest[0] < 0.9 * rest[1]
    line = [
        'benchmark.py',
        out / 'config.py',
        '--part',
        'segmentor',
        '--size',
        64,
        '--repeat',
        1,
        '--gate',
        'random:0.5',
    ]
    assert tool(*line, '--batch', 2, '--device', 'cpu', '--json', tmp_path / 'b.json') is None
    rows = {row['name']: row for row in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert rows['its backbone']['gmacs'] < rows['its logits']['gmacs'] == rows['MSViT']['gmacs']
    assert rows['MSViT']['gmacs'] < rows['all fine']['gmacs'] and rows['MSViT']['ratio_of']['all fine'] > 0
