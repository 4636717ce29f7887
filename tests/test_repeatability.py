"""The same again: equal seeds give equal losses, and a training that is killed goes on to the same end."""

import json
import sys

import pytest
from conftest import ROOT, build_runner, run
from mmengine.hooks import Hook


class Losses(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append({name: float(value) for name, value in outputs.items()})


@pytest.mark.parametrize('workers', [0, 2])
def test_one_seed_gives_one_loss_curve_to_the_bit(config, workers):
    def curve(seed):
        losses = Losses()
        runner = build_runner(config.copy(), **{'train_dataloader.num_workers': workers, 'randomness.seed': seed})
        runner.register_hook(losses)
        runner.train()
        return losses.seen

    config.train_cfg.val_interval = 4
    first = curve(0)
    assert len(first) == 4 and curve(0) == first
    assert workers or curve(1) != first


@pytest.mark.slow
def test_ten_kills_change_neither_the_end_nor_what_is_remembered(scenes, tmp_path):
    run(sys.executable, '-W', 'ignore', ROOT / 'tests/killed_training.py', scenes, tmp_path, OMP_NUM_THREADS='1')
    result = json.loads((tmp_path / 'result.json').read_text())
    assert len(result['left']) == 10 and not any(attempt['ended'] for attempt in result['left'])
    steps = [attempt['at'][0] for attempt in result['left']]
    assert steps == sorted(steps) and steps[-1] > 4  # each kill left a whole checkpoint, none before the last one
    for step, counted in [attempt['at'] for attempt in result['left']] + [result['end']]:
        assert counted == step
    assert result['end'][0] == 40
    ends = {
        name: sum(loss for step, loss in dict(losses).items() if step > 30) / 10
        for name, losses in result['losses'].items()
    }
    assert 0.7 < ends['killed'] / ends['whole'] < 1.4, ends
    assert {step for step, _ in result['losses']['killed']} == set(range(1, 41))
