"""Any number of scales: the invariants that hold for two, and what only more of them have."""

import itertools

import pytest
import torch
from conftest import build_msvit, force_random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_msvit.tokens.selection import TokenSelector
from mmseg_msvit.tokens.token_map import region_grid
from mmseg_msvit.vit.msvit import MSViT

THREE = dict(img_size=128, scales=(16, 32, 64))


def cell_by_cell(logits, sides, grid, image):
    """The definition: of each cell, (level, y, x) of the token that covers it."""
    found = {}
    for y, x in itertools.product(*map(range, grid)):
        for level in range(len(sides) - 1, -1, -1):
            place = y // sides[level], x // sides[level]
            if level == 0 or logits[level - 1][image][place] > 0:
                found[y, x] = (level, *place)
                break
    return found


@settings(max_examples=90, deadline=None)
@given(
    st.tuples(st.integers(1, 11), st.integers(1, 11)),
    st.sampled_from([(1, 2), (1, 3), (1, 2, 4), (1, 3, 6), (1, 2, 4, 8), (1, 2, 6)]),
    st.integers(0, 2),
    st.integers(0, 999),
)
def test_each_cell_is_covered_by_the_coarsest_region_that_says_so(grid, sides, prefix, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, *region_grid(grid, side), generator=generator) for side in sides[1:]]
    select = TokenSelector(sides, prefix=prefix).eval()
    tokens, decision = select([lambda g, left, a=a: a for a in logits], grid)
    number = torch.arange(sum(tokens.lengths)).float()[:, None]
    rows = tokens.to_grid(number)[:, 0].long()  # (B, h, w)
    for image in range(2):
        wanted = cell_by_cell(logits, sides, grid, image)
        owners = {}
        for (y, x), owner in wanted.items():
            row = rows[image, y, x].item()
            assert owners.setdefault(owner, row) == row and tokens.level[row] == owner[0]
            cells = [cell for cell, other in wanted.items() if other == owner]
            center = torch.tensor(cells).float().mean(0) + 0.5
            assert torch.equal(tokens.center[row], center) and tokens.size[row] == len(cells)
        assert tokens.lengths[image] == len(set(owners.values())) + prefix
        assert decision.coarse[-1][image].equal(logits[-1][image] > 0)
    assert tokens.active_counts().tolist() == tokens.lengths == tokens.cu_seqlens.diff().tolist()
    counts = sum(tokens.active_counts(level) for level in range(-1, len(sides)))
    assert counts.tolist() == tokens.lengths


def test_from_grid_is_the_mean_of_a_tokens_cells():
    logits = [torch.randn(2, 3, 4), torch.randn(2, 2, 2)]
    tokens, _ = TokenSelector((1, 2, 4), prefix=1).eval()([lambda g, left, a=a: a for a in logits], (5, 7))
    cells = torch.randn(2, 3, 5, 7)
    mean = tokens.from_grid(cells)
    assert (mean[tokens.prefix_rows()] == 0).all()
    x = torch.randn(len(mean), 3)
    # <to_grid(x), cells> = <x, size * from_grid(cells)>: the adjoint, but for the size
    a, b = (tokens.to_grid(x) * cells).sum(), (x * mean * tokens.size[:, None]).sum()
    torch.testing.assert_close(a, b)


def test_merged_rows_keep_every_cell_and_are_means():
    logits = [torch.full((2, 2, 2), -9.0)]
    tokens, _ = TokenSelector((1, 2), prefix=1).eval()([lambda g, left: logits[0]], (4, 4))
    into = torch.cat([torch.tensor([0, 1, 1, *range(2, 16)]), 16 + torch.tensor([0, 1, 1, *range(2, 16)])])
    merged = tokens.merge(into, [16, 16])
    x = torch.randn(34, 5)
    pooled = tokens.pool(x, into, 32)
    torch.testing.assert_close(pooled[1], x[1:3].mean(0))
    grid = merged.to_grid(pooled)
    torch.testing.assert_close(grid[0, :, 0, 0], pooled[1])
    torch.testing.assert_close(grid[0, :, 0, 1], pooled[1])
    assert merged.size[1] == 2 and merged.center[1].tolist() == [0.5, 1.0] and merged.lengths == [16, 16]
    twice = merged.merge(torch.tensor([0, 1, 1, *range(2, 15), *range(15, 31)]), [15, 16])
    assert twice.size[1] == 3
    torch.testing.assert_close(
        merged.pool(pooled, torch.tensor([0, 1, 1, *range(2, 15), *range(15, 31)]), 31)[1], x[1:4].mean(0)
    )


@pytest.mark.parametrize('size', [(128, 128), (49, 79)])
def test_all_coarsest_is_what_fixed_gates_say_and_each_pixel_has_a_gradient(size):
    model = build_msvit(gate=dict(type='FixedGate', coarse=True), **THREE)
    images = torch.randn(1, 3, *size, requires_grad=True)
    tokens = []
    model.select.register_forward_hook(lambda m, a, out: tokens.append(out[0]))
    model(images)[-1].square().sum().backward()
    assert (images.grad != 0).all()
    assert tokens[0].lengths == [1 + -(-size[0] // 64) * -(-size[1] // 64)]  # all coarsest


@torch.no_grad()
@pytest.mark.parametrize('gate', ['RandomGate', 'VarianceGate'])
def test_a_forced_ratio_holds_at_each_level_for_what_is_left(gate):
    model = build_msvit(gate=dict(type=gate, coarse_ratio=0.5), img_size=512, scales=(16, 32, 64))
    seen = []
    model.select.register_forward_hook(lambda m, a, out: seen.append(out))
    model(torch.randn(4, 3, 512, 512))
    ((tokens, decision),) = seen
    first = decision.coarse[1].float().mean(dim=(1, 2))
    left = 256 - 4 * decision.coarse[1].sum((1, 2))
    second = decision.coarse[0].sum((1, 2)) / left
    if gate == 'VarianceGate':
        assert (first == 0.5).all() and (second == 0.5).all()
    else:
        assert abs(first.mean() - 0.5) < 0.1 and abs(second.mean() - 0.5) < 0.1


@torch.no_grad()
@pytest.mark.parametrize('budget', [7.0, 12.5, 20, 33, 50, 65, 80])
def test_token_budget_is_met_by_one_threshold_for_all_levels(budget):
    model = build_msvit(token_budget=budget, **THREE)
    logits = force_random_logits(model, 3, (8, 8), scale=30.0)
    seen = []
    model.select.register_forward_hook(lambda m, a, out: seen.append(out))
    model(torch.randn(3, 3, 128, 128))
    ((tokens, decision),) = seen
    mean = sum(tokens.lengths) / 3
    assert mean <= budget

    def count(threshold):
        select = TokenSelector(model.sides, prefix=1).eval()
        asked = [lambda g, left, a=a: a - threshold for a in logits]
        return sum(select(asked, (8, 8))[0].lengths) / 3

    every = torch.cat([a.flatten() for a in logits]).sort().values
    counts = [count(threshold) for threshold in [every[0] - 1, *((every[1:] + every[:-1]) / 2), every[-1] + 1]]
    assert counts == sorted(counts)  # more threshold is never fewer tokens
    assert mean == max(c for c in counts if c <= budget)


def test_other_scales_and_patches():
    for patch, scales in ((14, (14, 28, 56)), (8, (8, 16, 32)), (14, (14, 28)), (16, (16, 64)), (16, (16, 48, 96))):
        model = build_msvit(patch_size=patch, scales=scales, img_size=8 * patch)
        h, w = -(-100 // patch), -(-140 // patch)
        assert model.train()(torch.randn(2, 3, 100, 140))[0].shape == (2, 32, h, w)


@pytest.mark.parametrize('scales', [(16, 32, 80), (16,), (16, 32, 32), (16, 64, 32)])
def test_bad_scales(scales):
    with pytest.raises(ValueError, match='scales must be .patch_size, a larger multiple'):
        build_msvit(scales=scales)


def test_two_scales_have_no_new_keys():
    assert not any('coarser' in name for name in MSViT(img_size=64, embed_dims=32, num_heads=2).state_dict())
