"""Bad files: each is refused by what it is, nothing in it is executed, and nothing is left half written."""

import os
import re
import shutil
from http.server import SimpleHTTPRequestHandler
from urllib.error import HTTPError

import cv2
import numpy as np
import pytest
import torch
from conftest import build_msvit, build_runner
from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict
from mmseg.registry import MODELS

from mmseg_msvit.gates.doubt import Teacher
from mmseg_msvit.tooling.command_line import InputError
from mmseg_msvit.tooling.dense_pass import find_images
from mmseg_msvit.tooling.models import load_model
from mmseg_msvit.tooling.testset import load_testset
from mmseg_msvit.weights.reading import read_checkpoint


def rewrite(folder, what):
    """Makes something else of each file in a folder, as ``what`` says of its path."""
    for path in sorted(folder.iterdir()):
        what(path)


def label_99(path):
    cv2.imwrite(str(path), np.full_like(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 99))


@pytest.mark.parametrize('folder, what, error, message', [
    ('images', lambda path: path.write_bytes(path.read_bytes()[:300]), AssertionError,
     r'failed to load image: .*images/train/\d+\.png'),
    ('annotations', label_99, IndexError, 'Target 99 is out of bounds'),
    ('annotations', os.remove, FileNotFoundError, r'No such file .*annotations/train/\d+\.png'),
    ('images', os.remove, ValueError, 'need at least one array'),
])  # fmt: skip
def test_bad_data_stops_training_and_leaves_no_checkpoint(folder, what, error, message, config, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / 'scenes')
    rewrite(tmp_path / 'scenes' / folder / 'train', what)
    config.train_dataloader.dataset.data_root = str(tmp_path / 'scenes')
    with pytest.raises(error, match=message):
        build_runner(config).train()
    assert not list((tmp_path / 'work').rglob('*.pth')) and not list((tmp_path / 'work').rglob('last_checkpoint'))


@pytest.mark.parametrize('name, part, find', [
    ('test set', 'val', load_testset), ('training set', 'train', lambda config: find_images(config, None, 1)),
])  # fmt: skip
def test_a_data_set_without_images_is_named(name, part, find, config, tmp_path):
    config.train_dataloader.dataset.data_root = config.test_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(InputError, match=f'CONFIG: the {name} of .* is not there: '):
        find(config)
    (tmp_path / 'images' / part).mkdir(parents=True)
    with pytest.raises(InputError, match=f'CONFIG: wanted images in the {name} of .*, got none'):
        find(config)


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def nan(name):
    return lambda weights, mark: {**weights, name: torch.full_like(weights[name], torch.nan)}


FAULTS = [
    (nan('backbone.layers.1.ffn.layers.1.weight'), 'wanted finite weights, got NaN .*backbone.layers'),
    (nan('backbone.gate.embed.weight'), 'wanted finite weights, got NaN .*backbone.gate'),
    (nan('decode_head.cls_emb'), 'wanted finite weights, got NaN .*decode_head.cls_emb'),
    (lambda weights, mark: {**weights, 'decode_head.cls_emb': torch.zeros(1, 9, 32)},
     r'this very model, got decode_head.cls_emb \(1, 9, 32\), wanted \(1, 7, 32\)'),
    (lambda weights, mark: {name: weights[name] for name in weights if name != 'decode_head.cls_emb'},
     'got decode_head.cls_emb is missing'),
    (lambda weights, mark: {**weights, 'more': Payload(mark)}, 'mkdir and could run code. If you trust it'),
    (lambda weights, mark: [1, 2], 'which cannot be read: .*it holds a list'),
    (lambda weights, mark: torch.ones(2), 'which cannot be read: .*it holds a Tensor'),
]  # fmt: skip


@pytest.mark.parametrize('legacy', [False, True])
def test_weights_that_are_not_the_models_are_refused_and_not_executed(legacy, config, tmp_path):
    config.dump(str(tmp_path / 'config.py'))
    config = Config.fromfile(tmp_path / 'config.py')
    torch.manual_seed(0)
    whole = MODELS.build(config.model).state_dict()
    mark, path = tmp_path / 'executed', tmp_path / 'weights.pth'
    for spoil, message in FAULTS:
        weights = {name: tensor.clone() for name, tensor in whole.items()}
        torch.save(spoil(weights, mark), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=f'CHECKPOINT: wanted weights of .*config.py, got .*{message}'):
            load_model(config, str(path), 'cpu')
        assert not mark.exists()
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    for name, tensor in load_model(config, str(path), 'cpu').state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_the_mark_of_a_payload_can_be_made(tmp_path):
    """Else its absence says nothing."""
    torch.save(Payload(tmp_path / 'executed'), tmp_path / 'a.pth')
    torch.load(tmp_path / 'a.pth', weights_only=False)
    assert (tmp_path / 'executed').exists()


def test_a_teachers_payload_is_not_executed(config, tmp_path):
    torch.save({'state_dict': {}, 'more': Payload(tmp_path / 'executed')}, tmp_path / 'teacher.pth')
    with pytest.raises(ValueError, match='mkdir and could run code'):
        Teacher(config, str(tmp_path / 'teacher.pth'))(torch.zeros(1, 3, 64, 64))
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('how', ['load_state_dict', 'mmengine', 'init_cfg'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_backbone_refuses_weights_that_are_not_finite(how, value, tmp_path):
    weights = build_msvit().state_dict()
    weights['layers.1.ln1.weight'][0] = value
    torch.save(weights, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='wanted finite weights, got NaN or infinite ones in layers.1'):
        if how == 'init_cfg':
            build_msvit(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
        elif how == 'mmengine':
            load_state_dict(build_msvit(), weights)
        else:
            build_msvit().load_state_dict(weights)


def test_the_converter_writes_nothing_of_weights_that_are_not_finite(tool, tmp_path):
    weights = build_msvit(gate=dict(type='FixedGate')).state_dict()
    weights['cls_token'][..., 0] = float('nan')
    torch.save(weights, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='wanted finite weights, got NaN or infinite ones in cls_token'):
        tool('convert_vit.py', tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth']


class Unreliable(SimpleHTTPRequestHandler):
    """Serves a folder, and below /half, /page, /moved and /round what goes wrong on the way."""

    def do_GET(self):
        kind, _, name = self.path.lstrip('/').partition('/')
        if kind in ('moved', 'round'):
            self.send_response(302)
            self.send_header('Location', f'/{name}' if kind == 'moved' else self.path)
            self.end_headers()
        elif kind in ('half', 'page'):
            with open(self.translate_path(f'/{name}'), 'rb') as file:
                content = file.read() if kind == 'half' else b'<html>sign in</html>'
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if kind == 'half' else content)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize('site', [Unreliable], indirect=True)
def test_addresses_that_move_end_early_or_serve_something_else(site, tmp_path):
    folder, address = site
    torch.save({'a': torch.arange(9999.0)}, folder / 'a.pth')
    assert torch.equal(read_checkpoint(f'{address}/moved/a.pth')['a'], torch.arange(9999.0))
    kept = sorted((tmp_path / 'cache').rglob('*.pth'))
    assert len(kept) == 1
    for kind in ('half', 'page'):
        with pytest.raises(ValueError, match=rf'whole checkpoint, got .*cannot be read.*{re.escape(address)}/{kind}'):
            read_checkpoint(f'{address}/{kind}/a.pth')
    with pytest.raises(HTTPError):
        read_checkpoint(f'{address}/round/a.pth')
    files = [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert files == kept  # neither halves nor pages
