"""Hooks: gate losses into the training of any segmentor or classifier, dense steps first, pictures of the tokens."""

import warnings
from functools import partial
from typing import Optional, Sequence

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmseg.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel

from ..gates.from_outside import find_msvit
from ..labels import Classes
from ..weights.reading import find_weights, unwrap
from ..weights.whole_models import with_own_vit


@HOOKS.register_module()
class ViTWeightsHook(Hook):
    """Lets ``load_from`` name a plain ViT of another layout, such as timm's or the official Segmenter's.

    Only a hook sees a checkpoint before mmengine loads it. :class:`GateLossHook` does this, too: a training with it
    needs no second hook.

    Args:
        backbone: the MSViT's name in the model, where there are several and it is not clear which is meant: see
            :func:`~mmseg_msvit.gates.from_outside.find_msvit`.
    """

    priority = 'HIGH'  # before EMAHook, which copies what is loaded

    def __init__(self, backbone: Optional[str] = None):
        self.backbone = backbone

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Gives the checkpoint's ViT the names of the model's MSViT; other tensors that the model has stay.

        Raises:
            ValueError: the checkpoint is not of this architecture.
        """
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):  # whose names mmengine leaves out
            model = model.module
        # Of a training of mmengine's it is state_dict that was trained, whatever a hook has put beside it.
        source = {'state_dict': checkpoint['state_dict']} if 'message_hub' in checkpoint else checkpoint
        tensors, report = with_own_vit(model, find_msvit(model, self.backbone), unwrap(source))
        if report is not None:
            print_log(f'load_from: {report}', logger='current')
        if report is not None or find_weights(source) is not source.get('state_dict'):  # where mmengine looks
            checkpoint['state_dict'] = tensors


@HOOKS.register_module()
class GateLossHook(ViTWeightsHook):
    """Adds the gate losses of a model's :class:`MSViT` to its losses.

    They appear as ``gate.loss_*``. Logged beside them are ``gate.tokens`` (active tokens of an image, a batch's mean),
    and ``gate.coarse_fraction``, ``gate.entropy`` and ``gate.conditionality`` of each level, see
    :meth:`~mmseg_msvit.tokens.selection.Decision.statistics`. It is a forward hook on the model, there from
    ``before_train`` to ``after_train``. Under FSDP the losses' own parameters must be whole by then: let it wrap the
    blocks (:class:`~mmseg_msvit.vit.blocks.Block`) and not the backbone.

    A gate that does not learn, and was not told to be ``frozen``, stops the training at its start.
    """

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = find_msvit(model, self.backbone)  # says at once if there is none
        if runner.iter == 0:  # else it is resumed
            for loss in backbone.gate_losses:
                loss.begin()
        for module in model.modules():
            if isinstance(module, FullyShardedDataParallel) and backbone in module.modules():
                raise ValueError(
                    'GateLossHook wants the parameters of the gate losses whole after the forward pass, got '
                    'FullyShardedDataParallel inside the model around the backbone; let it wrap the blocks'
                )
        self._refuse_gate_that_stays(runner)
        self._begun = False
        self._handles = [
            model.register_forward_pre_hook(partial(_collect_gate_losses, self.backbone), with_kwargs=True),
            model.register_forward_hook(partial(_add_gate_losses, self.backbone), with_kwargs=True),
        ]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if not self._begun:  # once more: a backbone may freeze its stages where it is set to training mode
            self._refuse_gate_that_stays(runner)
            self._begun = True

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()

    def _refuse_gate_that_stays(self, runner) -> None:
        """Raises a ValueError for a gate with weights that this training leaves as they are, unless it is frozen."""
        optimizer = getattr(runner, 'optim_wrapper', None)
        wrappers = optimizer.values() if isinstance(optimizer, OptimWrapperDict) else [optimizer] if optimizer else []
        groups = [group for wrapper in wrappers for group in wrapper.param_groups]
        optimized = {id(p) for group in groups for p in group['params']}
        moved = {id(p) for group in groups if group.get('initial_lr', group['lr']) for p in group['params']}
        # Some wrappers give the optimizer parameters of their own, of which nothing can be told.
        known = any(id(p) in optimized for p in runner.model.parameters())
        for gate in find_msvit(runner.model, self.backbone).gates:
            parameters = list(gate.parameters())
            if gate.frozen or not parameters:
                continue
            learning = [p for p in parameters if p.requires_grad]
            why = None
            if not learning:
                why = (
                    'no parameter of it requires a gradient: the backbone was frozen with it. To freeze the ViT alone '
                    'set frozen_exclude=[] in an MSViT, or model.backbone.gate.requires_grad_(True) after it was '
                    'frozen, also where a hook thaws the ViT later; for LoRA, '
                    "type='MSLoRAModel' of mmseg_msvit.lora"
                )
            elif known and not any(id(p) in moved for p in learning):
                why = 'no group of the optimizer that has a learning rate has a parameter of it: see paramwise_cfg'
            if why:
                raise ValueError(
                    f'GateLossHook wanted the {type(gate).__name__} to learn, got one that this training leaves as it '
                    f'is: {why}. For a gate that is to stay as it is set frozen=True in its config'
                )


# Both find the backbone in the module that runs: a copy of a model has its hooks, and must have its own gate losses.
def _collect_gate_losses(backbone, module, args, kwargs):
    if kwargs.get('mode') == 'loss':
        find_msvit(module, backbone).collect_gate_losses()


def _add_gate_losses(backbone, module, args, kwargs, output):
    if kwargs.get('mode') != 'loss':
        return None
    data_samples = kwargs['data_samples'] if 'data_samples' in kwargs else args[1]
    backbone = find_msvit(module, backbone)
    gate = backbone.pop_gate_losses(data_samples, module)
    learns = module.training and torch.is_grad_enabled() and backbone.gate_learns and len(backbone.gate_losses)
    if learns and not gate:
        raise ValueError(
            'GateLossHook wants a forward of the backbone in training mode and with gradients, got none, so that the '
            'gate would learn nothing. Is the backbone in eval mode, or under no_grad? For a gate that stays as it is '
            "set frozen=True in its config; where a tokenize() of one's own asks no gate, gate=dict(type='FixedGate')"
        )
    if module.training and backbone.gate_learns and any(each.frozen for each in backbone.gates):
        warnings.warn(
            'the gate is frozen=True in its config, but somebody has thawed it: it learns without gate losses, since '
            'a frozen gate has none',
            stacklevel=2,
        )
    return {**output, **{f'gate.{name}': value for name, value in gate.items()}}


@HOOKS.register_module()
class DenseFirstHook(Hook):
    """Trains with all tokens fine first, and then with those that the gate chooses, for a gate that learns nothing.

    A ViT that learns from few tokens from the first step on learns less, also of fine ones (``docs/benchmarks.md``). A
    gate that learns has ``target_warmup`` of its losses for this. Validation has the gate's tokens at any time.

    Args:
        part: the share of the training's steps that are dense.
        backbone: as of :class:`ViTWeightsHook`.
    """

    def __init__(self, part: float = 0.5, backbone: Optional[str] = None):
        if not 0 <= part <= 1:
            raise ValueError(f'part must be in [0, 1], got {part}')
        self.part, self.backbone = part, backbone

    def before_train(self, runner) -> None:
        if find_msvit(runner.model, self.backbone).gate_learns:
            raise ValueError(
                'DenseFirstHook wants a gate that learns nothing, as with frozen=True, got one that learns; its losses '
                'have target_warmup for this'
            )

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if runner.iter < self.part * runner.max_iters:
            find_msvit(runner.model, self.backbone).select.threshold = 1.0  # no probability is above it

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        backbone = find_msvit(runner.model, self.backbone)
        backbone.select.threshold = backbone.gate.threshold


@HOOKS.register_module()
class TokenMapHook(Hook):
    """Pictures of a few validation images during training, into each of the visualizer's backends.

    Image, token grid, the gate's probability, prediction and truth, as ``tools/show_tokens.py`` draws them; named
    ``tokens_0`` and so on, before the first step and then every ``interval`` steps. Training goes on as if nothing had
    been: modes, torch's random numbers and metrics are untouched. On several GPUs the first process draws, by itself,
    so that the model must be whole there, as under DistributedDataParallel.

    Args:
        interval: training steps between two pictures.
        indices: the images, as indices of the validation set.
    """

    def __init__(self, interval: int = 1000, indices: Sequence[int] = (0, 1, 2, 3)):
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval}')
        self.interval = interval
        self.indices = tuple(indices)

    def before_train(self, runner) -> None:
        if runner.val_loop is None:
            raise ValueError('TokenMapHook draws images of the validation set: the config needs a val_dataloader')
        self._draw(runner, step=runner.iter)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._draw(runner, step=runner.iter + 1)

    @master_only
    def _draw(self, runner, step: int) -> None:
        # matplotlib takes a second to import: only who draws waits for it
        from ..measuring.visualization import draw_image

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        dataset = runner.val_loop.dataloader.dataset
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        ignored = [m.ignore_index for m in getattr(evaluator, 'metrics', ()) if hasattr(m, 'ignore_index')]
        classes = Classes.of(getattr(model, 'decode_head', {}), dataset.metainfo, *ignored[:1])
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            for i in self.indices:
                data = dataset[i % len(dataset)]
                try:
                    truth = classes.read_sample(data['data_samples'], resized=True)
                    figure = draw_image(model, data, classes.palette, truth)
                except (ValueError, FloatingPointError) as error:
                    file = data['data_samples'].get('img_path', f'image {i}')
                    raise type(error)(f'TokenMapHook cannot draw {file}: {error}') from error
                runner.visualizer.add_image(f'tokens_{i}', figure, step)
