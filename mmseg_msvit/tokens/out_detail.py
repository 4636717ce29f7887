"""What the cells of a coarse token have on the dense grid beside what it says of all of them."""

from typing import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import PatchRows, patches_at
from .token_map import TokenMap


def smooth_coarse(grid: Tensor, tokens: TokenMap, sides: Sequence[int]) -> Tensor:
    """Blends coarse tokens with their neighbours; copied into each of their cells, they would meet in hard edges.

    A cell of a coarse token becomes 1/4, 1/2, 1/4 of itself and its neighbours, along both axes: where all tokens are
    2 x 2 cells, this is the linear interpolation of their grid. Larger ones go first, by steps of half their side, of
    half that, and so on down to the side of the next smaller ones. Chosen here: the paper copies.

    Args:
        grid: (B, C, h, w), by :meth:`TokenMap.to_grid`.
        tokens: whose.
        sides: cells along a token's side at each level, beginning with 1; empty to leave all as it is.

    Returns:
        (B, C, h, w), the same in the cells of fine tokens.
    """
    for level in range(len(sides) - 1, 0, -1):
        coarse = tokens.to_grid((tokens.level >= level)[:, None].to(grid.dtype))  # (B, 1, h, w), 0 or 1
        step = sides[level] // 2
        while step >= sides[level - 1]:
            grid = grid + (_among_neighbours(grid, step) - grid) * coarse
            step //= 2
    return grid


def _among_neighbours(grid: Tensor, step: int) -> Tensor:
    """1/4, 1/2, 1/4 of the cells (B, C, h, w) and those some steps before and after them, or the border's."""
    for dim in (2, 3):
        n = grid.shape[dim]
        first, last = grid.narrow(dim, 0, 1), grid.narrow(dim, n - 1, 1)
        padded = torch.cat([first] * step + [grid] + [last] * step, dim)
        grid = (padded.narrow(dim, 0, n) + padded.narrow(dim, 2 * step, n)) / 4 + grid / 2
    return grid


class ZeroLinear(nn.Linear):
    """A linear layer that is zero at first, so that what it is added to is as it was."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def add_out_detail(
    outputs: Sequence, images: Tensor, tokens: TokenMap, patch: int, embed: PatchRows, details: Iterable[ZeroLinear]
) -> tuple:
    """Adds to each output what its detail makes of the cells that coarse tokens cover, as they weigh there.

    Args:
        outputs: grids (B, C, h, w), or [such a grid, cls].
        images: (B, C, H, W), padded to whole regions.
        tokens: which cover the cells.
        patch: pixels along a cell's side.
        embed: the patch embedding.
        details: one for each output.
    """
    coarse = (tokens.level > 0)[:, None].to(images.dtype)  # (N, 1)
    kept = F.pad(coarse, (0, 0, 0, 1))[tokens.cover].amax((0, 4)) > 0  # (B, h, w), covered by one, active or not
    image, y, x = kept.nonzero().unbind(1)  # (M,) each
    cells = embed(patches_at(images, patch, image, y, x))  # (M, C)
    weight = tokens.to_grid(coarse)[image, :, y, x]  # (M, 1), 0 or 1, with the gate's gradient where it learns
    found = []
    for detail, output in zip(details, outputs):
        grid, *cls = output if isinstance(output, list) else [output]
        added = (detail(cells) * weight).to(grid.dtype)
        grid = grid + torch.zeros_like(grid.permute(0, 2, 3, 1)).index_put((image, y, x), added).permute(0, 3, 1, 2)
        found.append([grid, *cls] if cls else grid)
    return tuple(found)
