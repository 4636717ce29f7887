# Segmenter with a mask head and ViT-S/16 in crops of 768 pixels, the gate learned jointly. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-s_mask_8xb1-80k_cityscapes-768x768.py --launcher pytorch --gpus 8
_base_ = [
    'mmseg::_base_/models/segmenter_vit-b16_mask.py',
    'mmseg::_base_/datasets/cityscapes_768x768.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../_base_/msvit.py',
]
crop_size = (768, 768)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_small_p16_384_20220308-410f6037.pth',  # noqa: E501
    backbone=dict(type='MSViT', img_size=crop_size, embed_dims=384, num_heads=6),
    decode_head=dict(num_classes=19, in_channels=384, channels=384, embed_dims=384, num_heads=6),
    test_cfg=dict(crop_size=crop_size, stride=(512, 512)),
)
optim_wrapper = dict(optimizer=dict(lr=0.001, weight_decay=0.0), paramwise_cfg=dict(custom_keys=_base_.gate_keys))
train_dataloader = dict(batch_size=1)
