# The dense twin of the toy model: mmseg's ViT, with the same bias in its patch embedding.
#   mim train mmsegmentation configs/toy/segmenter_vit-mini_mask_1xb8-400_toy-scenes-256x256.py
_base_ = [
    '../_base_/models/segmenter_vit-mini_mask.py',
    '../_base_/datasets/toy_scenes.py',
    '../_base_/schedules/adamw_400.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size), decode_head=dict(num_classes=7))
randomness = dict(seed=0)
