# DINOv2 ViT-S/14 with a linear head on Cityscapes, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/dinov2/segmenter_msvit-dinov2-s14_fcn_8xb2-40k_cityscapes-756x756.py --launcher pytorch --gpus 8
_base_ = ['./segmenter_dinov2-s14_fcn_8xb2-40k_cityscapes-756x756.py', '../_base_/msvit_dinov2.py']
model = dict(backbone=dict(_base_.learned_gate, gate_loss=dict(type='DoubtLoss', target_warmup=_base_.max_iters // 2)))
optim_wrapper = dict(paramwise_cfg=dict(gate_lr_mult=10.0))
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
