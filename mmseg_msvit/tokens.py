"""Which tokens an image gets, and the way from packed tokens back to the grid of cells.

Every image has the same candidates in one fixed order: the cls token (if any), a coarse token for each region, a fine
token for each cell, both in raster order. A gate's logits say which candidates are *active*: each cell of the grid is
covered by exactly one active token. The tokens that are kept lie one after the other, image after image, in one pack
of N rows without padding.
"""

import warnings
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from torch import Tensor, nn

TRAIN_TOKENS = ('active', 'trimmed', 'all')


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a batch, without their features.

    Attributes:
        grid: (h, w), the fine cells of each image.
        side: cells along a region's side; a region has side * side cells.
        logits: (B, hc, wc) float32, the gate's noise-free logits of "coarse".
        coarse: (B, hc, wc) bool, the decision: True where the coarse token is active.
        lengths: B ints on the host, the number of tokens kept of each image.
        cu_seqlens: (B + 1,) int32, the row of the pack where each image begins, and N at the end.
        index: (N,) int64, ascending: image * candidates + candidate of each packed token.
        cover: (K, B, h, w) int64, the rows of the pack that cover each cell. K = 1 where active tokens alone are kept.
            Else K = 2, coarse and fine; a token that is not kept is row N, which stands for zeros.
        weight: (N,) float32 or None. Value 1 for an active token, 0 for an inactive one, with the gradient of the
            token's soft value (straight-through). None where the gate gets no gradient.
        with_cls: whether each image's first token is its cls token.
    """

    grid: Tuple[int, int]
    side: int
    logits: Tensor
    coarse: Tensor
    lengths: List[int]
    cu_seqlens: Tensor
    index: Tensor
    cover: Tensor
    weight: Optional[Tensor]
    with_cls: bool

    @property
    def masked(self) -> bool:
        """Whether inactive tokens are in the pack, so that attention has to weigh its keys."""
        return len(self.cover) == 2

    @property
    def image(self) -> Tensor:
        """(N,) int64, the image that each packed token belongs to."""
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.index))

    def active_counts(self) -> Tensor:
        """(B,) int64, the active tokens of each image with its cls token: what the image costs at test time."""
        fine = 1 - over_cells(self.coarse.long(), self.grid, self.side)  # (B, h, w)
        return self.coarse.flatten(1).sum(1) + fine.flatten(1).sum(1) + int(self.with_cls)

    def to_grid(self, x: Tensor) -> Tensor:
        """Puts packed tokens back on the dense grid: a coarse token is replicated over its cells.

        Where tokens carry weights, cell = m * coarse + (1 - m) * fine, straight-through.

        Args:
            x: (N, C) features.

        Returns:
            (B, C, h, w), contiguous.
        """
        if self.weight is not None:
            x = x * self.weight[:, None].to(x.dtype)
        if self.masked:
            x = F.pad(x, (0, 0, 0, 1))  # (N + 1, C)
            cells = x[self.cover[0]] + x[self.cover[1]]  # (B, h, w, C)
        else:
            cells = x[self.cover[0]]  # (B, h, w, C)
        return cells.permute(0, 3, 1, 2).contiguous()  # (B, C, h, w)

    def to_cls(self, x: Tensor) -> Tensor:
        """Takes the cls tokens (B, C) out of the pack (N, C)."""
        return x[self.cu_seqlens[:-1].long()]


def region_grid(grid: Tuple[int, int], side: int) -> Tuple[int, int]:
    """(hc, wc), the regions of side * side cells that cover a grid of (h, w) cells."""
    return -(-grid[0] // side), -(-grid[1] // side)


def region_of_cell(grid: Tuple[int, int], side: int, device=None) -> Tensor:
    """(h * w,) int64, the index hc * wc of the region that each cell lies in."""
    h, w = grid
    _, wc = region_grid(grid, side)
    row = torch.arange(h, device=device) // side
    column = torch.arange(w, device=device) // side
    return (row[:, None] * wc + column).flatten()


def over_cells(regions: Tensor, grid: Tuple[int, int], side: int) -> Tensor:
    """Replicates values of regions (B, hc, wc) over their cells (B, h, w); what lies beyond the grid is cut off."""
    return regions.flatten(1)[:, region_of_cell(grid, side, regions.device)].unflatten(1, grid)


class TokenSelector(nn.Module):
    """Gate logits in, tokens out. It has no parameters; a forward hook on it sees every :class:`TokenBatch`.

    Args:
        side: cells along a region's side.
        train_tokens: which tokens a training step computes if the gate needs a gradient. ``'all'``: every candidate,
            inactive ones masked; the definition, and slow. ``'trimmed'``: of each image the k candidates of largest
            soft value, k = largest active count in the batch. ``'active'``: the active ones alone, as at test time.
            Without a gradient for the gate it is always ``'active'``.
        temperature: T of m = sigmoid((logit + logistic noise) / T) in training.
        threshold: an image's region is coarse at test time iff sigmoid(logit) > threshold.
        with_cls: whether each image has a cls token.
        token_budget: at test time, in place of the threshold: as few regions of a forward pass are coarse, those of the
            largest logits, as keep the mean number of tokens of its images, cls token included, within this. Where
            even all coarse is more, all are, with a warning.
    """

    def __init__(
        self,
        side: int,
        train_tokens: str,
        temperature: float,
        threshold: float,
        with_cls: bool,
        token_budget: Optional[float] = None,
    ):
        super().__init__()
        if train_tokens not in TRAIN_TOKENS:
            raise ValueError(f'train_tokens must be one of {TRAIN_TOKENS}, got {train_tokens!r}')
        if not temperature > 0:
            raise ValueError(f'temperature must be positive, got {temperature}')
        if not 0 <= threshold <= 1:
            raise ValueError(f'threshold must be in [0, 1], got {threshold}')
        if token_budget is not None and not token_budget > 0:
            raise ValueError(f'token_budget must be positive, got {token_budget}')
        self.side = side
        self.train_tokens = train_tokens
        self.temperature = temperature
        self.threshold = threshold
        self.with_cls = with_cls
        self.token_budget = token_budget

    def extra_repr(self) -> str:
        decides = f'threshold={self.threshold}' if self.token_budget is None else f'token_budget={self.token_budget}'
        return f'train_tokens={self.train_tokens!r}, temperature={self.temperature}, {decides}'

    def forward(self, logits: Tensor, grid: Tuple[int, int]) -> TokenBatch:
        """Decides, and indexes what is kept.

        Args:
            logits: (B, hc, wc) float32, of "coarse".
            grid: (h, w), the fine cells of each image.

        Raises:
            FloatingPointError: a logit is NaN or infinite. Names the training iteration, where there is one.
        """
        learning = self.training and logits.requires_grad
        if learning:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            soft = ((logits + uniform.logit()) / self.temperature).sigmoid()  # (B, hc, wc)
            coarse = soft > 0.5
        else:
            soft = logits.sigmoid()
            coarse = soft > self.threshold
        parent = region_of_cell(grid, self.side, logits.device)  # (h * w,)
        if self.token_budget is not None and not self.training:
            coarse = self._within_budget(logits, parent)
        one = coarse.new_ones(len(coarse), int(self.with_cls))
        active = torch.cat((one, coarse.flatten(1), ~coarse.flatten(1)[:, parent]), 1)  # (B, T)
        counts = active.sum(1)  # (B,)
        *lengths, finite = torch.cat((counts, logits.isfinite().all()[None])).tolist()  # the one wait for the device
        if not finite:
            raise_not_finite('gate logits', logits)

        weight = None
        keep = active
        if learning:
            soft = torch.cat((one, soft.flatten(1), 1 - soft.flatten(1)[:, parent]), 1)  # (B, T)
            if self.train_tokens == 'all':
                keep = torch.ones_like(active)
            elif self.train_tokens == 'trimmed':
                best = (soft.detach() + active).topk(max(lengths), dim=1).indices  # active ones are the first counts
                keep = torch.zeros_like(active).scatter_(1, best, True)
            if self.train_tokens != 'active':
                lengths = [int(keep.shape[1]) if self.train_tokens == 'all' else max(lengths)] * len(lengths)
            weight = active + (soft - soft.detach())  # (B, T)

        total = sum(lengths)
        index = torch.nonzero_static(keep.flatten(), size=total).flatten()  # (N,)
        row = torch.full_like(keep, total, dtype=torch.long).flatten()  # (B * T,)
        row[index] = torch.arange(total, device=index.device)
        row = row.unflatten(0, keep.shape)[:, one.shape[1] :]  # (B, hc * wc + h * w)
        coarse_row, fine_row = row.tensor_split([coarse[0].numel()], dim=1)
        coarse_row = coarse_row[:, parent]  # (B, h * w)
        masked = learning and self.train_tokens != 'active'
        cover = torch.stack((coarse_row, fine_row) if masked else (torch.minimum(coarse_row, fine_row),))
        return TokenBatch(
            grid=tuple(grid),
            side=self.side,
            logits=logits,
            coarse=coarse,
            lengths=lengths,
            cu_seqlens=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(logits.device),
            index=index,
            cover=cover.unflatten(2, grid),
            weight=None if weight is None else weight.flatten()[index],
            with_cls=self.with_cls,
        )

    def _within_budget(self, logits: Tensor, parent: Tensor) -> Tensor:
        """The decision (B, hc, wc) that meets the budget; logits, since probabilities of sure regions are all 1."""
        images, regions, cells = len(logits), logits[0].numel(), len(parent)
        least = regions + int(self.with_cls)
        if least > self.token_budget:
            warnings.warn(
                f'token_budget of {self.token_budget} cannot be met: an image of {regions} regions has {least} tokens '
                'if all are coarse',
                stacklevel=2,
            )
        excess = images * (cells + int(self.with_cls) - self.token_budget)  # tokens that have to go
        cells_of = parent.new_zeros(regions).scatter_add_(0, parent, torch.ones_like(parent))
        saved = cells_of - 1  # (regions,), by a region that is coarse
        order = logits.flatten().argsort(descending=True, stable=True)  # (B * regions,)
        saved = saved.repeat(images)[order]
        coarse = torch.empty_like(order, dtype=torch.bool)
        # Coarse as long as those before it have not saved enough; of one cell at a corner, coarse would save nothing.
        coarse[order] = (saved.cumsum(0) - saved < excess) & (saved > 0)
        return coarse.view_as(logits)


def raise_not_finite(name: str, values: Tensor) -> None:
    """Raises a FloatingPointError that counts the NaN and infinite values and names the training iteration, if any."""
    iteration = MessageHub.get_current_instance().runtime_info.get('iter')
    where = '' if iteration is None else f' at iteration {iteration + 1}'
    raise FloatingPointError(
        f'{name} must be finite, got {int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of '
        f'{values.numel()} values{where}'
    )
