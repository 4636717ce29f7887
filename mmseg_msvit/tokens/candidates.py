"""The tokens that an image can have: its candidates, in one fixed order, and maps of those of one level.

First its prefix (cls token, registers), then a token for each region of each coarse level, coarsest first, then a fine
token for each cell, all in raster order.
"""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from .token_map import Grid, TokenMap, padded_rows, region_grid, region_of_cell
from .tracing import remembered, traced


@remembered
def candidates(grid: Grid, sides: Tuple[int, ...], prefix: int, device: torch.device) -> Tuple[Tensor, Tensor, Tensor]:
    """Level (T,), center (T, 2) and size (T,) of an image's candidates, as in :class:`TokenMap`."""
    levels, centers, sizes = [torch.full((prefix,), -1)], [torch.zeros(prefix, 2)], [torch.zeros(prefix)]
    for level in reversed(range(len(sides))):
        axes = []
        for cells in grid:
            begin = torch.arange(0, cells, sides[level])
            end = (begin + sides[level]).clamp(max=cells)
            axes.append(((begin + end) / 2, end - begin))
        (y, height), (x, width) = axes
        centers.append(torch.cartesian_prod(y, x))
        sizes.append((height[:, None] * width).flatten().float())
        levels.append(torch.full((centers[-1].shape[0],), level))
    return tuple(torch.cat(parts).to(device) for parts in (levels, centers, sizes))


def candidate_number(tokens: TokenMap, sides: Tuple[int, ...]) -> Tensor:
    """(N,) int64, the number of each token among the candidates of its image after the prefix; -1 for a prefix row."""
    rasters = _rasters(tokens.grid, sides, tokens.level.device)  # (levels, 3)
    side, width, begin = rasters[tokens.level.clamp(min=0)].unbind(1)
    place = tokens.center.div(side[:, None], rounding_mode='floor').long()  # (N, 2)
    return torch.where(tokens.level < 0, -1, begin + place[:, 0] * width + place[:, 1])


@remembered
def _rasters(grid: Grid, sides: Tuple[int, ...], device: torch.device) -> Tensor:
    """(levels, 3) int64, the finest level first: a token's side, tokens in a row, and the first one's number."""
    rows, begin = [], 0
    for side in reversed(sides):
        hc, wc = region_grid(grid, side)
        rows.append((side, wc, begin))
        begin += hc * wc
    return torch.tensor(rows[::-1], device=device)


def uniform_tokens(
    sides: Sequence[int], level: int, prefix: int, images: int, grid: Grid, device: torch.device
) -> TokenMap:
    """The map of images whose tokens are all of one level.

    Args:
        sides: as :class:`TokenSelector` has them.
        level: 0 for all fine.
        prefix: rows before each image's tokens.
        images: how many.
        grid: (h, w), the fine cells of each.
        device: where the map is.
    """
    side = sides[level]
    regions = [hc * wc for hc, wc in (region_grid(grid, s) for s in sides[level:])]
    length, begin = prefix + regions[0], prefix + sum(regions[1:])
    candidate = torch.arange(length, device=device)
    candidate = torch.where(candidate < prefix, candidate, candidate - prefix + begin)
    levels, center, size = (values[candidate] for values in candidates(tuple(grid), tuple(sides), prefix, device))
    cu_seqlens = length * torch.arange(images + 1, device=device)
    cover = cu_seqlens[:-1, None] + prefix + region_of_cell(grid, side, device)  # (B, h * w)
    return TokenMap(
        grid=tuple(grid),
        lengths=None if traced() else [length] * images,
        cu_seqlens=cu_seqlens.int(),
        prefix=prefix,
        level=levels.repeat(images),
        center=center.repeat(images, 1),
        size=size.repeat(images),
        cover=cover.unflatten(1, grid)[None],
        padded=padded_rows(cu_seqlens.int(), length, images * length) if traced() else None,
    )
