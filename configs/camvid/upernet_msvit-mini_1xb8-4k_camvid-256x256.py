# MSViT from scratch on CamVid; labels orient the gate, batch shaping keeps the share of coarse regions near a half.
#   mim train mmsegmentation configs/camvid/upernet_msvit-mini_1xb8-4k_camvid-256x256.py
_base_ = ['./upernet_vit-mini_1xb8-4k_camvid-256x256.py', '../_base_/msvit.py']
model = dict(
    backbone=dict(
        type='MSViT',
        train_tokens='active',
        coarse_embed='resize+detail',
        gate_loss=[dict(type='PurityLoss'), dict(type='GeneralizedBatchShapingLoss', loss_weight=0.1)],
    )
)
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
