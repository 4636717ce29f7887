"""A library's plain vision transformer over tokens of several scales: what all families share.

The way of an image: gates give a logit for each region and ``select`` turns them into a :class:`TokenMap`
(``tokenize``), ``embed`` makes the tokens, the blocks run over the pack, ``TokenMap.to_grid`` puts them back on the
dense grid.
"""

import os
from functools import partial
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..gates.gate import ask
from ..gates.gated import Gated
from ..gates.glance import glance
from ..tokens.candidates import candidate_number
from ..tokens.embedding import CoarseDetail, PatchRows, add_detail, candidate_patches, pad_to_regions, shrink
from ..tokens.out_detail import ZeroLinear, add_out_detail, smooth_coarse
from ..tokens.positions import table_positions
from ..tokens.selection import Decision, TokenSelector, raise_not_finite
from ..tokens.token_map import Grid, PackedTokens, TokenMap, region_grid
from ..tokens.tracing import traced
from ..weights.checkpoint import ADDED
from ..weights.takes_weights import TakesWeights
from .blocks import Block, Places, block_of

COARSE_EMBED = ('resize', 'resize+detail')
OUT_DETAIL = ('none', 'smooth', 'residual')
OUT_TYPES = ('grid', 'tokens')


class MixedScale(Gated, TakesWeights):
    """What turns a library's plain ViT into one over tokens of several scales; to be inherited before it.

    The library's class makes patch embedding, cls token, positions, encoder layers and norms, with its own constructor
    and names. For others to override there are :meth:`tokenize` (a tokeniser of one's own), :meth:`between` (a reducer
    of tokens), :meth:`position` and :meth:`places` (another way of saying where a token is), :meth:`block` (another
    family of layers) and :meth:`output` (what a head gets).

    Args:
        scales: pixels along a token's side at each level, the finest first, each a multiple of the one before. The
            first is ``patch_size``.
        gate: config of the gate, None for an :class:`.MLPGate`; each coarse level has one of its own, built from it.
        gate_loss: config, or list of configs, of the losses that train the gate; None for none, ``'default'`` for a
            :class:`.GeneralizedBatchShapingLoss`. They are added to the segmentor's losses by ``GateLossHook``. A gate
            without trainable parameters gets none. Each coarse level has its own, those of coarser levels than the
            first with ``_2``, ``_3`` after their names.
        train_tokens: which tokens a training step computes while the gate learns, see :class:`TokenSelector`.
        coarse_embed: ``'resize'`` embeds the area mean of a region; ``'resize+detail'`` adds a :class:`CoarseDetail`.
        out_detail: what the cells of a coarse token have beside what it says of all of them. ``'smooth'``: something
            of their neighbours, see :func:`.out_detail.smooth_coarse`. ``'residual'``: a linear map, at first zero, of
            their own patch embedding, in each output. ``'none'``: nothing, as in the paper.
        out_type: ``'grid'``, or ``'tokens'`` for heads that read :class:`PackedTokens`; or one for each output.
        input_scale: at test time images are first reduced by this, to whole cells: a little less of everything, where
            coarse tokens are less of some places. Tokens are still counted against those of the whole image.
        token_budget: at test time, the mean number of tokens that the images of a forward pass may have, in place of
            the gate's threshold; see :class:`TokenSelector`.
        num_register_tokens: learned tokens after cls without a position, as DINOv2 and DINOv3 have.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    # For library classes that do not set these themselves.
    with_cls_token = True
    output_cls_token = False
    out_origin = False
    pre_norm = False
    with_cp = False
    norm_outputs = False
    interpolate_mode = 'bicubic'

    def __init__(
        self,
        *args,
        scales: Sequence[int] = (16, 32),
        gate: Optional[dict] = None,
        gate_loss: Union[str, dict, List[dict], None] = 'default',
        train_tokens: str = 'trimmed',
        coarse_embed: str = 'resize',
        out_detail: str = 'smooth',
        out_type: Union[str, Sequence[str]] = 'grid',
        input_scale: float = 1.0,
        token_budget: Optional[float] = None,
        num_register_tokens: int = 0,
        **kwargs,
    ):
        if isinstance(kwargs.get('pretrained'), os.PathLike):
            kwargs['pretrained'] = os.fspath(kwargs['pretrained'])
        super().__init__(*args, **kwargs)
        self.scales = _check_scales(scales, self.patch_size)
        self.sides = tuple(scale // self.patch_size for scale in self.scales)
        if coarse_embed not in COARSE_EMBED:
            raise ValueError(f'coarse_embed must be one of {COARSE_EMBED}, got {coarse_embed!r}')
        if out_detail not in OUT_DETAIL:
            raise ValueError(f'out_detail must be one of {OUT_DETAIL}, got {out_detail!r}')
        if not 0 < input_scale <= 1:
            raise ValueError(f'input_scale must be in (0, 1], got {input_scale}')
        self.input_scale = input_scale
        self.in_channels = self.patch_embed.projection.in_channels
        self.embed_dims = self.patch_embed.embed_dims
        self.patch_embed = PatchRows(self.patch_embed)
        if not hasattr(self, 'drop_after_pos'):
            self.drop_after_pos = nn.Identity()
        self.pos_grid = self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size
        self.register_tokens = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, self.embed_dims))
        if not self.with_cls_token:
            self.cls_token.requires_grad_(False)  # it is kept for the state dict's sake only

        self.build_gates(gate, gate_loss)
        if self.gate.blocks > len(self.layers):
            raise ValueError(f"gate.blocks must be at most the ViT's {len(self.layers)}, got {self.gate.blocks}")
        prefix = int(self.with_cls_token) + num_register_tokens
        self.select = TokenSelector(
            self.sides, train_tokens, self.gate.temperature, self.gate.threshold, prefix, token_budget
        )
        detailed = self.sides[1:] if coarse_embed == 'resize+detail' else ()
        details = [CoarseDetail(self.embed_dims, side) for side in detailed]
        self.coarse_detail, self.coarser_details = details[0] if details else None, nn.ModuleList(details[1:])
        self.smoothed, self.out_details = self.sides if out_detail == 'smooth' else (), nn.ModuleList()
        outputs = len(self.out_indices) + int(self.out_origin)
        self.out_types = (out_type,) * outputs if isinstance(out_type, str) else tuple(out_type)
        if len(self.out_types) != outputs or not set(self.out_types) <= set(OUT_TYPES):
            raise ValueError(f'out_type must be one of {OUT_TYPES}, or {outputs} of them, got {out_type!r}')
        if 'tokens' in self.out_types and (out_detail == 'residual' or self.output_cls_token):
            raise ValueError(
                "out_type 'tokens' wants out_detail other than 'residual' and output_cls_token=False: they are of grids"
            )
        if out_detail == 'residual':
            self.out_details = nn.ModuleList(ZeroLinear(self.embed_dims, self.embed_dims) for _ in range(outputs))
        self.layers = nn.ModuleList(self.block(layer) for layer in self.layers)
        # The library has frozen what it made; registers and layer scales are of the same ViT.
        kept = getattr(self, 'frozen_exclude', ['all'])
        for name, parameter in self.named_parameters():
            if 'all' not in kept and not name.startswith(ADDED) and not any(part in name for part in kept):
                parameter.requires_grad_(False)
        self.adapt_what_is_loaded()

    def block(self, layer: nn.Module) -> Block:
        """What runs in the place of one of the library's encoder layers, with its parameters under their names."""
        return block_of(layer)

    @property
    def details(self) -> List[CoarseDetail]:
        """One for each coarse level, the finest first; none with ``coarse_embed='resize'``."""
        return [] if self.coarse_detail is None else [self.coarse_detail, *self.coarser_details]

    def forward(self, images: Tensor) -> tuple:
        """Images (B, C, H, W) to a tuple with (B, embed_dims, h, w), or [that, cls (B, embed_dims)], for each output.

        With ``out_type='tokens'`` it is a :class:`PackedTokens` in the grid's place.

        Raises:
            ValueError: the images are not (B, in_channels, H, W), or empty.
            FloatingPointError: a pixel or a gate logit is NaN or infinite.
        """
        seen = images
        images, tokens, decision = self.tokenize(images)
        if not self.training:
            for observer in self.observers:
                observer(self, tokens)
        elif decision is not None and any(logits.requires_grad for logits in decision.logits):
            self.keep_for_losses(seen, tokens, decision)
        elif torch.is_grad_enabled():
            self.warn_of_gates_that_stay()

        x = [self.embed(images, tokens)]  # (N, C)
        if not self.out_details:
            del images  # padded or smaller ones take more memory than the tokens
        outputs = self.encode(x, tokens, self._output)
        if self.out_details:
            return add_out_detail(outputs, images, tokens, self.patch_size, self.patch_embed, self.out_details)
        return tuple(outputs)

    def encode(self, x: List[Tensor], tokens: TokenMap, output: Callable) -> list:
        """Tokens through the blocks: what ``output(number, x, tokens)`` makes of each that is put out.

        Args:
            x: one tensor (N, C), which is taken out of the list, so that nobody holds it while the blocks run.
            tokens: where they are.
            output: see above.
        """
        x = x.pop()
        outputs = [output(0, x, tokens)] if self.out_origin else []
        places = self.places(tokens)
        for i, layer in enumerate(self.layers):
            if self.with_cp and x.requires_grad:
                x = checkpoint(layer, x, tokens, places, use_reentrant=False)
            else:
                x = layer(x, tokens, places)
            last = i == len(self.layers) - 1
            if last and self.final_norm:
                x = self.norm1(x)
            if i in self.out_indices:
                normed = self.norm1(x) if self.norm_outputs and not last else x
                outputs.append(output(len(outputs), normed, tokens))
            x, reduced = self.between(i, x, tokens)
            if reduced is not tokens:
                tokens, places = reduced, self.places(reduced)
        return outputs

    def tokenize(self, images: Tensor) -> Tuple[Tensor, TokenMap, Optional[Decision]]:
        """Images (B, C, H, W) to the same, padded to whole regions, their tokens, and what the gates said, if any did.

        Raises:
            ValueError, FloatingPointError: as :meth:`forward`.
        """
        self._check(images)
        scale = 1.0 if self.training else self.input_scale
        dense_grid = None if scale == 1 else region_grid(images.shape[2:], self.patch_size)
        images, grid = pad_to_regions(shrink(images, self.patch_size, scale), self.patch_size, self.sides[-1])
        gates = [partial(ask, gate, images, partial(glance, self, images, grid)) for gate in self.gates]
        tokens, decision = self.select(gates, grid, dense_grid)
        return images, tokens, decision

    def embed(self, images: Tensor, tokens: TokenMap) -> Tensor:
        """Makes the tokens that are kept, and no others, with their positions: (N, C).

        Args:
            images: (B, C, H, W), padded to whole regions.
            tokens: which ones are kept, squares of cells at the levels of ``scales``.
        """
        patches = candidate_patches(images, self.patch_size, self.sides, tokens.grid)  # (B, T, P)
        patch = candidate_number(tokens, self.sides)  # (N,), -1 for a prefix row
        x = self.patch_embed(patches[tokens.image, patch])  # (N, C), in prefix rows some patch's, replaced below
        for level, detail in enumerate(self.details, 1):
            x = add_detail(x, images, tokens, level, self.patch_size, self.patch_embed, detail)
        x = x.to(self.cls_token.dtype)  # under autocast the residual stream is in float32, as the library's
        position = self.position(tokens)  # (T + 1, C)
        if position is not None:
            x = x + position.to(x.dtype)[patch]
        if tokens.prefix:
            prefix = self.prefix_tokens(0.0 if position is None else position[-1:])  # (prefix, C)
            x[tokens.prefix_rows()] = prefix.to(x.dtype)
        x = self.drop_after_pos(x)
        return self.pre_ln(x) if self.pre_norm else x

    def position(self, tokens: TokenMap) -> Optional[Tensor]:
        """What is added to every token that an image can have, as :func:`table_positions`; None for nothing."""
        return table_positions(self.pos_embed, self.pos_grid, tokens.grid, self.sides, self.interpolate_mode)

    def places(self, tokens: TokenMap) -> Places:
        """What the attention needs of the places of tokens."""
        return Places()

    def between(self, i: int, x: Tensor, tokens: TokenMap) -> Tuple[Tensor, TokenMap]:
        """What happens to tokens after block i: nothing, unless a subclass reduces them."""
        return x, tokens

    def prefix_tokens(self, position: Union[Tensor, float] = 0.0) -> Tensor:
        """(prefix, C), the cls token with its position (1, C), and registers, which have none."""
        cls = self.cls_token[0] + position if self.with_cls_token else self.cls_token[0, :0]
        return cls if self.register_tokens is None else torch.cat((cls, self.register_tokens[0]))

    def macs(self, tokens: TokenMap) -> List[Dict[str, int]]:
        """Multiply-accumulates of each image at test time: ``gate``, ``embedding`` (with details) and ``encoder``.

        Counted are matrix products: linear layers, convolutions, and both products of the attention.
        """
        counts = tokens.active_counts().tolist()
        coarse = [tokens.active_counts(level).tolist() for level in range(1, len(self.sides))]
        embedding = [self._embedding_macs(n, of_levels) for n, of_levels in zip(counts, zip(*coarse))]
        gates = sum(self._gate_macs(level, tokens.grid) for level in range(1, len(self.sides)))
        if self.out_details:
            each = self.patch_embed.macs(1) + sum(project.weight.numel() for project in self.out_details)
            cells = tokens.grid[0] * tokens.grid[1]
            embedding = [e + each * (cells - n) for e, n in zip(embedding, tokens.active_counts(0).tolist())]
        return [
            dict(gate=gates, embedding=e, encoder=sum(layer.macs(n) for layer in self.layers))
            for n, e in zip(counts, embedding)
        ]

    def _embedding_macs(self, tokens: int, coarse: Sequence[int]) -> int:
        """Of so many tokens, so many of each coarse level among them."""
        details = [self.patch_embed.macs(side**2) + d.weight.numel() for side, d in zip(self.sides[1:], self.details)]
        return self.patch_embed.macs(tokens) + sum(each * n for each, n in zip(details, coarse))

    def _gate_macs(self, level: int, grid: Grid) -> int:
        """Of the gate of a coarse level, with the blocks that it looks through."""
        gate, regions = self.gates[level - 1], region_grid(grid, self.sides[level])
        if not gate.blocks:
            return gate.macs(regions)
        n = regions[0] * regions[1]
        coarse = [n if i == level else 0 for i in range(1, len(self.sides))]
        tokens = n + self.select.prefix
        blocks = sum(layer.macs(tokens) for layer in self.layers[: gate.blocks])
        return gate.macs(regions) + self._embedding_macs(tokens, coarse) + blocks

    def train(self, mode: bool = True) -> 'MixedScale':
        """As the library's ViT, which returns nothing; and observers learn of evaluation mode."""
        super().train(mode)
        if not mode:
            for observer in self.observers:
                observer.begin()
        return self

    def output(self, x: Tensor, tokens: TokenMap):
        """What the backbone returns of the tokens (N, C) after a block."""
        grid = smooth_coarse(tokens.to_grid(x), tokens, self.smoothed)
        return [grid, tokens.to_cls(x)] if self.output_cls_token else grid

    def _output(self, number: int, x: Tensor, tokens: TokenMap):
        if self.out_types[number] == 'tokens':
            return PackedTokens(x, tokens, () if self.training else self.observers, self.smoothed)
        return self.output(x, tokens)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_channels or 0 in images.shape:
            raise ValueError(f'images must be (B, in_channels={self.in_channels}, H, W), got {tuple(images.shape)}')
        if not traced() and not images.sum(dtype=torch.float32).isfinite():
            raise_not_finite('pixels of the images', images)


def _check_scales(scales: Sequence[int], patch_size: int) -> Tuple[int, ...]:
    rising = all(b > a and b % a == 0 for a, b in zip(scales, scales[1:]))
    if len(scales) < 2 or scales[0] != patch_size or not rising:
        raise ValueError(
            'scales must be (patch_size, a larger multiple of it, perhaps one of that, and so on), with '
            f'patch_size={patch_size}, got {tuple(scales)}'
        )
    return tuple(scales)
