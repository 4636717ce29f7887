"""MSViT for MMSegmentation. Importing it registers the classes that :data:`__all__` names in mmseg's registries."""

from . import versions  # noqa: F401  # isort: split  (before mmseg, which fails on a wrong mmcv and says less)
from .engine.hooks import DenseFirstHook, GateLossHook, TokenMapHook, ViTWeightsHook
from .engine.optim import MSViTLayerDecayConstructor
from .gates.doubt import DoubtLoss
from .gates.gate import FixedGate, RandomGate
from .gates.learned import ContextGate, GlanceGate, MLPGate
from .gates.losses import BatchShapingLoss, GeneralizedBatchShapingLoss, TokenBudgetLoss
from .gates.purity import PurityLoss
from .gates.scores import EntropyGate, FrequencyGate, GradientGate, ReconstructionGate, VarianceGate
from .loading import load_backbone
from .measuring.flops import pass_costs
from .measuring.inspection import record_tokens
from .measuring.metrics import TokenMetric
from .vit.beit import MSMAE, MSBEiT
from .vit.msvit import MSViT
from .vit.token_heads import TokenLinearHead, TokenSegmenterHead

__version__ = '0.2.0'

__all__ = [
    'BatchShapingLoss',
    'ContextGate',
    'DenseFirstHook',
    'DoubtLoss',
    'EntropyGate',
    'FixedGate',
    'FrequencyGate',
    'GateLossHook',
    'GeneralizedBatchShapingLoss',
    'GlanceGate',
    'GradientGate',
    'MLPGate',
    'MSBEiT',
    'MSMAE',
    'MSViT',
    'MSViTLayerDecayConstructor',
    'PurityLoss',
    'RandomGate',
    'ReconstructionGate',
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
