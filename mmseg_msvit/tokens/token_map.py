"""What a tokenisation is: a map from cells to rows, and the way between packed tokens and the grid of cells.

A :class:`TokenMap` says which row of a pack covers each cell; it knows neither gates nor scales. The tokens of a batch
lie one after the other, image after image, in one pack of N rows without padding.
"""

from dataclasses import dataclass, replace
from typing import Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = Tuple[int, int]


@dataclass(frozen=True)
class TokenMap:
    """The tokens of a batch, without their features: a map between the cells of B grids and the N rows of a pack.

    Attributes:
        grid: (h, w), the fine cells of each image.
        lengths: B ints on the host, the number of rows of each image; None in a traced model, which cannot know them.
        cu_seqlens: (B + 1,) int32, the row of the pack where each image begins, and N at the end.
        prefix: leading rows of each image that cover no cell: the cls token and registers.
        level: (N,) int64, -1 for a prefix row, 0 for a fine token, 1 and more for coarser ones.
        center: (N, 2) float32, (y, x) of the mean of a token's cells, in cells: that of the first cell is 0.5, 0.5.
        size: (N,) float32, the number of cells that a token covers; 0 for a prefix row.
        cover: (K, B, h, w) int64, the rows that make up each cell. K = 1 where each cell has one row. Else inactive
            tokens are kept too, each cell has K candidates, and one that is not kept is row N, which stands for zeros.
        weight: (N,) float32 or None. Value 1 for an active token, 0 for an inactive one, with the gradient of the
            token's soft value (straight-through). None where no gate gets a gradient.
        dense_grid: the fine cells of each image before the backbone reduced it; None where it did not.
        padded: (B, n) int64 in a traced model, in the place of ``lengths``: the rows of each image, and N, which stands
            for nothing, after the last one of those that have fewer than n. None else.
    """

    grid: Grid
    lengths: Optional[List[int]]
    cu_seqlens: Tensor
    prefix: int
    level: Tensor
    center: Tensor
    size: Tensor
    cover: Tensor
    weight: Optional[Tensor] = None
    dense_grid: Optional[Grid] = None
    padded: Optional[Tensor] = None

    @property
    def images(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def masked(self) -> bool:
        """Whether inactive tokens are in the pack, so that attention has to weigh its keys."""
        return len(self.cover) > 1

    @property
    def image(self) -> Tensor:
        """(N,) int64, the image that each row belongs to."""
        return self._image(self.cu_seqlens, self.level.shape[0])

    def _image(self, cu_seqlens: Tensor, rows: int) -> Tensor:
        if self.padded is not None:  # ONNX does not repeat by a number that it does not know
            row = torch.arange(rows, device=cu_seqlens.device)
            return (row[:, None] >= cu_seqlens[1:]).sum(1)
        return torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)

    @property
    def dense_length(self) -> int:
        """Rows that an image has in the dense ViT, which does not reduce it."""
        h, w = self.dense_grid or self.grid
        return h * w + self.prefix

    def active_counts(self, level: Optional[int] = None) -> Tensor:
        """(B,) int64, the active rows of each image, prefix included: what the image costs at test time.

        Args:
            level: counts the tokens of this level alone.
        """
        counted = torch.ones_like(self.level, dtype=torch.bool) if level is None else self.level == level
        if self.masked:
            counted = counted & (self.weight > 0.5)
        return counted.new_zeros(self.images, dtype=torch.long).index_add_(0, self.image, counted.long())

    def levels(self) -> Tensor:
        """(B, h, w) int64, the level of the token that covers each cell, where each cell has one."""
        return self.level[self.cover[0]]

    def by_image(self, x: Tensor) -> List[Tensor]:
        """Rows (N, ...) of each image, (n, ...); in a traced model of all, (B, n, ...), with any row for padding."""
        if self.padded is None:
            return list(x.split(self.lengths))
        return [x[self.padded.clamp(max=x.shape[0] - 1)]]

    def padded_places(self) -> Tensor:
        """(N,) int64 in a traced model, where each row of the pack lies among the (B * n) of :meth:`by_image`."""
        row, image = torch.arange(self.level.shape[0], device=self.level.device), self.image
        return image * self.padded.shape[1] + row - self.cu_seqlens[image]

    def against(self, x: Tensor, queries: Tensor) -> Tensor:
        """Products of each row with the queries of its image: (N, C) and (B, K, C) to (N, K)."""
        if self.padded is None:
            return torch.cat([part @ own.T for part, own in zip(self.by_image(x), queries)])
        (rows,) = self.by_image(x)  # (B, n, C)
        return (rows @ queries.mT).flatten(0, 1)[self.padded_places()]

    def prefix_rows(self) -> Tensor:
        """(B, prefix) int64, the rows of each image's cls token and registers."""
        return self.cu_seqlens[:-1, None].long() + torch.arange(self.prefix, device=self.cu_seqlens.device)

    def covering_rows(self, count: int) -> Tensor:
        """(M,) int64, the rows that cover cells, of which there are ``count``."""
        before = self.prefix * torch.arange(self.images + 1, device=self.cu_seqlens.device)  # prefix rows of images
        image = self._image(self.cu_seqlens - before, count)
        return torch.arange(count, device=image.device) + before[1:][image]

    def to_grid(self, x: Tensor) -> Tensor:
        """Puts packed tokens back on the dense grid: a coarse token is replicated over its cells.

        Where tokens carry weights, a cell is the sum of its candidates, each times its weight, straight-through.

        Args:
            x: (N, C) features.

        Returns:
            (B, C, h, w), contiguous.
        """
        if self.weight is not None:
            x = x * self.weight[:, None].to(x.dtype)
        if self.masked:
            x = F.pad(x, (0, 0, 0, 1))  # (N + 1, C)
        cells = x[self.cover[0]]  # (B, h, w, C)
        for rows in self.cover[1:]:
            cells = cells + x[rows]
        return cells.permute(0, 3, 1, 2).contiguous()  # (B, C, h, w)

    def from_grid(self, cells: Tensor) -> Tensor:
        """The mean over each token's cells: (B, C, h, w) to (N, C), zero in the prefix rows."""
        cells = cells.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * h * w, C)
        total = cells.new_zeros(self.level.shape[0] + 1, cells.shape[1])
        for rows in self.cover:
            total = total.index_add(0, rows.flatten(), cells)
        return total[:-1] / self.size.clamp(min=1)[:, None].to(cells.dtype)

    def to_cls(self, x: Tensor) -> Tensor:
        """Takes the first row of each image, its cls token, (B, C) out of the pack (N, C)."""
        return x[self.cu_seqlens[:-1].long()]

    def split_prefix(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Features (N, ...) to those of the prefix, (B, prefix, ...), and of the tokens that cover cells, (M, ...)."""
        count = x.shape[0] - self.images * self.prefix
        prefix = x.index_select(0, self.prefix_rows().flatten()).view(self.images, self.prefix, *x.shape[1:])
        return prefix, x.index_select(0, self.covering_rows(count))

    def join_prefix(self, prefix: Tensor, x: Tensor) -> Tensor:
        """What :meth:`split_prefix` gives, (B, prefix, ...) and (M, ...), to a pack (N, ...)."""
        rows = torch.cat((self.prefix_rows().flatten(), self.covering_rows(x.shape[0])))
        x = torch.cat((prefix.flatten(0, 1), x))
        return torch.index_put(torch.zeros_like(x), (rows,), x)

    def with_prefix(self, count: int) -> 'TokenMap':
        """The map of the same tokens after another number of leading rows: a decoder's queries, or none."""
        more, rows = count - self.prefix, self.level.shape[0]
        shift = more * torch.arange(self.images + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        cover = self.cover + shift[1:, None, None]  # (K, B, h, w)
        if self.masked:
            cover = torch.where(self.cover == rows, rows + self.images * more, cover)
        moved = replace(
            self,
            lengths=None if self.lengths is None else [n + more for n in self.lengths],
            cu_seqlens=self.cu_seqlens + shift,
            prefix=count,
            cover=cover,
        )
        if self.padded is not None:
            longest = self.padded.shape[1] + more
            moved = replace(moved, padded=padded_rows(moved.cu_seqlens, longest, rows + self.images * more))

        def after(fill: float, values: Tensor) -> Tensor:
            leading = values.new_full((self.images, count, *values.shape[1:]), fill)
            return moved.join_prefix(leading, self.split_prefix(values)[1])

        return replace(
            moved,
            level=after(-1, self.level),
            center=after(0, self.center),
            size=after(0, self.size),
            weight=None if self.weight is None else after(1, self.weight),
        )

    def merge(self, into: Tensor, lengths: List[int]) -> 'TokenMap':
        """The map after rows have been joined.

        Args:
            into: (N,) int64, the new row of each row. Images stay in order, and so does each one's prefix.
            lengths: B ints, the new number of rows of each image.

        Raises:
            ValueError: the map has weights: what a gate learns must stay apart.
        """
        if self.weight is not None:
            raise ValueError('merge wants a map without weights: tokens whose gate is learning cannot be joined')
        n = sum(lengths)
        return replace(
            self,
            lengths=list(lengths),
            cu_seqlens=cumulative(torch.tensor(lengths, device=into.device)),
            level=torch.full((n,), -1, device=into.device).scatter_reduce(0, into, self.level, 'amax'),
            center=self.pool(self.center, into, n),
            size=self.size.new_zeros(n).index_add(0, into, self.size),
            cover=into[self.cover],
        )

    def pool(self, x: Tensor, into: Tensor, n: int) -> Tensor:
        """Features (N, C) of rows that are joined by ``into`` to (n, C): means, each row by its number of cells."""
        share = self.size.clamp(min=1).to(x.dtype)  # (N,), a prefix row counts as one
        total = share.new_zeros(n).index_add(0, into, share)
        return x.new_zeros(n, x.shape[1]).index_add(0, into, x * share[:, None]) / total[:, None]


class PackedTokens(NamedTuple):
    """What a backbone gives a head that reads tokens, in the place of a dense grid.

    Attributes:
        x: (N, C) features, prefix rows among them.
        tokens: where they are.
        observers: who counts this pass: each is to be called with (head, tokens).
        smoothed: cells along a token's side at each level, for :func:`.out_detail.smooth_coarse` of what a head says of
            tokens; empty where coarse tokens are copied.
    """

    x: Tensor
    tokens: TokenMap
    observers: Iterable[Callable] = ()
    smoothed: Sequence[int] = ()


def cumulative(counts: Tensor) -> Tensor:
    """(B + 1,) int32 of rows (B,), where each image begins, and the end."""
    return F.pad(counts.cumsum(0), (1, 0)).int()


def padded_rows(cu_seqlens: Tensor, longest: int, total: int) -> Tensor:
    """(B, longest) int64, the rows of each image; beyond an image's own there is ``total``."""
    rows = cu_seqlens[:-1, None].long() + torch.arange(longest, device=cu_seqlens.device)
    return torch.where(rows < cu_seqlens[1:, None], rows, total)


def region_grid(grid: Grid, side: int) -> Grid:
    """(hc, wc), the regions of side * side cells that cover a grid of (h, w) cells."""
    # Not by the floor of negative numbers: in ONNX, division of whole numbers rounds to zero.
    return (grid[0] + side - 1) // side, (grid[1] + side - 1) // side


def shrunk_grid(grid: Grid, scale: float) -> Grid:
    """The cells of an image of (h, w) cells once its height and width are less by a factor in (0, 1]."""
    per_mille = round(1000 * scale)
    h, w = (torch.sym_max(1, (cells * per_mille + 500) // 1000) for cells in grid)  # whole numbers can be traced
    return h, w


def region_of_cell(grid: Grid, side: int, device=None) -> Tensor:
    """(h * w,) int64, the index hc * wc of the region that each cell lies in."""
    h, w = grid
    _, wc = region_grid(grid, side)
    row = torch.arange(h, device=device) // side
    column = torch.arange(w, device=device) // side
    return (row[:, None] * wc + column).flatten()


def over_cells(regions: Tensor, grid: Grid, side: int) -> Tensor:
    """Replicates values of regions (B, hc, wc) over their cells (B, h, w); what lies beyond the grid is cut off."""
    return regions.flatten(1)[:, region_of_cell(grid, side, regions.device)].unflatten(1, grid)
