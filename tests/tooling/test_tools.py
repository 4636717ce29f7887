"""The tools, from their command lines, on a small model."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, build_msvit, build_runner, write_model
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image

from mmseg_msvit.gates.from_outside import deciding_by
from mmseg_msvit.measuring.flops import HeadMacs
from mmseg_msvit.tooling.command_line import InputError
from mmseg_msvit.tooling.testset import FileReader, pair_truth, picture_names
from mmseg_msvit.tooling.timing import in_turns, paired_ratios


def test_tools_share_by_the_package_alone():
    tools = list((ROOT / 'tools').rglob('*.py'))
    names = '|'.join(path.stem for path in tools)
    for path in tools:
        text = path.read_text()
        assert 'sys.path' not in text and not re.search(rf'^\s*(from|import) ({names})\b', text, re.M), path


def test_no_part_of_a_model_knows_what_the_tools_are_made_of():
    parts = [path for path in (ROOT / 'mmseg_msvit').rglob('*.py') if 'tooling' not in path.parts]
    assert len(parts) > 20 and not [path for path in parts if 'tooling' in path.read_text()]


@pytest.fixture
def printed(tool, capsys):
    """Call with a tool's name and arguments: runs it in this process, and gives what it printed."""

    def call(name, *args):
        assert tool(name, *args) is None
        return ''.join(capsys.readouterr())

    return call


@pytest.mark.slow
@pytest.mark.parametrize('slide', [False, True])
def test_get_flops_counts_what_the_test_run_counts(config, toy, printed, tmp_path, slide):
    config.test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='TokenMetric')]
    if slide:
        config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    config.dump(toy[0])
    config.load_from = toy[1]
    metrics = build_runner(config.copy()).test()
    assert 0 <= metrics['mIoU'] <= 100
    out = printed('get_flops.py', *toy, '--json', tmp_path / 'f.json')
    flops = json.loads((tmp_path / 'f.json').read_text())
    assert flops['images'] == 3 and 'head GMACs' in out
    for what in ('mean', 'p5', 'p50', 'p95'):
        assert metrics[f'msvit/tokens_{what}'] == pytest.approx(flops['tokens'][what], abs=1e-3)
        assert metrics[f'msvit/encoder_gmacs_{what}'] == pytest.approx(flops['encoder'][what], rel=1e-3)
    assert metrics['msvit/encoder_gmacs_of_dense'] == pytest.approx(100 * flops['encoder']['of_dense'], abs=0.01)
    assert flops['tokens']['dense'] == (4 * 17 if slide else 37)
    assert flops['head']['mean'] == flops['head']['dense'] > 0
    parts = sum(flops[part]['mean'] for part in ('gate', 'embedding', 'encoder', 'neck', 'head'))
    assert flops['total']['mean'] == pytest.approx(parts)


@pytest.mark.slow
def test_get_flops_of_a_dense_vit_and_of_a_shape(toy, dense, printed, tmp_path):
    printed('get_flops.py', *dense, '--json', tmp_path / 'dense.json')
    flops = json.loads((tmp_path / 'dense.json').read_text())
    assert flops['tokens']['mean'] == 37 and flops['gate']['mean'] == 0
    assert flops['total']['of_dense'] == pytest.approx(1)
    printed('get_flops.py', toy[0], '--shape', 96, 96, '--json', tmp_path / 'shape.json')
    shares = json.loads((tmp_path / 'shape.json').read_text())
    assert [shares[f'{share} coarse']['tokens'] for share in ('0%', '100%')] == [37, 10]
    assert shares['0% coarse']['encoder'] / 1e9 == pytest.approx(flops['encoder']['mean'])


@pytest.mark.slow
def test_analyze_gate_writes_a_page_that_a_browser_shows(toy, printed, tmp_path):
    out = printed('analyze_gate.py', *toy, '--out', tmp_path / 'gate.json', '--html', tmp_path / 'gate.html')
    numbers = json.loads((tmp_path / 'gate.json').read_text())
    assert numbers['images'] == 3 and numbers['dense_tokens'] == 36 and 9 <= numbers['tokens'] <= 36
    assert 'conditionality' in out
    assert len(numbers['place']['coarse']) == 3 and len(numbers['place']['coarse'][0]) == 3
    assert np.mean(numbers['place']['coarse']) == pytest.approx(numbers['coarse'], abs=1e-3)
    regions = sum(b['regions'] for b in numbers['purity'])
    coarse = sum(b['regions'] * (b['coarse'] or 0) for b in numbers['purity'])
    assert regions == 27 and coarse / regions == pytest.approx(numbers['coarse'])
    pixels = sum(c['pixels'] for c in numbers['classes'].values())
    assert pixels == 3 * 96 * 96
    assert sum(c['pixels'] * (c['coarse'] or 0) for c in numbers['classes'].values()) / pixels == pytest.approx(
        numbers['coarse']
    )

    page = (tmp_path / 'gate.html').read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []  # nothing that is not in the file
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('needs a Chromium to look at the page')
    # A second page measures the pictures of the first when they have been decoded, and writes that into its title.
    script = """<script>onload = () => {
      const pictures = [...document.images];
      document.title = pictures.filter(i => i.complete && i.naturalWidth > 100).length + ' of ' + pictures.length
        + ', ' + document.getElementById('numbers').rows.length + ' rows, overflow '
        + (document.documentElement.scrollWidth > innerWidth);
    }</script>"""
    (tmp_path / 'probe.html').write_text(page.replace('</body>', script + '</body>'))
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=480,800', '--dump-dom']
    dom = subprocess.run([*command, str(tmp_path / 'probe.html')], capture_output=True, text=True, timeout=120).stdout
    assert '<title>6 of 6, 9 rows, overflow false</title>' in dom, re.findall('<title>.*?</title>', dom)


@pytest.mark.slow
def test_three_scales_in_every_tool(config, scenes, tool, tmp_path):
    config.model.backbone.scales = (16, 32, 64)
    config.model.backbone.gate = dict(type='RandomGate', coarse_ratio=0.4)
    config.model.backbone.pop('gate_loss')
    path, weights = write_model(config, tmp_path)
    assert tool('analyze_gate.py', path, weights, '--out', tmp_path / 'a.json', '--html', tmp_path / 'a.html') is None
    numbers = json.loads((tmp_path / 'a.json').read_text())
    assert sum(numbers['scales'].values()) == pytest.approx(1) and all(n > 0 for n in numbers['scales'].values())
    assert 1 - numbers['scales']['16'] == pytest.approx(numbers['coarse'])
    assert '64 px' in (tmp_path / 'a.html').read_text()
    assert tool('show_tokens.py', path, weights, scenes / 'images/val', '--out', tmp_path) is None
    assert cv2.imread(str(tmp_path / '0000.png')).shape[1] == 5 * 480  # two panels of probability, no truth
    assert tool('get_flops.py', path, '--shape', 96, 96, '--json', tmp_path / 'f.json') is None
    shares = json.loads((tmp_path / 'f.json').read_text())
    # 36 cells in 9 regions in 4 of 64 px: all fine, and all coarsest
    assert shares['0% coarse']['tokens'] == 37 and shares['100% coarse']['tokens'] == 5
    out = ['--out', tmp_path / 'curve', '--thresholds', 0, 1, '--device', 'cpu']
    assert tool('tradeoff.py', f'ours={path},{weights}', *out) is None
    low, high = json.loads((tmp_path / 'curve/tradeoff.json').read_text())['curves']['ours']
    assert low['tokens'] == 5 and high['tokens'] == 37
    line = ['benchmark.py', path, '--size', 96, '--repeat', 1, '--gate', 'coarse', '--device', 'cpu']
    assert tool(*line, '--json', tmp_path / 'b.json', '--scales', 16, 96) is None
    rows = {row['name']: row['tokens'] for row in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert rows['MSViT'] == 2 and rows['all fine'] == 37


@pytest.mark.slow
def test_show_tokens(toy, scenes, printed, tmp_path):
    truth = scenes / 'annotations/val'
    printed('show_tokens.py', *toy, scenes / 'images/val', '--truth', truth, '--out', tmp_path / 'pictures')
    pictures = sorted((tmp_path / 'pictures').glob('*.png'))
    assert [path.name for path in pictures] == ['0000.png', '0001.png', '0002.png']
    height, width = cv2.imread(str(pictures[0])).shape[:2]
    assert width == 5 * 480 and height > 300  # five panels


def test_show_tokens_does_not_draw_over_what_it_reads(toy, scenes, tool, tmp_path):
    images = tmp_path / 'images'
    shutil.copytree(scenes / 'images/val', images)
    before = [path.read_bytes() for path in sorted(images.iterdir())]
    end = tool('show_tokens.py', *toy, images, '--out', images)
    assert end.startswith('--out: wanted a folder without these images and truths, got')
    assert [path.read_bytes() for path in sorted(images.iterdir())] == before


def test_show_tokens_keeps_namesakes_apart_and_goes_on_after_a_corrupt_image(toy, scenes, tool, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    image = cv2.imread(str(scenes / 'images/val/0000.png'))
    cv2.imwrite(str(folder / 'a.png'), image)
    cv2.imwrite(str(folder / 'a.jpg'), 255 - image)
    (folder / 'b.png').write_bytes((folder / 'a.png').read_bytes()[:40])
    (folder / 'c.png').write_bytes(b'')
    shutil.copy(folder / 'a.png', folder / 'd.png')
    end = tool('show_tokens.py', *toy, folder, '--out', tmp_path / 'out')
    assert [line.split(', which')[0] for line in end.splitlines()] == [
        f'image: wanted a picture, got {folder / name}' for name in ('b.png', 'c.png')
    ]
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['a.jpg.png', 'a.png.png', 'd.png.png']
    first, second = (cv2.imread(str(tmp_path / f'out/a.{kind}.png')) for kind in ('jpg', 'png'))
    assert (first != second).any()
    assert picture_names([folder / 'a.png', folder / 'b.jpg']) == ['a.png', 'b.png']


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_truth_is_read_as_the_test_set_reads_it(config, tmp_path, reduce_zero_label):
    ids = np.array([[0, 1, 2], [6, 255, 0]], np.uint8)
    picture = Image.fromarray(ids, mode='P')
    picture.putpalette([value for i in range(256) for value in (i, 255 - i, 30)])
    picture.save(tmp_path / 'truth.png')
    cv2.imwrite(str(tmp_path / 'image.jpg'), np.zeros((2, 3, 3), np.uint8))
    config.test_dataloader.dataset.reduce_zero_label = reduce_zero_label
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[config.test_dataloader.dataset])
    reader = FileReader(config)
    data, labels = reader.read(tmp_path / 'image.jpg', tmp_path / 'truth.png')
    wanted = [[255, 0, 1], [5, 255, 255]] if reduce_zero_label else ids.tolist()
    assert labels.tolist() == wanted and data['inputs'].shape == (3, 2, 3)
    assert reader.palette[0] == [120, 170, 230]


def test_what_the_evaluator_leaves_out_is_left_out_everywhere(toy, config, scenes, tool, tmp_path):
    """Void as 2 and as 255: the same numbers."""
    numbers = []
    for void in (2, 255):
        folder = tmp_path / str(void)
        shutil.copytree(scenes, folder)
        for path in (folder / 'annotations/val').iterdir():
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(path), np.where(labels == 2, void, labels))
        config.test_dataloader.dataset.data_root = str(folder)
        config.test_evaluator = [dict(type='TokenMetric'), dict(type='IoUMetric', ignore_index=void)]
        config.dump(str(tmp_path / 'void.py'))
        image = folder / 'images/val/0000.png'
        _, labels = FileReader(config).read(image, folder / 'annotations/val/0000.png')
        assert tool('analyze_gate.py', tmp_path / 'void.py', toy[1], '--out', tmp_path / 'gate.json') is None
        ours = f'ours={tmp_path}/void.py,{toy[1]}'
        assert tool('tradeoff.py', ours, '--thresholds', 0.5, '--device', 'cpu', '--out', tmp_path / str(void)) is None
        (point,) = json.loads((tmp_path / f'{void}/tradeoff.json').read_text())['points']
        numbers.append((labels.tolist(), json.loads((tmp_path / 'gate.json').read_text()), point['miou']))
    assert numbers[0] == numbers[1]


class Renumber(BaseTransform):
    """A data set's own way with labels."""

    def transform(self, results):
        for name in results['seg_fields']:
            results[name] = results[name] // 2
        return results


def test_truth_goes_through_the_whole_pipeline(config, scenes):
    image, truth = scenes / 'images/val/0000.png', scenes / 'annotations/val/0000.png'
    _, plain = FileReader(config).read(image, truth)
    config.test_dataloader.dataset.pipeline.insert(-1, dict(type=Renumber))
    data, labels = FileReader(config).read(image, truth)
    assert (labels == plain // 2).all() and 'gt_sem_seg' not in data['data_samples']


def test_truth_that_does_not_fit_is_named(config, scenes, tmp_path):
    reader, image = FileReader(config), scenes / 'images/val/0000.png'
    with pytest.raises(
        InputError, match=r'truth: .*0000.png of .*: labels: wanted class ids \(H, W\), got \(96, 96, 3\)'
    ):
        reader.read(image, image)
    cv2.imwrite(str(tmp_path / 'small.png'), np.zeros((48, 96), np.uint8))
    with pytest.raises(
        InputError, match=r'truth: .*small.png of .*0000.png: .* of the size of the image, \(96, 96\), got \(48, 96\)'
    ):
        reader.read(image, tmp_path / 'small.png')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises(InputError, match='truth: wanted class ids, got .*broken.png, which cannot be read'):
        reader.read(image, tmp_path / 'broken.png')
    with pytest.raises(InputError, match='truth: wanted a folder, since there are 2 images'):
        pair_truth([image, image], image)


def test_truth_that_is_not_there_is_found_out_before_the_model_is_loaded(scenes, tool, tmp_path):
    images = scenes / 'images/val'
    shutil.copy(scenes / 'annotations/val/0001.png', tmp_path)
    end = tool('show_tokens.py', 'no_config', 'no_checkpoint', images, '--truth', tmp_path)
    assert end == f'truth: wanted class ids of each image, {tmp_path}/0000.png and 1 more not there'
    end = tool('show_tokens.py', 'no_config', 'no_checkpoint', images / '0000.png', '--truth', tmp_path / 'nothing.png')
    assert end == f'truth: wanted class ids of each image, {tmp_path}/nothing.png not there'


def commands(config, checkpoint, image):
    """A command line of each tool that takes a config."""
    return [
        ('get_flops.py', config, checkpoint),
        ('analyze_gate.py', config, checkpoint),
        ('show_tokens.py', config, checkpoint, image),
        ('tradeoff.py', f'name={config},{checkpoint}', '--device', 'cpu'),
    ]


def test_tools_say_in_one_line_what_is_wrong_with_config_and_checkpoint(toy, scenes, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, other = scenes / 'images/val/0000.png', str(tmp_path / 'other.py')
    for command in commands(other, toy[1], image):
        assert tool(*command) == f'CONFIG: wanted a file, got {other}, which is not there'
    for command in commands(toy[0], 'no.pth', image):
        assert tool(*command) == 'CHECKPOINT: wanted a file, got no.pth, which is not there'
    (tmp_path / 'cut.pth').write_bytes(Path(toy[1]).read_bytes()[:3000])
    for command in commands(toy[0], 'cut.pth', image):
        end = tool(*command)
        assert re.fullmatch(r'CHECKPOINT: wanted weights of .*config.py, got cut.pth, which cannot be read: .+', end)

    config = Config.fromfile(toy[0])
    config.pop('test_dataloader')
    config.dump(other)
    for command in commands(other, toy[1], image):
        assert tool(*command) == f'CONFIG: wanted one with a test_dataloader, got {other} without'
    config = Config.fromfile(toy[0])
    config.model.backbone = dict(type='ResNetV1c', depth=18)
    config.dump(other)
    for command in [*commands(other, toy[1], image), ('benchmark.py', other)]:
        wanted = 'VisionTransformer or BEiT' if command[0] in ('get_flops.py', 'tradeoff.py') else 'MSViT'
        assert tool(*command) == f'CONFIG: wanted a backbone of type {wanted}, got ResNetV1c in {other}'
    (tmp_path / 'other.py').write_text('a = 1')
    assert tool('get_flops.py', other) == f'CONFIG: wanted a segmentor, got {other} without a model that has a backbone'


def test_a_test_set_without_files_or_truth_is_named(toy, tool):
    config = Config.fromfile(toy[0])
    config.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    config.dump(toy[0])
    end = tool('analyze_gate.py', *toy)
    assert end.endswith('val/0000.png: test set: wanted truth for each image, got a pipeline that loads none')
    config.test_dataloader.dataset.data_root = 'no/such/folder'
    config.dump(toy[0])
    end = tool('get_flops.py', *toy)
    assert end.startswith(f'CONFIG: the test set of {toy[0]} is not there') and 'no/such/folder/images/val' in end


@pytest.mark.parametrize('command', [
    ('get_flops.py', TOY, '--shape', 0, 10),
    ('get_flops.py', TOY, '--shape', 64, -1),
    ('benchmark.py', TOY, '--batch', 0),
])  # fmt: skip
def test_numbers_are_checked(command, tool, capsys):
    assert tool(*command) == 2
    assert 'wanted a whole number from 1, got' in capsys.readouterr().err


def test_benchmark_names_a_gate_and_an_image_that_it_cannot_use(tool, tmp_path):
    options = (ROOT / TOY, '--size', 64, '--repeat', 1, '--device', 'cpu')
    wanted = '--gate: wanted own, fine, coarse or random:P, P in [0, 1], got '
    for gate in ('half', 'random:x', 'random:2'):
        assert tool('benchmark.py', *options, '--gate', gate) == wanted + gate
    for name in 'ab':
        (tmp_path / f'{name}.png').write_bytes(b'no picture')
    end = tool('benchmark.py', *options, '--images', tmp_path)
    assert end == f'--images: wanted pictures, got {tmp_path}/a.png, which cannot be read'


@pytest.mark.slow
def test_tradeoff(config, toy, dense, printed, tmp_path):
    ours, twin = ','.join(toy), ','.join(dense)
    models = (f'MSViT={ours}', f'MSViT={ours}', f'dense={twin}')
    thresholds = ('--thresholds', 0, 0.5, 1)
    out = printed('tradeoff.py', *models, '--device', 'cpu', *thresholds, '--out', tmp_path / 'out')
    result = json.loads((tmp_path / 'out/tradeoff.json').read_text())
    assert list(result['curves']) == ['MSViT', 'dense']
    low, high = result['curves']['MSViT'][0], result['curves']['MSViT'][-1]
    assert (low['threshold'], high['threshold']) == (0, 1) and low['runs'] == 2
    assert (low['tokens'], high['tokens']) == (10, 37)  # all coarse, all fine
    assert low['miou_std'] == 0  # the same checkpoint twice
    (point,) = result['curves']['dense']
    assert point['threshold'] is None and point['tokens'] == 37 and point['time_ratio'] == 1
    assert high['encoder_gmacs'] == pytest.approx(point['encoder_gmacs'])
    assert cv2.imread(str(tmp_path / 'out/tradeoff.png')).shape[:2] == (480, 1200)
    assert 'time ratio' in out

    config.load_from = toy[1]  # whose gate has the threshold 0.5
    middle = next(p for p in result['points'] if p['threshold'] == 0.5)
    assert middle['miou'] == pytest.approx(build_runner(config).test()['mIoU'], abs=0.01)


@pytest.mark.slow
def test_tradeoff_trains_a_seed_and_does_not_train_twice(config, tool, printed, tmp_path):
    config.pop('work_dir')
    config.dump(str(tmp_path / 'config.py'))
    line = ['tradeoff.py', f'ours={tmp_path}/config.py', '--seeds', 3, '--thresholds', 0.5]
    line += ['--device', 'cpu', '--out', tmp_path / 'out']
    assert f'training {tmp_path}' in printed(*line)
    (point,) = json.loads((tmp_path / 'out/tradeoff.json').read_text())['points']
    folder = tmp_path / 'out/ours/config/seed_3'
    assert point['checkpoint'] == str(folder / 'iter_4.pth')
    assert Config.fromfile(folder / 'config.py').randomness.seed == 3
    before = (folder / 'iter_4.pth').stat().st_mtime_ns
    assert f'training {tmp_path}' not in printed(*line) and (folder / 'iter_4.pth').stat().st_mtime_ns == before
    with open(tmp_path / 'config.py', 'a') as file:
        file.write('launcher = None\n')
    assert 'results of config ' in tool(*line)


def test_curves_of_unlike_test_sets_are_refused(config, toy, tool, tmp_path):
    """Of the same number of images."""
    dataset = config.test_dataloader.dataset
    dataset.update(data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), indices=[1, 2, 3])
    config.dump(str(tmp_path / 'other.py'))
    runs = [f'{name}={tmp_path}/{name}.py,{toy[1]}' for name in ('config', 'other')]
    end = tool('tradeoff.py', *runs, '--out', tmp_path / 'out', '--device', 'cpu')
    assert end.startswith('wanted configs with one test set, got 3 images from 0000.png on in ')
    assert '3 images from 0001.png on in ' in end


def test_a_file_is_not_compared_with_a_budget(config, toy, tool):
    pytest.importorskip('onnxruntime')
    config.model.backbone.token_budget = 20
    config.dump(toy[0])
    end = tool('compare_onnx.py', *toy, 'model.onnx')
    assert end == f'CONFIG: wanted token_budget=None, since files are run with a threshold, got 20 in {toy[0]}'


def test_tradeoff_resumes_what_is_in_its_folder(config, monkeypatch, tmp_path):
    """And not what the config is loaded from, which mmengine would prefer."""
    config.load_from = 'other.pth'
    config.dump(str(tmp_path / 'config.py'))
    called = []
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr('subprocess.run', lambda command, **options: called.append(command) or failed)
    train = runpy.run_path(str(ROOT / 'tools/tradeoff.py'))['train']
    for stopped in (False, True):
        if stopped:
            (tmp_path / 'seed_0/last_checkpoint').write_text('iter_2.pth')
        with pytest.raises(InputError, match=r'train\.log says why'):
            train(str(tmp_path / 'config.py'), 0, tmp_path / 'seed_0')
        assert ('--resume' in called[-1], 'load_from=None' in called[-1]) == (stopped, stopped)
    config.optim_wrapper.optimizer.lr = 1.0
    config.dump(str(tmp_path / 'config.py'))
    with pytest.raises(InputError, match='results of config '):
        train(str(tmp_path / 'config.py'), 0, tmp_path / 'seed_0')
    assert len(called) == 2


def test_a_threshold_takes_the_place_of_a_budget():
    model = build_msvit(token_budget=5)
    for threshold, tokens in ((0, 5), (1, 17)):
        with deciding_by(model, threshold):
            assert model.tokenize(torch.randn(1, 3, 64, 64))[1].lengths == [tokens]


def test_functions_take_turns_and_the_first_round_does_not_count():
    calls = []
    functions = {name: lambda batch, name=name: calls.append((name, batch.item())) for name in 'ab'}
    seconds = in_turns(functions, [torch.tensor([1]), torch.tensor([2])], warm_up=torch.tensor([0]))
    assert calls == [('a', 0), ('b', 0), ('a', 1), ('b', 1), ('a', 2), ('b', 2)]
    assert list(seconds) == ['a', 'b'] and all(len(spent) == 2 for spent in seconds.values())
    assert paired_ratios([2, 12, 9], [1, 4, 1]) == (3, 2, 9) and paired_ratios([3], [2]) == (1.5, 1.5, 1.5)


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['test', 'train'])
def test_benchmark(mode, printed, tmp_path):
    models = (ROOT / TOY, '--against', ROOT / TOY.replace('msvit', 'vit'))
    options = ['--gate', 'random:0.5', '--size', 64, '--repeat', 2, '--batch', 2, '--device', 'cpu']
    out = printed('benchmark.py', *models, *options, '--mode', mode, '--json', tmp_path / 'a.json')
    assert f'encoder, {mode}, 64x64, gate random:0.5' in out
    rows = {row['name']: row for row in json.loads((tmp_path / 'a.json').read_text())['rows']}
    ours = ['MSViT', 'its gate and tokens', 'all fine'] if mode == 'test' else ['MSViT active', 'MSViT trimmed']
    assert list(rows) == [*ours, 'dense', 'against']
    assert rows['dense']['ratio'] == 1 and rows['dense']['tokens'] == 17
    assert rows[ours[0]]['tokens'] < 17 and rows[ours[0]]['gmacs'] < rows['dense']['gmacs']
    assert all(row['seconds'] > 0 and row['memory_mib'] > 0 for row in rows.values())
    if mode == 'train':  # inactive tokens cost, too
        costs = [(rows[name]['tokens'], rows[name]['gmacs']) for name in (*ours, 'dense')]
        assert costs == sorted(costs) and costs[0][1] < costs[1][1]


def test_benchmark_counts_a_head_on_the_cells_that_it_sees(tool, config, tmp_path):
    config.model.backbone.update(num_layers=1, out_indices=(0,), input_scale=0.5)
    config.dump(str(tmp_path / 'config.py'))
    line = ['benchmark.py', tmp_path / 'config.py', '--part', 'segmentor', '--gate', 'fine', '--size', 64]
    assert tool(*line, '--repeat', 1, '--device', 'cpu', '--json', tmp_path / 'a.json') is None
    rows = {row['name']: row for row in json.loads((tmp_path / 'a.json').read_text())['rows']}
    heads = HeadMacs(MODELS.build(config.model))
    assert rows['MSViT']['gmacs'] - rows['its backbone']['gmacs'] == pytest.approx(heads((2, 2))['head'] / 1e9)
    assert rows['all fine']['tokens'] == 17 and rows['all fine']['gmacs'] > heads((4, 4))['head'] / 1e9


@pytest.mark.slow
def test_benchmark_of_a_compiled_backbone(tool, config, tmp_path, monkeypatch):
    plain = torch.nn.Module.compile  # to machine code takes minutes, and a compiler
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: plain(module, backend='eager'))
    config.model.backbone.update(num_layers=1, out_indices=(0,))
    config.dump(str(tmp_path / 'config.py'))
    line = ['benchmark.py', tmp_path / 'config.py', '--gate', 'coarse', '--size', 64, '--repeat', 1, '--compile']
    assert tool(*line, '--device', 'cpu', '--json', tmp_path / 'a.json') is None
    rows = {row['name']: row for row in json.loads((tmp_path / 'a.json').read_text())['rows']}
    assert rows['compiled']['tokens'] == rows['MSViT']['tokens'] and rows['compiled']['seconds'] > 0


def test_the_way_of_an_image_is_drawn(toy, scenes, tool, tmp_path):
    image = scenes / 'images/val/0000.png'
    assert tool('draw_mechanism.py', *toy, image, tmp_path / 'way.png') is None
    height, width, _ = cv2.imread(str(tmp_path / 'way.png')).shape
    assert width == 1200 and height > 500
