"""MSViT for MMSegmentation. Importing it registers the classes that :data:`__all__` names in mmseg's registries."""

from . import versions  # noqa: F401  # isort: split  (before mmseg, which fails on a wrong mmcv and says less)
from .backbone import MSViT
from .beit import MSMAE, MSBEiT
from .doubt import DoubtLoss
from .flops import pass_costs
from .gate_losses import BatchShapingLoss, GeneralizedBatchShapingLoss, TokenBudgetLoss
from .gates import FixedGate, RandomGate, VarianceGate
from .hooks import DenseFirstHook, GateLossHook, TokenMapHook, ViTWeightsHook
from .inspection import record_tokens
from .learned_gates import ContextGate, GlanceGate, MLPGate
from .loading import load_backbone
from .metrics import TokenMetric
from .optim import MSViTLayerDecayConstructor
from .purity import PurityLoss
from .token_heads import TokenLinearHead, TokenSegmenterHead

__version__ = '0.2.0'

__all__ = [
    'BatchShapingLoss',
    'ContextGate',
    'DenseFirstHook',
    'DoubtLoss',
    'FixedGate',
    'GateLossHook',
    'GeneralizedBatchShapingLoss',
    'GlanceGate',
    'MLPGate',
    'MSBEiT',
    'MSMAE',
    'MSViT',
    'MSViTLayerDecayConstructor',
    'PurityLoss',
    'RandomGate',
    'TokenBudgetLoss',
    'TokenLinearHead',
    'TokenMapHook',
    'TokenMetric',
    'TokenSegmenterHead',
    'VarianceGate',
    'ViTWeightsHook',
    'load_backbone',
    'pass_costs',
    'record_tokens',
]
