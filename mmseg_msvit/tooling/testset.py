"""A model and the images to look at it with, from what a user of a tool gives: a config, a checkpoint, files."""

from collections import Counter
from pathlib import Path
from typing import Iterator, List, Optional, Tuple, Union

import cv2
import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmseg.apis import init_model
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, TRANSFORMS
from rich.progress import track
from torch import nn

from ..mixed_scale import MixedScale
from ..purity import IGNORE_INDEX
from ..whole_models import load_segmentor
from .command_line import InputError, first_line

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
# What decoders raise at a file that is no picture.
UNREADABLE = (OSError, ValueError, AssertionError, SyntaxError, cv2.error)


def load_config(path: str) -> Config:
    """Reads the config of a segmentor, and enters its scope of names.

    Raises:
        InputError: there is no such file, or no model in it.
    """
    if '::' in path:  # as mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py
        config = get_config(path)
    elif Path(path).is_file():
        config = Config.fromfile(path)
    else:
        raise InputError(f'CONFIG: wanted a file, got {path}, which is not there')
    if 'backbone' not in config.get('model', {}):
        raise InputError(f'CONFIG: wanted a segmentor, got {path} without a model that has a backbone')
    init_default_scope(config.get('default_scope', 'mmseg'))
    return config


def load_model(
    config: Config, checkpoint: Optional[str], device: str, wanted: Union[type, Tuple[type, ...]] = MixedScale
) -> nn.Module:
    """Builds a segmentor, in evaluation mode; without a checkpoint its weights have their first values.

    Args:
        config: by :func:`load_config`.
        checkpoint: a training checkpoint or bare weights.
        device: where it goes.
        wanted: the class of its backbone, or several.

    Raises:
        InputError: the backbone is of another class, or the checkpoint cannot be read.
    """
    if checkpoint is not None and '://' not in checkpoint and not Path(checkpoint).is_file():
        raise InputError(f'CHECKPOINT: wanted a file, got {checkpoint}, which is not there')
    model = init_model(config, device='cpu')
    check_backbone(model, wanted, config.filename)
    if checkpoint is not None:
        try:
            load_segmentor(model, checkpoint)
        except (OSError, ValueError) as error:
            raise InputError(
                f'CHECKPOINT: wanted weights of {config.filename}, got {checkpoint}, which cannot be read: '
                f'{first_line(error)}'
            ) from error
    return model.to(device)


def check_backbone(model: nn.Module, wanted: Union[type, Tuple[type, ...]], path: str) -> None:
    """Refuses a model whose backbone is of another class than is wanted, with the path of its config.

    Raises:
        InputError: the backbone is of another class.
    """
    if not isinstance(model.backbone, wanted):
        got = type(model.backbone).__name__
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        names = ' or '.join('MSViT' if kind is MixedScale else kind.__name__ for kind in kinds)
        raise InputError(f'CONFIG: wanted a backbone of type {names}, got {got} in {path}')


def _testset_config(config: Config) -> ConfigDict:
    if config.get('test_dataloader') is None:
        raise InputError(f'CONFIG: wanted one with a test_dataloader, got {config.filename} without')
    return config.test_dataloader.dataset


def load_testset(config: Config) -> BaseDataset:
    """The test set of a config.

    Raises:
        InputError: there is none, it has no images, or its files are not there.
    """
    return load_dataset(_testset_config(config), f'test set of {config.filename}')


def load_dataset(dataset: ConfigDict, name: str) -> BaseDataset:
    """Builds a data set, whose name is for the errors.

    Raises:
        InputError: it has no images, or its files are not there.
    """
    try:
        dataset = DATASETS.build(dataset)
    except FileNotFoundError as error:
        raise InputError(f'CONFIG: the {name} is not there: {first_line(error)}') from error
    except ValueError as error:  # mmengine's, of a folder without images
        raise InputError(
            f'CONFIG: wanted images in the {name}, got none that can be listed: {first_line(error)}'
        ) from error
    if not len(dataset):
        raise InputError(f'CONFIG: wanted images in the {name}, got none')
    return dataset


def iou_options(config: Config) -> dict:
    """``ignore_index``, the label that a config's evaluator of the test set leaves out, and its ``nan_to_num``."""
    evaluators = config.get('test_evaluator') or []
    if isinstance(evaluators, dict):
        evaluators = evaluators.get('metrics', [evaluators])
    ious = [each for each in evaluators if each.get('type') == 'IoUMetric' or 'ignore_index' in each]
    ious = ious[0] if ious else {}
    return dict(ignore_index=ious.get('ignore_index', IGNORE_INDEX), nan_to_num=ious.get('nan_to_num'))


def iou_metric(config: Config, dataset: BaseDataset) -> IoUMetric:
    """The mIoU of a config's test set, as its own evaluator counts it."""
    metric = IoUMetric(**iou_options(config))
    metric.dataset_meta = dataset.metainfo
    return metric


def walk(dataset: BaseDataset) -> Iterator[dict]:
    """What the pipeline makes of each image of a data set, with a progress bar."""
    for i in track(range(len(dataset)), 'images'):
        yield dataset[i]


class FileReader:
    """Reads images, and class ids for them, by the rules of a config's test set, whose own files need not be there.

    Args:
        config: by :func:`load_config`.

    Raises:
        InputError: the config has no test set.
    """

    def __init__(self, config: Config):
        dataset = _testset_config(config)
        while 'pipeline' not in dataset:  # that of what a wrapper, such as ConcatDataset, holds
            dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
        self.dataset = DATASETS.build({**dataset, 'lazy_init': True})
        self.transforms = list(self.dataset.pipeline.transforms)
        if not any(isinstance(transform, LoadAnnotations) for transform in self.transforms):
            self.transforms.insert(-1, TRANSFORMS.build(dict(type='LoadAnnotations')))  # before what packs
        self.ignored = iou_options(config)['ignore_index']

    @property
    def palette(self) -> List[List[int]]:
        """The colours of the classes."""
        return self.dataset.metainfo['palette']

    def read(self, image: Path, truth: Optional[Path] = None) -> Tuple[dict, Optional[np.ndarray]]:
        """An image through the test pipeline, and its class ids (H, W) uint8 as the data set counts them.

        What the evaluator leaves out is 255 in them, whatever it is in the data set.

        Raises:
            InputError: a file is no picture, or the truth is not class ids of the image's size.
        """
        data = dict(img_path=str(image), seg_fields=[], reduce_zero_label=self.dataset.reduce_zero_label)
        data['label_map'] = self.dataset.label_map
        if truth is not None:
            data['seg_map_path'] = str(truth)
        for transform in self.transforms:
            is_truths = isinstance(transform, LoadAnnotations)
            if is_truths and truth is None:
                continue
            what, path = ('truth: wanted class ids', truth) if is_truths else ('image: wanted a picture', image)
            try:
                data = transform(data)
            except UNREADABLE as error:
                raise InputError(f'{what}, got {path}, which cannot be read: {first_line(error)}') from error
            if is_truths:
                shape, size = data['gt_seg_map'].shape, tuple(data['ori_shape'])
                if len(shape) != 2:
                    raise InputError(f'{what} (H, W), got {path} of shape {shape}, which looks like colours')
                if shape != size:
                    raise InputError(f'{what} of the size of {image}, {size}, got {path} of {shape}')
        if truth is None:
            return data, None
        labels = data['data_samples'].gt_sem_seg.data[0].numpy()
        del data['data_samples'].gt_sem_seg  # large, and known by whoever asked for it
        if labels.shape != size:
            raise InputError(
                'CONFIG: wanted a test pipeline that leaves labels as large as their image, LoadAnnotations after '
                f"what resizes, as in mmseg's, got labels {labels.shape} of {size}"
            )
        return data, np.where(labels == self.ignored, IGNORE_INDEX, labels).astype(np.uint8)


def list_images(path: Path) -> List[Path]:
    """The image itself, or a folder's images in order.

    Raises:
        InputError: there are none.
    """
    if not path.exists():
        raise InputError(f'image: wanted an image or a folder of images, got {path}, which is not there')
    images = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not images:
        raise InputError(f'image: wanted a folder with {", ".join(SUFFIXES)} files, got {path} without any')
    return images


def pair_truth(images: List[Path], truth: Optional[Path]) -> List[Optional[Path]]:
    """The file with each image's class ids: ``truth`` itself, or the PNG of the image's name in that folder.

    Raises:
        InputError: one is not there, or one file is given for several images.
    """
    if truth is None:
        return [None] * len(images)
    if truth.is_file() and len(images) > 1:
        raise InputError(f'truth: wanted a folder, since there are {len(images)} images, got the file {truth}')
    found = [truth / f'{image.stem}.png' if truth.is_dir() else truth for image in images]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise InputError(f'truth: wanted class ids of each image, {missing[0]}{more} not there')
    return found


def picture_names(images: List[Path]) -> List[str]:
    """A PNG's name for each image: its own with another suffix, or with one more where two would be the same."""
    shared = max(Counter(image.stem for image in images).values()) > 1
    return [f'{image.name if shared else image.stem}.png' for image in images]
