"""Losses that train the gate. Each is a module that the backbone owns, since some have parameters.

They see the noise-free logits: fed the noisy decision values, batch shaping is satisfied by the noise itself. Priors
are those of :mod:`.distributions`.
"""

import math
from typing import Callable, ClassVar, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..tokens.positions import resample_table
from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap
from .distributions import beta_cdf, normal_cdf, relaxed_bernoulli_cdf


def batch_shaping_loss(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """Distance of a batch's values from a prior (Bejnordi, Blankevoort and Welling 2020).

    The mean over i and k of (i / (N + 1) - F(x_(i)k))^2, where x_(1)k <= ... <= x_(N)k are the values at position k.

    Args:
        values: (N, T), N samples at each of T positions, in [0, 1]; sorted here.
        cdf: takes the sorted values (N, T) to F of them, (N, T).

    Returns:
        Scalar.
    """
    n = len(values)
    empirical = torch.arange(1, n + 1, device=values.device) / (n + 1)  # (N,) float32, as in the published code
    return (empirical[:, None] - cdf(values.sort(dim=0).values)).square().mean()


def gather_batch(values: Tensor) -> Tensor:
    """Concatenates (n, ...) over all ranks to (sum of n, ...), with gradient. Ranks may differ in n and in no more.

    Raises:
        ValueError: on every rank, if they differ in the other dimensions. The message has all shapes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    shape = torch.tensor(values.shape, device=values.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    shapes = [tuple(s.tolist()) for s in shapes]
    if len({s[1:] for s in shapes}) > 1:
        raise ValueError(f'this loss compares places of the region grid: all ranks must have the same, got {shapes}')
    most = max(s[0] for s in shapes)
    padded = torch.cat((values, values.new_zeros(most - len(values), *values.shape[1:])))
    parts = dist_fn.all_gather(padded.contiguous())
    return torch.cat([part[: s[0]] for part, s in zip(parts, shapes)])


class GateLoss(BaseModule):
    """Base of the gate losses. The backbone gives the first two arguments and ``level``, a config the others.

    Args:
        grid: (gh, gw), the region grid of the backbone's ``img_size``.
        region: pixels along a region's side.
        loss_weight: factor of this loss in the total.
        loss_name: its key in the log is ``gate.`` and this name, which must start with ``loss_``; None for the class's
            own.
        level: which coarse level's logits it sees, 1 for the finest; from 2 on the name ends with ``_2`` and so on.
        warmup: training forwards over which its factor grows linearly from 0 to ``loss_weight``. They are counted in a
            buffer, and go on where training is resumed.
    """

    default_name: ClassVar[str]
    # Whether the loss reads the ground truth of data_samples: then it must be known which image each belongs to.
    reads_labels = False
    # Whether of_step takes the segmentor itself beside the rest, as ``segmentor=``.
    asks_segmentor = False

    def __init__(
        self,
        grid: Tuple[int, int] = (16, 16),
        region: int = 32,
        loss_weight: float = 1.0,
        loss_name: Optional[str] = None,
        level: int = 1,
        warmup: int = 0,
    ):
        super().__init__()
        loss_name = self.default_name if loss_name is None else loss_name
        if not loss_name.startswith('loss_'):
            raise ValueError(f"loss_name must start with 'loss_', else it is logged and not trained, got {loss_name!r}")
        if warmup < 0:
            raise ValueError(f'warmup must be a number of steps, not negative, got {warmup}')
        self.grid = tuple(grid)
        self.region = region
        self.loss_weight = loss_weight
        self.level = level
        self.loss_name = loss_name if level == 1 else f'{loss_name}_{level}'
        self.warmup = warmup
        if warmup:
            self.count_steps()

    def count_steps(self) -> None:
        """Has training forwards counted in ``steps``; a whole number, which no change of precision reaches."""
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    def begin(self) -> None:
        """Forgets what another training has counted or seen, with whose weights this one begins."""
        if hasattr(self, 'steps'):
            self.steps.zero_()

    def take_step(self, *args, **kwargs) -> Tensor:
        """:meth:`of_step` by the factor of the warm-up; then this forward is counted."""
        loss = self.of_step(*args, **kwargs)
        if self.warmup:
            loss = loss * (self.steps / self.warmup).clamp(max=1)
        if hasattr(self, 'steps'):
            self.steps += 1
        return loss

    def of_step(self, decision: Decision, tokens: TokenMap, data_samples: Sequence, images: Tensor) -> Tensor:
        """The loss of a training forward of images (B, C, H, W). One that sees more than logits overrides this."""
        return self(decision.logits[self.level - 1], data_samples)

    def forward(self, logits: Tensor, data_samples: Sequence) -> Tensor:
        """Noise-free logits (B, hc, wc) of coarse, and the segmentor's data samples, to a weighted scalar."""
        raise NotImplementedError


class ShareLoss(GateLoss):
    """Base of the gate losses that want a share of the regions to be coarse.

    Args:
        target_coarse: the wanted share.
        target_warmup: training forwards over which it grows linearly to that, from 0: a training that begins dense.
            The gate should then begin so too, by a small ``init_coarse``. They are counted as those of ``warmup`` are.
    """

    def __init__(self, target_coarse: float = 0.5, target_warmup: int = 0, **kwargs):
        super().__init__(**kwargs)
        if not 0 < target_coarse < 1:
            raise ValueError(f'target_coarse must be in (0, 1), got {target_coarse}')
        if target_warmup < 0:
            raise ValueError(f'target_warmup must be a number of steps, not negative, got {target_warmup}')
        self.target_coarse = target_coarse
        self.target_warmup = target_warmup
        if target_warmup and not self.warmup:
            self.count_steps()

    def target(self) -> Union[float, Tensor]:
        """The share that is wanted in this training step."""
        if not self.target_warmup:
            return self.target_coarse
        return self.target_coarse * (self.steps / self.target_warmup).clamp(max=1)


@MODELS.register_module()
class GeneralizedBatchShapingLoss(ShareLoss):
    """The loss of MSViT: for each position of the region grid a relaxed-Bernoulli prior with a learned mean.

    The means themselves follow a Gaussian hyperprior, so that the gate may learn that skies are at the top. The
    priors live on the base grid and are interpolated to that of the images. The empirical CDF is taken over all ranks,
    which may differ in their number of images, not in their region grid. It wants at least two images there; with more
    of them the gate becomes surer. One is not enough to teach it that images differ.

    It does not remember earlier batches: to be coarse everywhere for some steps and fine for some others would then be
    as good as to tell regions apart, and gates were seen to do so (``docs/benchmarks.md``).

    Args:
        target_coarse: mean of the hyperprior: the wanted share of coarse regions.
        target_warmup: see :class:`ShareLoss`; the priors begin where it does.
        spread: standard deviation of the hyperprior.
        temperature: first temperature of the priors.
        temperature_weight: factor of the penalty mean(tau^2), which keeps the priors bimodal; chosen here.
        hyperprior_weight: factor of the hyperprior's loss; chosen here.
    """

    default_name = 'loss_gbas'

    def __init__(
        self,
        spread: float = 0.1,
        temperature: float = 0.3,
        temperature_weight: float = 0.01,
        hyperprior_weight: float = 1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not (spread > 0 and temperature > 0):
            raise ValueError(f'spread and temperature must be positive, got {spread} and {temperature}')
        self.spread = spread
        self.temperature_weight = temperature_weight
        self.hyperprior_weight = hyperprior_weight
        positions = self.grid[0] * self.grid[1]
        # The means start where the hyperprior wants them, at its quantiles, dealt to the positions at random.
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(0))
        quantile = (order.double() + 1) / (positions + 1)
        mean = float(self.target()) + spread * math.sqrt(2) * torch.erfinv(2 * quantile - 1)
        self.prior_mean_logit = nn.Parameter(mean.clamp(0.02, 0.98).logit().float().view(1, 1, *self.grid))
        self.prior_log_temperature = nn.Parameter(torch.full((1, 1, *self.grid), math.log(temperature)))

    def forward(self, logits: Tensor, data_samples: Sequence = ()) -> Tensor:
        m = gather_batch(logits.sigmoid())  # (n, hc, wc), of all ranks
        means = self.prior_mean_logit.sigmoid()
        temperatures = self.prior_log_temperature.exp()
        mean, temperature = (resample_table(p, m.shape[1:], 'bilinear').flatten() for p in (means, temperatures))
        prior = batch_shaping_loss(m.flatten(1), lambda x: relaxed_bernoulli_cdf(x, mean, temperature))
        target = self.target()
        hyperprior = batch_shaping_loss(means.view(-1, 1), lambda x: normal_cdf(x, target, self.spread))
        penalty = temperatures.square().mean()
        return self.loss_weight * (prior + self.hyperprior_weight * hyperprior + self.temperature_weight * penalty)


@MODELS.register_module()
class BatchShapingLoss(GateLoss):
    """Batch shaping with one fixed Beta prior, over all images and positions together.

    Args:
        a: first parameter of the prior, whose mean is a / (a + b).
        b: second parameter.
    """

    default_name = 'loss_bas'

    def __init__(self, a: float = 0.6, b: float = 0.4, **kwargs):
        super().__init__(**kwargs)
        if not (a > 0 and b > 0):
            raise ValueError(f'a and b must be positive, got {a} and {b}')
        self.a, self.b = a, b

    def forward(self, logits: Tensor, data_samples: Sequence = ()) -> Tensor:
        values = gather_batch(logits.sigmoid().flatten())[:, None]  # (N, 1), regions of all images of all ranks
        return self.loss_weight * batch_shaping_loss(values, lambda x: beta_cdf(x, self.a, self.b))


@MODELS.register_module()
class TokenBudgetLoss(ShareLoss):
    """(mean of m - target)^2: holds the mean share of coarse regions, and says nothing about which ones.

    Takes the arguments of :class:`ShareLoss`.
    """

    default_name = 'loss_budget'

    def forward(self, logits: Tensor, data_samples: Sequence = ()) -> Tensor:
        return self.loss_weight * (gather_batch(logits.sigmoid().flatten()).mean() - self.target()).square()
