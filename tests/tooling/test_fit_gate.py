"""A dense segmentor, trained for seconds on toy scenes, gets a gate."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, build_runner, randomize, tiny_segmentor
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS

from mmseg_msvit.gates.doubt import class_shares, region_doubt
from mmseg_msvit.labels import Classes
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.tooling.conversion import convert, head_on_tokens, write
from mmseg_msvit.tooling.dense_pass import Window
from mmseg_msvit.tooling.gate_fitting import between, find_threshold, shared_size
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader
from mmseg_msvit.tooling.toy_scenes import scene

DENSE = 'configs/toy/segmenter_vit-mini_mask_1xb8-400_toy-scenes-256x256.py'
SIZE = 128


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Scenes, the config of a dense segmentor and its checkpoint."""
    folder = tmp_path_factory.mktemp('fit_gate')
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 32)):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = scene(rng, SIZE)
            cv2.imwrite(str(folder / f'images/{split}/{i:02}.png'), image[: SIZE - 20, :, ::-1])  # no multiple of 16
            cv2.imwrite(str(folder / f'annotations/{split}/{i:02}.png'), labels[: SIZE - 20])
    init_default_scope('mmseg')
    config = Config.fromfile(ROOT / DENSE)
    small = dict(embed_dims=64, num_heads=2, num_layers=2, img_size=SIZE)
    config.model.backbone.update(small)
    config.model.decode_head.update(in_channels=64, channels=64, embed_dims=64, num_heads=2)
    config.model.data_preprocessor.size = (SIZE, SIZE)
    config.param_scheduler = None
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        config[name].update(num_workers=0, persistent_workers=False)
        config[name].dataset.data_root = str(folder)
    config.train_cfg.update(max_iters=100, val_interval=1000)
    config.default_hooks.checkpoint.interval = 100
    config.work_dir = str(folder / 'work')
    config.dump(str(folder / 'dense.py'))
    torch.manual_seed(0)
    build_runner(config).train()
    return folder


@pytest.fixture
def fit(folder, tool):
    """Call with options of the tool: runs it, and gives what it ends with, None if all is well."""

    def call(*options, config='dense.py', checkpoint='work/iter_100.pth'):
        return tool('fit_gate.py', folder / config, folder / checkpoint, '--device', 'cpu', *options)

    return call


@torch.no_grad()
def look(model, config, path, split):
    """Of all images of a split: tokens, logits of each level, and the segmentation."""
    reader, found = FileReader(load_config(str(path))), []
    for image in sorted((config / 'images' / split).iterdir()):
        data, _ = reader.read(image)
        with record_tokens(model) as seen:
            (sample,) = model.test_step(pseudo_collate([data]))
        ((tokens, decision),) = seen
        found.append((tokens.lengths[0] / tokens.dense_length, decision.logits, sample.seg_logits.data[None], sample))
    return found


def rank_correlation(looks, dense, sides):
    """Of the logits of all images with what the dense model sees, at each level."""
    values = []
    for level, side in enumerate(sides):
        doubts = [region_doubt(class_shares(look[2], 16), side)[0].flatten() for look in dense]
        logits = [look[1][level].flatten() for look in looks]
        values.append(scipy.stats.spearmanr(torch.cat(logits), -torch.cat(doubts)).statistic)
    return values


def dense_looks(folder):
    """What the dense model makes of the scenes that it has not seen."""
    config = Config.fromfile(folder / 'dense.py')
    config.model.backbone.update(type='MSViT', gate=dict(type='FixedGate'))
    config.dump(str(folder / 'all_fine.py'))
    model = init_model(config, str(folder / 'work/iter_100.pth'), device='cpu')
    return look(model, folder, folder / 'all_fine.py', 'val')


@pytest.mark.parametrize(
    'gate, scales, budget, steps',
    [('context', (16, 32), 0.6, 150), ('context', (16, 32, 64), 0.35, 300), ('glance', (16, 32), 0.6, 150)],
)
def test_a_dense_model_is_converted(gate, scales, budget, steps, folder, fit, tmp_path, capsys):
    out = tmp_path / 'a/b'
    options = ('--gate', gate, '--budget', budget, '--scales', *scales, '--steps', steps, '--full-size')
    assert fit('--out', out, *options) is None
    printed = capsys.readouterr().out
    assert '24 images' in printed and 'converted' in printed and 'mIoU' in printed
    assert sorted(path.name for path in out.iterdir()) == ['checkpoint.pth', 'config.py', 'picture.png', 'train.py']
    assert cv2.imread(str(out / 'picture.png')).shape[1] == pytest.approx((3 + len(scales)) * 480, abs=1)

    before = torch.load(folder / 'work/iter_100.pth', weights_only=False)['state_dict']
    after = torch.load(out / 'checkpoint.pth', weights_only=True)['state_dict']
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split('.')[1] for name in set(after) - set(before)} <= {'gate', 'coarser_gates'}

    model = init_model(str(out / 'config.py'), str(out / 'checkpoint.pth'), device='cpu')
    assert model.dataset_meta['classes'][0] == 'sky' and not model.backbone.gate_learns
    inference_model(model, str(folder / 'images/val/00.png'))
    fitted = look(model, folder, out / 'config.py', 'train')
    share = np.mean([tokens for tokens, *_ in fitted])
    assert budget - 0.03 < share <= budget + 1e-6

    dense = dense_looks(folder)
    found = look(model, folder, out / 'config.py', 'val')
    finest, *coarser = rank_correlation(found, dense, model.backbone.sides[1:])
    assert finest > 0.7 and all(rank > 0.6 for rank in coarser)

    def agreement(looks):
        pairs = [(a[3].pred_sem_seg.data == b[3].pred_sem_seg.data).float().mean() for a, b in zip(looks, dense)]
        return np.mean(pairs)

    def elsewhere(module, args, logits):
        """The same answers at other places."""
        return logits.flatten()[torch.randperm(logits.numel())].view_as(logits)

    for gate in model.backbone.gates:
        gate.register_forward_hook(elsewhere)
    random = [agreement(look(model, folder, out / 'config.py', 'val')) for _ in range(3)]
    assert agreement(found) > max(random)


@pytest.mark.parametrize('budget, size', [(1, 1), (0.81, 0.9**0.5), (0.6, 0.6**0.25), (0.3, 0.85)])
def test_half_of_the_saving_is_the_size_but_images_stay_legible(budget, size):
    assert shared_size(budget) == pytest.approx(size, abs=1e-3)


def test_part_of_the_saving_is_the_size(folder, fit, tmp_path):
    assert fit('--out', tmp_path, '--budget', 0.5, '--steps', 30) is None
    model = init_model(str(tmp_path / 'config.py'), str(tmp_path / 'checkpoint.pth'), device='cpu')
    assert model.backbone.input_scale == 0.85
    found = look(model, folder, tmp_path / 'config.py', 'train')
    assert 0.45 < np.mean([tokens for tokens, *_ in found]) <= 0.5 + 1e-6


def test_a_segmentor_whose_vit_another_library_has_named(folder, fit, tmp_path):
    config = Config.fromfile(folder / 'dense.py')
    config.model.backbone.update(type='MSViT', gate=dict(type='FixedGate'))
    config.dump(str(tmp_path / 'dense.py'))
    before = torch.load(folder / 'work/iter_100.pth', weights_only=False)['state_dict']
    names = {name: name for name in before}
    for ours, theirs in (('attn.attn.in_proj_', 'attn.qkv.'), ('attn.attn.out_proj', 'attn.proj')):
        names.update({n: new.replace(ours, theirs) for n, new in names.items() if n.startswith('backbone.')})
    foreign = {names[name]: tensor for name, tensor in before.items()}
    torch.save(foreign, tmp_path / 'foreign.pth')
    paths = dict(config=tmp_path / 'dense.py', checkpoint=tmp_path / 'foreign.pth')
    assert fit('--out', tmp_path / 'out', '--steps', 2, **paths) is None
    after = torch.load(tmp_path / 'out/checkpoint.pth', weights_only=True)['state_dict']
    assert set(foreign) != set(before) and all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='VisionTransformer', qkv_bias=False),
        dict(type='VisionTransformer', patch_bias=True, out_indices=(0, 1)),
        dict(type='BEiT', init_values=0.1),
        dict(type='MAE', init_values=0.1),
        dict(type='MSViT', layer_scale_init_value=0.1, num_register_tokens=2, gate=dict(type='FixedGate')),
    ],
)
def test_any_plain_vit_is_taken_over_and_is_itself_where_the_gate_says_fine(backbone):
    backbone = dict(img_size=(64, 96), patch_size=16, embed_dims=32, num_layers=2, num_heads=2, **backbone)
    backbone.setdefault('out_indices', (1,))
    config = Config(dict(model=tiny_segmentor(dict(channels=32, num_convs=0, concat_input=False), **backbone)))
    dense = MODELS.build(config.model)
    dense.init_weights()
    randomize(dense)
    dense.eval()
    model, changes = convert(config, dense, 'mlp', (16, 32, 64))
    assert changes['type'] == {'VisionTransformer': 'MSViT', 'BEiT': 'MSBEiT', 'MAE': 'MSMAE'}.get(
        backbone['type'], backbone['type']
    )
    images, metas = torch.randn(2, 3, 64, 96), [dict(img_shape=(64, 96))] * 2
    mixed = model.encode_decode(images, metas)
    for gate in model.backbone.gates:
        gate.register_forward_hook(lambda module, args, logits: torch.full_like(logits, -20.0))
    wanted = dense.encode_decode(images, metas)
    torch.testing.assert_close(model.encode_decode(images, metas), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed, wanted, atol=1e-3)


def test_other_ways_to_fit(folder, fit, tmp_path):
    """An unlabelled folder, a local gate, labels, slide inference, an MSViT that is all fine."""
    config = Config.fromfile(folder / 'dense.py')
    config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(40, 40))
    config.model.backbone.update(type='MSViT', patch_bias=True, gate=dict(type='FixedGate', coarse=False))
    config.custom_imports = dict(imports=['mmseg_msvit', 'json'])
    config.dump(str(folder / 'slide.py'))
    options = ('--steps', 2, '--gate', 'mlp', '--budget', 0.5, '--limit', 5)
    assert fit('--out', tmp_path / 'slide', *options, config='slide.py') is None
    model = init_model(str(tmp_path / 'slide/config.py'), str(tmp_path / 'slide/checkpoint.pth'), device='cpu')
    assert type(model.backbone.gate).__name__ == 'MLPGate' and 0 < model.backbone.gate.threshold < 1
    (folder / 'slide.py').unlink()
    assert fit('--out', tmp_path / 'folder', '--images', folder / 'images/val', '--steps', 2) is None
    assert fit('--out', tmp_path / 'labels', '--target', 'labels', '--steps', 2, '--limit', 5) is None
    weights = [torch.load(tmp_path / name / 'checkpoint.pth')['state_dict'] for name in ('folder', 'labels')]
    assert not torch.equal(*(w['backbone.gate.head.weight'] for w in weights))


def test_a_head_goes_over_to_tokens_with_its_weights(folder, fit, tmp_path):
    """Segmenter's answers are the dense model's where all tokens are fine; a linear head's are the grid's for any."""
    images, metas = torch.randn(2, 3, SIZE, SIZE), [dict(img_shape=(SIZE, SIZE))]
    for linear in (False, True):
        config = load_config(str(folder / 'dense.py'))
        if linear:
            config.model.decode_head = dict(
                type='FCNHead', in_channels=64, channels=64, num_convs=0, concat_input=False, num_classes=7
            )
            config.dump(str(tmp_path / 'linear.py'))
            config = load_config(str(tmp_path / 'linear.py'))
        dense = MODELS.build(config.model)
        randomize(dense)
        assert head_on_tokens(dense) == ('TokenLinearHead' if linear else 'TokenSegmenterHead')
        model, changes = convert(config, dense.eval(), 'context', (16, 32), on_tokens=True)
        grid, _ = convert(config, dense, 'context', (16, 32))
        randomize(grid.backbone.gate)
        model.backbone.gate.load_state_dict(grid.backbone.gate.state_dict())
        with torch.no_grad():
            for threshold in (1.0, 0.5) if linear else (1.0,):
                model.backbone.select.threshold = grid.backbone.select.threshold = threshold
                answers = [each.encode_decode(images, metas) for each in (model, grid)]
                torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
        write(config, model, changes, Classes.of(dense.decode_head, {}), tmp_path / str(linear))
        torch.save(dense.state_dict(), tmp_path / str(linear) / 'dense.pth')
        written = load_config(str(tmp_path / str(linear) / 'config.py'))
        again = load_model(written, str(tmp_path / str(linear) / 'checkpoint.pth'), 'cpu')
        assert again.decode_head.state_dict().keys() == dense.decode_head.state_dict().keys()
        assert written.model.backbone.out_type == 'tokens'
    assert fit('--out', tmp_path / 'fitted', '--steps', 1, config=tmp_path / 'linear.py',
               checkpoint=tmp_path / 'True/dense.pth') is None  # fmt: skip
    assert load_config(str(tmp_path / 'fitted/config.py')).model.decode_head.type == 'TokenLinearHead'
    dense.auxiliary_head = dense.decode_head
    assert head_on_tokens(dense) is None


@pytest.mark.parametrize('gate', ['entropy', 'frequency'])
def test_a_score_by_hand_gets_its_threshold_alone(gate, folder, fit, tmp_path):
    assert fit('--gate', gate, '--out', tmp_path, '--full-size', '--budget', 0.7) is None
    config = load_config(str(tmp_path / 'config.py'))
    kind = {'entropy': 'EntropyGate', 'frequency': 'FrequencyGate'}[gate]
    assert config.model.backbone.gate.type == kind and config.model.backbone.gate.coarse_ratio is None
    model = init_model(config, str(tmp_path / 'checkpoint.pth'), device='cpu')
    shares = [found[0] for found in look(model, folder, tmp_path / 'config.py', 'train')]
    assert 0.6 < np.mean(shares) <= 0.7 and np.std(shares) > 0
    anew = load_config(str(tmp_path / 'train.py'))
    model = MODELS.build(anew.model)
    assert type(model.backbone.gate).__name__ == kind and not model.backbone.gate_learns
    assert any(hook.type == 'DenseFirstHook' for hook in anew.custom_hooks)


def test_what_cannot_be_fitted_is_said_in_one_line_and_leaves_nothing(folder, fit, tmp_path):
    out = tmp_path / 'out'
    assert fit('--out', out, '--budget', 1.5) == '--budget: wanted a share of the tokens, in (0, 1), got 1.5'
    end = fit('--out', out, '--scales', 16, 40)
    assert end.startswith('--scales: scales must be (patch_size, a larger multiple')
    end = fit('--out', out, '--budget', 0.1, '--steps', 2, '--limit', 2, '--full-size')
    assert end.startswith('--budget: wanted at least 0.30') and end.endswith('more --scales allow less')
    end = fit('--out', out, '--target', 'labels', '--images', folder / 'images/val')
    assert end.startswith('--target labels: wanted labels of each image, got none of')
    config = Config.fromfile(folder / 'dense.py')
    train, config.train_dataloader = config.train_dataloader, None
    config.dump(str(folder / 'other.py'))
    end = fit('--out', out, config='other.py')
    assert end.startswith('CONFIG: wanted one with a train_dataloader, or --images, got')
    config.train_dataloader = train
    config.model.backbone.update(type='MSViT')
    config.dump(str(folder / 'other.py'))
    assert "dense model want gate=dict(type='FixedGate')" in fit('--out', out, config='other.py')
    for options, got in (
        (
            dict(gate=dict(type='VarianceGate')),
            "an MSViT with gate=dict(type='FixedGate', coarse=False), got one with Var",
        ),
        (dict(gate=dict(type='FixedGate'), token_budget=9), 'token_budget=None and input_scale=1, got 9 and 1.0 in'),
    ):
        config.model.backbone.update(options)
        config.dump(str(folder / 'other.py'))
        assert got in fit('--out', out, config='other.py')
    config.model.backbone = dict(type='ResNetV1c', depth=18)
    config.dump(str(folder / 'other.py'))
    assert fit('--out', out, config='other.py', checkpoint='none.pth').startswith('CHECKPOINT: wanted a file')
    assert not out.exists()


@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
def test_train_py_begins_as_the_dense_config_does_with_the_fitted_gate(scales, fit, tmp_path):
    assert fit('--out', tmp_path, '--steps', 2, '--limit', 3, '--scales', *scales) is None
    config = Config.fromfile(tmp_path / 'train.py')
    assert config.load_from is None
    model = MODELS.build(config.model)
    model.init_weights()
    fitted = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['state_dict']
    mine = model.state_dict()
    gates = [name for name in fitted if name.split('.')[1] in ('gate', 'coarser_gates')]
    assert all(torch.equal(mine[name], fitted[name]) for name in gates) and len(gates) > 20 * (len(scales) - 1)
    assert not torch.equal(
        mine['backbone.layers.0.attn.attn.in_proj_weight'], fitted['backbone.layers.0.attn.attn.in_proj_weight']
    )
    assert not model.backbone.gate_learns and config.custom_hooks[-1] == dict(type='DenseFirstHook')
    assert model.backbone.select.threshold == Config.fromfile(tmp_path / 'config.py').model.backbone.gate.threshold


def test_train_py_of_a_gate_that_looks_through_blocks_begins_with_these(fit, tmp_path):
    assert fit('--out', tmp_path, '--steps', 2, '--limit', 3, '--gate', 'glance') is None
    config = Config.fromfile(tmp_path / 'train.py')
    assert config.load_from == str(tmp_path / 'checkpoint.pth')
    assert config.model.backbone.gate.blocks == 1  # a quarter of two, but one at least
    fitted = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['state_dict']
    model = MODELS.build(config.model)
    model.load_state_dict(fitted)
    assert not model.backbone.gate_learns


def test_a_pretrained_patch_bias_which_mmsegs_vit_drops_has_a_place_when_trained_anew(tmp_path):
    config = Config(dict(model=tiny_segmentor(type='VisionTransformer')))
    dense = MODELS.build(config.model)
    model, changes = convert(config, dense, 'mlp', (16, 32))
    assert dense.backbone.patch_embed.projection.bias is None
    assert (model.backbone.patch_embed.projection.bias == 0).all()
    source = MODELS.build(dict(config.model.backbone, patch_bias=True))
    torch.save(randomize(source) or source.state_dict(), tmp_path / 'vit.pth')
    anew = dict(changes, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth')))
    backbone = MODELS.build({**config.model.backbone, **anew})
    backbone.init_weights()
    assert torch.equal(backbone.patch_embed.projection.bias, source.patch_embed.projection.bias)


@pytest.mark.parametrize('name', ['config.py', 'checkpoint.pth', 'train.py', 'picture.png'])
def test_files_of_others_are_not_replaced(name, fit, tmp_path):
    (tmp_path / name).write_text('mine')
    end = fit('--out', tmp_path, '--steps', 2, '--limit', 2)
    assert end.startswith(
        f'--out: wanted a new folder, or one of this tool, got {tmp_path}, where {name} would be repl'
    )
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == 'mine'


def test_a_dense_checkpoint_that_lies_among_converted_ones_is_not_replaced(folder, fit, tmp_path):
    (tmp_path / 'config.py').write_text('# dense.py with a gate that was fitted to it.')
    shutil.copy(folder / 'work/iter_100.pth', tmp_path / 'checkpoint.pth')
    end = fit('--out', tmp_path, checkpoint=tmp_path / 'checkpoint.pth')
    assert 'where checkpoint.pth would be replaced' in end


def test_an_unfinished_checkpoint_does_not_replace_one(fit, tmp_path, monkeypatch):
    before = '# dense.py with a gate that was fitted to it.'
    for name in ('checkpoint.pth', 'config.py'):
        (tmp_path / name).write_text(before)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(KeyboardInterrupt):
        fit('--out', tmp_path, '--steps', 2, '--limit', 2)
    assert all(Path(tmp_path / name).read_text() == before for name in ('checkpoint.pth', 'config.py'))


@pytest.mark.parametrize('steps', [1, 2, 10, 19])
def test_any_number_of_steps_will_do(steps, fit, tmp_path):
    assert fit('--out', tmp_path, '--steps', steps, '--limit', 2) is None


def test_no_region_stands_at_the_threshold():
    """Else a rounding in another runtime turns it over."""
    probabilities = [0.1, 0.2, 0.4, 0.4, 0.7, 0.9]
    logits = torch.tensor(probabilities).logit().view(1, 2, 3)
    windows = [Window(0, (0, 0, 64, 96), torch.zeros(1, 4, 6))]
    backbone = SimpleNamespace(sides=(1, 2), input_scale=1.0, select=SimpleNamespace(prefix=0))
    for fine in range(7):
        budget = (6 + 3 * fine + 0.1) / 24
        threshold, share = find_threshold(backbone, windows, [[logits]], budget)
        wanted = fine if fine != 3 else 2  # two regions are equal
        assert round(24 * share) == 6 + 3 * wanted
        assert (logits.sigmoid() - threshold).abs().min() > 0.04 or threshold in (0, 1)
    assert between(0.25, np.nextafter(np.float32(0.25), np.float32(1))) == 0.25  # there is no number between
    assert between(1.0, 1.0) == 1.0 and between(0.5, 1.0) == 0.75
