"""What a search for the best model at a target has found: a sentence, a table, and a page."""

import io
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import cv2
import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.dataset import pseudo_collate

from ..gates.from_outside import deciding_by
from ..measuring.visualization import draw_image, paint_classes, picture_of
from .compression import SCREENED, Found
from .gate_report import data_uri
from .trials import DENSE, SMALLER, Contender, Difference, Trials

SHOWN = 4
UNITS = dict(time='of the time', macs='of the MACs')


def told(difference: Difference) -> str:
    """A difference for people."""
    return f'{difference.value:+.1f}, 95 % interval {difference.low:+.1f} to {difference.high:+.1f}'


def sentence(trials: Trials, found: Found) -> str:
    """What one has to know of the choice for a target, in one line."""
    best, dense = found.best, Contender(DENSE)
    costs = f'{trials.cost(best, "time"):.2f} of the time, {trials.cost(best, "macs"):.2f} of the MACs'
    if trials.truths is None:
        return f'{best}: {trials.agreement(best):.1f} % of the pixels as the dense model says, {costs}'
    images = trials.seen(best)
    line = f'{best}: {trials.miou(dense, images):.1f} -> {trials.miou(best, images):.1f} mIoU '
    line += f'({told(trials.difference(best, dense))}), {costs}'
    if best.way == SMALLER:
        return f'{line}; no gate was better'
    if found.smaller is None:
        return f'{line}; smaller images alone cannot meet the target'
    loss, cost = trials.difference(found.smaller, dense).value, trials.cost(found.smaller)
    return f'{line}; smaller images alone: {loss:+.1f} at {cost:.2f} {UNITS[trials.of]}'


def rows(trials: Trials) -> List[dict]:
    """What was measured of each contender, the dearest first: costs, images, and mIoU against dense by labels."""
    found = []
    for key, records in trials.records.items():
        contender = Contender.of(key)
        if contender.way == DENSE:
            continue
        row = dict(
            name=str(contender),
            way=contender.way,
            key=key,
            images=len(records),
            time=trials.cost(contender, 'time'),
            macs=trials.cost(contender, 'macs'),
            agreement=trials.agreement(contender),
        )
        if trials.truths is not None:
            difference = trials.difference(contender, Contender(DENSE))
            row.update(miou=trials.miou(contender), difference=difference._asdict())
        found.append(row)
    return sorted(found, key=lambda row: -row[trials.of])


def draw(trials: Trials, found: Sequence[Found]) -> Figure:
    """mIoU against dense over the cost, of all that were seen by enough images, with their intervals."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout='constrained')
    axes = figure.subplots()
    known = [row for row in rows(trials) if row['images'] >= min(SCREENED, len(trials.images))]
    chosen = {each.best.key for each in found}
    groups: Dict[str, List[dict]] = {}
    for row in known:
        groups.setdefault(row['way'], []).append(row)
    for way, points in groups.items():
        points.sort(key=lambda row: row[trials.of])
        x, y = ([row[trials.of] for row in points], [row['difference']['value'] for row in points])
        below, above = (
            [abs(row['difference'][end] - row['difference']['value']) for row in points] for end in ('low', 'high')
        )
        line = '-' if way == SMALLER else 'none'
        axes.errorbar(x, y, yerr=(below, above), marker='o', ls=line, capsize=3, alpha=0.8, label=way)
    picked = [row for row in known if row['key'] in chosen]
    axes.scatter(
        [row[trials.of] for row in picked], [row['difference']['value'] for row in picked], s=160, facecolors='none',
        edgecolors='black', zorder=3, label='chosen',
    )  # fmt: skip
    axes.scatter([1], [0], color='black', marker='s', zorder=3, label='dense')
    axes.axhline(0, color='black', lw=0.8)
    axes.set(xlabel=f'share {UNITS[trials.of]} of the dense model', ylabel='mIoU against dense')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def by_class(trials: Trials, found: Found) -> List[dict]:
    """IoU of each class that is there, of the dense model, and what the choice and smaller images lose of it."""
    others = [found.best] + [found.smaller] * (found.smaller not in (None, found.best))
    images = trials.seen(*others)
    dense, *rest = (trials.ious(contender, images) for contender in (Contender(DENSE), *others))
    table = []
    for name, whole, *parts in zip(trials.reader.classes.names, dense, *rest):
        if whole is not None:
            table.append(dict(name=name, dense=whole, differences=[part - whole for part in parts]))
    return table


@torch.no_grad()
def picture(trials: Trials, contender: Contender, i: int) -> np.ndarray:
    """An image as a contender sees and answers it, beside the truth, (height, width, 3) uint8 RGB."""
    data, labels = trials.read(contender, i)
    model, palette = trials.models[contender.way], trials.reader.classes.palette
    if contender.way != SMALLER:
        with deciding_by(model, contender.threshold, input_scale=contender.size):
            return draw_image(model, data, palette, labels)
    (sample,) = trials.predict(contender, pseudo_collate([data]))
    image, _ = picture_of(trials.read(None, i)[0]['inputs'])
    answer = sample.pred_sem_seg.data[0].cpu().numpy()
    panels = [image] + [paint_classes(each.astype(np.int64), palette) for each in (answer, labels) if each is not None]
    height, width = image.shape[:2]
    panels = [cv2.resize(each, (width, height), interpolation=cv2.INTER_NEAREST) for each in panels]
    gap = np.full((height, 8, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (panel, gap)][:-1])


def _png(pixels: np.ndarray) -> str:
    return data_uri(cv2.imencode('.png', pixels[..., ::-1])[1].tobytes())


def page(
    trials: Trials, found: Sequence[Found], template: str, config: str, checkpoint: str, command: str, minutes: float
) -> str:
    """The HTML page, with its pictures inside.

    Args:
        trials: what was measured.
        found: for each target.
        template: of jinja2.
        config: where the model comes from.
        checkpoint: likewise.
        command: that was given.
        minutes: that it took.
    """
    front: Optional[str] = None
    if trials.truths is not None:
        buffer = io.BytesIO()
        draw(trials, found).savefig(buffer, format='png')
        front = data_uri(buffer.getvalue())
    targets = [
        dict(
            target=each.target,
            sentence=sentence(trials, each),
            notes=each.notes,
            best=str(each.best),
            images=len(trials.seen(each.best)),
            others=[str(each.best)] + ['smaller images alone'] * (each.smaller not in (None, each.best)),
            classes=by_class(trials, each) if trials.truths is not None else [],
            pictures=[_png(picture(trials, each.best, i)) for i in trials.order[:SHOWN]],
        )
        for each in found
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        targets=targets,
        rows=rows(trials),
        front=front,
        unit=UNITS[trials.of],
        config=config,
        checkpoint=Path(checkpoint).name,
        command=command,
        minutes=minutes,
        images=len(trials.images),
        labelled=trials.truths is not None,
    )
