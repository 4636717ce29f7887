# A segmentor on DINOv2 ViT-S/14 with a linear head: dense, by a gate that answers fine everywhere (mmseg's own ViT has
# no layer scale). DINOV2_S names the weights; any layout of them loads.
custom_imports = dict(imports=['mmseg_msvit'], allow_failed_imports=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='MSViT',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$DINOV2_S:https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth}}',
        ),
        img_size=518,
        patch_size=14,
        scales=(14, 28),
        embed_dims=384,
        num_layers=12,
        num_heads=6,
        norm_cfg=dict(type='LN', eps=1e-6),
        layer_scale_init_value=1e-5,
        final_norm=True,
        out_indices=11,
        gate=dict(type='FixedGate', coarse=False),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=384,
        in_index=0,
        channels=384,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=None,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
