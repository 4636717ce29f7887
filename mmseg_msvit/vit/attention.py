"""Attention among the tokens of each image of a pack, plain or with weighted keys.

``attend`` is the one entry that the backbone calls; ``attend_reference`` says what it means. Keys with weights follow

    A_ij = w_j exp(q_i k_j / sqrt(d)) / sum_p w_p exp(q_i k_p / sqrt(d)),

so that a token of weight 0 is seen by nobody and yet its weight has a gradient (an additive mask of -inf has none).
"""

import math
from typing import Callable, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10
except ImportError:
    varlen_attn = None

# Bound on exp(s_ij) / Z_i, an inactive token's odds against all active ones together. The gradient of its weight is
# proportional to them and would grow as exp(score), while making the token active moves the output by
# odds / (1 + odds) of the way to its value, and so never by more than 1: beyond 100 the slope says nothing about the
# effect, and only its sign is kept. Active tokens have odds of at most 1.
MAX_ODDS = 100.0
# Elements of a (images, heads, n, n) matrix that the backward pass of the weighted attention holds at a time.
CHUNK_ELEMENTS = 2**24


def attend(
    qkv: Tensor,
    lengths: List[int],
    weight: Optional[Tensor] = None,
    dropout: float = 0.0,
    cu_seqlens: Optional[Tensor] = None,
    bias: Optional[Callable[[int], Tensor]] = None,
) -> Tensor:
    """Multi-head self-attention inside each image of a pack, fused.

    On CUDA in half precision all images go through one variable-length kernel, if ``cu_seqlens`` is given; elsewhere
    each run of equally long neighbours goes through ``scaled_dot_product_attention`` as one batch.

    Args:
        qkv: (N, 3, heads, d) queries, keys and values.
        lengths: tokens of each image, with sum N.
        weight: (N,) weights of the keys, at least 0; None stands for ones. Their gradient is computed without keeping
            any (n, n) matrix from the forward pass.
        dropout: probability of dropping an attention weight.
        cu_seqlens: (B + 1,) int32, the row where each image begins, and N, on the pack's device.
        bias: takes an image's number to what is added to its scores, (heads, n, n). Images then go one by one, those
            with weights through :func:`attend_reference`.

    Returns:
        (N, heads, d).
    """
    if weight is not None and (bias is not None or dropout > 0):
        return attend_reference(qkv, lengths, weight, dropout, bias)
    if weight is None and bias is None and dropout == 0 and cu_seqlens is not None and has_varlen(qkv):
        return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    outputs = []
    runs = _runs_of_equal_lengths(qkv, lengths, weight, apart=bias is not None)
    for number, ((images, n), rows, weights) in enumerate(runs):
        q, k, v = rows.unflatten(0, (images, n)).permute(2, 0, 3, 1, 4)  # 3 x (images, heads, n, d)
        if weight is None:
            mask = None if bias is None else bias(number).to(q.dtype)[None]  # (1, heads, n, n)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            out = WeightedAttention.apply(q, k, v, weights.unflatten(0, (images, n)))
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (images * n, heads, d)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_padded(
    qkv: Tensor, padded: Tensor, places: Tensor, dropout: float = 0.0, bias: Optional[Callable[[int], Tensor]] = None
) -> Tensor:
    """:func:`attend` in a traced model, where no number of tokens is known: all images as one batch with padding.

    By plain operations: the fused attention wants to know more of the length than a symbol says.

    Args:
        qkv: (N, 3, heads, d) queries, keys and values.
        padded: (B, n) int64, the rows of each image, and N where it has fewer than n. No query sees those.
        places: (N,) int64, where each row lies among the (B * n).
        dropout: probability of dropping an attention weight.
        bias: as :func:`attend`'s, but its answer, whatever the number, is that of all images: (B, heads, n, n).

    Returns:
        (N, heads, d).
    """
    rows = qkv.shape[0]
    q, k, v = qkv[padded.clamp(max=rows - 1)].permute(2, 0, 3, 1, 4)  # 3 x (B, heads, n, d)
    score = (q @ k.transpose(-2, -1)).to(_accumulate(q)) * q.shape[-1] ** -0.5  # (B, heads, n, n)
    if bias is not None:
        score = score + bias(0)
    # Runtimes add in a third of the time in which they choose.
    hidden = torch.where(padded == rows, -math.inf, 0.0).to(score.dtype)  # (B, n)
    score = score + hidden[:, None, None]
    out = F.dropout(score.softmax(-1), dropout).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(0, 1)[places]


def attend_reference(
    qkv: Tensor,
    lengths: List[int],
    weight: Optional[Tensor] = None,
    dropout: float = 0.0,
    bias: Optional[Callable[[int], Tensor]] = None,
) -> Tensor:
    """The definition of :func:`attend`, image by image, by plain tensor operations."""
    weights = [None] * len(lengths) if weight is None else weight.split(lengths)
    outputs = []
    for number, (image, w) in enumerate(zip(qkv.split(lengths), weights)):
        q, k, v = image.permute(1, 2, 0, 3)  # 3 x (heads, n, d)
        score = (q @ k.transpose(-2, -1)).to(_accumulate(q)) * q.shape[-1] ** -0.5  # (heads, n, n)
        if bias is not None:
            score = score + bias(number)
        if w is None:
            attention = score.softmax(-1)
        else:
            w = w.to(score.dtype)
            attention = w * _odds(score, w)
            attention = attention / attention.sum(-1, keepdim=True)
        attention = F.dropout(attention, dropout).to(v.dtype)
        outputs.append((attention @ v).transpose(0, 1))  # (n, heads, d)
    return torch.cat(outputs)  # (N, heads, d)


class WeightedAttention(torch.autograd.Function):
    """Weighted attention of equally long images: fused forward, and a backward that recomputes the (n, n) matrices.

    With E_ij = exp(s_ij) / Z_i * (g_i v_j - g_i o_i), where g is the gradient of the output o and
    Z_i = sum_p w_p exp(s_ip), the gradient of w_j is the sum of E_ij over i, that of s_ij is w_j E_ij, and that of v_j
    is w_j sum_i exp(s_ij) / Z_i g_i. Images are handled in chunks, so that the peak is a few matrices of one chunk.
    """

    @staticmethod
    def forward(ctx, q, k, v, weight):  # (B, heads, n, d) x 3, (B, n)
        bias = weight.log().to(q.dtype)[:, None, None]  # (B, 1, 1, n), -inf where inactive
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        ctx.save_for_backward(q, k, v, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, weight, out = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v, weight)]
        size = max(1, CHUNK_ELEMENTS // (q.shape[1] * q.shape[2] ** 2))
        for parts in zip(*(t.split(size) for t in (q, k, v, weight, out, grad, *grads))):
            _weighted_attention_backward(*parts)
        return tuple(grads)


def _weighted_attention_backward(q, k, v, weight, out, grad, grad_q, grad_k, grad_v, grad_weight):
    """Fills the last four with the gradients of one chunk of images."""
    scale = q.shape[-1] ** -0.5
    w = weight[:, None, None].to(_accumulate(q))  # (b, 1, 1, n)
    score = (q @ k.transpose(-2, -1)).to(w.dtype).mul_(scale)  # (b, heads, n, n)
    p = _odds(score, w)  # exp(s_ij) / Z_i
    e = (grad @ v.transpose(-2, -1)).to(w.dtype)
    e -= (grad * out).sum(-1, keepdim=True, dtype=w.dtype)
    e *= p
    grad_weight.copy_(e.sum((1, 2)))
    # Weights first, casts later: what is large has the weight zero, and half precision would make it infinite.
    grad_v.copy_((p.mul_(w).to(q.dtype).transpose(-2, -1)) @ grad)
    e = e.mul_(w).mul_(scale).to(q.dtype)
    grad_q.copy_(e @ k)
    grad_k.copy_(e.transpose(-2, -1) @ q)


def _odds(score: Tensor, weight: Tensor) -> Tensor:
    """exp(s_ij) / sum_p w_p exp(s_ip), at most MAX_ODDS; a row's sum is a constant to autograd."""
    total = (score.detach() + weight.detach().clamp(min=0).log()).logsumexp(-1, keepdim=True)
    return (score - total).clamp(max=math.log(MAX_ODDS)).exp()


def has_varlen(qkv: Tensor) -> bool:
    """Whether there is a variable-length kernel for queries, keys and values of this type on this device."""
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and half and qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _runs_of_equal_lengths(qkv: Tensor, lengths: List[int], weight: Optional[Tensor], apart: bool):
    """Yields ((images, n), their rows of qkv, their rows of weight) for neighbours of one length, or each apart."""
    runs = []
    for n in lengths:
        if runs and runs[-1][1] == n and not apart:
            runs[-1][0] += 1
        else:
            runs.append([1, n])
    rows = [images * n for images, n in runs]  # split, not slices: its backward is one concatenation
    weights = [None] * len(runs) if weight is None else weight.split(rows)
    return zip(runs, qkv.split(rows), weights)


def drop_path(branch: Tensor, image: Tensor, images: int, probability: float) -> Tensor:
    """Stochastic depth with one coin for each image of a pack.

    Args:
        branch: (N, C) output of a residual branch.
        image: (N,) the image that each row belongs to.
        images: number of images.
        probability: of dropping an image's branch; the others are scaled by 1 / (1 - probability).
    """
    coin = branch.new_empty(images, 1).bernoulli_(1 - probability) / (1 - probability)
    return branch * coin[image]
