"""The images of a config's test set, and files that are read as it reads them."""

import re
from collections import Counter
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, TRANSFORMS
from rich.progress import track

from ..labels import IGNORE_INDEX, Classes, check_depth, check_labels
from .command_line import OF_FILES, InputError, about, first_line

# What OpenCV reads, and so mmseg.
SUFFIXES = (
    '.jpg', '.jpeg', '.jpe', '.jp2', '.png', '.bmp', '.dib', '.webp', '.avif', '.gif', '.tif', '.tiff', '.exr', '.hdr',
    '.pbm', '.pgm', '.ppm', '.pnm', '.ras',
)  # fmt: skip


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
    options = iou_options(config)
    metric = CheckedIoU(**options)
    metric.classes = Classes.of(config.model.decode_head, dataset.metainfo, options['ignore_index'])
    metric.dataset_meta = dict(classes=metric.classes.names, palette=metric.classes.palette)
    return metric


class CheckedIoU(IoUMetric):
    """mmseg's mIoU, which refuses labels that it would leave out or read as others."""

    classes: Classes

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            check_depth(sample.get('seg_map_path'))
            self.classes.read(sample['gt_sem_seg']['data'].cpu().numpy(), sample['ori_shape'][:2])
        super().process(data_batch, data_samples)


def over_images(dataset: BaseDataset, function: Callable[[dict], Any]) -> list:
    """What a function gives for what the pipeline makes of each image of a data set, with a progress bar.

    Raises:
        InputError: an image cannot be read or used; the message names its file.
    """
    return [_of_image(dataset, i, function) for i in track(range(len(dataset)), 'images')]


def _of_image(dataset: BaseDataset, i: int, function: Callable[[dict], Any]) -> Any:
    with about(image_path(dataset, i)):
        return function(read_image(dataset, i))


def read_image(dataset: BaseDataset, i: int) -> dict:
    """What the pipeline makes of an image of a data set; its pixels are all numbers.

    Raises:
        InputError: a file cannot be read; the message names it, or the image and its labels.
        ValueError: by :func:`finite`.
    """
    with _reading('image: wanted a picture, and class ids for it', _files(dataset, i)):
        data = dataset[i]
    return finite(data)


def finite(data: dict) -> dict:
    """What a test pipeline made of an image, whose pixels are all numbers; a dense ViT takes others without a word.

    Raises:
        ValueError: there are others.
    """
    inputs = data['inputs']
    if inputs.is_floating_point() and not inputs.isfinite().all():
        wrong = int((~inputs.isfinite()).sum())
        raise ValueError(f'pixels of the image must be finite, got {wrong} others of {inputs.numel()} values')
    return data


def _files(dataset: BaseDataset, i: int) -> str:
    """An image's file, and that of its labels, for an error."""
    labels = dataset.get_data_info(i).get('seg_map_path') if hasattr(dataset, 'get_data_info') else None
    return image_path(dataset, i) + (f' with {labels}' if labels else '')


def image_path(dataset: Sequence, i: int) -> str:
    """The file of a data set's image, or, of one that has no files, its number."""
    known = hasattr(dataset, 'get_data_info')
    return str(dataset.get_data_info(i).get('img_path', f'image {i}')) if known else f'image {i}'


class Truth(NamedTuple):
    """A file of class ids of a data set, and how that data set counts them.

    Attributes:
        path: of the file.
        label_map: what its ids become, or None for what they are.
        reduce_zero_label: whether 0 is no class, and 1 the first one.
    """

    path: Path
    label_map: Optional[dict]
    reduce_zero_label: bool

    @classmethod
    def of(cls, info: dict) -> Optional['Truth']:
        """Of what a data set says of an image; None where it says nothing of labels, or their file is not there."""
        path = Path(info.get('seg_map_path') or '')
        return cls(path, info.get('label_map'), info.get('reduce_zero_label', False)) if path.is_file() else None


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
        ignored = iou_options(config)['ignore_index']
        self.classes = Classes.of(config.model.decode_head, self.dataset.metainfo, ignored)

    @property
    def palette(self) -> List[List[int]]:
        """The colours of the classes."""
        return self.classes.palette

    def smaller(self, size: float) -> 'FileReader':
        """One that makes images smaller by a factor; labels keep their size."""
        reader = copy(self)
        place = place_of_resize([type(transform).__name__ for transform in self.transforms])
        reader.transforms = [*self.transforms[:place], TRANSFORMS.build(resize_step(size)), *self.transforms[place:]]
        return reader

    def _rules(self, path: Path) -> Truth:
        return Truth(path, getattr(self.dataset, 'label_map', None), getattr(self.dataset, 'reduce_zero_label', False))

    def load(self, image: Path) -> dict:
        """An image as the test pipeline's loading makes it: ``img`` (H, W) or (H, W, C) of any dtype, BGR.

        Raises:
            InputError: the file is no picture.
        """
        _, label_map, reduce_zero_label = self._rules(image)
        data = dict(img_path=str(image), seg_fields=[], label_map=label_map, reduce_zero_label=reduce_zero_label)
        for number, transform in enumerate(self.transforms):
            if not isinstance(transform, LoadAnnotations):
                with _reading('image: wanted a picture', image):
                    data = transform(data)
            if 'img' in data:
                return dict(data, loaded=number)
        raise InputError("CONFIG: wanted a test pipeline that loads an image as 'img', got one that does not")

    def read(self, image: Path, truth: Union[Path, Truth, None] = None) -> Tuple[dict, Optional[np.ndarray]]:
        """An image through the test pipeline, and its class ids (H, W) uint8 as the data set counts them.

        What the evaluator leaves out is 255 in them, whatever it is in the data set. Of a training set, which may count
        its ids in another way, ``truth`` is a :class:`Truth`.

        Raises:
            InputError: a file is no picture, or the truth is not class ids of the image's size.
        """
        return self.prepare(self.load(image), truth)

    def prepare(self, data: dict, truth: Union[Path, Truth, None] = None) -> Tuple[dict, Optional[np.ndarray]]:
        """:meth:`read` of what :meth:`load` gave."""
        image, size = data['img_path'], tuple(data['ori_shape'])
        if truth is not None:
            truth, label_map, reduce_zero_label = truth if isinstance(truth, Truth) else self._rules(truth)
            data.update(seg_map_path=str(truth), label_map=label_map, reduce_zero_label=reduce_zero_label)
        loaded = data.pop('loaded')
        for number, transform in enumerate(self.transforms):
            if isinstance(transform, LoadAnnotations):
                if truth is None:
                    continue
                with _reading('truth: wanted class ids', truth):
                    data = copy(transform)(data)  # it keeps the reduce_zero_label of the first file that it reads
                with _truth_as_wanted(image, truth):
                    check_labels(data['gt_seg_map'], size)
                    check_depth(truth)
            elif number > loaded:
                with _reading('image: wanted a picture', image):
                    data = transform(data)
        with about(image):
            finite(data)
        if truth is None:
            return data, None
        labels = data['data_samples'].gt_sem_seg.data[0].numpy()
        del data['data_samples'].gt_sem_seg  # large, and known by whoever asked for it
        if labels.shape != size:
            raise InputError(
                'CONFIG: wanted a test pipeline that leaves labels as large as their image, LoadAnnotations after '
                f"what resizes, as in mmseg's, got labels {labels.shape} of {size}"
            )
        with _truth_as_wanted(image, truth):
            return data, self.classes.read(labels, size)


def resize_step(size: float) -> dict:
    """The config of a pipeline's step that makes an image smaller by a factor."""
    return dict(type='Resize', scale_factor=size, keep_ratio=True)


def place_of_resize(names: Sequence[str]) -> int:
    """Where in a pipeline an image that is made smaller stays so: after what loads it, and what resizes it to a scale.

    Args:
        names: of the steps' classes.
    """
    fixed = [i for i, name in enumerate(names) if name == 'Resize' or re.match('Load(?!.*Annotation)', name)]
    return max(fixed, default=0) + 1


@contextmanager
def _reading(wanted: str, path: Union[str, Path]) -> Iterator[None]:
    try:
        yield
    except (*OF_FILES, AttributeError) as error:  # mmseg takes attributes of what OpenCV could not read
        raise InputError(f'{wanted}, got {path}, which cannot be read: {first_line(error)}') from error


@contextmanager
def _truth_as_wanted(image: str, truth: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f'truth: {truth} of {image}: {error}') from error


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
    """The file with each image's class ids: ``truth`` itself, or the PNG or TIFF of the image's name in that folder.

    Raises:
        InputError: one is not there, or one file is given for several images.
    """
    if truth is None:
        return [None] * len(images)
    if truth.is_file() and len(images) > 1:
        raise InputError(f'truth: wanted a folder, since there are {len(images)} images, got the file {truth}')
    found = [_with_stem(truth, image.stem) if truth.is_dir() else truth for image in images]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise InputError(f'truth: wanted class ids of each image, {missing[0]}{more} not there')
    return found


def _with_stem(folder: Path, stem: str) -> Path:
    names = [folder / f'{stem}{suffix}' for suffix in ('.png', '.tif', '.tiff')]
    return next((path for path in names if path.is_file()), names[0])


def picture_names(images: List[Path]) -> List[str]:
    """A PNG's name for each image: its own with another suffix, or with one more where two would be the same."""
    shared = max(Counter(image.stem for image in images).values()) > 1
    return [f'{image.name if shared else image.stem}.png' for image in images]
