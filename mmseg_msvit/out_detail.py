"""What the cells of a coarse token have on the dense grid beside what it says of all of them."""

from itertools import product
from typing import Iterable, List, NamedTuple, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import PatchRows, area_mean, patches_at
from .positions import wide
from .tokens import Grid, PackedTokens, TokenMap
from .tracing import first

# At the mean difference of colour among the nine a neighbour counts for exp(-2) of what it does at none; chosen here.
SHARPNESS = 2.0
LEAST_DIFFERENCE = 1e-6


class Shares(NamedTuple):
    """What each cell takes of itself and of its eight neighbours.

    Attributes:
        step: cells between it and them.
        of: (9, B, 1, h, w), which add up to 1, by rows of neighbours.
    """

    step: int
    of: Tensor


def neighbour_shares(images: Tensor, tokens: TokenMap, patch: int, sides: Sequence[int]) -> List[Shares]:
    """What cells of coarse tokens take of their neighbours: for each coarse level, the coarsest first.

    Along both axes 1/4, 1/2, 1/4, which is linear interpolation where all tokens are 2 x 2 cells, times
    exp(-SHARPNESS * d / mean d), where d is the squared difference between a cell's mean colour and the mean colour of
    what its neighbour's token has seen. So a cell that is unlike its own token, since the gate was wrong there, takes
    more of a neighbour that it is like. After joint bilateral upsampling (Kopf, Cohen, Lischinski and Uyttendaele
    2007), the difference measured against those around, so that no contrast has to be known.

    Args:
        images: (B, C, H, W), padded to whole regions.
        tokens: which cover the cells.
        patch: pixels along a cell's side.
        sides: cells along a token's side at each level, beginning with 1.
    """
    own = area_mean(wide(images), patch)  # (B, C, hc * side, wc * side)
    level_of = tokens.to_grid(tokens.level.clamp(min=0)[:, None].to(own.dtype)).detach()  # (B, 1, h, w)
    colours, found = _cells(own, tokens.grid), []
    seen = [colours]  # what tokens of each level see there
    for side in sides[1:]:
        mean = area_mean(own, side).repeat_interleave(side, 2).repeat_interleave(side, 3)
        seen.append(_cells(mean, tokens.grid))
    for level in range(len(sides) - 1, 0, -1):
        guide, step = seen[0], sides[level] // 2
        for finer in range(1, level + 1):
            guide = torch.where(level_of >= finer, seen[finer], guide)
        places = list(product((-step, 0, step), repeat=2))
        apart = torch.stack([(colours - _moved(guide, *place)).square().mean(1, keepdim=True) for place in places])
        near = torch.tensor([(2 - (y != 0)) * (2 - (x != 0)) / 16 for y, x in places], device=apart.device)
        like = torch.exp(-SHARPNESS * apart / apart.mean(0).clamp(min=LEAST_DIFFERENCE))
        of = near.to(like.dtype)[:, None, None, None, None] * like
        of = of / of.sum(0)
        coarse = tokens.to_grid((tokens.level >= level)[:, None].to(own.dtype))  # 0 or 1, with the gate's gradient
        alone = (torch.arange(9, device=of.device) == 4).to(of.dtype)[:, None, None, None, None]
        found.append(Shares(step, alone + (of - alone) * coarse))
    return found


def mix(output: Union[Tensor, PackedTokens, list], shares: Sequence[Shares]) -> Union[Tensor, PackedTokens, list]:
    """An output of which each cell takes its shares: a grid (B, C, h, w), or [such a grid, cls]."""
    if not shares:
        return output
    grid, *cls = output if isinstance(output, list) else [output]
    for step, of in shares:
        places = product((-step, 0, step), repeat=2)
        grid = sum(part.to(grid.dtype) * _moved(grid, *place) for part, place in zip(of, places))
    return [grid, *cls] if cls else grid


def _cells(colours: Tensor, grid: Grid) -> Tensor:
    return first(first(colours, grid[0], 2), grid[1], 3)


def _moved(x: Tensor, rows: int, columns: int) -> Tensor:
    """What lies so many cells below and to the right of each; beyond the edge it is the last one."""
    for dim, by in ((2, rows), (3, columns)):
        if by:
            place = torch.arange(x.shape[dim], device=x.device)
            x = x.index_select(dim, torch.minimum((place + by).clamp(min=0), place[-1]))
    return x


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
