# Segmenter with a pretrained ViT-T, the gate learned jointly. 8 GPUs; not measured yet.
#   mim train mmsegmentation \
#       configs/ade20k/segmenter_msvit-t_mask_8xb1-160k_ade20k-512x512.py --launcher pytorch --gpus 8
_base_ = 'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmseg_msvit'], allow_failed_imports=False)
model = dict(backbone=dict(type='MSViT'))
custom_hooks = [dict(type='GateLossHook')]
