"""What classes a segmentor tells apart, and label maps, which say of each pixel what it is of.

All tools and hooks read label maps by :class:`Classes`, and so refuse the same ones.
"""

from functools import partial
from pathlib import Path
from typing import Any, Collection, FrozenSet, List, NamedTuple, Optional, Sequence, Union

import numpy as np
from mmseg.models.decode_heads import PointHead, SegmenterMaskTransformerHead
from mmseg.structures import SegDataSample
from PIL import Image
from torch import Tensor, nn

# What mmseg calls a pixel that is of no class.
IGNORE_INDEX = 255
# Heads of mmseg's that give num_classes logits, whatever their out_channels say.
DEAF_TO_OUT_CHANNELS = (SegmenterMaskTransformerHead, PointHead)


def last_head(decode_head: Any) -> Any:
    """Of a cascade's heads, or of their configs, the one whose classes are the answer; else the head itself."""
    return decode_head[-1] if isinstance(decode_head, (list, tuple, nn.ModuleList)) else decode_head


def count_answers(decode_head: Any) -> int:
    """Class ids that mmseg answers with, of a head or its config: one class, or two by one logit, are 0 and 1."""
    head = last_head(decode_head)
    return max(2, (head.get if isinstance(head, dict) else partial(getattr, head))('num_classes', 0))


def check_heads(model: nn.Module) -> None:
    """Refuses a segmentor of mmseg's whose class map is not the one that its config says.

    Raises:
        ValueError: a head has other logits than its ``out_channels``, or it is a cascade whose answer is one logit.
    """
    heads = model.decode_head if isinstance(model.decode_head, nn.ModuleList) else [model.decode_head]
    for head in heads:
        if isinstance(head, DEAF_TO_OUT_CHANNELS) and head.out_channels != head.num_classes:
            raise ValueError(
                f'decode_head.out_channels: wanted {head.num_classes}, as many as num_classes, got '
                f'{head.out_channels}: {type(head).__name__} has a logit for each class, whatever it says'
            )
    if getattr(heads[-1], 'out_channels', None) == 1 and isinstance(model.decode_head, nn.ModuleList):
        raise ValueError(
            'decode_head: wanted a last head of at least two logits, got out_channels=1: a cascade of mmseg has no '
            'threshold to turn one logit into a class'
        )


class Classes(NamedTuple):
    """The classes of a segmentor over a data set.

    Attributes:
        names: of each class id.
        palette: its RGB colour.
        ignored: labels beside ``IGNORE_INDEX`` that do not count.
    """

    names: List[str]
    palette: List[List[int]]
    ignored: FrozenSet[int] = frozenset()

    @classmethod
    def of(cls, decode_head: Any, metainfo: dict, ignored: int = IGNORE_INDEX) -> 'Classes':
        """Those that a head tells apart, by a data set's names and colours; numbers and mmseg's colours without.

        Args:
            decode_head: a segmentor's, or its config.
            metainfo: of the data set.
            ignored: the label that its evaluator leaves out.
        """
        head = last_head(decode_head)
        of_head = head.get if isinstance(head, dict) else partial(getattr, head)
        classes, palette = (() if metainfo.get(name) is None else metainfo[name] for name in ('classes', 'palette'))
        names = [str(name) for name in classes]
        names += [str(i) for i in range(len(names), count_answers(head))]
        palette = [[int(value) for value in colour] for colour in palette][: len(names)]
        colours = np.random.RandomState(42).randint(0, 255, (len(names), 3)).tolist()  # as BaseSegDataset makes them
        untrained = of_head('ignore_index', IGNORE_INDEX)
        beyond = {untrained} if untrained >= len(names) else set()
        return cls(names, palette + colours[len(palette) :], frozenset({ignored, *beyond}))

    def read(self, labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """A label map as tools see it: (H, W) uint8, ``IGNORE_INDEX`` where it does not count.

        Args:
            labels: see :func:`check_labels`.
            size: (H, W) of the image.

        Raises:
            ValueError: it is no label map, of another size, or has ids that are of no class.
        """
        labels = check_labels(labels, size)
        beyond = [i for i in ids_in(labels) if not 0 <= i < len(self.names) and i not in (IGNORE_INDEX, *self.ignored)]
        if beyond:
            shown = ', '.join(map(str, beyond[:5])) + (', ...' if len(beyond) > 5 else '')
            void = ' or '.join(map(str, sorted({IGNORE_INDEX, *self.ignored})))
            raise ValueError(
                f'labels: wanted class ids from 0 to {len(self.names) - 1}, or {void} where no class is, got {shown}'
            )
        return np.where(np.isin(labels, list(self.ignored)), IGNORE_INDEX, labels).astype(np.uint8)

    def read_sample(self, sample: SegDataSample, resized: bool = False) -> Optional[np.ndarray]:
        """:meth:`read` of what a test pipeline has packed; None where it has loaded no labels.

        Args:
            sample: of the image.
            resized: whether the labels may be of the size that the pipeline has given the image.
        """
        if 'gt_sem_seg' not in sample:
            return None
        check_depth(sample.get('seg_map_path'))
        labels = sample.gt_sem_seg.data.cpu().numpy()
        along = resized and labels.shape[-2:] == tuple(sample.img_shape[:2])
        return self.read(labels, (sample.img_shape if along else sample.ori_shape)[:2])


def ids_in(labels: np.ndarray) -> List[int]:
    """The ids of a label map in order, as ``np.unique`` gives them, without sorting all pixels."""
    low = int(labels.min())
    if int(labels.max()) - low > 2**16:
        return np.unique(labels).tolist()
    return (low + np.flatnonzero(np.bincount((labels.astype(np.int64) - low).ravel()))).tolist()


def check_labels(labels: Union[np.ndarray, Tensor], size: Sequence[int]) -> Union[np.ndarray, Tensor]:
    """A label map (H, W), which is one.

    Args:
        labels: (H, W) integers, or (1, H, W) as mmseg packs them.
        size: the (H, W) that is wanted.

    Raises:
        ValueError: it is of another shape.
    """
    if labels.ndim == 3 and labels.shape[0] == 1:
        labels = labels[0]
    shape = tuple(labels.shape)
    if len(shape) != 2:
        raise ValueError(f'labels: wanted class ids (H, W), got {shape}, which looks like colours')
    if shape != tuple(size):
        raise ValueError(f'labels: wanted class ids of the size of the image, {tuple(size)}, got {shape}')
    return labels


def check_depth(file: Union[str, Path, None]) -> None:
    """Refuses a file of class ids that mmseg, which keeps eight bits of each, would read as others.

    Args:
        file: of any kind; what is no file here, or none that pillow reads, is taken as it is.

    Raises:
        ValueError: it has ids of more than eight bits.
    """
    if file is None or not Path(file).is_file():
        return
    try:
        with Image.open(file) as picture:
            deep = picture.mode.startswith(('I', 'F'))
            most = np.asarray(picture).max() if deep else 0
    except OSError:
        return
    if most > 255:
        raise ValueError(f'labels: wanted class ids of 8 bits, of which mmseg reads no more, got {most:g} and less')


def one_class(ids: Collection[int]) -> Optional[str]:
    """Why label maps of these ids tell a gate nothing about regions: all are of one class. None if they tell.

    Args:
        ids: all that there are, ``IGNORE_INDEX`` perhaps among them.
    """
    known = sorted(set(ids) - {IGNORE_INDEX})
    if len(known) > 1:
        return None
    if not known:
        return 'no pixel has a label'
    void = f'. {IGNORE_INDEX} is no class: it does not count' if IGNORE_INDEX in ids else ''
    return f'every labelled pixel is of class {known[0]}, so that every region is pure{void}'
