"""Which tokens an image gets: gates' logits to a decision, and that to a map of tokens.

Every image has the same :mod:`.candidates` in one fixed order. Gates' logits say which of them are *active*: each cell
of the grid is covered by exactly one active token.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

from ..versions import nonzero_static
from .candidates import candidates
from .token_map import Grid, TokenMap, cumulative, over_cells, padded_rows, region_grid, region_of_cell
from .tracing import traced

TRAIN_TOKENS = ('active', 'trimmed', 'all')


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
        train_tokens: str = 'active',
        temperature: float = 1.0,
        threshold: float = 0.5,
        prefix: int = 0,
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

    def forward(
        self, gates: Sequence[Callable], grid: Grid, dense_grid: Optional[Grid] = None
    ) -> Tuple[TokenMap, Decision]:
        """Decides level by level, coarsest first, and indexes what is kept.

        Args:
            gates: of each coarse level, the finest first: takes its region grid (hc, wc) and where no coarser token
                is active, (B, hc, wc) bool or None for everywhere, to float32 logits (B, hc, wc) of "coarse".
            grid: (h, w), the fine cells of each image.
            dense_grid: those of the image before it was reduced, for the record; None where it was not.

        Raises:
            FloatingPointError: a logit is NaN or infinite. Names the training iteration, where there is one.
        """

        def decide(level, left):
            answer = gates[level - 1](region_grid(grid, self.sides[level]), left)  # (B, hc, wc)
            m, chosen = self._decide(answer, self.training and answer.requires_grad)
            chosen = chosen if left is None else chosen & left
            return (answer, m, chosen), ~chosen if left is None else left & ~chosen

        decided, left = self._descend(decide, None, grid)
        logits, soft, coarse = map(list, zip(*decided))  # coarsest first
        learning = self.training and any(answer.requires_grad for answer in logits)
        if self.token_budget is not None and not self.training:
            *coarse, left = self._within_budget(logits, grid)
        active = self._in_order(coarse + [left])  # (B, T)
        counts = active.sum(1)  # (B,)
        lengths = None if traced() else self._read(counts, logits)

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
            counts = keep.sum(1)

        kept = keep.nonzero() if lengths is None else nonzero_static(keep, sum(lengths))
        image, candidate = kept.unbind(1)  # (N,) each
        total = kept.shape[0]
        row = torch.full_like(keep, total, dtype=torch.long)  # (B, T)
        row[image, candidate] = torch.arange(total, device=row.device)
        rows = row[:, self.prefix :].split([c[0].numel() for c in coarse + [left]], dim=1)
        sides = reversed(self.sides)
        cover = torch.stack([r[:, region_of_cell(grid, s, r.device)] for r, s in zip(rows, sides)])  # (K, B, h * w)
        if not masked:
            cover = cover.amin(0, keepdim=True)
        level, center, size = candidates(tuple(grid), self.sides, self.prefix, row.device)
        cu_seqlens = cumulative(counts)
        tokens = TokenMap(
            grid=tuple(grid),
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            prefix=self.prefix,
            level=level[candidate],
            center=center[candidate],
            size=size[candidate],
            cover=cover.unflatten(2, grid),
            weight=None if weight is None else weight[image, candidate],
            dense_grid=dense_grid,
            padded=padded_rows(cu_seqlens, cu_seqlens.diff().max().item(), total) if lengths is None else None,
        )
        return tokens, Decision(logits[::-1], coarse[::-1])

    def _read(self, counts: Tensor, logits: List[Tensor]) -> List[int]:
        """The counts on the host, and whether the logits are finite: both in one wait for the device."""
        finite = torch.stack([answer.isfinite().all() for answer in logits]).all()
        *lengths, finite = torch.cat((counts, finite[None])).tolist()
        if not finite:
            raise_not_finite('gate logits', torch.cat([answer.flatten() for answer in logits]))
        return lengths

    def _decide(self, logits: Tensor, learning: bool) -> Tuple[Tensor, Tensor]:
        """Probabilities m, noisy where a gate is learning, and whether they mean coarse."""
        if learning:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            m = ((logits + uniform.logit()) / self.temperature).sigmoid()
            return m, m > 0.5
        m = logits.sigmoid()
        return m, m > self.threshold

    def _descend(self, step: Callable, state: Optional[Tensor], grid: Grid) -> Tuple[list, Tensor]:
        """The one walk over the levels, from the coarsest down.

        Args:
            step: takes a level and the state at its regions, (B, hc, wc), to what is to be kept of it, and to the state
                that is inside of these regions.
            state: at the coarsest level's regions.
            grid: (h, w).

        Returns:
            What is kept of each coarse level, the coarsest first, and the state at the cells, (B, h, w).
        """
        kept = []
        for level in range(len(self.sides) - 1, 0, -1):
            found, state = step(level, state)
            kept.append(found)
            finer = self.sides[level - 1]
            state = over_cells(state, region_grid(grid, finer), self.sides[level] // finer)
        return kept, state

    def _in_order(self, levels: List[Tensor]) -> Tensor:
        """Values of all levels, coarsest first, and ones for the prefix, in the order of the candidates: (B, T)."""
        prefix = levels[0].new_ones(levels[0].shape[0], self.prefix)
        return torch.cat((prefix, *(values.flatten(1) for values in levels)), 1)

    def _soft_values(self, soft: List[Tensor], grid: Grid) -> List[Tensor]:
        """A token's soft value: its own m times 1 - m of each coarser one around it; a fine token has no m."""

        def reach_in(level, reach):
            m = soft[-level]
            return reach * m, reach * (1 - m)

        values, reach = self._descend(reach_in, torch.ones_like(soft[0]), grid)
        return values + [reach]

    def _within_budget(self, logits: List[Tensor], grid: Grid) -> List[Tensor]:
        """The decision that meets the budget, coarsest level first, and where it leaves cells fine.

        All regions of all levels and images stand in one order, by their logits, since sure probabilities are all 1.
        The first k of them are coarse, where no coarser one is: the fewest that are enough, since more coarse regions
        never mean more tokens.
        """
        images = logits[0].shape[0]
        fine = self.token_budget - self.prefix
        least = logits[0][0].numel()
        if not traced() and least > fine:
            warnings.warn(
                f'token_budget of {self.token_budget} cannot be met: an image of {least} regions has '
                f'{least + self.prefix} tokens if all are coarse',
                stacklevel=2,
            )
        order = torch.cat([level.flatten() for level in logits]).argsort(descending=True, stable=True)
        regions = order.shape[0]
        place = torch.empty_like(order)
        place[order] = torch.arange(regions, device=order.device)
        _, _, size = candidates(tuple(grid), self.sides[1:], 0, order.device)
        # A region of one cell at a corner is never coarse: it would save nothing.
        never = (size == 1).split([level[0].numel() for level in logits])
        # With the first k coarse, a region is a token from k > begin on and until k > end, when it is part of a coarser
        # one; a cell from the first.
        places = place.split([level.numel() for level in logits])

        def span(level, end):
            begin = torch.where(never[-level], regions, places[-level].view(images, -1)).view(end.shape)
            return (begin, end), torch.minimum(begin, end)

        spans, end = self._descend(span, torch.full_like(logits[0], regions, dtype=torch.long), grid)
        change = order.new_zeros(regions + 1)  # of the number of tokens, from k to k + 1
        for begin, until in spans:
            lives = (begin < until).long().flatten()
            change = change.index_add(0, begin.flatten(), lives).index_add(0, until.flatten(), -lives)
        change = change.index_add(0, end.flatten(), -torch.ones_like(end.flatten()))
        counts = end.numel() + change.cumsum(0) - change  # (regions + 1,), of the first k coarse
        k = (counts[:-1] > images * fine).sum()
        return [(begin < k) & (end >= k) for begin, end in spans] + [end >= k]


def raise_not_finite(name: str, values: Tensor) -> None:
    """Raises a FloatingPointError that counts the NaN and infinite values and names the training iteration, if any."""
    iteration = MessageHub.get_current_instance().runtime_info.get('iter')
    where = '' if iteration is None else f' at iteration {iteration + 1}'
    raise FloatingPointError(
        f'{name} must be finite, got {int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of '
        f'{values.numel()} values{where}'
    )
