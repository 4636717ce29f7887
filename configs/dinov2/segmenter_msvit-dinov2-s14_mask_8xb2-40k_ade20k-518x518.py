# DINOv2 ViT-S/14 with a mask head on ADE20K, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/dinov2/segmenter_msvit-dinov2-s14_mask_8xb2-40k_ade20k-518x518.py --launcher pytorch --gpus 8
_base_ = ['./segmenter_msvit-dinov2-s14_fcn_8xb2-40k_ade20k-518x518.py', '../_base_/models/mask_head.py']
model = dict(decode_head=dict(_base_.mask_head, num_classes=150))
