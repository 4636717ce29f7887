import pytest
import torch
import torch.nn.functional as F

from mmseg_msvit.embedding import area_mean, pad_to_regions, patchify, position_tables


def test_patchify_is_a_convolutions_order():
    images, conv = torch.randn(2, 3, 8, 12), torch.nn.Conv2d(3, 5, 4, 4)
    rows = F.linear(patchify(images, 4), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(rows.permute(0, 3, 1, 2), conv(images))


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


@pytest.mark.parametrize('grid', [(4, 6), (3, 5), (1, 1)])
def test_coarse_positions_are_the_mean_over_the_cells_that_exist(grid):
    table = torch.randn(1, 1 + grid[0] * grid[1], 7)
    cls, coarse, fine = position_tables(table, grid, grid, 2, 'bicubic')
    assert torch.equal(torch.cat((cls, fine)), table[0])
    fine = fine.view(*grid, 7)
    wc = -(-grid[1] // 2)
    for i, position in enumerate(coarse):
        y, x = 2 * (i // wc), 2 * (i % wc)
        torch.testing.assert_close(position, fine[y : y + 2, x : x + 2].mean((0, 1)))


def test_coarse_positions_are_the_linear_interpolation_of_the_fine_ones():
    table = torch.randn(1, 1 + 6 * 8, 5)
    _, coarse, fine = position_tables(table, (6, 8), (6, 8), 2, 'bicubic')
    half = F.interpolate(fine.T.view(1, 5, 6, 8), scale_factor=0.5, mode='bilinear', align_corners=False)
    torch.testing.assert_close(coarse.T.view(1, 5, 3, 4), half)


def test_grids_are_compared_by_their_sides():
    table = torch.randn(1, 17, 3)
    _, _, fine = position_tables(table, (4, 4), (2, 8), 2, 'bilinear')
    wanted = F.interpolate(table[:, 1:].mT.view(1, 3, 4, 4), size=(2, 8), mode='bilinear', align_corners=False)
    torch.testing.assert_close(fine.T.view(1, 3, 2, 8), wanted)
