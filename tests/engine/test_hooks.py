import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, hooked, sample, tiny_segmentor
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmseg.registry import HOOKS, METRICS, MODELS

from mmseg_msvit import MSViT
from mmseg_msvit.gates.from_outside import evaluating, find_msvit
from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.vit.mixed_scale import MixedScale


def segmentor(**backbone):
    return MODELS.build(tiny_segmentor(**{'gate_loss': [dict(type='PurityLoss', loss_weight=2.0)], **backbone}))


def batch():
    return torch.randn(2, 3, 64, 64), [sample(torch.randint(0, 4, (64, 64))) for _ in range(2)]


def test_adds_the_gate_losses_in_training_and_leaves_no_trace_after_it():
    model = segmentor().train()
    inputs, samples = batch()
    before = set(model(inputs, samples, mode='loss'))
    hook, runner = HOOKS.build(dict(type='GateLossHook')), SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    losses = model(inputs, samples, mode='loss')
    logged = {f'gate.{name}' for name in ('coarse_fraction', 'conditionality', 'entropy', 'tokens')}
    assert set(losses) - before == {'gate.loss_purity', *logged}
    total, log = model.parse_losses(losses)
    wanted = sum(v for k, v in losses.items() if 'loss' in k)
    torch.testing.assert_close(total, wanted)
    total.backward()
    assert model.backbone.gate.mlp[-1].weight.grad.abs().sum() > 0
    assert isinstance(model(inputs, mode='tensor'), torch.Tensor)
    hook.after_train(runner)
    assert set(model(inputs, samples, mode='loss')) == before
    assert not model._forward_hooks


@pytest.mark.parametrize('at, steps', [(0, 0), (7, 40)])
def test_a_training_that_begins_counts_from_none_whatever_its_weights_have_seen(at, steps):
    model = segmentor(gate_loss=dict(type='TokenBudgetLoss', target_warmup=100)).bfloat16()
    model.backbone.gate_losses[0].steps += 40
    hooked(model, at)
    assert model.backbone.gate_losses[0].steps == steps and not model.backbone.gate_losses[0].steps.is_floating_point()


def test_what_a_hook_has_put_beside_the_weights_of_a_training_is_not_resumed():
    model = segmentor()
    own, other = ({name: x.clone() + i for name, x in model.state_dict().items()} for i in (0, 1))
    hook, runner = HOOKS.build(dict(type='ViTWeightsHook')), SimpleNamespace(model=model)
    saved = dict(state_dict=own, teacher=other, message_hub={}, optimizer={})
    hook.after_load_checkpoint(runner, saved)
    assert saved['state_dict'] is own
    del saved['message_hub']  # of somebody else's training, where a teacher is the better model
    hook.after_load_checkpoint(runner, saved)
    assert torch.equal(saved['state_dict']['backbone.cls_token'], other['backbone.cls_token'])


def test_a_fitted_gates_training_begins_dense():
    model = segmentor(gate=dict(type='ContextGate', frozen=True, init_coarse=0.6, threshold=0.4)).train()
    hook, found = HOOKS.build(dict(type='DenseFirstHook', part=0.4)), []
    runner = SimpleNamespace(model=model, iter=0, max_iters=5)
    hook.before_train(runner)
    for runner.iter in range(5):
        hook.before_train_iter(runner, 0)
        with record_tokens(model) as seen:
            model(*batch(), mode='loss')
        found.append(seen[0][0].lengths[0])
        hook.after_train_iter(runner, 0)
        assert model.backbone.select.threshold == 0.4  # validation has the gate's tokens
    assert found == [17, 17, 5, 5, 5]
    with pytest.raises(ValueError, match='DenseFirstHook wants a gate that learns nothing'):
        hook.before_train(SimpleNamespace(model=segmentor()))
    with pytest.raises(ValueError, match=r'part must be in \[0, 1\], got 2'):
        HOOKS.build(dict(type='DenseFirstHook', part=2))


def test_reads_the_loss_of_this_forward_and_no_other():
    model = segmentor().train()
    inputs, samples = batch()
    hooked(model)
    purity = model(inputs, samples, mode='loss')['gate.loss_purity']
    logits = model.backbone.gate(inputs, (2, 2))
    torch.testing.assert_close(purity, model.backbone.gate_losses[0](logits, samples))


def test_a_forgotten_hook_is_warned_of_at_the_second_forward():
    model = segmentor().train()
    inputs, samples = batch()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='nobody took')
        model(inputs, samples, mode='loss')
    with pytest.warns(UserWarning, match='nobody took the gate losses'):
        model(inputs, samples, mode='loss')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='nobody took')
        hooked(model)
        for _ in range(2):
            model(inputs, samples, mode='loss')
        model.eval()(inputs, mode='tensor')
        unowned = segmentor(gate=dict(type='FixedGate')).train()
        for _ in range(2):
            unowned(inputs, samples, mode='loss')


class Twice(torch.nn.Module):
    """A step with two views: the backbone runs on both."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.model(inputs.flip(3), data_samples, mode=mode)
        return self.model(inputs, data_samples, mode=mode)


@pytest.mark.parametrize('how', ['eval', 'no_grad'])
def test_a_gate_that_would_learn_nothing_is_refused(how, monkeypatch):
    """Both are ways to keep a ViT as it is."""
    model, (inputs, samples) = segmentor().train(), batch()
    hooked(model)
    if how == 'eval':
        model.backbone.eval()
    else:
        monkeypatch.setattr(model, 'extract_feat', torch.no_grad()(model.extract_feat))
    with pytest.raises(ValueError, match='the gate would learn nothing'):
        model(inputs, samples, mode='loss')
    with torch.no_grad():
        model.eval()(inputs, samples, mode='loss')  # a loss of validation
    model.train()
    model.backbone.requires_grad_(False)
    assert not any('gate' in name for name in model(inputs, samples, mode='loss'))


def test_a_backbone_that_runs_twice_in_a_step_has_the_mean_of_both_and_no_labels():
    inputs, samples = batch()
    with pytest.raises(ValueError, match='PurityLoss reads data_samples, and the backbone ran 2 times'):
        hooked(Twice(segmentor().train()))(inputs, samples, mode='loss')
    model = segmentor(gate_loss=dict(type='TokenBudgetLoss')).train()
    losses = hooked(Twice(model))(inputs, samples, mode='loss')
    budget = model.backbone.gate_losses[0]
    gate = model.backbone.gate
    wanted = (budget(gate(inputs, (2, 2))) + budget(gate(inputs.flip(3), (2, 2)))) / 2
    torch.testing.assert_close(losses['gate.loss_budget'], wanted)


@pytest.mark.parametrize('how', ['deepcopy', 'pickle'])
@pytest.mark.parametrize('when', ['after a forward', 'inside one'])
def test_copies_have_gate_losses_of_their_own(how, when, tmp_path):
    model = hooked(segmentor().train())
    inputs, samples = batch()

    def copied():
        if how == 'deepcopy':
            return deepcopy(model)
        torch.save(model, tmp_path / 'model.pth')
        return torch.load(tmp_path / 'model.pth', weights_only=False)

    if when == 'inside one':
        model.backbone.collect_gate_losses()
    model.backbone(inputs)  # whose losses nobody has taken yet
    copy = copied()
    assert len(copy.backbone._gated) == 0
    with torch.no_grad():
        copy.backbone.gate.mlp[-1].bias.fill_(-3.0)
    losses = copy(inputs, samples, mode='loss')
    logits = torch.full((2, 2, 2), -3.0)
    torch.testing.assert_close(losses['gate.loss_purity'], copy.backbone.gate_losses[0](logits, samples))


def test_each_layer_is_called():
    """CAM tools, per-layer checkpointing and counters hook the layers and their parts."""
    model = segmentor().backbone.eval()
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: called.append(name))
    model(torch.randn(1, 3, 64, 64))
    for i in range(SMALL['num_layers']):
        assert {f'layers.{i}{part}' for part in ('', '.ln1', '.attn', '.ln2', '.ffn', '.ffn.layers')} <= set(called)
    assert {'patch_embed', 'gate', 'select', ''} <= set(called)


def test_wants_one_msvit():
    with pytest.raises(ValueError, match='the model must have an MSViT backbone, got none'):
        hooked(torch.nn.Linear(1, 1))


class Distiller(torch.nn.Module):
    """A step of a student that also asks a teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, inputs, data_samples=None, mode='tensor'):
        with torch.no_grad():
            self.teacher(inputs, data_samples, mode='tensor')
        return self.student(inputs, data_samples, mode=mode)


def test_of_two_msvits_the_one_whose_gate_learns_is_meant():
    inputs, samples = batch()
    model = Distiller(segmentor(), segmentor(gate=dict(type='FixedGate'))).train()
    assert find_msvit(model) is model.student.backbone
    assert 'gate.loss_purity' in hooked(model)(inputs, samples, mode='loss')
    model.student.teacher = model.teacher  # a segmentor with its teacher in it
    model.student.backbone.gate.requires_grad_(False)
    assert find_msvit(model.student) is model.student.backbone
    model.teacher.backbone = segmentor().backbone  # whose gate could learn, and is only asked
    assert find_msvit(model.student) is model.student.backbone

    both = Distiller(segmentor(), segmentor()).train()
    message = (
        r"got \['student.backbone', 'teacher.backbone'\]: name the one .* backbone='student.backbone' in GateLossHook"
    )
    with pytest.raises(ValueError, match=message):
        hooked(both)
    hook = HOOKS.build(dict(type='GateLossHook', backbone='student.backbone'))
    hook.before_train(SimpleNamespace(model=both, iter=0))
    assert 'gate.loss_purity' in both(inputs, samples, mode='loss')
    with pytest.raises(ValueError, match=r"wanted the name of an MSViT .* got 'student'"):
        HOOKS.build(dict(type='GateLossHook', backbone='student')).before_train(SimpleNamespace(model=both, iter=0))


class Freezing(MSViT):
    """Freezes itself when it is set to training mode, as mmseg's own backbones with frozen_stages do."""

    def train(self, mode=True):
        super().train(mode)
        self.requires_grad_(False)
        return self


def optimizer_of(parameters, **options):
    return SimpleNamespace(param_groups=[dict(params=list(parameters), lr=0.1, **options)])


def test_a_gate_that_was_frozen_unawares_stops_the_training_at_its_start():
    model = segmentor().train()
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match='the MLPGate to learn, .* requires a gradient: .* set frozen=True'):
        hooked(model)
    model.backbone.gate.requires_grad_(True)  # as the message says
    hooked(model)
    told = segmentor(gate=dict(type='MLPGate', frozen=True)).train()
    told.backbone.requires_grad_(False)
    hooked(told)
    hooked(segmentor(frozen_exclude=[]).train())

    later = segmentor()
    later.backbone.__class__ = Freezing
    hook, runner = HOOKS.build(dict(type='GateLossHook')), SimpleNamespace(model=later, iter=0)
    hook.before_train(runner)
    later.train()
    with pytest.raises(ValueError, match='the MLPGate to learn'):
        hook.before_train_iter(runner, 0)


def test_a_frozen_gate_that_is_thawed_is_warned_of():
    inputs, samples = batch()
    model = hooked(segmentor(gate=dict(type='MLPGate', frozen=True)).train())
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*frozen=True')
        model(inputs, samples, mode='loss')
    model.backbone.gate.requires_grad_(True)
    with pytest.warns(UserWarning, match='frozen=True in its config, but somebody has thawed it'):
        model(inputs, samples, mode='loss')


def test_a_gate_that_no_optimizer_moves_stops_the_training_at_its_start():
    model = segmentor().train()

    def begin(wrapper):
        hook = HOOKS.build(dict(type='GateLossHook'))
        hook.before_train(SimpleNamespace(model=model, iter=0, optim_wrapper=wrapper))

    for wrapper in (optimizer_of(model.decode_head.parameters()), optimizer_of(model.parameters(), initial_lr=0)):
        with pytest.raises(ValueError, match='no group of the optimizer that has a learning rate has a parameter'):
            begin(wrapper)
    begin(optimizer_of(model.parameters(), initial_lr=0.1))
    begin(optimizer_of([torch.nn.Parameter(torch.ones(1))]))  # of a wrapper's own: nothing can be told
    parts = model.decode_head.parameters(), model.backbone.gate.parameters()
    begin(OptimWrapperDict(**{f'part{i}': OptimWrapper(torch.optim.SGD(p, 0.1)) for i, p in enumerate(parts)}))


def test_without_the_hook_a_gate_that_was_frozen_unawares_is_warned_of():
    inputs, samples = batch()
    model = segmentor().train()
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match='the MLPGate is trained with, .* set frozen=True'):
        model(inputs, samples, mode='loss')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*is trained with')
        for gate in (dict(type='MLPGate', frozen=True), dict(type='VarianceGate')):
            segmentor(gate=gate).train()(inputs, samples, mode='loss')


def test_evaluating_a_model_leaves_it_as_it_was_and_chance_to_itself():
    slide = ConfigDict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    model = segmentor(gate=dict(type='RandomGate')).train()
    model.test_cfg = slide
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    metric = METRICS.build(dict(type='TokenMetric'))
    metric.recorder.begin()  # all metrics of a process share it, those of other tests too
    masks = []
    for _ in range(3):
        with evaluating(model), record_tokens(model) as seen:
            model(torch.randn(1, 3, 128, 128), mode='predict')
        masks.append(seen[0][1].coarse[0])
        assert len(seen) == 1 and seen[0][0].grid == (8, 8)  # the whole image
    assert not all(torch.equal(mask, masks[0]) for mask in masks)
    assert [module.training for module in model.modules()] == modes and model.test_cfg is slide
    assert not metric.recorder.passes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training and metric.recorder in MixedScale.observers
