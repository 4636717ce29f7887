"""The invariants of mixed-scale tokens for every family of plain ViTs, with two scales and with three."""

import dataclasses

import pytest
import torch
from conftest import force_random_logits, no_noise, randomize, use_plain_attention
from mmseg.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmseg_msvit.gates.from_outside import as_dense
from mmseg_msvit.measuring.flops import dense_macs
from mmseg_msvit.tokens.token_map import PackedTokens
from mmseg_msvit.tooling.baselines import dense_forward
from mmseg_msvit.vit.blocks import block_of

SMALL = dict(img_size=(64, 96), embed_dims=32, num_layers=2, num_heads=2, out_indices=(0, 1), final_norm=True)
FAMILIES = {
    'vit': dict(type='MSViT'),
    'dinov2': dict(type='MSViT', patch_size=14, layer_scale_init_value=0.1, num_register_tokens=4),
    'dinov2-g': dict(type='MSViT', patch_size=14, layer_scale_init_value=0.1, ffn_type='swiglu'),
    'dinov3': dict(type='MSViT', layer_scale_init_value=0.1, num_register_tokens=4, rope='dinov3', qkv_bias='qv'),
    'beit': dict(type='MSBEiT'),
    'mae': dict(type='MSMAE'),
}
LEVELS = [1, 2]
MODES = ['all', 'trimmed', 'active']


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def build(family, levels=1, **options):
    patch = family.get('patch_size', 16)
    scales = tuple(patch * 2**level for level in range(levels + 1))
    model = MODELS.build({**SMALL, 'scales': scales, **family, **options})
    model.init_weights()
    randomize(model)
    return model.eval()


def pixels(model, rows, columns, images=2):
    """Images of so many patches, less a few pixels."""
    patch = model.patch_size
    return torch.randn(images, 3, rows * patch - 5, columns * patch - 3, dtype=next(model.parameters()).dtype)


@pytest.mark.parametrize('levels', LEVELS)
@pytest.mark.parametrize('mode', MODES)
def test_training_output_is_the_packed_test_output(family, levels, mode, monkeypatch):
    model = build(family, levels, train_tokens=mode)
    force_random_logits(model, 2, (5, 7))
    images = pixels(model, 5, 7)
    with torch.no_grad():
        wanted = model(images)
    no_noise(monkeypatch)
    tokens = []
    model.select.register_forward_hook(lambda m, a, out: tokens.append(out[0]))
    outputs = model.train()(images)
    assert tokens[0].masked == (mode != 'active') and set(tokens[0].level.tolist()) >= set(range(levels + 1))
    for a, b in zip(outputs, wanted, strict=True):
        assert a.shape == (2, 32, 5, 7)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('more', [{}, dict(norm_outputs=True), dict(out_type=('grid', 'tokens'))])
def test_the_dense_form_is_the_model_all_fine(family, more):
    if 'norm_outputs' in more and family['type'] != 'MSViT':
        pytest.skip('an option of MSViT')
    model = build(family, **more)
    images = pixels(model, 5, 7)
    with torch.no_grad(), as_dense(model):
        outputs, wanted = dense_forward(model, images), model(images)
    for a, b in zip(outputs, wanted, strict=True):
        a, b = (x.x if isinstance(x, PackedTokens) else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('levels', LEVELS)
def test_a_batch_is_its_images_in_any_order(family, levels):
    model = build(family, levels, gate=dict(type='VarianceGate'))
    images = pixels(model, 4, 6, images=4)
    images[0] = 0
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        together, permuted = model(images), model(images[order])
        alone = [model(image[None]) for image in images]
    for i, out in enumerate(together):
        torch.testing.assert_close(permuted[i], out[order], rtol=1e-4, atol=1e-5)
        for image in range(4):
            torch.testing.assert_close(alone[image][i][0], out[image], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('logit', [9.0, -9.0, None])
def test_each_parameter_gets_a_gradient(family, mode, logit):
    model = build(family, 2, train_tokens=mode, coarse_embed='resize+detail').train()
    if logit is not None:
        for gate in model.gates:
            gate.register_forward_hook(lambda m, a, out: torch.full_like(out, logit) + out - out.detach())
    loss = sum(o.square().mean() for o in model(pixels(model, 5, 7)))
    gate = model.pop_gate_losses([])
    (loss + sum(value for name, value in gate.items() if name.startswith('loss'))).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('mode', ['trimmed', 'active'])
def test_checkpointing_changes_nothing(family, mode):
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(family, 2, train_tokens=mode, drop_path_rate=0.5).train()
        model.with_cp = with_cp  # mmseg's BEiT and MAE have no argument for it
        force_random_logits(model, 2, (5, 7))
        torch.manual_seed(1)
        outputs = model(pixels(model, 5, 7))
        sum(o.square().sum() for o in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('levels', LEVELS)
def test_gradients_are_those_of_the_definition(family, levels, monkeypatch):
    """In float64: against the plain attention, and by finite differences through the tokens' weights."""
    grads = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = build(family, levels, train_tokens='trimmed', coarse_embed='resize+detail').double().train()
        force_random_logits(model, 2, (4, 6))
        images = pixels(model, 4, 6)
        if plain:
            use_plain_attention(monkeypatch)
        sum(o.square().sum() for o in model(images)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any('gate' in name for name in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)

    model.select.train_tokens = 'all'
    images, tokens, _ = model.tokenize(images)
    places = model.places(tokens)

    def run(weight):
        batch = dataclasses.replace(tokens, weight=weight)
        return batch.to_grid(model.layers[0](model.embed(images, batch), batch, places))

    weight = tokens.weight.detach().double().requires_grad_()
    assert 0 in weight and torch.autograd.gradcheck(run, weight, atol=1e-6, fast_mode=True)


def test_each_pixel_has_a_gradient(family):
    model = build(family, 2, gate=dict(type='FixedGate', coarse=True))
    images = pixels(model, 5, 7).requires_grad_()
    model(images)[-1].square().sum().backward()
    assert (images.grad != 0).all()


def test_stochastic_depth_is_drawn_for_each_image(family):
    model = build(family, drop_path_rate=0.9, out_indices=(1,), gate=dict(type='FixedGate')).train()
    image = torch.randn(1, 3, 40, 40).expand(64, -1, -1, -1)
    (out,) = model(image)
    kinds = out.flatten(1).unique(dim=0)
    both = model.layers[1].drops[0] > 0  # of the attention and of the MLP, where the family has it on both
    assert 2 <= len(kinds) <= (4 if both else 2)


@pytest.mark.parametrize('levels', LEVELS)
def test_macs_are_those_of_the_operators(family, levels, monkeypatch):
    use_plain_attention(monkeypatch)  # fused attention counts zero on CPU
    model = build(family, levels, coarse_embed='resize+detail')
    force_random_logits(model, 3, (5, 7))
    images, tokens, _ = model.tokenize(pixels(model, 5, 7, images=3))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels(model, 5, 7, images=3))
        total = counter.get_total_flops() / 2
    relative = model.places(tokens).relative
    if relative is not None:  # the filtering of its tables is no matrix product of tokens
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for layer in model.layers:
                relative.filter(layer.attn.relative_position_bias_table)
        total -= counter.get_total_flops() / 2
    counted = model.macs(tokens)
    assert sum(sum(image.values()) for image in counted) == pytest.approx(total, rel=1e-3)
    assert len({image['encoder'] for image in counted}) > 1
    dense = dense_macs(model, (5, 7))['encoder']
    assert all(image['encoder'] < dense for image in counted)


@pytest.mark.parametrize('kind', ['VisionTransformer', 'BEiT', 'MAE'])
def test_a_layer_that_is_not_known_in_every_part_is_refused(kind):
    layer = MODELS.build(dict(type=kind, **SMALL)).layers[0]
    block_of(layer)
    layer.ffn.gamma2 = torch.nn.Linear(32, 32)
    with pytest.raises(TypeError, match='layer: .* layer scale of its own is not known'):
        block_of(layer)
    with pytest.raises(TypeError, match='layer must be an encoder layer of .*torch.nn.modules.linear.Linear'):
        block_of(torch.nn.Linear(3, 3))
    layer = MODELS.build(dict(type='VisionTransformer', **SMALL)).layers[0]
    layer.attn.dropout_layer = torch.nn.Dropout(0.3)
    with pytest.raises(TypeError, match='layer: Dropout.* after a branch is not known'):
        block_of(layer)
