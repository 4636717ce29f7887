"""Weights on other grids than they were trained on: positions, relative positions, patches.

Pure functions of a tensor.
"""

import math
from itertools import product
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from ..tokens.positions import resample_table
from ..tokens.token_map import Grid


def resample_positions(
    source: Tensor, pos_grid: Grid, mode: str, likely: Sequence[Grid] = (), square: bool = False
) -> Tuple[Tensor, Optional[str]]:
    """A source's position table on the model's grid.

    A table does not say its grid. The region grid of a gate beside it does; else as many cells as the model has are in
    the model's grid, and a square number of them in a square. Where both would do, as 576 cells in 18x32 and in 24x24,
    ``square`` chooses.

    Args:
        source: (1, extra + cells, C), where extra are the positions of cls and distillation tokens, 0 to 2 of them.
        pos_grid: (gh, gw) of the model.
        mode: interpolation mode.
        likely: those that the source may have by its gate, see :func:`grids_of_regions`.
        square: whether a square is likelier than the model's grid.

    Returns:
        (1, 1 + gh * gw, C), and what was done, None for nothing. Without a cls position in the source it is zero: the
        source adds none to its cls token.

    Raises:
        ValueError: the source's grid cannot be told.
    """
    pos_grid = tuple(pos_grid)
    extra, grid = source_grid(source.shape[1], pos_grid, likely, square)
    if grid == pos_grid and extra == 1:
        root = math.isqrt(grid[0] * grid[1])
        unsure = not likely and root**2 == grid[0] * grid[1] and grid[0] != grid[1]
        return source, f'is taken as {grid[0]}x{grid[1]}, not as {root}x{root}' if unsure else None
    cls = source[:, :1] if extra else torch.zeros_like(source[:, :1])
    cells = torch.cat((cls, source[:, extra:]), 1)
    if grid == pos_grid and extra == 0:
        return cells, 'without cls'
    how = f'{grid[0]}x{grid[1]} -> {pos_grid[0]}x{pos_grid[1]}' + ('' if extra == 1 else f', {extra} extra positions')
    if grid == pos_grid:
        return cells, how
    grid = cells[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()  # (1, C, gh, gw)
    return torch.cat((cells[:, :1].float(), resample_table(grid, pos_grid, mode).flatten(2).mT), 1), how


def source_grid(
    count: int, pos_grid: Optional[Grid] = None, likely: Sequence[Grid] = (), square: bool = False
) -> Tuple[int, Grid]:
    """Extra positions and grid of a table of so many positions; arguments and errors of :func:`resample_positions`."""
    for extra in (1, 0, 2):
        grids = [(h, w) for h, w in likely if h * w == count - extra]
        if pos_grid in grids:
            return extra, pos_grid
        if len(grids) == 1:
            return extra, grids[0]
    for extra in (1, 0, 2):
        cells = count - extra
        root = math.isqrt(max(cells, 0))
        found = [pos_grid] if pos_grid and cells == pos_grid[0] * pos_grid[1] else []
        found += [(root, root)] if root and root**2 == cells else []
        if found:
            return extra, found[-1 if square else 0]
    wanted = f'a square grid or of {pos_grid}' if pos_grid else 'a square grid'
    raise ValueError(
        f'checkpoint: wanted pos_embed of {wanted}, with at most 2 more tokens, got {count} '
        "positions. Set the backbone's img_size to the one that the checkpoint was trained with: positions are "
        'resampled for images of any other size'
    )


def grids_of_regions(regions: Grid, side: int) -> List[Grid]:
    """All (h, w) cells in (hc, wc) regions of so many cells a side, whose last row and column may be cut."""
    return list(product(*(range((n - 1) * side + 1, n * side + 1) for n in regions)))


def resample_relative(source: Tensor, window: Grid) -> Tensor:
    """A table of relative positions, as BEiT has it, for another window, as mmseg and BEiT themselves do it.

    Offsets near zero keep their bias, and those far off are drawn out: the known ones are laid at the partial sums of a
    geometric series that reaches the new table's end, and a cubic spline goes through them. A series for each axis, so
    that windows need not be square.

    Args:
        source: ((2 n - 1)^2 + 3, heads), of a square window.
        window: (Wh, Ww) that is wanted.

    Returns:
        ((2 Wh - 1) (2 Ww - 1) + 3, heads), the last three, of cls, unchanged.

    Raises:
        ValueError: the source's window is not square.
    """
    side = math.isqrt(max(len(source) - 3, 0))
    if side**2 != len(source) - 3 or side % 2 == 0:
        raise ValueError(
            f'checkpoint: wanted relative positions of a square window or of {tuple(window)}, got a table of '
            f"{len(source)}. Set the backbone's img_size to the one that the checkpoint was trained with: the bias of "
            'an offset holds for images of any other size'
        )
    places = [_geometric_places(side // 2, cells - 1) for cells in window]
    wanted = [range(1 - cells, cells) for cells in window]
    grids = source[:-3].float().T.unflatten(1, (side, side)).numpy()  # (heads, 2 n - 1, 2 n - 1)
    degree = min(3, side - 1)
    splines = (RectBivariateSpline(*places, grid, kx=degree, ky=degree) for grid in grids)
    resampled = [torch.from_numpy(spline(*wanted)).flatten() for spline in splines]
    return torch.cat((torch.stack(resampled, 1).to(source), source[-3:]))


def _geometric_places(count: int, end: int) -> List[float]:
    """-x_n ... 0 ... x_n, where x_i = 1 + q + ... + q^(i - 1) and x_n is about ``end``; q is 1.01 to 1.5."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > end:
            high = ratio
        else:
            low = ratio
    places = [sum(ratio**k for k in range(i)) for i in range(1, count + 1)]
    return [-x for x in reversed(places)] + [0.0, *places]


def repeat_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding for images of so many channels, as timm makes it of one for three.

    Channels are repeated in their order and scaled, so that tokens keep their size; for one channel they are summed,
    which gives a grey image the tokens that it has as a coloured one.

    Args:
        weight: (C, channels before, p, p).
        channels: that are wanted.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.repeat(1, -(-channels // before), 1, 1)[:, :channels]
    return (repeated.float() * (before / channels)).to(weight.dtype)


def resample_patch(weight: Tensor, size: Grid) -> Tensor:
    """A patch embedding for patches of another size, whose tokens stay as they are when patches are magnified.

    w' = pinv(B^T) w, where B resizes an old patch to a new one (FlexiViT, Beyer et al. 2023): rows, and columns.

    Args:
        weight: (C, channels, p, p).
        size: of the new patches.
    """
    units = [torch.eye(old, dtype=torch.float64)[None, None] for old in weight.shape[2:]]
    resized = [
        F.interpolate(e, size=(new, len(e[0, 0])), mode='bilinear', antialias=True) for e, new in zip(units, size)
    ]
    rows, columns = (torch.linalg.pinv(each[0, 0]) for each in resized)  # (old, new)
    return (rows.T @ weight.double() @ columns).to(weight.dtype)
