"""Pixels to tokens: patches of both scales through one projection, and positions for both from one table."""

from functools import reduce
from typing import Tuple

import torch
import torch.nn.functional as F
from mmseg.models.backbones import VisionTransformer
from torch import Tensor

Grid = Tuple[int, int]


def pad_to_regions(images: Tensor, patch: int, side: int) -> Tuple[Tensor, Grid]:
    """Pads images with zeros, right and bottom, to whole regions.

    Args:
        images: (B, C, H, W).
        patch: pixels along a cell's side.
        side: cells along a region's side.

    Returns:
        The padded images and (h, w) = (ceil(H / patch), ceil(W / patch)), the cells that hold a pixel of the image.
    """
    height, width = images.shape[-2:]
    region = patch * side
    padded = F.pad(images, (0, -width % region, 0, -height % region))
    return padded, (-(-height // patch), -(-width // patch))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images (B, C, h * patch, w * patch) into rows (B, h, w, C * patch * patch), a convolution weight's order."""
    b, c, height, width = images.shape
    cells = images.view(b, c, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, height // patch, width // patch, -1)


def area_mean(images: Tensor, side: int) -> Tensor:
    """Means of side * side pixels: (B, C, H, W) to (B, C, H / side, W / side).

    What ``avg_pool2d`` does, by rows and then by columns: a sixth of its time on 2 CPU cores at 512x512.
    """
    rows = reduce(torch.add, (images[..., i::side, :] for i in range(side)))  # (B, C, H / side, W)
    return reduce(torch.add, (rows[..., i::side] for i in range(side))) / side**2


def position_tables(pos_embed: Tensor, table: Grid, grid: Grid, side: int, mode: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Positions of cls, coarse and fine tokens.

    The table is resampled to the image's grid as mmseg's ViT does it, but whenever (h, w) differ, not only their
    product. A coarse position is the mean over the region's cells, at an odd edge over those that exist.

    Args:
        pos_embed: (1, 1 + gh * gw, C), cls first.
        table: (gh, gw).
        grid: (h, w) of the image.
        side: cells along a region's side.
        mode: interpolation mode.

    Returns:
        (1, C) cls, (hc * wc, C) coarse and (h * w, C) fine positions.
    """
    if tuple(grid) != tuple(table):
        pos_embed = VisionTransformer.resize_pos_embed(pos_embed, grid, table, mode)
    cls, fine = pos_embed[0, :1], pos_embed[0, 1:]
    cells = fine.unflatten(0, (1, *grid)).permute(0, 3, 1, 2)  # (1, C, h, w), channels_last, which pools fast
    coarse = F.avg_pool2d(cells, side, ceil_mode=True)  # (1, C, hc, wc), which divides by the cells that exist
    return cls, coarse[0].flatten(1).T, fine
