"""Draws the way of one image through the code: image, gate, tokens, pack, dense grid, prediction.

python tools/draw_mechanism.py CONFIG CHECKPOINT IMAGE docs/mechanism.png
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure

from mmseg_msvit.gates.from_outside import find_msvit
from mmseg_msvit.measuring.inspection import look, seen_size
from mmseg_msvit.measuring.visualization import draw_tokens, paint_classes, picture_of
from mmseg_msvit.tokens.token_map import TokenMap
from mmseg_msvit.tooling.command_line import one_line_errors
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader

GAP = 2  # pixels between the tokens of the pack


def draw_pack(image: np.ndarray, tokens: TokenMap, patch: int, sides, across: int) -> np.ndarray:
    """The tokens as the patch embedding sees them, all of one size, in the order of the pack.

    Args:
        image: (H, W, 3) uint8.
        tokens: of the image alone.
        patch: pixels along a token's side.
        sides: cells along a token's side at each level.
        across: tokens in a line.
    """
    rows, levels = tokens.cover[0, 0].numpy(), tokens.levels()[0].numpy()  # (h, w)
    canvas = np.full((-(-rows.size // across) * (patch + GAP), across * (patch + GAP), 3), 255, np.uint8)
    whole = [(0, -size % (patch * sides[-1])) for size in image.shape[:2]]
    padded = np.pad(image, (*whole, (0, 0)), mode='edge')
    _, firsts = np.unique(rows, return_index=True)  # of each token's cells the first one
    for i, cell in enumerate(firsts):
        y, x = divmod(int(cell), rows.shape[1])
        pixels = patch * sides[levels[y, x]]
        token = padded[y * patch : y * patch + pixels, x * patch : x * patch + pixels]
        token = cv2.resize(token, (patch, patch), interpolation=cv2.INTER_AREA)
        top, left = (patch + GAP) * (i // across), (patch + GAP) * (i % across)
        canvas[top : top + patch, left : left + patch] = token
    return canvas[: -(-len(firsts) // across) * (patch + GAP)]


def principal_colours(features: torch.Tensor) -> np.ndarray:
    """(C, h, w) to (h, w, 3) in [0, 1]: the three directions of largest variance as red, green and blue."""
    flat = features.flatten(1).T  # (h * w, C)
    flat = flat - flat.mean(0)
    colours = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T  # (h * w, 3)
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    return ((colours - low) / (high - low)).clamp(0, 1).view(*features.shape[1:], 3).numpy()


def draw(model, data: dict, palette) -> Figure:
    """The figure of an image that a test pipeline has made."""
    backbone, outputs = find_msvit(model), []
    handle = backbone.register_forward_hook(lambda module, args, out: outputs.append(out[-1][0].float()))
    sample, tokens, decision = look(model, data)
    handle.remove()
    patch, sides = backbone.patch_size, backbone.sides
    height, width = seen_size(backbone, tokens, sample)
    image = cv2.resize(picture_of(data['inputs'])[0], (width, height), interpolation=cv2.INTER_AREA)
    used, (h, w) = int((tokens.level >= 0).sum()), tokens.grid
    probability = decision.logits[0][0].sigmoid().numpy()
    panels = [
        ('1  image', image),
        ('2  gate: probability of coarse, by region', probability),
        (f'3  {used} tokens in place of {h * w}', draw_tokens(image, tokens, patch, sides)),
        ('4  the pack, through the blocks', draw_pack(image, tokens, patch, sides, across=round((1.35 * used) ** 0.5))),
        (f'5  back on the grid of {h} x {w} cells', principal_colours(outputs[0])),
        ('6  any head: the prediction', paint_classes(sample.pred_sem_seg.data[0].numpy(), palette)),
    ]
    figure = Figure(figsize=(12, 12 * 2 / 3 * height / width + 0.7), dpi=100, layout='constrained')
    for axes, (title, picture) in zip(figure.subplots(2, 3).flat, panels):
        axes.imshow(picture, vmin=0, vmax=1, interpolation='antialiased' if picture.dtype == np.uint8 else 'nearest')
        axes.set_title(title, fontsize=12, loc='left')
        axes.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('image', type=Path)
    parser.add_argument('out', type=Path, help='a PNG file')
    args = parser.parse_args()

    config = load_config(args.config)
    reader = FileReader(config)
    data, _ = reader.read(args.image)
    draw(load_model(config, args.checkpoint, 'cpu'), data, reader.palette).savefig(args.out)
    print(args.out)


if __name__ == '__main__':
    with one_line_errors():
        main()
