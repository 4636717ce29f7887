"""Gates: one logit of "coarse" for each region of an image.

A gate takes images padded to whole regions, and their region grid, and returns float32 logits (B, hc, wc). Whether a
region is coarse is decided from the logit by the backbone's token selector. A backbone of several coarse levels has a
gate for each, and asks them from the coarsest down.
"""

import math
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from mmseg.registry import MODELS
from torch import Tensor, nn

from .blocks import linear_weights
from .checkpoint import misshapen
from .embedding import area_mean, mean_weights, patchify
from .reading import read_checkpoint, tensors_below
from .resampling import resample_grid

# A decided gate's logit: sigmoid(20) is 1 - 2e-9, so that it is beyond any threshold that one would set.
CERTAIN = 20.0
# The losses clip probabilities to [1e-3, 1 - 1e-3]: a logit beyond 6.9 has no gradient, and one needs room to move.
MAX_FIRST_LOGIT = 5.0


class Gate(BaseModule):
    """Base of all gates. The backbone gives the first four arguments, a config the others.

    Args:
        in_channels: channels C of the images.
        region: pixels R along a region's side.
        grid: (gh, gw), the region grid of the backbone's ``img_size``.
        embed_dims: the backbone's width.
        temperature: T of m = sigmoid((logit + logistic noise) / T) in training; chosen here, no source gives it.
        threshold: a region is coarse at test time iff sigmoid(logit) > threshold.
        init_cfg: mmengine's, of first weights.
    """

    def __init__(
        self,
        in_channels: int = 3,
        region: int = 32,
        grid: Tuple[int, int] = (16, 16),
        embed_dims: int = 384,
        temperature: float = 1.0,
        threshold: float = 0.5,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.region = region
        self.grid = tuple(grid)
        self.embed_dims = embed_dims
        self.temperature = temperature
        self.threshold = threshold

    def check(self, images: Tensor, grid: Tuple[int, int]) -> None:
        """Refuses images that are not of the region grid.

        Raises:
            ValueError: the images have other channels or another size than the region grid says.
        """
        wanted = (self.in_channels, grid[0] * self.region, grid[1] * self.region)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f'grid {tuple(grid)} of {self.region}-pixel regions wants images of (C, H, W) = {wanted}, '
                f'got {tuple(images.shape[1:])}'
            )

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        """Logits of coarse.

        Args:
            images: (B, C, hc * R, wc * R).
            grid: (hc, wc).
            left: (B, hc, wc) bool, the regions that are not part of a coarser token; None for all. What a gate says
                of others changes nothing.

        Returns:
            (B, hc, wc) float32.
        """
        raise NotImplementedError

    def macs(self, grid: Tuple[int, int]) -> int:
        """Multiply-accumulates of one image of (hc, wc) regions."""
        raise NotImplementedError


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
        self.init_coarse = init_coarse
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
        """What :meth:`forward` returns, of images in the weights' type: (B, hc, wc, 1)."""
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
            weights['pos_embed'] = resample_grid(weights['pos_embed'], self.grid)
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
        return self.mlp(x + resample_grid(self.pos_embed, grid).permute(0, 2, 3, 1))

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
        self.patch = nn.Conv2d(self.in_channels, width // 4, 4, 4)
        self.down = nn.Sequential(
            NormConv(width // 4, width // 2, 3, stride=2, padding=1),
            NormConv(width // 2, width, 3, stride=2, padding=1),
        )
        self.context = nn.ModuleList(NormConv(width, width, 3, padding=step, dilation=step) for step in (1, 2, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    @property
    def last(self) -> nn.Linear:
        return self.head

    def logits(self, images: Tensor, grid: Tuple[int, int]) -> Tensor:
        side, rest = divmod(self.region, self.PIXELS)
        if rest:
            weights = mean_weights(self.region, self.PIXELS, images)  # (P, R)
            images = patchify(images, self.region).unflatten(-1, (-1, self.region, self.region))
            images = (weights @ images @ weights.T).permute(0, 3, 1, 4, 2, 5)  # (B, C, hc, P, wc, P)
            images = images.flatten(4, 5).flatten(2, 3)
        elif side > 1:
            images = area_mean(images, side)
        x = self.patch(images.contiguous(memory_format=torch.channels_last))  # (B, width / 4, 4 * hc, 4 * wc)
        x = self.down(x)  # (B, width, hc, wc)
        for conv in self.context:
            x = x + conv(x)
        return self.head(F.gelu(self.norm(x.permute(0, 2, 3, 1))))

    def macs(self, grid: Tuple[int, int]) -> int:
        places = {self.patch: 16, self.down[0]: 4}  # of a region; of all others one
        convs = [part for part in self.modules() if isinstance(part, nn.Conv2d)]
        each = sum(places.get(c, 1) * c.weight.numel() for c in convs) + linear_weights(self)
        if self.region % self.PIXELS:  # reduced by two matrix products
            each += self.in_channels * self.PIXELS * self.region * (self.region + self.PIXELS)
        return grid[0] * grid[1] * each


class ForcedGate(Gate):
    """Base of the gates that compute nothing to speak of."""

    def macs(self, grid: Tuple[int, int]) -> int:
        return 0


@MODELS.register_module()
class FixedGate(ForcedGate):
    """The same answer everywhere: all coarse, or all fine, which is the dense ViT.

    Args:
        coarse: the answer.
    """

    def __init__(self, *args, coarse: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.coarse = coarse

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        return images.new_full((images.shape[0], *grid), CERTAIN if self.coarse else -CERTAIN, dtype=torch.float32)


def _sure(order: Tensor, limit: Union[float, Tensor], end: int) -> Tensor:
    """Logits of regions that stand in an order from 0 to ``end``: coarse below a limit, and the surer the farther off.

    All are sure; but a ``token_budget`` takes them in this order, and not in that of their places.
    """
    return torch.where(order < limit, CERTAIN, -CERTAIN) * (1 + (order - limit).abs() / end) / 2


def _check_ratio(coarse_ratio: float) -> float:
    if not 0 <= coarse_ratio <= 1:
        raise ValueError(f'coarse_ratio must be in [0, 1], got {coarse_ratio}')
    return coarse_ratio


@MODELS.register_module()
class RandomGate(ForcedGate):
    """Coarse by chance, each region by itself, so that images differ in their number of tokens. A baseline.

    Args:
        coarse_ratio: the probability of coarse, at each level of those that are left.
    """

    def __init__(self, *args, coarse_ratio: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.coarse_ratio = _check_ratio(coarse_ratio)

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        coin = torch.rand(images.shape[0], *grid, device=images.device)
        return _sure(coin, self.coarse_ratio, 1)


@MODELS.register_module()
class VarianceGate(ForcedGate):
    """Hand-made: the regions of an image whose pixels vary least are coarse.

    Args:
        coarse_ratio: the share of an image's regions that are coarse, at each level of those that are left, rounded to
            whole regions.
    """

    def __init__(self, *args, coarse_ratio: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.coarse_ratio = _check_ratio(coarse_ratio)

    def forward(self, images: Tensor, grid: Tuple[int, int], left: Optional[Tensor] = None) -> Tensor:
        self.check(images, grid)
        pixels = patchify(images.float(), self.region).unflatten(-1, (self.in_channels, -1))  # (B, hc, wc, C, R * R)
        variance = pixels.var(-1, correction=0).mean(-1).flatten(1)  # (B, hc * wc)
        place = variance.argsort(dim=1, stable=True).argsort(dim=1)  # in the order of all regions
        left = torch.ones_like(place, dtype=torch.bool) if left is None else left.flatten(1)
        count = (self.coarse_ratio * left.sum(1, keepdim=True)).round().long()  # (B, 1), of those that are left
        end = place.shape[1]
        ends = F.pad(torch.where(left, place, end).sort(1).values, (0, 1), value=end)  # places of those, in order
        return _sure(place, ends.gather(1, count), end).unflatten(1, grid)
