# As msvit-s, with DeiT-S and its head, and the normalisation of the frozen-gate UPerNets on DeiT. Not measured yet.
#   mim train mmpretrain configs/imagenet/msvit-deit-s_8xb128-20e_in1k.py --launcher pytorch --gpus 8
_base_ = './msvit-s_8xb128-20e_in1k.py'
model = dict(backbone=dict(init_cfg=None))
load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
