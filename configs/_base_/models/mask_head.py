# Segmenter's mask head in the place of a linear one, for ViT-S.
mask_head = dict(
    _delete_=True,
    type='SegmenterMaskTransformerHead',
    in_channels=384,
    channels=384,
    num_layers=2,
    num_heads=6,
    embed_dims=384,
    dropout_ratio=0.0,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
)
