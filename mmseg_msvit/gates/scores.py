"""Gates that score regions by hand: those whose pixels say least are coarse. They have no weights."""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from ..tokens.embedding import patchify
from .gate import ForcedGate, check_ratio, sure

# Grey levels of normalised images: those of 8 bits fall into bins of their own.
LOWEST, HIGHEST, BINS = -3.0, 3.0, 512


class ScoreGate(ForcedGate):
    """Base of the gates that give each region a score. A subclass has :meth:`score`.

    Args:
        coarse_ratio: the share of an image's regions that are coarse, those of the lowest scores, at each level of
            those that are left, rounded to whole regions. None for scores as they are: then images differ in their
            tokens, and ``threshold`` chooses how many they have.
        at: with ``coarse_ratio=None`` the score of a region whose probability of coarse is one half; the odds of
            coarse are ``at`` / score.
    """

    def __init__(self, *args, coarse_ratio: Optional[float] = 0.5, at: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if coarse_ratio is None and at <= 0:
            raise ValueError(f'at must be positive, got {at}')
        self.coarse_ratio = None if coarse_ratio is None else check_ratio(coarse_ratio)
        self.at = at

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        """(B, hc, wc) float32, what a region has that a coarse token would lose; not negative."""
        raise NotImplementedError

    def regions(self, images: Tensor) -> Tensor:
        """(B, hc, wc, C, R, R) float32, the pixels of each region."""
        return patchify(images.float(), self.region).unflatten(-1, (self.in_channels, self.region, self.region))

    def grey(self, images: Tensor) -> Tensor:
        """(B, hc, wc, R, R) float32, the mean of the channels."""
        return self.regions(images).mean(-3)

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        self.check(images, grid)
        score = self.score(images, grid)
        if self.coarse_ratio is None:
            return (math.log(self.at) - score.clamp(min=1e-8).log()).clamp(-20, 20)
        place = score.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)  # in the order of all regions
        left = torch.ones_like(place, dtype=torch.bool) if left is None else left.flatten(1)
        count = (self.coarse_ratio * left.sum(1, keepdim=True)).round().long()  # (B, 1), of those that are left
        end = place.shape[1]
        ends = F.pad(torch.where(left, place, end).sort(1).values, (0, 1), value=end)  # places of those, in order
        return sure(place, ends.gather(1, count), end).unflatten(1, grid)


@MODELS.register_module()
class VarianceGate(ScoreGate):
    """Scores the variance of the pixels, the mean of the channels'. Takes the arguments of :class:`ScoreGate`."""

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        return self.regions(images).flatten(-2).var(-1, correction=0).mean(-1)


@MODELS.register_module()
class EntropyGate(ScoreGate):
    """Scores the entropy of the grey levels, in bits, as adaptive patch transformers (APT) do.

    The histogram has 512 bins; of normalised images they go from -3 to 3. Takes the arguments of :class:`ScoreGate`.

    Args:
        at: as there; APT takes regions of less than 5.5 bits as coarse.
    """

    def __init__(self, *args, at: float = 5.5, **kwargs):
        super().__init__(*args, at=at, **kwargs)

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        grey = self.grey(images).flatten(-2)  # (B, hc, wc, R * R)
        number = ((grey - LOWEST) * (BINS / (HIGHEST - LOWEST))).long().clamp(0, BINS - 1)
        counts = grey.new_zeros(*grey.shape[:-1], BINS).scatter_add(-1, number, torch.ones_like(grey))
        share = counts / grey.shape[-1]
        return -(share * share.clamp(min=1e-12).log2()).sum(-1)


@MODELS.register_module()
class ReconstructionGate(ScoreGate):
    """Scores what is lost where a region is reduced by half and enlarged again (Quadformer, Ronen et al. 2023).

    The score is sqrt(R * MSE) over R x R pixels, reduced by the mean and enlarged bilinearly. Takes the arguments of
    :class:`ScoreGate`.
    """

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        regions = self.regions(images).flatten(0, 2)  # (B * hc * wc, C, R, R)
        small = F.avg_pool2d(regions, 2, ceil_mode=True)
        again = F.interpolate(small, (self.region, self.region), mode='bilinear', align_corners=False)
        error = (regions - again).square().flatten(1).mean(1)
        return (self.region * error).sqrt().unflatten(0, (-1, *grid))


@MODELS.register_module()
class GradientGate(ScoreGate):
    """Scores the mean slope of the grey levels from pixel to pixel, as Charm does (Behrad et al. 2025).

    Takes the arguments of :class:`ScoreGate`.
    """

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        grey = self.grey(images)  # (B, hc, wc, R, R)
        down, right = grey[..., 1:, :-1] - grey[..., :-1, :-1], grey[..., :-1, 1:] - grey[..., :-1, :-1]
        return (down.square() + right.square()).sqrt().mean((-2, -1))


@MODELS.register_module()
class FrequencyGate(ScoreGate):
    """Scores the energy of the frequencies that half of the resolution cannot hold, as Charm does by a transform.

    The energy is that of the grey levels' cosine transform, a mean over the pixels. Takes the arguments of
    :class:`ScoreGate`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        n = self.region
        frequency, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64) + 0.5
        basis = (math.pi / n * frequency * place).cos() * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
        self.register_buffer('basis', basis.float(), persistent=False)  # (R, R), orthonormal

    def score(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        basis = self.basis.float()  # of a model in another precision, too
        spectrum = basis @ self.grey(images) @ basis.T  # (B, hc, wc, R, R)
        half = self.region // 2
        energy = spectrum.square()
        return (energy.sum((-2, -1)) - energy[..., :half, :half].sum((-2, -1))).clamp(min=0) / self.region**2

    def macs(self, grid: Tuple[int, int]) -> int:
        return grid[0] * grid[1] * 2 * self.region**3
