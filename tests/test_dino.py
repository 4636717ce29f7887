"""DINOv2 and DINOv3: each format of files is made by the library that owns it, and compared by its features."""

import pytest
import torch
from mmseg.registry import MODELS
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

V2 = dict(
    type='MSViT', patch_size=14, scales=(14, 28), norm_cfg=dict(type='LN', eps=1e-6), layer_scale_init_value=1e-5,
    final_norm=True, gate=dict(type='FixedGate', coarse=False),
)  # fmt: skip


def features(model, images):
    with torch.no_grad():
        return model.eval()(images)[-1].flatten(2).mT  # (B, h * w, C)


@pytest.mark.parametrize('how', ['init_cfg', 'pretrained'])
def test_real_weights_in_half_precision(how, shared):
    path = str(shared('weights/dinov2_vits14_hf_fp16.safetensors'))
    init = dict(pretrained=path) if how == 'pretrained' else dict(init_cfg=dict(type='Pretrained', checkpoint=path))
    model = MODELS.build(dict(img_size=518, embed_dims=384, num_heads=6, **V2, **init))
    model.init_weights()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    source = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    missing, unexpected = source.load_state_dict(in_memory(load_file(path)), strict=False)
    assert missing == ['embeddings.mask_token'] and unexpected == []
    for size in [(224, 224), (98, 154)] if how == 'init_cfg' else [(28, 28)]:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = source.eval()(images).last_hidden_state[:, 1:]
        torch.testing.assert_close(features(model, images), wanted, rtol=1e-4, atol=1e-4)


def in_memory(weights):
    """transformers' own names from its names on disk."""
    names = dict(query='q_proj', key='k_proj', value='v_proj')
    renamed = {name.replace('attention.output.dense', 'attention.o_proj'): t for name, t in weights.items()}
    for old, new in names.items():
        renamed = {name.replace(f'attention.attention.{old}', f'attention.{new}'): t for name, t in renamed.items()}
    return renamed
