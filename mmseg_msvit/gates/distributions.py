"""Distribution functions of the priors that batch shaping compares a gate's answers with."""

import math
from typing import Union

import torch
from torch import Tensor

# Probabilities are clipped to [CLIP, 1 - CLIP] before a CDF sees them: at 0 and 1 its slope is infinite.
CLIP = 1e-3


def relaxed_bernoulli_cdf(x: Tensor, mean: Tensor, temperature: Tensor) -> Tensor:
    """CDF of the relaxed Bernoulli (binary concrete) distribution, Maddison et al. 2017.

    F(x) = sigmoid(temperature * logit(x) - logit(mean)), x clipped to [1e-3, 1 - 1e-3]. All arguments broadcast.

    Args:
        x: values in [0, 1].
        mean: in [0, 1], clipped to [1e-6, 1 - 1e-6]: a learned one may round to an end, whose logit is infinite;
            F(1/2) = 1 - mean.
        temperature: positive; towards 0 the mass moves to the ends.
    """
    return torch.sigmoid(temperature * x.clamp(CLIP, 1 - CLIP).logit() - mean.logit(eps=1e-6))


def normal_cdf(x: Tensor, mean: Union[float, Tensor], std: Union[float, Tensor]) -> Tensor:
    """CDF of the normal distribution."""
    return 0.5 * (1 + torch.erf((x - mean) / (std * math.sqrt(2))))


def beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    """CDF of the Beta distribution, with its density as the gradient.

    As in the published code, the density is clipped to [1e-3, 100]: at the ends it is 0 or infinite.
    """
    return _BetaCDF.apply(x, a, b)


class _BetaCDF(torch.autograd.Function):
    """In the type of its input, and in float32 of a smaller one: not every device knows float64."""

    @staticmethod
    def forward(ctx, x, a, b):
        z = x if x.dtype == torch.float64 else x.float()
        info = torch.finfo(z.dtype)
        z = z.clamp(info.tiny, 1 - info.eps)
        log_kernel = _log_kernel(z, a, b)
        ctx.save_for_backward(z, log_kernel)
        # The continued fraction converges fast below the mean; above it, I_x(a, b) = 1 - I_{1-x}(b, a).
        below = z < (a + 1) / (a + b + 2)
        y = torch.where(below, z, 1 - z)
        p = torch.where(below, torch.full_like(y, a), torch.full_like(y, b))
        # It takes O(sqrt(max(a, b))) terms (Numerical Recipes 6.4).
        fraction = _continued_fraction(y, p, a + b - p, steps=64 + round(8 * math.sqrt(max(a, b))))
        tail = log_kernel.exp() / (p * fraction)
        cdf = torch.where(below, tail, 1 - tail)
        return torch.where((x > 0) & (x < 1), cdf, (x > 0.5).to(cdf)).to(x.dtype)  # the ends, from which z is clamped

    @staticmethod
    def backward(ctx, grad):
        z, log_kernel = ctx.saved_tensors
        log_density = log_kernel - z.log() - torch.log1p(-z)
        return grad * log_density.exp().clamp(1e-3, 100).to(grad.dtype), None, None


def _log_kernel(z: Tensor, a: float, b: float) -> Tensor:
    """log of z^a (1 - z)^b / B(a, b).

    By ratios to the mean, where the terms of large a and b would cancel each other.
    """
    mean = torch.tensor(a / (a + b), dtype=z.dtype).clamp(1e-3, 1 - 1e-3).item()
    off = z - mean
    below = torch.where(off.abs() < mean / 2, torch.log1p(off / mean), z.log() - math.log(mean))
    above = torch.where(off.abs() < (1 - mean) / 2, torch.log1p(-off / (1 - mean)), torch.log1p(-z) - math.log1p(-mean))
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return a * below + b * above + (a * math.log(mean) + b * math.log1p(-mean) - log_beta)


def _continued_fraction(x: Tensor, a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Of the regularised incomplete beta function (DLMF 8.17.22), evaluated from the tail."""
    fraction = torch.ones_like(x)
    for k in range(steps, 0, -1):
        m = k // 2
        if k % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + d / fraction
    return fraction
