"""Pictures of what the gate does."""

from typing import Dict, Optional, Sequence, Tuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..gates.from_outside import find_msvit
from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap
from ..vit.mixed_scale import MixedScale
from .inspection import look, seen_size

# A panel is at least so many pixels wide, so that the cells of a small image can be told apart.
PANEL_PIXELS = 480
LINE = (255, 255, 255)


def draw_tokens(image: np.ndarray, tokens: TokenMap, patch: int, sides: Sequence[int]) -> np.ndarray:
    """Draws the borders of the tokens over an image, coarser ones dimmed and as the model sees them: blurred.

    Args:
        image: (H, W, 3) uint8.
        tokens: of the image alone.
        patch: pixels along a cell's side.
        sides: cells along a token's side at each level, beginning with 1.

    Returns:
        (s * H, s * W, 3) uint8, s the smallest whole factor that makes the image at least PANEL_PIXELS wide.
    """
    rows, levels = tokens.cover[0, 0].cpu().numpy(), tokens.levels()[0].cpu().numpy()  # (h, w)
    height, width = image.shape[:2]
    scale = max(1, -(-PANEL_PIXELS // width))
    whole = [(0, -size % (patch * sides[-1])) for size in (height, width)]
    canvas = padded = np.pad(image, (*whole, (0, 0)), mode='edge')
    level = np.kron(levels, np.ones((patch, patch), int))
    level = np.pad(level, [(0, p - n) for p, n in zip(padded.shape, level.shape)], mode='edge')
    for number, side in enumerate(sides[1:], 1):
        blurred = cv2.resize(padded, None, fx=1 / side, fy=1 / side, interpolation=cv2.INTER_AREA)
        blurred = cv2.resize(blurred, padded.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        canvas = np.where((level == number)[..., None], blurred // 2, canvas)
    canvas = cv2.resize(canvas[:height, :width], None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)

    owner = np.kron(rows, np.ones((patch * scale,) * 2, int))[: scale * height, : scale * width]
    border = np.zeros(owner.shape, bool)
    border[0], border[:, 0] = True, True
    border[1:] |= owner[1:] != owner[:-1]
    border[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    canvas[border] = LINE
    return canvas


def paint_classes(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Class ids (H, W) to colours (H, W, 3) uint8; ids beyond the palette, such as 255, are black."""
    colours = np.zeros((max(256, len(palette)), 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[labels]


def sample_figure(
    backbone: MixedScale,
    tokens: TokenMap,
    decision: Optional[Decision],
    inputs: Tensor,
    sample: SegDataSample,
    truth: Optional[np.ndarray],
    palette: Sequence[Sequence[int]],
) -> np.ndarray:
    """Image, token grid, the gates' probabilities, prediction and truth side by side, at the size the backbone saw.

    Args:
        backbone: of the segmentor.
        tokens: of the image alone.
        decision: of its gates; None where none has decided.
        inputs: (C, H, W), the image as mmseg's pipelines pack it.
        sample: the segmentor's result.
        truth: (H', W') class ids, as :class:`.Classes` reads them, if there are any.
        palette: colours of the classes.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    height, width = seen_size(backbone, tokens, sample)
    image, stretched = picture_of(inputs)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    grid = draw_tokens(image, tokens, backbone.patch_size, backbone.sides)
    panels = [
        (f'image{stretched}', image),
        (f'{(tokens.level >= 0).sum()} tokens of {tokens.dense_length - tokens.prefix}', grid),
    ]
    logits = decision.logits if decision else ()
    for level, region in zip(logits, backbone.scales[1:]):
        of = '' if len(logits) == 1 else f', {region} px'
        panels.append((f'probability of coarse{of}', (level[0].sigmoid().cpu().numpy(), region)))
    for name, labels in (('prediction', sample.pred_sem_seg.data[0].cpu().numpy()), ('truth', truth)):
        if labels is not None:
            labels = cv2.resize(labels.astype(np.uint16), (width, height), interpolation=cv2.INTER_NEAREST)
            panels.append((name, paint_classes(labels, palette)))
    panel = max(PANEL_PIXELS, width) / 100  # inches at 100 dots per inch
    figure = Figure(figsize=(panel * len(panels), panel * height / width + 0.4), dpi=100, layout='constrained')
    for axes, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        extent = (0, width, height, 0)
        if isinstance(picture, tuple):
            picture, region = picture
            whole = (0, picture.shape[1] * region, picture.shape[0] * region, 0)
            drawn = axes.imshow(picture, vmin=0, vmax=1, cmap='viridis', extent=whole, interpolation='nearest')
            axes.set(xlim=extent[:2], ylim=extent[2:])
            figure.colorbar(drawn, ax=axes, shrink=0.8)
        else:
            axes.imshow(picture, extent=extent, interpolation='antialiased')
        axes.set_title(title, fontsize=14)
        axes.set_axis_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def sample_pictures(
    backbone: MixedScale,
    tokens: TokenMap,
    decision: Decision,
    image: np.ndarray,
    sample: SegDataSample,
    dense: np.ndarray,
    palette: Sequence[Sequence[int]],
) -> Dict[str, np.ndarray]:
    """What a segmentor made of one image, as pictures of one size, with the image's own sharpness.

    Args:
        backbone: of the segmentor.
        tokens: of the image alone.
        decision: of its gates.
        image: (H, W, 3) uint8 RGB, as it was before any resizing.
        sample: the segmentor's result.
        dense: (H', W') class ids of the model with all tokens.
        palette: colours of the classes.

    Returns:
        (height, width, 3) uint8 RGB each, at least PANEL_PIXELS wide: ``tokens``; ``gate``, the probability of coarse
        at the finest coarse level, yellow where it is 1; ``prediction`` over the image; ``difference``, red where it is
        not the dense model's.
    """
    height, width = seen_size(backbone, tokens, sample)
    scale = -(-max(PANEL_PIXELS, image.shape[1]) // width)  # whole, so that tokens have straight borders
    size, patch = (scale * width, scale * height), scale * backbone.patch_size
    prediction, dense = (
        cv2.resize(labels.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST)
        for labels in (sample.pred_sem_seg.data[0].cpu().numpy(), dense)
    )
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)

    def blend(colours: np.ndarray, below: np.ndarray, share: float) -> np.ndarray:
        return (share * colours + (1 - share) * below).round().astype(np.uint8)

    heat = (255 * decision.logits[0][0].sigmoid()).round().byte().cpu().numpy()
    heat = np.kron(heat, np.ones((patch * backbone.sides[1],) * 2, np.uint8))[: size[1], : size[0]]
    red = np.where((prediction != dense)[..., None], np.uint8([230, 30, 60]), 0.6 * grey)
    return dict(
        tokens=draw_tokens(image, tokens, patch, backbone.sides),
        gate=blend(cv2.applyColorMap(heat, cv2.COLORMAP_VIRIDIS)[..., ::-1], grey, 0.7),
        prediction=blend(paint_classes(prediction, palette), image, 0.6),
        difference=red.astype(np.uint8),
    )


def picture_of(inputs: Tensor) -> Tuple[np.ndarray, str]:
    """What mmseg's pipelines pack, as a picture.

    Pixels of 8 bits are shown as they are, also where they are floats. All others are stretched from their least value
    to their largest; of more than three channels the first three are shown.

    Args:
        inputs: (C, H, W) of any dtype, in BGR.

    Returns:
        (H, W, 3) uint8 RGB; and what is to be known of it, such as ``', bands 3, 2, 1 of 12, 0 to 4095'``.
    """
    channels = len(inputs)
    bands = inputs[:3].numpy()[::-1] if channels >= 3 else inputs[:1].numpy().repeat(3, 0)
    said = '' if channels in (1, 3) else f', bands 3, 2, 1 of {channels}' if channels > 3 else ', band 1 of 2'
    finite = bands[np.isfinite(bands)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    of_8_bits = bands.dtype == np.uint8 or (bands.dtype.kind == 'f' and low >= 0 and 1 < high <= 255)
    bands = np.nan_to_num(bands.astype(np.float32))
    if not of_8_bits and high > low:
        bands = (bands - low) * (255 / (float(high) - float(low)))
        said += f', {low:g} to {high:g}'
    return np.ascontiguousarray(bands.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)), said


def draw_image(
    model: nn.Module, data: dict, palette: Sequence[Sequence[int]], truth: Optional[np.ndarray] = None
) -> np.ndarray:
    """Runs a segmentor over one image, and draws the :func:`sample_figure` of what it makes of it.

    Args:
        model: with an MSViT.
        data: what a test pipeline made of the image.
        palette: colours of the classes.
        truth: (H', W') class ids, as :class:`.Classes` reads them, if there are any.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    sample, tokens, decision = look(model, data)
    return sample_figure(find_msvit(model), tokens, decision, data['inputs'], sample, truth, palette)
