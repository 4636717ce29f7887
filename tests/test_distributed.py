"""One batch in parts: over processes with gloo, what users run on several GPUs, and over steps."""

from copy import deepcopy
from unittest import mock

import pytest
import torch
from conftest import SMALL, build_runner, force_logits, hooked, randomize, sample, spread, tiny_segmentor
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_dist_info
from mmengine.model import (
    MMDistributedDataParallel,
    MMFullyShardedDataParallel,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper
from mmseg.registry import METRICS, MODELS
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mmseg_msvit.vit.blocks import Block
from mmseg_msvit.vit.msvit import MSViT

LOSSES = ('GeneralizedBatchShapingLoss', 'BatchShapingLoss', 'TokenBudgetLoss', 'PurityLoss')
IMAGES = 8


def segmentor(losses=(), train_tokens='active', **head):
    gate, losses = dict(type='MLPGate', init_coarse=0.5), [dict(type=kind) for kind in losses]
    config = tiny_segmentor(dict(dropout_ratio=0, **head), gate=gate, gate_loss=losses, train_tokens=train_tokens)
    return MODELS.build(config)


def batch():
    """Images, labels, logits and noise of gates: all coarse, mixed, or all fine; pure, mixed or unlabelled regions."""
    images = torch.randn(IMAGES, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 4, (IMAGES, 2, 2)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels[::3, ::2] = 3
    labels[:2, :32] = labels[5, 32:] = 255
    logits = 3 * torch.rand(IMAGES, 2, 2).sub(0.5).sign()
    logits[:2], logits[-2:] = 3, -3  # of four ranks the first is all coarse, the last all fine
    return images, labels, logits, 0.4 + 0.2 * torch.rand(IMAGES, 2, 2)


def distributed(model):
    return MMDistributedDataParallel(model)  # without find_unused_parameters


def sharded(model, wrap=Block):
    return MMFullyShardedDataParallel(model, device_id='cpu', auto_wrap_policy=ModuleWrapPolicy({wrap}))


def step(losses, train_tokens='active', parts=1, wrap=distributed):
    """Parameters before and after one step of SGD on the batch in float64, in so many parts one after the other.

    Each of several processes has its share of every part.
    """
    rank, world_size = get_dist_info()
    torch.manual_seed(0)
    model = segmentor(losses, train_tokens)
    randomize(model)
    model.double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = wrap(model) if world_size > 1 else model
    hooked(wrapped)
    optimizer = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.1), accumulative_counts=parts)
    optimizer.initialize_count_status(model, 0, parts)
    for part in zip(*(values.chunk(parts) for values in batch())):
        images, labels, logits, noise = (values.chunk(world_size)[rank] for values in part)
        force_logits(model.backbone, logits)
        with mock.patch('torch.rand_like', lambda like, noise=noise: noise.to(like)), optimizer.optim_context(wrapped):
            losses = wrapped(images, [sample(label) for label in labels], mode='loss')
        optimizer.update_params(model.parse_losses(losses)[0])
        model.backbone.gate._forward_hooks.clear()
    after = wrapped.state_dict()
    return before, {name: after.get(f'module.{name}', after.get(name)) for name in before}


def moved_apart(one, other):
    return {name for name in one if not torch.allclose(one[name], other[name], rtol=0, atol=1e-10)}


STEPS = {mode: dict(train_tokens=mode) for mode in ('all', 'active', 'trimmed')}
STEPS['sharded'] = dict(wrap=sharded)


def steps():
    return {name: step(LOSSES, **options)[1] for name, options in STEPS.items()}


@pytest.mark.slow
@pytest.mark.parametrize('world_size', [2, 4])
def test_a_step_of_several_processes_is_the_step_of_one_on_their_joined_batch(world_size):
    """Ranks of unlike numbers of tokens and of labelled regions, one of them all coarse.

    ``'trimmed'`` keeps as many tokens as the largest image of a rank has: of inactive tokens, which nobody sees, the
    gate alone learns, and it learns of fewer where ranks are smaller than the batch.
    """
    ranks = spread(steps, world_size)
    for name, options in STEPS.items():
        before, joined = step(LOSSES, **options)
        assert moved_apart(before, joined) == set(before)
        apart = moved_apart(ranks[0][name], joined)
        assert apart == ({key for key in before if '.gate.' in key} if name == 'trimmed' else set()), name
        assert all(moved_apart(rank[name], ranks[0][name]) == set() for rank in ranks)


def said_of_a_sharded_backbone():
    model = sharded(segmentor(LOSSES), MSViT)
    with pytest.raises(ValueError) as error:
        hooked(model)
    return str(error.value)


@pytest.mark.slow
def test_gate_losses_want_a_backbone_that_is_not_sharded_by_itself():
    (said,) = spread(said_of_a_sharded_backbone, 1)
    assert 'got FullyShardedDataParallel inside the model around the backbone; let it wrap the blocks' in said


@pytest.mark.parametrize('kind, additive', [
    (None, True), ('PurityLoss', True), ('TokenBudgetLoss', False), ('BatchShapingLoss', False),
    ('GeneralizedBatchShapingLoss', False),
])  # fmt: skip
def test_accumulated_gradients_are_those_of_one_batch_where_a_loss_is_a_mean_over_images(kind, additive):
    """Losses of a batch's distribution are not; PurityLoss is if the parts have equally many labelled regions."""
    losses = [kind] if kind else []
    equal = batch()[1]
    equal[:2, :32] = equal[5, 32:] = 0
    with mock.patch(f'{__name__}.batch', lambda b=batch: (b()[0], equal, *b()[2:])):
        whole, accumulated = step(losses)[1], step(losses, parts=2)[1]
    apart = moved_apart(whole, accumulated)
    assert apart == set() if additive else {name for name in whole if '.gate.' in name} <= apart


@pytest.fixture
def of_two_processes(config):
    """The toy config for a runner in several processes without a GPU, without validation."""
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)  # the default names a GPU
    config.merge_from_dict(dict(launcher='pytorch', model_wrapper_cfg=wrapper, sync_bn='torch'))
    config.custom_hooks.append(dict(type='SyncBuffersHook'))
    return config


def train(config, **options):
    runner = build_runner(config, **options)
    runner.train()
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(of_two_processes):
    config = of_two_processes
    first, second = spread(train, 2, config)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    (name,) = (name for name in first if name.endswith('steps'))
    assert first[name] == 4
    config.merge_from_dict(dict(launcher='none', model_wrapper_cfg=None, resume=True))
    config.train_cfg.max_iters = 6
    resumed = train(config)
    assert resumed[name.removeprefix('module.')] == 6


def losses_with_sync_bn():
    torch.manual_seed(0)
    model = convert_sync_batchnorm(segmentor(norm_cfg=dict(type='BN'))).train()
    synced = [name for name, module in model.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    images, labels, *_ = batch()
    found = []
    for normed in (model, revert_sync_batchnorm(deepcopy(model))):
        torch.manual_seed(0)
        try:
            losses = normed(images.float(), [sample(label) for label in labels], mode='loss')
            found.append(losses['decode.loss_ce'].item())
        except ValueError as error:
            found.append(str(error))
    return synced, *found


@pytest.mark.slow
def test_sync_bn_of_a_head_needs_a_gpu_in_several_processes_and_is_reverted_without():
    """The backbone has no statistics of a batch. In one process SyncBN is BN; in several on CPU torch refuses it."""
    synced, alone, reverted = losses_with_sync_bn()
    assert synced and all(name.startswith('decode_head.') for name in synced) and alone == reverted
    for _, said, again in spread(losses_with_sync_bn, 2):
        assert 'SyncBatchNorm expected input tensor to be on' in said
        assert again == pytest.approx(reverted)


def count_tokens():
    metric = METRICS.build(dict(type='TokenMetric'))
    backbone = MODELS.build(dict(type='MSViT', gate=dict(type='FixedGate', coarse=True), **SMALL)).eval()
    for i in DefaultSampler(range(3), shuffle=False, round_up=True):  # image 0 once more, to fill the last batch
        with torch.no_grad():
            backbone(torch.randn(1, 3, 32, 32 * (i + 1)))
        metric.process({}, [{}])
    return metric.evaluate(3)


@pytest.mark.slow
def test_token_metric_counts_each_image_once():
    results = spread(count_tokens, 2)
    assert results[0] == results[1]
    assert results[0]['msvit/tokens_mean'] == 3 and results[0]['msvit/tokens_p50'] == 3  # of 2, 3 and 4 tokens
