"""Gates that score regions by hand: against plain definitions, by ratio, by threshold and over scales."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import build_msvit
from mmseg.registry import MODELS

from mmseg_msvit.gates.scores import BINS, HIGHEST, LOWEST, ScoreGate
from mmseg_msvit.measuring.inspection import record_tokens

KINDS = sorted(name for name, kind in MODELS.module_dict.items() if issubclass(kind, ScoreGate))
R, GRID = 8, (3, 4)


def build(kind, **options):
    return MODELS.build(dict(type=kind, region=R, grid=GRID, embed_dims=16, **options))


def plain_score(kind, region):
    """Of one region (C, R, R) float64, by the words of the docstring."""
    grey = region.mean(0)
    if kind == 'VarianceGate':
        return np.mean([channel.var() for channel in region])
    if kind == 'EntropyGate':
        counts, _ = np.histogram(grey, BINS, (LOWEST, HIGHEST))
        return scipy.stats.entropy(counts, base=2)
    if kind == 'ReconstructionGate':
        small = region.reshape(3, R // 2, 2, R // 2, 2).mean((2, 4))
        again = F.interpolate(torch.from_numpy(small)[None], (R, R), mode='bilinear')[0].numpy()
        return math.sqrt(R * ((region - again) ** 2).mean())
    if kind == 'GradientGate':
        slopes = [
            math.hypot(grey[y + 1, x] - grey[y, x], grey[y, x + 1] - grey[y, x])
            for y in range(R - 1)
            for x in range(R - 1)
        ]
        return np.mean(slopes)
    energy = scipy.fft.dctn(grey, norm='ortho') ** 2
    energy[: R // 2, : R // 2] = 0
    return energy.sum() / R**2


def test_all_are_here():
    assert KINDS == ['EntropyGate', 'FrequencyGate', 'GradientGate', 'ReconstructionGate', 'VarianceGate']


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    contrast = torch.rand(2, 1, *GRID, generator=generator).repeat_interleave(R, 2).repeat_interleave(R, 3)
    return torch.randn(2, 3, R * GRID[0], R * GRID[1], generator=generator).clamp(-2.9, 2.9) * contrast


@pytest.mark.parametrize('kind', KINDS)
def test_a_score_is_what_its_docstring_says(kind, images):
    got = build(kind).score(images, GRID)
    assert got.dtype == torch.float32 and got.shape == (2, *GRID)
    regions = images.double().unfold(2, R, R).unfold(3, R, R).permute(0, 2, 3, 1, 4, 5).numpy()  # (B, hc, wc, C, R, R)
    wanted = [[[plain_score(kind, region) for region in row] for row in image] for image in regions]
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    flat = build(kind).score(torch.full_like(images, 0.3), GRID)
    assert (flat < 1e-3).all()  # a region of one colour has nothing to lose


@pytest.mark.parametrize('kind', KINDS)
def test_by_ratio_and_by_threshold(kind, images):
    score = build(kind).score(images, GRID)
    coarse = build(kind, coarse_ratio=0.25)(images, GRID) > 0
    assert coarse.flatten(1).sum(1).tolist() == [3, 3]
    assert all(s[c].max() <= s[~c].min() for s, c in zip(score, coarse))
    at = score.median().item()
    probability = build(kind, coarse_ratio=None, at=at)(images, GRID).sigmoid()
    torch.testing.assert_close(probability, at / (at + score))
    assert torch.equal(probability > 0.5, score < at)
    assert (build(kind, coarse_ratio=None)(torch.zeros_like(images), GRID).sigmoid() > 0.99).all()
    with pytest.raises(ValueError, match='at must be positive, got 0'):
        build(kind, coarse_ratio=None, at=0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64), (14, 42)])
def test_in_a_backbone_by_threshold_and_by_budget(kind, scales):
    patch = scales[0]
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8 * patch, 6 * patch + 3) * torch.rand(2, 1, 8 * patch, 1)
    gate = dict(type=kind, coarse_ratio=None)
    model = build_msvit(img_size=8 * patch, patch_size=patch, scales=scales, gate=gate).eval()
    tokens = []
    for threshold in (0.0, 0.3, 0.6, 1.0):
        model.select.threshold = threshold
        with torch.no_grad(), record_tokens(model) as seen:
            features = model(images)[-1]
        assert features.isfinite().all() and (seen[0][0].cover >= 0).all()
        tokens.append(sum(seen[0][0].lengths))
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1] == 2 * (8 * 7 + 1)
    model.select.token_budget = 40.0
    with torch.no_grad(), record_tokens(model) as seen:
        model(images)
    assert 30 <= sum(seen[0][0].lengths) / 2 <= 40
