# What a config with a learned gate adds to a dense twin on DINOv2.
custom_hooks = [dict(type='GateLossHook')]
learned_gate = dict(
    gate=dict(_delete_=True, type='MLPGate'),
    gate_loss=[dict(type='PurityLoss'), dict(type='GeneralizedBatchShapingLoss', loss_weight=0.1)],
    train_tokens='active',
)
