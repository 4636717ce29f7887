"""Draws a data set of street scenes: smooth skies, meadows and roads next to crowds, trees and cars.

    python tools/dataset_converters/toy_scenes.py data/toy_scenes

Writes images/{train,val}/*.png and annotations/{train,val}/*.png (uint8 class ids). The same seed gives the same files.
A finished data set is left as it is.
"""

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from mmseg_msvit.tooling.toy_scenes import scene


def write(out: Path, counts: dict, size: int, seed: int) -> None:
    """Writes the splits into ``out``, which appears only when all is drawn."""
    unfinished = out.with_name(out.name + '.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, (split, count) in enumerate(counts.items()):
        folders = [unfinished / kind / split for kind in ('images', 'annotations')]
        for folder in folders:
            folder.mkdir(parents=True)
        for i in track(range(count), f'{split} scenes'):
            image, labels = scene(np.random.default_rng([seed, number, i]), size)
            for folder, array in zip(folders, (image[..., ::-1], labels)):
                if not cv2.imwrite(str(folder / f'{i:04d}.png'), array):
                    raise OSError(f'cannot write {folder / f"{i:04d}.png"}')
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=480, help='scenes for training (default: 480)')
    parser.add_argument('--val', type=int, default=80, help='scenes for validation (default: 80)')
    parser.add_argument('--size', type=int, default=256, help='pixels along a side (default: 256)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        print(f'{args.out} is there already')
        return
    write(args.out, dict(train=args.train, val=args.val), args.size, args.seed)


if __name__ == '__main__':
    main()
