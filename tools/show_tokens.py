"""Draws what the gate does: image, token grid, probability of coarse, prediction, and truth where there is one.

    python tools/show_tokens.py CONFIG CHECKPOINT IMAGE_OR_FOLDER --out pictures [--truth LABELS_OR_FOLDER]

One PNG for each image. Images go through the config's test pipeline and, in one piece, through the model.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from mmseg.apis import inference_model, init_model
from rich.progress import track

from mmseg_msvit.inspection import find_msvit, looking_at, record_tokens
from mmseg_msvit.visualization import sample_figure

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


def list_images(path: Path) -> list:
    """The image itself, or a folder's images in order."""
    if not path.exists():
        raise FileNotFoundError(f'image: wanted an image or a folder of images, got {path}, which is not there')
    images = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f'image: wanted a folder with {", ".join(SUFFIXES)} files, got {path} without any')
    return images


def draw(model, path: Path, truth: Path = None) -> np.ndarray:
    """The picture of one image."""
    with looking_at(model), record_tokens(model) as seen:
        result = inference_model(model, str(path))
    image = cv2.imread(str(path))[..., ::-1]
    labels = None if truth is None else cv2.imread(str(truth), cv2.IMREAD_UNCHANGED)
    return sample_figure(find_msvit(model), seen[0], image, result, model.dataset_meta['palette'], labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('image', type=Path, help='an image, or a folder of images')
    parser.add_argument('--truth', type=Path, help='class ids of the image, or a folder of PNG files of the same names')
    parser.add_argument('--out', type=Path, default=Path('pictures'), help='folder for the pictures')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()

    images = list_images(args.image)
    model = init_model(args.config, args.checkpoint, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in track(images, 'pictures'):
        truth = args.truth / f'{path.stem}.png' if args.truth and args.truth.is_dir() else args.truth
        cv2.imwrite(str(args.out / f'{path.stem}.png'), draw(model, path, truth)[..., ::-1])
    print(f'{len(images)} pictures in {args.out}')


if __name__ == '__main__':
    main()
