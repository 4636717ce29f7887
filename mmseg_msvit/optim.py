"""Layer-wise learning-rate decay for MSViT."""

from typing import List, Optional

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .inspection import find_msvit


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MSViTLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer decay as for any ViT, with gate and priors outside of it.

    With L layers the embedding has the rate lr * decay^(L + 1), layer i (from 0) lr * decay^(L - i), and what lies
    outside the blocks lr. Gate and gate losses have lr * ``gate_lr_mult`` instead. Vectors (norms and biases),
    positions, the cls token and the priors are not decayed.

    Args:
        optim_wrapper_cfg: as for mmengine's constructor.
        paramwise_cfg: ``layer_decay`` (default 0.75) and ``gate_lr_mult`` (default 1).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None):
        super().__init__(optim_wrapper_cfg, None)
        options = dict(paramwise_cfg or {})
        self.layer_decay = options.pop('layer_decay', 0.75)
        self.gate_lr_mult = options.pop('gate_lr_mult', 1.0)
        if options:
            raise ValueError(f'paramwise_cfg: wanted layer_decay and gate_lr_mult, got also {sorted(options)}')
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f'layer_decay must be in (0, 1], got {self.layer_decay}')
        # The base class asks for options only where there are some.
        self.paramwise_cfg = dict(layer_decay=self.layer_decay)

    def add_params(self, params: List[dict], module: nn.Module, **kwargs) -> None:
        """Adds a group for each parameter of the model."""
        backbone = find_msvit(module)
        layers = len(backbone.layers)
        prefix = next(name for name, part in module.named_modules() if part is backbone)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = name[len(prefix) + 1 :] if prefix and name.startswith(f'{prefix}.') else None
            scale = 1.0
            if inside is not None and inside.startswith(('gate.', 'gate_losses.')):
                scale = self.gate_lr_mult
            elif inside is not None and inside.startswith('layers.'):
                scale = self.layer_decay ** (layers - int(inside.split('.')[1]))
            elif inside is not None and inside.startswith(('patch_embed.', 'cls_token', 'pos_embed', 'coarse_detail.')):
                scale = self.layer_decay ** (layers + 1)
            still = parameter.ndim == 1 or name.endswith(('pos_embed', 'cls_token')) or '.gate_losses.' in f'.{name}'
            params.append(
                dict(
                    params=[parameter],
                    lr=self.base_lr * scale,
                    weight_decay=0.0 if still or self.base_wd is None else self.base_wd,
                    param_name=name,
                )
            )
