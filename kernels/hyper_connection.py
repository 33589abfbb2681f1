"""Manifold-constrained hyper-connections (mHC): how a layer reads from and writes to the residual streams.

Shapes: B batch, T tokens, S streams, D hidden. Source: recipe 4; arXiv 2512.24880; official inference code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import at_least_fp32, rms_norm


class Mixing(NamedTuple):
    """The coefficients of one mHC site, float32."""

    pre: Tensor  # [B, T, S] weight of each stream in the layer's input
    post: Tensor  # [B, T, S] weight of the layer's output in each stream
    residual: Tensor  # [B, T, S, S] from stream (first) to stream (second), doubly stochastic


def mixing_coefficients(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> Mixing:
    """Dynamic coefficients from the streams themselves.

    Args:
        streams: ``[B, T, S, D]``; fn: ``[S (S + 2), S D]`` with rows (pre | post | residual, row-major);
            base: ``[S (S + 2)]`` static part; scale: ``[3]`` gates of pre, post and residual.
    """
    count = streams.shape[2]
    flat = rms_norm(at_least_fp32(streams).flatten(2), eps=norm_eps)
    pre, post, residual = F.linear(flat, fn.to(flat.dtype)).split([count, count, count * count], -1)
    pre_base, post_base, residual_base = base.split([count, count, count * count])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    residual = (residual * scale[2] + residual_base).unflatten(-1, (count, count))
    return Mixing(pre, post, sinkhorn(residual, iterations, eps))


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic ``[..., S, S]`` from logits: a row softmax, then rows and columns normalised in turn.

    The last step normalises columns, so what flows *into* each stream sums to one. The work runs in [S, S, tokens]
    layout, where every sum is over contiguous vectors: 10x faster on a CPU than over a last dimension of 4.
    """
    matrix = logits.flatten(0, -3).permute(1, 2, 0).softmax(1) + eps  # [S, S, tokens]
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    return matrix.permute(2, 0, 1).view_as(logits)


def head_coefficients(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Weights ``[B, T, S]`` of the streams in the input of the head; fn ``[S, S D]``, base ``[S]``, scale ``[1]``."""
    flat = rms_norm(at_least_fp32(streams).flatten(2), eps=norm_eps)
    return torch.sigmoid(F.linear(flat, fn.to(flat.dtype)) * scale + base) + eps


def collapse(streams: Tensor, weights: Tensor) -> Tensor:
    """One layer input ``[B, T, D]`` from the streams ``[B, T, S, D]``, summed in float32."""
    return (weights.unsqueeze(-2) @ at_least_fp32(streams)).squeeze(-2).to(streams.dtype)


def expand(streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
    """The streams after a layer: mixed among themselves, plus the layer's ``output [B, T, D]`` in each."""
    # One product of [S, S + 1] with [S + 1, D] a token: on a CPU three times as fast as a product and an outer product.
    weights = torch.cat((mixing.residual, mixing.post.unsqueeze(-2)), -2).transpose(-1, -2)
    return (weights @ at_least_fp32(torch.cat((streams, output.unsqueeze(-2)), -2))).to(streams.dtype)
