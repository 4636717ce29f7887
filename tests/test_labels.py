"""Label maps that are not what they seem, and data sets that do not name their classes: everywhere the same answer."""

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import build_runner, tiny_segmentor, write_model
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.registry import HOOKS, MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from mmseg_msvit.labels import Classes, check_heads, ids_in, one_class
from mmseg_msvit.tooling.command_line import InputError
from mmseg_msvit.tooling.comparison import label_areas, mean_iou
from mmseg_msvit.tooling.dense_pass import find_images
from mmseg_msvit.tooling.gate_report import Analysis
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader, load_testset


def of_export(name):
    """A name of what exports a model, if its packages are there."""
    pytest.importorskip('onnxscript')
    from mmseg_msvit.tooling import export

    return getattr(export, name)


def recolour(what):
    def rewrite(path):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), what(labels))

    return rewrite


# What is done to each label map of the toy scenes, of 7 classes -> what is said of it.
SPOILT = {
    'colours': (
        recolour(lambda labels: np.dstack([labels] * 3)),
        r'wanted class ids \(H, W\), got \(96, 96, 3\), which',
    ),
    'with alpha': (recolour(lambda labels: np.dstack([labels] * 4)), r'got \(96, 96, 4\), which looks like colours'),
    'half as high': (recolour(lambda labels: labels[:48]), r'size of the image, \(96, 96\), got \(48, 96\)'),
    'beyond the classes': (
        recolour(lambda labels: np.where(labels == labels[0, 0], 7, labels)),
        'wanted class ids from 0 to 6, or 255 where no class is, got 7',
    ),
}


def spoil(folder, how):
    for path in sorted(folder.rglob('annotations/*/*')):
        SPOILT[how][0](path)


@pytest.fixture
def copied(config, scenes, tmp_path):
    """A copy of the toy scenes, to which the config's data sets are moved."""
    folder = tmp_path / 'scenes'
    shutil.copytree(scenes, folder)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        config[name].dataset.data_root = str(folder)
    return folder


@pytest.mark.parametrize('how', SPOILT)
def test_every_tool_and_hook_that_reads_labels_refuses_the_same(how, config, copied, tool, tmp_path):
    config.visualizer.vis_backends = []
    images, truths = copied / 'images/val', copied / 'annotations/val'
    model = write_model(config, tmp_path)
    dense = config.copy()
    for name in ('train_tokens', 'coarse_embed', 'gate_loss'):
        dense.model.backbone.pop(name)
    dense.model.backbone.type, dense.custom_hooks = 'VisionTransformer', []
    dense = write_model(dense, tmp_path, 'dense')
    spoil(copied, how)
    out = '--out', tmp_path / 'out'
    ends = {
        'show_tokens': tool('show_tokens.py', *model, images, '--truth', truths, *out, '--device', 'cpu'),
        'analyze_gate': tool('analyze_gate.py', *model, '--device', 'cpu'),
        'fit_gate': tool('fit_gate.py', *dense, *out, '--device', 'cpu', '--steps', 1),
        'tradeoff': tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, *out, '--device', 'cpu'),
    }
    hook = HOOKS.build(dict(type='TokenMapHook', indices=(0,)))
    with pytest.raises(ValueError) as error:
        hook.before_train(build_runner(config))
    ends['TokenMapHook'] = str(error.value)
    for name, end in ends.items():
        assert re.search(SPOILT[how][1], end or ''), (name, end)
        assert re.search(r'0000\.png', end), (name, end)  # which file


def test_labels_that_mean_nothing_are_left_out_and_not_refused():
    head = dict(num_classes=3, ignore_index=254)
    classes = Classes.of([dict(num_classes=9), head], dict(classes=('a', 'b', 'c')), 2)
    labels = np.array([[0, 1, 2, 254, 255]])
    assert classes.read(labels, (1, 5)).tolist() == [[0, 1, 255, 255, 255]]
    assert classes.read(labels[None], (1, 5)).dtype == np.uint8
    with pytest.raises(ValueError, match='from 0 to 2, or 2 or 254 or 255 where no class is, got 3, 253'):
        classes.read(np.array([[3, 253]]), (1, 2))
    trained = Classes.of(dict(num_classes=3, ignore_index=0), {})  # a class that is evaluated, though not trained
    assert trained.read(np.array([[0, 1]]), (1, 2)).tolist() == [[0, 1]]


def test_ids_of_more_than_eight_bits_are_refused(config, scenes, tmp_path):
    image = scenes / 'images/val/0000.png'
    ids = np.zeros((96, 96), np.uint16)
    Image.fromarray(ids + 5).save(tmp_path / 'small.png')
    _, labels = FileReader(config).read(image, tmp_path / 'small.png')
    assert (labels == 5).all()
    ids[0, 0] = 256  # of which mmseg makes 0
    Image.fromarray(ids).save(tmp_path / 'large.png')
    with pytest.raises(InputError, match='large.png .* wanted class ids of 8 bits, .* got 256 and less'):
        FileReader(config).read(image, tmp_path / 'large.png')


@pytest.mark.parametrize('what', ['deep', 'junk'])
def test_labels_of_a_data_set_are_refused_like_those_of_a_file(what, config, copied, tool, tmp_path):
    """Sixteen bits are cut modulo 256 by mmseg, and of what OpenCV cannot read it takes an attribute of None."""
    config.visualizer.vis_backends = []
    loading = [step for step in config.test_dataloader.dataset.pipeline if step.type == 'LoadAnnotations']
    loading[0].imdecode_backend = 'cv2'
    config.val_dataloader = config.test_dataloader
    model = write_model(config, tmp_path)
    path = copied / 'annotations/val/0001.png'
    if what == 'deep':
        Image.fromarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.uint16) + 256).save(path)
        said = 'wanted class ids of 8 bits'
    else:
        path.write_bytes(b'junk')
        said = 'annotations/val/0001.png, which cannot be read: '
    out = '--out', tmp_path / 'out'
    ends = {
        'analyze_gate': tool('analyze_gate.py', *model, '--device', 'cpu'),
        'tradeoff': tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, *out, '--device', 'cpu'),
    }
    for name, end in ends.items():
        assert said in (end or '') and '0001.png' in end and '\n' not in end, (name, end)
    if what == 'deep':
        with pytest.raises(ValueError, match='TokenMapHook cannot draw .*0001.png: labels: wanted class ids of 8 bits'):
            HOOKS.build(dict(type='TokenMapHook', indices=(1,))).before_train(build_runner(config))


def test_training_labels_are_read_by_the_rules_of_their_own_data_set(config, copied):
    """Not by the test set's, which may count its classes in another way."""
    train = config.train_dataloader.dataset
    plain = cv2.imread(str(copied / 'annotations/train/0000.png'), cv2.IMREAD_UNCHANGED)
    reduced = np.where((plain == 0) | (plain == 255), 255, plain - 1)
    reader = FileReader(config)
    for reduce_zero_label, wanted in ((True, reduced), (False, plain)):
        members = [{**train, 'reduce_zero_label': reduce_zero_label}] * 2
        config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=members)
        images, truths = find_images(config, None, 100)
        assert len(images) == 12
        for i in (0, 6):
            assert (reader.read(images[i], truths[i])[1] == wanted).all()
        assert (reader.read(images[0], truths[0].path)[1] == plain).all()  # by the test set's


def test_names_and_colours_are_mmsegs_own_where_there_are_none():
    given = BaseSegDataset(metainfo=dict(classes=('a', 'b', 'c')), lazy_init=True, test_mode=False).metainfo
    assert Classes.of(dict(num_classes=3), dict(classes=('a', 'b', 'c'))).palette == given['palette']
    names, palette, _ = Classes.of(dict(num_classes=3), dict(classes=None, palette=[]))
    assert names == ['0', '1', '2'] and palette == given['palette']
    names, palette, _ = Classes.of(dict(num_classes=3), dict(classes=['road'], palette=np.array([(1, 2, 3)])))
    assert names == ['road', '1', '2'] and palette[0] == [1, 2, 3] and len(palette) == 3
    assert Classes.of(dict(num_classes=1, out_channels=1), dict(classes=['crack'])).names == ['crack', '1']


def test_a_data_set_without_classes_goes_through_every_tool(config, copied, tool, tmp_path):
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = config[name].dataset
        config[name].dataset = dict(
            type='BaseSegDataset', data_root=dataset.data_root, data_prefix=dataset.data_prefix, img_suffix='.png',
            seg_map_suffix='.png', pipeline=dataset.pipeline,
        )  # fmt: skip
    model = write_model(config, tmp_path)
    out = '--out', tmp_path / 'out'
    assert tool('show_tokens.py', *model, copied / 'images/val', *out) is None
    assert tool('analyze_gate.py', *model, '--out', tmp_path / 'gate.json', '--html', tmp_path / 'gate.html') is None
    assert list(json.loads((tmp_path / 'gate.json').read_text())['classes']) == [str(i) for i in range(7)]
    assert tool('tradeoff.py', f'a={model[0]},{model[1]}', '--thresholds', 0.5, *out, '--device', 'cpu') is None
    for name in ('train_tokens', 'coarse_embed', 'gate_loss'):
        config.model.backbone.pop(name)
    config.model.backbone.type, config.custom_hooks = 'VisionTransformer', []
    converted = tmp_path / 'converted'
    dense = write_model(config, tmp_path, 'dense')
    assert tool('fit_gate.py', *dense, '--out', converted, '--steps', 1, '--device', 'cpu') is None
    meta = torch.load(converted / 'checkpoint.pth', weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == [str(i) for i in range(7)] and len(meta['palette']) == 7
    loaded = load_config(model[0])
    notes = of_export('metadata')(load_model(loaded, model[1], 'cpu'), loaded)
    assert json.loads(notes['classes'])[6] == '6' and len(json.loads(notes['palette'])) == 7


@pytest.mark.parametrize('void', [True, False])
def test_labels_that_cannot_teach_purity_are_told_of(void, config, copied, tool, tmp_path):
    """Masks of 0 and 255, as image editors write them."""
    for path in copied.rglob('annotations/*/*'):
        recolour(lambda labels: np.where((labels > 2) & void, 255, 0).astype(np.uint8))(path)
    model = write_model(config, tmp_path)
    why = 'every labelled pixel is of class 0, so that every region is pure' + (r'\. 255 is no class' if void else '')
    loaded = load_config(model[0])
    with pytest.warns(UserWarning, match=why):
        Analysis(load_model(loaded, model[1], 'cpu'), load_testset(loaded))
    for name in ('train_tokens', 'coarse_embed', 'gate_loss'):
        config.model.backbone.pop(name)
    config.model.backbone.type, config.custom_hooks = 'VisionTransformer', []
    dense = write_model(config, tmp_path, 'dense')
    fit = 'fit_gate.py', *dense, '--out', tmp_path / 'out', '--steps', 1, '--device', 'cpu'
    assert re.search(
        f'--target labels: wanted labels that tell regions apart, but {why}', tool(*fit, '--target', 'labels')
    )
    assert tool(*fit) is None  # the model's own doubt needs none


def test_ids_are_those_that_sorting_finds():
    rng = np.random.default_rng(0)
    for labels in (
        rng.integers(0, 256, (9, 7), np.uint8), rng.integers(-3, 9, (9, 7)), np.array([[0, 10**7, 5]]), np.array([[4]]),
    ):  # fmt: skip
        assert ids_in(labels) == np.unique(labels).tolist()


def test_one_class_is_said_of_labels_alone():
    assert one_class({0, 1, 255}) is None and one_class({3, 4}) is None
    assert one_class({255}) == one_class(set()) == 'no pixel has a label'


def test_a_class_of_one_logit_is_counted_with_what_is_not_it():
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    areas = label_areas(torch.tensor([[0, 1, 1, 1]]), truth, 2)
    assert mean_iou([areas]) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


FCN = dict(type='FCNHead', in_channels=32, channels=8, num_convs=1, norm_cfg=None)
MASK = dict(type='SegmenterMaskTransformerHead', in_channels=32, channels=32, num_layers=1, num_heads=2, embed_dims=32)
UPER = dict(type='UPerHead', in_channels=[32, 32], in_index=[0, 1], channels=8, norm_cfg=dict(type='BN'))
OCR = dict(type='OCRHead', in_channels=32, channels=8, ocr_channels=4, norm_cfg=None)
HEADS = {
    'fcn': FCN, 'uper': UPER, 'mask': MASK, 'mask on tokens': {**MASK, 'type': 'TokenSegmenterHead'},
    'linear on tokens': {**FCN, 'type': 'TokenLinearHead', 'num_convs': 0, 'channels': 32}, 'cascade': [FCN, OCR],
}  # fmt: skip


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('classes, channels', [(1, 1), (2, 1), (2, 2)])
def test_heads_of_one_logit_and_of_two(head, classes, channels, config):
    """A class map is by the logits that there are; a head that has others than its config says is refused."""
    more = dict(num_classes=classes, out_channels=channels, **(dict(threshold=0.4) if channels == 1 else {}))
    heads = HEADS[head]
    decode_head = [{**each, **more} for each in heads] if head == 'cascade' else {**heads, **more}
    backbone = dict(type='MSViT', gate=dict(type='VarianceGate'), out_type='tokens' if 'tokens' in head else 'grid')
    segmentor = {**tiny_segmentor({}, **backbone), 'decode_head': decode_head}
    if head == 'cascade':
        segmentor.update(type='CascadeEncoderDecoder', num_stages=2)
    if head == 'mask on tokens' and channels != classes:
        with pytest.raises(ValueError, match='out_channels must be num_classes=2: a mask for each class .* got 1'):
            MODELS.build(segmentor)
        return
    model = MODELS.build(segmentor).eval()
    refused = (head == 'mask' and channels != classes) or (head == 'cascade' and channels == 1)
    if refused:
        wanted = 'decode_head.out_channels: wanted 2' if head == 'mask' else 'a last head of at least two logits'
        with pytest.raises(ValueError, match=wanted):
            check_heads(model)
        return
    check_heads(model)
    image = torch.randn(1, 3, 64, 80)
    for test_cfg in (dict(mode='whole'), dict(mode='slide', crop_size=(48, 48), stride=(32, 32))):
        model.test_cfg = type(model.test_cfg)(test_cfg)
        sample = SegDataSample(metainfo=dict(ori_shape=(64, 80), img_shape=(64, 80), padding_size=[0] * 4))
        with torch.no_grad():
            (answer,) = model.predict(image, [sample])
        ids = answer.pred_sem_seg.data[0]
        assert set(ids.unique().tolist()) <= set(range(len(Classes.of(model.decode_head, {}).names)))
        if test_cfg['mode'] == 'whole':
            with torch.no_grad():
                deployed = of_export('Deployed')(model, False, True)(image, torch.tensor(0.5))[0][0]
            assert torch.equal(deployed, ids.to(torch.uint8))


def test_a_point_head_is_deaf_too():
    point = dict(type='PointHead', in_channels=[32], in_index=[0], channels=8, num_fcs=1, norm_cfg=None)
    more = dict(num_classes=2, out_channels=1, threshold=0.4)
    heads = nn.ModuleList(MODELS.build({**head, **more}) for head in (FCN, point))
    assert heads[1].fc_seg.out_channels == 2
    with pytest.raises(ValueError, match='got 1: PointHead has a logit for each class, whatever it says'):
        check_heads(SimpleNamespace(decode_head=heads))


def test_mmsegs_head_that_is_deaf_to_its_config_is_refused_by_tools(config, tool, tmp_path):
    pytest.importorskip('onnxscript')
    config.model.decode_head.update(
        num_classes=2, out_channels=1, threshold=0.5, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)
    )
    model = write_model(config, tmp_path)
    for command in (
        ('get_flops.py', *model),
        ('analyze_gate.py', *model),
        ('export_onnx.py', *model, tmp_path / 'a.onnx'),
    ):
        end = tool(*command)
        assert end.startswith('CONFIG: decode_head.out_channels: wanted 2, as many as num_classes, got 1'), end


def test_a_sample_has_the_truth_of_the_image_before_it_was_resized():
    classes = Classes.of(dict(num_classes=2), {})
    sample = SegDataSample(metainfo=dict(ori_shape=(4, 6), img_shape=(8, 12)))
    assert classes.read_sample(sample) is None
    sample.gt_sem_seg = PixelData(data=torch.ones(1, 4, 6, dtype=torch.long))
    assert classes.read_sample(sample).tolist() == [[1] * 6] * 4
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, 8, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r'size of the image, \(4, 6\), got \(8, 12\)'):
        classes.read_sample(sample)
    assert classes.read_sample(sample, resized=True).shape == (8, 12)
