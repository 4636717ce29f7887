# Segmenter with a mask head and ViT-L/16 in crops of 640 pixels, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-l_mask_8xb1-160k_ade20k-640x640.py --launcher pytorch --gpus 8
_base_ = ['mmseg::segmenter/segmenter_vit-l_mask_8xb1-160k_ade20k-512x512.py', '../_base_/msvit.py']
model = dict(backbone=dict(type='MSViT'))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.gate_keys))
