"""The best that a trained dense segmentor can be at a part of its cost, found by measurement on its own images.

A contender is a way of saving: smaller images, or a gate and somewhat smaller images. Each meets the target by the one
number that is left free, the size of the images or the gate's threshold. Contenders and the dense model take turns on
each validation image, so that their times and answers can be compared: what decides is the difference of two of them
over the same images, with its bootstrap interval. Few images tell which contenders are far behind; the others see all.
"""

import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field
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
from .command_line import InputError, about, write_json
from .comparison import label_areas
from .gate_fitting import highest_threshold, shared_size
from .testset import FileReader, Truth
from .timing import timed

SMALLER = 'smaller images'
DENSE = 'dense'


class Way(NamedTuple):
    """A way of saving beside smaller images.

    Attributes:
        gate: one of :data:`.conversion.KINDS`.
        levels: how many scales tokens have.
        most: the highest target at which it is tried.
        on_tokens: whether a mask head reads tokens, and so answers otherwise; a linear one always does, and answers
            the same.
    """

    gate: Optional[str]
    levels: int = 2
    most: float = 1.0
    on_tokens: bool = False


# Another way is a line here.
WAYS = {
    'context gate': Way('context'),
    'glance gate': Way('glance'),
    'context gate, 3 scales': Way('context', 3, 0.4),
    'context gate, head on tokens': Way('context', on_tokens=True),
}
# Of what a gate's contender saves, such a part comes from smaller images.
PARTS = (0.0, 0.25, 0.5, 0.75)
# Images on which costs are estimated, measured for the first time, and on which contenders are screened.
ESTIMATED, AIMED, SCREENED = 24, 6, 24
# A contender whose cost is this far from the target, as a share of it, is aimed again.
NEAR = 0.02
SMALLEST = 0.25
# A gate that is better than smaller images by less, in mIoU, is not worth having.
TIE = 0.1
# How often those that have seen all images are aimed again.
TURNS = 3
# Costs beside the targets that the report shows, unless they are this near to one.
FRONT, APART = (0.8, 0.65, 0.5, 0.35), 0.08
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


@dataclass
class Found:
    """What a search has come to.

    Attributes:
        target: the cost that was asked for.
        best: the contender that loses least.
        smaller: the dense model on smaller images alone, at that cost.
        notes: what kept the search from being whole.
    """

    target: float
    best: Contender
    smaller: Optional[Contender]
    notes: List[str] = field(default_factory=list)


def search(trials: Trials, target: float) -> Found:
    """The contender with the highest mIoU at a target, over the validation images.

    Raises:
        InputError: nothing meets the target; or the time was over before anything was measured.
    """
    smaller = Entry(SMALLER)
    entries = [smaller]
    for way, what in WAYS.items():
        if way in trials.models and target <= what.most:
            sizes = [round(target ** (part / 2), 3) for part in PARTS]
            unlike = {tuple(trials.cells(size)): size for size in reversed(sizes)}  # by whole cells
            entries += [Entry(way, size) for size in reversed(unlike.values())]
    entries = [entry for entry in entries if trials.aim(entry, target)]
    _refuse_none(trials, entries, target)
    many, notes = len(trials.images), []
    try:
        for count, what in ((AIMED, 'costs'), (SCREENED, 'screening')):
            trials.measure([entry.contender for entry in entries], min(count, many), f'{target:g}: {what}')
            if count >= SCREENED:
                entries = _better_half(trials, entries, keep=smaller)
            entries = _aimed_again(trials, entries, target)
            _refuse_none(trials, entries, target)
        half = max(SCREENED, many // 2)
        if half < many:
            trials.measure([entry.contender for entry in entries], half, f'{target:g}: half of the images')
            entries = _not_behind(trials, entries, keep=smaller)
        for _ in range(TURNS):
            before = [entry.contender for entry in entries]
            trials.measure(before, many, f'{target:g}: all images')
            entries = _aimed_again(trials, entries, target)
            if [entry.contender for entry in entries] == before:
                break
    except OutOfTime:
        notes.append('the time was over before all images were seen')
    measured = [Contender.of(key) for key in trials.records if key != DENSE_KEY]
    met = [each for each in measured if trials.cost(each) <= target * (1 + NEAR)]
    if not measured:
        raise InputError('--minutes: wanted enough for a few images, got too few; the same command goes on from here')
    _refuse_none(trials, met, target)
    most = max(len(trials.seen(each)) for each in met)
    met = [each for each in met if len(trials.seen(each)) > most / 2]
    value = {each: trials.difference(each, Contender(DENSE)).value for each in met}
    best = max(met, key=value.get)
    smaller = max((each for each in met if each.way == SMALLER), key=value.get, default=None)
    if smaller is not None and value[best] - value[smaller] < TIE:
        best = smaller
    return Found(target, best, smaller, notes)


def _refuse_none(trials: Trials, ways: Sequence, target: float) -> None:
    if not ways:
        costs = [trials.cost(Contender.of(key)) for key in trials.records if key != DENSE_KEY]
        least = min([*costs, trials.estimate(Contender(SMALLER, SMALLEST))])
        raise InputError(f'--target: wanted at least {least:.2f}, the smallest that is known to be met, got {target:g}')


def _aimed_again(trials: Trials, entries: Sequence[Entry], target: float) -> List[Entry]:
    """Those that can meet the target by what their costs turned out to be; now they are to cost what it says."""
    found = []
    for entry in entries:
        cost = trials.cost(entry.contender)
        if abs(cost / target - 1) > NEAR:
            entry.slope = _slope(trials, entry.contender)
            if not trials.aim(entry, target):
                continue
        found.append(entry)
    return found


def _slope(trials: Trials, contender: Contender) -> float:
    """By what a contender's cost turned out to be."""
    estimate = trials.estimate(contender)
    return (1 - trials.cost(contender)) / (1 - estimate) if estimate < 1 else 1.0


def _better_half(trials: Trials, entries: Sequence[Entry], keep: Entry) -> List[Entry]:
    dense = Contender(DENSE)
    order = sorted(entries, key=lambda entry: -trials.difference(entry.contender, dense).value)
    return [entry for entry in entries if entry is keep or entry in order[: (len(entries) + 1) // 2]]


def _not_behind(trials: Trials, entries: Sequence[Entry], keep: Entry) -> List[Entry]:
    """Those that may yet be the best, for all that the interval of the difference says."""
    best = max(entries, key=lambda entry: trials.difference(entry.contender, Contender(DENSE)).value)
    return [
        entry
        for entry in entries
        if entry in (keep, best) or trials.difference(entry.contender, best.contender).high >= 0
    ]


def by_rule(trials: Trials, target: float) -> Found:
    """The contender that :func:`.gate_fitting.shared_size` would choose, where there are no labels to choose by.

    Raises:
        InputError: it cannot meet the target; or the time was over before anything was measured.
    """
    way = next(iter(WAYS))
    entries = [Entry(way, shared_size(target))]
    entries = [entry for entry in entries if trials.aim(entry, target)]
    for count in (AIMED, SCREENED):
        _refuse_none(trials, entries, target)
        try:
            trials.measure([entries[0].contender], min(count, len(trials.images)), f'{target:g}: costs')
        except OutOfTime:
            break
        entries = _aimed_again(trials, entries, target)
    if not entries or entries[0].contender.key not in trials.records:
        raise InputError('--minutes: wanted enough for a few images, got too few; the same command goes on from here')
    return Found(target, entries[0].contender, None)


def measure_front(trials: Trials, found: Sequence[Found]) -> None:
    """Measures smaller images, and the ways that were chosen, at other costs, on a part of the images.

    Raises:
        OutOfTime: the deadline has come.
    """
    chosen = {}  # way -> part of the saving by smaller images, and slope
    for each in found:
        for contender in (each.best, each.smaller):
            if contender is not None:
                part = min(1.0, max(0.0, 2 * math.log(contender.size) / math.log(each.target)))
                chosen[contender.way] = part, _slope(trials, contender)
    for cost in FRONT:
        if all(abs(cost - each.target) > APART for each in found):
            entries = [
                Entry(way, None if way == SMALLER else round(cost ** (part / 2), 3), slope)
                for way, (part, slope) in chosen.items()
            ]
            entries = [entry for entry in entries if trials.aim(entry, cost)]
            count = min(2 * SCREENED, len(trials.images))
            trials.measure([entry.contender for entry in entries], count, f'the front at {cost:g}')
