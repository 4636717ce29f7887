"""Images that are not three bands of eight bits, files that are broken, and models that take two images at once."""

import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from copy import deepcopy

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, build_runner, write_model
from mmseg.models import EncoderDecoder
from mmseg.registry import HOOKS, MODELS
from torch import nn

from mmseg_msvit.measuring.visualization import picture_of
from mmseg_msvit.tooling import command_line
from mmseg_msvit.tooling.command_line import InputError, about
from mmseg_msvit.tooling.explorer import Explorer
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import SUFFIXES, FileReader, list_images, pair_truth

tifffile = pytest.importorskip('tifffile')
of_sixteen_bits = pytest.mark.skipif(not hasattr(torch, 'uint16'), reason='torch before 2.3 has no uint16')
SPLITS = 'train_dataloader', 'val_dataloader', 'test_dataloader'


def as_vit(config):
    """Its dense twin."""
    config = deepcopy(config)
    for name in ('train_tokens', 'coarse_embed', 'gate_loss'):
        config.model.backbone.pop(name)
    config.model.backbone.type, config.custom_hooks = 'VisionTransformer', []
    return config


def tiffs(config, folder, bands, count=2, dtype=np.uint16, most=4095):
    """Images of so many bands and their labels, and what reads them in the config's place of drawn scenes."""
    rng = np.random.default_rng(0)
    for kind in ('images/val', 'images/train', 'annotations/val', 'annotations/train'):
        (folder / kind).mkdir(parents=True)
    for split in ('train', 'val'):
        for i in range(count):
            pixels = (rng.random((96, 112, bands)) * most).astype(dtype)
            pixels, how = (pixels, dict(planarconfig='contig')) if bands > 1 else (pixels[..., 0], {})
            tifffile.imwrite(folder / f'images/{split}/{i}.tiff', pixels, photometric='minisblack', **how)
            cv2.imwrite(str(folder / f'annotations/{split}/{i}.png'), rng.integers(0, 7, (96, 112), dtype=np.uint8))
    load = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile')
    for name in SPLITS:
        config[name].dataset.update(data_root=str(folder), img_suffix='.tiff')
        config[name].dataset.pipeline = [load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    config.model.data_preprocessor.update(mean=[most / 2] * bands, std=[most / 4] * bands, size=None, size_divisor=32)
    config.model.backbone.in_channels = bands
    return config


@pytest.mark.slow
@of_sixteen_bits
@pytest.mark.parametrize('bands', [1, 12])
def test_bands_of_sixteen_bits_go_through_every_tool(bands, config, tool, tmp_path):
    folder = tmp_path / 'scenes'
    config = tiffs(config, folder, bands)
    model, dense = write_model(config, tmp_path), write_model(as_vit(config), tmp_path, 'dense')
    images, out = folder / 'images/val', tmp_path / 'out'
    device = '--device', 'cpu'
    assert tool('show_tokens.py', *model, images, '--out', out, *device) is None
    drawn = cv2.imread(str(out / '0.png'))
    assert 60 < drawn[40:400, 20:480].mean() < 200  # neither black nor white
    assert tool('analyze_gate.py', *model, '--html', tmp_path / 'gate.html', *device) is None
    assert tool('get_flops.py', *model, *device) is None
    assert (
        tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, '--out', tmp_path / 'sweep', *device)
        is None
    )
    assert tool('fit_gate.py', *dense, '--out', tmp_path / 'a', '--steps', 1, '--images', images, *device) is None
    assert tool('fit_gate.py', *dense, '--out', tmp_path / 'b', '--steps', 1, '--target', 'labels', *device) is None

    file = tmp_path / 'model.onnx'
    assert tool('export_onnx.py', *model, file, '--classes') is None
    command = [sys.executable, ROOT / 'tools/run_onnx.py', file, images, '--out', tmp_path / 'pictures']
    shutil.copy(next((ROOT / 'docs').glob('*.jpg')), images / 'other.jpg')  # of three bands
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and '2 pictures in' in done.stdout
    assert done.stderr.strip().startswith(f'image: wanted {bands} bands of finite numbers, got others in') or (
        done.stderr.strip().startswith('image: wanted a picture, got') and 'other.jpg' in done.stderr
    )
    reader = runpy.run_path(str(ROOT / 'tools/run_onnx.py'))
    session, notes = reader['load'](file)
    picture = reader['read'](images / '0.tiff', notes)
    knob = reader['choose_knob'](session, notes, None, None)
    loaded = load_model(load_config(model[0]), model[1], 'cpu')
    data, _ = FileReader(load_config(model[0])).read(images / '0.tiff')
    with torch.no_grad():
        (sample,) = loaded.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))
    found, _ = reader['predict'](session, knob, picture, notes)
    assert (found == sample.pred_sem_seg.data[0].numpy()).mean() > 0.999


@of_sixteen_bits
@pytest.mark.parametrize(
    'bands, said', [(1, '0 to 4094'), (4, 'bands 3, 2, 1 of 4, 0 to 40'), (12, 'bands 3, 2, 1 of 12')]
)
def test_the_demo_sees_what_the_pipeline_sees(bands, said, config, tmp_path):
    config = tiffs(config, tmp_path / 'scenes', bands)
    path, checkpoint = write_model(config, tmp_path)
    config = load_config(path)
    explorer = Explorer(load_model(config, checkpoint, 'cpu'), FileReader(config))
    file = tmp_path / 'scenes/images/val/0.tiff'
    opened = explorer.open(file.read_bytes())
    wanted = tifffile.imread(file).reshape(96, 112, bands)
    assert (opened.data['inputs'].permute(1, 2, 0).numpy() == wanted).all() and wanted.max() > 4000
    assert opened.pixels.shape == (96, 112, 3) and 100 < opened.pixels.mean() < 155
    assert said in explorer.look(file.read_bytes(), 'budget', 0.5)['shown']


@of_sixteen_bits
def test_the_demo_makes_large_images_of_many_bands_smaller(config, tmp_path, monkeypatch):
    monkeypatch.setattr('mmseg_msvit.tooling.explorer.LONGEST', 56)
    config = tiffs(config, tmp_path / 'scenes', 12, 1)
    config.model.backbone.gate = dict(type='VarianceGate')
    explorer = Explorer(MODELS.build(config.model).eval(), FileReader(config))
    opened = explorer.open((tmp_path / 'scenes/images/val/0.tiff').read_bytes())
    assert opened.data['inputs'].shape == (12, 48, 56) and opened.data['inputs'].dtype == torch.uint16
    assert opened.prediction.shape == (48, 56)


@pytest.mark.parametrize('dtype', [np.int32, np.uint32, np.int8])
def test_the_demo_says_what_opencv_cannot_make_smaller(dtype, config, tmp_path, monkeypatch):
    monkeypatch.setattr('mmseg_msvit.tooling.explorer.LONGEST', 56)
    config = tiffs(config, tmp_path / 'scenes', 12, 1)
    config.test_dataloader.dataset.img_suffix = '/image.tiff'  # a folder for each image
    explorer = Explorer(MODELS.build(config.model).eval(), FileReader(config))
    tifffile.imwrite(tmp_path / 'a.tiff', np.zeros((96, 112, 12), dtype))
    with pytest.raises(InputError, match='^image: '):
        explorer.open((tmp_path / 'a.tiff').read_bytes())


@of_sixteen_bits
def test_pictures_are_stretched_where_pixels_have_not_eight_bits():
    def ramp(low, high, dtype):
        return torch.linspace(low, high, 256, dtype=torch.float64).to(dtype).view(1, 16, 16).expand(3, -1, -1)

    for dtype, low, high, said in [
        (torch.uint8, 0, 255, ''), (torch.uint8, 3, 40, ''), (torch.float32, 0, 255, ''), (torch.float32, 3, 40, ''),
        (torch.uint16, 0, 4095, ', 0 to 4095'), (torch.float32, -2, 2, ', -2 to 2'), (torch.float32, 0, 1, ', 0 to 1'),
        (torch.int16, 200, 900, ', 200 to 900'),
    ]:  # fmt: skip
        picture, found = picture_of(ramp(low, high, dtype))
        assert found == said and picture.dtype == np.uint8
        ends = (0, 255) if said else (low, high)
        assert (picture.min(), picture.max()) == ends
    bgr = torch.stack([torch.full((2, 2), i, dtype=torch.uint8) for i in (1, 2, 3, 9)])
    picture, said = picture_of(bgr)
    assert picture[0, 0].tolist() == [3, 2, 1] and said == ', bands 3, 2, 1 of 4'
    assert picture_of(bgr[:2])[1] == ', band 1 of 2' and picture_of(bgr[:1])[0][0, 0].tolist() == [1, 1, 1]
    assert picture_of(torch.zeros(3, 2, 2))[1] == ''  # nothing to stretch
    broken = ramp(0, 4000, torch.float32).clone()
    broken[0, 0, 0] = torch.nan
    assert picture_of(broken)[1] == ', 0 to 4000'


def test_folders_of_whatever_opencv_reads_are_listed(tmp_path):
    for name in ('a.tif', 'b.TIFF', 'c.jp2', 'd.ppm', 'e.txt', 'f.webp'):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ['a.tif', 'b.TIFF', 'c.jp2', 'd.ppm', 'f.webp']
    assert runpy.run_path(str(ROOT / 'tools/run_onnx.py'))['SUFFIXES'] == SUFFIXES
    for suffix in SUFFIXES:
        assert cv2.haveImageWriter(f'a{suffix}') or suffix in ('.jpe', '.dib', '.gif', '.hdr', '.exr', '.avif', '.jp2')
    truth = tmp_path / 'truth'
    truth.mkdir()
    for name in ('a.tif', 'd.png', 'd.tif'):
        (truth / name).touch()
    assert [path.name for path in pair_truth([tmp_path / 'a.tif', tmp_path / 'd.ppm'], truth)] == ['a.tif', 'd.png']


@pytest.mark.slow
def test_every_tool_names_the_file_that_is_not_finite(config, tool, tmp_path):
    folder = tmp_path / 'scenes'
    config = tiffs(config, folder, 3, dtype=np.float32)
    for split in ('train', 'val'):
        pixels = tifffile.imread(folder / f'images/{split}/1.tiff')
        pixels[10:14, 10:14] = np.nan
        tifffile.imwrite(folder / f'images/{split}/1.tiff', pixels)
    model, dense = write_model(config, tmp_path), write_model(as_vit(config), tmp_path, 'dense')
    images, out = folder / 'images/val', tmp_path / 'out'
    file = tmp_path / 'model.onnx'
    assert tool('export_onnx.py', *model, file) is None
    ends = {
        'get_flops': tool('get_flops.py', *model),
        'analyze_gate': tool('analyze_gate.py', *model),
        'show_tokens': tool('show_tokens.py', *model, images, '--out', out),
        'fit_gate': tool('fit_gate.py', *dense, '--out', tmp_path / 'fitted', '--steps', 1),
        'fit_gate --images': tool(
            'fit_gate.py', *dense, '--out', tmp_path / 'fitted', '--steps', 1, '--images', images
        ),
        'tradeoff': tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, '--out', tmp_path / 'sweep'),
        'compare_onnx': tool('compare_onnx.py', *model, file),
        'run_onnx': tool('run_onnx.py', file, images, '--out', tmp_path / 'pictures'),
    }
    for name, end in ends.items():
        assert '1.tiff' in end and '\n' not in end and ('finite' in end), (name, end)
    assert [path.name for path in out.iterdir()] == ['0.png']  # it goes on after a file, and says so at the end
    assert not (tmp_path / 'fitted').exists()
    config.visualizer.vis_backends = []
    with pytest.raises(FloatingPointError, match=r'TokenMapHook cannot draw .*1\.tiff: pixels of the images must be'):
        HOOKS.build(dict(type='TokenMapHook', indices=(1,))).before_train(build_runner(config))


def test_an_error_is_the_files_or_ours(capsys):
    with pytest.raises(InputError, match='^a.png: broken$'), about('a.png'):
        raise ValueError('broken\nand more')
    with pytest.raises(InputError, match='^a.png is broken$'), about('a.png'):
        raise InputError('a.png is broken')
    with pytest.raises(KeyError, match='fault'), about('a.png'):  # a fault of the code keeps its traceback
        raise KeyError('fault')
    assert 'The error below came with a.png' in capsys.readouterr().err
    assert KeyError not in command_line.OF_FILES
    for error in (zlib.error, struct.error):  # of broken TIFFs
        with pytest.raises(InputError, match='^a.tif: broken$'), about('a.tif'):
            raise error('broken')


class Siamese(EncoderDecoder):
    """Change detection: one backbone on both halves of six bands."""

    def extract_feat(self, inputs):
        before, after = (self.backbone(half) for half in inputs.split(3, 1))
        return tuple((a - b).abs() for a, b in zip(before, after))


class TwoScales(EncoderDecoder):
    """The backbone runs on an image and on its half."""

    def extract_feat(self, inputs):
        small = nn.functional.interpolate(inputs, scale_factor=0.5)
        whole, half = self.backbone(inputs), self.backbone(small)
        return tuple(a + nn.functional.interpolate(b, a.shape[2:]) for a, b in zip(whole, half))


@of_sixteen_bits
@pytest.mark.parametrize('kind, bands', [(Siamese, 6), (TwoScales, 3)])
def test_a_backbone_that_runs_twice_on_an_image_is_said_to_be_before_any_long_work(kind, bands, config, tool, tmp_path):
    registered = MODELS.register_module(name=kind.__name__, module=kind, force=True)
    assert registered is kind
    config = tiffs(config, tmp_path / 'scenes', bands)
    config.model.type, config.model.backbone.in_channels = kind.__name__, 3
    model, dense = write_model(config, tmp_path), write_model(as_vit(config), tmp_path, 'dense')
    images, out = tmp_path / 'scenes/images/val', ('--out', tmp_path / 'out')
    ends = {
        'get_flops': tool('get_flops.py', *model),
        'get_flops, dense': tool('get_flops.py', *dense),
        'analyze_gate': tool('analyze_gate.py', *model),
        'show_tokens': tool('show_tokens.py', *model, images / '0.tiff', *out),
        'fit_gate': tool('fit_gate.py', *dense, *out),
        'tradeoff': tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, *out),
        'export_onnx': tool('export_onnx.py', *model, tmp_path / 'a.onnx'),
    }
    said = f'wanted a segmentor that runs its backbone once on an image, got {kind.__name__}, which runs it 2 times'
    for name, end in ends.items():
        assert said in end and '\n' not in end, (name, end)
    config.visualizer.vis_backends = []
    with pytest.raises(ValueError, match=said):
        HOOKS.build(dict(type='TokenMapHook')).before_train(build_runner(config))
    config.test_evaluator = config.val_evaluator = [dict(type='TokenMetric')]
    config.load_from = model[1]
    assert build_runner(config).test()['msvit/tokens_mean'] > 0  # all passes count
