# DINOv2 ViT-S/14 on CamVid, the gate learned jointly, with a mask head that runs over the tokens, too.
#   mim train mmsegmentation configs/dinov2/segmenter_msvit-dinov2-s14_token-mask_1xb4-600_camvid-252x252.py
_base_ = './segmenter_msvit-dinov2-s14_mask_1xb4-600_camvid-252x252.py'
model = dict(backbone=dict(out_type='tokens'), decode_head=dict(type='TokenSegmenterHead'))
