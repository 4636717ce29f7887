"""How a trained gate decides over a data set: numbers, plots and a page."""

import base64
import io
import warnings
from collections import Counter
from typing import Dict, List, Set, Tuple

import cv2
import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.dataset import BaseDataset
from torch import nn

from ..gates.from_outside import find_msvit
from ..gates.purity import region_purity
from ..labels import IGNORE_INDEX, Classes, ids_in, one_class
from ..measuring.inspection import coarse_regions, look, seen_size
from ..measuring.metrics import summarize
from ..measuring.visualization import sample_figure
from .command_line import InputError
from .testset import over_images

# Bins of purity: the share of a region's commonest class.
BINS = np.linspace(0.3, 1.0, 8)
# Of a uniform region's labelled pixels, at least this share is of one class; the others are mixed.
UNIFORM = 0.95
SHOWN = 3


class Analysis:
    """What is gathered over a data set.

    Args:
        model: a segmentor with an MSViT.
        dataset: with truth.
        ignored: the label that does not count.

    Raises:
        InputError: the data set has no truth, or too many classes.
    """

    def __init__(self, model: nn.Module, dataset: BaseDataset, ignored: int = IGNORE_INDEX):
        self.model, self.backbone, self.ignored = model, find_msvit(model), ignored
        self.classes = Classes.of(model.decode_head, dataset.metainfo, ignored)
        names = self.classes.names
        if len(names) > IGNORE_INDEX:
            raise InputError(f'test set: wanted at most {IGNORE_INDEX} classes, got {len(names)}')
        self.regions = Counter()  # uniform and mixed ones, and how many of each are coarse
        self.pixels = np.zeros((2, 2, len(names)), int)  # fine or coarse, wrong or right, class of the truth
        self.by_purity = np.zeros((2, len(BINS) - 1), int)  # fine or coarse, bin
        self.cells = np.zeros(len(self.backbone.scales), int)  # by the level of their token
        self.tokens: List[int] = []
        self.dense: List[int] = []
        self.maps: List[np.ndarray] = []
        # (tokens, index, what to draw) of the images with the fewest and the most, SHOWN each, in this order
        self.extremes: List[Tuple[int, int, tuple]] = []
        self.labels: Set[int] = set()
        over_images(dataset, self._add)
        why = one_class(self.labels)
        if why:
            warnings.warn(f'test set: {why}. Uniform and mixed regions mean nothing', stacklevel=2)

    def _add(self, data: dict) -> None:
        truth = self.classes.read_sample(data['data_samples'])
        if truth is None:
            raise InputError('test set: wanted truth for each image, got a pipeline that loads none')
        self.labels.update(ids_in(truth))
        sample, tokens, decision = look(self.model, data)
        patch, region = self.backbone.patch_size, self.backbone.scales[1]
        height, width = seen_size(self.backbone, tokens, sample)  # the truth keeps its own size

        prediction = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
        whole, (truth, prediction) = (
            truth,
            (cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST) for labels in (truth, prediction)),
        )
        coarse = coarse_regions(self.backbone, tokens).cpu()  # (1, hc, wc)
        labels = torch.from_numpy(truth)[None].long()
        share, labelled = (t.numpy() for t in region_purity(labels, coarse.shape[1:], region))
        coarse = coarse.numpy()
        for kind, chosen in (('uniform', labelled & (share >= UNIFORM)), ('mixed', labelled & (share < UNIFORM))):
            self.regions.update({kind: chosen.sum(), f'{kind}_coarse': (chosen & coarse).sum()})
        for kind in (0, 1):
            chosen = share[labelled & (coarse == kind)]
            self.by_purity[kind] += np.histogram(chosen.clip(BINS[0]), BINS)[0]
        levels = tokens.levels()[0].cpu().numpy()  # (h, w)
        self.cells += np.bincount(levels.ravel(), minlength=len(self.cells))
        of_pixel = np.kron(levels > 0, np.ones((patch, patch), int))[:height, :width]
        known = truth != IGNORE_INDEX
        index = (of_pixel[known].astype(int), (truth == prediction)[known].astype(int), truth[known])
        np.add.at(self.pixels, index, 1)

        self.tokens.append(tokens.lengths[0] - tokens.prefix)
        self.dense.append(tokens.dense_length - tokens.prefix)
        self.maps.append(coarse[0].astype(float))
        sample.pop('seg_logits', None)  # large, and not drawn
        drawn = tokens, decision, data['inputs'], sample, whole
        self.extremes.append((self.tokens[-1], len(self.tokens) - 1, drawn))
        self.extremes.sort(key=lambda extreme: extreme[:2])
        if len(self.extremes) > 2 * SHOWN:
            del self.extremes[SHOWN]

    def place(self) -> np.ndarray:
        """(images, hc, wc), the decisions of the images that share the commonest region grid."""
        shape = Counter(m.shape for m in self.maps).most_common(1)[0][0]
        return np.stack([m for m in self.maps if m.shape == shape])

    def numbers(self) -> dict:
        """What the JSON holds.

        ``tokens`` are those of an image without cls, of ``dense_tokens``; ``scales`` the share of the images that is
        covered by tokens of each size in pixels; ``coarse`` the share of regions of the second scale that have no fine
        tokens, in all and among uniform and mixed ones, and for each class the share of its pixels that lie in coarse
        regions; ``accuracy_*`` the share of right pixels in fine and in coarse cells. ``place`` has the share of
        coarse, and its standard deviation between images, at each place of the commonest region grid.
        """
        maps = self.place()
        share = maps.mean(0)  # (hc, wc)
        total = maps.mean() * (1 - maps.mean())
        right, all_pixels = self.pixels[:, 1], self.pixels.sum(1)  # (2, classes)

        def ratio(a, b):
            return float(a / b) if b else None

        return dict(
            images=len(self.tokens),
            tokens=float(np.mean(self.tokens)),
            tokens_std=float(np.std(self.tokens)),
            tokens_of_images=summarize(self.tokens),
            dense_tokens=float(np.mean(self.dense)),
            scales={str(s): float(n / self.cells.sum()) for s, n in zip(self.backbone.scales, self.cells)},
            coarse=float(np.mean([m.mean() for m in self.maps])),
            coarse_of_uniform=self.regions['uniform_coarse'] / max(self.regions['uniform'], 1),
            coarse_of_mixed=self.regions['mixed_coarse'] / max(self.regions['mixed'], 1),
            # standard deviation between images at one place, mean over places: 0 is a static mask
            conditionality=float(maps.std(0).mean()),
            # of the decision's variance, the share that a static mask cannot have: 0 is such a mask, 1 knows no places
            conditional_share=ratio((share * (1 - share)).mean(), total),
            accuracy_fine=ratio(right[0].sum(), all_pixels[0].sum()),
            accuracy_coarse=ratio(right[1].sum(), all_pixels[1].sum()),
            classes={
                name: dict(
                    pixels=int(all_pixels[:, i].sum()),
                    coarse=ratio(all_pixels[1, i], all_pixels[:, i].sum()),
                    accuracy_fine=ratio(right[0, i], all_pixels[0, i]),
                    accuracy_coarse=ratio(right[1, i], all_pixels[1, i]),
                )
                for i, name in enumerate(self.classes.names)
            },
            purity=[
                dict(low=round(float(a), 2), high=round(float(b), 2), regions=int(n), coarse=ratio(c, n))
                for a, b, n, c in zip(BINS, BINS[1:], self.by_purity.sum(0), self.by_purity[1])
            ],
            place=dict(images=len(maps), coarse=share.round(4).tolist(), std=maps.std(0).round(4).tolist()),
        )


def plots(analysis: Analysis, numbers: dict) -> Dict[str, Figure]:
    """The report's plots by name."""
    found = {}

    def figure(name, width, height):
        found[name] = Figure(figsize=(width, height), dpi=110, layout='constrained')
        return found[name]

    axes = figure('tokens', 6, 3).subplots()
    axes.hist(analysis.tokens, bins=min(30, max(5, len(analysis.tokens) // 5)), color='#4477aa')
    axes.axvline(numbers['dense_tokens'], color='#cc3311', label='dense')
    axes.set(xlabel='tokens of an image, without cls', ylabel='images')
    axes.legend()

    rows = [(name, c) for name, c in numbers['classes'].items() if c['pixels']]
    rows.sort(key=lambda row: row[1]['coarse'])
    left, right = figure('classes', 9, 0.6 + 0.22 * len(rows)).subplots(1, 2, sharey=True)
    names = [name for name, _ in rows]
    left.barh(names, [100 * c['coarse'] for _, c in rows], color='#4477aa')
    left.set(xlabel='% of its pixels in coarse regions', xlim=(0, 100))
    for kind, colour in (('fine', '#ee7733'), ('coarse', '#4477aa')):
        points = [(100 * c[f'accuracy_{kind}'], name) for name, c in rows if c[f'accuracy_{kind}'] is not None]
        if points:
            right.scatter(*zip(*points), color=colour, label=f'in {kind} cells', zorder=2)
    right.set(xlabel='% of its pixels predicted right', xlim=(-2, 102))
    right.grid(axis='y', alpha=0.3)
    right.legend()

    axes = figure('purity', 8, 3).subplots()
    bins = [b for b in numbers['purity'] if b['regions']]
    labels = [f'{b["low"]:.1f} to {b["high"]:.1f}\n{b["regions"]}' for b in bins]
    axes.bar(labels, [100 * b['coarse'] for b in bins], color='#4477aa')
    axes.set(xlabel='share of the commonest class in the region; regions', ylabel='% coarse', ylim=(0, 100))

    drawing = figure('place', 9, 3)
    kinds = ('coarse', 'share of images with a coarse region', 1), ('std', 'standard deviation between images', 0.5)
    for axes, (key, title, top) in zip(drawing.subplots(1, 2), kinds):
        shown = axes.imshow(numbers['place'][key], vmin=0, vmax=top, cmap='viridis')
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        drawing.colorbar(shown, ax=axes, shrink=0.8)
    return found


def data_uri(png: bytes) -> str:
    """A picture inside of a page."""
    return 'data:image/png;base64,' + base64.b64encode(png).decode()


def page(analysis: Analysis, numbers: dict, template: str, config: str, checkpoint: str) -> str:
    """The HTML page, with its pictures inside.

    Args:
        analysis: of a data set.
        numbers: of the analysis.
        template: of jinja2.
        config: where the model comes from.
        checkpoint: likewise.
    """
    uris = {}
    for name, figure in plots(analysis, numbers).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png')
        uris[name] = data_uri(buffer.getvalue())

    def drawn(extreme):
        tokens, index, what = extreme
        _, png = cv2.imencode('.png', sample_figure(analysis.backbone, *what, analysis.classes.palette)[..., ::-1])
        return dict(index=index, tokens=tokens, dense=analysis.dense[index], uri=data_uri(png.tobytes()))

    shown = min(SHOWN, len(analysis.tokens) // 2) or 1
    return (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            numbers=numbers,
            uris=uris,
            config=config,
            checkpoint=checkpoint,
            ignored=analysis.ignored,
            extremes=[
                ('Fewest tokens', [drawn(extreme) for extreme in analysis.extremes[:shown]]),
                ('Most tokens', [drawn(extreme) for extreme in analysis.extremes[::-1][:shown]]),
            ],
        )
    )
