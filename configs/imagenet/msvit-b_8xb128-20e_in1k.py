# As msvit-s, with AugReg's ViT-B/16. Not measured yet.
#   mim train mmpretrain configs/imagenet/msvit-b_8xb128-20e_in1k.py --launcher pytorch --gpus 8
_base_ = './msvit-s_8xb128-20e_in1k.py'
checkpoint = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_base_p16_384_20220308-96dfe169.pth'  # noqa
)
model = dict(
    backbone=dict(embed_dims=768, num_heads=12, init_cfg=dict(checkpoint=checkpoint)), head=dict(in_channels=768)
)
