# DINOv2 ViT-S/14 with a mask head on CamVid, the gate learned jointly.
#   mim train mmsegmentation configs/dinov2/segmenter_msvit-dinov2-s14_mask_1xb4-600_camvid-252x252.py
_base_ = ['./segmenter_msvit-dinov2-s14_fcn_1xb4-600_camvid-252x252.py', '../_base_/models/mask_head.py']
model = dict(decode_head=dict(_base_.mask_head, num_classes=11))
