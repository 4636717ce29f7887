"""Segmentors as ONNX files: what runs them, ONNX Runtime or OpenVINO, against torch."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, build_msvit, randomize, write_model
from mmengine.config import Config, ConfigDict
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import nn

from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.tokens.embedding import mean_weights
from mmseg_msvit.tooling.command_line import InputError
from mmseg_msvit.tooling.testset import FileReader
from mmseg_msvit.versions import BEFORE_TORCH_26
from mmseg_msvit.vit.attention import attend, attend_padded

if BEFORE_TORCH_26:
    pytest.skip('the export wants torch 2.6 or later', allow_module_level=True)
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

from mmseg_msvit.tooling.export import AveragePool, export_onnx, metadata, save_onnx  # noqa: E402

FCN = dict(type='FCNHead', in_channels=32, channels=8, num_classes=5, in_index=0, num_convs=1, norm_cfg=dict(type='BN'))
MASK = dict(
    type='SegmenterMaskTransformerHead', in_channels=32, channels=32, num_classes=5, num_layers=1, num_heads=2,
    embed_dims=32, dropout_ratio=0.0,
)  # fmt: skip
UPER = dict(
    type='UPerHead', in_channels=[8, 8], in_index=[0, 1], channels=8, num_classes=5, norm_cfg=dict(type='SyncBN')
)
NECK = dict(type='MultiLevelNeck', in_channels=[32, 32], out_channels=8, scales=[2, 0.5])
VIT = {**SMALL, 'type': 'MSViT', 'num_layers': 2, 'out_indices': 1}
THREE = dict(scales=(16, 32, 64), coarse_embed='resize+detail', num_register_tokens=2, interpolate_mode='bilinear')
BEIT = {**VIT, 'type': 'MSBEiT', 'final_norm': False, 'qv_bias': True, 'init_values': 0.1}
SEGMENTORS = {
    'fcn': dict(backbone=VIT, decode_head=FCN),
    'mask on tokens, three scales': dict(
        backbone={**VIT, **THREE, 'out_type': 'tokens'}, decode_head={**MASK, 'type': 'TokenSegmenterHead'}
    ),
    'uper, context': dict(
        backbone={**VIT, 'out_indices': (0, 1), 'gate': dict(type='ContextGate'), 'patch_size': 14, 'scales': (14, 28),
                  'img_size': 56, 'interpolate_mode': 'bicubic-antialias', 'out_detail': 'residual'},
        neck=NECK,
        decode_head=UPER,
    ),
    'mask, glance': dict(
        backbone={**VIT, 'scales': (16, 32, 64), 'gate': dict(type='GlanceGate', blocks=1)}, decode_head=MASK
    ),
    'rotary, glance': dict(
        backbone={**VIT, 'gate': dict(type='GlanceGate', blocks=2), 'rope': 'dinov3', 'qkv_bias': 'qv',
                  'ffn_type': 'swiglu', 'layer_scale_init_value': 0.1, 'out_type': 'tokens'},
        decode_head={**FCN, 'type': 'TokenLinearHead', 'num_convs': 0, 'channels': 32, 'norm_cfg': None},
    ),
    'beit': dict(backbone=BEIT, decode_head=FCN),
    'mask, smaller': dict(
        backbone={**VIT, 'scales': (16, 32, 64), 'input_scale': 0.8, 'out_detail': 'smooth'}, decode_head=MASK
    ),
}  # fmt: skip


@cache
def segmentor(name):
    """One whose gate says many things, with random weights."""
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(type='EncoderDecoder', test_cfg=dict(mode='whole'), **SEGMENTORS[name])).eval()
    randomize(model)
    for gate in model.backbone.gates:
        nn.init.normal_(gate.last.weight)
        nn.init.zeros_(gate.last.bias)
    return model


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Call with a segmentor's name and options of the export: gives the file, made once."""
    folder = tmp_path_factory.mktemp('onnx')

    @cache
    def make(name, int8=False, fp16=False, **options):
        path = folder / f'{name}-{int8}-{fp16}-{options}.onnx'
        save_onnx(program(name, **options), path, dict(made='"by a test"'), int8, fp16)
        return path

    @cache
    def program(name, **options):
        return export_onnx(segmentor(name), **options)

    return make


def session(path):
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])


def in_torch(model, images, **knob):
    """Logits and the tokens of each image, by a threshold or a token_budget."""
    for name, value in knob.items():
        setattr(model.backbone.select, name, value)
    with torch.no_grad(), record_tokens(model) as seen:
        logits = model.encode_decode(images, [dict(img_shape=images.shape[2:])])
    return logits.numpy(), seen[0][0].active_counts().numpy()


def in_openvino(path):
    openvino = pytest.importorskip('openvino')
    compiled = openvino.compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda names, inputs: list(compiled(inputs).values())


IMAGES = [(1, 96, 128), (3, 70, 131), (2, 64, 64), (1, 20, 33)]


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('name', SEGMENTORS)
def test_file_equals_torch(exported, name, engine):
    backbone = SEGMENTORS[name]['backbone']
    smooths = 'input_scale' in backbone or 'antialias' in backbone.get('interpolate_mode', '')
    if engine == 'openvino' and smooths:
        pytest.skip('OpenVINO 2026.4 resizes without antialiasing')
    model, path = segmentor(name), exported(name)
    run = session(path).run if engine == 'onnxruntime' else in_openvino(path)
    counts = set()
    # OpenVINO does not pool the positions of an image that is smaller than a region.
    for shape in IMAGES if engine == 'onnxruntime' else IMAGES[:3]:
        images = torch.randn(shape[0], 3, *shape[1:])
        for threshold in (0.0, 0.3, 0.5, 0.8, 1.0):
            wanted, tokens = in_torch(model, images, threshold=threshold, token_budget=None)
            logits, used = run(None, dict(image=images.numpy(), threshold=np.array(threshold, np.float32)))
            np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)
            first, second = np.sort(wanted, 1)[:, :-3:-1].swapaxes(0, 1)
            assert (logits.argmax(1) == wanted.argmax(1))[first - second > 2e-4].all()  # else it is a tie
            assert used.tolist() == tokens.tolist() and used.dtype == np.int64
            counts.update(tokens.tolist())
    assert len(counts) > 10  # from all coarse to all fine, and between


@pytest.mark.slow
def test_batch_equals_its_rows(exported):
    run = session(exported('fcn')).run
    images = np.random.default_rng(0).normal(size=(3, 3, 70, 131)).astype(np.float32)
    images[0] *= 0.1
    knob = dict(threshold=np.array(0.5, np.float32))
    logits, used = run(None, dict(image=images, **knob))
    rows = [run(None, dict(image=image[None], **knob)) for image in images]
    assert len(set(used.tolist())) > 1 and used.tolist() == [row[1][0] for row in rows]
    np.testing.assert_allclose(logits, np.concatenate([row[0] for row in rows]), atol=1e-5)


@pytest.mark.slow
def test_budget_and_classes(exported):
    name = 'mask on tokens, three scales'
    model, run = segmentor(name), session(exported(name, budget=True, classes=True)).run
    images = torch.randn(3, 3, 150, 90)
    for tokens in (9.0, 14.5, 30.0, 47.0, 100.0):
        logits, wanted = in_torch(model, images, token_budget=tokens)
        classes, used = run(['classes', 'tokens_used'], dict(image=images.numpy(), tokens=np.array(tokens, np.float32)))
        assert used.tolist() == wanted.tolist() and used.mean() <= max(tokens, 9)
        assert classes.dtype == np.uint8 and classes.shape == (3, 150, 90)
        assert (classes == logits.argmax(1)).all()


@pytest.mark.slow
def test_int8_leaves_the_gate_and_its_decision_alone(exported):
    whole, small = exported('fcn'), exported('fcn', int8=True)
    images = np.random.default_rng(0).normal(size=(2, 3, 96, 128)).astype(np.float32)
    for threshold in (0.2, 0.5, 0.8):
        inputs = dict(image=images, threshold=np.array(threshold, np.float32))
        (wanted, tokens), (logits, used) = (session(path).run(None, inputs) for path in (whole, small))
        assert used.tolist() == tokens.tolist()
        assert (logits != wanted).any() and (logits.argmax(1) == wanted.argmax(1)).mean() > 0.9
    graph = onnx.load(small)
    assert sum(node.op_type == 'MatMulInteger' for node in graph.graph.node) == 2 * 4  # q, k and v in one, of 2 blocks
    assert {p.key: p.value for p in graph.metadata_props}['made'] == '"by a test"'


@pytest.mark.slow
def test_onnx_runtime_says_what_is_wrong_with_an_image(exported):
    run, knob = session(exported('fcn')).run, dict(threshold=np.array(0.5, np.float32))
    with pytest.raises(Exception, match='Invalid rank for input: image Got: 3 Expected: 4'):
        run(None, dict(image=np.zeros((3, 64, 64), np.float32), **knob))
    with pytest.raises(Exception, match=r'invalid dimensions for input: image[\s\S]*index: 1 Got: 4 Expected: 3'):
        run(None, dict(image=np.zeros((1, 4, 64, 64), np.float32), **knob))
    with pytest.raises(Exception, match=r'Unexpected input data type.*double.*expected.*float'):
        run(None, dict(image=np.zeros((1, 3, 64, 64)), **knob))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['fcn', 'mask, glance'])
def test_fp16_decides_in_float32_and_answers_as_torch(name, exported):
    whole, half = exported(name), exported(name, fp16=True)
    weights = {value.name: value.data_type for value in onnx.load(half).graph.initializer}
    assert {weights[n] for n in weights if '.gate' in n} == {onnx.TensorProto.FLOAT}
    in_blocks = [weights[n] for n in weights if re.search(r'backbone\.layers\.\d+\.(attn|ffn)\..*weight', n)]
    assert in_blocks.count(onnx.TensorProto.FLOAT16) == len(in_blocks) or 'glance' in name
    assert session(half).get_modelmeta().custom_metadata_map['made'] == '"by a test"'
    assert {value.type for value in session(half).get_inputs()} == {'tensor(float)'}
    for shape in IMAGES:
        inputs = dict(image=np.random.default_rng(0).standard_normal((shape[0], 3, *shape[1:]), np.float32))
        for threshold in (0, 0.5, 1):
            inputs['threshold'] = np.array(threshold, np.float32)
            (wanted, counts), (logits, used) = (session(file).run(None, inputs) for file in (whole, half))
            assert used.tolist() == counts.tolist()
            assert (wanted.argmax(1) == logits.argmax(1)).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['MSViT', 'MSBEiT'])
def test_backbone_under_torch_export(kind):
    options = {k: v for k, v in {**VIT, 'MSBEiT': BEIT}.get(kind, VIT).items() if k != 'type'}
    model = build_msvit(type=kind, **options)
    nn.init.normal_(model.gate.last.weight)
    some = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 70, 131),),
        dynamic_shapes=({0: some, 2: some, 3: some},),
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for shape in ((1, 96, 128), (3, 70, 131), (4, 224, 65)):
        images = torch.randn(shape[0], 3, *shape[1:])
        torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=0)


def test_padded_attention_equals_the_pack():
    lengths = [5, 1, 8]
    qkv = torch.randn(14, 3, 2, 4, dtype=torch.float64)
    padded = torch.full((3, 8), 14)
    for image, rows in enumerate(torch.arange(14).split(lengths)):
        padded[image, : len(rows)] = rows
    places = torch.cat([8 * image + torch.arange(n) for image, n in enumerate(lengths)])
    torch.testing.assert_close(attend_padded(qkv, padded, places), attend(qkv, lengths))
    scores = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    wanted = attend(qkv, lengths, bias=lambda i: scores[i, :, : lengths[i], : lengths[i]])
    torch.testing.assert_close(attend_padded(qkv, padded, places, bias=lambda _: scores), wanted)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (6, 6)])
@pytest.mark.parametrize('shape', [(4, 5), (6, 6), (7, 13)])
def test_pooling_by_matrices(size, shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(AveragePool(size)(x), F.adaptive_avg_pool2d(x, size))
    assert mean_weights(28, 16, x).sum(1).tolist() == pytest.approx([1] * 16)


class HostHead(FCNHead):
    """One that reads a number on the host."""

    def forward(self, inputs):
        return super().forward(inputs) * float(inputs[0].mean())


def test_what_cannot_be_exported_is_named():
    model = EncoderDecoder(VIT, FCN, test_cfg=ConfigDict(mode='slide', crop_size=(64, 64), stride=(32, 32)))
    with pytest.raises(InputError, match="wanted inference of whole images, got test_cfg of mode 'slide'"):
        export_onnx(model)
    model = EncoderDecoder(VIT, {**FCN, 'num_classes': 300}, test_cfg=ConfigDict(mode='whole'))
    with pytest.raises(InputError, match='--classes: wanted at most 256 classes, which uint8 holds, got 300'):
        export_onnx(model, classes=True)


@pytest.mark.slow
def test_a_head_that_cannot_be_exported_is_named():
    model = EncoderDecoder(VIT, FCN, test_cfg=ConfigDict(mode='whole'))
    model.decode_head = HostHead(**{k: v for k, v in FCN.items() if k != 'type'})
    with pytest.raises(InputError, match=r'CONFIG: decode_head \(HostHead\) cannot be exported: .+'):
        export_onnx(model)


NO_TORCH = """
import re
import runpy, sys
sys.modules['torch'] = None  # to import it is an error
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_a_cascade_answers_by_its_last_head(config, tmp_path):
    fine = {'type': 'OCRHead', 'ocr_channels': 8, **{k: v for k, v in FCN.items() if k not in ('type', 'num_convs')}}
    model = MODELS.build(
        ConfigDict(
            type='CascadeEncoderDecoder', num_stages=2, backbone=VIT, decode_head=[FCN, fine],
            data_preprocessor=config.model.data_preprocessor, test_cfg=dict(mode='whole'),
        )
    ).eval()  # fmt: skip
    randomize(model)
    save_onnx(export_onnx(model), tmp_path / 'model.onnx', metadata(model, config))
    images = torch.randn(2, 3, 70, 96)
    found = session(tmp_path / 'model.onnx').run(None, dict(image=images.numpy(), threshold=np.array(0.5, np.float32)))
    logits, counts = in_torch(model, images, threshold=0.5)
    assert found[1].tolist() == counts.tolist()
    np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_file_runs_without_torch_and_by_itself(exported, toy, config, scenes, tmp_path):
    """A graph of some model with the notes of the toy config; test_commands.py has the tool that writes both."""
    file, graph = tmp_path / 'model.onnx', onnx.load(exported('fcn'))
    onnx.helper.set_model_props(graph, metadata(MODELS.build(config.model), config))
    onnx.save(graph, file)
    notes = {name: json.loads(value) for name, value in session(file).get_modelmeta().custom_metadata_map.items()}
    assert notes['classes'][0] == 'sky' and notes['palette'][0] == [120, 170, 230]
    pixels = config.model.data_preprocessor
    assert notes['mean'] == pytest.approx(pixels.mean) and notes['std'] == pytest.approx(pixels.std)
    assert notes['bgr_to_rgb'] is True and notes['size_divisor'] == 1 and notes['resize'] == []
    assert notes['patch'] == 16 and notes['scales'] == [16, 32] and notes['threshold'] == 0.5

    images = tmp_path / 'images'
    shutil.copytree(scenes / 'images/val', images)
    (images / 'x.png').write_bytes(b'no picture')

    def run(*args):
        command = [sys.executable, '-c', NO_TORCH, 'tools/run_onnx.py', *(str(arg) for arg in args)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run(file, images, '--out', tmp_path / 'out', '--threshold', 1)
    assert code == 1 and err.strip() == f'image: wanted a picture, got {images}/x.png, which cannot be read'
    assert '0000.png: 37 tokens; ' in out and f'3 pictures in {tmp_path}/out' in out  # 36 cells and cls
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [f'000{i}.png.png' for i in range(3)]
    assert cv2.imread(str(tmp_path / 'out/0000.png.png')).shape == (96, 96, 3)
    _, out, _ = run(file, images / '0000.png', '--out', tmp_path / 'out', '--threshold', 0)
    assert '0000.png: 10 tokens; ' in out
    code, _, err = run(file, images, '--tokens', 20)
    assert code == 1 and err.strip() == '--tokens: the file has an input of threshold in its place'
    code, _, err = run(toy[1], images)
    assert code == 1 and err.startswith(f'MODEL.onnx: wanted an ONNX file, got {toy[1]}: ')
    code, _, err = run(images / 'nothing.onnx', images)
    assert code == 1 and 'which is not there' in err


@pytest.mark.parametrize('steps', [
    [],
    [dict(type='Resize', scale=(200, 100), keep_ratio=True)],
    [dict(type='Resize', scale=(70, 90))],
    [dict(type='Resize', scale=(200, 77), keep_ratio=True), dict(type='ResizeToMultiple', size_divisor=32)],
])  # fmt: skip
def test_files_are_read_as_the_config_says(steps, config, scenes):
    picture = cv2.imread(str(next((scenes / 'images/val').iterdir())))[:80]  # 80 x 96
    config.model.data_preprocessor.test_cfg = dict(size_divisor=20)
    config.test_dataloader.dataset.pipeline[1:1] = steps
    model = MODELS.build(config.model)
    cv2.imwrite(str(scenes.parent / 'picture.png'), picture)
    data, _ = FileReader(config).read(scenes.parent / 'picture.png')
    batch = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
    wanted = model.data_preprocessor(batch, training=False)['inputs']
    prepare = runpy.run_path(str(ROOT / 'tools/run_onnx.py'))['prepare']
    notes = {name: json.loads(value) for name, value in metadata(model, config).items()}
    found, size = prepare(picture, notes)
    assert size == tuple(data['inputs'].shape[1:])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize('step', [
    dict(type='Resize', scale_factor=0.5), dict(type='Resize', scale=(200, 100), interpolation='nearest'),
    dict(type='ResizeShortestEdge', scale=40, max_size=200), dict(type='Pad', size=(128, 128)), dict(type='CLAHE'),
    dict(type='Resize', scale=(200, 100), backend='pillow'), dict(type='LoadImageFromFile', imdecode_backend='pillow'),
])  # fmt: skip
def test_what_a_file_cannot_tell_of_is_refused(step, config):
    config.test_dataloader.dataset.pipeline.insert(1, step)
    model = MODELS.build(config.model)
    with pytest.raises(InputError, match=f'wanted a test pipeline of .* got {step["type"]}'):
        metadata(model, config)
    config.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(200, 100))
    config.model.decode_head.align_corners = True
    with pytest.raises(InputError, match='wanted a head with align_corners=False where the test pipeline resizes'):
        metadata(MODELS.build(config.model), config)
    config.test_dataloader.dataset.pipeline.pop(1)
    config.model.data_preprocessor.test_cfg = dict(size=(128, 128))
    with pytest.raises(InputError, match=r'test_cfg with size_divisor alone, got size=\(128, 128\)'):
        metadata(MODELS.build(config.model), config)


def test_errors_of_the_export_tool(toy, tool, tmp_path):
    end = tool('export_onnx.py', *toy, tmp_path / 'no/model.onnx')
    assert end == f'OUT.onnx: wanted a file in a folder, got {tmp_path}/no/model.onnx, whose folder is not there'
    config = Config.fromfile(toy[0])
    config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    config.dump(str(tmp_path / 'slide.py'))
    end = tool('export_onnx.py', tmp_path / 'slide.py', toy[1], tmp_path / 'model.onnx')
    assert "got test_cfg of mode 'slide'" in end and not Path(tmp_path / 'model.onnx').exists()
    config.model.test_cfg = dict(mode='whole')
    config.model.backbone.token_budget = 20
    config.dump(str(tmp_path / 'budget.py'))
    end = tool('export_onnx.py', tmp_path / 'budget.py', toy[1], tmp_path / 'model.onnx')
    assert end.startswith('--budget: wanted it, since the config has a token_budget')
    config.model.backbone.update(token_budget=None, gate=dict(type='GlanceGate', blocks=1))
    end = tool('export_onnx.py', *write_model(config, tmp_path, 'glance'), tmp_path / 'model.onnx', '--int8')
    assert end.startswith('--int8: wanted a gate that sees pixels, got GlanceGate')
    config.model.backbone = dict(type='ResNetV1c', depth=18)
    config.dump(str(tmp_path / 'resnet.py'))
    end = tool('export_onnx.py', tmp_path / 'resnet.py', toy[1], tmp_path / 'model.onnx')
    assert end.startswith('CONFIG: wanted a backbone of type MSViT, got ResNetV1c in ')
