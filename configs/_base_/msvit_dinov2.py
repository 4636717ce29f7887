# What a config with a gate that is learned jointly adds to a dense twin on DINOv2, beside a DoubtLoss that reaches its
# target by half of the training: of the ways to learn a gate jointly that were tried on CamVid the one that came out
# best. A dense twin that was trained with larger crops and converted is better still (docs/benchmarks.md).
custom_hooks = [dict(type='GateLossHook')]
learned_gate = dict(
    gate=dict(_delete_=True, type='ContextGate', init_coarse=0.05),
    train_tokens='active',
)
