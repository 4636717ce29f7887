"""What several test files need: deterministic randomness, small models, the folder with real data."""

import itertools
import os
import runpy
import subprocess
import sys
import tempfile
from copy import deepcopy
from datetime import timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmengine.utils import digit_version
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_msvit.engine.hooks import GateLossHook
from mmseg_msvit.tokens.token_map import region_grid
from mmseg_msvit.vit import blocks
from mmseg_msvit.vit.attention import attend_reference

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('MSVIT_SHARED', ROOT.parent / 'shared'))
half_on_cpu = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.2.0'), reason='torch before 2.2 multiplies no float16 on a CPU'
)
SMALL = dict(img_size=64, embed_dims=32, num_layers=3, num_heads=2, out_indices=(0, 2), final_norm=True)


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    init_default_scope('mmseg')


@pytest.fixture
def shared():
    """Call with a relative path: gives it, or skips by name where the folder with real data is not there."""

    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f'{name} is not beside the project')
        return path

    return find


def tiny_segmentor(head=None, **backbone):
    """Config of a small segmentor: an MSViT, unless another type is given, and a linear head on its last output."""
    head = {'type': 'FCNHead', 'in_channels': 32, 'channels': 8, 'num_classes': 4, 'in_index': -1, **(head or {})}
    backbone = {'type': 'MSViT', **SMALL, **backbone}
    return ConfigDict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=dict(mode='whole'))


def build_msvit(**kwargs):
    """A small MSViT whose every weight, gate included, is random, in eval mode."""
    model = MODELS.build({**SMALL, 'type': 'MSViT', **kwargs})
    model.init_weights()
    randomize(model)
    return model.eval()


def randomize(model, std=0.1):
    """Adds noise to every weight, so that nothing is zero by initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'gate_losses' not in name:
                parameter.add_(torch.randn_like(parameter), alpha=std)


def random(source):
    """A library's model in evaluation mode with noise on every weight. Some of theirs return nothing from ``eval``."""
    randomize(source)
    source.eval()
    return source


@torch.no_grad()
def check_features(backbone, wanted, *sizes):
    """A backbone's last grid is what ``wanted`` makes of images: (B, C, h, w), or rows that end with (B, h * w, C)."""
    for size in sizes or [(64, 64)]:
        images = torch.randn(2, 3, *size)
        found, expected = backbone(images)[-1], wanted(images)
        if expected.ndim == 3:
            expected = expected[:, -found[0, 0].numel() :].mT.view_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, size=size: f'{size}: {text}')


def use_plain_attention(monkeypatch):
    """Makes every block take the reference in place of the fused attention."""

    def plain(qkv, lengths, weight, dropout, cu_seqlens, bias):
        return attend_reference(qkv, lengths, weight, dropout, bias)

    monkeypatch.setattr(blocks, 'attend', plain)


def force_logits(model, logits):
    """Makes a learned gate answer these logits (B, hc, wc), and keeps its parameters in the graph."""
    model.gate.register_forward_hook(lambda module, args, out: logits.to(out.dtype) + out - out.detach())


def force_random_logits(model, images, grid, scale=2.0):
    """Makes the gates of all levels answer so, the same each time, and gives the answers, the finest level first."""
    generator = torch.Generator().manual_seed(1)
    answers = [scale * torch.randn(images, *region_grid(grid, side), generator=generator) for side in model.sides[1:]]
    for gate, logits in zip(model.gates, answers):
        gate.register_forward_hook(lambda m, a, out, logits=logits: logits.to(out.dtype) + out - out.detach())
    return answers


def no_noise(monkeypatch):
    """Makes gates in training decide as at test time."""
    monkeypatch.setattr(torch, 'rand_like', lambda x: torch.full_like(x, 0.5))  # logit(1/2) = 0


def sample(labels):
    """A data sample with (H, W) ground truth."""
    return SegDataSample(gt_sem_seg=PixelData(data=labels[None]))


def hooked(model, step=0):
    """The model, whose losses have the gate's among them, as in a training that is at this step."""
    GateLossHook().before_train(SimpleNamespace(model=model, iter=step))
    return model


@pytest.fixture
def site(request, tmp_path, monkeypatch):
    """A folder and its address, by the handler that a test gives; files are kept in a cache of the test's own."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'site').mkdir()
    handler = partial(getattr(request, 'param', SimpleHTTPRequestHandler), directory=str(tmp_path / 'site'))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / 'site', f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def spread(function, world_size, *args):
    """``function(*args)`` in each of so many processes of one gloo group: what they return, by rank.

    They are forks of a process that has torch and mmseg imported and has computed nothing: cheaper than new ones.
    """
    torch.multiprocessing.get_context('forkserver').set_forkserver_preload(['mmseg_msvit', 'mmengine.runner'])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _one_rank, (world_size, folder, function, args), world_size, start_method='forkserver'
        )
        return [torch.load(f'{folder}/{rank}.pth', weights_only=False) for rank in range(world_size)]


def _one_rank(rank, world_size, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', f'file://{folder}/meet', timedelta(minutes=2), rank=rank, world_size=world_size
    )  # ranks that wait for each other in vain fail
    os.environ['LOCAL_RANK'] = str(rank)
    init_default_scope('mmseg')
    torch.save(function(*args), f'{folder}/{rank}.pth')
    dist.destroy_process_group()


TOY = 'configs/toy/segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py'


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A few toy scenes."""
    out = tmp_path_factory.mktemp('data') / 'toy_scenes'
    runpy.run_path(str(ROOT / 'tools/dataset_converters/toy_scenes.py'))['write'](out, dict(train=6, val=3), 96, 0)
    return out


TOY_OPTIONS = {
    'model.data_preprocessor.size': (96, 96),
    'model.backbone.embed_dims': 32,
    'model.backbone.num_heads': 2,
    'model.backbone.num_layers': 2,
    'model.backbone.gate_loss.1.warmup': 1,  # whose steps are counted: more for a training to keep
    'model.decode_head.in_channels': 32,
    'model.decode_head.embed_dims': 32,
    'model.decode_head.num_heads': 2,
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
    'test_dataloader.persistent_workers': False,
    'train_cfg.max_iters': 4,
    'train_cfg.val_interval': 2,
    'default_hooks.checkpoint.interval': 2,
    'default_hooks.logger.interval': 1,
}


@pytest.fixture
def config(scenes, tmp_path):
    """The toy config, small and short, on them."""
    config = Config.fromfile(ROOT / TOY)
    config.merge_from_dict({**TOY_OPTIONS, 'work_dir': str(tmp_path / 'work')})
    for split in ('train', 'val', 'test'):
        config.merge_from_dict({f'{split}_dataloader.dataset.data_root': str(scenes)})
    return config


RUNNERS = itertools.count()


def build_runner(config, **options):
    """A runner with a name and a visualizer of its own: mmengine keeps both by name, and would give back old ones."""
    name = f'test-{next(RUNNERS)}'
    config.merge_from_dict({'experiment_name': name, 'visualizer.name': name, **options})
    return Runner.from_cfg(config)


def write_model(config, folder, name='config'):
    """CONFIG and CHECKPOINT for a command line: a model whose every weight, gate included, is random."""
    model = MODELS.build(config.model)
    randomize(model)
    torch.save(model.state_dict(), folder / f'{name}.pth')
    config.dump(str(folder / f'{name}.py'))
    return str(folder / f'{name}.py'), str(folder / f'{name}.pth')


@pytest.fixture
def toy(config, tmp_path):
    """CONFIG and CHECKPOINT of the toy config."""
    return write_model(config, tmp_path)


@pytest.fixture
def dense(config, tmp_path):
    """CONFIG and CHECKPOINT of its dense twin."""
    twin = deepcopy(config)
    for name in ('train_tokens', 'coarse_embed', 'gate_loss'):
        twin.model.backbone.pop(name)
    twin.model.backbone.type = 'VisionTransformer'
    twin.custom_hooks = []
    return write_model(twin, tmp_path, 'dense')


@pytest.fixture
def tool(monkeypatch):
    """Call with a tool's name and arguments: runs it in this process, and gives the message it ends with, or None."""

    def call(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *(str(arg) for arg in args)])
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as end:
            return end.code
        return None

    return call
