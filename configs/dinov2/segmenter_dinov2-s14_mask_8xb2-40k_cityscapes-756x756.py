# The dense twin: DINOv2 ViT-S/14 with a mask head on Cityscapes, every token fine. Not measured yet.
#   mim train mmsegmentation \
#       configs/dinov2/segmenter_dinov2-s14_mask_8xb2-40k_cityscapes-756x756.py --launcher pytorch --gpus 8
_base_ = [
    '../_base_/models/dinov2-s14_mask.py',
    '../_base_/datasets/cityscapes_756.py',
    '../_base_/schedules/finetune_40k.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(504, 504)),
)
