# The dense twin: mmseg's ViT, with the same bias in its patch embedding.
#   mim train mmsegmentation configs/camvid/segmenter_vit-mini_mask_1xb8-4k_camvid-256x256.py
_base_ = [
    '../_base_/models/segmenter_vit-mini_mask.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_4k.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size), decode_head=dict(num_classes=11))
randomness = dict(seed=0)
