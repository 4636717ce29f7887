"""A backbone from weights alone: features of all fine tokens are those of the library that made the weights."""

import doctest

import pytest
import timm
import torch
from conftest import build_msvit, check_features, random
from mmseg.models.backbones import BEiT, VisionTransformer
from safetensors.torch import load_file

from mmseg_msvit import load_backbone, loading, pass_costs, record_tokens
from mmseg_msvit.gates.from_outside import deciding_by
from mmseg_msvit.measuring.inspection import coarse_regions

FINE = dict(gate=dict(type='FixedGate'))


def test_doctest():
    result = doctest.testmod(loading)
    assert result.attempted > 5 and result.failed == 0


@pytest.mark.parametrize('name, options, told', [
    ('vit_small_patch16_224', dict(img_size=64), dict(num_heads=6, final_norm=True, rope=None)),
    ('vit_tiny_patch16_224', dict(img_size=64, mlp_ratio=2, class_token=False, global_pool='avg', fc_norm=False),
     dict(num_heads=3, with_cls_token=False)),
    ('vit_small_patch14_reg4_dinov2', dict(img_size=70),
     dict(patch_size=14, scales=(14, 28), pos_grid=(5, 5), interpolate_mode='bicubic-antialias')),
    ('vit_giant_patch14_dinov2', dict(img_size=70, embed_dim=128, num_heads=2, mlp_ratio=5.375), dict(num_heads=2)),
    ('vit_small_patch16_dinov3', dict(img_size=64), dict(rope='dinov3')),
])  # fmt: skip
def test_timm(name, options, told):
    source = random(timm.create_model(name, depth=2, **options))
    backbone = load_backbone(source.state_dict(), **FINE)
    found = {**vars(backbone), 'num_heads': backbone.layers[0].attn.num_heads}
    assert {key: found[key] for key in told} == told and len(backbone.layers) == 2
    check_features(backbone, source.forward_features, (options['img_size'],) * 2)


def test_transformers_dinov3():
    """Whose names differ from those of timm, and whose norms have another eps than all others'."""
    library = pytest.importorskip('transformers')
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128)
    source = random(library.DINOv3ViTModel(library.DINOv3ViTConfig(num_register_tokens=4, **shape)))
    backbone = load_backbone(source.state_dict(), **FINE)
    assert backbone.layers[0].ln1.eps == 1e-5 and backbone.register_tokens.shape[1] == 4
    check_features(backbone, lambda images: source(images).last_hidden_state, (48, 80))


def test_the_real_dinov2(shared):
    path = shared('weights/dinov2_vits14_hf_fp16.safetensors')
    library = pytest.importorskip('transformers')
    config = library.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    how = dict(config=config, state_dict=load_file(path), dtype=torch.float32)
    source = library.Dinov2Model.from_pretrained(None, **how)
    backbone = load_backbone(path, **FINE)
    assert backbone.pos_grid == (37, 37) and backbone.layers[0].gamma_1 is not None
    check_features(backbone, lambda images: source(images).last_hidden_state, (98, 154))


@pytest.mark.parametrize('kind', [VisionTransformer, BEiT])
def test_mmseg(kind, tmp_path):
    """In a segmentor's checkpoint, where the ViT is one part; its heads are not 64 wide."""
    options = dict(img_size=64, embed_dims=32, num_layers=2, num_heads=4, norm_cfg=dict(type='LN', eps=1e-6))
    source = random(kind(**options))
    weights = {f'backbone.{name}': tensor for name, tensor in source.state_dict().items()}
    torch.save({'state_dict': {**weights, 'decode_head.conv_seg.weight': torch.zeros(3, 3)}}, tmp_path / 'a.pth')
    heads = dict(num_heads=4) if kind is VisionTransformer else {}  # a table of relative positions tells them
    backbone = load_backbone(tmp_path / 'a.pth', **heads, **FINE)
    assert isinstance(backbone, kind)
    check_features(backbone, lambda images: source(images)[-1])


@pytest.mark.parametrize('gate', ['MLPGate', 'ContextGate', 'GlanceGate'])
@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
def test_a_backbone_of_ours_comes_back_whole(gate, scales):
    cfg = dict(type=gate, blocks=2) if gate == 'GlanceGate' else dict(type=gate)
    source = build_msvit(
        gate=cfg, scales=scales, num_heads=4, coarse_embed='resize+detail', out_detail='residual',
        out_indices=-1, img_size=(64, 96), ffn_type='swiglu', layer_scale_init_value=1, num_register_tokens=2,
        norm_cfg=dict(type='LN', eps=1e-6),
    )  # fmt: skip
    backbone = load_backbone(source.state_dict(), num_heads=4, interpolate_mode='bicubic', img_size=(64, 96))
    assert (
        type(backbone.gate).__name__ == gate
        and backbone.gate.blocks == source.gate.blocks
        and backbone.scales == scales
    )
    images = torch.randn(2, 3, 64, 96)
    logits = torch.cat([level.flatten() for level in source.tokenize(images)[2].logits])
    threshold = logits.sigmoid().median().item()
    decided = deciding_by(source, threshold), deciding_by(backbone, threshold)
    with torch.no_grad(), decided[0], decided[1], record_tokens(backbone) as seen:
        torch.testing.assert_close(backbone(images), source(images))
    assert 0 < coarse_regions(backbone, seen[0][0]).float().mean() < 1


@pytest.mark.parametrize('scales, size', [((16, 32), (64, 96)), ((16, 48), (96, 144)), ((16, 48, 96), (80, 144))])
def test_a_gate_tells_the_grid_that_the_positions_have(scales, size):
    source = build_msvit(gate=dict(type='MLPGate'), scales=scales, num_heads=4, img_size=size)
    backbone = load_backbone(source.state_dict(), num_heads=4, scales=scales)
    assert backbone.img_size == size and torch.equal(backbone.pos_embed, source.pos_embed)


def test_an_image_size_that_is_guessed_is_said(monkeypatch):
    lines = []
    monkeypatch.setattr('mmseg_msvit.loading.print_log', lambda line, *args, **options: lines.append(line))
    source = build_msvit(gate=dict(type='ContextGate'), num_heads=4, img_size=64, out_indices=-1)
    said = 'img_size is taken as 64x64: give it if the model had another'
    for options, count in ((dict(img_size=64), 0), ({}, 1)):
        load_backbone(source.state_dict(), num_heads=4, **options)
        assert lines.count(said) == count


def test_tokens_and_costs_without_a_gate_in_the_weights():
    """Half of the regions are coarse, the plain ones."""
    backbone = load_backbone(timm.create_model('vit_tiny_patch16_224', depth=2, img_size=64).state_dict())
    images = torch.zeros(1, 3, 64, 64)
    images[..., 32:] = torch.randn(64, 32)
    with torch.no_grad(), record_tokens(backbone) as seen:
        backbone(images)
    assert coarse_regions(backbone, seen[0][0]).tolist() == [[[True, False]] * 2]
    (cost,) = pass_costs(backbone, seen[0][0])
    assert cost['tokens'] == 1 + 2 + 8 and cost['encoder'] == sum(layer.macs(11) for layer in backbone.layers)


@pytest.mark.parametrize('name, options, message', [
    ('resnet18', {}, 'checkpoint: wanted a ViT in the layout of mmseg, .* got 122 tensors such as '),
    ('eva02_tiny_patch14_224', {}, 'got a SwiGLU without layer scale, as EVA-02, whose positions'),
    ('vit_base_patch16_rope_224', {}, "got positions neither as a table nor as DINOv3, .* rope='dinov3'"),
    ('vit_base_patch16_rope_reg1_gap_256', {}, 'got positions neither as a table nor as DINOv3'),
    ('vit_huge_patch14_224', {}, 'num_heads: the weights do not tell it, and ViTs of width 1280 have no common one'),
    ('vit_tiny_patch16_224', dict(embed_dim=32, num_heads=2), 'num_heads: .* of width 32'),
    ('vit_tiny_patch16_224', dict(mlp_ratio=2.5), 'MLP is a whole multiple of its width 192, got 480'),
    ('vit_tiny_patch16_224', dict(qk_norm=True), 'layers.0.attn.q_norm.weight finds no place'),
])  # fmt: skip
def test_what_cannot_be_told_is_refused(name, options, message):
    with torch.device('meta' if name.startswith('vit_huge') else 'cpu'):
        depth = {} if name == 'resnet18' else dict(depth=1)
        source = timm.create_model(name, **depth, **options)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        load_backbone(source.state_dict())


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.pth, which is not there'):
        load_backbone(tmp_path / 'nothing.pth')
    (tmp_path / 'broken.pth').write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='wanted a whole checkpoint, got .*broken.pth, which cannot be read'):
        load_backbone(tmp_path / 'broken.pth')
    with pytest.raises(ValueError, match='checkpoint: wanted tensors'):
        load_backbone({})
    with pytest.raises(TypeError, match=r'got Linear; of a model give model.state_dict\(\)'):
        load_backbone(torch.nn.Linear(1, 1))


def test_patches_of_another_shape_and_blocks_of_another_kind_are_refused():
    weights = build_msvit(out_indices=-1).state_dict()
    video = {**weights, 'patch_embed.projection.weight': torch.zeros(32, 3, 2, 16, 16)}
    with pytest.raises(ValueError, match=r'square patches \(C, channels, p, p\), got \(32, 3, 2, 16, 16\)'):
        load_backbone(video, num_heads=2)
    experts = {name.replace('ffn.', 'experts.'): tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r'layers.0.experts.layers.0.0.weight finds no place'):
        load_backbone(experts, num_heads=2)
