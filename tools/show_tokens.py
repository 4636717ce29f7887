"""Draws what the gate does: image, token grid, probability of coarse, prediction, and truth where there is one.

    python tools/show_tokens.py CONFIG CHECKPOINT IMAGE_OR_FOLDER --out pictures [--truth LABELS_OR_FOLDER]

One PNG for each image. Images go through the config's test pipeline and, in one piece, through the model; truth is read
as the config's test set reads it. An image of a folder that cannot be drawn is reported at the end.
"""

import argparse
from pathlib import Path

import cv2
from rich.progress import track

from mmseg_msvit.measuring.visualization import draw_image
from mmseg_msvit.tooling.command_line import DEVICE, InputError, about, one_line_errors
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader, list_images, pair_truth, picture_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('image', type=Path, help='an image, or a folder of images')
    parser.add_argument('--truth', type=Path, help='class ids of the image, or a folder of PNG files of the same names')
    parser.add_argument('--out', type=Path, default=Path('pictures'), help='folder for the pictures')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    images = list_images(args.image)
    truths = pair_truth(images, args.truth)
    pictures = [args.out / name for name in picture_names(images)]
    read = {path.resolve() for path in (*images, *truths) if path}
    lost = [str(picture) for picture in pictures if picture.resolve() in read]
    if lost:
        raise InputError(f'--out: wanted a folder without these images and truths, got {args.out}, with {lost[0]}')
    config = load_config(args.config)
    reader = FileReader(config)
    model = load_model(config, args.checkpoint, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    skipped = []
    for path, truth, picture in track(list(zip(images, truths, pictures)), 'pictures'):
        try:
            with about(path):
                data, labels = reader.read(path, truth)
                drawn = draw_image(model, data, reader.palette, labels)
        except InputError as error:
            skipped.append(str(error))
            continue
        cv2.imwrite(str(picture), drawn[..., ::-1])
    print(f'{len(images) - len(skipped)} pictures in {args.out}')
    if skipped:
        raise InputError('\n'.join(skipped))


if __name__ == '__main__':
    with one_line_errors():
        main()
