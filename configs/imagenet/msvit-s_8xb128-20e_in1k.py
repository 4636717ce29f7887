# The gate learned on ImageNet-1k, from AugReg's ViT-S/16, for the frozen-gate Segmenters. Not measured yet.
#   mim train mmpretrain configs/imagenet/msvit-s_8xb128-20e_in1k.py --launcher pytorch --gpus 8
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64.py',  # crops and flips alone: a gate should see images as they are
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/msvit.py',
]
custom_imports = dict(imports=['mmseg_msvit.classification'], allow_failed_imports=False)
checkpoint = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_small_p16_384_20220308-410f6037.pth'  # noqa
)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MSViT',
        img_size=224,
        embed_dims=384,
        num_heads=6,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=1000,
        in_channels=384,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
# A frozen gate must see in segmentation what it has learned from: this is the Segmenters' normalisation.
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(custom_keys=_base_.gate_keys)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=1),
]
train_cfg = dict(max_epochs=20)
val_evaluator = [_base_.val_evaluator, dict(type='TokenMetric')]
test_evaluator = val_evaluator
