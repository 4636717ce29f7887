# What a config with a gate that is learned jointly adds to a dense twin on DINOv2, beside a DoubtLoss that reaches its
# target by half of the training. On CamVid the paper's recipe with the gate at the head's rate came out as good, and a
# dense twin that was trained with larger crops and converted is better still (docs/benchmarks.md).
custom_hooks = [dict(type='GateLossHook')]
learned_gate = dict(
    gate=dict(_delete_=True, type='ContextGate', init_coarse=0.05),
    train_tokens='active',
)
