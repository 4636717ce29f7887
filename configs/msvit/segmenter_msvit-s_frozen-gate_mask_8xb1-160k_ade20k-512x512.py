# Segmenter with a mask head and ViT-S/16, its gate frozen. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-s_frozen-gate_mask_8xb1-160k_ade20k-512x512.py --launcher pytorch --gpus 8
_base_ = ['./segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py', '../_base_/frozen_gate.py']
model = dict(backbone=dict(gate=_base_.frozen_gate))
custom_hooks = []
