"""Shows how a trained gate decides over the test set, as one HTML page and as numbers.

    python tools/analyze_gate.py CONFIG CHECKPOINT --out gate.json --html gate.html

Tokens of an image; which regions become coarse, by class, by purity and by place; how well coarse and fine cells are
classified; whether images differ or the gate is a static mask; the images with the most and the fewest tokens. Images
go through the config's test pipeline and, in one piece, through the model.
"""

import argparse
import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import List

import cv2
import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.apis import init_model
from mmseg.registry import DATASETS
from rich.progress import track

from mmseg_msvit.gate_losses import IGNORE_INDEX, region_purity
from mmseg_msvit.inspection import coarse_by_purity, find_msvit, looking_at, record_tokens
from mmseg_msvit.metrics import summarize
from mmseg_msvit.tokens import over_cells
from mmseg_msvit.visualization import sample_figure

# Bins of purity: the share of a region's commonest class.
BINS = np.linspace(0.3, 1.0, 8)
SHOWN = 3


class Analysis:
    """What is gathered over a data set.

    Args:
        model: a segmentor with an MSViT.
        dataset: with truth.
    """

    def __init__(self, model, dataset):
        self.model, self.dataset = model, dataset
        self.backbone = find_msvit(model)
        self.classes = list(dataset.metainfo['classes'])
        if len(self.classes) > IGNORE_INDEX:
            raise ValueError(f'dataset must have at most {IGNORE_INDEX} classes, got {len(self.classes)}')
        self.regions = Counter()  # of coarse_by_purity
        self.pixels = np.zeros((2, 2, len(self.classes)), int)  # fine or coarse, wrong or right, class of the truth
        self.by_purity = np.zeros((2, len(BINS) - 1), int)  # fine or coarse, bin
        self.tokens: List[int] = []
        self.dense: List[int] = []
        self.maps: List[np.ndarray] = []
        for i in track(range(len(dataset)), 'images'):
            self._add(dataset[i])

    def _add(self, data: dict) -> None:
        with looking_at(self.model), record_tokens(self.model) as seen:
            (sample,) = self.model.test_step(pseudo_collate([data]))
        (tokens,) = seen
        side, patch = self.backbone.side, self.backbone.patch_size
        height, width = sample.img_shape[:2]  # what the pipeline made of the image; the truth keeps its own size

        def fit(labels):
            labels = labels[0].cpu().numpy().astype(np.uint8)
            return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)

        truth, prediction = fit(sample.gt_sem_seg.data), fit(sample.pred_sem_seg.data)
        labels = torch.from_numpy(truth)[None].long().to(tokens.coarse.device)
        self.regions.update(coarse_by_purity(tokens, labels, self.backbone.region))
        share, labelled = (
            t.cpu().numpy() for t in region_purity(labels, tokens.coarse.shape[1:], self.backbone.region)
        )
        coarse = tokens.coarse.cpu().numpy()
        for kind in (0, 1):
            chosen = share[labelled & (coarse == kind)]
            self.by_purity[kind] += np.histogram(chosen.clip(BINS[0]), BINS)[0]
        cells = over_cells(tokens.coarse, tokens.grid, side)[0].cpu().numpy()  # (h, w)
        of_pixel = np.kron(cells, np.ones((patch, patch), int))[:height, :width]
        known = truth < len(self.classes)
        index = (of_pixel[known].astype(int), (truth == prediction)[known].astype(int), truth[known])
        np.add.at(self.pixels, index, 1)

        self.tokens.append(int(tokens.active_counts()) - int(tokens.with_cls))
        self.dense.append(tokens.grid[0] * tokens.grid[1])
        self.maps.append(coarse[0].astype(float))

    def place(self) -> np.ndarray:
        """(images, hc, wc), the decisions of the images that share the commonest region grid."""
        shape = Counter(m.shape for m in self.maps).most_common(1)[0][0]
        return np.stack([m for m in self.maps if m.shape == shape])

    def numbers(self) -> dict:
        """What the JSON holds.

        ``tokens`` are those of an image without cls, of ``dense_tokens``; ``coarse`` is the share of coarse regions, in
        all and among uniform and mixed ones, and for each class the share of its pixels that lie in coarse regions;
        ``accuracy_*`` the share of right pixels in fine and in coarse cells. ``place`` has the share of coarse, and its
        standard deviation between images, at each place of the commonest region grid.
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
                for i, name in enumerate(self.classes)
            },
            purity=[
                dict(low=round(float(a), 2), high=round(float(b), 2), regions=int(n), coarse=ratio(c, n))
                for a, b, n, c in zip(BINS, BINS[1:], self.by_purity.sum(0), self.by_purity[1])
            ],
            place=dict(images=len(maps), coarse=share.round(4).tolist(), std=maps.std(0).round(4).tolist()),
        )

    def picture(self, i: int) -> np.ndarray:
        """The token figure of image i."""
        data = self.dataset[i]
        with looking_at(self.model), record_tokens(self.model) as seen:
            (sample,) = self.model.test_step(pseudo_collate([data]))
        image = data['inputs'].permute(1, 2, 0).numpy()[..., ::-1]  # BGR, as mmseg loads it
        return sample_figure(self.backbone, seen[0], image, sample, self.dataset.metainfo['palette'])


def plots(analysis: Analysis, numbers: dict) -> dict:
    """Name -> Figure."""
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
    for axes, (title, key, top) in zip(
        drawing.subplots(1, 2), (('share of images with a coarse region', 'coarse', 1), ('between images', 'std', 0.5))
    ):
        shown = axes.imshow(numbers['place'][key], vmin=0, vmax=top, cmap='viridis')
        axes.set_title(title if key == 'coarse' else f'standard deviation {title}', fontsize=10)
        axes.set_axis_off()
        drawing.colorbar(shown, ax=axes, shrink=0.8)
    return found


def data_uri(png: bytes) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png).decode()


def page(analysis: Analysis, numbers: dict, config: str, checkpoint: str) -> str:
    """The HTML page, with its pictures inside."""
    uris = {}
    for name, figure in plots(analysis, numbers).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png')
        uris[name] = data_uri(buffer.getvalue())
    order = np.argsort(analysis.tokens, kind='stable')
    shown = min(SHOWN, len(order) // 2) or 1

    def pictures(indices):
        for i in indices:
            picture = analysis.picture(int(i))
            ok, png = cv2.imencode('.png', picture[..., ::-1])
            assert ok
            yield dict(index=int(i), tokens=analysis.tokens[i], dense=analysis.dense[i], uri=data_uri(png.tobytes()))

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / 'gate_report.html').read_text()
    )
    return template.render(
        numbers=numbers, uris=uris, config=config, checkpoint=checkpoint, ignored=IGNORE_INDEX,
        extremes=[
            ('Fewest tokens', list(pictures(order[:shown]))),
            ('Most tokens', list(pictures(order[::-1][:shown]))),
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    parser.add_argument('--html', type=Path, help='HTML file for the page; nothing else is needed to show it')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()

    model = init_model(args.config, args.checkpoint, device=args.device)
    analysis = Analysis(model, DATASETS.build(Config.fromfile(args.config).test_dataloader.dataset))
    numbers = analysis.numbers()
    for path, content in (
        (args.out, lambda: json.dumps(numbers, indent=2) + '\n'),
        (args.html, lambda: page(analysis, numbers, args.config, args.checkpoint)),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content())

    def percent(value):
        return 'no such cells' if value is None else f'{value:.1%}'

    print(
        f'tokens of an image    {numbers["tokens"]:.1f} +- {numbers["tokens_std"]:.1f} of {numbers["dense_tokens"]:.0f}'
    )
    print(f'coarse regions        {numbers["coarse"]:.1%}')
    print(f'  of uniform regions  {numbers["coarse_of_uniform"]:.1%}')
    print(f'  of mixed regions    {numbers["coarse_of_mixed"]:.1%}')
    print(f'pixels right, coarse  {percent(numbers["accuracy_coarse"])}')
    print(f'pixels right, fine    {percent(numbers["accuracy_fine"])}')
    images = numbers['place']['images']
    of = '' if images == numbers['images'] else f', over {images} images of one size'
    spread = f'{numbers["conditionality"]:.2f}'
    print(f'conditionality        {spread} (0: a static mask; 0.5: half of the images differ){of}')


if __name__ == '__main__':
    main()
