"""The arena and its trained variants: equal tokens for all, what is known is not measured again."""

import json
import runpy
from copy import deepcopy

import pytest
import torch
from conftest import ROOT, build_runner
from mmengine.optim import build_optim_wrapper
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import MODELS

from mmseg_msvit.tooling.conversion import convert
from mmseg_msvit.tooling.dense_pass import find_images, gather
from mmseg_msvit.tooling.lab.arena import as_logits, play, score_doubt, score_random, told
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader


def gathered(dense):
    config = load_config(dense[0])
    model = load_model(config, dense[1], 'cpu', object)
    images, truths = find_images(config, None, 4)
    examples, windows = gather(model, FileReader(config), images, truths, 'mixed')
    return config, model, examples, windows


def test_all_choosers_spend_the_same_and_the_oracle_takes_what_is_sure(dense):
    config, model, examples, windows = gathered(dense)
    converted, _ = convert(config, model, 'context', (16, 32))
    found = {}
    for name, score in (('random', score_random), ('doubt', score_doubt)):
        found[name] = play(converted, examples, windows, name, score(converted, examples, windows), 0.6)
        assert 0.5 < found[name].tokens <= 0.6
    assert found['random'].tokens == found['doubt'].tokens and found['doubt'].encoder < 0.6
    everything = play(converted, examples, windows, 'coarse', score_random(converted, examples, windows), None)
    assert everything.tokens == pytest.approx(10 / 37)


def test_told_gates_decide_as_told(dense):
    config, model, examples, windows = gathered(dense)
    converted, _ = convert(config, model, 'context', (16, 32, 64))
    scores = as_logits(score_random(converted, examples, windows))
    flat = torch.cat([level.flatten() for levels in scores for level in levels])
    assert len(flat.unique()) == len(flat) and flat.isfinite().all()
    seen = []
    handle = converted.backbone.select.register_forward_hook(lambda m, a, out: seen.append(out[1]))
    with told(converted, scores[:2]):
        for example in examples[:2]:
            converted.test_step(
                dict(inputs=[example.data['inputs']], data_samples=[deepcopy(example.data['data_samples'])])
            )
    handle.remove()
    for decision, levels in zip(seen, scores):
        assert torch.equal(decision.coarse[1], levels[1].sigmoid() > 0.5)


def rewritten(checkpoint, folder):
    """Another file with the same weights."""
    torch.save(dict(state_dict=torch.load(checkpoint)), folder / 'other.pth')
    return folder / 'other.pth'


@pytest.mark.slow
def test_the_tool_goes_on_where_it_stopped(dense, tool, tmp_path, capsys):
    line = [
        'lab/arena.py',
        *dense,
        '--out',
        tmp_path,
        '--scales',
        '16,32',
        '--budgets',
        0.6,
        '--sizes',
        'whole',
        'shared',
    ]
    choosers = ['random', 'variance', 'doubt', 'entropy', 'context', 'glance', 'mlp', 'context, labels']
    line += ['--steps', 2, '--fit-images', 3, '--choosers', *choosers]
    assert tool(*line) is None
    rows = json.loads((tmp_path / 'arena.json').read_text())
    names = sorted((row['chooser'], round(row['size'], 2)) for row in rows)
    wanted = [
        ('dense', 1),
        ('coarse', 1),
        ('smaller', 0.77),
        *((name, size) for name in choosers for size in (1, 0.88)),
    ]
    assert names == sorted(wanted)
    chosen = {row['chooser']: row for row in rows}
    assert chosen['dense']['lost'] == 0
    assert chosen['smaller']['tokens'] == pytest.approx(26 / 37)  # 6 x 6 cells become 5 x 5
    costs = {name: chosen[name]['backbone'] - chosen[name]['encoder'] for name in choosers}
    assert max(costs.pop(name) for name in choosers[:4]) < min(costs.values())  # which learn nothing
    assert all(0.5 < row['tokens'] <= 0.6 for row in rows if row['chooser'] not in ('dense', 'coarse', 'smaller'))
    assert '| dense |' in (tmp_path / 'arena.md').read_text() and (tmp_path / 'arena.png').stat().st_size > 1000
    results = tmp_path / 'run_0/results.json'
    known = json.loads(results.read_text())
    results.write_text(json.dumps(known[:-1]))
    capsys.readouterr()
    assert tool(*line) is None
    assert capsys.readouterr().out.count('run_0: Result') == 1
    assert json.loads(results.read_text()) == known
    assert 'a folder for results of checkpoint ' in tool(line[0], dense[0], rewritten(dense[1], tmp_path), *line[3:])
    end = f'a folder for results of limit 2, got {tmp_path}/run_0 with those of limit None'
    assert tool(*line, '--limit', 2).endswith(end)
    mark = tmp_path / 'run_0/of.json'
    mark.write_text(json.dumps(dict(json.loads(mark.read_text()), copied=True)))  # a setting that there is no more
    assert tool(*line).endswith('got ' + f'{tmp_path}/run_0 with those of copied True')


def test_a_model_with_a_gate_is_no_dense_one(dense, tool, tmp_path):
    config = load_config(dense[0])
    config.model.backbone = dict(config.model.backbone, type='MSViT', gate=dict(type='VarianceGate'))
    config.dump(str(tmp_path / 'gated.py'))
    refused = tool('lab/arena.py', tmp_path / 'gated.py', dense[1], '--out', tmp_path / 'out')
    assert "gate=dict(type='FixedGate', coarse=False), got one with VarianceGate" in refused


@pytest.mark.slow
def test_variants_are_trained_and_tested_once(dense, tool, tmp_path, capsys):
    converted, out = tmp_path / 'converted', tmp_path / 'variants'
    assert tool('fit_gate.py', *dense, '--out', converted, '--full-size', '--steps', 2, '--limit', 3) is None
    line = [
        'lab/variants.py',
        *dense,
        '--converted',
        converted,
        '--out',
        out,
        '--budget',
        0.6,
        '--crop',
        64,
        '--variants',
    ]
    names = ['fitted', 'doubt + detail', 'coarse', 'dense']
    assert tool(*line, *names[:2]) is None
    capsys.readouterr()
    assert tool(*line, *names) is None
    assert capsys.readouterr().out.count("'results'") == 2
    runs = json.loads((out / 'variants.json').read_text())
    assert [run['name'] for run in runs] == names and len({run['dense'] for run in runs}) == 1
    for run in runs:
        fine, *mixed = run['results']
        assert fine['tokens'] == 1 and [round(result['size'], 2) for result in mixed] in ([1, 0.88], [1], [0.77])
        assert all(0.5 < result['tokens'] <= 0.6 or run['name'] in ('coarse', 'dense') for result in mixed)
    assert runs[-1]['results'][1]['tokens'] == pytest.approx(26 / 37)  # 5 x 5 of 6 x 6 cells

    def weights(path):
        return torch.load(path, weights_only=False)['state_dict']

    fitted, gate = weights(out / 'fitted_64_0/iter_4.pth'), weights(converted / 'checkpoint.pth')
    frozen = [name for name in gate if name.startswith('backbone.gate.')]
    assert frozen and all(torch.equal(fitted[name], gate[name]) for name in frozen)
    assert not torch.equal(fitted['backbone.cls_token'], gate['backbone.cls_token'])
    assert 'backbone.out_details.0.weight' in weights(out / 'doubt_detail_64_0/iter_4.pth')
    assert (out / 'variants.md').read_text().count('| coarse |') == 2
    assert 'results of checkpoint ' in tool(line[0], dense[0], rewritten(dense[1], tmp_path), *line[3:], names[0])
    assert 'results of budget 0.5, got ' in tool(*line[:-1], '--budget', 0.5, '--variants', names[0])
    assert 'a folder for each checkpoint' in tool(*line[:3], '--converted', converted, converted, '--out', out)


@pytest.mark.slow
def test_a_variant_is_trained_to_its_end_whatever_it_is_loaded_from(config, monkeypatch, tmp_path):
    build_runner(config, **{'train_cfg.max_iters': 3}).train()
    config.load_from, steps = f'{config.work_dir}/iter_3.pth', []
    run_iter = IterBasedTrainLoop.run_iter
    monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', lambda self, x: steps.append(self.iter) or run_iter(self, x))
    train = runpy.run_path(str(ROOT / 'tools/lab/variants.py'))['train']
    config.train_cfg.max_iters = 4
    for folder, wanted in (('new', [0, 1, 2, 3]), ('stopped', [2, 3])):
        (tmp_path / folder).mkdir()
        if folder == 'stopped':
            (tmp_path / folder / 'last_checkpoint').write_text(f'{config.work_dir}/iter_2.pth')
        config.merge_from_dict({'experiment_name': f'variant-{folder}', 'visualizer.name': f'variant-{folder}'})
        assert train(config, 0, tmp_path / folder) == str(tmp_path / folder / 'iter_4.pth')
        assert steps == wanted
        steps.clear()


@pytest.mark.parametrize('constructor', [None, 'MSViTLayerDecayConstructor'])
def test_a_variants_gate_learns_faster_by_any_constructor(constructor, dense, tool, tmp_path):
    assert tool('fit_gate.py', *dense, '--out', tmp_path, '--full-size', '--steps', 2, '--limit', 3) is None
    if constructor:
        with open(tmp_path / 'train.py', 'a') as file:
            file.write(f'optim_wrapper = dict(constructor={constructor!r}, paramwise_cfg=dict(_delete_=True))\n')
    make = runpy.run_path(str(ROOT / 'tools/lab/variants.py'))['variant_config']
    config = make(tmp_path, 'doubt', None)
    model = MODELS.build(config.model)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    rate = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    rates = [rate[id(p)] for p in (model.backbone.gate.last.weight, model.decode_head.decoder_norm.weight)]
    assert rates[0] == pytest.approx(10 * rates[1])
