# What tools/quickstart.sh runs. On so few images the task's own gradient is too weak to tell the gate which regions
# are simple, so labels orient it (PurityLoss) and batch shaping keeps the share of coarse regions near its target.
#   mim train mmsegmentation configs/toy/segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py
_base_ = ['./segmenter_vit-mini_mask_1xb8-400_toy-scenes-256x256.py', '../_base_/msvit.py']
model = dict(
    backbone=dict(
        type='MSViT',
        train_tokens='active',
        coarse_embed='resize+detail',
        gate_loss=[
            dict(type='PurityLoss'),
            dict(type='GeneralizedBatchShapingLoss', target_coarse=0.7, loss_weight=0.1),
        ],
    )
)
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
