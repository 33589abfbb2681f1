"""Manifold-constrained hyper-connections (mHC): how a layer reads from and writes to the residual streams.

A site is ``mhc_pre`` (coefficients and the layer's input), the layer, ``mhc_post`` (the new streams). What is saved for
the backward pass is the streams and the layer's output; everything of the size of the coefficients is computed again.

``constraint="none"`` gives what mHC constrains, plain hyper-connections (HC), for comparison: every coefficient is
``scale * tanh(projection) + base``, free to grow and to change its sign.

Shapes: B batch, T tokens, M = B T, S streams, D hidden, R rows of the projection: S (S + 2) at a site, S at the head.
Source: recipe 4 and 13; mHC: arXiv 2512.24880, HC is its equation 5, of arXiv 2409.19606; official inference code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Implementation, implementation
from .hyper_connection_triton import Constants, TritonRead, TritonWrite, TritonWriteRead
from .norm import at_least_fp32, rms_norm

Constraint = Literal["sinkhorn", "none"]
Coefficients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # of (projection, base, scale)


class Mixing(NamedTuple):
    """What a site does with its layer's output and with the streams, at least float32."""

    post: Tensor  # [B, T, S] weight of the layer's output in each stream
    residual: Tensor  # [B, T, S, S] from stream (first) to stream (second), doubly stochastic unless unconstrained


def mixing_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    constraint: Constraint = "sinkhorn",
) -> tuple[Tensor, Mixing]:
    """The weight of each stream in the layer's input, ``[B, T, S]``, and the mixing; arguments as for ``mhc_pre``."""
    flat = rms_norm(at_least_fp32(streams).flatten(2), eps=norm_eps)
    coefficients = _site(iterations, eps, constraint)
    pre, post, residual = coefficients(F.linear(flat, fn.to(flat.dtype)), base, scale)
    return pre, Mixing(post, residual)


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    constraint: Constraint = "sinkhorn",
) -> tuple[Tensor, Mixing]:
    """The layer's input ``[B, T, D]``, a weighted sum of the streams, and how its output will be mixed in.

    Equal to ``mixing_coefficients`` and a sum over the streams, but passes over the streams as few times as it can.

    Args:
        streams: ``[B, T, S, D]``; fn: ``[S (S + 2), S D]`` with rows (pre | post | residual, row-major), applied to the
            RMS-normalised streams; base: ``[S (S + 2)]`` static part; scale: ``[3]`` gates of pre, post and residual.
        iterations: of Sinkhorn's normalisation; constraint: "none" leaves it and the sigmoids out.
    """
    if _chosen(streams, fn, base, scale, constraint=constraint) == "triton":
        x, post, residual = TritonRead.apply(streams, fn, base, scale, Constants(iterations, eps, norm_eps))
    else:
        x, post, residual = _Read.apply(streams, fn, base, scale, _site(iterations, eps, constraint), norm_eps)
    return x, Mixing(post, residual)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The head's input ``[B, T, D]`` from ``streams [B, T, S, D]``; fn ``[S, S D]``, base ``[S]``, scale ``[1]``."""
    x: Tensor
    if _chosen(streams, fn, base, scale) == "triton":
        x, _, _ = TritonRead.apply(streams, fn, base, scale, Constants(0, eps, norm_eps))
    else:
        (x,) = _Read.apply(streams, fn, base, scale, partial(_head, eps=eps), norm_eps)
    return x


def mhc_post(streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
    """The streams after a layer: mixed among themselves, plus the layer's ``output [B, T, D]`` in each."""
    write = TritonWrite if _chosen(streams, output, *mixing) == "triton" else _Write
    new: Tensor = write.apply(streams, output, *mixing)
    return new


def mhc_post_pre(
    streams: Tensor,
    output: Tensor,
    mixing: Mixing,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    constraint: Constraint = "sinkhorn",
) -> tuple[Tensor, Tensor, Mixing]:
    """``mhc_post`` of a site and ``mhc_pre`` of the next one: new streams, the next layer's input, the next mixing.

    One pass where Triton runs: the new streams are written, and read again only from L2.
    """
    tensors = streams, output, *mixing, fn, base, scale
    if _chosen(*tensors, constraint=constraint) == "triton":
        new, x, post, residual = TritonWriteRead.apply(*tensors, Constants(iterations, eps, norm_eps))
        return new, x, Mixing(post, residual)
    new = mhc_post(streams, output, mixing)
    return new, *mhc_pre(new, fn, base, scale, iterations, eps, norm_eps, constraint)


def _chosen(streams: Tensor, *others: Tensor, constraint: Constraint = "sinkhorn") -> Implementation:
    """Kernels unroll S^2 products: beyond 8 streams, and for unconstrained coefficients, there is torch."""
    chosen = implementation(streams, *others)
    return "torch" if constraint == "none" or streams.shape[2] > 8 else chosen


class Gains(NamedTuple):
    """What composite mixings do to a signal on its way up and to a gradient on its way down, for each of L sites."""

    forward: Tensor  # [L, ...] from the first site's input to this site's output
    backward: Tensor  # [L, ...] from the last site's output to this site's input


def composite_gains(residuals: Sequence[Tensor]) -> Gains:
    """Composite gain over depth (recipe 13; arXiv 2512.24880, section 3.1).

    With the papers' H_l (from column to row, the transpose of ``Mixing.residual``) the forward gain at site l is the
    largest magnitude of a row sum of H_l ... H_1, the backward gain that of a column sum of H_L ... H_l. Row sums of a
    product are the product applied to ones, so no matrices are multiplied.

    Args:
        residuals: L matrices ``[..., S, S]``, at least one, in order of depth.
    """
    ones = torch.ones_like(residuals[0][..., 0])
    up = accumulate(residuals, lambda signal, matrix: (signal.unsqueeze(-1) * matrix).sum(-2), initial=ones)
    down = accumulate(reversed(residuals), lambda slope, matrix: (matrix * slope.unsqueeze(-2)).sum(-1), initial=ones)
    forward, backward = ([sums.abs().amax(-1) for sums in way][1:] for way in (up, down))
    return Gains(torch.stack(forward), torch.stack(backward[::-1]))


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic ``[..., S, S]`` from logits: a row softmax, then rows and columns normalised in turn.

    The last step normalises columns, so what flows *into* each stream sums to one. The work runs in [S, S, tokens]
    layout, where every sum is over contiguous vectors: 10x faster on a CPU than over a last dimension of 4.
    """
    result: Tensor = _Sinkhorn.apply(logits, iterations, eps)
    return result


class _Sinkhorn(torch.autograd.Function):
    """Saves the logits alone: the backward pass runs the iteration again and then walks it in reverse."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.constants = iterations, eps
        *_, (matrix, _, _) = _sinkhorn_steps(logits, iterations, eps)
        return matrix.permute(2, 0, 1).contiguous().view_as(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        start, *steps = _sinkhorn_steps(logits, *ctx.constants)
        slope = gradient.reshape(-1, *logits.shape[-2:]).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        # y = x / (sum(x) + eps) gives dx = (dy - sum(dy y)) / (sum(x) + eps).
        for matrix, total, dim in reversed(steps):
            slope.sub_((slope * matrix).sum(dim, keepdim=True)).div_(total)
        softmax = start[0] - ctx.constants[1]
        slope.sub_((slope * softmax).sum(1, keepdim=True)).mul_(softmax)
        return slope.permute(2, 0, 1).reshape(logits.shape), None, None


def _sinkhorn_steps(logits: Tensor, iterations: int, eps: float) -> Iterator[tuple[Tensor, Tensor, int]]:
    """After each step the matrices ``[S, S, tokens]``, what they were divided by, and the dimension that was summed."""
    matrix = logits.reshape(-1, *logits.shape[-2:]).permute(1, 2, 0).softmax(1) + eps
    yield matrix, matrix, 1
    for step in range(2 * iterations - 1):
        dim = step % 2
        total = matrix.sum(dim, keepdim=True) + eps
        matrix = matrix / total
        yield matrix, total, dim


def _site(iterations: int, eps: float, constraint: Constraint) -> Coefficients:
    """pre, post ``[..., S]`` and residual ``[..., S, S]`` from the projection ``[..., S (S + 2)]``."""
    return _unconstrained if constraint == "none" else partial(_constrained, iterations=iterations, eps=eps)


def _constrained(logits: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float) -> tuple[Tensor, ...]:
    pre, post, residual = (x * gate + bias for x, bias, gate in zip(_split(logits), _split(base), scale, strict=True))
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(_square(residual), iterations, eps)


def _unconstrained(logits: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    logits = torch.tanh(logits)
    pre, post, residual = (x * gate + bias for x, bias, gate in zip(_split(logits), _split(base), scale, strict=True))
    return pre, post, _square(residual)


def _split(rows: Tensor) -> tuple[Tensor, ...]:
    """Pre, post and residual part of the last dimension."""
    count = math.isqrt(rows.shape[-1] + 1) - 1
    parts: tuple[Tensor, ...] = rows.split((count, count, count * count), -1)
    return parts


def _square(flat: Tensor) -> Tensor:
    square: Tensor = flat.unflatten(-1, (math.isqrt(flat.shape[-1]),) * 2)
    return square


def _head(logits: Tensor, base: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    return (torch.sigmoid(logits * scale + base) + eps,)


class _Read(torch.autograd.Function):
    """(x, other coefficients): x sums the streams by the first of ``coefficients(projection, base, scale)``."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        coefficients: Coefficients,
        norm_eps: float,
    ) -> tuple[Tensor, ...]:
        flat = at_least_fp32(streams).flatten(0, 1).flatten(1)  # [M, S D]
        # The norm is one number a token: it scales the projection, and no normalised copy of the streams is made.
        square = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_()
        factor = (square / flat.shape[1] + norm_eps).rsqrt_()
        raw = flat @ fn.to(flat.dtype).T  # [M, R]
        pre, *others = coefficients((raw * factor).view(*streams.shape[:2], -1), base, scale)
        x = _mix(flat.view(*streams.shape), pre.unsqueeze(-2)).squeeze(2)
        ctx.save_for_backward(streams, fn, base, scale, raw, factor)
        ctx.coefficients = coefficients
        return x.to(streams.dtype), *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, x_gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, raw, factor = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (raw * factor, base, scale)]
            outputs = ctx.coefficients(leaves[0].view(*streams.shape[:2], -1), *leaves[1:])
        flat = at_least_fp32(streams).flatten(0, 1).flatten(1)
        wide, upper = flat.view(streams.shape), at_least_fp32(x_gradient).unsqueeze(2)  # [B, T, S, D], [B, T, 1, D]
        to_pre = torch.linalg.vecdot(wide, upper)
        to_logits, to_base, to_scale = torch.autograd.grad(outputs, leaves, (to_pre, *others))
        to_raw = to_logits * factor
        # The norm depends on the streams as well: d factor / d x = -factor^3 x / (S D).
        through_norm = (to_logits * raw).sum(1, keepdim=True) * factor.pow(3) / -flat.shape[1]
        gradient = to_raw @ fn.to(flat.dtype)
        gradient.addcmul_(flat, through_norm)
        gradient.view_as(wide).addcmul_(outputs[0].detach().unsqueeze(-1), upper)
        to_fn = (to_raw.T @ flat).to(fn.dtype)
        return gradient.view_as(streams).to(streams.dtype), to_fn, to_base, to_scale, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(streams, output, post, residual)
        new = _mix(at_least_fp32(streams), residual.mT)
        return new.addcmul_(post.unsqueeze(-1), at_least_fp32(output).unsqueeze(2)).to(streams.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        streams, output, post, residual = ctx.saved_tensors
        upper = at_least_fp32(gradient).contiguous()
        to_streams = _mix(upper, residual).to(streams.dtype)
        to_output = _mix(upper, post.unsqueeze(-2)).squeeze(2).to(output.dtype)
        to_post = torch.linalg.vecdot(upper, at_least_fp32(output).unsqueeze(2))
        to_residual = at_least_fp32(streams).contiguous() @ upper.mT
        return to_streams, to_output, to_post, to_residual


def _mix(streams: Tensor, weights: Tensor) -> Tensor:
    """``weights [B, T, R, S]`` times ``streams [B, T, S, D]``, ``[B, T, R, D]``.

    A sum of few weighted rows is what an embedding bag is, and its kernel reads each row once; a batch of thousands of
    4 x 4 products takes twice to four times as long (2 cores, D 256).
    """
    rows = streams.reshape(-1, streams.shape[-1])
    first = torch.arange(0, len(rows), streams.shape[2], device=rows.device).view(-1, 1, 1)
    stream = torch.arange(streams.shape[2], device=rows.device)
    index = (first + stream).expand(-1, weights.shape[2], -1).reshape(-1, len(stream))
    mixed = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights.reshape(-1, len(stream)))
    return mixed.view(*streams.shape[:2], weights.shape[2], streams.shape[-1])
