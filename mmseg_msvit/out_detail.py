"""What the cells of a coarse token have on the dense grid beside what it says of all of them."""

from typing import Iterable, List, NamedTuple, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import PatchRows, area_mean, patches_at
from .positions import wide
from .tokens import PackedTokens, TokenMap
from .tracing import first

# At the mean difference of colour among the nine, a cell counts for exp(-2) of what it does at none; chosen here.
SHARPNESS = 2.0
# Squared, of normalised colours: about 2 of 256 grey levels, as noise has them, are no difference.
LEAST_DIFFERENCE = 1e-3


class Shares(NamedTuple):
    """What each cell of a coarse token takes of the nine cells around it, itself among them.

    Attributes:
        step: cells between it and the others.
        of: (9, B, 1, h, w), row by row, which add up to 1.
        coarse: (B, 1, h, w), 1 where there is such a token and 0 elsewhere, with the gate's gradient where it learns.
    """

    step: int
    of: Tensor
    coarse: Tensor


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
    colours = area_mean(wide(images), patch)  # (B, C, hc * side, wc * side)
    level_of = tokens.to_grid(tokens.level.clamp(min=0)[:, None].to(colours.dtype)).detach()  # (B, 1, h, w)
    seen = [colours]  # by tokens of each level
    for side in sides[1:]:
        seen.append(area_mean(colours, side).repeat_interleave(side, 2).repeat_interleave(side, 3))
    seen = [first(first(colour, tokens.grid[0], 2), tokens.grid[1], 3) for colour in seen]  # (B, C, h, w)
    axis = torch.tensor([0.25, 0.5, 0.25], device=colours.device, dtype=colours.dtype)
    near = torch.outer(axis, axis).view(9, 1, 1, 1, 1)
    found = []
    for level in range(len(sides) - 1, 0, -1):
        guide = seen[0]
        for finer in range(1, level + 1):
            guide = torch.where(level_of >= finer, seen[finer], guide)
        apart = [(seen[0] - other).square().mean(1, keepdim=True) for other in _around(guide, sides[level] // 2)]
        apart = torch.stack(apart)  # (9, B, 1, h, w)
        of = near * torch.exp(-SHARPNESS * apart / apart.mean(0).clamp(min=LEAST_DIFFERENCE))
        coarse = tokens.to_grid((tokens.level >= level)[:, None].to(of.dtype))
        found.append(Shares(sides[level] // 2, of / of.sum(0), coarse))
    return found


def mix(output: Union[Tensor, PackedTokens, list], shares: Sequence[Shares]) -> Union[Tensor, PackedTokens, list]:
    """An output of which each cell takes its shares: a grid (B, C, h, w), or [such a grid, cls]."""
    if not shares:
        return output
    grid, *cls = output if isinstance(output, list) else [output]
    mixed = wide(grid)
    for step, of, coarse in shares:
        mixed = mixed + (sum(part * other for part, other in zip(of, _around(mixed, step))) - mixed) * coarse
    mixed = mixed.to(grid.dtype)
    return [mixed, *cls] if cls else mixed


def _around(x: Tensor, step: int) -> List[Tensor]:
    """The nine (B, C, h, w) around each cell, so many cells away, row by row; beyond the edge is what is there last."""
    h, w = x.shape[2:]
    padded = F.pad(x, (step,) * 4, mode='replicate')
    return [padded[..., y : y + h, z : z + w] for y in (0, step, 2 * step) for z in (0, step, 2 * step)]


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
