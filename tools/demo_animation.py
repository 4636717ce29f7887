"""Draws for a page what tools/demo.py shows: a slider that moves, as an animated WebP, and a still picture.

    python tools/demo_animation.py CONFIG CHECKPOINT IMAGE --animation demo.webp --picture photo.jpg --budget 0.5

The slider is the budget of tokens; it goes from all fine to all coarse and back. The still has the image, its tokens at
--budget, and the prediction. Numbers are measured on this very image; compute is that of the whole segmentor.
"""

import argparse
from pathlib import Path
from typing import Dict, Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmseg_msvit.tooling.command_line import InputError, one_line_errors
from mmseg_msvit.tooling.explorer import Explorer
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader

FRAMES, MILLISECONDS = 12, 250
GAP, TEXT = 12, (34, 34, 34)


def draw(panels: Dict[str, np.ndarray], footer: str, width: int, slider: Optional[float] = None) -> Image.Image:
    """Pictures of one size side by side, each below its title, and a line below them.

    Args:
        panels: title -> (H, W, 3) uint8 RGB.
        footer: text below.
        width: of the whole, in pixels.
        slider: where the handle of a slider stands, in [0, 1]; None for no slider.
    """
    each = (width - GAP * (len(panels) + 1)) // len(panels)
    high, wide = next(iter(panels.values())).shape[:2]
    height, line = round(each * high / wide), round(width / 34)
    below = GAP + line + height + GAP
    canvas = Image.new('RGB', (width, below + line + GAP + (line if slider is not None else 0)), 'white')
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(0.75 * line)
    for i, (title, picture) in enumerate(panels.items()):
        x = GAP + i * (each + GAP)
        canvas.paste(Image.fromarray(picture).resize((each, height), Image.Resampling.LANCZOS), (x, GAP + line))
        pen.text((x, GAP), title, TEXT, font)
    if slider is not None:
        y, left, right = below + line // 2, GAP + line, width - GAP - line
        x = left + slider * (right - left)
        pen.line((left, y, right, y), (190, 190, 190), line // 5)
        pen.line((left, y, x, y), (0, 102, 204), line // 5)
        pen.circle((x, y), line / 2.5, (0, 102, 204))
        below += line
    pen.text((GAP, below), footer, TEXT, font)
    return canvas


def in_words(found: dict) -> str:
    """What a look has cost and kept."""
    tokens, compute = found['tokens'] / found['dense_tokens'], found['gmacs'] / found['dense_gmacs']
    return (
        f'{tokens:.0%} of the tokens, {compute:.0%} of the compute, {found["agreement"]:.1%} of the pixels as with all'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('image', type=Path)
    parser.add_argument('--animation', type=Path, default=Path('demo.webp'))
    parser.add_argument('--picture', type=Path, default=Path('photo.jpg'))
    parser.add_argument(
        '--budget', type=float, default=0.5, help="of the still picture, a share of the dense model's tokens"
    )
    args = parser.parse_args()
    if not args.image.is_file():
        raise InputError(f'image: wanted a file, got {args.image}, which is not there')

    config, image = load_config(args.config), args.image.read_bytes()
    explorer = Explorer(load_model(config, args.checkpoint, 'cpu'), FileReader(config))
    found = explorer.look(image, 'budget', args.budget)
    pictures = found['pictures']
    panels = {
        'photograph': explorer.open(image).pixels,
        f'{found["tokens"]} of {found["dense_tokens"]} tokens': pictures['tokens'],
        'prediction': pictures['prediction'],
    }
    draw(panels, in_words(found), 1600).save(args.picture, quality=88)

    high, low = (
        look['tokens'] / look['dense_tokens'] for look in (explorer.look(image, 'threshold', value) for value in (1, 0))
    )
    frames = []
    for place in np.linspace(1, 0, FRAMES):
        found = explorer.look(image, 'budget', low + place * (high - low))
        panels = {name: found['pictures'][name] for name in ('tokens', 'prediction')}
        frames.append(draw(panels, in_words(found), 960, place))
    there_and_back = [*frames, *frames[-2:0:-1]]
    durations = [MILLISECONDS * (4 if frame in (frames[0], frames[-1]) else 1) for frame in there_and_back]
    options = dict(save_all=True, append_images=there_and_back[1:], duration=durations, loop=0, quality=60, method=4)
    frames[0].save(args.animation, **options)
    for path in (args.picture, args.animation):
        print(f'{path}: {path.stat().st_size // 1000} kB')


if __name__ == '__main__':
    with one_line_errors():
        main()
