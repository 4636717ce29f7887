"""Hooks: the gate's losses into the training of any segmentor or classifier."""

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmseg.registry import HOOKS

from .checkpoint import fit, unwrap
from .inspection import find_msvit


@HOOKS.register_module()
class GateLossHook(Hook):
    """Adds the gate losses of a model's :class:`MSViT` to its losses.

    They appear as ``gate.loss_*``; ``gate.coarse_fraction`` and ``gate.tokens`` (active tokens of an image, a batch's
    mean) are logged beside them. It is a forward hook on the model, there from ``before_train`` to ``after_train``.

    It also lets ``load_from`` name a plain ViT of another layout, such as timm's or the official Segmenter's: mmengine
    tells nobody but hooks about a checkpoint before it is loaded.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        (name,) = (name for name, module in model.named_modules() if module is find_msvit(model))
        tensors = unwrap(checkpoint)
        if f'{name}.layers.0.attn.attn.in_proj_weight' in tensors:
            return  # a whole model with a backbone of mmseg's names
        fitted, report = fit(find_msvit(model), tensors)
        print_log(f'load_from: {report}', logger='current')
        rest = {key: tensors[key] for key in model.state_dict() if key in tensors and not key.startswith(f'{name}.')}
        checkpoint['state_dict'] = {**rest, **{f'{name}.{key}': value for key, value in fitted.items()}}

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = find_msvit(model)

        def add_gate_losses(module, args, kwargs, output):
            if kwargs.get('mode') != 'loss':
                return None
            data_samples = kwargs['data_samples'] if 'data_samples' in kwargs else args[1]
            gate = backbone.pop_gate_losses(data_samples)
            return {**output, **{f'gate.{name}': value for name, value in gate.items()}}

        self._handle = model.register_forward_hook(add_gate_losses, with_kwargs=True)

    def after_train(self, runner) -> None:
        self._handle.remove()
