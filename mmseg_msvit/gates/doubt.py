"""How sure a dense segmentor is of each region: what a gate can be taught without labels.

A region is worth its fine tokens where it is mixed in the eyes of the dense model. Its *doubt* is the entropy of the
model's class distribution after averaging that over the region: about 0 where all is one class, log(2) where the region
is half and half, or where the model cannot decide between two classes.
"""

from typing import ClassVar, MutableMapping, Optional, Sequence, Tuple, Union
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap
from ..weights.whole_models import load_segmentor
from .from_outside import as_dense, evaluating
from .losses import ShareLoss, gather_batch

# Nats: where most regions have no doubt at all, as in labels, it is the least that counts as some.
LEAST_DOUBT = 1e-3
# torch.quantile takes no more.
MOST_RANKED = 2**24


def class_shares(logits: Tensor, pixels: int) -> Tensor:
    """The mean class distribution of squares of pixels, at the lower and right edge of the pixels that exist.

    Args:
        logits: (B, K, H, W), of K exclusive classes; of K = 1 the logit of one against the other.
        pixels: along a square's side.

    Returns:
        (B, K, ceil(H / pixels), ceil(W / pixels)) float32, 2 classes of K = 1.
    """
    if logits.shape[1] == 1:
        logits = torch.cat((logits, torch.zeros_like(logits)), 1)  # softmax: sigmoid(x), sigmoid(-x)
    # One by one: distributions of many classes at full size are large.
    return torch.cat([F.avg_pool2d(image.float().softmax(1), pixels, ceil_mode=True) for image in logits.split(1)])


def region_doubt(shares: Tensor, side: int = 1) -> Tuple[Tensor, Tensor]:
    """Entropy of each region's class distribution.

    Args:
        shares: (B, K, h, w), how much of each class is in each cell; cells where there is nothing do not count.
        side: cells along a region's side.

    Returns:
        (B, ceil(h / side), ceil(w / side)) in [0, log(K)], and bool, whether there is anything; 0 where there is not.
    """
    mass = F.avg_pool2d(shares, side, ceil_mode=True)  # (B, K, hc, wc)
    total = mass.sum(1, keepdim=True)
    return torch.special.entr(mass / total.clamp(min=1e-12)).sum(1), total[:, 0] > 0


def doubt_scale(doubt: Tensor, target_coarse: float) -> Tuple[Tensor, Tensor]:
    """What :func:`doubt_target` needs to know of many regions' doubts.

    Args:
        doubt: (n,) nats.
        target_coarse: the share of the regions whose target shall be above one half.

    Returns:
        The floor, which is the least doubt: far from 0 where a head's scores are bounded, as Segmenter's are. And half:
        a doubt that is so far above the floor makes coarse and fine equally likely.
    """
    floor = doubt.min()
    doubt = doubt[:: len(doubt) // MOST_RANKED + 1]
    return floor, (doubt.quantile(target_coarse) - floor).clamp(min=LEAST_DOUBT)


def doubt_target(doubt: Tensor, floor: Tensor, half: Tensor) -> Tensor:
    """The probability of coarse that a gate is taught: half / (half + doubt), with doubt counted from its floor.

    Its logit is log(half) - log(doubt): an order of regions that is the same for any ``half``, which only moves the
    threshold, and in which small doubts, of which most regions are, are as far apart as large ones.

    Args:
        doubt: nats.
        floor: by :func:`doubt_scale`.
        half: likewise.
    """
    return half / (half + (doubt - floor).clamp(min=0))


class Teacher:
    """A trained dense segmentor that is asked and not trained.

    It is no submodule of who asks it: it is in no state dict, and copies of the asking module share it.

    It is built when it is first asked: a model that is only tested does not need its files.

    Args:
        config: path of the segmentor's config, or that config itself.
        checkpoint: path of its weights.
    """

    _known: ClassVar[MutableMapping[Tuple[str, str], 'Teacher']] = WeakValueDictionary()

    def __init__(self, config: Union[str, dict], checkpoint: str):
        self.config = config
        self.checkpoint = checkpoint
        self.model: Optional[nn.Module] = None
        self.answers = WeakTensorKeyDictionary()  # as long as somebody has the images

    @classmethod
    def of(cls, config: Union[str, dict], checkpoint: str) -> 'Teacher':
        """The one teacher that the losses of all levels ask, so that a step asks it once."""
        return cls._known.setdefault((str(config), checkpoint), cls(config, checkpoint))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to class logits (B, K, H, W)."""
        if images not in self.answers:
            if self.model is None:
                self.model = self._build()
            self.answers[images] = class_logits(self.model.to(images.device), images)
        return self.answers[images]

    def _build(self) -> nn.Module:
        config = Config.fromfile(self.config) if isinstance(self.config, str) else Config(dict(self.config))
        config.model.pretrained = None
        model = revert_sync_batchnorm(MODELS.build(config.model))
        load_segmentor(model, self.checkpoint)
        return model.requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self

    def __reduce__(self) -> tuple:
        return Teacher.of, (self.config, self.checkpoint)


def class_logits(segmentor: nn.Module, images: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) to class logits (B, K, H, W), by :func:`.evaluating`."""
    with evaluating(segmentor):
        return segmentor.encode_decode(images, [dict(img_shape=tuple(images.shape[2:]))] * len(images))


@MODELS.register_module()
class DoubtLoss(ShareLoss):
    """Cross-entropy of the logit against :func:`doubt_target`, as a dense segmentor sees each region.

    Chosen here. It needs no labels, and gives every region a place in one order, so that another threshold is another
    budget. The teacher sees the images as the model's own preprocessor has normalised them: both need the same ``mean``
    and ``std``, and nothing checks it.

    Args:
        teacher: ``dict(config=..., checkpoint=...)``, see :class:`Teacher`; None for the segmentor that is trained, all
            fine: for each coarse level a dense forward more, and a target that is worth what has been learned so far.
        target_coarse: the share of regions whose target is above one half. The doubt where it is one half, counted
            from the least doubt of a step, is a running mean over the steps, and part of a checkpoint.
        target_warmup: see :class:`ShareLoss`.
        momentum: the share of the newest step in the running mean of the doubt whose target is one half.
    """

    default_name = 'loss_doubt'

    def __init__(self, teacher: Optional[dict] = None, momentum: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        if teacher is not None and (not isinstance(teacher, dict) or set(teacher) != {'config', 'checkpoint'}):
            raise ValueError(f'teacher must be dict(config=..., checkpoint=...) of a dense segmentor, got {teacher}')
        if not 0 < momentum <= 1:
            raise ValueError(f'momentum must be in (0, 1], got {momentum}')
        self.teacher = None if teacher is None else Teacher.of(**teacher)
        self.asks_segmentor = teacher is None
        self.momentum = momentum
        self.register_buffer('half_doubt', torch.zeros(()))  # by doubt_scale; 0 before the first step

    def begin(self) -> None:
        super().begin()
        self.half_doubt.zero_()

    def of_step(
        self,
        decision: Decision,
        tokens: TokenMap,
        data_samples: Sequence,
        images: Tensor,
        segmentor: Optional[nn.Module] = None,
    ) -> Tensor:
        if self.teacher is None and segmentor is None:
            raise ValueError('DoubtLoss without a teacher asks the segmentor: pop_gate_losses needs segmentor=')
        if self.teacher is None:
            with as_dense(segmentor):
                seen = class_logits(segmentor, images)
        else:
            seen = self.teacher(images)
        doubt, _ = region_doubt(class_shares(seen, self.region))  # (B, hc, wc)
        # The floor is this step's: a segmentor that learns doubts less and less, and below an old floor all is coarse.
        floor, half = doubt_scale(gather_batch(doubt.flatten()), self.target())
        self.half_doubt.copy_(torch.where(self.half_doubt > 0, self.half_doubt.lerp(half, self.momentum), half))
        target = doubt_target(doubt, floor, self.half_doubt)
        return self.loss_weight * F.binary_cross_entropy_with_logits(decision.logits[self.level - 1], target)
