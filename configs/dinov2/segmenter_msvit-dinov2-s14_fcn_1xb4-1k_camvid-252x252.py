# DINOv2 ViT-S/14 with a linear head on CamVid, the gate learned jointly.
#   mim train mmsegmentation configs/dinov2/segmenter_msvit-dinov2-s14_fcn_1xb4-1k_camvid-252x252.py
_base_ = './segmenter_dinov2-s14_fcn_1xb4-1k_camvid-252x252.py'
model = dict(
    backbone=dict(
        gate=dict(_delete_=True, type='MLPGate'),
        gate_loss=[dict(type='PurityLoss'), dict(type='GeneralizedBatchShapingLoss', loss_weight=0.1)],
        train_tokens='active',
    )
)
optim_wrapper = dict(paramwise_cfg=dict(gate_lr_mult=10.0))
custom_hooks = [dict(type='GateLossHook')]
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
