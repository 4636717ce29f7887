import dataclasses

import pytest
import torch
from conftest import SMALL, build_msvit, force_logits, force_random_logits, no_noise, randomize, use_plain_attention
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_msvit.measuring.flops import pass_costs
from mmseg_msvit.measuring.inspection import record_tokens, seen_size
from mmseg_msvit.tokens.embedding import pad_to_regions, shrink
from mmseg_msvit.vit.blocks import Places

SIZES = [(512, 512), (234, 345), (32, 128), (32, 32), (16, 16), (96, 80), (7, 50), (1, 1)]
RANDOM_GATE = dict(type='MLPGate', init_coarse=0.5)
LEARNED = dict(gate=RANDOM_GATE)


def watch_tokens(model):
    """A list that fills with each forward's map and decision."""
    seen = []
    model.select.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(output_cls_token=True, out_origin=True),
        dict(with_cls_token=False, pre_norm=True, patch_norm=True, qkv_bias=False, num_fcs=3),
        dict(patch_bias=False, interpolate_mode='bilinear', out_indices=-1, final_norm=False, mlp_ratio=2),
    ],
)
def test_all_fine_is_mmsegs_vit(size, options):
    """Invariant 1. mmseg compares tables by their number of positions: it gets the correctly resampled one."""
    options = {**SMALL, 'patch_bias': True, **options}
    dense = VisionTransformer(**options)
    dense.init_weights()
    randomize(dense)
    dense.eval()
    model = MODELS.build(dict(type='MSViT', gate=dict(type='FixedGate', coarse=False), **options)).eval()
    assert model.load_state_dict(dense.state_dict(), strict=True)

    images = torch.randn(2, 3, *size)
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    table = dense.img_size[0] // 16, dense.img_size[1] // 16
    if (h, w) != table:
        dense.pos_embed.data = dense.resize_pos_embed(dense.pos_embed.data, (h, w), table, dense.interpolate_mode)
        dense.img_size = (h * 16, w * 16)
    with torch.no_grad():
        outputs, wanted = model(images), dense(images)
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [(64, 64), (70, 90), (33, 130)])
@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(coarse_embed='resize+detail', out_detail='residual'),
        dict(with_cls_token=False),
        dict(scales=(16, 32, 64), out_detail='residual'),
        dict(scales=(16, 32, 64), coarse_embed='resize+detail', num_register_tokens=2),
    ],
)
def test_training_output_is_the_packed_test_output(size, mode, options, monkeypatch):
    """Invariant 2: the same hard decisions, no noise."""
    model = build_msvit(train_tokens=mode, **LEARNED, **options)
    images = torch.randn(3, 3, *size)
    force_random_logits(model, 3, (-(-size[0] // 16), -(-size[1] // 16)))
    with torch.no_grad():
        wanted = model(images)
    no_noise(monkeypatch)
    seen = watch_tokens(model)
    outputs = model.train()(images)
    ((tokens, decision),) = seen
    assert all(0 < coarse.float().mean() < 1 for coarse in decision.coarse) and tokens.masked == (mode != 'active')
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mode', ['all', 'trimmed'])
def test_gradient_of_the_weights_is_that_of_the_definition(mode, monkeypatch):
    """Finite differences through embedding, masked blocks and the mixing on the grid, at a hard decision."""
    model = build_msvit(train_tokens=mode, img_size=(32, 64), embed_dims=8, num_layers=2, out_indices=(0, 1), **LEARNED)
    model = model.double().train()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    _, tokens, _ = model.tokenize(images)
    assert 0 in tokens.weight

    def run(weight):
        batch = dataclasses.replace(tokens, weight=weight)
        x = model.embed(images, batch)
        grids = []
        for layer in model.layers:
            x = layer(x, batch, Places())
            grids.append(batch.to_grid(x))
        return torch.stack(grids)

    use_plain_attention(monkeypatch)  # in the fused one a weight of 0 minus a step has no logarithm
    weight = tokens.weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(run, weight, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize('size', [(64, 64), (50, 100)])
def test_a_batch_is_its_images(size):
    """Invariant 3, with an all-coarse and an all-fine image among the others."""
    model = build_msvit(**LEARNED)
    images = torch.randn(8, 3, *size)
    hc, wc = -(-size[0] // 32), -(-size[1] // 32)
    logits = torch.randn(8, hc, wc)
    logits[0], logits[1] = 9, -9
    order = torch.randperm(8)
    with torch.no_grad():
        hook = model.gate.register_forward_hook(lambda *args: logits)
        together = model(images)
        hook.remove()
        hook = model.gate.register_forward_hook(lambda *args: logits[order])
        permuted = model(images[order])
        hook.remove()
        for i in range(8):
            hook = model.gate.register_forward_hook(lambda *args, i=i: logits[i : i + 1])
            alone = model(images[i : i + 1])
            hook.remove()
            for a, b in zip(alone, together):
                torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-5)
    for a, b in zip(permuted, together):
        torch.testing.assert_close(a, b[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
@pytest.mark.parametrize('logit', [9.0, -9.0, None])
@pytest.mark.parametrize(
    'options', [dict(coarse_embed='resize+detail', out_detail='residual'), dict(with_cls_token=False)]
)
def test_each_parameter_gets_a_gradient(mode, logit, options):
    """Invariant 4: also when a batch is all coarse or all fine, or of one region."""
    model = build_msvit(train_tokens=mode, gate_loss=[dict(type='GeneralizedBatchShapingLoss')], **options).train()
    if logit is not None:
        force_logits(model, torch.full((2, 2, 2), logit))
    loss = sum(o.square().mean() for o in model(torch.randn(2, 3, 64, 64)))
    gate = model.pop_gate_losses([])
    (loss + gate['loss_gbas']).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.gate.mlp[-1].weight.grad.abs().sum() > 0


def test_default_configuration_trains_every_parameter_from_its_first_step():
    model = MODELS.build(dict(type='MSViT', **SMALL))
    model.init_weights()
    sum(o.square().mean() for o in model.train()(torch.randn(2, 3, 64, 64))).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {'gate_losses.0.prior_mean_logit', 'gate_losses.0.prior_log_temperature'}


@pytest.mark.parametrize('mode', ['all', 'trimmed', 'active'])
def test_checkpointing_changes_nothing(mode):
    """Invariant 5, with stochastic depth and dropout, whose coins have to be tossed the same way again."""
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build_msvit(train_tokens=mode, with_cp=with_cp, drop_path_rate=0.5, drop_rate=0.1, **LEARNED).train()
        torch.manual_seed(1)
        outputs = model(torch.randn(4, 3, 64, 64))
        sum(o.square().sum() for o in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('options', [{}, dict(coarse_embed='resize+detail')])
@pytest.mark.parametrize('size', [(64, 64), (49, 79)])
def test_each_pixel_has_a_gradient(options, size):
    """Invariant 7."""
    model = build_msvit(**LEARNED, **options)
    images = torch.randn(2, 3, *size, requires_grad=True)
    model(images)[-1].square().sum().backward()
    assert (images.grad != 0).all()


@torch.no_grad()
@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
@pytest.mark.parametrize('options', [{}, dict(output_cls_token=True, out_origin=True, patch_norm=True)])
@pytest.mark.parametrize('size', [(64, 64), (50, 100)])
def test_out_detail_adds_a_map_of_their_own_pixels_to_the_cells_of_coarse_regions(scales, options, size):
    gate = dict(type='RandomGate', coarse_ratio=0.4)
    plain, detailed = (build_msvit(gate=gate, scales=scales, out_detail=d, **options) for d in ('none', 'residual'))
    assert not detailed.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    seen, images = watch_tokens(detailed), torch.randn(3, 3, *size)

    def outputs(model):
        torch.manual_seed(2)
        return model(images)

    def grids(model):
        return [o[0] if isinstance(o, list) else o for o in outputs(model)]

    padded, (h, w) = pad_to_regions(images, 16, 4)
    cells = detailed.patch_embed.projection(padded)[..., :h, :w].permute(0, 2, 3, 1)  # (B, h, w, C)
    cells = cells if detailed.patch_embed.norm is None else detailed.patch_embed.norm(cells)
    for project, a, b in zip(detailed.out_details, grids(detailed), grids(plain)):
        coarse = (seen[-1][0].levels() > 0)[..., None]
        assert 0 < coarse.float().mean() < 1
        torch.testing.assert_close(a - b, (project(cells) * coarse).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    assert len(detailed.out_details) == len(detailed.out_indices) + detailed.out_origin
    if options:
        assert all(torch.equal(a[1], b[1]) for a, b in zip(outputs(detailed), outputs(plain)))
    detailed.init_weights()
    plain.load_state_dict(detailed.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(grids(detailed), grids(plain)))


@torch.no_grad()
@pytest.mark.parametrize('scales', [(16, 32), (16, 64), (16, 32, 64)])
@pytest.mark.parametrize('size', [(64, 64), (80, 112)])
def test_smooth_coarse_tokens_alone_are_the_linear_interpolation_of_their_grid(scales, size):
    model = build_msvit(gate=dict(type='FixedGate', coarse=True), scales=scales, out_detail='smooth')
    plain = build_msvit(gate=dict(type='FixedGate', coarse=True), scales=scales, out_detail='none')
    plain.load_state_dict(model.state_dict())
    images, side = torch.randn(2, 3, *size), scales[-1] // 16
    for smooth, grid in zip(model(images), plain(images)):
        h, w = grid.shape[2:]
        known = wanted = grid[..., ::side, ::side]
        for _ in range(side.bit_length() - 1):  # twice as fine each time
            wanted = torch.nn.functional.interpolate(wanted, scale_factor=2, mode='bilinear', align_corners=False)
        inside = [slice(0, cells - cells % side) for cells in (h, w)]  # regions that are whole
        torch.testing.assert_close(smooth[..., inside[0], inside[1]], wanted[..., inside[0], inside[1]])
        assert wanted.shape[2] >= h and known.std() > 0


@pytest.mark.parametrize('train_tokens', ['active', 'trimmed', 'all'])
@pytest.mark.parametrize('scales', [(16, 32), (16, 64), (16, 48), (16, 32, 64)])
def test_smooth_cells_are_those_of_the_definition(scales, train_tokens):
    options = dict(scales=scales, train_tokens=train_tokens, **LEARNED)
    model = build_msvit(out_detail='smooth', **options).double()
    plain = build_msvit(out_detail='none', **options).double()
    plain.load_state_dict(model.state_dict())
    images, grids = torch.randn(2, 3, 96, 128, dtype=torch.float64), []
    seen = watch_tokens(model)
    for backbone in (model, plain):
        torch.manual_seed(1)
        grids.append(backbone.train()(images)[-1])
    tokens, (smooth, wanted) = seen[0][0], grids
    for level, side in reversed(list(enumerate(model.sides))[1:]):
        coarse = tokens.to_grid((tokens.level >= level)[:, None].double())
        assert 0 < coarse.mean() < 1
        for step in {2: [1], 3: [1], 4: [2, 1][: 1 + (level == 1)]}[side]:
            before = wanted.clone()
            for b, _, y, x in (coarse == 1).nonzero().tolist():
                ys, xs = ([max(at - step, 0), at, at, min(at + step, n - 1)] for at, n in ((y, 6), (x, 8)))
                wanted[b, :, y, x] = sum(before[b, :, v, u] for v in ys for u in xs) / 16
    torch.testing.assert_close(smooth, wanted)
    assert not torch.equal(smooth, grids[1])
    smooth.square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.gate.parameters())


@torch.no_grad()
@pytest.mark.parametrize('detail', ['smooth', 'residual'])
def test_out_detail_leaves_images_without_a_coarse_region_as_they_are(detail):
    options = dict(gate=dict(type='FixedGate'), output_cls_token=True)
    plain, detailed = (build_msvit(out_detail=d, **options) for d in ('none', detail))
    plain.load_state_dict(detailed.state_dict(), strict=False)
    images = torch.randn(2, 3, 50, 70)
    for ours, theirs in zip(detailed(images), plain(images)):
        assert len(ours) == len(theirs) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_coarse_token_is_the_embedded_area_mean_and_detail_adds_a_convolution():
    model = build_msvit(coarse_embed='resize+detail', gate=dict(type='FixedGate', coarse=True))
    seen = watch_tokens(model)
    images = torch.randn(1, 3, 64, 48)
    (padded, grid) = pad_to_regions(images, 16, 2)
    with torch.no_grad():
        model(images)
        x = model.embed(padded, seen[0][0])[1:]
        conv = model.patch_embed.projection
        mean = torch.nn.functional.interpolate(padded, scale_factor=0.5, mode='area')
        cells = conv(padded)
        cells[..., grid[1] :] = 0  # the column of cells beyond the grid
        wanted = conv(mean) + model.coarse_detail(cells)
        position = model.resize_pos_embed(model.pos_embed, grid, (4, 4), 'bicubic')[:, 1:]
        position = position.mT.unflatten(2, grid)
        position = torch.nn.functional.avg_pool2d(position, 2, ceil_mode=True)
    torch.testing.assert_close(x, (wanted + position)[0].flatten(1).T, rtol=1e-4, atol=1e-5)


def test_a_detail_that_starts_at_zero_changes_nothing():
    outputs = []
    weights = build_msvit(gate=dict(type='FixedGate')).state_dict()
    for coarse_embed in ('resize', 'resize+detail'):
        model = MODELS.build(
            dict(type='MSViT', coarse_embed=coarse_embed, gate=dict(type='FixedGate', coarse=True)) | SMALL
        )
        model.load_state_dict(weights, strict=False)
        outputs.append(model.eval()(torch.ones(1, 3, 64, 64).cumsum(2))[0])
    torch.testing.assert_close(*outputs)


def test_frozen_gate_is_always_active_and_has_no_losses():
    model = build_msvit(train_tokens='all', gate=dict(type='RandomGate'))
    assert len(model.gate_losses) == 0
    model = build_msvit(train_tokens='all', **LEARNED)
    seen = watch_tokens(model)
    model.gate.requires_grad_(False)
    out = model.train()(torch.randn(2, 3, 64, 64))
    assert not seen[0][0].masked and seen[0][0].weight is None and model.pop_gate_losses([]) == {}
    sum(o.sum() for o in out).backward()
    assert all(p.grad is None for p in model.gate.parameters())


def test_slot_is_emptied_when_read_and_stays_empty_at_test_time():
    model = build_msvit(**LEARNED)
    model(torch.randn(1, 3, 64, 64))
    assert model.pop_gate_losses([]) == {}
    model.train()(torch.randn(1, 3, 64, 64))
    logged = {'coarse_fraction', 'conditionality', 'entropy', 'tokens'}
    assert set(model.pop_gate_losses([])) == {'loss_gbas', *logged}
    assert model.pop_gate_losses([]) == {}


def test_state_dict_has_mmsegs_keys_and_the_gates():
    dense = VisionTransformer(patch_bias=True, **SMALL)
    extra = set(build_msvit().state_dict()) - set(dense.state_dict())
    assert set(dense.state_dict()) <= set(build_msvit().state_dict())
    assert {name.split('.')[0] for name in extra} == {'gate', 'gate_losses'}


def test_initialisation():
    model = MODELS.build(dict(type='MSViT', coarse_embed='resize+detail', **SMALL))
    randomize(model)
    model.init_weights()
    assert model.coarse_detail.weight.abs().sum() == 0 and model.gate.mlp[-1].weight.abs().sum() == 0
    assert 0.01 < model.pos_embed.std() < 0.03


def test_pretrained_weights_of_a_vit_leave_the_gate_at_its_start(tmp_path):
    torch.save(VisionTransformer(patch_bias=True, **{**SMALL, 'img_size': 96}).state_dict(), tmp_path / 'vit.pth')
    model = MODELS.build(
        dict(type='MSViT', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth')), **SMALL)
    )
    model.init_weights()
    saved = torch.load(tmp_path / 'vit.pth')
    assert torch.equal(model.layers[1].ffn.layers[1].weight, saved['layers.1.ffn.layers.1.weight'])
    torch.testing.assert_close(model.gate(torch.zeros(1, 3, 64, 64), (2, 2)).sigmoid(), torch.full((1, 2, 2), 0.9))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(scales=(16, 40)), r'scales must be \(patch_size, a larger multiple .* got \(16, 40\)'),
        (dict(scales=(8, 32)), r'patch_size=16, got \(8, 32\)'),
        (dict(scales=(16, 16)), r'got \(16, 16\)'),
        (dict(gate=dict(type='NoGate')), 'gate must be a config whose type is one of .*MLPGate.*NoGate'),
        (dict(gate=dict(type='VisionTransformer')), 'gate must be a config whose type is one of'),
        (dict(gate_loss=dict(type='CrossEntropyLoss')), 'gate_loss must be a config whose type .*PurityLoss'),
        (dict(gate_loss=[dict(type='PurityLoss')] * 2), 'gate_loss: each loss needs a loss_name of its own'),
        (dict(train_tokens='few'), "train_tokens must be one of .*'few'"),
        (dict(coarse_embed='mean'), "coarse_embed must be one of .*'mean'"),
        (dict(out_detail='mean'), "out_detail must be one of .*'mean'"),
        (dict(patch_pad='same'), "patch_pad must be 'corner'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='MSViT', **SMALL, **kwargs))


@pytest.mark.parametrize(
    'shape, message',
    [
        ((1, 3, 0, 64), r'images must be \(B, in_channels=3, H, W\), got \(1, 3, 0, 64\)'),
        ((1, 4, 64, 64), r'images must be \(B, in_channels=3, H, W\), got \(1, 4, 64, 64\)'),
        ((3, 64, 64), r'images must be \(B, in_channels=3, H, W\), got \(3, 64, 64\)'),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        build_msvit()(torch.randn(*shape))


@pytest.mark.parametrize('gate', ['MLPGate', 'FixedGate'])
def test_non_finite_pixels(gate):
    images = torch.zeros(1, 3, 64, 64)
    images[0, 0, 3, 3] = float('nan')
    with pytest.raises(FloatingPointError, match='pixels of the images must be finite, got 1 NaN'):
        build_msvit(gate=dict(type=gate))(images)


def test_non_finite_gate_weights():
    model = build_msvit()
    model.gate.embed.weight.data.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='gate logits must be finite'):
        model.train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['test', 'trimmed', 'active'])
def test_torch_compile_gives_the_same(mode):
    """By tracing alone: the number of tokens depends on the image, so that the graph breaks where they are counted."""
    train_tokens = 'active' if mode == 'test' else mode
    model = build_msvit(num_layers=1, out_indices=(0,), train_tokens=train_tokens, **LEARNED).train(mode != 'test')
    compiled, results = torch.compile(model, backend='eager'), []
    for run in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        outputs = [run(torch.randn(2, 3, 64, width))[0] for width in (64, 96)]
        if mode != 'test':
            sum(out.square().mean() for out in outputs).backward()
            outputs += [parameter.grad for parameter in model.gate.parameters()]
            model.pop_gate_losses([])
        results.append(outputs)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_smaller_image_at_test_time_alone():
    """It is what the backbone makes of a smaller image; costs are counted against the whole one's."""
    model = build_msvit(input_scale=0.7, gate=dict(type='VarianceGate'), with_cls_token=True).eval()
    images = torch.randn(2, 3, 90, 130)
    with record_tokens(model) as seen, torch.no_grad():
        out = model(images)[-1]
    ((tokens, _),) = seen
    assert out.shape[2:] == tokens.grid == (4, 6) and tokens.dense_grid == (6, 9) and tokens.dense_length == 55
    cost = pass_costs(model, tokens)[0]
    assert cost['dense_tokens'] == 55 and cost['dense_encoder'] == sum(layer.macs(55) for layer in model.layers)
    small = torch.nn.functional.interpolate(images, (64, 96), mode='bilinear', antialias=True)
    model.input_scale = 1.0
    with record_tokens(model) as seen:
        torch.testing.assert_close(model(small)[-1], out)
    assert seen[0][0].dense_grid is None
    model.input_scale = 0.7
    assert model.train()(images)[-1].shape[2:] == (6, 9)
    with pytest.raises(ValueError, match=r'input_scale must be in \(0, 1\], got 1.5'):
        build_msvit(input_scale=1.5)


def test_what_is_frozen_is_all_of_the_vit_and_none_of_the_gate():
    options = dict(layer_scale_init_value=0.1, ffn_type='swiglu', num_register_tokens=2, out_detail='residual')
    model = build_msvit(frozen_exclude=['layers.1.'], **options)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = {name for name, _ in model.named_parameters() if name.startswith(('gate.', 'out_details.', 'gate_losses.'))}
    last = {name for name, _ in model.named_parameters() if name.startswith('layers.1.')}
    assert ours and learns == ours | last


@pytest.mark.parametrize('image, padded', [((97, 97), (97, 97)), ((225, 257), (225, 257)), ((200, 300), (208, 304))])
@pytest.mark.parametrize('input_scale', [1.0, 0.85])
def test_the_size_of_what_was_embedded_without_its_padding(image, padded, input_scale):
    """Seen on an image that is white, within padding that is black."""
    model = build_msvit(input_scale=input_scale)
    pixels = torch.zeros(1, 3, *padded)
    pixels[..., : image[0], : image[1]] = 1
    with torch.no_grad(), record_tokens(model) as seen:
        model(pixels)
    sample = SegDataSample(metainfo=dict(img_shape=image, pad_shape=padded))
    height, width = seen_size(model, seen[0][0], sample)
    white = shrink(pixels, model.patch_size, input_scale)[0, 0]
    assert white[:, 0].sum().item() == pytest.approx(height, abs=0.6)
    assert white[0].sum().item() == pytest.approx(width, abs=0.6)
