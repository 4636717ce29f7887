# DINOv2 ViT-S/14 with a mask head on ADE20K, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/dinov2/segmenter_msvit-dinov2-s14_mask_8xb2-40k_ade20k-518x518.py --launcher pytorch --gpus 8
_base_ = './segmenter_dinov2-s14_mask_8xb2-40k_ade20k-518x518.py'
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
