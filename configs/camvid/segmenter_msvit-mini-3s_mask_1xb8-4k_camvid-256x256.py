# MSViT with three scales on CamVid: tokens of 16, 32 and 64 pixels, a gate for each of the coarser two.
#   mim train mmsegmentation configs/camvid/segmenter_msvit-mini-3s_mask_1xb8-4k_camvid-256x256.py
_base_ = './segmenter_msvit-mini_mask_1xb8-4k_camvid-256x256.py'
model = dict(backbone=dict(scales=(16, 32, 64)))
