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
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.shape = a, b
        # The continued fraction converges fast below the mean; above it, I_x(a, b) = 1 - I_{1-x}(b, a).
        z = x.double().clamp(1e-300, 1 - 1e-16)
        ctx.save_for_backward(z)
        below = z < (a + 1) / (a + b + 2)
        y = torch.where(below, z, 1 - z)
        p = torch.where(below, torch.full_like(y, a), torch.full_like(y, b))
        # It takes O(sqrt(max(a, b))) terms (Numerical Recipes 6.4).
        tail = _incomplete_beta(y, p, a + b - p, steps=64 + round(8 * math.sqrt(max(a, b))))
        return torch.where(below, tail, 1 - tail).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        a, b = ctx.shape
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        log_density = (a - 1) * z.log() + (b - 1) * torch.log1p(-z) - log_beta
        return grad * log_density.exp().clamp(1e-3, 100).to(grad.dtype), None, None


def _incomplete_beta(x: Tensor, a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Regularised incomplete beta function by its continued fraction (DLMF 8.17.22), evaluated from the tail."""
    fraction = torch.ones_like(x)
    for k in range(steps, 0, -1):
        m = k // 2
        if k % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + d / fraction
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return (a * x.log() + b * torch.log1p(-x) - log_beta).exp() / (a * fraction)
