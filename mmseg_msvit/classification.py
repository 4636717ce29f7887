"""MSViT as a classifier's backbone, in mmpretrain: the paper learns its gate on ImageNet and transfers it.

A config imports this module by ``custom_imports=dict(imports=['mmseg_msvit.classification'])``; ``import mmseg_msvit``
alone does without mmpretrain. Gates and gate losses need no second registration: the backbone builds them.
"""

from mmpretrain.registry import HOOKS, METRICS, MODELS
from torch import Tensor

from .engine.hooks import GateLossHook, ViTWeightsHook
from .measuring.metrics import TokenMetric
from .tokens.token_map import TokenMap
from .vit.msvit import MSViT


@MODELS.register_module(name='MSViT')
class ClassificationMSViT(MSViT):
    """MSViT that returns the cls token, (B, embed_dims), for each of ``out_indices``.

    Takes the arguments of :class:`MSViT`, with the defaults of mmpretrain's ViT for ``final_norm`` and ``norm_cfg``.
    Its state dict has the same keys, so that a classifier's checkpoint gives a segmentor its gate, or everything.

    Raises:
        ValueError: there is no cls token, ``out_detail='residual'`` or ``out_type='tokens'``; or
            ``train_tokens='active'`` with a gate that learns: in a classifier the task's gradient reaches the gate
            only through the weights of the attention, which 'active' has none of.
    """

    def __init__(self, **kwargs):
        super().__init__(**{'final_norm': True, 'norm_cfg': dict(type='LN', eps=1e-6), **kwargs})
        if not self.with_cls_token:
            raise ValueError('with_cls_token must be True: a classifier reads the cls token')
        if self.out_details or 'tokens' in self.out_types:
            raise ValueError(
                "a classifier reads the cls token: it wants no out_detail='residual' and no out_type='tokens'"
            )
        if self.gate_learns and self.select.train_tokens == 'active':
            raise ValueError(
                "train_tokens must be 'trimmed' or 'all' where a classifier's gate learns, got 'active', "
                'in which no gradient of the task reaches it'
            )

    def output(self, x: Tensor, tokens: TokenMap) -> Tensor:
        return tokens.to_cls(x)  # (B, C)


HOOKS.register_module(module=GateLossHook)
HOOKS.register_module(module=ViTWeightsHook)
METRICS.register_module(module=TokenMetric)
