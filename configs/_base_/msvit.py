# What every config with a learned gate adds to an mmseg config, beside the backbone's type.
custom_imports = dict(imports=['mmseg_msvit'], allow_failed_imports=False)
custom_hooks = [dict(type='GateLossHook')]
# Rates of gate and priors relative to the ViT's, which is pretrained; no decay of positions and priors.
gate_keys = {
    'pos_embed': dict(decay_mult=0.0),
    'cls_token': dict(decay_mult=0.0),
    'backbone.gate.': dict(lr_mult=10.0),
    'backbone.gate.pos_embed': dict(lr_mult=10.0, decay_mult=0.0),
    'backbone.coarser_gates.': dict(lr_mult=10.0),  # of three scales
    'backbone.coarser_gates.0.pos_embed': dict(lr_mult=10.0, decay_mult=0.0),
    'backbone.gate_losses.': dict(lr_mult=10.0, decay_mult=0.0),
}
