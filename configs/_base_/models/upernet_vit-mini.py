# UPerNet with a ViT small enough to be trained from scratch on a few hundred images.
_base_ = 'mmseg::_base_/models/upernet_vit-b16_ln_mln.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(
        img_size=(256, 256), embed_dims=128, num_layers=6, num_heads=4, out_indices=(1, 2, 4, 5), patch_bias=True
    ),
    neck=dict(in_channels=[128, 128, 128, 128], out_channels=64, scales=[2, 1, 1, 0.5]),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=64, norm_cfg=norm_cfg),
)
