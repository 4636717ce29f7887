import copy
import itertools
import json
import math
import pickle
import warnings

import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import build_msvit, hooked, sample, spread, tiny_segmentor
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_msvit.gates.doubt import class_shares, doubt_scale, doubt_target, region_doubt
from mmseg_msvit.gates.losses import batch_shaping_loss, beta_cdf, normal_cdf, relaxed_bernoulli_cdf
from mmseg_msvit.gates.purity import ALIKE, PurityLoss, region_purity
from mmseg_msvit.tokens.selection import Decision


def tensor(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize('case', range(3))
def test_losses_equal_the_published_ones(case, shared):
    case = json.loads(shared('reference/batch_shaping_vectors.json').read_text())[case]
    close = dict(rtol=1e-9, atol=1e-9)

    def check(value, name, **tolerance):
        torch.testing.assert_close(value, torch.tensor(case[name], dtype=torch.float64), **tolerance)

    m, mean, tau = (tensor(case[name]) for name in ('gate_values', 'prior_mean', 'prior_temperature'))
    loss = batch_shaping_loss(m, lambda x: relaxed_bernoulli_cdf(x, mean, tau))
    loss.backward()
    check(loss, 'gbas_prior_loss', **close)
    check(m.grad, 'gbas_prior_grad_gate', **close)
    check(mean.grad, 'gbas_prior_grad_mean', **close)
    check(tau.grad, 'gbas_prior_grad_temperature', **close)

    mean = tensor(case['prior_mean'])
    center, spread = torch.tensor(case['hyperprior_mean']), torch.tensor(case['hyperprior_std'])  # float32, as there
    hyper = batch_shaping_loss(mean.view(-1, 1), lambda x: normal_cdf(x, center, spread))
    hyper.backward()
    check(hyper, 'hyperprior_loss', **close)
    check(mean.grad, 'hyperprior_grad_mean', **close)

    m = tensor(case['gate_values'])
    flat = batch_shaping_loss(m.view(-1, 1), lambda x: beta_cdf(x, case['bas_beta_a'], case['bas_beta_b']))
    flat.backward()
    check(flat, 'bas_flat_loss', rtol=1e-5, atol=1e-5)
    check(m.grad, 'bas_flat_grad_gate', rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'a, b', [(0.6, 0.4), (2.0, 5.0), (1.0, 1.0), (0.05, 3.0), (40.0, 7.0), (1e4, 1e4), (3e5, 20.0)]
)
def test_beta_cdf_is_scipys(a, b):
    x = torch.linspace(0.001, 0.999, 501, dtype=torch.float64, requires_grad=True)
    out = beta_cdf(x, a, b)
    out.sum().backward()
    torch.testing.assert_close(
        out.detach(), torch.from_numpy(scipy.stats.beta.cdf(x.detach(), a, b)), rtol=0, atol=1e-10
    )
    density = torch.from_numpy(scipy.stats.beta.pdf(x.detach(), a, b)).clamp(1e-3, 100)
    torch.testing.assert_close(x.grad, density, rtol=1e-8, atol=1e-10)
    single = torch.linspace(0.001, 0.999, 501)
    wanted = torch.from_numpy(scipy.stats.beta.cdf(single.double(), a, b)).float()
    # Where the prior is narrow, float32 does not tell values apart as finely.
    torch.testing.assert_close(beta_cdf(single, a, b), wanted, rtol=0, atol=1e-6 + 1e-9 * max(a, b))
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    out = beta_cdf(ends, a, b)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-5)
    assert ends.grad.isfinite().all()


def test_gradcheck_of_batch_shaping():
    values = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    mean, tau = tensor([0.3, 0.5, 0.8]), tensor([0.4, 0.6, 1.1])
    assert gradcheck(
        lambda v, m, t: batch_shaping_loss(v, lambda x: relaxed_bernoulli_cdf(x, m, t)), (values, mean, tau)
    )


def test_relaxed_bernoulli_cdf_is_that_of_its_samples():
    mean, tau = torch.tensor(0.7), torch.tensor(0.5)
    uniform = torch.rand(200_000)
    samples = ((mean.logit() + uniform.logit()) / tau).sigmoid()
    for x in (0.05, 0.5, 0.9):
        share = (samples <= x).float().mean()
        assert abs(share - relaxed_bernoulli_cdf(torch.tensor(x), mean, tau)) < 0.005


def build(kind, **kwargs):
    return MODELS.build(dict(type=kind, grid=(4, 4), region=32, **kwargs))


@pytest.mark.parametrize('grid', [(4, 4), (3, 6)])
def test_generalized_batch_shaping_reaches_every_parameter(grid):
    loss = build('GeneralizedBatchShapingLoss')
    logits = torch.randn(4, *grid, requires_grad=True)
    loss(logits).backward()
    assert logits.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_generalized_batch_shaping_reaches_its_target():
    """Free logits and priors under the loss alone end near the target share, and differ between images."""
    loss = build('GeneralizedBatchShapingLoss', target_coarse=0.3)
    logits = (2 + 0.1 * torch.randn(64, 4, 4)).requires_grad_()
    optimizer = torch.optim.Adam([dict(params=[logits], lr=0.1), dict(params=loss.parameters(), lr=0.01)])
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    coarse = (logits > 0).float()
    assert abs(coarse.mean() - 0.3) < 0.07
    assert coarse.std(0).mean() > 0.3


@pytest.mark.parametrize('seed', [0, 1])
def test_a_gate_that_sees_few_new_images_a_step_holds_its_share(seed):
    """A loss that remembers earlier batches makes it swing between none and all."""
    torch.manual_seed(seed)
    gate = MODELS.build(dict(type='MLPGate', embed_dims=32, region=8, in_channels=3, grid=(4, 4)))
    gate.init_weights()
    loss, shares = build('GeneralizedBatchShapingLoss'), []
    optimizer = torch.optim.AdamW([*gate.parameters(), *loss.parameters()], lr=4e-3)
    for _ in range(400):
        contrast = F.interpolate(torch.rand(4, 1, 4, 4), scale_factor=8)
        logits = gate(torch.randn(4, 3, 32, 32) * contrast + torch.randn(4, 3, 1, 1), (4, 4))
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
        shares.append((logits > 0).float().mean())
    windows = torch.stack(shares[100:]).view(-1, 25).mean(1)
    assert (windows - 0.5).abs().max() < 0.25


@pytest.mark.parametrize('first', [0.1, 0.9])
@pytest.mark.parametrize('images', [1, 4])
def test_a_gate_that_tells_no_images_apart_comes_to_the_target_and_stays(images, first):
    loss, logit = build('GeneralizedBatchShapingLoss'), torch.nn.Parameter(torch.tensor(first).logit())
    optimizer = torch.optim.Adam([logit], lr=0.02)  # the priors stay where they are wanted
    shares = []
    for _ in range(400):
        optimizer.zero_grad()
        loss(logit.expand(images, 4, 4)).backward()
        optimizer.step()
        shares.append(logit.sigmoid().item())
    assert all(0.35 < share < 0.65 for share in shares[200:]), shares[::20]


@pytest.mark.parametrize('name', ['GeneralizedBatchShapingLoss', 'DoubtLoss', 'TokenBudgetLoss'])
def test_a_loss_that_begins_anew_is_as_a_new_one(name):
    loss = build(name, warmup=10)
    new = {key: value.clone() for key, value in loss.named_buffers()}
    assert new
    for _, buffer in loss.named_buffers():
        buffer.add_(3)
    loss.begin()
    assert all(torch.equal(buffer, new[key]) for key, buffer in loss.named_buffers())


def test_a_saturated_prior_has_a_finite_gradient():
    loss = build('GeneralizedBatchShapingLoss')
    with torch.no_grad():
        loss.prior_mean_logit[0, 0, 0] = torch.tensor([20.0, -120.0, 0, 3])
    loss(torch.randn(2, 4, 4)).backward()
    assert loss.prior_mean_logit.grad.isfinite().all()


def test_budget_and_fixed_prior_pull_towards_their_target():
    logits = torch.zeros(2, 4, 4, requires_grad=True)
    build('TokenBudgetLoss', target_coarse=0.9)(logits).backward()
    assert (logits.grad < 0).all()
    logits = torch.full((2, 4, 4), 2.0).add(0.01 * torch.randn(2, 4, 4)).requires_grad_()
    build('BatchShapingLoss', a=0.3, b=0.7)(logits).backward()
    assert logits.grad.sum() > 0  # too coarse for a prior with mean 0.3


def test_purity_of_regions():
    labels = torch.zeros(1, 64, 80, dtype=torch.long)
    labels[0, :32, :8] = 3  # a quarter of region 0
    labels[0, 32:, 32:64] = 255  # nothing labelled in region (1, 1)
    labels[0, 32:48, :32] = 255  # the labelled half of region (1, 0) is pure
    share, labelled = region_purity(labels, (2, 3), 32)
    assert share[0].tolist() == [[0.75, 1, 1], [1, 0, 1]]
    assert labelled[0].tolist() == [[True, True, True], [True, False, True]]
    with pytest.raises(ValueError, match=r'grid \(1, 3\) of 32-pixel regions does not cover'):
        region_purity(labels, (1, 3), 32)


def test_purity_loss_orients_the_logits_and_leaves_unlabelled_regions_alone():
    labels = torch.zeros(1, 32, 96, dtype=torch.long)
    labels[0, :, 32:48] = 1
    labels[0, :, 64:] = 255
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    build('PurityLoss')(logits, [sample(labels[0])]).backward()
    uniform, mixed, unlabelled = logits.grad[0, 0].tolist()
    assert uniform < 0 < mixed and unlabelled == 0


@pytest.mark.parametrize('ignore', [255, -100, -1, 156, 1000])
def test_purity_takes_any_class_and_any_ignored_label(ignore):
    labels = torch.full((1, 40, 32), 300)  # 24 rows of padding below
    labels[0, :16, :16] = 156
    labels[0, 32:, :24] = ignore
    share, labelled = region_purity(labels, (2, 1), 32, ignore)
    assert share.flatten().tolist() == [1.0 if ignore == 156 else 0.75, 1.0] and labelled.all()
    labels = labels % 256  # as labels come from a PNG file
    share, _ = region_purity(labels.to(torch.uint8), (2, 1), 32, ignore % 256)
    assert share[0, 0, 0] == (1.0 if ignore % 256 == 156 else 0.75)


def test_purity_is_the_count_of_the_commonest_class():
    labels = torch.randint(0, 5, (2, 64, 96))
    labels[labels == 4] = 255
    share, labelled = region_purity(labels, (2, 3), 32)
    for b, y, x in itertools.product(range(2), range(2), range(3)):
        counts = labels[b, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].flatten().bincount(minlength=256)[:255]
        assert share[b, y, x] == counts.max() / counts.sum() and labelled[b, y, x]


def test_purity_loss_without_ground_truth_says_so():
    with pytest.raises(ValueError, match='PurityLoss needs data_samples with gt_sem_seg'):
        build('PurityLoss')(torch.zeros(1, 1, 1), [])
    with pytest.raises(ValueError, match='as many data_samples as images, got 2 for 1'):
        build('PurityLoss')(torch.zeros(1, 1, 1), [sample(torch.zeros(32, 32))] * 2)
    model = build_msvit(gate_loss=dict(type='PurityLoss')).train()
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r'PurityLoss .* of the size of the image, \(64, 64\), got \(32, 32\)'):
        model.pop_gate_losses([sample(torch.zeros(32, 32))] * 2)


@pytest.mark.parametrize('size', [(64, 64), (40, 70), (5, 33)])
def test_doubt_is_the_entropy_of_the_mean_distribution_over_the_pixels_that_exist(size):
    logits = 3 * torch.randn(2, 5, *size)
    doubt, known = region_doubt(class_shares(logits, 32))
    whole, _ = region_doubt(class_shares(logits, 16), 2)
    probability = logits.softmax(1)
    assert known.all() and doubt.shape == (2, -(-size[0] // 32), -(-size[1] // 32))
    for y, x in itertools.product(*map(range, doubt.shape[1:])):
        mean = probability[:, :, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].mean((2, 3))
        torch.testing.assert_close(doubt[:, y, x], -(mean * mean.log()).sum(1))
        if 32 * y + 32 <= size[0] and 32 * x + 32 <= size[1]:
            torch.testing.assert_close(doubt[:, y, x], whole[:, y, x])


def test_doubt_of_one_logit_is_that_of_two_classes_and_nothing_is_unknown():
    logit = 2 * torch.randn(1, 1, 32, 32)
    both = torch.cat((logit, torch.zeros_like(logit)), 1)
    torch.testing.assert_close(region_doubt(class_shares(logit, 16)), region_doubt(class_shares(both, 16)))
    doubt, known = region_doubt(torch.tensor([[[[0.0, 0.5, 1]], [[0, 0.5, 0]]]]))
    assert doubt[0, 0].tolist() == pytest.approx([0, math.log(2), 0]) and known[0, 0].tolist() == [False, True, True]


def test_a_target_keeps_the_order_of_doubts_and_its_logit_moves_as_a_whole():
    doubt = torch.tensor([0.0, 0.001, 0.01, 0.1, 1]) + 0.5
    first, second = (doubt_target(doubt, torch.tensor(0.5), torch.tensor(half)) for half in (0.1, 0.01))
    assert first[0] == 1 and first[3] == pytest.approx(0.5) and (first.diff() < 0).all()
    torch.testing.assert_close(first.logit()[1:] - second.logit()[1:], torch.full((4,), math.log(10)))


@pytest.mark.parametrize('share', [0.2, 0.7])
def test_the_scale_of_doubts_puts_the_wanted_share_above_one_half(share):
    doubt = torch.rand(1000).square() + 0.3
    target = doubt_target(doubt, *doubt_scale(doubt, share))
    assert abs((target > 0.5).float().mean() - share) < 0.01 and target.max() == 1
    assert doubt_target(torch.zeros(3), *doubt_scale(torch.zeros(3), share)).tolist() == [1, 1, 1]


@pytest.fixture
def teacher(tmp_path):
    """A dense segmentor, and the argument that names it."""
    head = dict(channels=32, num_convs=0, concat_input=False)
    head.update(norm_cfg=dict(type='SyncBN'), loss_decode=dict(type='CrossEntropyLoss'))
    config = Config(dict(model=tiny_segmentor(head, type='VisionTransformer')))
    model = MODELS.build(config.model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=0.5)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    config.dump(str(tmp_path / 'dense.py'))
    return model.eval(), dict(config=str(tmp_path / 'dense.py'), checkpoint=str(tmp_path / 'dense.pth'))


def test_doubt_loss_teaches_every_level_what_its_teacher_doubts(teacher):
    model, argument = teacher
    loss = dict(type='DoubtLoss', teacher=argument, target_coarse=0.7, loss_weight=2.0)
    pupil = build_msvit(img_size=128, scales=(16, 32, 64), gate_loss=loss, train_tokens='active').train()
    inline = dict(config=Config.fromfile(argument['config']).to_dict(), checkpoint=argument['checkpoint'])
    other = MODELS.build(dict(type='DoubtLoss', teacher=inline, target_coarse=0.7, loss_weight=2.0))
    images = torch.randn(2, 3, 100, 128)
    pupil(images)
    decision = pupil._gated[0][2]
    losses = pupil.pop_gate_losses([])
    with torch.no_grad():
        logits = model.encode_decode(images, [dict(img_shape=(100, 128))])
    for level, region, name in ((0, 32, 'loss_doubt'), (1, 64, 'loss_doubt_2')):
        doubt, _ = region_doubt(class_shares(logits, region))
        target = doubt_target(doubt, doubt.min(), pupil.gate_losses[level].half_doubt)
        assert abs((target > 0.5).float().mean() - 0.7) < 0.1
        bce = torch.nn.functional.binary_cross_entropy_with_logits(decision.logits[level], target)
        torch.testing.assert_close(losses[name], 2 * bce)
        losses[name].backward()
        assert pupil.gates[level].last.weight.grad.abs().sum() > 0
    torch.testing.assert_close(other.of_step(decision, None, [], images), losses['loss_doubt'])

    one, two = (loss.teacher for loss in pupil.gate_losses)
    assert one is two and copy.deepcopy(pupil).gate_losses[0].teacher is one
    assert not any('teacher' in name or 'conv_seg' in name for name, _ in pupil.named_parameters())
    assert not any('teacher' in name for name in pupil.state_dict())
    asked = []
    one.model.backbone.register_forward_hook(lambda *args: asked.append(1))
    pupil(torch.randn(1, 3, 64, 64))
    pupil.pop_gate_losses([])
    assert len(asked) == 1 and len(one.answers) == 1  # those of the images of this test alone


def test_doubt_loss_can_ask_the_segmentor_itself(teacher):
    """A pupil of the teacher's weights doubts as the teacher does, while some of its own tokens are coarse."""
    dense, argument = teacher
    config = Config.fromfile(argument['config']).model
    own, other = dict(type='DoubtLoss', loss_name='loss_own'), dict(type='DoubtLoss', teacher=argument)
    config.backbone.update(
        type='MSViT', patch_bias=False, gate_loss=[own, other], train_tokens='active', input_scale=0.7
    )
    model = revert_sync_batchnorm(MODELS.build(config)).train()
    model.load_state_dict(dense.state_dict(), strict=False)
    hooked(model)
    model.backbone.gate.last.bias.data.fill_(0.0)  # half of the regions are coarse
    labelled = sample(torch.zeros(64, 64, dtype=torch.long))
    losses = model(torch.randn(2, 3, 64, 64), [labelled] * 2, mode='loss')
    assert 0 < losses['gate.coarse_fraction'] < 1
    torch.testing.assert_close(losses['gate.loss_own'], losses['gate.loss_doubt'])
    assert losses['gate.loss_own'].requires_grad and model.backbone.select.threshold == 0.5
    assert model.backbone.input_scale == 0.7
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match='DoubtLoss without a teacher asks the segmentor: pop_gate_losses needs'):
        model.backbone(torch.randn(2, 3, 64, 64))
        model.backbone.pop_gate_losses([labelled] * 2)


@pytest.mark.parametrize('kind', ['shrinking', 'floors that differ'])
def test_the_share_of_coarse_targets_is_kept_while_doubts_change(kind, monkeypatch):
    """A segmentor that learns doubts less and less, and each batch has another least doubt."""
    loss = MODELS.build(dict(type='DoubtLoss', target_coarse=0.3))
    order, seen, shares = torch.rand(4, 16, 16), [], []
    monkeypatch.setattr('mmseg_msvit.gates.doubt.class_shares', lambda *args: None)
    monkeypatch.setattr('mmseg_msvit.gates.doubt.region_doubt', lambda *args: (seen[-1], None))
    loss.teacher = lambda images: None
    for step in range(60):
        if kind == 'shrinking':  # from hardly any difference to a large one
            seen.append(0.02 + 2 * 0.9**step + order * min((step + 1) / 20, 1))
        else:
            seen.append(order + 0.3 * torch.rand(()))
        loss.of_step(Decision([torch.zeros(4, 16, 16)], []), None, [], torch.zeros(4, 3, 1, 1))
        shares.append((doubt_target(seen[-1], seen[-1].min(), loss.half_doubt) > 0.5).float().mean().item())
    assert max(shares) < 0.5 and shares[-1] == pytest.approx(0.3, abs=0.05)


def test_a_running_doubt_is_in_the_checkpoint(teacher):
    loss = MODELS.build(dict(type='DoubtLoss', teacher=teacher[1], momentum=0.5))
    decision = Decision([torch.zeros(1, 2, 2)], [])
    halves = []
    for _ in range(2):
        loss.of_step(decision, None, [], torch.randn(1, 3, 64, 64))
        halves.append(loss.state_dict()['half_doubt'].item())
    assert 0 < halves[0] != halves[1]


@pytest.mark.parametrize('kind', ['TokenBudgetLoss', 'GeneralizedBatchShapingLoss'])
def test_warmup_counts_steps_in_the_checkpoint(kind):
    def model(warmup):
        torch.manual_seed(0)
        return build_msvit(gate_loss=dict(type=kind, warmup=warmup), train_tokens='active').train()

    def step(model):
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64))
        (loss,) = (value for name, value in model.pop_gate_losses([]).items() if name.startswith('loss'))
        return loss

    plain, warm = model(0), model(4)
    factors = [(step(warm) / step(plain)).item() for _ in range(3)]
    resumed = model(4)
    resumed.load_state_dict(warm.state_dict())
    averaged = ExponentialMovingAverage(warm, momentum=0.1)
    averaged.update_parameters(warm)
    factors += [(step(resumed) / step(plain)).item() for _ in range(3)]
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], rel=1e-4)
    assert averaged.module.gate_losses[0].steps == 3


@pytest.mark.parametrize('warmup', [0, 2])
def test_a_target_grows_from_none_to_what_is_asked(warmup):
    """(mean of m - target)^2 with m = 1/2 everywhere says what the target is."""
    loss = build('TokenBudgetLoss', target_coarse=0.4, target_warmup=4, warmup=warmup)
    found = []
    for _ in range(6):
        found.append(0.5 - loss(torch.zeros(1, 2, 2)).sqrt().item())
        loss.take_step(Decision([torch.zeros(1, 2, 2)], []), None, [], None)
        loss = pickle.loads(pickle.dumps(loss))
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    shaped = build('GeneralizedBatchShapingLoss', target_coarse=0.4, target_warmup=4)
    assert shaped.prior_mean_logit.sigmoid().mean() < 0.1  # the priors begin dense too


def test_statistics_of_a_decision():
    logits = [torch.tensor([[[9.0, -9, 0.1]], [[9, 9, -0.1]]]), torch.tensor([[[40.0]], [[-40]]])]
    found = Decision(logits, [logits[0] > 0, logits[1] > 0]).statistics()
    assert found['conditionality'].item() == pytest.approx((0 + 0.5 + 0.5) / 3) and found['conditionality_2'] == 0.5
    assert found['entropy'].item() == pytest.approx(1 / 3, abs=0.01) and found['entropy_2'] < 1e-6
    assert found['coarse_fraction'].item() == pytest.approx(4 / 6) and found['coarse_fraction_2'] == 0.5
    assert not any('loss' in name for name in found)


@pytest.mark.parametrize(
    'kind, kwargs, message',
    [
        ('GeneralizedBatchShapingLoss', dict(target_coarse=1.0), 'target_coarse must be in'),
        ('GeneralizedBatchShapingLoss', dict(spread=0.0), 'spread and temperature must be positive'),
        ('PurityLoss', dict(purity=0.0), 'purity must be in'),
        ('BatchShapingLoss', dict(a=-1.0), 'a and b must be positive'),
        ('TokenBudgetLoss', dict(target_coarse=2), 'target_coarse must be in'),
        ('TokenBudgetLoss', dict(target_warmup=-1), 'target_warmup must be a number of steps, not negative, got -1'),
        ('TokenBudgetLoss', dict(warmup=-1), 'warmup must be a number of steps, not negative, got -1'),
        ('DoubtLoss', dict(teacher=dict(config='a.py')), r'teacher must be dict\(config=..., checkpoint=...\)'),
        ('DoubtLoss', dict(teacher=dict(config='', checkpoint=''), target_coarse=1), 'target_coarse must be in'),
        ('TokenBudgetLoss', dict(loss_name='budget'), "loss_name must start with 'loss_'"),
    ],
)
def test_bad_arguments(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **kwargs)


def _of_unequal_ranks():
    found = {}
    for name, shapes in (('images', ((1, 4, 4), (3, 4, 4))), ('grid', ((2, 4, 4), (2, 3, 5)))):
        shape = shapes[dist.get_rank()]
        for kind in ('BatchShapingLoss', 'TokenBudgetLoss', 'GeneralizedBatchShapingLoss'):
            logits = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
            try:
                out = build(kind)(logits)
                out.backward()
                found[kind, name] = out.item(), logits.grad / 2
            except ValueError as error:
                found[kind, name] = str(error)
    return found


def test_a_share_of_very_many_doubts_is_that_of_some(monkeypatch):
    doubt = torch.rand(5000)
    wanted = doubt_scale(doubt, 0.3)
    monkeypatch.setattr('mmseg_msvit.gates.doubt.MOST_RANKED', 1000)
    monkeypatch.setattr(torch.Tensor, 'quantile', lambda x, q: torch.quantile(x, q) if len(x) <= 1000 else 1 / 0)
    torch.testing.assert_close(doubt_scale(doubt, 0.3), wanted, rtol=0.1, atol=0)


@pytest.mark.slow
def test_ranks_of_unequal_shapes():
    results = spread(_of_unequal_ranks, 2)
    said = 'all ranks must have the same, got [(2, 4, 4), (2, 3, 5)]'
    assert all(said in results[rank]['GeneralizedBatchShapingLoss', 'grid'] for rank in range(2))
    for kind in ('BatchShapingLoss', 'TokenBudgetLoss', 'GeneralizedBatchShapingLoss'):
        parts = [torch.linspace(-1, 1, 16 * images).view(images, 4, 4) for images in (1, 3)]
        logits = torch.cat(parts).requires_grad_()
        out = build(kind)(logits)
        out.backward()
        for rank, grad in enumerate(logits.grad.split([1, 3])):
            value, got = results[rank][kind, 'images']
            assert value == pytest.approx(out.item(), abs=1e-6)
            torch.testing.assert_close(got, grad)
    assert results[0]['TokenBudgetLoss', 'grid'][0] == results[1]['TokenBudgetLoss', 'grid'][0]


class NoFloat64(TorchDispatchMode):
    """An accelerator of a kind that has no float64, such as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, func
        return out


def test_no_step_of_any_loss_wants_float64():
    losses = [
        dict(type=name)
        for name in ('GeneralizedBatchShapingLoss', 'BatchShapingLoss', 'TokenBudgetLoss', 'PurityLoss', 'DoubtLoss')
    ]
    for gate in ('MLPGate', 'ContextGate', 'GlanceGate'):
        config = tiny_segmentor(gate=dict(type=gate), gate_loss=losses, train_tokens='all')
        model = hooked(MODELS.build(config).train())
        samples = [sample(torch.randint(0, 4, (64, 64))) for _ in range(2)]
        with NoFloat64():
            loss, _ = model.parse_losses(model(torch.randn(2, 3, 64, 64), samples, mode='loss'))
            loss.backward()
            with torch.no_grad():
                model.eval()(torch.randn(1, 3, 64, 64), mode='tensor')
    with pytest.raises(AssertionError), NoFloat64():
        torch.ones(1).double()


def labels_of(*ids):
    return [sample(torch.tensor(ids)[torch.randint(0, len(ids), (64, 64))]) for _ in range(2)]


def test_purity_warns_of_labels_of_which_it_can_teach_nothing():
    def train(loss, samples, steps):
        for _ in range(steps):
            loss(torch.zeros(2, 2, 2), samples)

    loss = PurityLoss(grid=(2, 2))
    with pytest.warns(
        UserWarning, match='coarse everywhere: in the first 200 images every labelled .* class 0, .* 255 is no class'
    ):
        train(loss, labels_of(0, 255), ALIKE // 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train(loss, labels_of(0, 255), 2 * ALIKE)  # said once
        fresh = PurityLoss(grid=(2, 2))
        train(fresh, labels_of(3), ALIKE // 2 - 1)
        train(fresh, labels_of(4), ALIKE)  # crops of one class each, and there are two
        train(PurityLoss(grid=(2, 2)), labels_of(0, 1, 255), 2 * ALIKE)
    loss.begin()
    with pytest.warns(UserWarning, match='no pixel has a label'):
        train(loss, labels_of(255), ALIKE // 2)


def test_purity_refuses_labels_that_are_colours():
    model = hooked(MODELS.build(tiny_segmentor(gate_loss=dict(type='PurityLoss'))).train())
    colours = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(64, 64, 3, dtype=torch.long)))
    decision = Decision([torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 2, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r'PurityLoss .* got \(64, 64, 3\), which looks like colours'):
        model.backbone.gate_losses[0].of_step(decision, None, [colours], torch.zeros(1, 3, 64, 64))
