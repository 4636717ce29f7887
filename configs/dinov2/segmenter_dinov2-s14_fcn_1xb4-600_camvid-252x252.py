# The dense twin: DINOv2 ViT-S/14 with a linear head on CamVid, every token fine.
#   mim train mmsegmentation configs/dinov2/segmenter_dinov2-s14_fcn_1xb4-600_camvid-252x252.py
_base_ = [
    '../_base_/models/dinov2-s14.py',
    '../_base_/datasets/camvid_252.py',
    '../_base_/schedules/finetune_600.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=_base_.crop_size), decode_head=dict(num_classes=11))
randomness = dict(seed=0)
