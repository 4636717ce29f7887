# What a config with a gate that is learned jointly adds to a dense twin on DINOv2, beside a DoubtLoss that reaches its
# target by half of the training. Of the ways to learn a gate jointly that were tried on CamVid it came out best, as
# good as training with a gate that tools/fit_gate.py has fitted to the dense twin (docs/benchmarks.md).
custom_hooks = [dict(type='GateLossHook')]
learned_gate = dict(
    gate=dict(_delete_=True, type='ContextGate', init_coarse=0.05),
    train_tokens='active',
    out_detail='smooth',
)
