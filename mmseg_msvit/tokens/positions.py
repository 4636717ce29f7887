"""Where tokens are, for each way that ViTs have of saying it: a table, rotary positions, relative bias.

All are defined for a fine cell, and follow for a coarser token from the cells that it covers.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_map import Grid, TokenMap
from .tracing import traced

# The table's own modes, and bicubic with antialiasing, as DINOv2 with registers and timm resample.
ANTIALIAS = '-antialias'


def wide(x: Tensor) -> Tensor:
    """As float32 where it is less: what interpolates has no half-precision kernel on CPUs, and loses digits in one."""
    return x if x.dtype == torch.float64 else x.float()


def resample_table(table: Tensor, size: Grid, mode: str) -> Tensor:
    """A table of positions, or of what else lies on a grid, (1, C, gh, gw), on another one: (1, C, h, w).

    Args:
        table: the values.
        size: (h, w).
        mode: of :func:`torch.nn.functional.interpolate`; with ``-antialias`` after it, smoothed where it shrinks.
    """
    if traced():
        return resample_by_products(wide(table), size, mode).to(table.dtype)
    if tuple(table.shape[2:]) == tuple(size):
        return table
    return _interpolate(table, tuple(size), mode).to(table.dtype)


def resample_by_products(table: Tensor, size: Grid, mode: str) -> Tensor:
    """:func:`resample_table` for runtimes, which are slow at resizing hundreds of channels: by rows and by columns.

    Every mode is separable: what it makes of a unit matrix are its weights along one axis.
    """
    rows, columns = (
        _interpolate(torch.eye(n, dtype=table.dtype, device=table.device)[None, None], (cells, n), mode)
        for n, cells in zip(table.shape[2:], size)
    )  # (1, 1, h, gh) and (1, 1, w, gw)
    return rows @ table @ columns.mT


def _interpolate(table: Tensor, size: Grid, mode: str) -> Tensor:
    antialias = mode.endswith(ANTIALIAS)
    mode = mode[: -len(ANTIALIAS)] if antialias else mode
    align = None if mode in ('nearest', 'area', 'nearest-exact') else False
    return F.interpolate(wide(table), size=size, mode=mode, align_corners=align, antialias=antialias)


def table_positions(pos_embed: Tensor, pos_grid: Grid, grid: Grid, sides: Sequence[int], mode: str) -> Tensor:
    """Positions of every token that an image can have.

    The table is resampled to the image's grid as mmseg's ViT does it, but whenever (h, w) differ, not only their
    product. A coarse position is the mean over the region's cells, at an odd edge over those that exist.

    Args:
        pos_embed: (1, 1 + gh * gw, C), cls first.
        pos_grid: (gh, gw) of the table.
        grid: (h, w) of the image.
        sides: cells along a token's side at each level, beginning with 1.
        mode: interpolation mode.

    Returns:
        (T + 1, C), coarsest level first, each in raster order, and cls last.
    """
    cells = pos_embed[:, 1:].unflatten(1, pos_grid).permute(0, 3, 1, 2)  # (1, C, gh, gw), channels last: it pools fast
    cells = resample_table(cells, grid, mode).contiguous(memory_format=torch.channels_last)
    # Divides by what exists; ONNX wants to be told so in two ways.
    pooled = partial(F.avg_pool2d, cells, ceil_mode=True, count_include_pad=False)
    levels = [pooled(side) for side in reversed(sides[1:])]
    return torch.cat([level[0].flatten(1).T for level in (*levels, cells)] + [pos_embed[0, :1]])


def rotary(tokens: TokenMap, dims: int) -> Tuple[Tensor, Tensor]:
    """Sin and cos of each token's angles, from its centre, as in DINOv3 (Simeoni et al. 2025).

    The angle is 2 pi (2 c / H - 1) / 100^(4 i / d) for the centre c in cells of H and i < d / 4, of rows and then of
    columns, and all of it once more: entries i and i + d / 2 of a head make a pair. Prefix rows are not rotated.

    Args:
        tokens: of a batch.
        dims: d, of a head.

    Returns:
        (N, 1, d) each, float32.
    """
    frequency = torch.arange(dims // 4, device=tokens.center.device) * (4 / dims)
    extent = torch.tensor(tokens.grid, dtype=tokens.center.dtype, device=tokens.center.device)
    angle = 2 * math.pi * (2 * tokens.center / extent - 1)[:, :, None] / 100.0**frequency  # (N, 2, d / 4)
    angle = angle.flatten(1).repeat(1, 2)  # (N, d)
    angle = torch.where(tokens.level[:, None] < 0, 0, angle)[:, None]  # (N, 1, d)
    return angle.sin(), angle.cos()


def rotate(qkv: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotates queries and keys, and leaves values: (N, 3, heads, d) to the same."""
    qk, v = qkv[:, :2], qkv[:, 2:]
    first, second = qk.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    sin, cos = sin[:, None], cos[:, None]  # (N, 1, 1, d)
    return torch.cat(((qk * cos + turned * sin).to(qkv.dtype), v), 1)


@dataclass(frozen=True)
class Relative:
    """Relative positions of the tokens of each image, for tables as BEiT has them.

    The bias of two tokens is the mean over the pairs of cells that they cover. Along each axis that is a filter of the
    table which depends on both extents alone: [1, 1] / 2 between one cell and two, [1, 2, 1] / 4 between two and two.
    So each pair of extents has a filtered table, and each pair of tokens one row in it.

    Attributes:
        window: (Wh, Ww), the cells that the table is for.
        grid: (h, w) of the images. Tables are cut, or continued by their edge, so that an offset keeps its bias.
        filters: for both axes (E * E, D, D), a matrix for each pair of extents; D = 2 h - 1 or 2 w - 1 offsets.
        index: of each image (n, n) int64, rows of the filtered table; queries are rows. In a traced model of all images
            at once, (B, n, n).
    """

    window: Grid
    grid: Grid
    filters: Tuple[Tensor, Tensor]
    index: List[Tensor]

    @staticmethod
    def of(tokens: TokenMap, window: Grid, sides: Sequence[int]) -> 'Relative':
        """Indexes all pairs of tokens; for tokens that are squares of cells, cut at the grid's edge."""
        device = tokens.level.device
        side = torch.tensor(sides, device=device)[tokens.level.clamp(min=0)]  # (N,)
        filters, offsets, kinds = [], [], []
        for axis, cells in enumerate(tokens.grid):
            if traced():
                extents = range(1, sides[-1] + 1)
            else:
                extents = sorted({s for s in sides if s <= cells} | {cells % s for s in sides if cells % s})
            extents = torch.tensor(extents, device=device)  # (E,)
            filters.append(_mean_over(extents, 2 * cells - 1))
            begin = tokens.center[:, axis].div(side, rounding_mode='floor').long() * side  # (N,)
            extent = torch.minimum(side, cells - begin)
            extent = (extent[:, None] > extents).sum(1)  # its number
            kinds.append(
                [part[..., :, None] * extents.shape[0] + part[..., None, :] for part in tokens.by_image(extent)]
            )
            offsets.append([part[..., :, None] - part[..., None, :] + cells - 1 for part in tokens.by_image(begin)])
        (rows_y, height, _), (rows_x, width, _) = (f.shape for f in filters)
        end = rows_y * rows_x * height * width
        index = []
        for ky, kx, dy, dx, level in zip(*kinds, *offsets, tokens.by_image(tokens.level)):
            pairs = ((ky * rows_x + kx) * height + dy) * width + dx  # (n, n)
            query, key = level[..., :, None] < 0, level[..., None, :] < 0
            # The table ends with the bias of cls as a query, as a key, and as both; registers take it too.
            pairs = torch.where(query, end, pairs)
            pairs = torch.where(key, torch.where(query, end + 2, end + 1), pairs)
            index.append(pairs)
        return Relative(tuple(window), tokens.grid, tuple(filters), index)

    def filter(self, table: Tensor) -> Tensor:
        """A layer's table ((2 Wh - 1) (2 Ww - 1) + 3, heads) to the one that is indexed, (rows, heads)."""
        offsets, cls = table[:-3].unflatten(0, [2 * cells - 1 for cells in self.window]), table[-3:]
        for axis, (cells, known) in enumerate(zip(self.grid, self.window)):
            near = torch.arange(1 - cells, cells, device=table.device).clamp(1 - known, known - 1)
            offsets = offsets.index_select(axis, near + known - 1)
        filtered = torch.einsum('pab,qcd,bdh->pqach', *(f.to(table.dtype) for f in self.filters), offsets)
        return torch.cat((filtered.flatten(0, 3), cls))


def _mean_over(extents: Tensor, offsets: int) -> Tensor:
    """The filters of all pairs of extents (E,), (E * E, D, D): the mean over offsets d + i - j for i < a and j < b."""
    a, b = extents[:, None, None, None], extents[None, :, None, None]
    number = torch.arange(offsets, device=extents.device)
    apart = number - number[:, None]  # (D, D), i - j
    pairs = torch.minimum(a, b + apart) - apart.clamp(min=0)  # of i and j that are so far apart
    return (pairs.clamp(min=0) / (a * b)).flatten(0, 1)
