import pytest
import torch
from conftest import ROOT, build_msvit, force_logits, use_plain_attention
from mmengine.config import Config
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg_msvit.measuring.flops import HeadMacs, dense_macs, encoder_macs, operator_macs, pass_costs, share_cost
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.tokens.token_map import region_grid


def counted(function):
    """MACs of a call, operator by operator."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(coarse_embed='resize+detail', out_detail='residual'),
        dict(with_cls_token=False, qkv_bias=False, num_fcs=3, mlp_ratio=2),
    ],
)
@pytest.mark.parametrize('size', [(64, 64), (70, 100)])
def test_macs_are_those_of_the_operators(options, size, monkeypatch):
    # Fused attention counts zero on CPU: the plain form of the same thing does not.
    use_plain_attention(monkeypatch)
    model = build_msvit(**options)
    gate = counted(lambda: model.gate(torch.randn(1, 3, 64, 64), (2, 2))) / 4  # a region's
    force_logits(model, torch.randn(3, -(-size[0] // 32), -(-size[1] // 32)))
    images = torch.randn(3, 3, *size)
    with record_tokens(model) as seen:
        total = counted(lambda: model(images))
    parts = model.macs(seen[0][0])
    assert sum(sum(part.values()) for part in parts) == pytest.approx(total, rel=1e-3)
    assert len({part['encoder'] for part in parts}) > 1
    assert gate * seen[0][1].coarse[0][0].numel() == pytest.approx(parts[0]['gate'], rel=1e-3)


@pytest.mark.parametrize(
    'width, heads, tokens, gmacs', [(192, 3, 1024, 10.4), (384, 6, 1024, 31.7), (192, 3, 655, 5.6), (384, 6, 684, 19.1)]
)
def test_the_papers_numbers(width, heads, tokens, gmacs):
    vit = VisionTransformer(img_size=512, embed_dims=width, num_heads=heads)
    embedding = dense_macs(vit, (32, 32))['embedding']
    assert (encoder_macs(vit, tokens) + embedding) / 1e9 == pytest.approx(gmacs, rel=0.01)


def seen_by_the_counter(model):
    """Train mode keeps torch's attention on the path that the counter sees."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.train()
    return model


def test_dense_macs_are_those_of_the_operators():
    vit = seen_by_the_counter(VisionTransformer(img_size=64, embed_dims=32, num_layers=2, num_heads=2))
    macs = dense_macs(vit, (4, 4))
    assert sum(macs.values()) == pytest.approx(counted(lambda: vit(torch.randn(1, 3, 64, 64))), rel=1e-3)


HEADS = [
    'configs/msvit/segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py',
    'configs/msvit/segmenter_msvit-s_fcn_8xb1-160k_ade20k-512x512.py',
    'configs/msvit/upernet_msvit-deit-s16_8xb2-160k_ade20k-512x512.py',
    'configs/msvit/upernet_msvit-b16_mln_8xb2-160k_ade20k-512x512.py',
]


@pytest.mark.parametrize('name', HEADS)
def test_macs_of_neck_and_head_are_those_of_the_operators(name):
    config = Config.fromfile(ROOT / name)
    config.model.pretrained = None
    model = seen_by_the_counter(MODELS.build(config.model).eval())
    macs = HeadMacs(model)((4, 6))
    features = [torch.randn(1, model.backbone.embed_dims, 4, 6)] * len(model.backbone.out_indices)
    wanted = counted(lambda: model.decode_head(model.neck(features) if model.with_neck else features))
    assert sum(macs.values()) == pytest.approx(wanted, rel=1e-3) and macs['head'] > 0
    assert (macs['neck'] > 0) == model.with_neck
    assert model.decode_head.training is False and next(model.parameters()).device.type == 'cpu'


@pytest.mark.parametrize('frozen', [False, True])
def test_a_layer_that_torch_runs_as_one_operator_is_counted(frozen):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(not frozen)
    assert operator_macs(layer, torch.randn(1, 5, 8)) == 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8


@pytest.mark.parametrize('size', [1.0, 0.7])
def test_the_cost_of_a_shape_is_that_of_such_an_image(size):
    model = build_msvit(input_scale=size, gate=dict(type='FixedGate'))
    with torch.no_grad(), record_tokens(model) as seen:
        model(torch.randn(1, 3, 90, 130))
    (wanted,) = pass_costs(model, seen[0][0])
    found = share_cost(model, None, region_grid((90, 130), 16), 0.0)
    assert found == wanted and found['dense_tokens'] == 1 + 6 * 9
