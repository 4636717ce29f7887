"""Draws mIoU over GMACs and over measured time, for several models and thresholds of the gate.

    python tools/tradeoff.py MSViT=CONFIG,CHECKPOINT dense=DENSE_CONFIG,CHECKPOINT --out tradeoff
    python tools/tradeoff.py MSViT=CONFIG dense=DENSE_CONFIG --seeds 0 1 2 --out tradeoff    # trains each first

Each name is a curve: one point for each threshold, since one checkpoint of an MSViT can be run at any; a dense ViT has
one point. Runs of the same name, and seeds, are averaged, and their standard deviation drawn. The test set goes through
all variants image by image (A B C A B C ...), so that the ratios of their times hold on a noisy machine. Training is
resumed where it stopped. Writes tradeoff.png and tradeoff.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

from mmseg_msvit.tooling.command_line import DEVICE, InputError, claim, digest, one_line_errors, write_json
from mmseg_msvit.tooling.models import load_config
from mmseg_msvit.tooling.sweep import Run, curves, draw_curves, measure
from mmseg_msvit.tooling.testset import load_testset


def parse(text: str) -> tuple:
    """``NAME=CONFIG`` or ``NAME=CONFIG,CHECKPOINT`` to the three, None for no checkpoint."""
    name, found, rest = text.partition('=')
    config, _, checkpoint = rest.partition(',')
    if not (found and name and config):
        raise argparse.ArgumentTypeError(f'wanted NAME=CONFIG or NAME=CONFIG,CHECKPOINT, got {text!r}')
    return name, config, checkpoint or None


def train(config: str, seed: int, folder: Path) -> str:
    """Trains a config with a seed, or goes on where that stopped; the last checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / 'of.json', config=digest(Config.fromfile(config).pretty_text))
    done = folder / 'done'
    if not done.exists():
        print(f'training {config}, seed {seed}: {folder}/train.log', flush=True)
        command = [sys.executable, '-m', 'mim', 'train', 'mmsegmentation', config, '--work-dir', str(folder), '--yes']
        options = [f'randomness.seed={seed}']
        if (folder / 'last_checkpoint').exists():
            command.append('--resume')
            options.append('load_from=None')  # which mmengine would resume, and not what is in the folder
        with open(folder / 'train.log', 'a') as log:
            finished = subprocess.run([*command, '--cfg-options', *options], stdout=log, stderr=log)
        if finished.returncode:
            raise InputError(f'training {config} failed: {folder}/train.log says why')
        done.touch()
    return (folder / 'last_checkpoint').read_text().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=parse, help='NAME=CONFIG,CHECKPOINT, or NAME=CONFIG to train it')
    parser.add_argument('--thresholds', nargs='+', type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='for what is trained')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/tradeoff'), help='folder for results and training')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    for _, config, _ in args.runs:
        load_testset(load_config(config))  # what is missing is missed before hours of training
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, config, checkpoint in args.runs:
        if checkpoint:
            runs.append(Run(name, config, checkpoint))
        else:
            for seed in args.seeds:
                folder = args.out / name / Path(config).stem / f'seed_{seed}'
                runs.append(Run(name, config, train(config, seed, folder)))
    points, reference = measure(runs, args.thresholds, args.device)
    at = '' if reference.threshold is None else f' at threshold {reference.threshold:g}'
    print(f'times are ratios to {reference.run.name}{at}')
    found = curves(points)
    write_json(args.out / 'tradeoff.json', dict(points=points, curves=found))
    draw_curves(found).savefig(args.out / 'tradeoff.png')
    print(f'{"":<16} threshold   mIoU   tokens   GMACs      ms   time ratio')
    for name, curve in found.items():
        for p in curve:
            threshold = '' if p['threshold'] is None else f'{p["threshold"]:g}'
            print(
                f'{name:<16} {threshold:>9} {p["miou"]:>6.2f} {p["tokens"]:>8.1f} {p["gmacs"]:>7.2f} '
                f'{p["milliseconds"]:>7.1f} {p["time_ratio"]:>12.2f}'
            )
    print(f'{args.out}/tradeoff.png')


if __name__ == '__main__':
    with one_line_errors():
        main()
