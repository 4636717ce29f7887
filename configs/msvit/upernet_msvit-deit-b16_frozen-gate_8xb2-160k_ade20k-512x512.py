# UPerNet and DeiT-B/16, its gate frozen. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/upernet_msvit-deit-b16_frozen-gate_8xb2-160k_ade20k-512x512.py --launcher pytorch --gpus 8
_base_ = ['./upernet_msvit-deit-b16_8xb2-160k_ade20k-512x512.py', '../_base_/frozen_gate.py']
model = dict(backbone=dict(gate=_base_.frozen_gate))
custom_hooks = []
