"""A gate for a trained dense segmentor: the weights of ViT and head stay, and no label is needed.

The dense model runs over images once (:func:`.dense_pass.gather`), which says how mixed every region is in its eyes. A
gate learns to foresee that from the pixels (:func:`fit`), and one threshold is set for a budget of tokens
(:func:`find_threshold`). :mod:`.conversion` makes the model before that, and writes it after.
"""

from collections import Counter
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from ..gates.doubt import doubt_scale, doubt_target, region_doubt
from ..tokens.selection import TokenSelector
from ..tokens.token_map import Grid, region_grid, shrunk_grid
from ..vit.mixed_scale import MixedScale
from .command_line import InputError
from .dense_pass import Example, Window, pixels

# Images smaller than this lost more than coarser regions did, at the two budgets where it was tried.
SMALLEST = 0.85
BATCH = 8
LEARNING_RATE = 1e-3


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

    Gates without weights are left as they are.

    Args:
        model: by :func:`.conversion.convert`.
        examples: by :func:`.dense_pass.gather`.
        windows: likewise.
        budget: the wanted share of the dense tokens: a gate is least sure where it has to decide.
        steps: of the optimizer, each of ``BATCH`` windows.
    """
    backbone, rng = model.backbone, np.random.default_rng(0)
    if not any(True for gate in backbone.gates for _ in gate.parameters()):
        return
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


def check_budget(backbone: MixedScale, windows: Sequence[Window], budget: float, input_scale: float) -> None:
    """Refuses a budget that even all coarse does not meet, before a gate is fitted.

    Args:
        backbone: with its levels and prefix.
        windows: by :func:`.dense_pass.gather`.
        budget: the share of the dense tokens, over all windows.
        input_scale: that the backbone will have.

    Raises:
        InputError: it cannot be met.
    """
    prefix = backbone.select.prefix
    select, tokens, dense = TokenSelector(backbone.sides, threshold=0.0, prefix=prefix).eval(), 0, 0
    for (h, w), count in Counter(tuple(window.shares.shape[1:]) for window in windows).items():
        grid = shrunk_grid((h, w), input_scale)
        zeros = [torch.zeros(1, *region_grid(grid, side)) for side in backbone.sides[1:]]  # all above the threshold
        gates = [lambda regions, left, answer=answer: answer for answer in zeros]
        tokens += count * sum(select(gates, grid)[0].lengths)
        dense += count * (h * w + prefix)
    if tokens > budget * dense:
        raise InputError(
            f'--budget: wanted at least {tokens / dense:.2f}, which is all coarse, got {budget:g}; more --scales allow '
            'less'
        )


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
        InputError: by :func:`check_budget`.
    """
    check_budget(backbone, windows, budget, backbone.input_scale)
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

    values = torch.cat([a.flatten() for levels in groups.values() for a in levels])
    threshold = highest_threshold(values, share, budget)
    return threshold, share(threshold)


def highest_threshold(logits: Tensor, cost: Callable[[float], float], most: float) -> float:
    """The highest threshold that costs at most so much; 0, all coarse, where none does.

    Args:
        logits: of all regions.
        cost: of a threshold; it does not fall where that rises.
        most: the cost that is allowed.
    """
    # A threshold between two values is as the lower of them: a region has to be above it.
    values = [0.0, *logits.sigmoid().unique().tolist(), 1.0]
    low, high = 0, len(values)  # the first is within the budget, what is at high or above is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(values[middle]) <= most else (low, middle)
    return between(values[low], values[min(high, len(values) - 1)])


def between(low: float, high: float) -> float:
    """The threshold that no region stands at: the middle of two probabilities, by float32, in which they are compared.

    On a region's own probability, a rounding elsewhere, as in an exported file, would turn the region over.
    """
    middle = float(np.float32((low + high) / 2))
    return middle if low < middle < high else low
