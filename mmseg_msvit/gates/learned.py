"""Gates that learn: a logit of "coarse" for each region from its pixels, and perhaps those around it."""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.model.weight_init import trunc_normal_
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..macs import linear_weights
from ..tokens.embedding import area_mean, mean_weights, patchify
from ..tokens.positions import resample_table
from ..versions import before_load_state_dict
from ..weights.checkpoint import misshapen
from ..weights.reading import read_checkpoint, tensors_below
from .gate import Gate

# The losses clip probabilities to [1e-3, 1 - 1e-3]: a logit beyond 6.9 has no gradient, and one needs room to move.
MAX_FIRST_LOGIT = 5.0


class LearnedGate(Gate):
    """Base of the gates with weights, in float32 also under AMP.

    A subclass makes its layers in :meth:`build`, and names its last one, with one output, in :attr:`last`.

    Args:
        init_coarse: the probability of coarse that every region starts with.
        frozen: whether the gate keeps its weights, as the paper's segmentation models do with a gate learned on
            ImageNet. Its weights come by ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.gate.')``.
    """

    def __init__(self, *args, init_coarse: float = 0.9, frozen: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 < init_coarse < 1 or abs(math.log(init_coarse / (1 - init_coarse))) > MAX_FIRST_LOGIT:
            low = 1 / (1 + math.exp(MAX_FIRST_LOGIT))
            raise ValueError(f'init_coarse must be in [{low:.4f}, {1 - low:.4f}], got {init_coarse}')
        self.init_coarse, self.frozen = init_coarse, frozen
        self.build()
        self.reset_parameters()
        self.requires_grad_(not frozen)

    def build(self) -> None:
        """Makes the layers."""
        raise NotImplementedError

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logit."""
        raise NotImplementedError

    def logits(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        """(B, hc, wc, 1), what :meth:`forward` returns with one dimension more, of images in the weights' type."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Weights of ``init_cfg``'s checkpoint, if there is one, with its positions resampled; else first values.

        Raises:
            ValueError: the checkpoint has no gate below the prefix, or one of another shape.
        """
        self.reset_parameters()
        if self.init_cfg is None:
            return
        path, prefix = self.init_cfg['checkpoint'], self.init_cfg.get('prefix', '')
        weights = tensors_below(read_checkpoint(path), prefix)
        own = self.state_dict()
        if 'pos_embed' in weights and weights['pos_embed'].ndim == 4:
            weights['pos_embed'] = resample_table(weights['pos_embed'], self.grid, 'bilinear')
        wrong = [f'{name} {shapes}' for name, shapes in misshapen(self, weights).items()]
        wrong += [f'no {name}' for name in own if name not in weights]
        if wrong:
            raise ValueError(
                f'gate.init_cfg: wanted the gate below prefix {prefix!r} of {path}, got {"; ".join(wrong[:6])}'
            )
        self.load_state_dict({name: weights[name] for name in own})

    def reset_parameters(self) -> None:
        """Small normal weights; a last layer that answers ``init_coarse`` everywhere."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, math.log(self.init_coarse / (1 - self.init_coarse)))

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        self.check(images, grid)
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images.to(self.last.weight.dtype), grid).squeeze(-1).float()  # (B, hc, wc)


@MODELS.register_module()
class MLPGate(LearnedGate):
    """The paper's gate: a 4-layer MLP on a region's raw pixels.

    The paper says four layers and local. Chosen here: width = embed_dims, LayerNorm and GELU between the layers, the
    position embedding after the first one. Takes the arguments of :class:`LearnedGate`.
    """

    def build(self) -> None:
        width = self.embed_dims
        self.embed = nn.Linear(self.in_channels * self.region**2, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, width, *self.grid))
        layers = []
        for out in (width, width, 1):
            layers += [nn.LayerNorm(width), nn.GELU(), nn.Linear(width, out)]
        self.mlp = nn.Sequential(*layers)

    @property
    def last(self) -> nn.Linear:
        return self.mlp[-1]

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        super().reset_parameters()

    def logits(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        x = self.embed(patchify(images, self.region))  # (B, hc, wc, width)
        return self.mlp(x + resample_table(self.pos_embed, grid, 'bilinear').permute(0, 2, 3, 1))

    def macs(self, grid: Tuple[int, int]) -> int:
        return grid[0] * grid[1] * linear_weights(self)


class NormConv(nn.Conv2d):
    """A convolution of what LayerNorm over the channels of each place and GELU make of its input.

    No statistics of the batch or of the image: a place has the same answer in any company.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # in memory, channels stay last
        return super().forward(x)


@MODELS.register_module()
class ContextGate(LearnedGate):
    """A gate that sees beyond its region: convolutions down to the region grid, and three with growing steps on it.

    Chosen here. The image is reduced to ``PIXELS`` pixels along a region's side, whatever the region's size, so that
    the gate of a coarser level costs a quarter of the next finer one's. A region's answer depends on about eight
    regions to each side. Beyond the region grid everything is zero, within it what pads the image to whole regions:
    the mean colour, as the backbone pads. It has no positions: any image size will do. Takes the arguments of
    :class:`LearnedGate`.
    """

    PIXELS = 16

    def build(self) -> None:
        width = max(8, self.embed_dims // 8 * 4)  # half of embed_dims, in multiples of 4
        self.build_stem(width)
        self.context = nn.ModuleList(NormConv(width, width, 3, padding=step, dilation=step) for step in (1, 2, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def build_stem(self, width: int) -> None:
        """Makes the layers of :meth:`stem`."""
        self.patch = nn.Conv2d(self.in_channels, width // 4, 4, 4)
        self.down = nn.Sequential(
            NormConv(width // 4, width // 2, 3, stride=2, padding=1),
            NormConv(width // 2, width, 3, stride=2, padding=1),
        )

    @property
    def last(self) -> nn.Linear:
        return self.head

    def logits(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        x = self.stem(images)  # (B, width, hc, wc)
        for conv in self.context:
            x = x + conv(x)
        return self.head(F.gelu(self.norm(x.permute(0, 2, 3, 1))))

    def stem(self, images: Tensor) -> Tensor:
        """What the gate sees, (B, C, H, W), to (B, width, hc, wc)."""
        side, rest = divmod(self.region, self.PIXELS)
        if rest:
            weights = mean_weights(self.region, self.PIXELS, images)  # (P, R)
            images = patchify(images, self.region).unflatten(-1, (-1, self.region, self.region))
            images = (weights @ images @ weights.T).permute(0, 3, 1, 4, 2, 5)  # (B, C, hc, P, wc, P)
            images = images.flatten(4, 5).flatten(2, 3)
        elif side > 1:
            images = area_mean(images, side)
        x = self.patch(images.contiguous(memory_format=torch.channels_last))  # (B, width / 4, 4 * hc, 4 * wc)
        return self.down(x)

    def macs(self, grid: Tuple[int, int]) -> int:
        convs = sum(conv.weight.numel() for conv in self.context)
        return grid[0] * grid[1] * (self.stem_macs() + convs + linear_weights(self))

    def stem_macs(self) -> int:
        """Of a region, convolutions and what reduces the image."""
        each = 16 * self.patch.weight.numel() + 4 * self.down[0].weight.numel() + self.down[1].weight.numel()
        if self.region % self.PIXELS:  # reduced by two matrix products
            each += self.in_channels * self.PIXELS * self.region * (self.region + self.PIXELS)
        return each


@MODELS.register_module()
class GlanceGate(ContextGate):
    """A gate that looks through the ViT's own first blocks: they run over the image with all regions coarse.

    Chosen here. Where :class:`ContextGate` has to learn from few images what an image is made of, these blocks know it
    from pretraining; on what they say of each region stand the context gate's convolutions. It costs what these
    blocks cost with one token for each region. It does not train them, and is to be fitted again when they have
    changed. Takes the arguments of :class:`LearnedGate`, too.

    Args:
        blocks: how many it looks through; weights of a gate that looks through another number are refused.

    Raises:
        ValueError: it is not positive; or, from the backbone, more than the ViT has.
    """

    def __init__(self, *args, blocks: int = 3, **kwargs):
        if blocks < 1:
            raise ValueError(f'blocks must be positive, got {blocks}')
        super().__init__(*args, **kwargs)
        self.blocks = blocks
        self.register_buffer('looks_through', torch.tensor(blocks))  # for checkpoints
        before_load_state_dict(self, GlanceGate._check_loaded)

    def _check_loaded(self, state_dict: dict, prefix: str, *args) -> None:
        blocks = int(state_dict.get(f'{prefix}looks_through', self.blocks))
        if blocks != self.blocks:
            raise ValueError(f'gate.blocks: the weights are of a gate that looks through {blocks}, got {self.blocks}')

    def build_stem(self, width: int) -> None:
        self.glance_norm = nn.LayerNorm(self.embed_dims)
        self.glance_in = nn.Linear(self.embed_dims, width)

    def stem(self, images: Tensor) -> Tensor:
        return self.glance_in(self.glance_norm(images.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def stem_macs(self) -> int:
        return 0  # linear layers are counted with all others
