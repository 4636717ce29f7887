# The dense twin: DINOv2 ViT-S/14 with a mask head on CamVid, every token fine.
#   mim train mmsegmentation configs/dinov2/segmenter_dinov2-s14_mask_1xb4-600_camvid-252x252.py
_base_ = ['./segmenter_dinov2-s14_fcn_1xb4-600_camvid-252x252.py', '../_base_/models/mask_head.py']
model = dict(decode_head=dict(_base_.mask_head, num_classes=11))
