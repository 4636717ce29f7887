"""Decode heads over tokens: their cost follows the tokens, and the dense grid is made of what they say.

The backbone gives them :class:`.PackedTokens` by ``out_type='tokens'``. Parameters are those of mmseg's heads, under
their names.
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from mmseg.models.decode_heads import FCNHead, SegmenterMaskTransformerHead
from mmseg.registry import MODELS
from torch import Tensor

from ..tokens.out_detail import smooth_coarse
from ..tokens.token_map import PackedTokens
from .blocks import Places, block_of


class TokenHead:
    """What heads over tokens share; to be inherited before one of mmseg's heads.

    Raises:
        ValueError: there is an ``input_transform``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.input_transform is not None:
            raise ValueError(
                f'input_transform must be None: {type(self).__name__} reads the tokens of one output of the backbone, '
                f'got {self.input_transform!r}'
            )

    def read(self, inputs: Sequence) -> PackedTokens:
        """The output at ``in_index``, without cls and registers.

        Raises:
            TypeError: it is a grid.
        """
        found = inputs[self.in_index]
        if not isinstance(found, PackedTokens):
            raise TypeError(
                f'{type(self).__name__} reads tokens: the backbone must be an MSViT, MSBEiT or MSMAE with '
                f"out_type='tokens', and no neck after it; got {_describe(found)}"
            )
        for observer in found.observers:
            observer(self, found.tokens)
        return found._replace(x=found.tokens.split_prefix(found.x)[1], tokens=found.tokens.with_prefix(0))

    def write(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """What is said of the tokens that were read, (M, K), to logits (B, K, h, w).

        At test time classes are last in memory, and stay so: mmseg's upsampling and argmax then take half the time on a
        CPU. Its loss would take twice as long.
        """
        logits = smooth_coarse(packed.tokens.to_grid(x), packed.tokens, packed.smoothed)
        return logits if self.training else logits.contiguous(memory_format=torch.channels_last)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one image of so many tokens, without cls and registers."""
        raise NotImplementedError


def _describe(found) -> str:
    return f'a grid {tuple(found.shape)}' if isinstance(found, Tensor) else type(found).__name__


@MODELS.register_module()
class TokenLinearHead(TokenHead, FCNHead):
    """mmseg's FCNHead without convolutions, a linear classifier, of each token in the place of each cell.

    Equal to it, in training too: what cells share is classified once. Takes its arguments.

    Args:
        num_convs: 0, for mmseg's default is another.
        concat_input: False, likewise.

    Raises:
        ValueError: there are convolutions, which see more than one token.
    """

    def __init__(self, num_convs: int = 0, concat_input: bool = False, **kwargs):
        if num_convs != 0 or concat_input:
            raise ValueError(
                f'TokenLinearHead wants num_convs=0 and concat_input=False, got {num_convs} and {concat_input}'
            )
        super().__init__(num_convs=num_convs, concat_input=concat_input, **kwargs)

    def forward(self, inputs: Sequence) -> Tensor:
        """Outputs of the backbone to logits (B, classes, h, w)."""
        packed = self.read(inputs)
        x, tokens = packed.x, packed.tokens  # (M, C)
        if self.training and self.dropout is not None:  # mmseg's drops channels of an image
            kept = self.dropout(x.new_ones(tokens.images, x.shape[1], 1, 1)).flatten(1)  # (B, C)
            x = x * kept[tokens.image]
        logits = self.write(F.linear(x, self.conv_seg.weight.flatten(1)), packed)  # (B, classes, h, w)
        return logits + self.conv_seg.bias[:, None, None]  # here, so that weights of tokens do not weigh it

    def macs(self, tokens: int) -> int:
        return tokens * self.conv_seg.weight.numel()


@MODELS.register_module()
class TokenSegmenterHead(TokenHead, SegmenterMaskTransformerHead):
    """Segmenter's mask transformer over an image's tokens and the class queries.

    With all tokens fine it is mmseg's :class:`SegmenterMaskTransformerHead`, whose arguments it takes. Queries are the
    leading rows of each image, as cls is in the encoder.

    Raises:
        ValueError: ``out_channels`` is not ``num_classes``: there is a mask for each class, in mmseg's head as well.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.out_channels != self.num_classes:
            raise ValueError(
                f'out_channels must be num_classes={self.num_classes}: a mask for each class is what this head makes, '
                f'got {self.out_channels}'
            )
        self.layers = ModuleList(block_of(layer) for layer in self.layers)

    def forward(self, inputs: Sequence) -> Tensor:
        """Outputs of the backbone to masks (B, classes, h, w)."""
        packed = self.read(inputs)
        x, tokens = packed.x, packed.tokens  # (M, C)
        queried = tokens.with_prefix(self.num_classes)
        queries = self.cls_emb.expand(tokens.images, -1, -1)  # (B, K, C)
        x = queried.join_prefix(queries, self.dec_proj(x))  # (N, C)
        for layer in self.layers:
            x = layer(x, queried, Places())
        queries, x = queried.split_prefix(self.decoder_norm(x))
        queries = F.normalize(self.classes_proj(queries), dim=2)
        x = F.normalize(self.patch_proj(x), dim=1)
        masks = self.mask_norm(tokens.against(x, queries))  # (M, K)
        return self.write(masks, packed)  # (B, K, h, w)

    def macs(self, tokens: int) -> int:
        queries, (dims, inner) = self.num_classes, (self.dec_proj.in_features, self.dec_proj.out_features)
        layers = sum(layer.macs(tokens + queries) for layer in self.layers)
        projections = tokens * dims * inner + (tokens + queries) * inner**2
        return layers + projections + tokens * queries * inner
