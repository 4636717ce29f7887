"""A training that is killed ten times, for test_repeatability.py, which runs this in a process of its own.

    python killed_training.py SCENES FOLDER

Each attempt is a fork of one process that has imported everything, and resumes from what the last one left. Half of
them die at a random moment of a step, half in the middle of writing a checkpoint.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from conftest import ROOT, TOY, TOY_OPTIONS, build_runner
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook

STEPS, KILLS = 40, 10


class Report(Hook):
    """Says down a pipe that a step begins, and notes its loss."""

    def __init__(self, pipe, file):
        self.pipe, self.file = pipe, file

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        os.write(self.pipe, b'.')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with open(self.file, 'a') as file:
            file.write(json.dumps([runner.iter + 1, float(outputs['loss'])]) + '\n')


def die_while_writing(number, share):
    """Has the process killed in its so-manieth checkpoint, of which a share has been written."""
    written = []

    def put(self, obj, filepath):
        written.append(filepath)
        part = obj[: int(share * len(obj))] if len(written) == number else obj
        Path(filepath).write_bytes(part)
        if part is not obj:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalBackend.put = put


def train(scenes, folder, pipe):
    """Resumes and comes to the end, unless it is killed."""
    options = {f'{split}_dataloader.dataset.data_root': str(scenes) for split in ('train', 'val', 'test')}
    options.update({'train_cfg.max_iters': STEPS, 'train_cfg.val_interval': STEPS, 'resume': True})
    config = Config.fromfile(ROOT / TOY)
    config.merge_from_dict({**TOY_OPTIONS, **options, 'work_dir': str(folder)})
    runner = build_runner(config)
    runner.register_hook(Report(pipe, folder / 'losses'))
    runner.train()


def attempt(scenes, folder, write=None, step=None):
    """One process: True if it came to the end.

    Args:
        scenes: the data.
        folder: of the work.
        write: (number, share) of a checkpoint to die in.
        step: (number, seconds), the step to be killed in, and how long after it has begun.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if write:
                die_while_writing(*write)
            train(scenes, folder, writer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writer)
    if step:
        begun = 0
        while begun < step[0] and os.read(reader, 1):
            begun += 1
        time.sleep(step[1])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return status == 0


def checkpoint(folder):
    """(step, steps that a gate loss has counted) of the checkpoint that the next attempt resumes from."""
    file = folder / 'last_checkpoint'
    if not file.exists():
        return 0, 0
    saved = torch.load(file.read_text(), weights_only=False)
    (counted,) = (tensor for name, tensor in saved['state_dict'].items() if name.endswith('steps'))
    return saved['meta']['iter'], int(counted)


def main(scenes, out):
    whole, killed = out / 'whole', out / 'killed'
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    assert attempt(scenes, whole)
    chance = random.Random(0)
    left = []
    for kill in range(KILLS):
        if kill % 2:
            ended = attempt(scenes, killed, write=(chance.randint(1, 2), chance.random()))
        else:
            ended = attempt(scenes, killed, step=(chance.randint(1, 5), chance.uniform(0, 0.1)))
        left.append(dict(ended=ended, at=checkpoint(killed)))
    assert attempt(scenes, killed)
    losses = {f.name: [json.loads(line) for line in (f / 'losses').read_text().splitlines()] for f in (whole, killed)}
    (out / 'result.json').write_text(json.dumps(dict(left=left, end=checkpoint(killed), losses=losses)))


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]))
