# Segmenter with a mask head and ViT-B/16 in crops of 768 pixels, its gate frozen. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-b_frozen-gate_mask_8xb1-80k_cityscapes-768x768.py --launcher pytorch --gpus 8
_base_ = ['./segmenter_msvit-b_mask_8xb1-80k_cityscapes-768x768.py', '../_base_/frozen_gate.py']
model = dict(backbone=dict(gate=_base_.frozen_gate))
custom_hooks = []
