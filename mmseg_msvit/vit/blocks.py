"""Transformer blocks over a pack of tokens: one block for every family of plain ViTs.

:func:`block_of` takes a library's encoder layer apart and puts its parts into a :class:`Block` under the names that
they had, so that constructors, first values and state dicts stay the library's. A layer with a part that it does not
know is refused.
"""

from typing import Callable, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmseg.models.backbones.beit import BEiTTransformerEncoderLayer
from mmseg.models.backbones.vit import TransformerEncoderLayer
from torch import Tensor, nn

from ..macs import linear_weights
from ..tokens.positions import Relative, rotate
from ..tokens.token_map import TokenMap
from .attention import attend, attend_padded, drop_path


class Places(NamedTuple):
    """What the attention of every block needs of where tokens are; made once in a forward pass.

    Attributes:
        rotary: sin and cos, (N, 1, d) each; None without rotary positions.
        relative: of the tokens of each image; None without relative positions.
    """

    rotary: Optional[Tuple[Tensor, Tensor]] = None
    relative: Optional[Relative] = None


class Block(nn.Module):
    """x + drop(gamma_1 * attention(norm1(x))), and then the same of the MLP.

    Args:
        norms: name -> module, of the attention and of the MLP; mmseg names them by their kind, as ``ln1``.
        attn: the attention.
        ffn: the MLP.
        gammas: (C,) layer scales of both branches, or None.
        drops: probabilities of stochastic depth of both branches; one coin for each image.
    """

    def __init__(
        self,
        norms: Dict[str, nn.Module],
        attn: 'Attention',
        ffn: nn.Module,
        gammas: Optional[Tuple[Tensor, Tensor]] = None,
        drops: Tuple[float, float] = (0.0, 0.0),
    ):
        super().__init__()
        self.norm_names = tuple(norms)
        for name, norm in norms.items():
            self.add_module(name, norm)
        self.attn = attn
        self.ffn = ffn
        self.gamma_1, self.gamma_2 = gammas or (None, None)
        self.drops = drops

    def forward(self, x: Tensor, tokens: TokenMap, places: Places) -> Tensor:
        """(N, C) to (N, C)."""
        norm1, norm2 = (getattr(self, name) for name in self.norm_names)
        x = x + self._branch(self.attn(norm1(x), tokens, places), self.gamma_1, self.drops[0], tokens)
        return x + self._branch(self.ffn(norm2(x)), self.gamma_2, self.drops[1], tokens)

    def _branch(self, x: Tensor, gamma: Optional[Tensor], drop: float, tokens: TokenMap) -> Tensor:
        if gamma is not None:
            x = x * gamma
        if self.training and drop > 0:
            x = drop_path(x, tokens.image, tokens.images, drop)
        return x

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one image of so many tokens."""
        return self.attn.macs(tokens) + self.ffn.macs(tokens)


class Attention(nn.Module):
    """Self-attention inside each image of a pack. Families differ in how they make queries, keys and values.

    Args:
        dims: C.
        num_heads: heads.
        dropout: of attention weights.
        proj_drop: what follows the output projection.
    """

    def __init__(self, dims: int, num_heads: int, dropout: float, proj_drop: nn.Module):
        super().__init__()
        self.dims = dims
        self.num_heads = num_heads
        self.dropout = dropout
        self.proj_drop = proj_drop

    def project_in(self, x: Tensor) -> Tensor:
        """(N, C) to (N, 3 * C), queries, keys and values."""
        raise NotImplementedError

    def project_out(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        raise NotImplementedError

    def bias(self, places: Places) -> Optional[Callable[[int], Tensor]]:
        """Takes an image's number to what is added to its scores, (..., heads, n, n); None for nothing."""
        return None

    def forward(self, x: Tensor, tokens: TokenMap, places: Places) -> Tensor:
        """(N, C) to (N, C)."""
        qkv = self.project_in(x).unflatten(1, (3, self.num_heads, -1))  # (N, 3, heads, d)
        if places.rotary is not None:
            qkv = rotate(qkv, *places.rotary)
        dropout, bias = self.dropout if self.training else 0.0, self.bias(places)
        if tokens.padded is not None:
            out = attend_padded(qkv, tokens.padded, tokens.padded_places(), dropout, bias)  # (N, heads, d)
        else:
            weight = tokens.weight if tokens.masked else None
            out = attend(qkv, tokens.lengths, weight, dropout, tokens.cu_seqlens, bias)  # (N, heads, d)
        return self.proj_drop(self.project_out(out.flatten(1)))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one image: four projections of each token, and 2 n^2 C for scores and values."""
        return tokens * 4 * self.dims**2 + 2 * tokens**2 * self.dims


class FusedProjectionAttention(Attention):
    """With the parameters of torch's ``nn.MultiheadAttention``, which mmseg's ViT has and which never runs itself.

    Args:
        attn: mmcv's ``MultiheadAttention``.
        key_bias: whether the bias of the keys is used; DINOv3 masks it out.
    """

    def __init__(self, attn: nn.Module, key_bias: bool = True):
        super().__init__(attn.embed_dims, attn.attn.num_heads, attn.attn.dropout, attn.proj_drop)
        self.attn = attn.attn
        self.key_bias = key_bias

    def project_in(self, x: Tensor) -> Tensor:
        bias = self.attn.in_proj_bias
        if bias is not None and not self.key_bias:
            q, k, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(k), v))
        return F.linear(x, self.attn.in_proj_weight, bias)

    def project_out(self, x: Tensor) -> Tensor:
        return self.attn.out_proj(x)


class RelativeAttention(Attention):
    """BEiT's and MAE's in mmseg: scores have a bias by the places of both tokens, learned for each layer and head.

    Args:
        attn: mmseg's ``BEiTAttention``.
    """

    def __init__(self, attn: nn.Module):
        super().__init__(attn.proj.out_features, attn.num_heads, attn.attn_drop.p, attn.proj_drop)
        self.q_bias, self.v_bias = getattr(attn, 'q_bias', None), getattr(attn, 'v_bias', None)
        self.relative_position_bias_table = attn.relative_position_bias_table
        # For mmseg's state dict: the pairs of tokens are indexed for each image here.
        self.register_buffer('relative_position_index', attn.relative_position_index)
        self.qkv = attn.qkv
        self.proj = attn.proj

    def project_in(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def project_out(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def bias(self, places: Places) -> Callable[[int], Tensor]:
        table = places.relative.filter(self.relative_position_bias_table)  # (rows, heads)
        return lambda image: table[places.relative.index[image]].movedim(-1, -3)  # (..., heads, n, n)


class FeedForward(nn.Module):
    """mmcv's MLP without what it adds around it: the identity, stochastic depth, layer scale.

    Args:
        layers: of mmcv's ``FFN``.
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        return self.layers(x)

    def macs(self, tokens: int) -> int:
        return tokens * linear_weights(self)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x), as in DINOv2-g and DINOv3 (Shazeer 2020).

    Args:
        dims: C.
        mlp_ratio: the hidden width is 2/3 of this times C, rounded up to a multiple of 8, as in DINOv2.
        drop: dropout at the end.
    """

    def __init__(self, dims: int, mlp_ratio: float, drop: float):
        super().__init__()
        hidden = swiglu_width(dims, mlp_ratio)
        self.w12 = nn.Linear(dims, 2 * hidden)
        self.w3 = nn.Linear(hidden, dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.drop(self.w3(F.silu(a) * b))

    def macs(self, tokens: int) -> int:
        return tokens * linear_weights(self)


def swiglu_width(dims: int, mlp_ratio: float) -> int:
    """The hidden width of a :class:`SwiGLU`."""
    return (int(int(dims * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def block_of(
    layer: nn.Module, layer_scale_init_value: float = 0.0, swiglu_ratio: Optional[float] = None, key_bias: bool = True
) -> Block:
    """The block that takes over a library's encoder layer, parameters and all.

    Args:
        layer: of mmseg's ViT, BEiT or MAE.
        layer_scale_init_value: of layer scales to be added, where positive. Stochastic depth then is on both branches,
            as in DINOv2; mmseg's ViT has it on the MLP's alone.
        swiglu_ratio: ``mlp_ratio`` of a SwiGLU in the place of the MLP; None keeps it.
        key_bias: whether keys have a bias.

    Raises:
        TypeError: the layer is of another class, or has a part that a block would skip.
    """
    if type(layer) is TransformerEncoderLayer:
        dims, drop = layer.attn.embed_dims, _drop_probability(layer.ffn.dropout_layer)
        attn = FusedProjectionAttention(layer.attn, key_bias)
        _drop_probability(layer.attn.dropout_layer, known=0.0)
        gammas, drops = None, (0.0, drop)
        if layer_scale_init_value > 0:
            gammas = tuple(nn.Parameter(torch.full((dims,), float(layer_scale_init_value))) for _ in range(2))
            drops = (drop, drop)
    elif isinstance(layer, BEiTTransformerEncoderLayer):
        attn = RelativeAttention(layer.attn)
        gammas = layer.gamma_1, layer.gamma_2
        drops = (_drop_probability(layer.drop_path),) * 2
        _drop_probability(layer.ffn.dropout_layer, known=0.0)
    else:
        raise TypeError(
            "layer must be an encoder layer of mmseg's VisionTransformer, BEiT or MAE, got "
            f'{type(layer).__module__}.{type(layer).__qualname__}'
        )
    if not isinstance(getattr(layer.ffn, 'gamma2', nn.Identity()), nn.Identity):
        raise TypeError("layer: mmcv's FFN with a layer scale of its own is not known; use layer_scale_init_value")
    mlp = layer.ffn.layers
    ffn = FeedForward(mlp) if swiglu_ratio is None else SwiGLU(dims, swiglu_ratio, mlp[-1].p)
    return Block({layer.norm1_name: layer.norm1, layer.norm2_name: layer.norm2}, attn, ffn, gammas, drops)


def _drop_probability(module: nn.Module, known: Optional[float] = None) -> float:
    """Of mmcv's stochastic depth or of nothing; anything else, or another one than is known, is refused."""
    found = None
    if isinstance(module, DropPath):
        found = module.drop_prob
    elif isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
        found = 0.0
    if found is None or known not in (None, found):
        raise TypeError(f'layer: {module} after a branch is not known')
    return found
