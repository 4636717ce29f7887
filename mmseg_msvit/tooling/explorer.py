"""One image through a segmentor at any threshold or budget, beside the same model with all tokens."""

from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from ..gates.from_outside import as_dense, deciding_by, find_msvit
from ..measuring.flops import HeadMacs, pass_costs
from ..measuring.inspection import look
from ..measuring.visualization import picture_of, sample_pictures
from ..tokens.token_map import region_grid
from .command_line import InputError, about
from .testset import FileReader
from .timing import timed

# Larger images are reduced: who moves a slider does not want to wait.
LONGEST = 768
KNOBS = ('threshold', 'budget')


class Opened(NamedTuple):
    """An image, and what the dense model makes of it."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    shown: str  # what is to be known of these, see picture_of
    data: dict  # what the test pipeline made of it
    prediction: np.ndarray  # (H', W') int64 class ids, of which mmseg makes floats where one logit tells two classes
    milliseconds: float


def reduced(image: np.ndarray) -> np.ndarray:
    """An image (H, W) or (H, W, C) of any dtype, made so small that its longer side is ``LONGEST``."""
    height, width = image.shape[:2]
    shrink = LONGEST / max(height, width)
    if shrink >= 1:
        return image
    size = max(1, round(shrink * width)), max(1, round(shrink * height))
    # Band by band: OpenCV resizes up to four at once.
    bands = [
        cv2.resize(np.ascontiguousarray(band), size, interpolation=cv2.INTER_AREA)
        for band in np.moveaxis(np.atleast_3d(image), 2, 0)
    ]
    return np.stack(bands, -1) if image.ndim == 3 else bands[0]


class Explorer:
    """A segmentor, and the images that it was asked for last, which it looks at again and again.

    Args:
        model: with an MSViT.
        reader: of its config.
    """

    def __init__(self, model: nn.Module, reader: FileReader):
        self.model, self.reader = model, reader
        self.backbone, self.heads = find_msvit(model), HeadMacs(model)
        self.open = lru_cache(maxsize=4)(self._open)

    def _open(self, image: bytes) -> Opened:
        """Decodes an image, and runs the dense model twice: the first time warms up.

        Raises:
            InputError: it is no picture.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / f'image{Path("_" + getattr(self.reader.dataset, "img_suffix", "")).suffix}'
            path.write_bytes(image)
            try:
                data = self.reader.load(path)
            except InputError as error:
                raise InputError(
                    'image: wanted a picture that the config reads, got a file that is none or is broken'
                ) from error
            with about('image'):
                data['img'] = reduced(data['img'])
            data['img_shape'] = data['ori_shape'] = data['img'].shape[:2]
            pixels, shown = picture_of(torch.from_numpy(np.atleast_3d(data['img'])).permute(2, 0, 1))
            data, _ = self.reader.prepare(data)
        with about('image'), as_dense(self.model):
            self._timed(data)
            milliseconds, (sample, _, _) = self._timed(data)
        return Opened(pixels, shown, data, sample.pred_sem_seg.data[0].long().cpu().numpy(), milliseconds)

    def _timed(self, data: dict) -> tuple:
        """Milliseconds of :func:`look`, and what it returns."""
        data = deepcopy(data)  # the model writes into its samples
        seconds, found = timed(partial(look, self.model), data, next(self.model.parameters()).device)
        return 1000 * seconds, found

    def look(self, image: bytes, knob: str, value: float) -> dict:
        """What the model makes of an image.

        Args:
            image: the file.
            knob: ``'threshold'`` of the gate, or ``'budget'``, a share of the dense model's tokens.
            value: in [0, 1]; more of either is more tokens.

        Returns:
            ``tokens`` and ``dense_tokens``; ``gmacs`` and ``dense_gmacs`` of the whole segmentor; ``milliseconds`` and
            ``dense_milliseconds`` of one pass; ``agreement`` with the dense model, a share of the pixels; ``classes``
            that are predicted, name -> colour, the most common first; ``pictures`` by :func:`.sample_pictures`, and
            what is ``shown`` in them, see :func:`.picture_of`.

        Raises:
            InputError: the image is no picture, or the knob or its value is none.
        """
        if knob not in KNOBS or not 0 <= value <= 1:
            raise InputError(f'{knob}: wanted a threshold or a budget in [0, 1], got {value:g}')
        opened = self.open(image)
        if knob == 'threshold':
            decisive = deciding_by(self.model, value)
        else:
            select = self.backbone.select
            h, w = region_grid(opened.data['inputs'].shape[1:], self.backbone.patch_size)
            decisive = deciding_by(self.model, select.threshold, max(1, value * (h * w + select.prefix)))
        with decisive:
            milliseconds, (sample, tokens, decision) = self._timed(opened.data)
        prediction = sample.pred_sem_seg.data[0].long().cpu().numpy()
        (cost,) = pass_costs(self.backbone, tokens, self.heads)
        names, palette, _ = self.reader.classes
        pixels = np.bincount(prediction.ravel(), minlength=len(names))
        return dict(
            tokens=cost['tokens'],
            dense_tokens=cost['dense_tokens'],
            gmacs=cost['total'] / 1e9,
            dense_gmacs=cost['dense_total'] / 1e9,
            shown=opened.shown.removeprefix(', '),
            milliseconds=milliseconds,
            dense_milliseconds=opened.milliseconds,
            agreement=float((prediction == opened.prediction).mean()),
            classes={names[i]: palette[i] for i in (-pixels).argsort(kind='stable') if pixels[i]},
            pictures=sample_pictures(
                self.backbone, tokens, decision, opened.pixels, sample, opened.prediction, palette
            ),
        )
