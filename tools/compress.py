"""Finds what a trained dense segmentor can be at half of its cost, or at any other part, with the least loss of mIoU.

    python tools/compress.py CONFIG CHECKPOINT --target 0.5 --of time --out fast
    python tools/compress.py CONFIG CHECKPOINT --target 0.4 0.6 --of macs --out fast --metric pedestrian bicyclist

Smaller images, gates that give less to regions in which this very model is sure, and both together are compared by
mIoU on CONFIG's validation images and by time on this machine, at batch 1. Gates are fitted to training images, or to
--images, without labels. Writes a folder for each target with config.py and checkpoint.pth, which mim test takes, and
report.html. Any backbone will do; where it is no plain ViT, smaller images alone are searched. The same command goes on
where it was interrupted.
"""

import argparse
import shlex
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

import torch
from mmengine.config import Config
from torch import nn

from mmseg_msvit.gates.from_outside import deciding_by
from mmseg_msvit.labels import ids_in, one_class
from mmseg_msvit.measuring.inspection import check_one_pass
from mmseg_msvit.tooling.command_line import (
    DEVICE,
    InputError,
    claim,
    digest,
    file_digest,
    one_line_errors,
    positive,
    print_table,
    write_json,
    write_whole,
)
from mmseg_msvit.tooling.compression import SCREENED, WAYS, Found, Way, by_rule, measure_front, search
from mmseg_msvit.tooling.compression_report import page, rows, sentence
from mmseg_msvit.tooling.conversion import check_out, convert, dense_backbone, head_on_tokens, write, write_smaller
from mmseg_msvit.tooling.dense_pass import find_images, find_val_images, gather
from mmseg_msvit.tooling.gate_fitting import fit
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader
from mmseg_msvit.tooling.trials import DENSE, SMALLER, OutOfTime, Trials
from mmseg_msvit.versions import BEFORE_TORCH_26
from mmseg_msvit.weights.whole_models import OF_GATES

# A further gate is fitted only if less than this part of the minutes is over.
FOR_GATES = 0.4
MARK = 'of.json'


class Gates:
    """The converted models, each with its gate fitted once; what that needs is gathered when it is first wanted.

    Args:
        args: of the command line.
        config: of the dense segmentor.
        dense: that segmentor.
        reader: of its config.
    """

    def __init__(self, args: argparse.Namespace, config: Config, dense: nn.Module, reader: FileReader):
        self.args, self.config, self.dense, self.reader = args, config, dense, reader
        self.changes: Dict[str, dict] = {}
        self.seen = None

    def file(self, name: str) -> Path:
        """Where the weights of a way's gate are kept."""
        return self.args.out / 'gates' / f'{WAYS[name].gate}_{WAYS[name].levels}.pth'

    def model(self, name: str) -> nn.Module:
        """The segmentor of a way, by its name."""
        way = WAYS.get(name, Way(None))
        torch.manual_seed(0)  # a gate's first weights
        scales = [self.dense.backbone.patch_size * 2**level for level in range(way.levels)]
        # Heads read tokens, which is faster, where no answer changes: linear ones, and all if no token is coarse.
        head = head_on_tokens(self.dense)
        on_tokens = way.on_tokens or head == 'TokenLinearHead' or (head is not None and way.gate is None)
        model, self.changes[name] = convert(self.config, self.dense, way.gate, scales, on_tokens)
        if way.gate is None:
            return model
        file = self.file(name)
        if not file.exists():
            if self.seen is None:
                images, _ = find_images(self.config, self.args.images, self.args.limit)
                self.seen = gather(self.dense, self.reader, images, [None] * len(images), 'mixed')
            fit(model, *self.seen, budget=min(max(sum(self.args.target) / len(self.args.target), 0.3), 0.9),
                steps=self.args.steps)  # fmt: skip
            gates = {key: value.cpu() for key, value in model.state_dict().items() if key.startswith(OF_GATES)}
            file.parent.mkdir(exist_ok=True)
            write_whole(file, partial(torch.save, gates))
        model.load_state_dict(torch.load(file, weights_only=True), strict=False)
        return model


def choose_classes(metric: List[str], names: List[str]) -> List[int]:
    """The ids of the classes whose mean IoU decides."""
    if metric == ['mIoU']:
        return list(range(len(names)))
    unknown = [name for name in metric if name not in names]
    if unknown:
        raise InputError(f'--metric: wanted mIoU or names of classes, {", ".join(names)}, got {", ".join(unknown)}')
    return [names.index(name) for name in metric]


def check_labels_of(trials: Trials) -> None:
    """Refuses labels by which nothing can be judged."""
    ids = set()
    for i in trials.order[:SCREENED]:
        ids.update(ids_in(trials.read(None, i)[1]))
    why = one_class(ids)
    if why:
        raise InputError(f'validation set: wanted labels that tell models apart, but {why}')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='folder for the models and the report')
    parser.add_argument('--target', type=float, nargs='+', default=[0.5], help="shares of the dense model's cost")
    parser.add_argument('--of', choices=('time', 'macs'), default='time', help='what the target is of')
    parser.add_argument('--metric', nargs='+', default=['mIoU'], help='mIoU, or the classes that matter')
    parser.add_argument('--images', type=Path, help="folder for fitting gates; without it CONFIG's training images")
    parser.add_argument('--limit', type=positive, default=500, help='of images for fitting gates, at most')
    parser.add_argument('--val-limit', type=positive, default=500, help='of validation images, at most')
    parser.add_argument('--minutes', type=float, default=30, help='after which it ends with what is known')
    parser.add_argument('--steps', type=positive, default=1000, help='of fitting a gate, each of 8 images')
    parser.add_argument('--runtime', choices=('torch', 'onnx', 'onnx-int8'), default='torch', help='what is timed')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()
    started = time.monotonic()
    if args.runtime != 'torch':
        check_runtime()
        args.device = 'cpu'
    args.target = sorted(set(args.target), reverse=True)
    if not all(0 < target < 1 for target in args.target):
        raise InputError(f'--target: wanted shares of the cost, in (0, 1), got {args.target}')
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / MARK).is_file():
        raise InputError(f'--out: wanted a new folder, or one of this tool, got {args.out}, which has other files')
    folders = {target: args.out / f'{target:g}' for target in args.target}
    for folder in folders.values():
        check_out(folder, args.config, args.checkpoint)

    config = load_config(args.config)
    dense = load_model(config, args.checkpoint, args.device, nn.Module)
    reader = FileReader(config)
    images, truths = find_val_images(config, args.val_limit)
    chosen = choose_classes(args.metric, reader.classes.names)
    claim(
        args.out / MARK, checkpoint=file_digest(args.checkpoint), config=digest(config.pretty_text), of=args.of,
        images=str(args.images), limit=args.limit, val_limit=args.val_limit, steps=args.steps, device=args.device,
        runtime=args.runtime,
    )  # fmt: skip
    notes, gates, models = [], Gates(args, config, dense, reader), {DENSE: dense}
    try:
        dense_backbone(dense, args.config)
        models[SMALLER] = gates.model(SMALLER)
    except InputError as error:
        notes.append(f'smaller images alone are searched, no gate: {error}')
        models[SMALLER] = dense
    if args.runtime != 'torch' and models[SMALLER] is dense:
        raise InputError(f'--runtime: wanted torch, since this model is not exported here: {notes[0]}')
    labelled = None not in truths
    trials = Trials(
        models, reader, images, truths if labelled else None, args.of, chosen, args.out / 'measured.json',
        started + 60 * args.minutes, None if args.runtime == 'torch' else partial(in_file, args, config, models),
    )  # fmt: skip
    check_one_pass(dense, reader.read(images[0])[0])
    if labelled:
        check_labels_of(trials)
    elif models[SMALLER] is dense:
        raise InputError(f'CONFIG: wanted labels of the validation set, by which to choose; {notes[0]}')
    else:
        notes.append(
            'there are no labels, and how often a model says what the dense one says does not tell which size of '
            'images is best: it is taken by a rule that was right elsewhere. A few dozen labels would tell'
        )
    if models[SMALLER] is not dense:
        for name, way in WAYS.items():
            if args.runtime == 'onnx-int8' and way.gate == 'glance':
                notes.append(f'{name} was not tried: it looks through the blocks, and would change in int8')
                continue
            if way.most < min(args.target) or (not labelled and way != next(iter(WAYS.values()))):
                continue
            if way.on_tokens and head_on_tokens(dense) != 'TokenSegmenterHead':
                continue
            late = time.monotonic() > started + 60 * args.minutes * FOR_GATES
            if late and len(models) > 2 and not gates.file(name).exists():
                notes.append(f'{name} was not tried: no time was left')
                continue
            models[name] = gates.model(name)
    gates.seen = None  # the images are no longer needed

    found: List[Found] = []
    for number, target in enumerate(args.target):
        left = started + 60 * args.minutes - time.monotonic()
        trials.deadline = time.monotonic() + left / (len(args.target) - number)
        found.append(search(trials, target) if labelled else by_rule(trials, target))
        for note in notes + found[-1].notes:
            print(note)
    if labelled:
        trials.deadline = started + 60 * args.minutes
        with suppress(OutOfTime):
            measure_front(trials, found)
    for each in found:
        save(config, dense, models, gates.changes, trials, each, folders[each.target])
        each.notes[:0] = notes

    took = (time.monotonic() - started) / 60
    write_json(args.out / 'report.json', dict(rows=rows(trials), minutes=took))
    template = (Path(__file__).parent / 'compress_report.html').read_text()
    command = shlex.join(['python', *sys.argv])
    text = page(trials, found, template, args.config, args.checkpoint, command, took)
    write_whole(args.out / 'report.html', lambda path: path.write_text(text))
    table = [
        [
            row['name'],
            str(row['images']),
            f'{row["time"]:.2f}',
            f'{row["macs"]:.2f}',
            f'{row["difference"]["value"]:+.1f} ({row["difference"]["low"]:+.1f} to {row["difference"]["high"]:+.1f})'
            if labelled
            else '',
        ]
        for row in rows(trials)
        if row['images'] >= min(SCREENED, len(images))
    ]
    print_table('against the dense model', ['images', 'time', 'MACs', 'mIoU (95 % interval)'], table)
    for each in found:
        print(f'{each.target:g} of the {args.of}: {sentence(trials, each)}')
    print(f'{args.out}/report.html; {", ".join(f"{folder}/config.py" for folder in folders.values())}')


def in_file(args: argparse.Namespace, config: Config, models: Dict[str, nn.Module], way: str, size: float) -> Callable:
    """What :class:`.Trials` runs in a model's place: its exported file, which is made where it is not there yet."""
    from mmseg_msvit.tooling.export import export_onnx, metadata, save_onnx
    from mmseg_msvit.tooling.exported import through_file

    path = args.out / 'onnx' / f'{way.replace(", ", " ").replace(" ", "_")}_{size:g}.onnx'
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with deciding_by(models[way], 1.0, input_scale=size):
            graph = export_onnx(models[way])
        save_onnx(graph, path, metadata(models[way], config), args.runtime == 'onnx-int8')
    return through_file(path, torch.get_num_threads())


def check_runtime() -> None:
    """Refuses an environment in which nothing is exported."""
    if BEFORE_TORCH_26:
        raise InputError(f'--runtime: wanted torch 2.6 or later for ONNX, got {torch.__version__}')
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f'--runtime: wanted the packages of mmseg_msvit[export], got {error}') from error


def save(config, dense, models, changes, trials: Trials, found: Found, folder: Path) -> None:
    """Writes the model that was chosen for a target."""
    best, classes = found.best, trials.reader.classes
    if models[best.way] is dense:
        write_smaller(config, dense, best.size, classes, folder)
        return
    model = models[best.way]
    model.backbone.input_scale, model.backbone.select.threshold = best.size, best.threshold
    write(config, model, changes[best.way], classes, folder)
    model.backbone.input_scale = 1.0


if __name__ == '__main__':
    with one_line_errors():
        main()
