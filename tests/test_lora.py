"""mmpretrain's LoRA around a ViT: its checkpoints, a gate that learns along, and what tools say of it."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import build_runner, hooked, randomize, sample, tiny_segmentor, write_model
from mmengine.config import Config, ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmseg.registry import HOOKS, MODELS
from torch import nn

pytest.importorskip('mmpretrain')

from mmpretrain.models import LoRAModel  # noqa: E402, F401

from mmseg_msvit import load_backbone  # noqa: E402
from mmseg_msvit.lora import MSLoRAModel, merge_lora  # noqa: E402
from mmseg_msvit.measuring.inspection import record_tokens  # noqa: E402
from mmseg_msvit.tooling.models import load_config, load_model  # noqa: E402

TARGETS = [dict(type='.*out_proj'), dict(type='.*ffn.layers.1')]


def in_lora(config, kind='MSLoRAModel', **module):
    """A segmentor's config with its backbone in a LoRA."""
    config = deepcopy(config)
    vit = {**config.backbone, **module, 'type': f'mmseg.{config.backbone.type}'}
    config.backbone = ConfigDict(type=kind, module=vit, rank=2, alpha=2, targets=TARGETS)
    return config


@pytest.fixture
def pretrained(tmp_path):
    """A dense segmentor's checkpoint."""
    model = MODELS.build(tiny_segmentor(gate=dict(type='FixedGate')))
    randomize(model)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    return dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'), prefix='backbone.')


def trained(model):
    """Its every trainable weight, by a step that cannot be guessed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize('kind', ['MSLoRAModel', 'mmpretrain.LoRAModel'])
def test_what_a_lora_has_saved_is_loaded_again(kind, pretrained):
    gate = dict(type='MLPGate') if kind == 'MSLoRAModel' else dict(type='VarianceGate')
    config = in_lora(tiny_segmentor(gate=gate), kind, init_cfg=pretrained)
    model = MODELS.build(config)
    model.init_weights()  # as a runner does, once more
    weights = torch.load(pretrained['checkpoint'])
    layer = model.backbone.module.layers[0].ffn.layers[1]
    assert torch.equal(layer.original_layer.weight, weights['backbone.layers.0.ffn.layers.1.weight'])
    assert (layer.lora_up.weight == 0).all()  # it begins as the pretrained ViT

    saved = {name: tensor.clone() for name, tensor in trained(model).state_dict().items()}
    of_vit = {name for name in saved if name.startswith('backbone.') and '.lora_' not in name}
    gates = ('backbone.module.gate.', 'backbone.module.gate_losses.')
    assert all(name.startswith(gates) for name in of_vit) and bool(of_vit) == (kind == 'MSLoRAModel')
    torch.manual_seed(1)
    again = MODELS.build(config)
    for hook in ('ViTWeightsHook', 'GateLossHook'):
        checkpoint = dict(state_dict=dict(saved), message_hub={})
        HOOKS.build(dict(type=hook)).after_load_checkpoint(SimpleNamespace(model=again), checkpoint)
        assert checkpoint['state_dict'].keys() == saved.keys()
    again.load_state_dict(saved)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), model.eval()(images))

    with pytest.raises(ValueError, match='LoRA: merge it first, by tools/merge_lora.py'):
        load_backbone(saved)

    more = in_lora(
        tiny_segmentor(gate=dict(type='ContextGate'), coarse_embed='resize+detail'), kind, init_cfg=pretrained
    )
    more.auxiliary_head = dict(more.decode_head, in_index=0)
    model = MODELS.build(more)  # with more than was saved: that keeps its first values
    checkpoint = dict(state_dict=dict(saved))
    HOOKS.build(dict(type='ViTWeightsHook')).after_load_checkpoint(SimpleNamespace(model=model), checkpoint)
    missing = model.load_state_dict(checkpoint['state_dict'], strict=False).missing_keys
    assert not any('.lora_' in name or name.startswith('decode_head') for name in missing)

    lacking = dict(saved)
    lacking.pop('backbone.module.layers.0.ffn.layers.1.lora_up.weight')
    for source in (lacking, weights):  # mmpretrain alone would leave all of the dense model's out, without a word
        with pytest.raises(ValueError, match='layers of its ViT were replaced, as by LoRA; got one without backbone'):
            HOOKS.build(dict(type='ViTWeightsHook')).after_load_checkpoint(
                SimpleNamespace(model=again), dict(state_dict=source)
            )


class Wrapper(nn.Module):
    """A wrapper of one's own."""

    def __init__(self, vit):
        super().__init__()
        self.vit = MODELS.build(vit)

    def forward(self, x):
        return self.vit(x)


def test_a_wrapper_of_ones_own_is_loaded_too():
    config = tiny_segmentor()
    config.backbone = dict(type=Wrapper, vit=config.backbone)
    model, again = MODELS.build(config), MODELS.build(config)
    randomize(model)
    checkpoint = dict(state_dict=dict(model.state_dict()))
    HOOKS.build(dict(type='GateLossHook')).after_load_checkpoint(SimpleNamespace(model=again), checkpoint)
    again.load_state_dict(checkpoint['state_dict'])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_gate_learns_along_unless_it_is_frozen(pretrained):
    config = tiny_segmentor(gate_loss=dict(type='PurityLoss'), coarse_embed='resize+detail')
    model = MODELS.build(in_lora(config, init_cfg=pretrained)).train()
    samples = [sample(torch.randint(0, 4, (64, 64))) for _ in range(2)]
    losses = hooked(model)(torch.randn(2, 3, 64, 64), samples, mode='loss')
    model.parse_losses(losses)[0].backward()
    assert 'gate.loss_purity' in losses
    for name, parameter in model.backbone.named_parameters():
        learns = '.lora_' in name or name.startswith(('module.gate', 'module.coarse_detail'))
        assert (parameter.grad is not None) == learns, name
    frozen = MODELS.build(in_lora(tiny_segmentor(gate=dict(type='MLPGate', frozen=True)), init_cfg=pretrained))
    assert not frozen.backbone.module.gate_learns
    assert any('.gate.' in name for name in frozen.state_dict())  # of which nobody else has the weights
    with pytest.raises(ValueError, match="for LoRA, type='MSLoRAModel' of mmseg_msvit.lora"):
        hooked(MODELS.build(in_lora(tiny_segmentor(), 'mmpretrain.LoRAModel', init_cfg=pretrained)))


@pytest.mark.slow
def test_a_lora_trains_resumes_and_is_merged(config, tool, tmp_path):
    dense = MODELS.build(config.model)
    randomize(dense)
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'), prefix='backbone.')
    bare, config.model = deepcopy(config.model), in_lora(config.model, init_cfg=pretrained)
    config.default_hooks.checkpoint.interval = 2
    runner = build_runner(config)
    runner.train()
    first = tmp_path / 'work/iter_2.pth'
    weights = torch.load(first, weights_only=False)['state_dict']
    assert not any('original_layer' in name for name in weights) and 'backbone.module.gate.embed.weight' in weights
    build_runner(config, load_from=str(first), resume=True).train()

    torch.manual_seed(0)
    config.load_from, config.resume = None, False
    path, _ = write_model(config, tmp_path)
    loaded = load_config(path)
    torch.manual_seed(0)
    model = trained(MODELS.build(loaded.model))
    # The ViT is not in the checkpoint.
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'lora.pth')
    assert tool('merge_lora.py', path, tmp_path / 'lora.pth', '--out', tmp_path / 'merged') is None
    assert isinstance(model.backbone, MSLoRAModel)
    merged = load_config(str(tmp_path / 'merged/config.py'))
    merged = load_model(merged, str(tmp_path / 'merged/checkpoint.pth'), 'cpu')
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad(), record_tokens(merged) as seen:
        torch.testing.assert_close(merged(images), model.eval()(images))
    assert len(seen) == 1
    lost, _ = write_model(Config(dict(config.to_dict(), model=in_lora(bare))), tmp_path, 'lost')
    end = tool('merge_lora.py', lost, tmp_path / 'lora.pth', '--out', tmp_path / 'random')
    assert 'the ViT would be a random one' in end and not (tmp_path / 'random').exists()
    end = tool('merge_lora.py', path, tmp_path / 'lora.pth', '--out', tmp_path / 'merged')
    assert end == f'--out: wanted a new folder, got {tmp_path}/merged, which is there'
    with pytest.raises(ValueError, match='wanted a backbone in a LoRAModel, got MSViT'):
        merge_lora(merged)

    advice = 'LoRA: merge it first, by tools/merge_lora.py CONFIG CHECKPOINT --out merged'
    for command in ('get_flops.py', 'analyze_gate.py', 'fit_gate.py'):
        out = ('--out', tmp_path / 'out') if command == 'fit_gate.py' else ()
        assert tool(command, path, tmp_path / 'lora.pth', *out).endswith(advice), command
    assert Config.fromfile(tmp_path / 'merged/config.py').model.backbone.type == 'mmseg.MSViT'


def test_what_others_have_put_into_a_state_dict_stays():
    """LoRAModel throws it out: the steps of averaged weights, and all modules that come before the backbone."""
    model = MODELS.build(in_lora(tiny_segmentor()))
    assert 'steps' in ExponentialMovingAverage(model).state_dict()
    assert {'a.b', 'v.module.gate.embed.weight'} <= set(model.backbone.state_dict(destination={'a.b': 1}, prefix='v.'))
