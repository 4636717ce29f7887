"""What every gate, gate loss and backbone keeps: over all that the package exports, so a new one is in at once."""

import copy
import pickle

import pytest
import torch
from conftest import hooked, randomize, sample, tiny_segmentor
from mmseg.registry import HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch.utils.flop_counter import FlopCounterMode

import mmseg_msvit
from mmseg_msvit.gates.gate import Gate
from mmseg_msvit.gates.losses import GateLoss
from mmseg_msvit.measuring.flops import dense_macs
from mmseg_msvit.tokens.selection import Decision
from mmseg_msvit.vit.mixed_scale import MixedScale
from mmseg_msvit.vit.token_heads import TokenHead

REGION, GRID, DIMS = 32, (3, 5), 16


def exported(base):
    """Names of the exported classes of a kind."""
    return [name for name in mmseg_msvit.__all__ if isinstance(getattr(mmseg_msvit, name), type)
            and issubclass(getattr(mmseg_msvit, name), base)]  # fmt: skip


def test_all_that_is_exported_is_registered_under_its_name():
    registries = [MODELS, HOOKS, METRICS, OPTIM_WRAPPER_CONSTRUCTORS]
    for name in mmseg_msvit.__all__:
        value = getattr(mmseg_msvit, name)
        if isinstance(value, type):
            assert any(registry.get(name) is value for registry in registries), name
    assert all(exported(base) for base in (Gate, GateLoss, MixedScale, TokenHead))


@pytest.fixture(params=exported(Gate))
def gate(request):
    """One of a few weights and, where it learns, with an answer for each region of its own."""
    gate = MODELS.build(dict(type=request.param, region=REGION, grid=GRID, embed_dims=DIMS))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gate.eval()


def images(gate, count=3):
    """What the gate sees of so many images, each with a contrast of its own: pixels, or what blocks make of them."""
    shape = (DIMS, *GRID) if gate.blocks else (3, REGION * GRID[0], REGION * GRID[1])
    return torch.randn(count, *shape) * torch.rand(count, 1, 1, 1)


def ask(gate, pixels):
    """Its logits, chance the same each time."""
    torch.manual_seed(1)
    return gate(pixels, GRID)


def test_a_gate_answers_each_region_in_float32_whatever_the_images_are(gate):
    for dtype in (torch.float32, torch.bfloat16):
        logits = ask(gate, images(gate).to(dtype))
        assert logits.shape == (3, *GRID) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_a_gate_answers_an_image_as_it_does_alone(gate):
    pixels = images(gate)
    if type(gate).__name__ != 'RandomGate':
        torch.testing.assert_close(torch.cat([ask(gate, image[None]) for image in pixels]), ask(gate, pixels))


def test_a_gates_macs_are_those_of_its_operators(gate):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ask(gate, images(gate, 1))
    assert 2 * gate.macs(GRID) == counter.get_total_flops()


def test_a_gate_survives_copy_pickle_and_checkpoint(gate):
    pixels, wanted = images(gate), None
    fresh = MODELS.build(dict(type=type(gate).__name__, region=REGION, grid=GRID, embed_dims=DIMS)).eval()
    fresh.load_state_dict(gate.state_dict())
    for twin in (gate, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), fresh):
        wanted = ask(gate, pixels) if wanted is None else wanted
        torch.testing.assert_close(ask(twin, pixels), wanted)


def test_a_gate_that_learns_learns(gate):
    """Bright regions coarse, dark ones fine: a few steps tell them apart."""
    if not any(p.requires_grad for p in gate.parameters()):
        return
    torch.manual_seed(0)
    gate = MODELS.build(dict(type=type(gate).__name__, region=REGION, grid=GRID, embed_dims=DIMS)).train()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    for _ in range(60):
        bright = (torch.rand(8, *GRID) > 0.5).float()
        pixels = (2 * bright - 1)[:, None].expand(-1, DIMS, -1, -1) * torch.linspace(-1, 1, DIMS)[:, None, None]
        if not gate.blocks:
            pixels = torch.kron(2 * bright - 1, torch.ones(REGION, REGION))[:, None].expand(-1, 3, -1, -1)
        logits = gate(pixels, GRID)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, bright)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((logits > 0) == bright.bool()).float().mean() > 0.95


@pytest.fixture(params=exported(GateLoss))
def step(request):
    """A model with this loss alone after a training forward, and the losses of that step."""
    model = MODELS.build(tiny_segmentor(gate_loss=dict(type=request.param), train_tokens='active')).train()
    randomize(model)
    samples = [sample(torch.randint(0, 4, (64, 64)).div(2, rounding_mode='floor')) for _ in range(2)]
    return model, hooked(model)(torch.randn(2, 3, 64, 64), samples, mode='loss')


def test_a_gate_loss_is_a_finite_number_that_teaches_the_gate(step):
    model, losses = step
    own = {name: value for name, value in losses.items() if name.startswith('gate.') and 'loss' in name}
    assert own and all(value.numel() == 1 and value.isfinite() for value in own.values())
    sum(own.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.gate.parameters())
    assert any(p.grad.abs().max() > 0 for p in model.backbone.gate.parameters())
    assert all(p.grad is None for p in model.backbone.layers.parameters())  # and nothing else of the backbone


@pytest.mark.parametrize('name', exported(GateLoss))
def test_a_gate_loss_counts_by_its_weight_and_is_named_for_the_log(name):
    build = lambda **options: MODELS.build(dict(type=name, grid=(2, 2), region=16, **options))  # noqa: E731
    assert 'loss' in build().loss_name and build(level=2).loss_name == f'{build().loss_name}_2'
    assert build(loss_name='loss_mine').loss_name == 'loss_mine'
    with pytest.raises(ValueError, match='loss_name'):
        build(loss_name='mine')


@pytest.fixture(params=exported(MixedScale))
def family(request):
    return request.param


def build(family, **options):
    model = MODELS.build(tiny_segmentor(type=family, **options).backbone)
    model.init_weights()
    randomize(model)
    return model.eval()


@torch.no_grad()
def test_a_backbone_that_is_all_fine_is_its_librarys(family):
    ours = build(family, gate=dict(type='FixedGate'), final_norm=False)
    library = next(base for base in type(ours).__mro__ if base.__module__.startswith('mmseg.models.backbones'))
    options = tiny_segmentor(type=library.__name__, final_norm=False).backbone
    theirs = MODELS.build({**options, **(dict(patch_bias=True) if family == 'MSViT' else {})})
    theirs.eval()  # of BEiT it returns nothing
    theirs.load_state_dict({name: ours.state_dict()[name] for name in theirs.state_dict()})
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_backbone_covers_every_cell_once_and_counts_less_than_dense(family):
    model = build(family, gate=dict(type='VarianceGate'), scales=(16, 32, 64))
    _, tokens, decision = model.tokenize(torch.randn(3, 3, 70, 90))
    assert isinstance(decision, Decision)
    area = torch.bincount(tokens.cover.flatten(), minlength=sum(tokens.lengths))  # cells under each row
    prefix = model.select.prefix * 3
    assert area.sum() == 3 * 5 * 6 and (area > 0).sum() == sum(tokens.lengths) - prefix
    dense = sum(dense_macs(model, (5, 6)).values())
    assert all(sum(image.values()) < dense for image in model.macs(tokens))


@torch.no_grad()
def test_a_backbone_survives_copy_and_pickle(family):
    model = build(family)
    pixels = torch.randn(1, 3, 50, 60)
    wanted = model(pixels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(pixels), wanted)
