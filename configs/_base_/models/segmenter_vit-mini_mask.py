# Segmenter with a ViT small enough to be trained from scratch on a few hundred images.
_base_ = 'mmseg::_base_/models/segmenter_vit-b16_mask.py'
model = dict(
    pretrained=None,
    backbone=dict(img_size=(256, 256), embed_dims=128, num_layers=6, num_heads=4, patch_bias=True, drop_path_rate=0.0),
    decode_head=dict(in_channels=128, channels=128, embed_dims=128, num_layers=1, num_heads=4),
    test_cfg=dict(_delete_=True, mode='whole'),
)
