"""The best that a trained dense segmentor can be at a part of its cost, found by measurement on its own images.

A contender is a way of saving: smaller images, or a gate and somewhat smaller images. Each meets the target by the one
number that is left free, the size of the images or the gate's threshold. Contenders and the dense model take turns on
each validation image, so that their times and answers can be compared: what decides is the difference of two of them
over the same images, with its bootstrap interval. Few images tell which contenders are far behind; the others see all.
"""

import math
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Sequence

from .command_line import InputError
from .gate_fitting import shared_size
from .trials import DENSE, DENSE_KEY, SMALLER, SMALLEST, Contender, Entry, OutOfTime, Trials


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
# Images on which costs are measured for the first time, and on which contenders are screened.
AIMED, SCREENED = 6, 24
# A contender whose cost is this far from the target, as a share of it, is aimed again.
NEAR = 0.02
# A gate that is better than smaller images by less, in mIoU, is not worth having.
TIE = 0.1
# How often those that have seen all images are aimed again.
TURNS = 3
# Costs beside the targets that the report shows, unless they are this near to one.
FRONT, APART = (0.8, 0.65, 0.5, 0.35), 0.08


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
