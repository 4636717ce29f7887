# A gate learned elsewhere, ImageNet or another segmentor, that keeps its weights: no loss, no hook, no gradient.
# MSVIT_GATE names the checkpoint, in which the gate's names begin with backbone.gate.
frozen_gate = dict(
    type='MLPGate',
    frozen=True,
    init_cfg=dict(type='Pretrained', checkpoint='{{$MSVIT_GATE:checkpoints/gate.pth}}', prefix='backbone.gate.'),
)
