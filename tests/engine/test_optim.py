import pytest
import torch
from conftest import tiny_segmentor
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS

DECAYED = dict(type='AdamW', lr=1e-3, weight_decay=0.1)


def groups(backbone=None, optimizer=DECAYED, **options):
    model = MODELS.build(tiny_segmentor(coarse_embed='resize+detail', **(backbone or {})))
    wrapper = build_optim_wrapper(
        model,
        ConfigDict(
            type='OptimWrapper',
            constructor='MSViTLayerDecayConstructor',
            optimizer=optimizer,
            paramwise_cfg=options,
        ),
    )
    group = {id(p): g for g in wrapper.optimizer.param_groups for p in g['params']}
    return {name: group[id(p)] for name, p in model.named_parameters()}


def test_rates_fall_towards_the_image_and_the_gate_has_its_own():
    found = groups(dict(scales=(16, 32, 64), out_detail='residual'), layer_decay=0.5, gate_lr_mult=10)
    wanted = {
        'backbone.out_details.0.weight': 1e-3,
        'backbone.coarser_gates.0.embed.weight': 1e-2,
        'backbone.coarser_details.0.weight': 0.0625e-3,
        'decode_head.conv_seg.weight': 1e-3,
        'backbone.ln1.weight': 1e-3,
        'backbone.layers.2.ffn.layers.1.weight': 0.5e-3,
        'backbone.layers.0.attn.attn.in_proj_weight': 0.125e-3,
        'backbone.patch_embed.projection.weight': 0.0625e-3,
        'backbone.pos_embed': 0.0625e-3,
        'backbone.coarse_detail.weight': 0.0625e-3,
        'backbone.gate.embed.weight': 1e-2,
        'backbone.gate.pos_embed': 1e-2,
        'backbone.gate_losses.0.prior_mean_logit': 1e-2,
    }
    assert {name: found[name]['lr'] for name in wanted} == pytest.approx(wanted)


def test_nothing_before_the_layers_keeps_the_full_rate():
    norms = dict(pre_norm=True, patch_norm=True, with_cls_token=True, output_cls_token=True)
    found = groups(norms, layer_decay=0.5, gate_lr_mult=10)
    inside = {name.removeprefix('backbone.'): group for name, group in found.items() if name.startswith('backbone.')}
    assert {'ln_pre.weight', 'patch_embed.norm.weight', 'coarse_detail.bias', 'cls_token'} <= set(inside)
    for name, group in inside.items():
        if name.startswith('layers.'):
            wanted = 0.5 ** (3 - int(name.split('.')[1]))
        else:
            wanted = {'ln1': 1, 'gate': 10, 'gate_losses': 10}.get(name.split('.')[0], 0.5**4)
        assert group['lr'] == pytest.approx(1e-3 * wanted), name


def test_what_is_not_decayed():
    found = groups()
    still = {name for name, group in found.items() if group['weight_decay'] == 0}
    assert {'backbone.pos_embed', 'backbone.cls_token', 'backbone.gate.pos_embed', 'backbone.ln1.weight'} <= still
    assert {name for name in found if 'gate_losses' in name} <= still
    assert not any(
        name.endswith('.weight') and 'ln' not in name and found[name]['params'][0].ndim > 1 for name in still
    )


def test_a_decay_that_is_not_named_is_the_optimizers_own():
    found = {name: group['weight_decay'] for name, group in groups(optimizer=dict(type='AdamW', lr=1e-3)).items()}
    assert found['backbone.layers.0.ffn.layers.1.weight'] == 0.01 and found['backbone.pos_embed'] == 0


@pytest.mark.parametrize('options, message', [
    (dict(layer_decay=0.0), r'layer_decay must be in \(0, 1\], got 0.0'),
    (dict(decay_rate=0.5), r"wanted layer_decay, gate_lr_mult and backbone, got also \['decay_rate'\]"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        groups(**options)


def test_what_more_scales_and_other_families_add():
    options = dict(scales=(16, 32, 64), num_register_tokens=2, out_detail='residual', layer_scale_init_value=0.1)
    found = groups(options, layer_decay=0.5, gate_lr_mult=10)
    name = next(n for n in found if n.startswith('backbone.coarser_gates.0.') and found[n]['params'][0].ndim > 1)
    assert found[name]['lr'] == 1e-2
    assert found['backbone.register_tokens']['lr'] == pytest.approx(0.0625e-3)
    assert found['backbone.register_tokens']['weight_decay'] == 0
    assert (
        found['backbone.layers.2.gamma_1']['lr'] == 0.5e-3 and found['backbone.layers.2.gamma_1']['weight_decay'] == 0
    )
    assert all(group['lr'] == 1e-3 for n, group in found.items() if 'out_details' in n)


def test_of_several_msvits_the_one_that_is_named_is_decayed():
    model = torch.nn.ModuleDict({name: MODELS.build(tiny_segmentor().backbone) for name in ('student', 'other')})
    config = ConfigDict(type='OptimWrapper', constructor='MSViTLayerDecayConstructor', optimizer=DECAYED)
    with pytest.raises(ValueError, match="by backbone='student' in GateLossHook, and in paramwise_cfg"):
        build_optim_wrapper(model, config)
    config.paramwise_cfg = dict(backbone='other', layer_decay=0.5)
    rates = {g['param_name']: g['lr'] for g in build_optim_wrapper(model, config).optimizer.param_groups}
    assert rates['other.layers.2.ln1.weight'] == 0.5e-3 and rates['student.layers.2.ln1.weight'] == 1e-3
