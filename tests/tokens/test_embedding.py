import pytest
import torch
import torch.nn.functional as F
from conftest import build_msvit

from mmseg_msvit.tokens.embedding import area_mean, pad_to_regions, patches_at, patchify
from mmseg_msvit.tokens.positions import resample_by_products, resample_table, table_positions
from mmseg_msvit.tooling.timing import peak_memory


def test_patchify_is_a_convolutions_order():
    images, conv = torch.randn(2, 3, 8, 12), torch.nn.Conv2d(3, 5, 4, 4)
    rows = F.linear(patchify(images, 4), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(rows.permute(0, 3, 1, 2), conv(images))


def test_patches_at_places_are_those_of_all():
    images = torch.randn(2, 3, 8, 12)
    image, y, x = (
        torch.tensor([[[0, 1]], [[1, 0]]]),
        torch.tensor([[[1, 0]], [[1, 1]]]),
        torch.tensor([[[2, 0]], [[1, 2]]]),
    )
    assert torch.equal(patches_at(images, 4, image, y, x), patchify(images, 4)[image, y, x])


@pytest.mark.parametrize('side', [2, 3, 4])
def test_area_mean_is_the_average_pool(side):
    images = torch.randn(2, 3, 12 * side, 5 * side, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(area_mean(images, side), F.avg_pool2d(images, side))
    (grad,) = torch.autograd.grad(area_mean(images, side).sum(), images)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / side**2))


@pytest.mark.parametrize('size, grid, padded', [((16, 33), (1, 3), (32, 64)), ((64, 64), (4, 4), (64, 64))])
def test_padding_to_whole_regions(size, grid, padded):
    images = torch.randn(1, 3, *size)
    out, cells = pad_to_regions(images, 16, 2)
    assert cells == grid and out.shape[2:] == padded
    assert torch.equal(out[..., : size[0], : size[1]], images) and out.count_nonzero() == images.numel()


def levels(table, known, grid, sides, mode='bilinear'):
    """Positions of each level, the finest first, and of cls."""
    counts = [-(-grid[0] // side) * -(-grid[1] // side) for side in sides]
    *parts, cls = table_positions(table, known, grid, sides, mode).split([*reversed(counts), 1])
    return parts[::-1], cls


@pytest.mark.parametrize('sides', [(1, 2), (1, 2, 4), (1, 3)])
@pytest.mark.parametrize('grid', [(4, 6), (3, 5), (1, 1)])
def test_coarse_positions_are_the_mean_over_the_cells_that_exist(grid, sides):
    table = torch.randn(1, 1 + grid[0] * grid[1], 7)
    (fine, *coarse), cls = levels(table, grid, grid, sides)
    assert torch.equal(torch.cat((cls, fine)), table[0])
    fine = fine.view(*grid, 7)
    for positions, side in zip(coarse, sides[1:]):
        wc = -(-grid[1] // side)
        for i, position in enumerate(positions):
            y, x = side * (i // wc), side * (i % wc)
            torch.testing.assert_close(position, fine[y : y + side, x : x + side].mean((0, 1)))


def test_coarse_positions_are_the_linear_interpolation_of_the_fine_ones():
    (fine, coarse), _ = levels(torch.randn(1, 1 + 6 * 8, 5), (6, 8), (6, 8), (1, 2))
    half = F.interpolate(fine.T.view(1, 5, 6, 8), scale_factor=0.5, mode='bilinear', align_corners=False)
    torch.testing.assert_close(coarse.T.view(1, 5, 3, 4), half)


def test_grids_are_compared_by_their_sides():
    table = torch.randn(1, 17, 3)
    (fine, _), _ = levels(table, (4, 4), (2, 8), (1, 2))
    wanted = F.interpolate(table[:, 1:].mT.view(1, 3, 4, 4), size=(2, 8), mode='bilinear', align_corners=False)
    torch.testing.assert_close(fine.T.view(1, 3, 2, 8), wanted)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic', 'nearest'])
def test_a_table_is_resampled_with_or_without_smoothing(mode):
    table = torch.randn(1, 3, 9, 9)
    plain = resample_table(table, (4, 5), mode)
    align = None if mode == 'nearest' else False
    torch.testing.assert_close(plain, F.interpolate(table, size=(4, 5), mode=mode, align_corners=align))
    if mode != 'nearest':
        smooth = resample_table(table, (4, 5), f'{mode}-antialias')
        assert smooth.var() < plain.var()
        wanted = F.interpolate(table, size=(4, 5), mode=mode, align_corners=False, antialias=True)
        torch.testing.assert_close(smooth, wanted)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic', 'nearest', 'area', 'bilinear-antialias', 'bicubic-antialias'])
@pytest.mark.parametrize('size', [(4, 5), (9, 7), (1, 20)])
def test_resampling_by_products(mode, size):
    table = torch.randn(1, 3, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(resample_by_products(table, size, mode), resample_table(table, size, mode))


@torch.no_grad()
def test_memory_follows_the_tokens():
    half, fine = (
        build_msvit(img_size=512, embed_dims=384, num_heads=6, num_layers=1, out_indices=0, gate=gate, gate_loss=None)
        for gate in (dict(type='VarianceGate', coarse_ratio=0.5), dict(type='FixedGate'))
    )
    images = torch.randn(1, 3, 512, 512)
    assert peak_memory(half, images) <= 0.65 * peak_memory(fine, images)


@torch.no_grad()
def test_a_photograph_goes_through_in_one_piece():
    model = build_msvit(scales=(16, 32, 64), gate=dict(type='RandomGate', coarse_ratio=0.9), gate_loss=None)
    images = torch.randn(1, 3, 3000, 4000)
    outputs = []
    megabytes = peak_memory(lambda images: outputs.append(model(images)[-1]), images)
    assert outputs[0].shape == (1, 32, 188, 250)
    assert megabytes < 700  # the image itself has 137
