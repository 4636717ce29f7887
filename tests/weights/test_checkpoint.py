"""Each source format is made by the library that owns it, and compared by its features, not by its keys."""

import pickle
import re
import runpy
from argparse import Namespace
from urllib.error import HTTPError

import mmengine
import numpy as np
import pytest
import timm
import torch
from conftest import randomize, tiny_segmentor
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from mmseg.apis import init_model
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from mmseg_msvit.versions import BEFORE_TORCH_26
from mmseg_msvit.weights import reading
from mmseg_msvit.weights.checkpoint import fit
from mmseg_msvit.weights.reading import read_checkpoint, unwrap
from mmseg_msvit.weights.resampling import resample_positions
from mmseg_msvit.weights.whole_models import load_segmentor

SHAPE = dict(img_size=64, embed_dims=32, num_layers=3, num_heads=2, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6))


def build(checkpoint=None, **options):
    init = dict(init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint))) if checkpoint else {}
    fine = dict(type='FixedGate', coarse=False)
    model = MODELS.build({'type': 'MSViT', 'gate': fine, **SHAPE, **init, **options})
    model.init_weights()
    return model.eval()


def timm_vit(**options):
    shape = dict(img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = TimmViT(**{**shape, **options})
    randomize(model)
    return model.eval()


def timm_features(model, images, extra=1):
    with torch.no_grad():
        return model.forward_features(images)[:, extra:].mT.unflatten(2, (4, 4))


def check(model, wanted, images):
    with torch.no_grad():
        torch.testing.assert_close(model(images)[-1], wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize('wrap', ['state_dict', 'model', 'teacher', 'plain', 'safetensors'])
def test_timm_and_what_shares_its_names(wrap, images, tmp_path):
    source = timm_vit()
    weights = source.state_dict()
    path = tmp_path / 'vit.pth'
    if wrap == 'safetensors':
        path = tmp_path / 'vit.safetensors'
        save_file(weights, path)
    elif wrap == 'teacher':  # DINO
        torch.save({'student': {}, 'teacher': {f'backbone.{k}': v for k, v in weights.items()}, 'epoch': 3}, path)
    else:
        torch.save(weights if wrap == 'plain' else {wrap: weights, 'epoch': 3}, path)
    check(build(path), timm_features(source, images), images)


def test_distilled_deit(images, tmp_path):
    source = timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, embed_dim=32, depth=3, num_heads=2)
    randomize(source)
    weights = source.eval().state_dict()
    assert weights['pos_embed'].shape[1] == 18
    torch.save({'model': weights}, tmp_path / 'deit.pth')
    model = build(tmp_path / 'deit.pth')
    assert torch.equal(model.pos_embed[:, 0], weights['pos_embed'][:, 0])
    assert torch.equal(model.pos_embed[:, 1:], weights['pos_embed'][:, 2:])
    # The features differ by the distillation token alone: without it the library's own blocks give ours.
    x = source.patch_embed(images) + weights['pos_embed'][:, 2:]
    x = torch.cat(((source.cls_token + weights['pos_embed'][:, :1]).expand(2, -1, -1), x), 1)
    check(model, source.norm(source.blocks(x))[:, 1:].mT.unflatten(2, (4, 4)).detach(), images)


def test_positions_without_cls(images, tmp_path):
    source = timm_vit(no_embed_class=True)
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    check(build(tmp_path / 'vit.pth'), timm_features(source, images), images)


def test_official_segmenter(images, tmp_path):
    source = timm_vit()
    weights = {f'encoder.{k}': v for k, v in source.state_dict().items()}
    torch.save({'model': {**weights, 'decoder.cls_emb': torch.zeros(1, 5, 32)}, 'epoch': 1}, tmp_path / 'segmenter.pth')
    check(build(tmp_path / 'segmenter.pth'), timm_features(source, images), images)


def test_mae_leaves_the_decoder(images, tmp_path):
    source = timm_vit()
    more = {'mask_token': torch.zeros(1, 1, 8), 'decoder_blocks.0.attn.qkv.weight': torch.zeros(24, 8)}
    torch.save({'model': {**source.state_dict(), **more}}, tmp_path / 'mae.pth')
    check(build(tmp_path / 'mae.pth'), timm_features(source, images), images)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize('scale', [None, 0.5])
def test_clip(scale, images, tmp_path):
    """CLIP's own names, which timm turns into its model: both readings have the same features."""
    rename = [
        (r'^cls_token$', 'class_embedding'), (r'^pos_embed$', 'positional_embedding'), (r'^patch_embed\.proj', 'conv1'),
        (r'^norm_pre', 'ln_pre'), (r'^norm', 'ln_post'), (r'^blocks', 'transformer.resblocks'), (r'\.norm', '.ln_'),
        (r'attn\.qkv\.', 'attn.in_proj_'), (r'attn\.proj', 'attn.out_proj'), (r'fc1', 'c_fc'), (r'fc2', 'c_proj'),
        (r'ls(\d)', r'ls_\1'),
    ]  # fmt: skip
    source = timm_vit(pre_norm=True, act_layer=QuickGELU, init_values=scale)
    official = {}
    for name, tensor in source.state_dict().items():
        if name.startswith('head') or name == 'patch_embed.proj.bias':
            continue
        for theirs, clips in rename:
            name = re.sub(theirs, clips, name)
        official[f'visual.{name}'] = tensor.squeeze() if name == 'class_embedding' else tensor
    official['visual.positional_embedding'] = official['visual.positional_embedding'][0]
    official['visual.proj'] = torch.zeros(32, 5)
    official['transformer.resblocks.0.attn.in_proj_weight'] = torch.zeros(12, 4)  # the text tower
    if scale is None:
        reading = timm_vit(pre_norm=True, act_layer=QuickGELU)
        reading.load_state_dict(checkpoint_filter_fn(dict(official), reading), strict=False)
        torch.testing.assert_close(timm_features(reading, images), timm_features(source, images))
    torch.save(official, tmp_path / 'clip.pth')
    act = dict(type='CLIPQuickGELU')
    MODELS.register_module('CLIPQuickGELU', module=QuickGELU, force=True)
    model = build(tmp_path / 'clip.pth', pre_norm=True, patch_bias=False, act_cfg=act)
    check(model, timm_features(source, images), images)


def test_augreg(images, tmp_path):
    """Arrays named as AugReg's, which timm reads too."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    arrays = {
        'embedding/kernel': array(16, 16, 3, 32), 'embedding/bias': array(32), 'cls': array(1, 1, 32),
        'Transformer/posembed_input/pos_embedding': array(1, 17, 32),
        'Transformer/encoder_norm/scale': array(32), 'Transformer/encoder_norm/bias': array(32),
        'head/kernel': array(32, 5), 'head/bias': array(5),
    }  # fmt: skip
    for i in range(3):
        block = f'Transformer/encoderblock_{i}/'
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            arrays[f'{block}{norm}/scale'], arrays[f'{block}{norm}/bias'] = array(32), array(32)
        attention = f'{block}MultiHeadDotProductAttention_1/'
        for name in ('query', 'key', 'value'):
            arrays[f'{attention}{name}/kernel'], arrays[f'{attention}{name}/bias'] = array(32, 2, 16), array(2, 16)
        arrays[f'{attention}out/kernel'], arrays[f'{attention}out/bias'] = array(2, 16, 32), array(32)
        for name, shape in (('Dense_0', (32, 128)), ('Dense_1', (128, 32))):
            arrays[f'{block}MlpBlock_3/{name}/kernel'] = array(*shape)
            arrays[f'{block}MlpBlock_3/{name}/bias'] = array(shape[1])
    np.savez(tmp_path / 'augreg.npz', **arrays)
    source = timm_vit()
    source.load_pretrained(str(tmp_path / 'augreg.npz'))
    check(build(tmp_path / 'augreg.npz'), timm_features(source, images), images)


@pytest.mark.parametrize('whole', [False, True])
def test_mmpretrain(whole, images, tmp_path):
    from mmpretrain.models import VisionTransformer as PretrainViT

    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=128)
    options = dict(norm_cfg=SHAPE['norm_cfg'], layer_scale_init_value=0.5 if whole else 0.0)
    source = PretrainViT(arch=arch, img_size=64, patch_size=16, out_type='featmap', **options)
    randomize(source)
    source.eval()  # which returns nothing
    weights = source.state_dict()
    if whole:
        weights = {'head.layers.head.weight': torch.zeros(5, 32), **{f'backbone.{k}': v for k, v in weights.items()}}
    torch.save({'state_dict': weights, 'meta': {}}, tmp_path / 'vit.pth')
    with torch.no_grad():
        wanted = source(images)[-1]
    check(build(tmp_path / 'vit.pth'), wanted, images)


@pytest.mark.parametrize('kind', ['backbone', 'SegmenterMaskTransformerHead', 'UPerHead'])
def test_mmseg(kind, images, tmp_path):
    options = dict(patch_bias=True, out_indices=(0, 1, 2), **SHAPE)
    if kind == 'backbone':
        source = dense = VisionTransformer(**options)
    else:
        head = dict(type=kind, in_channels=32, channels=16, num_classes=5, in_index=2)
        if kind == 'UPerHead':
            head.update(in_channels=[32] * 3, in_index=[0, 1, 2])
        else:
            head.update(num_layers=1, num_heads=2, embed_dims=32)  # its layers have the names of a ViT's
        source = MODELS.build(tiny_segmentor(head, type='VisionTransformer', **options))
        dense = source.backbone
    randomize(source)
    dense.eval()
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'mmseg.pth')
    with torch.no_grad():
        wanted = dense(images)
    model = build(tmp_path / 'mmseg.pth', out_indices=(0, 1, 2))
    torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-4)


CLASSES = tuple('abcde')
HEAD = dict(type='FCNHead', in_channels=32, channels=8, num_classes=len(CLASSES), in_index=0)


def segmentor(backbone='MSViT', pretrained=None, **options):
    fine = dict(gate=dict(type='FixedGate', coarse=False)) if backbone == 'MSViT' else {}
    backbone = {'type': backbone, **fine, **SHAPE, **options}
    return ConfigDict(type='EncoderDecoder', pretrained=pretrained, backbone=backbone, decode_head=HEAD)


def runner_for(model, tmp_path, hooks=('GateLossHook',)):
    config = dict(
        model=model,
        work_dir=str(tmp_path),
        default_scope='mmseg',
        experiment_name=tmp_path.name,
        custom_hooks=[dict(type=hook) for hook in hooks],
    )
    return Runner.from_cfg(Config(config))


@pytest.mark.parametrize('how', ['pretrained', 'GateLossHook', 'ViTWeightsHook'])
def test_other_ways_to_name_a_checkpoint(how, images, tmp_path):
    source = timm_vit()
    path = str(tmp_path / 'vit.pth')
    torch.save(source.state_dict(), path)
    if how == 'pretrained':
        model = MODELS.build(segmentor(pretrained=path))
        model.init_weights()
    else:
        runner = runner_for(segmentor(), tmp_path, [how])
        runner.load_checkpoint(path)
        model = runner.model
    check(model.backbone.eval(), timm_features(source, images), images)


def test_what_load_from_translates_is_there_for_the_hooks_after_it(images, tmp_path):
    """EMAHook copies what is in the checkpoint."""
    source = timm_vit()
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    runner = runner_for(segmentor(), tmp_path, ['EMAHook', 'ViTWeightsHook'])
    average = runner.hooks[[type(hook).__name__ for hook in runner.hooks].index('EMAHook')]
    average.before_run(runner)
    runner.load_checkpoint(str(tmp_path / 'vit.pth'))
    check(average.ema_model.module.backbone.eval(), timm_features(source, images), images)


@pytest.mark.parametrize('wrap', ['module', 'model'])
@pytest.mark.parametrize('layout', ['MSViT', 'mmpretrain'])
def test_load_from_keeps_the_head_of_a_whole_model(wrap, layout, tmp_path):
    source = MODELS.build(segmentor())
    randomize(source)
    weights = source.state_dict()
    if layout == 'mmpretrain':
        weights = {name.replace('attn.attn.in_proj_', 'attn.qkv.'): tensor for name, tensor in weights.items()}
        weights = {name.replace('attn.attn.', 'attn.').replace('out_proj', 'proj'): t for name, t in weights.items()}
    if wrap == 'module':
        weights = {'state_dict': {f'module.{name}': tensor for name, tensor in weights.items()}}
    else:
        weights = {'model': weights}
    torch.save(weights, tmp_path / 'segmentor.pth')
    runner = runner_for(segmentor(), tmp_path)
    runner.load_checkpoint(str(tmp_path / 'segmentor.pth'))
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize('layout', ['MSViT', 'timm'])
def test_load_from_with_test_time_augmentation_keeps_the_head(layout, images, tmp_path):
    source = MODELS.build(segmentor())
    vit = timm_vit()
    randomize(source)
    path = str(tmp_path / 'segmentor.pth')
    torch.save(vit.state_dict() if layout == 'timm' else {'state_dict': source.state_dict()}, path)
    runner = runner_for(dict(type='SegTTAModel', module=segmentor()), tmp_path)
    runner.load_checkpoint(path)
    model = runner.model.module
    if layout == 'timm':
        check(model.backbone.eval(), timm_features(vit, images), images)
    else:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize('how', ['load_segmentor', 'init_model', 'load_state_dict'])
@pytest.mark.parametrize('prefix', ['backbone.', 'backbone.vit.'])
def test_a_trained_segmentor_with_the_vit_of_another_library(how, prefix, images, tmp_path):
    vit, source = timm_vit(), MODELS.build(segmentor())
    randomize(source)
    head = {name: tensor for name, tensor in source.state_dict().items() if name.startswith('decode_head.')}
    weights = {**head, **{prefix + name: t for name, t in vit.state_dict().items()}}
    path = str(tmp_path / 'segmentor.pth')
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=CLASSES, palette=[[0] * 3] * 5))), path)
    model = MODELS.build(segmentor())
    if how == 'load_segmentor':
        load_segmentor(model, path)
    elif how == 'init_model':
        model = init_model(Config(dict(model=segmentor(), default_scope='mmseg')), path, device='cpu')
    else:
        model.load_state_dict(dict(weights))
    check(model.backbone.eval(), timm_features(vit, images), images)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in head.items())


def test_a_library_vit_wants_its_own_names(tmp_path):
    vit, model = timm_vit(), MODELS.build(segmentor('VisionTransformer'))
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith('decode_head.')}
    path = str(tmp_path / 'segmentor.pth')
    torch.save({**head, **{f'backbone.{name}': tensor for name, tensor in vit.state_dict().items()}}, path)
    with pytest.raises(ValueError, match='got backbone.* is missing.* An MSViT with gate='):
        load_segmentor(model, path)


@pytest.mark.parametrize('theirs, ours, message', [
    (dict(type='FixedGate'), dict(type='MLPGate', frozen=True), r'backbone.gate.\S+ is missing.* weights of a dense'),
    (dict(type='ContextGate'), dict(type='MLPGate'), r'backbone.gate.\S+ is missing'),
    (dict(type='ContextGate'), dict(type='FixedGate'), None),
])  # fmt: skip
def test_a_gate_that_is_not_in_the_file_does_not_answer_for_it(theirs, ours, message, tmp_path):
    source, model = (MODELS.build(segmentor(gate=gate)) for gate in (theirs, ours))
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    if message is None:
        load_segmentor(model, str(tmp_path / 'a.pth'))
    else:
        with pytest.raises(ValueError, match=message):
            load_segmentor(model, str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('how', ['load_segmentor', 'load_state_dict'])
def test_a_trained_segmentors_wide_grid_is_its_own_whatever_names_its_vit_has(how, tmp_path):
    """4x16 cells are as many as 8x8: a pretrained ViT's would be a square."""
    source = timm_vit(img_size=(64, 256))
    weights = {f'backbone.vit.{name}': tensor for name, tensor in source.state_dict().items()}
    model = MODELS.build(segmentor(img_size=(64, 256)))
    weights.update({name: t for name, t in model.state_dict().items() if name.startswith('decode_head.')})
    if how == 'load_segmentor':
        torch.save(weights, tmp_path / 'a.pth')
        load_segmentor(model, str(tmp_path / 'a.pth'))
    else:
        model.load_state_dict(weights, strict=False)
    assert torch.equal(model.backbone.pos_embed, source.pos_embed)


def test_init_cfg_may_be_a_list_of_one_checkpoint(tmp_path):
    source = build(gate=dict(type='MLPGate'), coarse_embed='resize+detail')
    randomize(source)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    init = [dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))]
    model = build(gate=dict(type='MLPGate'), coarse_embed='resize+detail', init_cfg=init)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))
    with pytest.raises(ValueError, match='init_cfg: wanted a checkpoint and nothing beside it'):
        build(init_cfg=[*init, dict(type='TruncNormal', layer='Linear')])


def test_a_gate_of_another_shape_is_refused(tmp_path):
    source, model = (MODELS.build(segmentor(gate=dict(type='MLPGate'), scales=(16, side))) for side in (32, 64))
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'backbone.gate.embed.weight \(32, 3072\), wanted \(32, 12288\)'):
        load_segmentor(model, str(tmp_path / 'a.pth'))


def test_a_segmentor_for_another_image_size_is_loaded_with_its_gate(tmp_path):
    options = dict(gate=dict(type='MLPGate'), gate_loss=dict(type='GeneralizedBatchShapingLoss'))
    source, model = (MODELS.build(segmentor(img_size=size, **options)) for size in (64, 128))
    randomize(source)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    load_segmentor(model, str(tmp_path / 'a.pth'))
    assert torch.equal(model.backbone.gate.last.weight, source.backbone.gate.last.weight)


def test_load_from_refuses_a_deeper_segmentor(tmp_path):
    torch.save({'state_dict': MODELS.build(segmentor(num_layers=4)).state_dict()}, tmp_path / 'segmentor.pth')
    with pytest.raises(ValueError, match='layers.3.ln1.weight finds no place'):
        runner_for(segmentor(), tmp_path).load_checkpoint(str(tmp_path / 'segmentor.pth'))


def test_a_segmentor_trained_on_another_size_is_resampled_when_loaded():
    small, large = build(), build(img_size=128)
    randomize(small)
    large.load_state_dict(small.state_dict())
    table, how = resample_positions(small.pos_embed, (8, 8), 'bicubic')
    assert how == '4x4 -> 8x8' and torch.equal(large.pos_embed, table)


LEARNED = dict(gate=dict(type='MLPGate'))


def learned(img_size):
    """An MSViT whose tables are smooth, so that a resampled one can be told from a scrambled one."""
    model = build(img_size=img_size, **LEARNED)
    with torch.no_grad():
        for table in (model.pos_embed[:, 1:].unflatten(1, model.pos_grid).permute(0, 3, 1, 2), model.gate.pos_embed):
            rows, columns = (torch.linspace(-1, 1, n + 1)[1:] for n in table.shape[2:])
            table.copy_((rows[:, None] + 2 * columns).expand_as(table))
        prior = model.gate_losses[0].prior_mean_logit
        prior.copy_(torch.randn_like(prior))
    return model


@pytest.mark.parametrize('how', ['load_state_dict', 'init_cfg', 'GateLossHook', 'init_model'])
@pytest.mark.parametrize('source, target', [(64, 128), ((64, 128), (96, 96)), ((16, 64), (32, 32)), ((48, 80), 64)])
def test_positions_gate_and_priors_of_another_image_size(how, source, target, tmp_path):
    source, path = learned(source), str(tmp_path / 'a.pth')
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in source.state_dict().items()}}, path)
    if how == 'load_state_dict':
        model = build(img_size=target, **LEARNED)
        model.load_state_dict(source.state_dict())
    elif how == 'init_cfg':
        model = build(path, img_size=target, **LEARNED)
    elif how == 'init_model':
        whole = MODELS.build(segmentor(img_size=target, **LEARNED))
        load_checkpoint(whole, path)
        model = whole.backbone
    else:
        runner = runner_for(segmentor(img_size=target, **LEARNED), tmp_path)
        runner.load_checkpoint(path)
        model = runner.model.backbone
    grid = model.gate.grid
    table = VisionTransformer.resize_pos_embed(source.pos_embed, model.pos_grid, source.pos_grid, 'bicubic')
    torch.testing.assert_close(model.pos_embed.data, table.data)
    for name in ('gate.pos_embed', 'gate_losses.0.prior_mean_logit', 'gate_losses.0.prior_log_temperature'):
        wanted = nn.functional.interpolate(source.state_dict()[name], grid, mode='bilinear')
        torch.testing.assert_close(model.state_dict()[name], wanted)


@pytest.mark.parametrize('source, options', [((64, 128), {}), ((48, 64), LEARNED)])  # 3x4 or 4x3 cells of 2x2 regions
def test_positions_whose_grid_cannot_be_told_are_refused(source, options):
    weights = build(img_size=source, **options).state_dict()
    build(img_size=source, **options).load_state_dict(weights)
    with pytest.raises(
        ValueError, match=r'wanted pos_embed of a square grid or of \(6, 6\).*got \d+ pos.*Set the .*img_size'
    ):
        build(img_size=96, **options).load_state_dict(weights)


def test_a_misshapen_tensor_is_refused_by_mmengine_too():
    weights = build(in_channels=4).state_dict()
    with pytest.raises(ValueError, match=r'patch_embed.projection.weight \(32, 4, 16, 16\), wanted \(32, 3, 16, 16\)'):
        load_state_dict(build(), weights)


@pytest.mark.parametrize('shape, table, how', [
    (17, (4, 4), None), (22, (3, 7), None), (17, (2, 8), 'is taken as 2x8, not as 4x4'),
    (16, (4, 4), 'without cls'), (26, (3, 7), '5x5 -> 3x7'),
    (10, (2, 5), '3x3 -> 2x5'), (18, (2, 8), '2x8 -> 2x8, 2 extra positions'),
    (25, (4, 4), '5x5 -> 4x4, 0 extra positions'), (27, (4, 4), '5x5 -> 4x4, 2 extra positions'),
])  # fmt: skip
def test_positions_by_grid(shape, table, how):
    out, done = resample_positions(torch.randn(1, shape, 6), table, 'bicubic')
    assert out.shape == (1, 1 + table[0] * table[1], 6) and done == how


def test_a_pretrained_table_of_as_many_cells_as_a_wide_image_has_is_a_square():
    """18x32 cells, of a 16:9 image, are as many as 24x24; by mmseg's names, a trained model's, they are 18x32."""
    source = timm_vit(img_size=96, patch_size=4)
    backbone = build(img_size=(72, 128), patch_size=4, scales=(4, 8))
    fitted, report = fit(backbone, source.state_dict())
    assert report.resized['pos_embed'] == '24x24 -> 18x32'
    wanted = VisionTransformer.resize_pos_embed(source.pos_embed, (18, 32), (24, 24), 'bicubic')
    torch.testing.assert_close(fitted['pos_embed'], wanted.data)
    fitted, report = fit(backbone, {**backbone.state_dict(), 'pos_embed': source.pos_embed.data})
    assert report.resized['pos_embed'] == 'is taken as 18x32, not as 24x24'
    assert torch.equal(fitted['pos_embed'], source.pos_embed)


def test_report_says_what_became_of_each_tensor():
    weights = timm_vit().state_dict()
    weights['pos_embed'] = torch.randn(1, 26, 32)
    del weights['patch_embed.proj.bias']
    fitted, report = fit(build(gate=dict(type='MLPGate')), weights)
    zero = 'is zero: the source has none'
    assert report.layout == 'timm' and report.resized == {
        'pos_embed': '5x5 -> 4x4',
        'patch_embed.projection.bias': zero,
    }
    assert report.initial and all(name.startswith(('gate.', 'gate_losses.')) for name in report.initial)
    assert set(report.unused) == {'head.weight', 'head.bias'}
    assert len(report.matched) + 2 == len(fitted)
    for words in ('layout of timm', 'pos_embed 5x5 -> 4x4', 'patch_embed.projection.bias', 'head.weight'):
        assert words in str(report)


@pytest.mark.parametrize('names', [('ls1.gamma', 'ls2.gamma'), ('gamma_1', 'gamma_2')])
def test_layer_scale_is_folded(names, images, tmp_path):
    source = timm_vit(init_values=0.5)
    weights = source.state_dict()
    for i in range(3):
        for ours, theirs in zip(('ls1.gamma', 'ls2.gamma'), names):
            weights[f'blocks.{i}.{theirs}'] = weights.pop(f'blocks.{i}.{ours}')
    torch.save(weights, tmp_path / 'vit.pth')
    check(build(tmp_path / 'vit.pth'), timm_features(source, images), images)
    _, report = fit(build(), weights)
    assert set(report.unused) == {'head.weight', 'head.bias'}
    assert '6 layer scales are folded into the projections before them' in str(report)


@pytest.mark.parametrize('make, message', [
    (lambda path: torch.save(TimmViT(embed_dim=48, depth=3, num_heads=2).state_dict(), path),
     r'this very ViT, got \d+ .*ln1.weight \(48,\), wanted \(32,\).* more\. Set the backbone\'s embed_dims\n'),
    (lambda path: torch.save(TimmViT(embed_dim=32, depth=1, num_heads=2).state_dict(), path),
     r"got 16 that do not fit: layers.1.ln1.weight is missing.*Set the backbone's num_layers\n"),
    (lambda path: torch.save({'fc.weight': torch.zeros(2)}, path), r"wanted a ViT in the layout of .* got 1 tensors"),
    (lambda path: path.write_bytes(b'PK\x03\x04 not a checkpoint'), 'wanted a whole checkpoint, got .*cannot be read'),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, message, tmp_path):
    make(tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=message):
        build(tmp_path / 'bad.pth')


PLAIN = dict(img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2)


def weights_of(model='vit_tiny_patch16_224', without=(), **options):
    weights = timm.create_model(model, **{**PLAIN, **options}).state_dict()
    return {name: tensor for name, tensor in weights.items() if not name.startswith(without)}


@pytest.mark.parametrize('weights, ours, message', [
    (dict(patch_size=8, img_size=32), {}, r'\(32, 3, 8, 8\), wanted \(32, 3, 16, 16\).*patch_size.*another shape +1'),
    (dict(), dict(in_channels=4), r'\(32, 3, 16, 16\), wanted \(32, 4, 16, 16\).*in_channels'),
    (dict(model='beit_base_patch16_224'), {}, "relative_position_bias_table finds no place.*Set .*type='MSBEiT'"),
    (dict(qk_norm=True), {}, 'layers.0.attn.q_norm.weight finds no place.*No argument'),
    (dict(mlp_layer=timm.layers.GluMlp), {}, r"layers.0.ffn.w3.weight finds no place.*Set the backbone's ffn_type\n"),
    (dict(mlp_layer=timm.layers.SwiGLU), {}, r"layers.0.ffn.w3.weight finds no place.*Set the backbone's ffn_type\n"),
    (dict(depth=4), {}, r'layers.3.norm1|layers.3.ln1.weight finds no place.*Set the backbone\'s num_layers\n'),
    (dict(without='blocks.11.'), dict(num_layers=12, depth=12), r'layers.11.ln1.weight is missing.*num_layers\n'),
    (dict(without='pos_embed'), {}, "pos_embed is missing.*rope='dinov3'"),
    (dict(pre_norm=True), {}, 'ln_pre.weight finds no place.*Set .*pre_norm\n'),
    (dict(without='norm.'), {}, 'ln1.weight is missing.*Set .*final_norm=False\n'),
    (dict(without='cls_token'), {}, 'cls_token is missing.*Set .*with_cls_token=False\n'),
    (dict(norm_layer=timm.layers.RmsNorm), {}, r'layers.0.ln1.bias is missing.*No argument'),
    (dict(model='vit_small_patch16_rope_mixed_ape_224'), {}, 'rope.freqs finds no place'),
    (dict(), dict(pre_norm=True), 'ln_pre.weight is missing.*Set .*pre_norm\n'),
    (dict(), dict(patch_bias=False), 'patch_embed.projection.bias finds no place.*Set .*patch_bias=True\n'),
    (dict(), dict(qkv_bias=False), 'in_proj_bias finds no place.*Set .*qkv_bias=True\n'),
    (dict(qkv_bias=False), dict(qkv_bias=False), 'out_proj.bias finds no place.*Set .*qkv_bias=True\n'),
])  # fmt: skip
def test_a_vit_of_another_kind_is_refused_by_its_tensors(weights, ours, message):
    depth = ours.pop('depth', 3)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        fit(build(**ours), weights_of(**{'depth': depth, **weights}))


def test_a_final_norm_without_place_is_not_used():
    _, report = fit(build(final_norm=False), timm_vit().state_dict())
    assert {'ln1.weight', 'ln1.bias'} < set(report.unused)


@pytest.mark.parametrize('name', ['bad.safetensors', 'bad.npz', 'bad.pth'])
def test_a_file_that_is_cut_off_is_said_to_be(name, tmp_path):
    save_file({'a': torch.zeros(99)}, tmp_path / 'a.safetensors')
    np.savez(tmp_path / 'a.npz', a=np.zeros(99))
    torch.save({'a': torch.zeros(99)}, tmp_path / 'a.pth')
    whole = (tmp_path / name.replace('bad', 'a')).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f'wanted a whole checkpoint, got .*{name}, which cannot be read'):
        read_checkpoint(tmp_path / name)


def test_a_scheme_that_nobody_knows_is_no_file():
    with pytest.raises(FileNotFoundError):
        read_checkpoint('nowhere://vit.npz')


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='wanted a file, got no/such.pth'):
        build('no/such.pth')


def test_what_mmengine_puts_beside_the_weights_is_read_as_empty_shells(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(
        {'state_dict': {'a': torch.ones(2)}, 'message_hub': {'loss': buffer, 'x': np.float64(3)}}, tmp_path / 'a.pth'
    )
    assert torch.equal(unwrap(read_checkpoint(str(tmp_path / 'a.pth')))['a'], torch.ones(2))


def test_converter_writes_what_mmsegs_own_vit_loads(images, tool, tmp_path, capsys):
    source = timm_vit(init_values=0.5)  # layer scale, which mmseg's has none of
    torch.save(source.state_dict(), tmp_path / 'timm.pth')
    assert tool('convert_vit.py', tmp_path / 'timm.pth', tmp_path / 'mmseg.pth') is None
    assert 'from the layout of timm' in capsys.readouterr().out
    dense = VisionTransformer(patch_bias=True, **SHAPE)
    dense.load_state_dict(torch.load(tmp_path / 'mmseg.pth'), strict=False)
    dense.eval()
    check(dense, timm_features(source, images), images)


@pytest.mark.parametrize('options', [dict(no_embed_class=True), dict(class_token=False, global_pool='avg')])
def test_converter_gives_a_table_without_cls_what_mmsegs_vit_takes_for_it(options, tool, tmp_path):
    source = timm_vit(**options)
    torch.save(source.state_dict(), tmp_path / 'timm.pth')
    assert tool('convert_vit.py', tmp_path / 'timm.pth', tmp_path / 'mmseg.pth') is None
    table = torch.load(tmp_path / 'mmseg.pth')['pos_embed']
    assert (table[:, 0] == 0).all() and torch.equal(table[:, 1:], source.pos_embed.data)


@pytest.mark.parametrize('model, what', [
    ('vit_small_patch14_reg4_dinov2', 'register_tokens'), ('vit_giant_patch14_dinov2', 'layers.0.ffn.w12.weight'),
    ('beit_base_patch16_224', 'relative_position_bias_table'), ('vit_small_patch16_dinov3', 'register_tokens'),
])  # fmt: skip
def test_converter_refuses_what_mmsegs_own_vit_cannot_hold(model, what, tool, tmp_path, capsys):
    source = timm.create_model(model, **{**PLAIN, 'patch_size': 16 if '16' in model else 14})
    torch.save(source.state_dict(), tmp_path / 'timm.pth')
    assert tool('convert_vit.py', tmp_path / 'timm.pth', tmp_path / 'mmseg.pth') == 2
    assert what in capsys.readouterr().err and not (tmp_path / 'mmseg.pth').exists()


@pytest.mark.parametrize('how', ['init_cfg', 'load_from', 'init_model', 'module'])
def test_a_dense_segmentor_without_patch_bias_is_not_given_a_random_one(how, images, tmp_path):
    """mmseg's own ViTs have none; here it is zero, so that features are theirs."""
    source = MODELS.build(segmentor('VisionTransformer'))
    randomize(source)
    path = str(tmp_path / 'dense.pth')
    prefix = 'module.' if how == 'module' else ''
    torch.save({'state_dict': {prefix + name: tensor for name, tensor in source.state_dict().items()}}, path)
    source.backbone.eval()
    if how == 'init_cfg':
        backbone = build(path)
    elif how == 'init_model':
        model = MODELS.build(segmentor())
        load_checkpoint(model, path)
        backbone = model.backbone.eval()
    else:
        runner = runner_for(segmentor(), tmp_path)
        runner.load_checkpoint(path)
        backbone = runner.model.backbone.eval()
        assert torch.equal(runner.model.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), source.backbone(images), rtol=1e-4, atol=1e-4)


def test_part_of_a_state_dict_leaves_the_patch_bias_alone():
    model = build()
    randomize(model)
    before = model.patch_embed.projection.bias.clone()
    model.load_state_dict({'cls_token': torch.ones(1, 1, 32)}, strict=False)
    assert before.abs().sum() > 0 and torch.equal(model.patch_embed.projection.bias, before)


def test_an_address_is_downloaded_once_and_read_as_a_file(site, images):
    folder, address = site
    source = timm_vit()
    save_file(source.state_dict(), folder / 'vit.safetensors')
    check(build(f'{address}/vit.safetensors'), timm_features(source, images), images)
    with pytest.raises(HTTPError):
        read_checkpoint(f'{address}/none.safetensors')
    (folder / 'vit.safetensors').unlink()
    read_checkpoint(f'{address}/vit.safetensors')


def test_addresses_with_one_file_name_are_kept_apart(site):
    folder, address = site
    for name in 'ab':
        (folder / name).mkdir()
        save_file({name: torch.ones(1)}, folder / name / 'model.safetensors')
    for name in 'ab':
        assert set(read_checkpoint(f'{address}/{name}/model.safetensors')) == {name}


@pytest.mark.parametrize('file', ['vit.safetensors', 'http', 'vit.npz'])
def test_load_from_takes_arrays(file, site, images, tmp_path):
    folder, address = site
    source = timm_vit()
    if file == 'vit.npz':
        np.savez(folder / file, **{name: tensor.numpy() for name, tensor in source.state_dict().items()})
    else:
        save_file(source.state_dict(), folder / 'vit.safetensors')
    runner = runner_for(segmentor(), tmp_path)
    runner.load_checkpoint(f'{address}/vit.safetensors?download=true' if file == 'http' else str(folder / file))
    check(runner.model.backbone.eval(), timm_features(source, images), images)


def named(prefix, model):
    return {f'{prefix}{name}': tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize('kind', ['flat', 'nested', 'beside'])
@pytest.mark.parametrize('asked', ['student', 'teacher'])
def test_prefix_chooses_among_several_vits(kind, asked, images, tmp_path):
    models = {name: timm_vit() for name in ('student', 'teacher')}
    if kind == 'nested':
        weights = {name: named('backbone.', model) for name, model in models.items()}
    else:
        weights = {k: v for name, model in models.items() for k, v in named(f'{name}.backbone.', model).items()}
        weights = {'state_dict': weights} if kind == 'beside' else weights
    torch.save(weights, tmp_path / 'vit.pth')
    init = dict(type='Pretrained', checkpoint=tmp_path / 'vit.pth', prefix=f'{asked}.backbone')
    check(build(init_cfg=init), timm_features(models[asked], images), images)
    check(
        build(tmp_path / 'vit.pth'), timm_features(models['teacher'], images), images
    )  # the average, if none is asked
    with pytest.raises(ValueError, match=r"wanted tensors below prefix 'other\.', got \d+ that begin with .*teacher"):
        build(init_cfg={**init, 'prefix': 'other'})


def test_several_vits_without_an_average_are_refused():
    weights = {**named('online.', timm_vit()), **named('target.', timm_vit())}
    with pytest.raises(
        ValueError, match=r"wanted one ViT, got 2, whose names begin with \['online.', 'target.'\].*prefix="
    ):
        fit(build(), weights)


@pytest.mark.parametrize('name', ['model_ema', 'state_dict_ema', 'ema', 'teacher'])
def test_averaged_weights_are_preferred(name):
    checkpoint = {'model': {'a': torch.zeros(1)}, 'state_dict': {'a': torch.zeros(1)}, name: {'a': torch.ones(1)}}
    assert unwrap(checkpoint) == {'a': torch.ones(1)} and unwrap({**checkpoint, name: None}) == {'a': torch.zeros(1)}


def test_a_path_is_as_good_as_its_name(tmp_path):
    weights = build(**LEARNED).state_dict()
    torch.save({f'backbone.{name}': tensor for name, tensor in weights.items()}, tmp_path / 'a.pth')
    init = dict(type='Pretrained', checkpoint=tmp_path / 'a.pth')
    gate = dict(type='MLPGate', init_cfg=dict(prefix='backbone.gate.', **init))
    model = build(init_cfg=init, gate=gate)
    assert torch.equal(model.cls_token, weights['cls_token'])
    assert torch.equal(model.gate.embed.weight, weights['gate.embed.weight'])
    assert torch.equal(build(pretrained=tmp_path / 'a.pth').cls_token, weights['cls_token'])


def test_arguments_beside_the_weights_are_read_as_an_empty_shell(tmp_path):
    arguments = Namespace(lr=0.1, out=tmp_path, more=Namespace(a=[1]))
    torch.save({'model': {'a': torch.ones(2)}, 'args': arguments}, tmp_path / 'a.pth')
    checkpoint = read_checkpoint(tmp_path / 'a.pth')
    assert torch.equal(unwrap(checkpoint)['a'], torch.ones(2)) and not isinstance(checkpoint['args'], Namespace)


class Reaching:
    def __reduce__(self):
        return getattr, (np.ndarray, 'tofile')


@pytest.mark.skipif(BEFORE_TORCH_26, reason='before torch 2.6 its loader reads all')
def test_mmengine_0_10_loads_training_checkpoints(tmp_path, monkeypatch):
    """It leaves ``weights_only`` to torch, which refuses mmengine's log unless the package has allowed it."""
    hub = dict(loss=HistoryBuffer([1.0, 2.0], [1, 1]), number=np.float64(3))
    torch.save({'state_dict': {}, 'message_hub': hub}, tmp_path / 'a.pth')
    torch.save(Reaching(), tmp_path / 'b.pth')
    monkeypatch.setattr(mmengine, '__version__', '0.10.7')
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        runpy.run_path(reading.__file__, run_name=reading.__name__)
        hub = torch.load(tmp_path / 'a.pth', weights_only=True)['message_hub']
        assert hub['loss'].statistics('mean') == 1.5 and hub['number'] == 3
        with pytest.raises(pickle.UnpicklingError, match='wanted a statistic of HistoryBuffer, got tofile'):
            torch.load(tmp_path / 'b.pth', weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
