import pytest
import torch
from conftest import SMALL, build_msvit
from mmseg.registry import MODELS

SHAPE = dict(in_channels=3, region=8, grid=(4, 4), embed_dims=16)


def build(kind, **kwargs):
    return MODELS.build(dict(type=kind, **SHAPE, **kwargs))


def images(b=2, grid=(4, 4)):
    return torch.randn(b, 3, 8 * grid[0], 8 * grid[1])


@pytest.mark.parametrize('kind', ['MLPGate', 'FixedGate', 'RandomGate', 'VarianceGate'])
@pytest.mark.parametrize('grid', [(4, 4), (3, 5), (1, 1)])
def test_one_interface(kind, grid):
    logits = build(kind)(images(grid=grid), grid)
    assert logits.shape == (2, *grid) and logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize('init', [0.9, 0.5, 0.01])
def test_learned_gate_starts_at_init_coarse(init):
    gate = build('MLPGate', init_coarse=init)
    torch.testing.assert_close(gate(images(), (4, 4)).sigmoid(), torch.full((2, 4, 4), init))


def test_learned_gate_has_four_layers_and_sees_its_own_region_alone():
    gate = build('MLPGate')
    assert sum(isinstance(m, torch.nn.Linear) for m in gate.modules()) == 4
    torch.nn.init.normal_(gate.mlp[-1].weight)
    x = images(1).requires_grad_()
    gate(x, (4, 4))[0, 1, 2].backward()
    seen = torch.zeros(32, 32, dtype=torch.bool)
    seen[8:16, 16:24] = True
    assert ((x.grad.abs().sum((0, 1)) > 0) == seen).all()


def test_learned_gate_is_float32_under_autocast():
    gate = build('MLPGate')
    torch.nn.init.normal_(gate.mlp[-1].weight)
    x = images()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = gate(x.bfloat16().float(), (4, 4))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, gate(x.bfloat16().float(), (4, 4)))


def test_fixed_random_and_variance_gates_decide_as_they_say():
    assert (build('FixedGate', coarse=True)(images(), (4, 4)) > 0).all()
    assert (build('FixedGate', coarse=False)(images(), (4, 4)) < 0).all()
    share = (build('RandomGate', coarse_ratio=0.3)(images(500), (4, 4)) > 0).float()
    assert abs(share.mean() - 0.3) < 0.03 and share.mean((1, 2)).std() > 0.05
    x = images(3)
    x[:, :, :8] *= 0.01  # the upper row of regions is smooth
    coarse = build('VarianceGate', coarse_ratio=0.25)(x, (4, 4)) > 0
    assert coarse[:, 0].all() and not coarse[:, 1:].any()


@pytest.mark.parametrize(
    'kind, kwargs, message',
    [
        ('MLPGate', dict(init_coarse=0.999), r'init_coarse must be in \[0.0067, 0.9933\], got 0.999'),
        ('RandomGate', dict(coarse_ratio=1.2), r'coarse_ratio must be in \[0, 1\], got 1.2'),
        ('VarianceGate', dict(coarse_ratio=-1), r'coarse_ratio must be in \[0, 1\], got -1'),
    ],
)
def test_bad_arguments(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **kwargs)


def test_region_grid_beyond_the_image():
    with pytest.raises(ValueError, match=r'grid \(5, 4\) of 8-pixel regions wants images of .* got \(3, 32, 32\)'):
        build('MLPGate')(images(), (5, 4))


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_frozen_gate_from_a_segmentors_checkpoint(wrapper, tmp_path):
    """The gate of a segmentor trained at 64 px, in a backbone for 128 px."""
    learned = build_msvit(gate=dict(type='MLPGate'))
    weights = {f'{wrapper}backbone.{k}': v for k, v in learned.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.gate.')
    gate = dict(type='MLPGate', frozen=True, init_cfg=source)
    model = MODELS.build(dict(type='MSViT', gate=gate, **SMALL))
    model.init_weights()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.gate(x, (2, 2)), learned.gate(x, (2, 2)))
    assert not model.gate_learns and len(model.gate_losses) == 0
    larger = MODELS.build(dict(type='MSViT', gate=gate, **{**SMALL, 'img_size': 128}))
    larger.init_weights()
    assert torch.equal(larger.gate.embed.weight, learned.gate.embed.weight) and larger.gate.pos_embed.shape[2:] == (
        4,
        4,
    )


def test_a_checkpoint_without_the_gate_is_refused(tmp_path):
    torch.save({'backbone.gate.embed.weight': torch.zeros(2, 2)}, tmp_path / 'a.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.gate.')
    with pytest.raises(
        ValueError, match=r"wanted the gate below prefix 'backbone.gate.' .*embed.weight \(2, 2\), wanted \(16, 192\)"
    ):
        build('MLPGate', init_cfg=source).init_weights()
