"""Two processes with gloo: what users run on several GPUs."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, sample
from mmengine.dataset import DefaultSampler
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmseg.registry import HOOKS, METRICS, MODELS

MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(
        type='MSViT',
        gate=dict(type='MLPGate', init_coarse=0.5),
        gate_loss=[dict(type='GeneralizedBatchShapingLoss'), dict(type='PurityLoss')],
        **SMALL,
    ),
    decode_head=dict(type='FCNHead', in_channels=32, channels=8, num_classes=4, num_convs=1, in_index=1),
    test_cfg=dict(mode='whole'),
)


def train_two_steps(rank, port, results):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(MODEL)
    model.init_weights()
    wrapped = MMDistributedDataParallel(model).train()  # without find_unused_parameters
    HOOKS.build(dict(type='GateLossHook')).before_train(SimpleNamespace(model=wrapped))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + rank)
    for step in range(2):
        if step:  # one rank all coarse, the other all fine
            answer = 9.0 if rank else -9.0
            model.backbone.gate.register_forward_hook(lambda m, args, out: answer + out - out.detach())  # noqa: B023
        losses = wrapped(
            torch.randn(2, 3, 64, 64), [sample(torch.randint(0, 4, (64, 64))) for _ in range(2)], mode='loss'
        )
        total, log = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    results[rank] = {name: p.detach().clone() for name, p in model.named_parameters()}, sorted(losses)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_together_and_every_parameter_is_reduced(free_port):
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(train_two_steps, (free_port, results), nprocs=2)
    (first, keys), (second, _) = results[0], results[1]
    assert {'gate.loss_gbas', 'gate.loss_purity', 'gate.tokens'} <= set(keys)
    torch.manual_seed(0)
    model = MODELS.build(MODEL)
    model.init_weights()
    for name, start in model.named_parameters():
        torch.testing.assert_close(first[name], second[name])
        # at the second step the last gate layer no longer is zero, so that the layers below it have moved too
        assert not torch.equal(first[name], start.detach()), name


def count_tokens(rank, port, results):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    init_default_scope('mmseg')
    metric = METRICS.build(dict(type='TokenMetric'))
    backbone = MODELS.build(dict(MODEL['backbone'], gate=dict(type='FixedGate', coarse=True))).eval()
    for i in DefaultSampler(range(3), shuffle=False, round_up=True):  # image 0 once more, to fill the last batch
        with torch.no_grad():
            backbone(torch.randn(1, 3, 32, 32 * (i + 1)))
        metric.process({}, [{}])
    results[rank] = metric.evaluate(3)
    dist.destroy_process_group()


@pytest.mark.slow
def test_token_metric_counts_each_image_once(free_port):
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(count_tokens, (free_port, results), nprocs=2)
    assert results[0] == results[1]
    assert results[0]['msvit/tokens_mean'] == 3 and results[0]['msvit/tokens_p50'] == 3  # of 2, 3 and 4 tokens
