"""TokenMetric: counts as the operators count, once for each image; and the token budget."""

import gc

import numpy as np
import pytest
import torch
from conftest import build_msvit, build_runner, force_logits, tiny_segmentor
from mmengine.config import ConfigDict
from mmseg.registry import METRICS, MODELS

from mmseg_msvit.measuring.flops import dense_macs
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.vit.mixed_scale import MixedScale


def metric(**kwargs):
    return METRICS.build(dict(type='TokenMetric', **kwargs))


@torch.no_grad()
def test_statistics_are_those_of_the_images():
    model, counter = build_msvit(), metric()
    tokens, encoder, dense = [], [], 0
    for size in ((64, 64), (64, 96), (70, 100), (128, 128)):
        with record_tokens(model) as seen:
            force = model.gate.register_forward_hook(lambda m, a, out: torch.randn_like(out))
            model(torch.randn(2, 3, *size))
            force.remove()
        counter.process({}, [{}, {}])
        tokens += seen[0][0].active_counts().tolist()
        encoder += [macs['encoder'] / 1e9 for macs in model.macs(seen[0][0])]
        dense += 2 * dense_macs(model, seen[0][0].grid)['encoder'] / 1e9
    got = counter.evaluate(8)
    assert got['msvit/tokens_mean'] == pytest.approx(np.mean(tokens), abs=1e-3)
    for p in (5, 50, 95):
        assert got[f'msvit/tokens_p{p}'] == pytest.approx(np.percentile(tokens, p), abs=1e-3)
    assert got['msvit/encoder_gmacs_mean'] == pytest.approx(np.mean(encoder), rel=1e-3)
    assert got['msvit/encoder_gmacs_of_dense'] == pytest.approx(100 * sum(encoder) / dense, abs=0.01)
    assert 0 < got['msvit/encoder_gmacs_of_dense'] < 100


@torch.no_grad()
def test_windows_of_an_image_add_up_and_two_metrics_do_not_mix():
    model, counter, idle = build_msvit(gate=dict(type='FixedGate', coarse=False)), metric(), metric()
    for _ in range(3):  # three equal windows of two images
        model(torch.randn(2, 3, 64, 64))
    counter.process({}, [{}, {}])
    assert [image['tokens'] for image in counter.results] == [3 * 17] * 2
    model(torch.randn(1, 3, 32, 32))
    idle.process({}, [{}])
    assert [image['tokens'] for image in idle.results] == [5] and len(counter.results) == 2
    result = counter.evaluate(2)
    assert result['msvit/tokens_of_dense'] == result['msvit/encoder_gmacs_of_dense'] == 100
    # the row of the cls token goes through the patch embedding, too
    assert 100 < result['msvit/backbone_gmacs_of_dense'] < 103


@torch.no_grad()
def test_training_passes_do_not_count_and_nothing_is_collected_for_nobody():
    gc.collect()
    before = set(MixedScale.observers)
    model, counter = build_msvit().train(), metric()
    model(torch.randn(2, 3, 64, 64))
    assert not counter.recorder.passes and counter.recorder in MixedScale.observers
    del counter
    gc.collect()
    assert set(MixedScale.observers) == before


def test_without_an_msvit_it_says_so():
    counter = metric()
    with pytest.raises(RuntimeError, match='no MSViT has run'):
        counter.process({}, [{}])


def test_passes_that_an_interrupted_or_metricless_evaluation_left_do_not_count(config):
    iou = dict(type='IoUMetric', iou_metrics=['mIoU'])
    config.val_evaluator, config.test_evaluator = iou, [iou, dict(type='TokenMetric')]
    runner = build_runner(config, **{'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))})
    first = runner.test()
    assert first['msvit/tokens_mean'] == 4 * 5  # windows of 2 x 2 regions, at first all coarse
    runner.val()
    assert runner.test() == first

    def interrupt(module, args, output):
        raise KeyboardInterrupt

    handle = runner.model.backbone.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.test()
    handle.remove()
    assert runner.test() == first
    del runner
    gc.collect()  # it is a cycle, and its metric would go on to collect the passes of other tests


SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))


@torch.no_grad()
@pytest.mark.parametrize('test_cfg, tokens', [(dict(mode='whole'), 3 * 4 + 1), (SLIDE, 2 * 3 * 5)])
def test_slide_inference(test_cfg, tokens):
    segmentor = tiny_segmentor(gate=dict(type='FixedGate', coarse=True))
    model = MODELS.build(ConfigDict(segmentor, test_cfg=test_cfg)).eval()
    counter = metric()
    model(torch.randn(1, 3, 96, 128), mode='predict')
    counter.process({}, [{}])
    assert counter.results[0]['tokens'] == tokens


@torch.no_grad()
@pytest.mark.parametrize('budget', [5, 9.5, 12, 17, 30])
@pytest.mark.parametrize('with_cls_token', [True, False])
def test_token_budget_is_met_by_the_best_threshold(budget, with_cls_token):
    model = build_msvit(token_budget=budget, with_cls_token=with_cls_token)
    logits = torch.randn(3, 2, 2) * 30  # probabilities of 0 and 1 exactly: only logits can rank them
    force_logits(model, logits)
    with record_tokens(model) as seen:
        model(torch.randn(3, 3, 64, 64))
    tokens, decision = seen[0]
    (coarse,) = decision.coarse
    mean = tokens.active_counts().float().mean().item()
    assert mean <= budget
    assert mean > budget - 1 or not coarse.any()  # a region is worth 3 tokens, 1 of the mean of 3 images
    if coarse.any() and not coarse.all():
        assert logits[coarse].min() > logits[~coarse].max()
    assert sum(tokens.lengths) == tokens.active_counts().sum()


@torch.no_grad()
def test_token_budget_at_odd_edges_and_among_equals():
    model = build_msvit(token_budget=13)
    force_logits(model, torch.zeros(2, 2, 2))
    with record_tokens(model) as seen:
        model(torch.randn(2, 3, 64, 48))  # 4 x 3 cells: the right regions have two cells
    assert seen[0][0].active_counts().float().mean() == 13 and not seen[0][1].coarse[0].any()
    model.select.token_budget = 10
    with record_tokens(model) as seen:
        model(torch.randn(2, 3, 64, 48))
    assert seen[0][0].active_counts().float().mean() <= 10


@torch.no_grad()
def test_token_budget_does_not_spend_a_decision_where_nothing_is_saved():
    model = build_msvit(token_budget=9.5)
    force_logits(model, torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))
    with record_tokens(model) as seen:
        model(torch.randn(1, 3, 48, 48))  # 3 x 3 cells: the last region has one
    assert seen[0][1].coarse[0].tolist() == [[[False, False], [True, False]]] and seen[0][0].lengths == [9]


def test_token_budget_leaves_training_alone_and_says_what_is_impossible():
    model = build_msvit(token_budget=6)
    said = 'token_budget of 6 cannot be met: an image of 16 regions has 17 tokens'
    with pytest.warns(UserWarning, match=said), record_tokens(model) as seen:
        model(torch.randn(1, 3, 128, 128))
    assert seen[0][1].coarse[0].all()
    model.train()(torch.randn(1, 3, 128, 128))
    with pytest.raises(ValueError, match='token_budget must be positive, got 0'):
        build_msvit(token_budget=0)
