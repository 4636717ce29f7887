# Segmenter with a mask head and ViT-L/16 in crops of 640 pixels, its gate frozen. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-l_frozen-gate_mask_8xb1-160k_ade20k-640x640.py --launcher pytorch --gpus 8
_base_ = ['./segmenter_msvit-l_mask_8xb1-160k_ade20k-640x640.py', '../_base_/frozen_gate.py']
model = dict(backbone=dict(gate=_base_.frozen_gate))
custom_hooks = []
