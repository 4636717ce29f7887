"""mmseg's own ways to train, test and predict, on a few tiny scenes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model

CONFIG = 'configs/toy/segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py'


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'toy_scenes'
    run(sys.executable, 'tools/dataset_converters/toy_scenes.py', out, '--train', 6, '--val', 3, '--size', 96)
    return out


OPTIONS = {
    'model.data_preprocessor.size': (96, 96),
    'model.backbone.embed_dims': 32,
    'model.backbone.num_heads': 2,
    'model.backbone.num_layers': 2,
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
    config = Config.fromfile(ROOT / CONFIG)
    config.merge_from_dict({**OPTIONS, 'work_dir': str(tmp_path / 'work')})
    for split in ('train', 'val', 'test'):
        config.merge_from_dict({f'{split}_dataloader.dataset.data_root': str(scenes)})
    return config


def scalars(config):
    (file,) = (p for p in sorted((ROOT / config.work_dir).glob('*/vis_data/scalars.json')))
    return [json.loads(line) for line in file.read_text().splitlines()]


def build(config, **options):
    config.merge_from_dict({'experiment_name': f'test-{torch.randint(10**9, ()).item()}-{id(options)}', **options})
    return Runner.from_cfg(config)


def test_train_logs_validates_and_saves(config):
    runner = build(config)
    before = {name: p.clone() for name, p in runner.model.named_parameters()}
    runner.train()
    log = [line for line in scalars(config) if 'loss' in line]
    assert len(log) == 4
    for line in log:
        parts = sum(v for k, v in line.items() if 'loss_' in k)
        assert line['loss'] == pytest.approx(parts, rel=1e-4)
        assert 0 <= line['gate.coarse_fraction'] <= 1 and 10 <= line['gate.tokens'] <= 37
    unchanged = {name for name, p in runner.model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in unchanged if not name.startswith('backbone.gate.')} == set()
    assert (ROOT / config.work_dir / 'iter_4.pth').exists()


def test_resume_continues_where_it_stopped(config):
    build(config, **{'train_cfg.max_iters': 2}).train()
    state = torch.load(f'{config.work_dir}/iter_2.pth', weights_only=False)
    runner = build(config, **{'train_cfg.max_iters': 4, 'resume': True})
    runner.load_or_resume()
    assert runner.iter == 2
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(tensor, state['state_dict'][name])
    runner.train()
    assert runner.iter == 4


@pytest.fixture
def checkpoint(config):
    build(config, **{'train_cfg.max_iters': 2}).train()
    return f'{config.work_dir}/iter_2.pth'


def test_test_slide_and_tta(config, checkpoint):
    config.load_from = checkpoint
    whole = build(config.copy()).test()
    assert 0 <= whole['mIoU'] <= 100

    slide = config.copy()
    slide.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))
    assert 0 <= build(slide).test()['mIoU'] <= 100

    tta = config.copy()  # as mmseg's tools/test.py does it
    tta.test_dataloader.dataset.pipeline = tta.tta_pipeline
    tta.tta_model.module = tta.model
    tta.model = tta.tta_model
    assert 0 <= build(tta).test()['mIoU'] <= 100


def test_inference_apis(config, checkpoint, scenes):
    image = str(scenes / 'images/val/0000.png')
    model = init_model(config, checkpoint, device='cpu')
    one = inference_model(model, image).pred_sem_seg.data
    assert one.shape == (1, 96, 96)
    config.dump(f'{config.work_dir}/config.py')
    inferencer = MMSegInferencer(f'{config.work_dir}/config.py', checkpoint, device='cpu')
    assert (inferencer(image)['predictions'] == one[0].numpy()).all()


def test_a_gate_that_breaks_stops_training_and_keeps_the_last_checkpoint(config):
    class Poison(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 2:
                runner.model.backbone.gate.embed.weight.data.fill_(float('nan'))

    runner = build(config)
    runner.register_hook(Poison())
    with pytest.raises(FloatingPointError, match='gate logits must be finite, got .* at iteration 3'):
        runner.train()
    resumed = build(config, resume=True)
    resumed.train()
    assert resumed.iter == 4
    assert all(p.isfinite().all() for p in resumed.model.parameters())


def test_truncated_checkpoint(config, checkpoint, tmp_path):
    whole = Path(checkpoint).read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'cut.pth'))
    with pytest.raises(ValueError, match='checkpoint: wanted a whole checkpoint, got .*cut.pth, which cannot be read'):
        build(config).model.init_weights()


def test_missing_data_folder(config):
    config.train_dataloader.dataset.data_root = 'no/such/folder'
    with pytest.raises(FileNotFoundError, match='no/such/folder/images/train'):
        build(config).train()


@pytest.mark.slow
def test_mim_from_another_folder_killed_and_resumed(config, scenes, tmp_path):
    options = [f'{k}={str(v).replace(" ", "")}' for k, v in OPTIONS.items()]
    mim = [sys.executable, '-m', 'mim']
    common = ['--work-dir', tmp_path / 'work', '--cfg-options', *options]
    env = dict(TOY_SCENES=str(scenes))
    train = [*mim, 'train', 'mmsegmentation', ROOT / CONFIG, '--yes']
    run(*train, *common, 'train_cfg.max_iters=2', cwd=tmp_path, **env)
    out = run(*train, '--resume', *common, cwd=tmp_path, **env)
    assert 'resumed epoch: 0, iter: 2' in out and 'Saving checkpoint at 4 iterations' in out
    test = [*mim, 'test', 'mmsegmentation', ROOT / CONFIG, '--checkpoint', tmp_path / 'work/iter_4.pth', '--yes']
    out = run(*test, '--tta', *common, cwd=tmp_path, **env)
    assert 'mIoU' in out


@pytest.mark.slow
def test_gate_tools(config, checkpoint, scenes, tmp_path):
    config.dump(f'{config.work_dir}/config.py')
    tool = [sys.executable, '-W', 'ignore']
    common = [f'{config.work_dir}/config.py', checkpoint]
    out = run(*tool, 'tools/analyze_gate.py', *common, '--out', tmp_path / 'gate.json')
    numbers = json.loads((tmp_path / 'gate.json').read_text())
    assert numbers['images'] == 3 and numbers['dense_tokens'] == 36 and 9 <= numbers['tokens'] <= 36
    assert 'conditionality' in out
    run(*tool, 'tools/show_tokens.py', *common, scenes / 'images/val', '--truth', scenes / 'annotations/val',
        '--out', tmp_path / 'pictures')  # fmt: skip
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 3


def test_scenes_are_deterministic_and_varied(scenes, tmp_path):
    run(sys.executable, ROOT / 'tools/dataset_converters/toy_scenes.py', tmp_path / 'again', '--train', 6, '--val', 1,
        '--size', 96)  # fmt: skip
    for path in sorted((scenes / 'images/train').iterdir()):
        assert path.read_bytes() == (tmp_path / 'again/images/train' / path.name).read_bytes()
    labels = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (scenes / 'annotations/train').iterdir()]
    assert labels[0].dtype == np.uint8 and labels[0].shape == (96, 96)
    assert len(np.unique(labels)) >= 6


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['test', 'train'])
def test_benchmark(mode, tmp_path):
    tool = [sys.executable, '-W', 'ignore', 'tools/benchmark.py', CONFIG, '--against', CONFIG.replace('msvit', 'vit')]
    options = ['--gate', 'random:0.5', '--size', 64, '--repeat', 2, '--batch', 2, '--device', 'cpu']
    out = run(*tool, *options, '--mode', mode, '--json', tmp_path / 'a.json')
    assert f'encoder, {mode}, 64x64, gate random:0.5' in out
    rows = {row['name']: row for row in json.loads((tmp_path / 'a.json').read_text())['rows']}
    ours = ['MSViT', 'its gate and tokens', 'all fine'] if mode == 'test' else ['MSViT active', 'MSViT trimmed']
    assert list(rows) == [*ours, 'dense', 'against']
    assert rows['dense']['ratio'] == 1 and rows['dense']['tokens'] == 17
    assert rows[ours[0]]['tokens'] < 17 and rows[ours[0]]['gmacs'] < rows['dense']['gmacs']
    assert all(row['seconds'] > 0 and row['memory_mib'] > 0 for row in rows.values())
