"""A gate for a trained dense segmentor: the weights of ViT and head stay, and no label is needed.

The dense model runs over images once (:func:`.dense_pass.gather`), which says how mixed every region is in its eyes. A
gate learns to foresee that from the pixels (:func:`fit`), one threshold is set for a budget of tokens
(:func:`find_threshold`), and :func:`write` leaves a config and a whole checkpoint, which everything takes that takes
a segmentor's.
"""

import os
from functools import partial
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmseg.registry import MODELS
from rich.progress import track
from torch import Tensor, nn

from ..gates.doubt import doubt_scale, doubt_target, region_doubt
from ..gates.gate import FixedGate
from ..labels import Classes
from ..tokens.selection import TokenSelector
from ..tokens.token_map import Grid, shrunk_grid
from ..vit.mixed_scale import MixedScale
from ..weights.whole_models import OF_GATES
from .command_line import InputError, write_whole
from .dense_pass import Example, Window, pixels
from .testset import merge_first

# The mixed-scale backbone that takes over a dense one's weights, by the dense one's class.
STANDS_IN = {'VisionTransformer': 'MSViT', 'BEiT': 'MSBEiT', 'MAE': 'MSMAE'}
STANDS_IN.update({kind: kind for kind in STANDS_IN.values()})
KINDS = dict(context='ContextGate', glance='GlanceGate', mlp='MLPGate')
# A gate that looks through blocks does so through one in so many of the ViT's, which cost a twentieth of all.
BLOCKS_PER_GLANCED = 4
# Images smaller than this lost more than coarser regions did, at the two budgets where it was tried.
SMALLEST = 0.85
BATCH = 8
# What a converted model's folder holds, and the words in its config by which it is known.
WRITTEN = ('config.py', 'checkpoint.pth', 'train.py', 'picture.png')
SIGNATURE = 'with a gate that was fitted to it'
LEARNING_RATE = 1e-3


def dense_backbone(model: nn.Module, path: str) -> nn.Module:
    """The dense ViT of a segmentor.

    Raises:
        InputError: it has no plain ViT, or one whose gate, budget or size is not that of all fine tokens.
    """
    backbone = model.backbone
    kind = type(backbone).__name__
    if kind not in STANDS_IN:
        advice = merge_first(model) or (
            ". A plain ViT in a wrapper can be written as an MSViT with gate=dict(type='FixedGate'): docs/recipes.md"
        )
        raise InputError(f'CONFIG: wanted a backbone of type {", ".join(STANDS_IN)}, got {kind} in {path}{advice}')
    if isinstance(backbone, MixedScale):
        gate = backbone.gate
        if not isinstance(gate, FixedGate) or gate.coarse:
            raise InputError(
                "CONFIG: wanted a dense ViT, an MSViT with gate=dict(type='FixedGate', coarse=False), got one with "
                f'{type(gate).__name__} in {path}'
            )
        budget, size = backbone.select.token_budget, backbone.input_scale
        if budget is not None or size != 1:
            raise InputError(
                f'CONFIG: wanted a dense ViT, token_budget=None and input_scale=1, got {budget} and {size} in {path}'
            )
    return backbone


def answers(backbone: MixedScale, images: Tensor) -> List[Tensor]:
    """The logits (B, hc, wc) of every level's gate, the finest first, of images of any size."""
    return backbone.tokenize(images)[2].logits


def _crop(model: nn.Module, examples: List[Example], windows: List[Window], rng: np.random.Generator) -> tuple:
    """A batch of crops of one size that begin at any cell: images (B, C, H, W) and shares (B, K, h, w)."""
    backbone = model.backbone
    patch, most = backbone.patch_size, backbone.sides[-1]
    flip = rng.random() < 0.5 and all(window.box[3] >= patch for window in windows)
    # The backbone pads at the right and below: a cell of which a part is missing must not come to lie on the left.
    sizes = [(w.shares.shape[1], w.box[3] // patch if flip else w.shares.shape[2]) for w in windows]
    rows, columns = (max(1, min(n) - rng.integers(most)) for n in zip(*sizes))
    images, shares = [], []
    for window, (h, w) in zip(windows, sizes):
        y, x = rng.integers(h - rows + 1), rng.integers(w - columns + 1)
        image = pixels(model, examples[window.example], window)
        image = image[:, patch * y : patch * (y + rows), patch * x : patch * (x + columns)]
        missing = (0, patch * columns - image.shape[2], 0, patch * rows - image.shape[1])
        images.append(F.pad(image, missing))
        shares.append(window.shares[:, y : y + rows, x : x + columns])
    classes = max(len(share) for share in shares)
    shares = [F.pad(share, (0, 0, 0, 0, 0, classes - len(share))) for share in shares]
    images, shares = torch.stack(images), torch.stack(shares).to(images[0].device)
    return (images.flip(-1), shares.flip(-1)) if flip else (images, shares)


def shared_size(budget: float) -> float:
    """The size of images, as a share of their height and width, at which half of the saving is theirs, or ``SMALLEST``.

    Tokens are saved by coarse regions, where the gate sees no need for fine ones, and by a smaller image, everywhere.
    The first few cost least in both ways, so a little of both is better than much of one. Which size is best cannot be
    asked of the dense model: what it says of a smaller image differs from what it says of the whole one along every
    edge, and is nearly as often right. Measured in ``docs/benchmarks.md``.

    Args:
        budget: the share of the dense tokens that is kept.
    """
    return round(max(SMALLEST, budget**0.25), 3)


def fit(model: nn.Module, examples: List[Example], windows: List[Window], budget: float, steps: int) -> None:
    """Trains the gates of a converted model, and nothing else of it, to foresee the doubt about each region.

    Args:
        model: by :func:`convert`.
        examples: by :func:`.dense_pass.gather`.
        windows: likewise.
        budget: the wanted share of the dense tokens: a gate is least sure where it has to decide.
        steps: of the optimizer, each of ``BATCH`` windows.
    """
    backbone, rng = model.backbone, np.random.default_rng(0)
    doubts = []
    for window in windows:
        doubt, known = region_doubt(window.shares[None], backbone.sides[1])
        doubts.append(doubt[known])
    saved = 1 - 1 / backbone.sides[1] ** 2  # of a region's tokens, where it is coarse
    floor, half = doubt_scale(torch.cat(doubts), min(max((1 - budget) / saved, 0.05), 0.95))
    backbone.requires_grad_(False)
    gates = nn.ModuleList(backbone.gates).train().requires_grad_(True)
    for gate in backbone.gates:
        nn.init.zeros_(gate.last.bias)  # half of the targets are above one half
    optimizer = torch.optim.AdamW(gates.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    # Its warm-up of a tenth wants two steps: fewer than twenty in all are the first of twenty.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 20), pct_start=0.1)
    order: List[int] = []
    for _ in track(range(steps), 'gate'):
        if len(order) < BATCH:
            order += rng.permutation(len(windows)).tolist()
        chosen, order = [windows[i] for i in order[:BATCH]], order[BATCH:]
        images, shares = _crop(model, examples, chosen, rng)
        loss = 0.0
        for logits, side in zip(answers(backbone, images), backbone.sides[1:]):
            doubt, known = region_doubt(shares, side)
            # One threshold serves all levels. A coarse token in place of four finer ones saves three, whatever its
            # size, but leaves all of its area in doubt: the doubt of a larger region counts for as much more.
            target = doubt_target(doubt, floor, half / (side / backbone.sides[1]) ** 2)
            each = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
            loss = loss + (each * known).sum() / known.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    gates.eval().requires_grad_(False)


@torch.no_grad()
def gate_logits(model: nn.Module, examples: Sequence[Example], windows: Sequence[Window]) -> List[List[Tensor]]:
    """What the gates say of each window: (1, hc, wc) for each coarse level, the finest first."""
    return [
        answers(model.backbone, pixels(model, examples[window.example], window)[None])
        for window in track(windows, 'gates')
    ]


def find_threshold(
    backbone: MixedScale, windows: Sequence[Window], logits: Sequence[List[Tensor]], budget: float
) -> Tuple[float, float]:
    """The one threshold, for all windows and levels, that meets a budget.

    Args:
        backbone: with the levels and the prefix that tokens are counted for.
        windows: by :func:`.dense_pass.gather`.
        logits: by :func:`gate_logits`.
        budget: the share of the dense tokens, cls and registers among both, over all windows.

    Returns:
        A threshold that spends as much of the budget as can be, at most 1, which is all fine, and its share. It is in
        the middle between the probabilities of two regions.

    Raises:
        InputError: even all coarse is not within the budget.
    """
    prefix, dense = backbone.select.prefix, 0
    found: Dict[Grid, List[List[Tensor]]] = {}  # logits of each level, by the grid of cells
    for window, levels in zip(windows, logits):
        h, w = window.shares.shape[1:]
        dense += h * w + prefix
        found.setdefault(shrunk_grid((h, w), backbone.input_scale), []).append(levels)
    groups = {grid: [torch.cat(level) for level in zip(*group)] for grid, group in found.items()}

    def share(threshold: float) -> float:
        select, tokens = TokenSelector(backbone.sides, threshold=threshold, prefix=prefix).eval(), 0
        for grid, levels in groups.items():
            gates = [lambda regions, left, answer=answer: answer for answer in levels]
            tokens += sum(select(gates, grid)[0].lengths)
        return tokens / dense

    # A threshold between two values is as the lower of them: a region has to be above it.
    values = torch.cat([a.flatten() for levels in groups.values() for a in levels]).sigmoid().unique().tolist()
    values = [0.0, *values, 1.0]
    if share(0.0) > budget:
        raise InputError(
            f'--budget: wanted at least {share(0.0):.2f}, which is all coarse, got {budget:g}; more --scales allow less'
        )
    low, high = 0, len(values)  # the first is within the budget, what is at high or above is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(values[middle]) <= budget else (low, middle)
    threshold = between(values[low], values[min(high, len(values) - 1)])
    return threshold, share(threshold)


def between(low: float, high: float) -> float:
    """The threshold that no region stands at: the middle of two probabilities, by float32, in which they are compared.

    On a region's own probability, a rounding elsewhere, as in an exported file, would turn the region over.
    """
    middle = float(np.float32((low + high) / 2))
    return middle if low < middle < high else low


def convert(config: Config, dense: nn.Module, gate: str, scales: Sequence[int]) -> Tuple[nn.Module, dict]:
    """The segmentor with a mixed-scale backbone in the dense one's place, gates at their first values.

    Args:
        config: of the dense segmentor.
        dense: that segmentor.
        gate: one of ``KINDS``.
        scales: pixels along a token's side.

    Returns:
        The model in evaluation mode, and what the config's backbone becomes.

    Raises:
        InputError: the scales do not fit the backbone's patches, or what it has learned for coarse tokens.
    """
    own, detailed = config.model.backbone, getattr(dense.backbone, 'details', [])
    if detailed and dense.backbone.scales != tuple(scales):
        raise InputError(
            f"--scales: wanted {dense.backbone.scales}, for which the dense model has coarse_embed='resize+detail', "
            f'got {tuple(scales)}'
        )
    changes = dict(type=STANDS_IN[type(dense.backbone).__name__], scales=tuple(scales))
    if changes['type'] == 'MSViT' and not isinstance(dense.backbone, MixedScale):
        changes['patch_bias'] = True  # zero where the dense one has none; pretrained files have one, which mmseg drops
    changes['gate'] = dict(type=KINDS[gate], frozen=True)
    if gate == 'glance':
        changes['gate']['blocks'] = max(1, len(dense.backbone.layers) // BLOCKS_PER_GLANCED)
    kept = {name: value for name, value in own.items() if name not in ('gate', *changes)}
    try:
        model = MODELS.build(ConfigDict({**config.model, 'backbone': {**kept, **changes}}))
    except ValueError as error:
        raise InputError(f'--scales: {error}') from error
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith(OF_GATES) for name in loaded.missing_keys), loaded
    return model.to(next(dense.parameters()).device).eval(), changes


def check_out(out: Path, *inputs: str) -> None:
    """Refuses a folder in which :func:`write` would replace what it has not written itself.

    Args:
        out: the folder, which need not be there.
        inputs: files that are read, which are not to be replaced in any case.

    Raises:
        InputError: it would replace such a file.
    """
    there = [out / name for name in WRITTEN if (out / name).exists()]
    known = (out / 'config.py').is_file() and SIGNATURE in (out / 'config.py').read_text(errors='replace')
    read = {Path(path).resolve() for path in inputs}
    lost = [path for path in there if not known or path.resolve() in read]
    if lost:
        raise InputError(
            f'--out: wanted a new folder, or one of this tool, got {out}, where {", ".join(p.name for p in lost)} '
            'would be replaced: remove it, or choose another'
        )


def write(config: Config, model: nn.Module, changes: dict, classes: Classes, out: Path) -> None:
    """Writes ``checkpoint.pth``, then ``config.py`` and ``train.py``; each is there as a whole or not at all.

    ``train.py`` is for training, with the gate as it is here. It begins with the weights that the dense segmentor's
    config begins with, and with all tokens fine (:class:`.DenseFirstHook`); if the gate looks through blocks, with
    these here, for it knows no others.

    Args:
        config: of the dense segmentor, which the new one inherits from.
        model: the converted one, with its threshold.
        changes: by :func:`convert`.
        classes: their names and colours, which go into the checkpoint.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    backbone = dict(changes, gate=dict(changes['gate'], threshold=model.backbone.select.threshold))
    if model.backbone.input_scale != 1:
        backbone['input_scale'] = model.backbone.input_scale
    if 'gate' in config.model.backbone:
        backbone['gate']['_delete_'] = True
    base = config.filename
    base = base if '::' in base else os.path.relpath(base, out)
    fitted = '{{ fileDirname }}/checkpoint.pth'
    imports = (config.get('custom_imports') or {}).get('imports') or []
    imports = [name for name in ([imports] if isinstance(imports, str) else imports) if name != 'mmseg_msvit']
    lines = [
        f'# {Path(base).name} {SIGNATURE}. A higher threshold is more tokens.',
        f'_base_ = {base!r}',
        f'custom_imports = dict(imports={[*imports, "mmseg_msvit"]}, allow_failed_imports=False)',
        f'model = dict(backbone={backbone!r})',
        f'load_from = {fitted!r}',
    ]
    gate = dict(init_cfg=dict(type='Pretrained', checkpoint=fitted, prefix='backbone.gate.'))
    hooks = [*map(dict, config.get('custom_hooks') or []), dict(type='DenseFirstHook')]
    anew = [
        '# config.py to be trained from the weights that its base begins with, dense for the first half of the',
        '# steps; the gate stays as it is.',
        "_base_ = './config.py'",
        f'model = dict(backbone=dict(gate={gate!r}))',
        f'custom_hooks = {hooks!r}',
        f'load_from = {config.get("load_from")!r}',
    ]
    if model.backbone.gate.blocks:
        anew = [
            '# config.py to be trained further; its gate knows the blocks as they are here: fit it again afterwards.',
            "_base_ = './config.py'",
        ]
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    meta = dict(dataset_meta=dict(classes=classes.names, palette=classes.palette))
    write_whole(out / 'checkpoint.pth', partial(torch.save, dict(meta=meta, state_dict=weights)))
    for name, text in (('config.py', lines), ('train.py', anew)):
        write_whole(out / name, lambda path, text=text: path.write_text('\n'.join(text) + '\n'))
