# MSViT with three scales on the toy scenes: tokens of 16, 32 and 64 pixels, a gate for each of the coarser two.
#   mim train mmsegmentation configs/toy/segmenter_msvit-mini-3s_mask_1xb8-400_toy-scenes-256x256.py
_base_ = './segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py'
model = dict(backbone=dict(scales=(16, 32, 64)))
