# DINOv2 ViT-S/14 with a mask head on CamVid, the gate learned jointly.
#   mim train mmsegmentation configs/dinov2/segmenter_msvit-dinov2-s14_mask_1xb4-600_camvid-252x252.py
_base_ = ['./segmenter_dinov2-s14_mask_1xb4-600_camvid-252x252.py', '../_base_/msvit_dinov2.py']
model = dict(backbone=dict(_base_.learned_gate, gate_loss=dict(type='DoubtLoss', target_warmup=_base_.max_iters // 2)))
optim_wrapper = dict(paramwise_cfg=dict(gate_lr_mult=10.0))
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
