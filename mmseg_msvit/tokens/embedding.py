"""Pixels to tokens: patches of every scale through one projection."""

from functools import reduce
from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import wide
from .token_map import Grid, TokenMap, region_grid, shrunk_grid
from .tracing import first, traced


def shrink(images: Tensor, patch: int, scale: float) -> Tensor:
    """Images (B, C, H, W), smaller by a factor in (0, 1], to whole cells of ``patch`` pixels; with 1 as they are."""
    if scale == 1:
        return images
    size = [cells * patch for cells in shrunk_grid(region_grid(images.shape[2:], patch), scale)]
    return F.interpolate(wide(images), size, mode='bilinear', antialias=True).to(images.dtype)


def pad_to_regions(images: Tensor, patch: int, side: int) -> Tuple[Tensor, Grid]:
    """Pads images with zeros, right and bottom, to whole regions.

    Args:
        images: (B, C, H, W).
        patch: pixels along a cell's side.
        side: cells along the side of the coarsest region.

    Returns:
        The padded images and (h, w) = (ceil(H / patch), ceil(W / patch)), the cells that hold a pixel of the image.
    """
    height, width = images.shape[-2:]
    grid = region_grid((height, width), patch)
    hc, wc = region_grid(grid, side)
    right, below = wc * patch * side - width, hc * patch * side - height
    if not traced() and right == below == 0:
        return images, grid  # padding copies in any case
    return F.pad(images, (0, right, 0, below)), grid


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images (B, C, h * patch, w * patch) into rows (B, h, w, C * patch * patch), a convolution weight's order."""
    return _cells(images, patch).flatten(-3)


def patches_at(images: Tensor, patch: int, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The rows (..., C * patch * patch) of :func:`patchify` at places (...): int64 images, rows and columns."""
    return _cells(images, patch)[image, y, x].flatten(-3)


def _cells(images: Tensor, patch: int) -> Tensor:
    """A view of images (B, C, h * patch, w * patch) as (B, h, w, C, patch, patch)."""
    b, c, height, width = images.shape
    return images.view(b, c, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)


def candidate_patches(images: Tensor, patch: int, sides: Sequence[int], grid: Grid) -> Tensor:
    """The patches of all tokens that an image can have, the coarsest level first: (B, T, C * patch * patch).

    Args:
        images: (B, C, H, W), padded to whole regions.
        patch: pixels along a cell's side.
        sides: cells along a token's side at each level, beginning with 1.
        grid: (h, w), the cells that hold a pixel of the image.
    """
    levels = []
    for side in reversed(sides):
        h, w = region_grid(grid, side)
        rows = patchify(images if side == 1 else area_mean(images, side), patch)
        levels.append(first(first(rows, h, 1), w, 2).flatten(1, 2))  # (B, h * w of the level, P)
    return torch.cat(levels, 1)


def area_mean(images: Tensor, side: int) -> Tensor:
    """Means of side * side pixels: (B, C, H, W) to (B, C, H / side, W / side).

    What ``avg_pool2d`` does, by rows and then by columns: a sixth of its time on 2 CPU cores at 512x512.
    """
    rows = reduce(torch.add, (images[..., i::side, :] for i in range(side)))  # (B, C, H / side, W)
    return reduce(torch.add, (rows[..., i::side] for i in range(side))) / side**2


def mean_weights(cells: int, windows: int, like: Tensor) -> Tensor:
    """(windows, cells), in the type of a tensor: the means of equal windows, those of adaptive average pooling."""
    number = torch.arange(windows, device=like.device)[:, None]
    begin, end = number * cells // windows, ((number + 1) * cells + windows - 1) // windows
    cell = torch.arange(cells, device=like.device)
    return ((cell >= begin) & (cell < end)).to(like.dtype) / (end - begin)


class PatchRows(nn.Module):
    """A library's patch embedding, over rows of pixels in place of an image: of tokens that are kept, and no others.

    Args:
        patch_embed: with a convolution ``projection`` whose stride is its kernel, and perhaps a ``norm``; both stay
            where they are in the state dict.
    """

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.embed_dims = patch_embed.embed_dims
        self.projection = patch_embed.projection
        self.norm = patch_embed.norm

    def forward(self, patches: Tensor) -> Tensor:
        """(..., P) to (..., C)."""
        x = F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)
        return x if self.norm is None else self.norm(x)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of so many patches."""
        return tokens * self.projection.weight.numel()


class CoarseDetail(nn.Conv2d):
    """Added to a coarse token: a convolution, at first zero, of the embeddings of its cells.

    Chosen here, after adaptive patch transformers.

    Args:
        dims: C.
        side: cells along the token's side.
    """

    def __init__(self, dims: int, side: int):
        super().__init__(dims, dims, side, side)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def add_detail(
    x: Tensor, images: Tensor, tokens: TokenMap, level: int, patch: int, embed: PatchRows, detail: CoarseDetail
) -> Tensor:
    """Adds to a level's rows of x (N, C) what its detail makes of their cells; cells beyond the grid count zero.

    Args:
        x: (N, C).
        images: (B, C, H, W), padded to whole regions.
        tokens: where the rows are.
        level: a coarse one.
        patch: pixels along a cell's side.
        embed: the patch embedding.
        detail: of the level.
    """
    side = detail.stride[0]
    row = (tokens.level == level).nonzero().flatten()  # (M,)
    place = tokens.center[row].div(side, rounding_mode='floor').long()  # (M, 2)
    cell = torch.arange(side, device=x.device)
    y = (place[:, :1] * side + cell)[:, :, None]  # (M, side, 1)
    xs = (place[:, 1:] * side + cell)[:, None]  # (M, 1, side)
    inside = ((y < tokens.grid[0]) & (xs < tokens.grid[1])).to(x.dtype)  # (M, side, side)
    cells = embed(patches_at(images, patch, tokens.image[row][:, None, None], y, xs))  # (M, side, side, C)
    added = detail((cells * inside[..., None]).permute(0, 3, 1, 2)).flatten(1)  # (M, C)
    return x.index_add(0, row, added.to(x.dtype))
