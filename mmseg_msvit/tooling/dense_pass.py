"""A dense segmentor over images, once: what it predicts, and how much of each class it sees in every cell."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmseg.structures import SegDataSample
from rich.progress import track
from torch import Tensor, nn

from ..gates.doubt import class_shares
from ..labels import IGNORE_INDEX, ids_in, one_class
from ..measuring.inspection import check_one_pass
from ..tokens.token_map import Grid
from .command_line import InputError, about
from .testset import FileReader, Truth, list_images, load_dataset, load_testset

TARGETS = ('mixed', 'labels')


@dataclass
class Window:
    """What the backbone saw in one pass: a whole image, or a window of slide inference.

    Attributes:
        example: the image's number.
        box: (y, x, height, width) in the image as the preprocessor pads it.
        shares: (K, h, w) float32, how much of each class is in each cell, by :func:`.class_shares` or labels.
    """

    example: int
    box: Tuple[int, int, int, int]
    shares: Tensor


@dataclass
class Example:
    """An image, and what the dense segmentor made of it.

    Attributes:
        data: what the test pipeline made of the image.
        prediction: (H, W) class ids at the image's own size.
        labels: (H, W) ground truth, if there is any.
    """

    data: dict
    prediction: Tensor
    labels: Optional[np.ndarray]


def find_images(config: Config, folder: Optional[Path], limit: int) -> Tuple[List[Path], List[Optional[Truth]]]:
    """Images, and their labels where there are any: of a folder, or of the config's training set, by its own rules.

    Args:
        config: by :func:`.load_config`.
        folder: of images; None for the training set.
        limit: of more images than this, so many that are evenly spread are taken.

    Raises:
        InputError: there are none.
    """
    if folder is not None:
        images = list_images(folder)
        truths: List[Optional[Truth]] = [None] * len(images)
    else:
        dataset = (config.get('train_dataloader') or {}).get('dataset')
        if dataset is None:
            raise InputError(f'CONFIG: wanted one with a train_dataloader, or --images, got {config.filename} without')
        while 'dataset' in dataset:  # what repeats or mixes it
            dataset = dataset['dataset']
        dataset = load_dataset(dataset, f'training set of {config.filename}')
        images, truths = _listed(dataset)
    return evenly(images, limit), evenly(truths, limit)


def _listed(dataset: BaseDataset) -> Tuple[List[Path], List[Optional[Truth]]]:
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [Path(info['img_path']) for info in infos], [Truth.of(info) for info in infos]


def evenly(items: Sequence, limit: int) -> list:
    """At most so many, evenly spread over all."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)]


def find_val_images(config: Config, limit: int) -> Tuple[List[Path], List[Optional[Truth]]]:
    """Images of a config's validation set, or of its test set where it has none, and their labels.

    Args:
        config: by :func:`.load_config`.
        limit: of more images than this, so many that are evenly spread are taken.

    Raises:
        InputError: there are none.
    """
    loader = config.get('val_dataloader') or config.get('test_dataloader')
    if loader is None:
        raise InputError(
            f'CONFIG: wanted one with a val_dataloader or a test_dataloader, got {config.filename} without'
        )
    images, truths = _listed(load_dataset(loader.dataset, f'validation set of {config.filename}'))
    return evenly(images, limit), evenly(truths, limit)


def find_test_images(config: Config) -> Tuple[List[Path], List[Optional[Truth]]]:
    """Images of a config's test set, and their labels.

    Args:
        config: by :func:`.load_config`.

    Raises:
        InputError: there are none.
    """
    return _listed(load_testset(config))


@torch.no_grad()
def gather(
    model: nn.Module,
    reader: FileReader,
    images: Sequence[Path],
    truths: Sequence[Union[Path, Truth, None]],
    target: str,
) -> Tuple[List[Example], List[Window]]:
    """Runs the dense segmentor over images, by the test pipeline and its own inference, each once.

    Args:
        model: the dense segmentor, in evaluation mode.
        reader: of its config.
        images: files.
        truths: their labels, see :meth:`.FileReader.read`.
        target: ``'mixed'``, what the model sees in each window, or ``'labels'``.

    Raises:
        InputError: an image cannot be read or used, or has no labels where these are the target, or these are of one
            class; or the segmentor runs its backbone several times on an image.
    """
    examples, windows, ids = [], [], set()
    for path, truth in track(list(zip(images, truths)), 'dense model'):
        data, labels = reader.read(path, truth)
        if target == 'labels':
            if labels is None:
                raise InputError(f'--target labels: wanted labels of each image, got none of {path}')
            ids.update(ids_in(labels))
        with about(path):
            if not examples:
                check_one_pass(model, data)
            prediction, seen = _dense_pass(model, data, labels, target)
        windows += [Window(len(examples), box, shares) for box, shares in seen]
        examples.append(Example(data, prediction, labels))
    why = one_class(ids) if target == 'labels' else None
    if why:
        raise InputError(f'--target labels: wanted labels that tell regions apart, but {why}')
    return examples, windows


def _dense_pass(
    model: nn.Module, data: dict, labels: Optional[np.ndarray], target: str
) -> Tuple[Tensor, List[Tuple[Tuple[int, int, int, int], Tensor]]]:
    """What :func:`gather` keeps of an image: its prediction, and box and shares of each window."""
    patch, size, seen = model.backbone.patch_size, tuple(data['inputs'].shape[1:]), []

    def encode_decode(inputs, batch_img_metas):
        logits = type(model).encode_decode(model, inputs, batch_img_metas)
        y, x = divmod(inputs.storage_offset(), inputs.stride(2))  # slide inference takes views of the image
        box = (y, x, *inputs.shape[2:])
        shares = class_shares(logits, patch) if target == 'mixed' else _label_shares(labels, size, box, patch)
        seen.append((box, shares[0].cpu()))
        return logits

    model.encode_decode = encode_decode
    try:
        (sample,) = model.test_step(pseudo_collate([deepcopy(data)]))
    finally:
        del model.encode_decode
    assert len({box for box, _ in seen}) == len(seen), 'windows are no longer views, their places not known'
    prediction = sample.pred_sem_seg.data[0].cpu()
    return prediction.to(torch.uint8 if prediction.max() < 256 else torch.int32), seen


def _label_shares(labels: np.ndarray, size: Grid, box: Tuple[int, int, int, int], patch: int) -> Tensor:
    """(1, K, h, w), the share of each class in the cells of a window; cells without labels are empty."""
    known = torch.from_numpy(labels.astype(np.int64))
    known = F.interpolate(known[None, None].float(), size=size, mode='nearest')[0, 0].long()
    y, x, height, width = box
    known = known[y : y + height, x : x + width]
    known = F.pad(known, (0, width - known.shape[1], 0, height - known.shape[0]), value=IGNORE_INDEX)
    classes = labels[labels != IGNORE_INDEX]
    mass = torch.stack([(known == c).float() for c in range(int(classes.max(initial=0)) + 1)])
    return F.avg_pool2d(mass[None], patch, ceil_mode=True)


def pixels(model: nn.Module, example: Example, window: Window) -> Tensor:
    """(C, height, width), a window as the backbone sees it."""
    batch = dict(inputs=[example.data['inputs']], data_samples=[SegDataSample()])
    y, x, height, width = window.box
    return model.data_preprocessor(batch, training=False)['inputs'][0, :, y : y + height, x : x + width]
