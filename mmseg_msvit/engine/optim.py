"""Layer-wise learning-rate decay for MSViT."""

from typing import List, Optional

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..gates.from_outside import find_msvit
from ..vit.mixed_scale import MixedScale
from ..weights.checkpoint import GATES

UNDECAYED = ('pos_embed', 'cls_token', 'register_tokens')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MSViTLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer decay as for any ViT, with gate and priors outside of it.

    With L layers, layer i (from 0) has the rate lr * decay^(L - i), and all that comes before the layers
    lr * decay^(L + 1). The final norm, the outputs' detail and what lies outside the backbone have lr, gate and gate
    losses lr * ``gate_lr_mult``. Vectors (norms and biases), positions, cls token, registers and the priors are not
    decayed.

    Args:
        optim_wrapper_cfg: as for mmengine's constructor.
        paramwise_cfg: ``layer_decay`` (default 0.75), ``gate_lr_mult`` (default 1), and ``backbone``, the name of the
            MSViT that is meant where there are several, see :func:`~mmseg_msvit.gates.from_outside.find_msvit`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None):
        super().__init__(optim_wrapper_cfg, None)
        options = dict(paramwise_cfg or {})
        self.layer_decay = options.pop('layer_decay', 0.75)
        self.gate_lr_mult = options.pop('gate_lr_mult', 1.0)
        self.backbone = options.pop('backbone', None)
        if options:
            raise ValueError(
                f'paramwise_cfg: wanted layer_decay, gate_lr_mult and backbone, got also {sorted(options)}'
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f'layer_decay must be in (0, 1], got {self.layer_decay}')
        # The base class asks for options only where there are some.
        self.paramwise_cfg = dict(layer_decay=self.layer_decay)

    def add_params(self, params: List[dict], module: nn.Module, **kwargs) -> None:
        """Adds a group for each parameter of the model."""
        backbone = find_msvit(module, self.backbone)
        path = next(name for name, part in module.named_modules() if part is backbone)
        prefix = f'{path}.' if path else ''
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = self._scale(backbone, name[len(prefix) :]) if name.startswith(prefix) else 1.0
            undecayed = parameter.ndim == 1 or name.endswith(UNDECAYED) or '.gate_losses.' in f'.{name}'
            group = dict(params=[parameter], lr=self.base_lr * scale, param_name=name)
            if undecayed:
                group['weight_decay'] = 0.0
            elif self.base_wd is not None:  # else it is the optimizer's own
                group['weight_decay'] = self.base_wd
            params.append(group)

    def _scale(self, backbone: MixedScale, name: str) -> float:
        """What a parameter of the backbone has of the rate."""
        layers = len(backbone.layers)
        if name.startswith((*GATES, 'gate_losses.')):
            return self.gate_lr_mult
        if name.startswith('layers.'):
            return self.layer_decay ** (layers - int(name.split('.')[1]))
        if name.startswith('out_details.') or (backbone.final_norm and name.startswith(f'{backbone.norm1_name}.')):
            return 1.0
        return self.layer_decay ** (layers + 1)
