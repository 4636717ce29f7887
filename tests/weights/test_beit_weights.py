"""BEiT's and MAE's weights: made by the library that owns the format, and compared by its features."""

import re
from types import SimpleNamespace

import mmseg.models.backbones.beit as mmseg_beit
import pytest
import timm
import torch
from conftest import check_features, random, tiny_segmentor
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from mmseg.models.backbones import MAE, BEiT
from mmseg.registry import HOOKS, MODELS
from scipy.interpolate import RectBivariateSpline
from timm.models.beit import Beit as TimmBeit
from timm.models.vision_transformer import VisionTransformer as TimmViT

from mmseg_msvit.weights.checkpoint import fit
from mmseg_msvit.weights.resampling import resample_relative
from mmseg_msvit.weights.whole_models import load_segmentor

pytest.importorskip('transformers')

from transformers import BeitConfig, BeitModel  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()

EPS = dict(type='LN', eps=1e-6)
SMALL = dict(img_size=64, embed_dims=32, num_layers=3, num_heads=2, norm_cfg=EPS)
TIMM = dict(img_size=64, embed_dim=32, depth=3, num_heads=2)
BEIT = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
FAMILIES = {'BEiT': BEiT, 'MAE': MAE}
HEAD = dict(type='FCNHead', in_channels=32, channels=8, num_classes=5, in_index=0)


def build(family, path=None, **options):
    init = {} if path is None else dict(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    fine = dict(type='FixedGate', coarse=False)
    model = MODELS.build({'type': f'MS{family}', 'gate': fine, **SMALL, **init, **options})
    model.init_weights()
    return model.eval()


def save(weights, path):
    torch.save(weights, path)
    return path


@pytest.mark.parametrize('how', ['init_cfg', 'load_checkpoint', 'load_from'])
@pytest.mark.parametrize('kind', ['backbone', 'segmentor'])
@pytest.mark.parametrize('family', FAMILIES)
def test_mmsegs_own(family, kind, how, tmp_path):
    options = dict(SMALL, img_size=(64, 96), final_norm=True)
    source = dense = random(FAMILIES[family](**options))
    if kind == 'segmentor':
        source = MODELS.build(tiny_segmentor(type=family, **options))
        dense = random(source).backbone
    path = str(save({'state_dict': source.state_dict()}, tmp_path / 'a.pth'))
    if how == 'init_cfg':
        model = build(family, path, **options)
    else:
        fine = dict(type='FixedGate', coarse=False)
        config = tiny_segmentor(type=f'MS{family}', gate=fine, **options)
        if how == 'load_from':
            hooks = [dict(type='ViTWeightsHook')]
            name = dict(work_dir=str(tmp_path), experiment_name=tmp_path.name)
            runner = Runner.from_cfg(Config(dict(model=config, default_scope='mmseg', custom_hooks=hooks, **name)))
            runner.load_checkpoint(path)
            whole = runner.model
        else:
            whole = MODELS.build(config)
            load_checkpoint(whole if kind == 'segmentor' else whole.backbone, path)
        model = whole.backbone.eval()
        if kind == 'segmentor':
            assert torch.equal(whole.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    check_features(model, lambda images: dense(images)[-1], (64, 96))


@pytest.mark.parametrize('how', ['load_checkpoint', 'load_segmentor', 'ViTWeightsHook'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_whole_segmentor_by_older_names(family, how, tmp_path):
    """Of mmclassification, whose norms are norm1 and norm2, and whose attention is named as mmseg's."""
    options = dict(SMALL, img_size=(64, 96), final_norm=True)
    source = random(MODELS.build(tiny_segmentor(type=family, **options)))
    names = {name: re.sub(r'(backbone\.layers\.\d+\.)ln(\d)\.', r'\1norm\2.', name) for name in source.state_dict()}
    weights = {names[name]: tensor for name, tensor in source.state_dict().items()}
    path = str(save({'state_dict': weights}, tmp_path / 'a.pth'))
    whole = MODELS.build(tiny_segmentor(type=f'MS{family}', gate=dict(type='FixedGate', coarse=False), **options))
    if how == 'ViTWeightsHook':
        checkpoint = dict(state_dict=weights)
        HOOKS.build(dict(type=how)).after_load_checkpoint(SimpleNamespace(model=whole), checkpoint)
        whole.load_state_dict(checkpoint['state_dict'], strict=False)
    else:
        (load_checkpoint if how == 'load_checkpoint' else load_segmentor)(whole, path)
    assert torch.equal(whole.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    check_features(whole.backbone.eval(), lambda images: source.backbone(images)[-1], (64, 96))


@pytest.mark.parametrize('layout', ['timm', 'shared', 'official'])
@pytest.mark.parametrize('final_norm', [False, True])
def test_beit_of_timm_and_official(layout, final_norm, tmp_path):
    kind = dict(BEIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True) if layout == 'shared' else BEIT
    source = random(TimmBeit(**TIMM, **kind, global_pool='token' if final_norm else 'avg'))
    weights = source.state_dict()
    if layout == 'official':
        index = {f'blocks.{i}.attn.relative_position_index': torch.zeros(17, 17, dtype=torch.int64) for i in range(3)}
        weights = {'model': {**weights, **index}}
    model = build('BEiT', save(weights, tmp_path / 'a.pth'), final_norm=final_norm)
    check_features(model, source.forward_features)


@pytest.mark.parametrize('where', ['disk', 'memory'])
@pytest.mark.parametrize('shared', [False, True])
def test_beit_of_transformers(where, shared, tmp_path):
    table = dict(use_shared_relative_position_bias=True) if shared else dict(use_relative_position_bias=True)
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=64)
    source = random(BeitModel(BeitConfig(**shape, **table, layer_norm_eps=1e-6), add_pooling_layer=False))
    if where == 'disk':
        source.save_pretrained(tmp_path)
        path = tmp_path / 'model.safetensors'
    else:
        path = save(source.state_dict(), tmp_path / 'a.pth')
    final_norm = any(name.startswith('layernorm') for name in source.state_dict())
    check_features(build('BEiT', path, final_norm=final_norm), lambda images: source(images).last_hidden_state)


def test_beit_of_mmpretrain(tmp_path):
    from mmpretrain.models import BEiTViT

    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=128)
    source = BEiTViT(
        arch=arch, img_size=64, patch_size=16, out_type='featmap', final_norm=True, layer_scale_init_value=1
    )
    path = save({'state_dict': random(source).state_dict()}, tmp_path / 'a.pth')
    norm = source.ln1.eps
    assert norm == 1e-6
    check_features(build('BEiT', path, final_norm=True), lambda images: source(images)[-1])


def test_mae_pretrained_by_the_official_code(tmp_path):
    """It has no relative positions and no layer scales: with those at 0 and 1 features are its own."""
    source = random(TimmViT(patch_size=16, num_classes=0, **TIMM))
    more = {'mask_token': torch.zeros(1, 1, 8), 'decoder_blocks.0.attn.qkv.weight': torch.zeros(24, 8)}
    path = save({'model': {**source.state_dict(), **more}}, tmp_path / 'a.pth')
    model = build('MAE', path, init_values=1.0, final_norm=True)
    check_features(model, source.forward_features)
    assert not model.layers[0].attn.relative_position_bias_table.any()


def mmsegs_way(monkeypatch, table, window):
    """mmseg's own resampling, with what SciPy says to take in the place of interp2d, which it has no more."""

    def interp2d(x, y, z, kind):
        spline = RectBivariateSpline(x, y, z.T)
        return lambda xs, ys: spline(xs, ys).T

    monkeypatch.setattr(mmseg_beit.interpolate, 'interp2d', interp2d, raising=False)
    target = BEiT(**dict(SMALL, img_size=[16 * cells for cells in window]))
    name = 'layers.0.attn.relative_position_bias_table'
    return target.resize_rel_pos_embed({name: table})[name]


@pytest.mark.parametrize('how', ['function', 'init_cfg', 'load_state_dict', 'load_checkpoint'])
@pytest.mark.parametrize('window', [3, 5, 8, 14])
def test_a_table_of_another_square_is_resampled_as_mmseg_does(how, window, tmp_path, monkeypatch):
    source = random(BEiT(**SMALL))
    tables = [layer.attn.relative_position_bias_table.detach() for layer in source.layers]
    if how == 'function':
        got = resample_relative(tables[0], (window, window))
    else:
        path = str(save(source.state_dict(), tmp_path / 'a.pth'))
        model = build('BEiT', path if how == 'init_cfg' else None, img_size=16 * window)
        own = model.layers[0].attn.relative_position_index.clone()
        if how == 'load_state_dict':
            model.load_state_dict(source.state_dict())
        elif how == 'load_checkpoint':
            load_checkpoint(model, path, strict=True)
        got = model.layers[0].attn.relative_position_bias_table.detach()
        assert torch.equal(model.layers[0].attn.relative_position_index, own)
    torch.testing.assert_close(got, mmsegs_way(monkeypatch, tables[0], (window, window)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('window', [(4, 6), (9, 5), (14, 7)])
def test_a_table_for_a_window_that_is_not_square(window):
    """Each axis has its own series: near offsets keep their bias, and the other way round is the other way round."""
    table = torch.randn(7 * 7 + 3, 2)
    got = resample_relative(table, window)
    grid, known = got[:-3].unflatten(0, [2 * cells - 1 for cells in window]), table[:-3].unflatten(0, (7, 7))
    y, x = (cells - 1 for cells in window)
    torch.testing.assert_close(grid[y - 1 : y + 2, x - 1 : x + 2], known[2:5, 2:5])
    assert torch.equal(got[-3:], table[-3:])
    turned = torch.cat((known.transpose(0, 1).flatten(0, 1), table[-3:]))
    other = resample_relative(turned, window[::-1])[:-3].unflatten(0, [2 * cells - 1 for cells in window[::-1]])
    torch.testing.assert_close(other.transpose(0, 1), grid)


def test_a_table_whose_window_cannot_be_told_is_refused():
    weights = build('BEiT', img_size=(64, 96)).state_dict()
    with pytest.raises(ValueError, match=r'square window or of \(4, 4\), got a table of 80.*Set the .*img_size'):
        build('BEiT').load_state_dict(weights)


@pytest.mark.parametrize('source, target, wrong, advice', [
    ('MAE', 'BEiT', 'pos_embed finds no place', "rope=None or type='MSMAE'"),
    ('BEiT', 'MAE', 'pos_embed is missing', "rope='dinov3' or type='MSBEiT'"),
    ('BEiT', 'ViT', 'relative_position_bias_table finds no place', "type='MSBEiT' or 'MSMAE'"),
    ('ViT', 'BEiT', 'relative_position_bias_table is missing', "type='MSViT'"),
])  # fmt: skip
def test_one_family_in_the_place_of_another_is_refused(source, target, wrong, advice):
    with pytest.raises(ValueError, match=f"(?s){wrong}.*Set the backbone's .*{advice}"):
        fit(build(target), build(source).state_dict())


def test_a_bias_that_beit_has_no_place_for_is_refused():
    source = timm.create_model('beit_base_patch16_224', **TIMM)
    with pytest.raises(ValueError, match=r"attn.qkv.bias finds no place.*Set the backbone's qv_bias=True\n"):
        fit(build('BEiT', qv_bias=False), source.state_dict())
