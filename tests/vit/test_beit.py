"""mmseg's BEiT and MAE with tokens of several scales."""

import pytest
import torch
from conftest import randomize
from mmseg.registry import MODELS

from mmseg_msvit.tokens.positions import Relative

SMALL = dict(img_size=(64, 96), embed_dims=32, num_layers=3, num_heads=2, out_indices=(0, 2), final_norm=True)
FAMILIES = ['BEiT', 'MAE']


def build(family, **options):
    model = MODELS.build({**SMALL, 'type': f'MS{family}', **options})
    model.init_weights()
    randomize(model)
    return model.eval()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('options', [{}, dict(img_size=64, final_norm=False, out_indices=-1, patch_norm=True)])
def test_all_fine_is_mmsegs(family, options):
    options = {**SMALL, **options}
    dense = MODELS.build(dict(type=family, **options))
    dense.init_weights()
    randomize(dense)
    dense.eval()
    model = MODELS.build(dict(type=f'MS{family}', gate=dict(type='FixedGate', coarse=False), **options)).eval()
    assert set(model.state_dict()) == set(dense.state_dict())
    model.load_state_dict(dense.state_dict())
    size = (options['img_size'],) * 2 if isinstance(options['img_size'], int) else options['img_size']
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
@pytest.mark.parametrize('size', [(64, 96), (50, 90), (16, 33), (100, 130)])
def test_bias_of_two_tokens_is_the_mean_over_the_pairs_of_their_cells(scales, size):
    """The definition, cell by cell: each offset has its own bias, the edge of the table where it has none."""
    model = build('BEiT', scales=scales, gate=dict(type='RandomGate', coarse_ratio=0.4)).double()
    _, tokens, _ = model.tokenize(torch.randn(2, 3, *size, dtype=torch.float64))
    layer = model.layers[0].attn
    relative = Relative.of(tokens, model.pos_grid, model.sides)
    table = layer.relative_position_bias_table[:-3].unflatten(0, (2 * 4 - 1, 2 * 6 - 1))  # (7, 11, heads)
    h, w = tokens.grid
    y, x = (torch.arange(h * w) // w, torch.arange(h * w) % w)
    dy = (y[:, None] - y).clamp(-3, 3) + 3
    dx = (x[:, None] - x).clamp(-5, 5) + 5
    cells = table[dy, dx]  # (h * w, h * w, heads)
    for image, (begin, n) in enumerate(zip(tokens.cu_seqlens.tolist(), tokens.lengths)):
        rows = tokens.cover[0, image].flatten() - begin  # (h * w,)
        mean = torch.nn.functional.one_hot(rows, n).T.double()  # (n, h * w)
        mean = mean / mean.sum(1, keepdim=True).clamp(min=1)
        wanted = torch.einsum('ap,bq,pqh->hab', mean, mean, cells)[:, 1:, 1:]
        got = relative.filter(layer.relative_position_bias_table)[relative.index[image]].permute(2, 0, 1)
        torch.testing.assert_close(got[:, 1:, 1:], wanted)
        ends = layer.relative_position_bias_table[-3:]
        assert (got[:, 0, 1:] == ends[0][:, None]).all() and (got[:, 1:, 0] == ends[1][:, None]).all()
        assert torch.equal(got[:, 0, 0], ends[2])


def test_initialisation_is_mmsegs():
    for family in FAMILIES:
        torch.manual_seed(1)
        dense = MODELS.build(dict(type=family, **SMALL))
        model = MODELS.build(dict(type=f'MS{family}', gate=dict(type='FixedGate'), **SMALL))
        dense.init_weights()
        model.init_weights()
        for name, tensor in dense.state_dict().items():
            wanted = tensor.float().std(correction=0).item()
            got = model.state_dict()[name].float().std(correction=0).item()
            assert got == pytest.approx(wanted, rel=0.5, abs=1e-5), name
