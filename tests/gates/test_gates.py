import pytest
import torch
from conftest import SMALL, build_msvit, randomize
from mmseg.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmseg_msvit.measuring.flops import dense_macs, operator_macs
from mmseg_msvit.measuring.inspection import record_tokens

SHAPE = dict(in_channels=3, region=8, grid=(4, 4), embed_dims=16)


LEARNED = ['MLPGate', 'ContextGate', 'GlanceGate']


def build(kind, **kwargs):
    return MODELS.build(dict(type=kind, **{**SHAPE, **kwargs}))


def images(b=2, grid=(4, 4)):
    return torch.randn(b, 3, 8 * grid[0], 8 * grid[1])


def seen(gate):
    """What the gate sees of two images: pixels, or what blocks make of them."""
    return torch.randn(2, gate.embed_dims, 4, 4) if gate.blocks else images()


@pytest.mark.parametrize('init', [0.9, 0.5, 0.01])
@pytest.mark.parametrize('kind', LEARNED)
def test_learned_gate_starts_at_init_coarse(kind, init):
    gate = build(kind, init_coarse=init)
    torch.testing.assert_close(gate(seen(gate), (4, 4)).sigmoid(), torch.full((2, 4, 4), init))


def test_learned_gate_has_four_layers_and_sees_its_own_region_alone():
    gate = build('MLPGate')
    assert sum(isinstance(m, torch.nn.Linear) for m in gate.modules()) == 4
    torch.nn.init.normal_(gate.last.weight)
    x = images(1).requires_grad_()
    gate(x, (4, 4))[0, 1, 2].backward()
    seen = torch.zeros(32, 32, dtype=torch.bool)
    seen[8:16, 16:24] = True
    assert ((x.grad.abs().sum((0, 1)) > 0) == seen).all()


def trained(kind, **kwargs):
    """A gate that answers each region differently."""
    gate = build(kind, **kwargs)
    torch.nn.init.normal_(gate.last.weight)
    return gate


def test_context_gate_sees_several_regions_and_no_further():
    gate = trained('ContextGate', embed_dims=32)
    x = images(1, (24, 24)).requires_grad_()
    gate(x, (24, 24))[0, 12, 12].backward()
    seen = (x.grad.abs().sum((0, 1)) > 0).unflatten(0, (24, 8)).unflatten(2, (24, 8)).any(3).any(1)  # (24, 24)
    assert seen[12 - 3 : 12 + 4, 12 - 3 : 12 + 4].all() and not seen[:3].any() and not seen[:, :3].any()
    assert seen.any(1).sum() >= 15


@pytest.mark.parametrize('region', [8, 14, 28, 32, 48])
@pytest.mark.parametrize('kind', LEARNED)
def test_macs_are_those_of_the_operators_for_any_region_and_grid(kind, region):
    gate = trained(kind, region=region)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = gate(torch.randn(1, 16, 3, 5) if gate.blocks else torch.randn(1, 3, 3 * region, 5 * region), (3, 5))
    assert counter.get_total_flops() == 2 * gate.macs((3, 5)) and logits.std() > 0


def test_context_gates_of_all_levels_cost_two_percent_of_the_vit():
    model = MODELS.build(
        dict(
            type='MSViT', img_size=512, num_heads=6, embed_dims=384, scales=(16, 32, 64), gate=dict(type='ContextGate')
        )
    )
    finest, coarser = (gate.macs(grid) for gate, grid in zip(model.gates, ((16, 16), (8, 8))))
    assert 4 * coarser == finest and finest + coarser < 0.02 * sum(dense_macs(model, (32, 32)).values())


def twin_of_coarse(blocks, **options):
    """A backbone whose gate looks through blocks, and one that is all coarse and gives what they make of it."""
    options = {**SMALL, 'type': 'MSViT', 'num_layers': 3, **options}
    ours = MODELS.build(dict(options, gate=dict(type='GlanceGate', blocks=blocks, init_coarse=0.5))).eval()
    randomize(ours)
    all_coarse = dict(gate=dict(type='FixedGate', coarse=True), out_indices=blocks - 1, out_detail='none')
    coarse = MODELS.build({**options, **all_coarse}).eval()
    coarse.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith(('gate', 'coarser_gates'))})
    return ours, coarse


@torch.no_grad()
@pytest.mark.parametrize('blocks', [1, 2])
@pytest.mark.parametrize('size', [(64, 64), (70, 90), (33, 130)])
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(type='MSBEiT'),
        dict(rope='dinov3', num_register_tokens=2),
        dict(scales=(16, 32, 64)),
        dict(coarse_embed='resize+detail'),
        dict(with_cls_token=False),
    ],
)
def test_a_glance_is_the_features_of_the_same_vit_all_coarse(options, size, blocks):
    ours, coarse = twin_of_coarse(blocks, **options)
    x, glances = torch.randn(2, 3, *size), []
    ours.gates[-1].register_forward_pre_hook(lambda gate, args: glances.append(args[0]))
    _, tokens, decision = ours.tokenize(x)
    side = ours.sides[-1]
    torch.testing.assert_close(glances[0], coarse(x)[0][..., ::side, ::side])
    assert all(logits.std() > 0 for logits in decision.logits)


@pytest.mark.parametrize('options', [{}, dict(scales=(16, 32, 64)), dict(coarse_embed='resize+detail')])
def test_the_macs_of_a_glance_are_those_of_its_operators(options):
    ours, _ = twin_of_coarse(2, **options)
    x = torch.randn(1, 3, 70, 90)
    _, tokens, _ = ours.tokenize(x)
    assert sum(ours.macs(tokens)[0].values()) == operator_macs(ours, x)


def test_a_glance_trains_the_gate_and_nothing_else():
    ours, _ = twin_of_coarse(2, gate_loss=dict(type='TokenBudgetLoss'))
    ours.train()
    ours(torch.randn(2, 3, 64, 64))
    sum(v for k, v in ours.pop_gate_losses([]).items() if k.startswith('loss')).backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()} == {
        f'gate.{name}' for name, _ in ours.gate.named_parameters()
    }


def test_a_glance_is_the_same_in_training_and_under_autocast():
    options = dict(drop_rate=0.5, drop_path_rate=0.5, gate=dict(type='GlanceGate', blocks=2, frozen=True))
    model = MODELS.build(dict(SMALL, type='MSViT', **options))
    randomize(model)
    x = torch.randn(2, 3, 64, 64)
    wanted = model.eval().tokenize(x)[2].logits[0]
    training = [module.training for module in model.train().modules()]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = model.tokenize(x)[2].logits[0]
    assert wanted.std() > 0 and torch.equal(found, wanted)
    assert training == [module.training for module in model.modules()]


def test_weights_of_a_gate_that_looks_through_other_blocks_are_refused():
    learned = build_msvit(gate=dict(type='GlanceGate', blocks=2)).state_dict()
    model = build_msvit(gate=dict(type='GlanceGate', blocks=1))
    with pytest.raises(ValueError, match='gate.blocks: the weights are of a gate that looks through 2, got 1'):
        model.load_state_dict(learned)


def test_a_gate_cannot_look_through_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="gate.blocks must be at most the ViT's 2, got 3"):
        build_msvit(gate=dict(type='GlanceGate'), num_layers=2)


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 64), (70, 90), (33, 130)])
def test_a_levels_answer_does_not_depend_on_the_padding_that_coarser_levels_bring(size):
    x, answers, weights = torch.randn(2, 3, *size), [], trained('ContextGate', region=32, embed_dims=32).state_dict()
    for scales in ((16, 32), (16, 32, 128)):
        model = build_msvit(gate=dict(type='ContextGate'), scales=scales)
        model.gate.load_state_dict(weights)
        answers.append(model.tokenize(x)[2].logits[0])
    assert answers[0].std() > 0 and torch.equal(*answers)


@pytest.mark.parametrize('kind', LEARNED)
def test_learned_gate_is_float32_under_autocast(kind):
    gate = trained(kind)
    x = seen(gate)
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
        ('GlanceGate', dict(blocks=0), 'blocks must be positive, got 0'),
        ('ContextGate', dict(init_coarse=0.0), r'init_coarse must be in \[0.0067, 0.9933\], got 0.0'),
        ('RandomGate', dict(coarse_ratio=1.2), r'coarse_ratio must be in \[0, 1\], got 1.2'),
        ('VarianceGate', dict(coarse_ratio=-1), r'coarse_ratio must be in \[0, 1\], got -1'),
    ],
)
def test_bad_arguments(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **kwargs)


@pytest.mark.parametrize('kind', ['MLPGate', 'ContextGate', 'VarianceGate'])
def test_region_grid_beyond_the_image(kind):
    with pytest.raises(ValueError, match=r'grid \(5, 4\) of 8-pixel regions wants images of .* got \(3, 32, 32\)'):
        build(kind)(images(), (5, 4))


@pytest.mark.parametrize('kind', LEARNED)
@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_frozen_gate_from_a_segmentors_checkpoint(kind, wrapper, tmp_path):
    """The gate of a segmentor trained at 64 px, in a backbone for 128 px."""
    torch.manual_seed(1)
    more = dict(blocks=2) if kind == 'GlanceGate' else {}
    learned = build_msvit(gate=dict(type=kind, **more))
    weights = {f'{wrapper}backbone.{k}': v for k, v in learned.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.gate.')
    gate = dict(more, type=kind, frozen=True, init_cfg=source)
    model = MODELS.build(dict(type='MSViT', gate=gate, **SMALL))
    model.init_weights()
    x = torch.randn(2, 32, 2, 2) if learned.gate.blocks else torch.randn(2, 3, 64, 64)
    assert torch.equal(model.gate(x, (2, 2)), learned.gate(x, (2, 2)))
    assert not model.gate_learns and len(model.gate_losses) == 0
    larger = MODELS.build(dict(type='MSViT', gate=gate, **{**SMALL, 'img_size': 128}))
    larger.init_weights()
    own = larger.gate.state_dict()
    assert all(torch.equal(own[k], v) for k, v in learned.gate.state_dict().items() if k != 'pos_embed')
    assert kind != 'MLPGate' or larger.gate.pos_embed.shape[2:] == (4, 4)


@pytest.mark.parametrize('prefix', ['backbone.gate.', 'backbone.gate', 'gate.', '', 'a.gates.0.', 'old_gate.'])
def test_gates_of_all_levels_from_a_checkpoint(prefix, tmp_path):
    """Those of coarser levels have the same shapes: one is not to be taken for another."""
    shape = dict(SMALL, scales=(16, 32, 64), type='MSViT')
    learned = MODELS.build(dict(shape, gate=dict(type='ContextGate')))
    for gate in learned.gates:
        torch.nn.init.normal_(gate.last.weight)
    known = prefix.rstrip('.').split('.')[-1] == 'gate'
    before = prefix.rpartition('gate')[0] if known else ''
    torch.save({f'{before}{k}': v for k, v in learned.state_dict().items()}, tmp_path / 'a.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix=prefix)
    config = dict(shape, gate=dict(type='ContextGate', frozen=True, init_cfg=source))
    if not known:
        with pytest.raises(ValueError, match="gate.init_cfg: wanted a dict with a prefix that ends with 'gate.'"):
            MODELS.build(config)
        return
    model = MODELS.build(config)
    model.init_weights()
    for gate, wanted in zip(model.gates, learned.gates):
        assert all(torch.equal(a, b) for a, b in zip(gate.parameters(), wanted.parameters()))


def test_a_checkpoint_without_the_gate_is_refused(tmp_path):
    torch.save({'backbone.gate.embed.weight': torch.zeros(2, 2)}, tmp_path / 'a.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.gate.')
    with pytest.raises(
        ValueError, match=r"wanted the gate below prefix 'backbone.gate.' .*embed.weight \(2, 2\), wanted \(16, 192\)"
    ):
        build('MLPGate', init_cfg=source).init_weights()


@pytest.mark.parametrize('least', [16, 8, 0])
def test_a_token_budget_takes_the_regions_that_vary_least_wherever_they_are(least):
    """With 12 of 16 regions coarse, whatever share the gate itself would have."""
    images = torch.randn(2, 3, 128, 128) * torch.rand(2, 1, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3)
    gate = dict(type='VarianceGate', coarse_ratio=least / 16)
    model = build_msvit(img_size=128, gate=gate, token_budget=12 + 4 * 4 + 1)
    with record_tokens(model) as seen:
        model(images)
    variance = images.unfold(2, 32, 32).unfold(3, 32, 32).var((1, 4, 5)).flatten(1)  # (2, 16)
    coarse = seen[0][0].levels()[:, ::2, ::2].flatten(1) > 0
    assert coarse.sum(1).tolist() == [12, 12]
    assert torch.equal(coarse, variance <= variance.sort(1).values[:, 11:12])


@pytest.mark.parametrize('budget', [230, 170, 140])
def test_a_token_budget_takes_them_in_order_with_three_scales_too(budget):
    images = torch.randn(2, 3, 256, 256) * torch.rand(2, 1, 8, 8).repeat_interleave(32, 2).repeat_interleave(32, 3)
    gate = dict(type='VarianceGate')
    model = build_msvit(img_size=256, scales=(16, 32, 64), gate=gate, token_budget=budget)
    with record_tokens(model) as seen:
        model(images)
    levels = seen[0][0].levels()[:, ::2, ::2].flatten(1)  # (2, 64)
    variance = images.unfold(2, 32, 32).unfold(3, 32, 32).var((1, 4, 5)).flatten(1)
    for level, values in zip(levels, variance):
        assert set(level.tolist()) >= {0, 1} and values[level == 1].max() < values[level == 0].min()
