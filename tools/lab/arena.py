"""Compares ways of choosing coarse regions for trained dense segmentors, with nothing retrained.

    python tools/lab/arena.py CONFIG CHECKPOINT [CHECKPOINT ...] --out arena --scales 14,28 14,28,56

Each CHECKPOINT, a seed, runs once over the images of training, from which gates are fitted without labels and with
them, and once over the test set; then each chooser at each budget runs over the test set, on whole images, and on such
smaller ones as tools/fit_gate.py takes. What is finished is not done again: the same command goes on where it stopped.
Writes arena.json, arena.md and arena.png.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mmseg_msvit.measuring.flops import PLAIN_VITS
from mmseg_msvit.tooling.command_line import (
    DEVICE,
    claim,
    digest,
    file_digest,
    one_line_errors,
    positive,
    write_json,
    write_whole,
)
from mmseg_msvit.tooling.conversion import convert, dense_backbone
from mmseg_msvit.tooling.dense_pass import find_images, find_test_images, gather
from mmseg_msvit.tooling.gate_fitting import fit, gate_logits, shared_size
from mmseg_msvit.tooling.lab.arena import CHOOSERS, dense, play, smaller
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader
from mmseg_msvit.weights.whole_models import OF_GATES

# Fitted gates: name -> kind of gate, and what it is fitted to.
FITTED = {
    'context': ('context', 'mixed'),
    'glance': ('glance', 'mixed'),
    'mlp': ('mlp', 'mixed'),
    'context, labels': ('context', 'labels'),
    **{name: (name, 'mixed') for name in ('entropy', 'reconstruction', 'gradient', 'frequency')},
}
# Sizes of the images for a budget; the second is that of tools/fit_gate.py.
SIZES = dict(whole=lambda budget: 1.0, shared=shared_size)


class Contest:
    """One checkpoint: what has been measured of it, and what that needs, each made when it is first wanted.

    Args:
        args: of the command line.
        config: of the dense segmentor.
        checkpoint: its weights.
        folder: for results and fitted gates.
    """

    def __init__(self, args, config, checkpoint: str, folder: Path):
        self.args, self.config, self.folder = args, config, folder
        self.model = load_model(config, checkpoint, args.device, PLAIN_VITS)
        dense_backbone(self.model, config.filename)
        claim(
            folder / 'of.json', checkpoint=file_digest(checkpoint), config=digest(config.pretty_text), limit=args.limit,
            fit_images=args.fit_images, fit_budget=args.fit_budget, steps=args.steps,
        )  # fmt: skip
        self.reader = FileReader(config)
        self.file = folder / 'results.json'
        self.results = json.loads(self.file.read_text()) if self.file.exists() else []
        self.images = {}

    def gathered(self, which: str):
        """Images of ``mixed`` or ``labels`` (training) or ``test`` through the dense model."""
        if which not in self.images:
            if which == 'test':
                images, truths = (files[: self.args.limit] for files in find_test_images(self.config))
            else:
                images, truths = find_images(self.config, None, self.args.fit_images)
            target = 'labels' if which == 'labels' else 'mixed'
            self.images[which] = gather(self.model, self.reader, images, truths, target)
        return self.images[which]

    def run(self) -> None:
        """Measures what has not been measured yet."""
        if not self._known(chooser='dense'):
            self._add(dense(self.model, self.gathered('test')[0]))
        for budget in self.args.budgets:
            if not self._known(chooser='smaller', budget=budget):
                model, _ = self._model('smaller', self.args.scales[0])
                self._add(smaller(model, *self.gathered('test'), budget))
        choices = [
            (budget, SIZES[size](budget), chooser)
            for budget in self.args.budgets
            for size in self.args.sizes
            for chooser in self.args.choosers
        ]
        for scales in self.args.scales:
            for budget, size, chooser in [(None, 1.0, 'coarse'), *choices]:
                if not self._known(chooser=chooser, scales=list(scales), size=size, budget=budget):
                    model, score = self._model(chooser, scales)
                    model.backbone.input_scale = size
                    examples, windows = self.gathered('test')
                    self._add(play(model, examples, windows, chooser, score(model, examples, windows), budget))

    def _known(self, **wanted) -> bool:
        return any(all(result[key] == value for key, value in wanted.items()) for result in self.results)

    def _add(self, result) -> None:
        self.results.append(asdict(result))
        write_json(self.file, self.results)
        print(f'{self.folder.name}: {result}', flush=True)

    def _model(self, chooser: str, scales):
        """A converted model, and what gives its regions their scores."""
        kind, target = FITTED.get(chooser, ('context', 'mixed'))
        torch.manual_seed(0)  # a gate's first weights
        model, _ = convert(self.config, self.model, kind, scales)
        if chooser not in FITTED:
            model.backbone.build_gates(dict(type='FixedGate'), None)  # which is told, and costs nothing
            return model, CHOOSERS.get(chooser, CHOOSERS['random'])
        file = self.folder / f'gate_{kind}_{target}_{"-".join(map(str, scales))}.pth'
        names = [name for name in model.state_dict() if name.startswith(OF_GATES)]
        if not file.exists():
            fit(model, *self.gathered(target), budget=self.args.fit_budget, steps=self.args.steps)
            write_whole(file, partial(torch.save, {name: model.state_dict()[name].cpu() for name in names}))
        model.load_state_dict(torch.load(file), strict=False)
        return model, gate_logits


def table(contests: dict) -> list:
    """Rows over all checkpoints: means, spreads, and the share of the gap between all coarse and dense."""
    rows = {}
    for results in contests.values():
        top = next(r['miou'] for r in results if r['chooser'] == 'dense')
        for r in results:
            bottom = [b['miou'] for b in results if b['chooser'] == 'coarse' and b['scales'] == r['scales']]
            gap = (r['miou'] - bottom[0]) / (top - bottom[0]) if bottom and top > bottom[0] else None
            size = None if r['chooser'] == 'smaller' else r['size']
            key = (tuple(r['scales']), r['budget'], r['chooser'], size)
            rows.setdefault(key, []).append(dict(r, lost=top - r['miou'], gap=gap))
    found = []
    for (scales, budget, chooser, _), group in rows.items():
        row = dict(scales=scales, size=group[0]['size'], budget=budget, chooser=chooser, runs=len(group))
        for key in ('tokens', 'encoder', 'backbone', 'miou', 'lost', 'gap'):
            values = [r[key] for r in group if r[key] is not None]
            row[key] = statistics.fmean(values) if values else None
            row[f'{key}_std'] = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append(row)
    return sorted(found, key=lambda row: (len(row['scales']), -(row['tokens']), row['chooser']))


def markdown(rows: list) -> str:
    """The table for people."""
    names = ['scales', 'tokens', 'encoder MACs', 'with gate', 'images at', 'chosen by', 'mIoU', 'below dense']
    names += ['of the gap', 'models']
    lines = [f'| {" | ".join(names)} |', '| --- ' * len(names) + '|']
    for row in rows:
        gap = '' if row['gap'] is None or row['chooser'] in ('dense', 'coarse') else f'{row["gap"]:.0%}'
        miou, lost = (
            f'{row[key]:.2f}' + (f' +- {row[f"{key}_std"]:.2f}' if row['runs'] > 1 else '') for key in ('miou', 'lost')
        )
        shares = (f'{row[key]:.0%}' for key in ('tokens', 'encoder', 'backbone'))
        scales = ', '.join(map(str, row['scales']))
        cells = [scales, *shares, f'{row["size"]:.2f}', row['chooser'], miou, lost, gap, str(row['runs'])]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def draw(rows: list) -> Figure:
    """mIoU lost over the backbone's MACs, a line for each chooser and its scales."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout='constrained')
    axes = figure.subplots()
    curves, usual = {}, min((row['scales'] for row in rows if row['chooser'] not in ('dense', 'smaller')), key=len)
    for row in rows:
        if row['chooser'] not in ('dense', 'coarse'):
            name = row['chooser']
            if name != 'smaller':  # which is the dense model
                name += ', smaller' * (row['size'] < 1)
                name += f', scales {row["scales"]}' * (row['scales'] != usual)
            curves.setdefault(name, []).append(row)
    for name, curve in curves.items():
        curve.sort(key=lambda row: row['backbone'])
        style = dict(ls='--', marker='^') if 'scales' in name else dict(ls='-', marker='o')
        x, y, spread = ([row[key] for row in curve] for key in ('backbone', 'lost', 'lost_std'))
        axes.errorbar([100 * v for v in x], [-v for v in y], yerr=spread, capsize=3, label=name, **style)
    axes.axhline(0, color='black', lw=0.8)
    axes.set(xlabel="% of the dense backbone's MACs, the gate's among them", ylabel='mIoU against dense')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    return figure


def numbers(text: str) -> tuple:
    """``14,28`` to (14, 28)."""
    return tuple(int(part) for part in text.split(','))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='of the dense segmentor')
    parser.add_argument('checkpoints', nargs='+', help='of the dense segmentor, one for each seed')
    parser.add_argument('--scales', type=numbers, nargs='+', default=[(16, 32)], help='as 14,28 14,28,56')
    known = [*CHOOSERS, *FITTED]
    parser.add_argument('--choosers', nargs='+', choices=known, default=known)
    parser.add_argument('--budgets', type=float, nargs='+', default=[0.62, 0.47, 0.37], help='shares of the tokens')
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES), help='of the images')
    parser.add_argument('--steps', type=positive, default=1000, help='of fitting a gate, each of 8 images')
    parser.add_argument('--fit-budget', type=float, default=0.5, help='where fitted gates are to be most precise')
    parser.add_argument('--fit-images', type=int, default=500, help='at most so many images of training')
    parser.add_argument('--limit', type=int, help='of the test set, the first so many images')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/arena'))
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    config = load_config(args.config)
    contests = {}
    for number, checkpoint in enumerate(args.checkpoints):
        contest = Contest(args, config, checkpoint, args.out / f'run_{number}')
        contest.run()
        contests[checkpoint] = contest.results
    rows = table(contests)
    write_json(args.out / 'arena.json', rows)
    (args.out / 'arena.md').write_text(markdown(rows))
    draw(rows).savefig(args.out / 'arena.png')
    print(markdown(rows))


if __name__ == '__main__':
    with one_line_errors():
        main()
