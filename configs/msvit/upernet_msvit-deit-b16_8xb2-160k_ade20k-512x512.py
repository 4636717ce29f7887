# UPerNet and DeiT-B/16, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/upernet_msvit-deit-b16_8xb2-160k_ade20k-512x512.py --launcher pytorch --gpus 8
_base_ = ['mmseg::vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/msvit.py']
model = dict(backbone=dict(type='MSViT'))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.gate_keys))
