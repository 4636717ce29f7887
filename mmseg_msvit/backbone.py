"""MSViT: mmseg's vision transformer over tokens of two scales.

The way of an image: ``gate`` gives a logit for each region, ``select`` turns logits into a :class:`TokenBatch`,
``embed`` makes the tokens, the blocks run over the pack, and ``TokenBatch.to_grid`` puts them back on the dense grid.
"""

import os
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Union
from weakref import WeakSet

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, attend_reference, drop_path
from .checkpoint import ADDED, adapt, fit, misshapen, refuse
from .embedding import Grid, area_mean, pad_to_regions, patchify, position_tables
from .gate_losses import GateLoss
from .gates import Gate
from .reading import read_checkpoint, tensors_below
from .tokens import TokenBatch, TokenSelector, raise_not_finite, region_grid

COARSE_EMBED = ('resize', 'resize+detail')


@MODELS.register_module()
class MSViT(VisionTransformer):
    """Vision transformer with dynamic mixed-scale tokens (Havtorn et al. 2023, arXiv:2307.02321).

    Takes every argument of mmseg's :class:`VisionTransformer`, with its defaults except ``patch_bias=True``, and
    returns what it returns: a tuple with (B, embed_dims, h, w) for each of ``out_indices``, h = ceil(H / patch_size).
    Its state dict has mmseg's keys, and those of the gate and the gate losses.

    Args:
        scales: pixels along the side of a fine and of a coarse token; the second a multiple of the first.
        gate: config of the gate.
        gate_loss: config, or list of configs, of the losses that train the gate; None for none. They are added to the
            segmentor's losses by ``GateLossHook``. A gate without trainable parameters gets none.
        train_tokens: which tokens a training step computes while the gate learns, see :class:`TokenSelector`.
        coarse_embed: ``'resize'`` embeds the area mean of a region; ``'resize+detail'`` adds a convolution, at first
            zero, of the embeddings of its cells (chosen here, after adaptive patch transformers).
        patch_bias: whether the patch embedding has a bias, as those of timm, DeiT and AugReg have.
        token_budget: at test time, the mean number of tokens that the images of a forward pass may have, in place of
            the gate's threshold; see :class:`TokenSelector`.
        **kwargs: of :class:`mmseg.models.backbones.VisionTransformer`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    # Called with (backbone, tokens) at each forward pass of any MSViT in evaluation mode, and held weakly. An
    # evaluator's metric is built without the model: this is how it sees the tokens.
    observers: ClassVar[WeakSet] = WeakSet()

    def __init__(
        self,
        *args,
        scales: Tuple[int, int] = (16, 32),
        gate: Optional[dict] = None,
        gate_loss: Union[dict, List[dict], None] = 'default',
        train_tokens: str = 'trimmed',
        coarse_embed: str = 'resize',
        patch_bias: bool = True,
        token_budget: Optional[float] = None,
        **kwargs,
    ):
        if isinstance(kwargs.get('pretrained'), os.PathLike):
            kwargs['pretrained'] = os.fspath(kwargs['pretrained'])
        super().__init__(*args, patch_bias=patch_bias, **kwargs)
        fine, coarse = _check_scales(scales, self.patch_size)
        if getattr(self.patch_embed.adap_padding, 'padding', None) != 'corner':
            raise ValueError("patch_pad must be 'corner': the grid of regions begins at the image's corner")
        if coarse_embed not in COARSE_EMBED:
            raise ValueError(f'coarse_embed must be one of {COARSE_EMBED}, got {coarse_embed!r}')
        self.in_channels = self.patch_embed.projection.in_channels
        self.embed_dims = self.patch_embed.embed_dims
        self.region = coarse
        self.side = coarse // fine
        self.table = self.img_size[0] // fine, self.img_size[1] // fine
        if not self.with_cls_token:
            self.cls_token.requires_grad_(False)  # it is kept for the state dict's sake only

        grid = region_grid(self.table, self.side)
        shape = dict(in_channels=self.in_channels, region=coarse, grid=grid, embed_dims=self.embed_dims)
        self.gate = _build('gate', gate or dict(type='MLPGate'), Gate, **shape)
        self.gate_losses = nn.ModuleList()
        if self.gate_learns:
            if gate_loss == 'default':
                gate_loss = dict(type='GeneralizedBatchShapingLoss')
            for cfg in [gate_loss] if isinstance(gate_loss, dict) else gate_loss or []:
                self.gate_losses.append(_build('gate_loss', cfg, GateLoss, grid=grid, region=coarse))
        names = [loss.loss_name for loss in self.gate_losses]
        if len(set(names)) < len(names):
            raise ValueError(f'gate_loss: each loss needs a loss_name of its own, got {names}')
        self.select = TokenSelector(
            self.side, train_tokens, self.gate.temperature, self.gate.threshold, self.with_cls_token, token_budget
        )
        self.coarse_detail = None
        if coarse_embed == 'resize+detail':
            self.coarse_detail = nn.Conv2d(self.embed_dims, self.embed_dims, self.side, self.side)
            self._init_detail()
        self.register_load_state_dict_pre_hook(MSViT._adapt_loaded)
        # The one slot between a training forward and its gate losses; pop_gate_losses empties it.
        self._gated: Optional[TokenBatch] = None

    @property
    def gate_learns(self) -> bool:
        """Whether the gate has a trainable parameter."""
        return any(p.requires_grad for p in self.gate.parameters())

    def init_weights(self) -> None:
        """As mmseg's ViT; a gate, and the detail of the coarse embedding, keep their own first values.

        A checkpoint that ``init_cfg`` or ``pretrained`` names may be of any layout that :mod:`.checkpoint` knows, and
        of several models one, by ``init_cfg``'s ``prefix``; the log says what was made of it.

        Raises:
            ValueError: the checkpoint cannot be read, or is not of this architecture.
        """
        if isinstance(self.init_cfg, dict) and self.init_cfg['type'].startswith('Pretrained'):
            path, prefix = self.init_cfg['checkpoint'], self.init_cfg.get('prefix', '')
            tensors, report = fit(self, tensors_below(read_checkpoint(path), prefix))
            self.load_state_dict(tensors, strict=False)
            print_log(f'{path}: {report}', logger='current')
            if self.gate.init_cfg is not None:  # a gate of its own takes precedence
                self.gate.init_weights()
        else:
            super().init_weights()
            self.gate.init_weights()
            self._init_detail()

    def _adapt_loaded(self, state_dict: dict, prefix: str, *args) -> None:
        """Before any ``load_state_dict``: brings what is of another image size, or without patch bias, to this model.

        Raises:
            ValueError: a tensor of the ViT itself has another shape; mmengine alone would go on with a random one.
        """
        for name, how in adapt(self, state_dict, prefix).items():
            print_log(f'{prefix}{name} {how}', logger='current')
        shapes = misshapen(self, state_dict, prefix)
        refuse({name: how for name, how in shapes.items() if not name.startswith(ADDED)})

    def _init_detail(self) -> None:
        if self.coarse_detail is not None:
            nn.init.zeros_(self.coarse_detail.weight)
            nn.init.zeros_(self.coarse_detail.bias)

    def forward(self, images: Tensor) -> tuple:
        """Images (B, C, H, W) to a tuple with (B, embed_dims, h, w), or [that, cls (B, embed_dims)], for each output.

        Raises:
            ValueError: the images are not (B, in_channels, H, W), or smaller than one patch.
            FloatingPointError: a pixel or a gate logit is NaN or infinite.
        """
        images, tokens = self.tokenize(images)
        self._gated = tokens if tokens.logits.requires_grad and self.training else None
        if not self.training:
            for observer in self.observers:
                observer(self, tokens)

        x = self.embed(images, tokens)  # (N, C)
        outputs = [self._output(x, tokens)] if self.out_origin else []
        image = tokens.image if self.training else None
        for i, layer in enumerate(self.layers):
            if self.with_cp and x.requires_grad:
                x = checkpoint(block, layer, x, tokens, image, self.select.train_tokens, use_reentrant=False)
            else:
                x = block(layer, x, tokens, image, self.select.train_tokens)
            if i == len(self.layers) - 1 and self.final_norm:
                x = self.norm1(x)
            if i in self.out_indices:
                outputs.append(self._output(x, tokens))
        return tuple(outputs)

    def tokenize(self, images: Tensor) -> Tuple[Tensor, TokenBatch]:
        """Gate and selection: images (B, C, H, W) to the same, padded to whole regions, and their tokens.

        Raises:
            ValueError, FloatingPointError: as :meth:`forward`.
        """
        self._check(images)
        images, grid = pad_to_regions(images, self.patch_size, self.side)
        logits = self.gate(images, region_grid(grid, self.side))  # (B, hc, wc)
        return images, self.select(logits, grid)

    def embed(self, images: Tensor, tokens: TokenBatch) -> Tensor:
        """Makes the tokens that are kept, and no others, with their positions: (N, C).

        Args:
            images: (B, C, H, W), padded to whole regions.
            tokens: which ones are kept.
        """
        h, w = tokens.grid
        hc, wc = region_grid(tokens.grid, self.side)
        cls_position, *positions = position_tables(
            self.pos_embed, self.table, tokens.grid, self.side, self.interpolate_mode
        )
        fine = patchify(images, self.patch_size)  # (B, hc * side, wc * side, P)
        coarse = patchify(area_mean(images, self.side), self.patch_size)  # (B, hc, wc, P)
        patches = torch.cat((coarse.flatten(1, 2), fine[:, :h, :w].flatten(1, 2)), 1)  # (B, hc * wc + h * w, P)

        candidates = patches.shape[1] + int(self.with_cls_token)
        image, candidate = tokens.index // candidates, tokens.index % candidates  # (N,)
        patch = candidate - int(self.with_cls_token)  # -1 is cls
        x = self.project(patches[image, patch])  # (N, C), in cls's rows some other patch's, replaced below
        if self.coarse_detail is not None:
            x = self._add_detail(x, fine, tokens.grid, image, patch)
        x = x + torch.cat((*positions, cls_position)).to(x.dtype)[patch]
        if self.with_cls_token:
            x[tokens.cu_seqlens[:-1].long()] = (self.cls_token[0] + cls_position).to(x.dtype)  # (1, C)
        x = self.drop_after_pos(x)
        return self.pre_ln(x) if self.pre_norm else x

    def project(self, patches: Tensor) -> Tensor:
        """The patch embedding of rows of pixels, (..., P) to (..., C)."""
        projection = self.patch_embed.projection
        x = F.linear(patches, projection.weight.flatten(1), projection.bias)
        return x if self.patch_embed.norm is None else self.patch_embed.norm(x)

    def _add_detail(self, x: Tensor, fine: Tensor, grid: Grid, image: Tensor, patch: Tensor) -> Tensor:
        """Adds to the coarse rows of x the convolution of their cells' embeddings; cells beyond the grid count zero."""
        hc, wc = region_grid(grid, self.side)
        row = ((patch >= 0) & (patch < hc * wc)).nonzero().flatten()  # (M,)
        cells = fine.unflatten(2, (wc, self.side)).unflatten(1, (hc, self.side)).transpose(2, 3)
        cells = cells.flatten(1, 2)[image[row], patch[row]]  # (M, side, side, P)
        inside = torch.zeros(hc * self.side, wc * self.side, device=x.device, dtype=x.dtype)
        inside[: grid[0], : grid[1]] = 1
        inside = patchify(inside[None, None], self.side).view(hc * wc, self.side, self.side, 1)
        embedded = self.project(cells) * inside[patch[row]]  # (M, side, side, C)
        detail = self.coarse_detail(embedded.permute(0, 3, 1, 2)).flatten(1)  # (M, C)
        return x.index_add(0, row, detail.to(x.dtype))

    def train(self, mode: bool = True) -> 'MSViT':
        """As mmseg's ViT, which returns nothing; torch's convention is to return the module."""
        super().train(mode)
        return self

    def pop_gate_losses(self, data_samples: Sequence) -> Dict[str, Tensor]:
        """The gate's losses of the last training forward, and what to log; empties the slot.

        Args:
            data_samples: what the segmentor got, with the ground truth.

        Returns:
            ``loss_*`` scalars with gradient, ``coarse_fraction`` and ``tokens``; nothing if the gate does not learn.
        """
        tokens, self._gated = self._gated, None
        if tokens is None:
            return {}
        losses = {loss.loss_name: loss(tokens.logits, data_samples) for loss in self.gate_losses}
        losses['coarse_fraction'] = tokens.coarse.float().mean()
        losses['tokens'] = tokens.active_counts().float().mean()
        return losses

    def _output(self, x: Tensor, tokens: TokenBatch):
        grid = tokens.to_grid(x)
        return [grid, tokens.to_cls(x)] if self.output_cls_token else grid

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f'images must be (B, in_channels={self.in_channels}, H, W), got {tuple(images.shape)}')
        if min(images.shape[2:]) < self.patch_size:
            raise ValueError(f'images must be at least one patch of {self.patch_size} px, got {tuple(images.shape)}')
        if not images.sum(dtype=torch.float32).isfinite():
            raise_not_finite('pixels of the images', images)


def block(layer: nn.Module, x: Tensor, tokens: TokenBatch, image: Optional[Tensor], train_tokens: str) -> Tensor:
    """One of mmseg's encoder layers over a pack.

    Args:
        layer: mmseg's ``TransformerEncoderLayer``.
        x: (N, C).
        tokens: whose pack it is.
        image: (N,) the image of each row, for stochastic depth in training.
        train_tokens: ``'all'`` takes the plain attention where keys have weights.
    """
    attention = layer.attn.attn
    qkv = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)  # (N, 3 * C)
    qkv = qkv.unflatten(1, (3, attention.num_heads, -1))  # (N, 3, heads, d)
    weight = tokens.weight if tokens.masked else None
    dropout = attention.dropout if layer.training else 0.0
    if weight is not None and train_tokens == 'all':
        out = attend_reference(qkv, tokens.lengths, weight, dropout)  # (N, heads, d)
    else:
        out = attend(qkv, tokens.lengths, weight, dropout, tokens.cu_seqlens)  # (N, heads, d)
    x = x + layer.attn.proj_drop(attention.out_proj(out.flatten(1)))
    branch = layer.ffn.layers(layer.norm2(x))  # (N, C)
    depth = layer.ffn.dropout_layer
    if isinstance(depth, DropPath) and depth.training and depth.drop_prob > 0:
        branch = drop_path(branch, image, len(tokens.lengths), depth.drop_prob)
    return x + branch


def _check_scales(scales: Sequence[int], patch_size: int) -> Tuple[int, int]:
    if len(scales) != 2 or scales[0] != patch_size or scales[1] % scales[0] or scales[1] <= scales[0]:
        raise ValueError(
            f'scales must be (patch_size, a larger multiple of it), with patch_size={patch_size}, got {tuple(scales)}'
        )
    return scales[0], scales[1]


def _build(argument: str, cfg: dict, base: type, **shape) -> nn.Module:
    """Builds a gate or a gate loss, with errors that name the argument."""
    kind = MODELS.get(cfg['type']) if isinstance(cfg, dict) and isinstance(cfg.get('type'), str) else None
    kind = kind or (cfg.get('type') if isinstance(cfg, dict) else None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        known = sorted(c.__name__ for c in MODELS.module_dict.values() if issubclass(c, base) and c is not base)
        raise ValueError(f'{argument} must be a config whose type is one of {known}, got {cfg}')
    return MODELS.build(dict(**shape, **{**cfg, 'type': kind}))  # the class itself, which any default scope finds
