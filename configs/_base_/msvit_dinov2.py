# What a config with a gate that is learned jointly adds to a dense twin on DINOv2: of the ways to learn it that were
# tried on CamVid the one that came out best. A gate that tools/fit_gate.py has fitted to the dense twin comes out
# better, converted or trained with (docs/benchmarks.md).
custom_hooks = [dict(type='GateLossHook')]
learned_gate = dict(
    gate=dict(_delete_=True, type='ContextGate'),
    gate_loss=[dict(type='PurityLoss'), dict(type='GeneralizedBatchShapingLoss', loss_weight=0.1)],
    train_tokens='active',
    out_detail='smooth',
)
