"""Which tokens an image gets, and the way from packed tokens back to the grid of cells.

A :class:`TokenMap` says which row of a pack covers each cell; it knows neither gates nor scales. A :class:`Decision` is
what gates said. :class:`TokenSelector` makes a map of a decision.

Every image has the same candidates in one fixed order: its prefix (cls token, registers), then a token for each region
of each coarse level, coarsest first, then a fine token for each cell, all in raster order. A gate's logits say which
candidates are *active*: each cell of the grid is covered by exactly one active token. The tokens that are kept lie one
after the other, image after image, in one pack of N rows without padding.
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from torch import Tensor, nn

Grid = Tuple[int, int]
TRAIN_TOKENS = ('active', 'trimmed', 'all')


@dataclass(frozen=True)
class TokenMap:
    """The tokens of a batch, without their features: a map between the cells of B grids and the N rows of a pack.

    Attributes:
        grid: (h, w), the fine cells of each image.
        lengths: B ints on the host, the number of rows of each image.
        cu_seqlens: (B + 1,) int32, the row of the pack where each image begins, and N at the end.
        prefix: leading rows of each image that cover no cell: the cls token and registers.
        level: (N,) int64, -1 for a prefix row, 0 for a fine token, 1 and more for coarser ones.
        center: (N, 2) float32, (y, x) of the mean of a token's cells, in cells: that of the first cell is 0.5, 0.5.
        size: (N,) float32, the number of cells that a token covers; 0 for a prefix row.
        cover: (K, B, h, w) int64, the rows that make up each cell. K = 1 where each cell has one row. Else inactive
            tokens are kept too, each cell has K candidates, and one that is not kept is row N, which stands for zeros.
        weight: (N,) float32 or None. Value 1 for an active token, 0 for an inactive one, with the gradient of the
            token's soft value (straight-through). None where no gate gets a gradient.
    """

    grid: Grid
    lengths: List[int]
    cu_seqlens: Tensor
    prefix: int
    level: Tensor
    center: Tensor
    size: Tensor
    cover: Tensor
    weight: Optional[Tensor] = None

    @property
    def masked(self) -> bool:
        """Whether inactive tokens are in the pack, so that attention has to weigh its keys."""
        return len(self.cover) > 1

    @property
    def image(self) -> Tensor:
        """(N,) int64, the image that each row belongs to."""
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.level))

    @property
    def dense_length(self) -> int:
        """Rows of an image whose tokens are all fine."""
        return self.grid[0] * self.grid[1] + self.prefix

    def active_counts(self, level: Optional[int] = None) -> Tensor:
        """(B,) int64, the active rows of each image, prefix included: what the image costs at test time.

        Args:
            level: counts the tokens of this level alone.
        """
        counted = torch.ones_like(self.level, dtype=torch.bool) if level is None else self.level == level
        if self.masked:
            counted = counted & (self.weight > 0.5)
        return counted.new_zeros(len(self.lengths), dtype=torch.long).index_add_(0, self.image, counted.long())

    def levels(self) -> Tensor:
        """(B, h, w) int64, the level of the token that covers each cell, where each cell has one."""
        return self.level[self.cover[0]]

    def prefix_rows(self) -> Tensor:
        """(B, prefix) int64, the rows of each image's cls token and registers."""
        return self.cu_seqlens[:-1, None].long() + torch.arange(self.prefix, device=self.cu_seqlens.device)

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
        total = cells.new_zeros(len(self.level) + 1, cells.shape[1])
        for rows in self.cover:
            total = total.index_add(0, rows.flatten(), cells)
        return total[:-1] / self.size.clamp(min=1)[:, None].to(cells.dtype)

    def to_cls(self, x: Tensor) -> Tensor:
        """Takes the first row of each image, its cls token, (B, C) out of the pack (N, C)."""
        return x[self.cu_seqlens[:-1].long()]

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
            cu_seqlens=cumulative(lengths, into.device),
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


@dataclass(frozen=True)
class Decision:
    """What the gates said about a batch. Lists have one entry for each coarse level, the finest of them first.

    Attributes:
        logits: (B, hc, wc) float32, the noise-free logits of "coarse".
        coarse: (B, hc, wc) bool, where the coarse token is active: decided coarse, and not part of a coarser one.
    """

    logits: List[Tensor]
    coarse: List[Tensor]

    @torch.no_grad()
    def statistics(self) -> Dict[str, Tensor]:
        """Scalars of each coarse level, from the second on with ``_2`` and so on after their names.

        ``coarse_fraction``, the share of its regions that are coarse; ``entropy`` of the probability of coarse, in bits
        and on average, 0 where the gate is sure of every region; ``conditionality``, how much images differ: the
        standard deviation between them of "more likely coarse than fine" at a place, on average; 0 is a static mask.
        """
        found = {}
        for level, (logits, coarse) in enumerate(zip(self.logits, self.coarse), 1):
            suffix = '' if level == 1 else f'_{level}'
            m = logits.sigmoid()
            entropy = (torch.special.entr(m) + torch.special.entr(1 - m)).mean() / math.log(2)
            conditionality = (logits > 0).float().std(0, correction=0).mean()
            values = dict(coarse_fraction=coarse.float().mean(), entropy=entropy, conditionality=conditionality)
            found.update({f'{name}{suffix}': value for name, value in values.items()})
        return found


def cumulative(lengths: Sequence[int], device=None) -> Tensor:
    """(B + 1,) int32, where each image begins, and the end."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)


def region_grid(grid: Grid, side: int) -> Grid:
    """(hc, wc), the regions of side * side cells that cover a grid of (h, w) cells."""
    return -(-grid[0] // side), -(-grid[1] // side)


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


@lru_cache(maxsize=64)
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
        levels.append(torch.full((len(centers[-1]),), level))
    return tuple(torch.cat(parts).to(device) for parts in (levels, centers, sizes))


class TokenSelector(nn.Module):
    """Gates in, tokens out. It has no parameters; a forward hook on it sees every map and decision.

    Args:
        sides: cells along a token's side at each level, beginning with 1, each a multiple of the one before.
        train_tokens: which tokens a training step computes if a gate needs a gradient. ``'all'``: every candidate,
            inactive ones masked; the definition, and slow. ``'trimmed'``: of each image the k candidates of largest
            soft value, k = largest active count in the batch. ``'active'``: the active ones alone, as at test time.
            Without a gradient for a gate it is always ``'active'``.
        temperature: T of m = sigmoid((logit + logistic noise) / T) in training.
        threshold: an image's region is coarse at test time iff sigmoid(logit) > threshold.
        prefix: rows before each image's tokens: cls token and registers.
        token_budget: at test time, in place of the threshold: as few regions of a forward pass are coarse, those of the
            largest logits, as keep the mean number of tokens of its images, prefix included, within this. Where
            even all coarse is more, all are, with a warning.
    """

    def __init__(
        self,
        sides: Sequence[int],
        train_tokens: str,
        temperature: float,
        threshold: float,
        prefix: int,
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
        self.sides = tuple(sides)
        self.train_tokens = train_tokens
        self.temperature = temperature
        self.threshold = threshold
        self.prefix = prefix
        self.token_budget = token_budget

    def extra_repr(self) -> str:
        decides = f'threshold={self.threshold}' if self.token_budget is None else f'token_budget={self.token_budget}'
        return f'train_tokens={self.train_tokens!r}, temperature={self.temperature}, {decides}'

    def forward(self, gates: Sequence[Callable], grid: Grid) -> Tuple[TokenMap, Decision]:
        """Decides level by level, coarsest first, and indexes what is kept.

        Args:
            gates: of each coarse level, the finest first: takes its region grid (hc, wc) and where no coarser token
                is active, (B, hc, wc) bool or None for everywhere, to float32 logits (B, hc, wc) of "coarse".
            grid: (h, w), the fine cells of each image.

        Raises:
            FloatingPointError: a logit is NaN or infinite. Names the training iteration, where there is one.
        """
        logits, soft, coarse = [], [], []  # coarsest first
        left = None
        for level in range(len(self.sides) - 1, 0, -1):
            answer = gates[level - 1](region_grid(grid, self.sides[level]), left)  # (B, hc, wc)
            learning = self.training and answer.requires_grad
            m, chosen = self._decide(answer, learning)
            chosen = chosen if left is None else chosen & left
            logits.append(answer)
            soft.append(m)
            coarse.append(chosen)
            left = self._inside(~chosen if left is None else left & ~chosen, grid, level)
        learning = self.training and any(answer.requires_grad for answer in logits)
        if self.token_budget is not None and not self.training:
            coarse = self._within_budget(logits, grid)
            left = self._fine(coarse, grid)
        active = self._in_order(coarse + [left])  # (B, T)
        counts = active.sum(1)  # (B,)
        finite = torch.stack([answer.isfinite().all() for answer in logits]).all()
        *lengths, finite = torch.cat((counts, finite[None])).tolist()  # the selection's one wait for the device
        if not finite:
            raise_not_finite('gate logits', torch.cat([answer.flatten() for answer in logits]))

        weight = None
        keep = active
        masked = learning and self.train_tokens != 'active'
        if learning:
            soft = self._in_order(self._soft_values(soft, grid))  # (B, T)
            if self.train_tokens == 'all':
                keep = torch.ones_like(active)
                lengths = [keep.shape[1]] * len(lengths)
            elif self.train_tokens == 'trimmed':
                best = (soft.detach() + active).topk(max(lengths), dim=1).indices  # active ones are the first counts
                keep = torch.zeros_like(active).scatter_(1, best, True)
                lengths = [max(lengths)] * len(lengths)
            weight = active + (soft - soft.detach())  # (B, T)

        total = sum(lengths)
        index = torch.nonzero_static(keep.flatten(), size=total).flatten()  # (N,), image * T + candidate
        row = torch.full_like(keep, total, dtype=torch.long).flatten()  # (B * T,)
        row[index] = torch.arange(total, device=index.device)
        rows = row.unflatten(0, keep.shape)[:, self.prefix :].split([c[0].numel() for c in coarse + [left]], dim=1)
        sides = reversed(self.sides)
        cover = torch.stack([r[:, region_of_cell(grid, s, r.device)] for r, s in zip(rows, sides)])  # (K, B, h * w)
        if not masked:
            cover = cover.amin(0, keepdim=True)
        level, center, size = candidates(tuple(grid), self.sides, self.prefix, index.device)
        candidate = index % keep.shape[1]
        tokens = TokenMap(
            grid=tuple(grid),
            lengths=lengths,
            cu_seqlens=cumulative(lengths, index.device),
            prefix=self.prefix,
            level=level[candidate],
            center=center[candidate],
            size=size[candidate],
            cover=cover.unflatten(2, grid),
            weight=None if weight is None else weight.flatten()[index],
        )
        return tokens, Decision(logits[::-1], coarse[::-1])

    def _decide(self, logits: Tensor, learning: bool) -> Tuple[Tensor, Tensor]:
        """Probabilities m, noisy where a gate is learning, and whether they mean coarse."""
        if learning:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            m = ((logits + uniform.logit()) / self.temperature).sigmoid()
            return m, m > 0.5
        m = logits.sigmoid()
        return m, m > self.threshold

    def _inside(self, regions: Tensor, grid: Grid, level: int) -> Tensor:
        """Values of a level's regions at the places of the next finer level."""
        finer = self.sides[level - 1]
        return over_cells(regions, region_grid(grid, finer), self.sides[level] // finer)

    def _fine(self, coarse: List[Tensor], grid: Grid) -> Tensor:
        """Where no coarse token is active: (B, h, w) bool. Levels come coarsest first."""
        covered = [over_cells(c, grid, side) for c, side in zip(coarse, reversed(self.sides))]
        return ~torch.stack(covered).any(0)

    def _in_order(self, levels: List[Tensor]) -> Tensor:
        """Values of all levels, coarsest first, and ones for the prefix, in the order of the candidates: (B, T)."""
        prefix = levels[0].new_ones(len(levels[0]), self.prefix)
        return torch.cat((prefix, *(values.flatten(1) for values in levels)), 1)

    def _soft_values(self, soft: List[Tensor], grid: Grid) -> List[Tensor]:
        """A token's soft value: its own m times 1 - m of each coarser one around it; a fine token has no m."""
        values, reach = [], torch.ones_like(soft[0])
        for level, m in zip(range(len(soft), 0, -1), soft):
            values.append(reach * m)
            reach = self._inside(reach * (1 - m), grid, level)
        return values + [reach]

    def _within_budget(self, logits: List[Tensor], grid: Grid) -> List[Tensor]:
        """The decision that meets the budget, coarsest level first; by logits, since sure probabilities are all 1.

        All regions of all levels and images stand in one order, and the first k of them are coarse, where no coarser
        one is: the fewest that are enough, found by bisection, since more coarse regions never mean more tokens.
        """
        images = len(logits[0])
        fine = self.token_budget - self.prefix
        least = logits[0][0].numel()
        if least > fine:
            warnings.warn(
                f'token_budget of {self.token_budget} cannot be met: an image of {least} regions has '
                f'{least + self.prefix} tokens if all are coarse',
                stacklevel=2,
            )
        order = torch.cat([level.flatten() for level in logits]).argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        _, _, size = candidates(tuple(grid), self.sides[1:], 0, order.device)
        # A region of one cell at a corner is never coarse: it would save nothing.
        never = (size == 1).split([level[0].numel() for level in logits])
        places = [
            torch.where(n, len(order), p.view(images, -1)).view_as(level)
            for p, n, level in zip(place.split([level.numel() for level in logits]), never, logits)
        ]

        def decide(k: Tensor) -> List[Tensor]:
            coarse, left = [], None
            for level, p in zip(range(len(places), 0, -1), places):
                chosen = p < k if left is None else (p < k) & left
                coarse.append(chosen)
                left = self._inside(~chosen if left is None else left & ~chosen, grid, level)
            return coarse + [left]

        low, high = order.new_tensor(-1), order.new_tensor(len(order))  # the answer is in (low, high]
        for _ in range(math.ceil(math.log2(len(order) + 1))):
            middle = (low + high) // 2
            enough = sum(part.sum() for part in decide(middle)) <= images * fine
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return decide(high)[:-1]


def raise_not_finite(name: str, values: Tensor) -> None:
    """Raises a FloatingPointError that counts the NaN and infinite values and names the training iteration, if any."""
    iteration = MessageHub.get_current_instance().runtime_info.get('iter')
    where = '' if iteration is None else f' at iteration {iteration + 1}'
    raise FloatingPointError(
        f'{name} must be finite, got {int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of '
        f'{values.numel()} values{where}'
    )
