# UPerNet with a neck and ViT-B/16 in crops of 768 pixels, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/upernet_msvit-b16_mln_8xb2-80k_cityscapes-768x768.py --launcher pytorch --gpus 8
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    'mmseg::_base_/datasets/cityscapes_768x768.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../_base_/msvit.py',
]
crop_size = (768, 768)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained='pretrain/vit_base_patch16_224.pth',
    backbone=dict(type='MSViT', img_size=crop_size),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(512, 512)),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={**_base_.gate_keys, 'norm': dict(decay_mult=0.0)}),
)
train_dataloader = dict(batch_size=2)
