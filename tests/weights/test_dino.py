"""DINOv2 and DINOv3: each format of files is made by the library that owns it, and compared by its features."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import check_features, random, tiny_segmentor
from mmseg.registry import MODELS
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv
from timm.models.eva import checkpoint_filter_fn as read_dinov3
from timm.models.vision_transformer import checkpoint_filter_fn as read_dinov2

from mmseg_msvit import load_backbone
from mmseg_msvit.weights.checkpoint import GATES, fit
from mmseg_msvit.weights.resampling import resample_patch

pytest.importorskip('transformers')

from transformers import (  # noqa: E402
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()

COMMON = dict(layer_scale_init_value=1e-5, final_norm=True, gate=dict(type='FixedGate', coarse=False))
V2 = dict(patch_size=14, scales=(14, 28), norm_cfg=dict(type='LN', eps=1e-6), **COMMON)
V3 = dict(num_register_tokens=4, rope='dinov3', qkv_bias='qv', norm_cfg=dict(type='LN', eps=1e-5), **COMMON)
TINY = dict(embed_dims=32, num_layers=3, num_heads=2)
TIMM = dict(embed_dim=32, depth=3, num_heads=2)
# The model's own size, another square, the multiple of 14 or 16 that is next to 480x360, and one that is not square.
SIZES = {14: [(70, 70), (126, 126), (476, 364), (42, 84)], 16: [(64, 64), (128, 128), (480, 352), (32, 96)]}


def msvit(path=None, **options):
    init = {} if path is None else dict(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    patch = options.get('patch_size', 16)
    model = MODELS.build({'type': 'MSViT', 'img_size': SIZES[patch][0], **TINY, **options, **init})
    model.init_weights()
    return model.eval()


def of_transformers(source):
    return lambda images: source(images).last_hidden_state


def save(weights, path):
    torch.save(weights, path)
    return path


def on_disk(source, path):
    """transformers writes other names than it has in memory."""
    source.save_pretrained(path)
    return path / 'model.safetensors'


@pytest.mark.parametrize('how', ['init_cfg', 'pretrained'])
def test_real_weights_in_half_precision(how, shared):
    path = str(shared('weights/dinov2_vits14_hf_fp16.safetensors'))
    init = dict(pretrained=path) if how == 'pretrained' else dict(init_cfg=dict(type='Pretrained', checkpoint=path))
    model = MODELS.build(dict(type='MSViT', img_size=518, embed_dims=384, num_heads=6, **V2, **init))
    model.init_weights()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    how_to_read = dict(config=config, state_dict=load_file(path), dtype=torch.float32, output_loading_info=True)
    source, report = Dinov2Model.from_pretrained(None, **how_to_read)
    assert report['missing_keys'] == {'embeddings.mask_token'} and not report['unexpected_keys']
    sizes = [(224, 224), (98, 154)] if how == 'init_cfg' else [(28, 28)]
    check_features(model.eval(), of_transformers(source), *sizes)


@pytest.mark.parametrize('where', ['disk', 'memory', 'whole'])
@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2_of_transformers(where, ffn, registers, tmp_path):
    config, kind = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14)
    more = dict(num_register_tokens=registers) if registers else {}
    source = random(kind(config(use_swiglu_ffn=ffn == 'swiglu', **shape, **more)))
    path = save(source.state_dict(), tmp_path / 'a.pth') if where == 'memory' else on_disk(source, tmp_path)
    if where == 'whole':
        path = save({f'dinov2.{name}': tensor for name, tensor in load_file(path).items()}, tmp_path / 'a.pth')
    mode = 'bicubic-antialias' if registers else 'bicubic'
    model = msvit(path, ffn_type=ffn, num_register_tokens=registers, interpolate_mode=mode, **V2)
    check_features(model, of_transformers(source), *(SIZES[14] if where == 'disk' else SIZES[14][:1]))


def timm_dinov2(ffn, registers):
    name = 'vit_giant_patch14_dinov2' if ffn == 'swiglu' else 'vit_small_patch14_dinov2'
    more = dict(mlp_ratio=5.5) if ffn == 'swiglu' else {}
    if registers:
        name = name.replace('14_', '14_reg4_')
    return random(timm.create_model(name, img_size=70, dynamic_img_size=True, **TIMM, **more))


def official_dinov2(source, ffn, chunked):
    """The official names; timm reads them too, which the test uses to check that they are."""
    weights = {name: t for name, t in source.state_dict().items()}
    weights['mask_token'] = torch.randn(1, 32)
    if 'reg_token' in weights:
        weights['register_tokens'] = weights.pop('reg_token')
        # The official cls token has a position of its own.
        position = torch.randn(1, 1, 32)
        weights['pos_embed'] = torch.cat((position, weights['pos_embed']), 1)
        weights['cls_token'] = weights['cls_token'] - position
    if ffn == 'swiglu':
        weights = {name.replace('fc1', 'w12').replace('fc2', 'w3'): tensor for name, tensor in weights.items()}
    if chunked:
        weights = {
            re.sub(r'^blocks\.(\d+)', lambda m: f'blocks.{int(m[1]) // 2}.{m[1]}', n): weights[n] for n in weights
        }
    return weights


@pytest.mark.parametrize('layout', ['timm', 'official', 'chunked'])
@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2_of_timm_and_official(layout, ffn, registers, tmp_path):
    source = timm_dinov2(ffn, registers)
    weights = source.state_dict()
    if layout != 'timm':
        weights = official_dinov2(source, ffn, layout == 'chunked')
        if layout == 'official':
            again = timm_dinov2(ffn, registers)
            again.load_state_dict(read_dinov2(dict(weights), again))
            images = torch.randn(1, 3, 70, 70)
            torch.testing.assert_close(again(images), source(images))
        else:
            weights = {'student': {}, 'teacher': {f'backbone.{name}': tensor for name, tensor in weights.items()}}
    # timm resamples positions with antialiasing, where the official model without registers has none.
    options = dict(num_register_tokens=registers, ffn_type=ffn, interpolate_mode='bicubic-antialias', **V2)
    model = msvit(save(weights, tmp_path / 'a.pth'), **options)
    check_features(model, source.forward_features, *(SIZES[14] if layout == 'timm' else SIZES[14][:1]))


@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_dinov2_of_mmpretrain(ffn, tmp_path):
    from mmpretrain.models import VisionTransformer

    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=128)
    more = dict(layer_cfgs=dict(ffn_type='swiglu_fused')) if ffn == 'swiglu' else {}
    options = dict(img_size=70, patch_size=14, layer_scale_init_value=1e-5, out_type='featmap', **more)
    source = random(VisionTransformer(arch=arch, **options))
    path = save({'state_dict': source.state_dict()}, tmp_path / 'a.pth')
    check_features(msvit(path, ffn_type=ffn, **V2), lambda images: source(images)[-1], *SIZES[14])


@pytest.mark.parametrize('where', ['disk', 'memory'])
@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_dinov3_of_transformers(where, ffn, tmp_path):
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, num_register_tokens=4)
    hidden = (
        dict(use_gated_mlp=True, hidden_act='silu', intermediate_size=88)
        if ffn == 'swiglu'
        else dict(intermediate_size=128)
    )
    source = random(DINOv3ViTModel(DINOv3ViTConfig(**shape, **hidden)))
    path = on_disk(source, tmp_path) if where == 'disk' else save(source.state_dict(), tmp_path / 'a.pth')
    sizes = SIZES[16] if where == 'disk' else SIZES[16][:1]
    check_features(msvit(path, ffn_type=ffn, **V3), of_transformers(source), *sizes)


def test_dinov3_of_transformers_without_registers(tmp_path):
    """It writes an empty tensor of them."""
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, intermediate_size=128)
    source = random(DINOv3ViTModel(DINOv3ViTConfig(**shape, num_register_tokens=0)))
    model = msvit(on_disk(source, tmp_path), **{**V3, 'num_register_tokens': 0})
    check_features(model, of_transformers(source), *SIZES[16][:1])


def timm_dinov3(ffn, bias):
    name = 'vit_small_plus_patch16_dinov3' if ffn == 'swiglu' else 'vit_small_patch16_dinov3'
    more = dict(mlp_ratio=2.75) if ffn == 'swiglu' else {}
    return random(timm.create_model(name + ('_qkvb' if bias else ''), img_size=64, **TIMM, **more))


def official_dinov3(source):
    weights = {}
    for name, tensor in source.state_dict().items():
        for theirs, official in (('reg_token', 'storage_tokens'), ('gamma_', 'ls'), ('fc1_g', 'w1'), ('fc1_x', 'w2')):
            name = name.replace(theirs, official)
        weights[re.sub(r'(\.ls\d)$', r'\1.gamma', name)] = tensor
    for block in range(3):
        name = f'blocks.{block}.attn.'
        q, v = weights.pop(f'{name}q_bias'), weights.pop(f'{name}v_bias')
        weights[f'{name}qkv.bias'] = torch.cat((q, torch.randn(32), v))
        weights[f'{name}qkv.bias_mask'] = torch.cat((torch.ones(32), torch.zeros(32), torch.ones(32)))
        if f'blocks.{block}.mlp.w1.weight' in weights:
            for kind in ('weight', 'bias'):
                weights[f'blocks.{block}.mlp.w3.{kind}'] = weights.pop(f'blocks.{block}.mlp.fc2.{kind}')
    more = {'mask_token': torch.randn(1, 32), 'rope_embed.periods': torch.randn(4)}
    return {**weights, **more, 'local_cls_norm.weight': torch.randn(32), 'local_cls_norm.bias': torch.randn(32)}


@pytest.mark.parametrize('layout', ['timm', 'timm without bias', 'official'])
@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_dinov3_of_timm_and_official(layout, ffn, tmp_path):
    source = timm_dinov3(ffn, layout != 'timm without bias')
    weights = source.state_dict()
    if layout == 'official':
        weights = official_dinov3(source)
        again = timm_dinov3(ffn, True)
        again.load_state_dict(read_dinov3(dict(weights), again))
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(again(images), source(images))
    path = save(weights, tmp_path / 'a.pth')
    sizes = SIZES[16] if layout == 'timm' else SIZES[16][:1]
    # A bias of the keys would be used, were it not masked out of the file.
    check_features(msvit(path, ffn_type=ffn, **{**V3, 'qkv_bias': True}), source.forward_features, *sizes)


def test_dinov3_has_no_table_of_positions():
    """mmseg's constructor makes one, and its initialisation fills it."""
    model = msvit(**V3)
    assert not any('pos_embed' in name for name in model.state_dict())
    assert not any('pos_embed' in name for name, _ in model.named_parameters())


@pytest.mark.parametrize('name, options', [
    ('vit_base_patch14_reg4_dinov2', dict(embed_dims=768, num_heads=12)),
    ('vit_large_patch14_dinov2', dict(embed_dims=1024, num_heads=16)),
    ('vit_giant_patch14_reg4_dinov2', dict(embed_dims=1536, num_heads=24, ffn_type='swiglu')),
    ('vit_huge_plus_patch16_dinov3_qkvb', dict(embed_dims=1280, num_heads=20, ffn_type='swiglu', mlp_ratio=6)),
])  # fmt: skip
def test_shapes_of_the_larger_ones(name, options):
    """One block of each."""
    registers = 4 if 'reg4' in name or 'dinov3' in name else 0
    family = V3 if 'dinov3' in name else dict(V2, img_size=518)
    with torch.device('meta'):
        source = timm.create_model(name, depth=1)
    model = MODELS.build({'type': 'MSViT', **family, **options, 'num_register_tokens': registers, 'num_layers': 1})
    model.to('meta')
    fitted, report = fit(model, source.state_dict())
    assert set(fitted) == set(model.state_dict()) and report.unused == []


def test_weights_are_there_after_all_is_initialised(tmp_path):
    """A segmentor's initialisation, which a runner asks for on every rank, comes after and leaves them."""
    source = timm_dinov2('mlp', 4)
    init = dict(type='Pretrained', checkpoint=str(save(source.state_dict(), tmp_path / 'a.pth')))
    model = MODELS.build(tiny_segmentor(img_size=70, init_cfg=init, num_register_tokens=4, **TINY, **V2))
    model.init_weights()
    check_features(model.backbone.eval(), source.forward_features, *SIZES[14][:1])


def test_layer_scales_are_taken_or_folded(tmp_path):
    """Features are the same, and those of the model that keeps them can be trained further as they were."""
    for ffn in ('mlp', 'swiglu'):
        source = timm_dinov2(ffn, 0)
        path = save(source.state_dict(), tmp_path / 'a.pth')
        kept = msvit(path, ffn_type=ffn, **V2)
        assert torch.equal(kept.layers[1].gamma_2, source.blocks[1].ls2.gamma)
        folded = msvit(path, ffn_type=ffn, **{**V2, 'layer_scale_init_value': 0})
        assert 'layers.0.gamma_1' not in folded.state_dict()
        check_features(folded, source.forward_features, *SIZES[14][:1])


def dinov2_weights(**options):
    return msvit(**{**V2, **options}).state_dict()


@pytest.mark.parametrize('weights, ours, wrong, advice', [
    (dict(layer_scale_init_value=0), V2, 'layers.0.gamma_1 is missing', 'layer_scale_init_value=0'),
    (dict(num_register_tokens=4), V2, 'register_tokens finds no place', 'num_register_tokens'),
    (dict(num_register_tokens=4), dict(V2, num_register_tokens=2),
     r'register_tokens \(1, 4, 32\), wanted \(1, 2, 32\)', 'num_register_tokens'),
    (dict(), dict(V2, num_register_tokens=4), 'register_tokens is missing', 'num_register_tokens=0'),
    (dict(ffn_type='swiglu'), V2, 'layers.0.ffn.w12.weight finds no place', 'ffn_type'),
    (dict(), dict(V2, ffn_type='swiglu'), 'layers.0.ffn.layers.0.0.weight finds no place', 'ffn_type'),
    (dict(ffn_type='swiglu', mlp_ratio=3), dict(V2, ffn_type='swiglu'), r'w3.weight \(32, 64\)', 'mlp_ratio'),
    (dict(), dict(V2, qkv_bias=False), 'in_proj_bias finds no place', 'qkv_bias=True'),
    (dict(final_norm=False), V2, 'ln1.weight is missing', 'final_norm=False'),
    (dict(patch_size=16, scales=(16, 32)), dict(V2, img_size=(64, 64)), r'\(32, 3, 16, 16\), wanted \(32, 3, 14, 14\)',
     'patch_size, or resample_patch=True in init_cfg'),
    (dict(), dict(V2, in_channels=4), r'\(32, 3, 14, 14\), wanted \(32, 4, 14, 14\)',
     r'in_channels, or repeat_channels=True in init_cfg \(for another patch_size resample_patch=True\)'),
    (dict(rope='dinov3'), V2, 'pos_embed is missing', "rope='dinov3' or .*"),
    (dict(), dict(V2, rope='dinov3'), 'pos_embed finds no place', 'rope=None or .*'),
])  # fmt: skip
def test_what_is_of_another_kind_is_refused_with_what_to_set(weights, ours, wrong, advice):
    weights = dinov2_weights(**weights)
    with pytest.raises(ValueError, match=f"(?s)fit: .*{wrong}.*Set the backbone's {advice}\n"):
        fit(msvit(**ours), weights)


@pytest.mark.parametrize('old, new', [(14, 16), (7, 14)])
def test_a_patch_embedding_of_another_size_is_resampled_if_asked(old, new, tmp_path):
    """A patch that is magnified keeps its token, to the last digit."""

    def build(patch, **options):
        shape = dict(img_size=4 * patch, patch_size=patch, scales=(patch, 2 * patch), **TINY, **COMMON)
        return MODELS.build(dict(type='MSViT', **shape, **options))

    source = random(build(old))
    init = dict(type='Pretrained', checkpoint=str(save(source.state_dict(), tmp_path / 'a.pth')))
    with pytest.raises(ValueError, match='resample_patch=True'):
        build(new, init_cfg=init).init_weights()
    model = build(new, init_cfg=dict(init, resample_patch=True))
    model.init_weights()
    small = torch.randn(1, 3, 4 * old, 4 * old, dtype=torch.float64)
    patches = small.unflatten(3, (4, old)).unflatten(2, (4, old)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    large = F.interpolate(patches, (new, new), mode='bilinear')
    weight = resample_patch(source.patch_embed.projection.weight.detach().double(), (new, new))
    torch.testing.assert_close(model.patch_embed.projection.weight.double(), weight, rtol=1e-5, atol=1e-6)
    wanted = F.conv2d(patches, source.patch_embed.projection.weight.double())
    torch.testing.assert_close(F.conv2d(large, weight), wanted)


@pytest.mark.parametrize('channels', [1, 2, 4, 12])
def test_a_patch_embedding_for_other_channels_is_timms_if_asked(channels, tmp_path):
    weights = dinov2_weights()
    torch.save(weights, tmp_path / 'vit.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
    with pytest.raises(ValueError, match='repeat_channels=True in init_cfg'):
        msvit(**V2, in_channels=channels, init_cfg=init).init_weights()
    model = msvit(**V2, in_channels=channels, init_cfg=dict(init, repeat_channels=True))
    model.init_weights()
    three = msvit(**V2, init_cfg=init)
    three.init_weights()
    wanted = adapt_input_conv(channels, three.patch_embed.projection.weight.detach())
    torch.testing.assert_close(model.patch_embed.projection.weight.detach(), wanted)
    loaded = load_backbone(weights, in_channels=channels, num_heads=2)
    torch.testing.assert_close(loaded.patch_embed.projection.weight.detach(), wanted)
    if channels == 1:  # a grey image has the tokens that it has as a coloured one
        grey = torch.randn(1, 1, 56, 56)
        torch.testing.assert_close(
            model.eval().patch_embed.projection(grey), three.eval().patch_embed.projection(grey.expand(-1, 3, -1, -1))
        )


def test_a_patch_embedding_of_any_size_is_loaded_if_it_is_given():
    backbone = load_backbone(dinov2_weights(), patch_size=16, num_heads=2)
    assert backbone.scales == (16, 32) and backbone(torch.randn(1, 3, 64, 80))[-1].shape[2:] == (4, 5)


def test_a_patch_embedding_that_shrinks_is_the_nearest_one():
    """No smaller patch holds all of a larger one: what is left is at right angles to all that it can hold."""
    weight = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    shrunk = resample_patch(weight, (14, 14))
    unit = torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    resize = F.interpolate(unit, (14, 14), mode='bilinear', antialias=True).flatten(1).T  # (196, 256)
    left = shrunk.flatten(2) @ resize - weight.flatten(2)  # (2, 3, 256)
    torch.testing.assert_close(left @ resize.T, torch.zeros(2, 3, 196, dtype=torch.float64))


def test_each_output_is_normed_as_transformers_backbone_norms_it(tmp_path):
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14)
    source = random(Dinov2Backbone(Dinov2Config(out_indices=[1, 3], **shape)))
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    model = msvit(tmp_path / 'a.pth', **V2, out_indices=(0, 2), norm_outputs=True)
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        wanted, found = source(images).feature_maps, model(images)
        plain = msvit(tmp_path / 'a.pth', **V2, out_indices=(0, 2))(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain[1], found[1]) and not torch.allclose(plain[0], found[0], atol=0.1)
    with pytest.raises(ValueError, match='norm_outputs=True wants final_norm=True'):
        msvit(**{**V2, 'final_norm': False}, norm_outputs=True)


@pytest.mark.parametrize('gate', ['MLPGate', 'ContextGate'])
@pytest.mark.parametrize('scales', [(14, 28), (14, 28, 56)])
def test_a_trained_gate_goes_along_to_other_channels_and_patches(gate, scales, tmp_path):
    """A grey image has the answers that it has as a coloured one, and no tensor of a gate is left to chance."""
    source = random(msvit(**{**V2, 'scales': scales, 'gate': dict(type=gate)})).eval()
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'), repeat_channels=True)
    one = msvit(**{**V2, 'scales': scales, 'gate': dict(type=gate)}, in_channels=1, init_cfg=init)
    one.init_weights()
    grey = torch.randn(1, 1, 112, 112)
    for model in (one.eval(), load_backbone(source.state_dict(), in_channels=1, num_heads=2)):
        wanted, got = source.tokenize(grey.expand(-1, 3, -1, -1))[2].logits, model.tokenize(grey)[2].logits
        assert len(got) == len(scales) - 1
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    larger = load_backbone(source.state_dict(), patch_size=16, num_heads=2).state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith(GATES) and tensor.shape == larger[name].shape:
            torch.testing.assert_close(larger[name], tensor)
        elif name.endswith('embed.weight') and name.startswith(GATES):
            old, new = (weight.unflatten(1, (3, -1)).shape[2] ** 0.5 for weight in (tensor, larger[name]))
            wanted = resample_patch(tensor.unflatten(1, (3, int(old), int(old))), (int(new), int(new))).flatten(1)
            torch.testing.assert_close(larger[name], wanted)


def test_a_trained_gate_that_does_not_fit_is_refused(tmp_path):
    source = random(msvit(**{**V2, 'gate': dict(type='MLPGate')}))
    with pytest.raises(ValueError, match=r'wanted the gate .* gate\.embed\.weight \(.*\), wanted \('):
        load_backbone(source.state_dict(), scales=(14, 56), num_heads=2)
    with pytest.raises(ValueError, match='scales: wanted as many levels as the checkpoint has gates for, got'):
        load_backbone(source.state_dict(), scales=(14, 28, 56), num_heads=2)
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
    with pytest.raises(ValueError, match=r'delete the tensors below gate\. from the file'):
        msvit(**{**V2, 'scales': (14, 56), 'gate': dict(type='MLPGate')}, init_cfg=init).init_weights()
