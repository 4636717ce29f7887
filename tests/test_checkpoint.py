"""Each source format is made by the library that owns it, and compared by its features, not by its keys."""

import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.error import HTTPError

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, randomize
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from mmseg_msvit.checkpoint import fit, read_checkpoint, resample_positions, unwrap

SHAPE = dict(img_size=64, embed_dims=32, num_layers=3, num_heads=2, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6))


def build(checkpoint=None, **options):
    init = dict(init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint))) if checkpoint else {}
    fine = dict(type='FixedGate', coarse=False)
    model = MODELS.build({'type': 'MSViT', 'gate': fine, **SHAPE, **init, **options})
    model.init_weights()
    return model.eval()


def timm_vit(**options):
    model = TimmViT(img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2, num_classes=5, **options)
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


def test_clip(images, tmp_path):
    """CLIP's own names, which timm turns into its model: both readings have the same features."""
    rename = [
        (r'^cls_token$', 'class_embedding'), (r'^pos_embed$', 'positional_embedding'), (r'^patch_embed\.proj', 'conv1'),
        (r'^norm_pre', 'ln_pre'), (r'^norm', 'ln_post'), (r'^blocks', 'transformer.resblocks'), (r'\.norm', '.ln_'),
        (r'attn\.qkv\.', 'attn.in_proj_'), (r'attn\.proj', 'attn.out_proj'), (r'fc1', 'c_fc'), (r'fc2', 'c_proj'),
    ]  # fmt: skip
    source = timm_vit(pre_norm=True, act_layer=QuickGELU)
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
    reading = timm_vit(pre_norm=True, act_layer=QuickGELU)
    reading.load_state_dict(checkpoint_filter_fn(dict(official), reading), strict=False)
    torch.save(official, tmp_path / 'clip.pth')
    act = dict(type='CLIPQuickGELU')
    MODELS.register_module('CLIPQuickGELU', module=QuickGELU, force=True)
    model = build(tmp_path / 'clip.pth', pre_norm=True, patch_bias=False, act_cfg=act)
    check(model, timm_features(reading, images), images)


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
    source = PretrainViT(arch=arch, img_size=64, patch_size=16, out_type='featmap', norm_cfg=SHAPE['norm_cfg'])
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
        source = MODELS.build(
            dict(type='EncoderDecoder', backbone=dict(type='VisionTransformer', **options), decode_head=head)
        )
        dense = source.backbone
    randomize(source)
    dense.eval()
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'mmseg.pth')
    with torch.no_grad():
        wanted = dense(images)
    model = build(tmp_path / 'mmseg.pth', out_indices=(0, 1, 2))
    for a, b in zip(model(images), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('how', ['pretrained', 'load_from'])
def test_other_ways_to_name_a_checkpoint(how, images, tmp_path):
    source = timm_vit()
    torch.save(source.state_dict(), tmp_path / 'vit.pth')
    fine = dict(type='FixedGate', coarse=False)
    config = Config(
        dict(
            model=dict(
                type='EncoderDecoder',
                pretrained=str(tmp_path / 'vit.pth') if how == 'pretrained' else None,
                backbone=dict(type='MSViT', gate=fine, **SHAPE),
                decode_head=dict(type='FCNHead', in_channels=32, channels=8, num_classes=5, in_index=0),
            ),
            work_dir=str(tmp_path),
            default_scope='mmseg',
            experiment_name=f'weights-{how}',
            custom_hooks=[dict(type='GateLossHook')],
        )
    )
    runner = Runner.from_cfg(config)
    if how == 'pretrained':
        runner.model.init_weights()
    else:
        runner.load_checkpoint(str(tmp_path / 'vit.pth'))
    check(runner.model.backbone.eval(), timm_features(source, images), images)


def test_a_segmentor_trained_on_another_size_is_resampled_when_loaded():
    small, large = build(), build(img_size=128)
    randomize(small)
    large.load_state_dict(small.state_dict())
    table, how = resample_positions(small.pos_embed, (8, 8), 'bicubic')
    assert how == '4x4 -> 8x8' and torch.equal(large.pos_embed, table)


@pytest.mark.parametrize('shape, table, how', [
    (17, (4, 4), None), (17, (2, 8), None), (16, (4, 4), 'without cls'), (26, (3, 7), '5x5 -> 3x7'),
    (25, (4, 4), '5x5 -> 4x4, 0 extra positions'), (27, (4, 4), '5x5 -> 4x4, 2 extra positions'),
])  # fmt: skip
def test_positions_by_grid(shape, table, how):
    out, done = resample_positions(torch.randn(1, shape, 6), table, 'bicubic')
    assert out.shape == (1, 1 + table[0] * table[1], 6) and done == how


def test_report_says_what_became_of_each_tensor(tmp_path):
    weights = timm_vit().state_dict()
    weights['pos_embed'] = torch.randn(1, 26, 32)
    del weights['norm.bias']
    fitted, report = fit(build(gate=dict(type='MLPGate')), weights)
    assert report.layout == 'timm' and report.resized == {'pos_embed': '5x5 -> 4x4'}
    assert 'ln1.bias' in report.initial and 'gate.pos_embed' in report.initial
    assert set(report.unused) == {'head.weight', 'head.bias'}
    assert len(report.matched) + 1 == len(fitted)
    for words in ('layout of timm', 'pos_embed 5x5 -> 4x4', 'ln1.bias', 'head.weight'):
        assert words in str(report)


@pytest.mark.parametrize('make, message', [
    (lambda path: torch.save(TimmViT(embed_dim=48, depth=3, num_heads=2).state_dict(), path),
     'wanted at least 90% of the backbone, got 0%'),
    (lambda path: torch.save(TimmViT(embed_dim=32, depth=1, num_heads=2).state_dict(), path), 'got 43% of its tensors'),
    (lambda path: torch.save({'fc.weight': torch.zeros(2)}, path), r"wanted a ViT in the layout of .* got 1 tensors"),
    (lambda path: path.write_bytes(b'PK\x03\x04 not a checkpoint'), 'wanted a whole checkpoint, got .*cannot be read'),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, message, tmp_path):
    make(tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=message):
        build(tmp_path / 'bad.pth')


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='wanted a file, got no/such.pth'):
        build('no/such.pth')


class Harmful:
    def __reduce__(self):
        return print, ('this was executed',)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({'state_dict': {}, 'more': Harmful()}, tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=r'builtins.print and could run code. If you trust it'):
        read_checkpoint(str(tmp_path / 'bad.pth'))
    assert 'executed' not in capsys.readouterr().out


def test_what_mmengine_puts_beside_the_weights_is_read_as_empty_shells(tmp_path):
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(
        {'state_dict': {'a': torch.ones(2)}, 'message_hub': {'loss': buffer, 'x': np.float64(3)}}, tmp_path / 'a.pth'
    )
    assert torch.equal(unwrap(read_checkpoint(str(tmp_path / 'a.pth')))['a'], torch.ones(2))


def test_converter_writes_what_mmsegs_own_vit_loads(images, tmp_path):
    source = timm_vit()
    torch.save(source.state_dict(), tmp_path / 'timm.pth')
    tool = [sys.executable, '-W', 'ignore', ROOT / 'tools/convert_vit.py']
    done = subprocess.run([*tool, tmp_path / 'timm.pth', tmp_path / 'mmseg.pth'], capture_output=True, text=True)
    assert done.returncode == 0 and 'from the layout of timm' in done.stdout, done.stderr
    dense = VisionTransformer(patch_bias=True, **SHAPE)
    dense.load_state_dict(torch.load(tmp_path / 'mmseg.pth'), strict=False)
    dense.eval()
    check(dense, timm_features(source, images), images)


@pytest.mark.parametrize('how', ['init_cfg', 'load_from'])
def test_a_dense_segmentor_without_patch_bias_is_not_given_a_random_one(how, images, tmp_path):
    """mmseg's own ViTs have none; here it is zero, so that features are theirs."""
    head = dict(type='FCNHead', in_channels=32, channels=8, num_classes=5, in_index=0)
    dense = dict(type='VisionTransformer', **SHAPE)
    source = MODELS.build(dict(type='EncoderDecoder', backbone=dense, decode_head=head))
    randomize(source)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'dense.pth')
    source.backbone.eval()
    if how == 'init_cfg':
        backbone = build(tmp_path / 'dense.pth')
    else:
        fine = dict(type='MSViT', gate=dict(type='FixedGate', coarse=False), **SHAPE)
        config = dict(
            model=dict(type='EncoderDecoder', backbone=fine, decode_head=head),
            work_dir=str(tmp_path),
            default_scope='mmseg',
            experiment_name='no-patch-bias',
            custom_hooks=[dict(type='GateLossHook')],
        )
        runner = Runner.from_cfg(Config(config))
        runner.load_checkpoint(str(tmp_path / 'dense.pth'))
        backbone = runner.model.backbone.eval()
    with torch.no_grad():
        for a, b in zip(backbone(images), source.backbone(images)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_address_is_downloaded_once_and_read_as_a_file(images, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'site').mkdir()
    source = timm_vit()
    save_file(source.state_dict(), tmp_path / 'site/vit.safetensors')
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / 'site'))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}/vit.safetensors'
        check(build(address), timm_features(source, images), images)
        with pytest.raises(HTTPError):
            read_checkpoint(address.replace('vit', 'none'))
        server.shutdown()
    assert [p.name for p in (tmp_path / 'cache/hub/checkpoints').iterdir()] == ['vit.safetensors']
    read_checkpoint(address)  # without the server
