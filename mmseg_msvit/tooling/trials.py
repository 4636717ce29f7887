"""Ways of making a segmentor cheaper, measured on images: their cost beside the dense model's, and their mIoU.

All take turns on each image, so that times can be compared within a turn, and answers over the same images.
"""

import json
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from rich.progress import track
from torch import Tensor, nn

from ..gates.from_outside import deciding_by
from ..labels import IGNORE_INDEX
from ..measuring.flops import HeadMacs, add_up, dense_cost, inference_cost, of_windows, operator_macs, pass_costs
from ..measuring.inspection import record_tokens
from ..tokens.selection import TokenSelector
from ..tokens.token_map import Grid, region_grid, shrunk_grid
from ..vit.mixed_scale import MixedScale
from .command_line import about, write_json
from .comparison import label_areas
from .gate_fitting import highest_threshold
from .testset import FileReader, Truth
from .timing import timed

SMALLER = 'smaller images'
DENSE = 'dense'
# Images on which costs are estimated before they are measured.
ESTIMATED = 24
SMALLEST = 0.25
DRAWS = 2000


@dataclass(frozen=True)
class Contender:
    """One way of saving, with all its numbers.

    Attributes:
        way: a name of ``WAYS``, ``SMALLER`` or ``DENSE``.
        size: of the images, as a share of their height and width.
        threshold: of the gate; 1 is all fine.
    """

    way: str
    size: float = 1.0
    threshold: float = 1.0

    @property
    def key(self) -> str:
        """What its measurements are kept under."""
        return f'{self.way} | {self.size:.4f} | {self.threshold:.8g}'

    @classmethod
    def of(cls, key: str) -> 'Contender':
        """The one that has this key."""
        way, size, threshold = key.split(' | ')
        return cls(way, float(size), float(threshold))

    def __str__(self) -> str:
        at = 'whole' if self.size == 1 else f'at {self.size:.0%}'
        return f'{self.way}, {at}' if self.way == SMALLER else f'{self.way}, images {at}'


@dataclass
class Entry:
    """A contender for a target, whose last free number is found anew when its cost has been measured.

    Attributes:
        way: as of a :class:`Contender`.
        size: of the images; None where it is the free number.
        slope: what is saved of the cost, over what is saved of the estimated MACs. Much of an image's time is the same
            for all sizes and tokens, the dense model's among them: costs lie on a line through it.
        contender: as it is now.
    """

    way: str
    size: Optional[float] = None
    slope: float = 1.0
    contender: Optional[Contender] = None


class Difference(NamedTuple):
    """Of two contenders' mIoU over the same images: its value, and a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class OutOfTime(Exception):
    """What was asked for cannot be measured any more in the time that was given."""


class Trials:
    """Measurements of contenders on validation images, which are kept in a file and not made twice.

    Args:
        models: way -> segmentor, in evaluation mode; ``DENSE`` is the one that all are compared with. Where ``SMALLER``
            has a dense ViT of this package, it makes images smaller itself; else the pipeline does.
        reader: of the config.
        images: files.
        truths: their labels; None where there are none: then the dense model's answer is taken for them.
        of: ``'time'`` or ``'macs'``, what costs are of.
        chosen: ids of the classes whose mean IoU decides.
        file: for the measurements, JSON.
        deadline: of ``time.monotonic``, after which :class:`OutOfTime` is raised.
        runtime: gives, for a way and a size of images, what runs in the place of that segmentor's passes, a function of
            a batch and a threshold; None for torch.
    """

    def __init__(
        self,
        models: Dict[str, nn.Module],
        reader: FileReader,
        images: Sequence[Path],
        truths: Optional[Sequence[Union[Path, Truth]]],
        of: str,
        chosen: Sequence[int],
        file: Path,
        deadline: float,
        runtime: Optional[Callable[[str, float], Callable[[Tensor, float], Tensor]]] = None,
    ):
        self.models, self.reader, self.images, self.truths = models, reader, images, truths
        self.of, self.chosen, self.file, self.deadline = of, list(chosen), file, deadline
        self.records: Dict[str, Dict[str, dict]] = json.loads(file.read_text()) if file.exists() else {}
        # Any first part of this order is spread over all images.
        self.order = np.random.default_rng(0).permutation(len(images)).tolist()
        self.warm, self.heads, self.windows, self.plain_macs = set(), {}, {}, {}
        self.runtime = runtime and lru_cache(maxsize=None)(runtime)

    def measure(self, contenders: Sequence[Contender], count: int, title: str) -> None:
        """Runs the first so many images through contenders that have not seen them yet, in turns with the dense model.

        Raises:
            InputError: an image cannot be read or used.
            OutOfTime: the deadline has come.
        """
        saved = time.monotonic()
        try:
            for i in track(self.order[:count], title):
                left = [c for c in contenders if str(i) not in self.records.get(c.key, {})]
                if left and time.monotonic() > self.deadline:
                    raise OutOfTime
                if left:
                    self._image(i, left)
                if time.monotonic() > saved + 20:  # what is interrupted goes on from here
                    write_json(self.file, self.records)
                    saved = time.monotonic()
        finally:
            write_json(self.file, self.records)

    def _image(self, i: int, contenders: Sequence[Contender]) -> None:
        with about(self.images[i]):
            dense = Contender(DENSE)
            for contender in (dense, *contenders):
                which = (contender.way, contender.size) if self.runtime else contender.way
                if which not in self.warm:  # its first pass is slower
                    self._run(contender, i)
                    self.warm.add(which)
            seconds, answer, labels, costs = self._run(dense, i)
            truth = answer if labels is None else labels
            whole = {f'dense_{key}': value for key, value in dict(costs, seconds=seconds).items()}
            self._keep(dense, i, answer, truth, dict(whole, seconds=seconds, **costs))
            for contender in contenders:
                own, answer, _, costs = self._run(contender, i)
                self._keep(contender, i, answer, truth, dict(whole, seconds=own, **costs))

    def _keep(self, contender: Contender, i: int, answer: np.ndarray, truth: np.ndarray, record: dict) -> None:
        classes = len(self.reader.classes.names)
        known = truth != IGNORE_INDEX
        areas = label_areas(torch.from_numpy(answer), truth, classes)
        record.update(zip(('intersect', 'union'), (area.long().tolist() for area in areas)))
        record['right'] = float((answer == truth)[known].mean()) if known.any() else 1.0
        self.records.setdefault(contender.key, {})[str(i)] = record

    @torch.no_grad()
    def predict(self, contender: Contender, batch: dict) -> list:
        """What a contender's segmentor makes of a batch."""
        model = self.models[contender.way]
        if self.runtime:
            run = self.runtime(SMALLER if contender.way == DENSE else contender.way, contender.size)
            model.encode_decode = lambda inputs, metas: run(inputs, contender.threshold)
            try:
                return model.test_step(batch)
            finally:
                del model.encode_decode
        if contender.way == DENSE or not isinstance(model.backbone, MixedScale):
            return model.test_step(batch)
        with deciding_by(model, contender.threshold, input_scale=contender.size):
            return model.test_step(batch)

    @torch.no_grad()
    def _run(self, contender: Contender, i: int) -> Tuple[float, np.ndarray, Optional[np.ndarray], dict]:
        """Seconds, class ids, labels, and costs of an image."""
        data, labels = self.read(contender, i)
        model = self.models[contender.way]
        batch, device = pseudo_collate([deepcopy(data)]), next(model.parameters()).device
        if contender.way != DENSE and isinstance(model.backbone, MixedScale):
            with record_tokens(model) as seen:
                seconds, (sample,) = timed(partial(self.predict, contender), batch, device)
            heads = self._heads(contender.way)
            if self.runtime:  # whose tokens are not seen
                with deciding_by(model, contender.threshold, input_scale=contender.size):
                    costs = inference_cost(model, heads, deepcopy(data))
            else:
                costs = add_up([each for tokens, _ in seen for each in pass_costs(model.backbone, tokens, heads)])
        else:
            seconds, (sample,) = timed(partial(self.predict, contender), batch, device)
            costs = {}
            if not isinstance(self.models[SMALLER].backbone, MixedScale):  # else the others know what it costs
                costs['total'] = self._plain(contender, data)
        answer = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.int64)
        kept = ('tokens', 'dense_tokens', 'total', 'dense_total')
        return seconds, answer, labels, {key: costs[key] for key in kept if key in costs}

    def read(self, contender: Optional[Contender], i: int) -> Tuple[dict, Optional[np.ndarray]]:
        """What the pipeline makes of an image for a contender, and its class ids."""
        by_pipeline = not isinstance(self.models[SMALLER].backbone, MixedScale)
        smaller = contender is not None and contender.way == SMALLER and by_pipeline
        reader = self.reader.smaller(contender.size) if smaller else self.reader
        return reader.read(self.images[i], self.truths[i] if self.truths is not None else None)

    def _heads(self, way: str) -> HeadMacs:
        if way not in self.heads:
            self.heads[way] = HeadMacs(self.models[way])
        return self.heads[way]

    def _plain(self, contender: Contender, data: dict) -> int:
        """MACs of a model whose tokens do not vary: those of its operators, counted once for each size of image."""
        model, total = self.models[contender.way], 0
        for window in of_windows(model, deepcopy(data), lambda inputs: inputs):
            shape = (contender.way == DENSE, *window.shape)
            if shape not in self.plain_macs:
                self.plain_macs[shape] = operator_macs(model.encode_decode, window, [dict(img_shape=window.shape[2:])])
            total += self.plain_macs[shape]
        return total

    # Costs before they are measured.

    def estimate(self, contender: Contender) -> float:
        """MACs as a share of the dense model's, of a few images."""
        if contender.way == SMALLER:
            return self._of_smaller(contender.size)
        return self._of_gate(contender.way, contender.size)[0](contender.threshold)

    def _of_gate(self, way: str, size: float) -> Tuple[Callable[[float], float], Tensor]:
        """MACs as a function of the threshold; and the gates' logits."""
        backbone = self.models[way].backbone
        if (way, size) not in self.windows:
            found: Dict[tuple, List[list]] = {}  # logits of each level, by the grid of cells and that of the dense ViT

            def look(inputs: Tensor) -> None:
                _, tokens, decision = backbone.tokenize(inputs)
                found.setdefault((tokens.grid, tokens.dense_grid), []).append(decision.logits)

            with deciding_by(backbone, 1.0, input_scale=size):
                for i in self.order[:ESTIMATED]:
                    of_windows(self.models[way], deepcopy(self.read(None, i)[0]), look)
            self.windows[way, size] = {
                grids: [torch.cat(level) for level in zip(*windows)] for grids, windows in found.items()
            }
        windows = self.windows[way, size]

        def macs(threshold: float) -> float:
            select = TokenSelector(backbone.sides, threshold=threshold, prefix=backbone.select.prefix).eval()
            costs = []
            for (grid, dense_grid), logits in windows.items():
                gates = [lambda regions, left, answer=answer: answer for answer in logits]
                costs += pass_costs(backbone, select(gates, grid, dense_grid)[0], self._heads(way))
            total = add_up(costs)
            return total['total'] / total['dense_total']

        return macs, torch.cat([level.flatten() for levels in windows.values() for level in levels])

    def _of_smaller(self, size: float) -> float:
        backbone = self.models[SMALLER].backbone
        if not isinstance(backbone, MixedScale):
            return size**2
        heads = self._heads(SMALLER)
        own, dense = (
            sum(dense_cost(backbone, grid, heads)['total'] for grid in self.cells(each)) for each in (size, 1.0)
        )
        return own / dense

    def cells(self, size: float) -> List[Grid]:
        """The grids of a few images, or of their windows, of that size: images go by whole cells."""
        model = self.models[SMALLER]
        if SMALLER not in self.windows:
            look = partial(_grid, model.backbone.patch_size)
            grids = [of_windows(model, deepcopy(self.read(None, i)[0]), look) for i in self.order[:ESTIMATED]]
            self.windows[SMALLER] = [grid for of_image in grids for grid in of_image]
        return [tuple(map(int, shrunk_grid(grid, size))) for grid in self.windows[SMALLER]]

    def aim(self, entry: Entry, target: float) -> bool:
        """Gives an entry the contender that costs as much of the target as can be; whether there is one."""
        most = 1 - (1 - target) / entry.slope if entry.slope > 0 else -1.0
        if entry.way == SMALLER:
            sizes = [round(SMALLEST + 0.005 * i, 3) for i in range(round((1 - SMALLEST) / 0.005) + 1)]
            fitting = [size for size in sizes if self._of_smaller(size) <= most]
            entry.contender = Contender(SMALLER, fitting[-1]) if fitting else None
        else:
            macs, logits = self._of_gate(entry.way, entry.size)
            threshold = highest_threshold(logits, macs, most) if macs(0.0) <= most else None
            entry.contender = None if threshold is None else Contender(entry.way, entry.size, threshold)
        return entry.contender is not None

    # What the measurements say.

    def seen(self, *contenders: Contender) -> List[str]:
        """The images that all of these have seen."""
        common = set(self.records[DENSE_KEY])
        for contender in contenders:
            common &= set(self.records.get(contender.key, {}))
        return sorted(common, key=int)

    def cost(self, contender: Contender, of: Optional[str] = None) -> float:
        """As a share of the dense model's: the median ratio of times within a turn, or the MACs of all images."""
        records = self.records[contender.key].values()
        if (of or self.of) == 'time':
            return float(np.median([r['seconds'] / r['dense_seconds'] for r in records]))
        return sum(r['total'] for r in records) / sum(r['dense_total'] for r in records)

    def miou(self, contender: Contender, images: Optional[Sequence[str]] = None) -> float:
        """In percent, over the classes that decide."""
        return float(self._bootstrapped(contender, images or self.seen(contender), 0)[0])

    def ious(self, contender: Contender, images: Sequence[str]) -> List[Optional[float]]:
        """In percent, of each class of the head; None of one that is not there."""
        intersect, union = (self._areas(contender, images, key).sum(0) for key in ('intersect', 'union'))
        return [100 * float(a / b) if b else None for a, b in zip(intersect, union)]

    def agreement(self, contender: Contender) -> float:
        """In percent of the pixels: how often it is right; without labels, how often the dense model says the same."""
        return 100 * float(np.mean([r['right'] for r in self.records[contender.key].values()]))

    def difference(self, one: Contender, other: Contender) -> Difference:
        """mIoU of one less that of the other, over the images that both have seen."""
        images = self.seen(one, other)
        values = self._bootstrapped(one, images) - self._bootstrapped(other, images)
        return Difference(float(values[0]), *map(float, np.percentile(values[1:], (2.5, 97.5))))

    def _areas(self, contender: Contender, images: Sequence[str], key: str) -> np.ndarray:
        return np.array([self.records[contender.key][i][key] for i in images], np.float64)  # (images, K)

    def _bootstrapped(self, contender: Contender, images: Sequence[str], draws: int = DRAWS) -> np.ndarray:
        """mIoU over the images, and then over so many draws of as many images, the same draws for all contenders."""
        weights = np.random.default_rng(0).multinomial(len(images), [1 / len(images)] * len(images), draws)
        weights = np.concatenate((np.ones((1, len(images))), weights))  # (1 + draws, images)
        intersect, union = (weights @ self._areas(contender, images, key) for key in ('intersect', 'union'))
        with np.errstate(invalid='ignore'):
            ious = np.where(union > 0, intersect / union, np.nan)[:, self.chosen]  # (1 + draws, K)
        there = ~np.isnan(ious)
        return 100 * np.where(there, ious, 0).sum(1) / there.sum(1).clip(1)


DENSE_KEY = Contender(DENSE).key


def _grid(patch: int, inputs: Tensor) -> Tuple[int, int]:
    return region_grid(inputs.shape[2:], patch)
