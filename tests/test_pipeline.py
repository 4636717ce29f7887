"""mmseg's own ways to train, test and predict, on a few tiny scenes."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, TOY_OPTIONS, build_runner, run
from mmengine.hooks import Hook
from mmseg.apis import MMSegInferencer, inference_model, init_model


@pytest.fixture
def checkpoint(config):
    build_runner(config, **{'train_cfg.max_iters': 2}).train()
    return f'{config.work_dir}/iter_2.pth'


def scalars(config):
    (file,) = (p for p in sorted((ROOT / config.work_dir).glob('*/vis_data/scalars.json')))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_train_logs_validates_and_saves(config):
    runner = build_runner(config)
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


def test_token_maps_are_drawn_and_change_nothing(config):
    config.val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='TokenMetric')]

    def toss(runner):
        """Lets the model use random numbers in evaluation."""

        def hook(module, args, tokens):
            torch.rand(1)

        runner.model.backbone.select.register_forward_hook(hook)
        return runner

    plain = toss(build_runner(deepcopy(config)))
    plain.train()
    metrics = plain.val()
    config.custom_hooks.append(dict(type='TokenMapHook', interval=2, indices=(0, 2)))
    config.work_dir += '_drawn'
    config.visualizer.vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    drawn = toss(build_runner(config))
    drawn.train()
    for (name, a), b in zip(plain.model.state_dict().items(), drawn.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert drawn.val() == metrics and metrics['msvit/tokens_mean'] >= 10
    (folder,) = Path(config.work_dir).glob('*/vis_data')
    logged = [
        [{k: v for k, v in line.items() if k.startswith('msvit/')} for line in scalars(c) if 'mIoU' in line]
        for c in (plain.cfg, config)
    ]
    assert len(logged[0]) == 3 and logged[0] == logged[1]
    pictures = sorted(path.name for path in (folder / 'vis_image').iterdir())
    assert pictures == [f'tokens_{i}_{step}.png' for i in (0, 2) for step in (0, 2, 4)]
    assert cv2.imread(str(folder / 'vis_image/tokens_2_4.png')).shape[1] == 5 * 480
    assert list(folder.glob('events.out.tfevents.*'))


def test_token_maps_need_a_validation_set(config):
    for name in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        config.pop(name)
    config.train_cfg.pop('val_interval')
    config.custom_hooks.append(dict(type='TokenMapHook'))
    with pytest.raises(ValueError, match='TokenMapHook draws images of the validation set'):
        build_runner(config).train()


def test_resume_continues_where_it_stopped(config, checkpoint):
    state = torch.load(checkpoint, weights_only=False)
    runner = build_runner(config, **{'train_cfg.max_iters': 4, 'resume': True})
    runner.load_or_resume()
    assert runner.iter == 2
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(tensor, state['state_dict'][name])
    runner.train()
    assert runner.iter == 4
    assert [m.steps for m in runner.model.modules() if hasattr(m, 'steps')] == [4]


@pytest.mark.parametrize('options', [{}, dict(update_buffers=True), dict(begin_iter=2)])
def test_averaged_weights_with_batch_shaping(config, options):
    """Its counter is a buffer, which averaging copies. With all else that a config may ask for at once."""
    config.merge_from_dict({'model.backbone.with_cp': True, 'optim_wrapper.accumulative_counts': 2})
    assert config.optim_wrapper.clip_grad.max_norm == 1
    config.custom_hooks.append(dict(type='EMAHook', momentum=0.1, **options))
    runner = build_runner(config)
    runner.train()
    saved = torch.load(f'{config.work_dir}/iter_4.pth', weights_only=False)
    (steps,) = (name for name in saved['state_dict'] if name.endswith('steps'))
    if not options.get('update_buffers'):
        assert saved['state_dict'][steps] == 4
    assert all(value.isfinite().all() for value in saved['state_dict'].values())


def test_three_scales_of_the_toy_config(config):
    config.model.backbone.scales = (16, 32, 64)
    config.val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='TokenMetric')]
    config.custom_hooks.append(dict(type='TokenMapHook', interval=2, indices=(0,)))
    runner = build_runner(config)
    runner.train()
    log = [line for line in scalars(config) if 'loss' in line]
    assert {'gate.loss_purity', 'gate.loss_purity_2', 'gate.loss_gbas_2', 'gate.coarse_fraction_2'} <= set(log[0])
    assert 5 <= runner.val()['msvit/tokens_mean'] <= 37


def test_test_slide_and_tta(config, checkpoint):
    config.load_from = checkpoint
    whole = build_runner(config.copy()).test()
    assert 0 <= whole['mIoU'] <= 100

    slide = config.copy()
    slide.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))
    assert 0 <= build_runner(slide).test()['mIoU'] <= 100

    tta = config.copy()  # as mmseg's tools/test.py does it
    tta.test_dataloader.dataset.pipeline = tta.tta_pipeline
    tta.tta_model.module = tta.model
    tta.model = tta.tta_model
    assert 0 <= build_runner(tta).test()['mIoU'] <= 100


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

    runner = build_runner(config)
    runner.register_hook(Poison())
    with pytest.raises(FloatingPointError, match='gate logits must be finite, got .* at iteration 3'):
        runner.train()
    resumed = build_runner(config, **{'train_cfg.max_iters': 4, 'resume': True})
    resumed.train()
    assert resumed.iter == 4
    assert all(p.isfinite().all() for p in resumed.model.parameters())


@pytest.mark.slow
def test_mim_resumes_and_tests_from_another_folder(checkpoint, scenes, tmp_path):
    options = [f'{k}={str(v).replace(" ", "")}' for k, v in TOY_OPTIONS.items()]
    mim = [sys.executable, '-m', 'mim']
    common = ['--work-dir', tmp_path / 'work', '--cfg-options', *options]
    env = dict(TOY_SCENES=str(scenes))
    train = [*mim, 'train', 'mmsegmentation', ROOT / TOY, '--yes', '--resume']
    out = run(*train, *common, cwd=tmp_path, **env)
    assert 'resumed epoch: 0, iter: 2' in out and 'Saving checkpoint at 4 iterations' in out
    test = [*mim, 'test', 'mmsegmentation', ROOT / TOY, '--checkpoint', tmp_path / 'work/iter_4.pth', '--yes']
    out = run(*test, '--tta', *common, cwd=tmp_path, **env)
    assert 'mIoU' in out


def test_scenes_are_deterministic_and_varied(scenes, tool, tmp_path):
    options = ('--train', 6, '--val', 1, '--size', 96)
    assert tool('dataset_converters/toy_scenes.py', tmp_path / 'again', *options) is None
    for path in sorted((scenes / 'images/train').iterdir()):
        assert path.read_bytes() == (tmp_path / 'again/images/train' / path.name).read_bytes()
    labels = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (scenes / 'annotations/train').iterdir()]
    assert labels[0].dtype == np.uint8 and labels[0].shape == (96, 96)
    assert len(np.unique(labels)) >= 6
