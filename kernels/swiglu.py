"""The clamped SwiGLU of experts (recipe 3), and how often it clamps.

Shapes: F expert intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import INTERPRETED, implementation, jit, tl, triton
from .norm import at_least_fp32
from .numerics import cast, exp

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype | None = None) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit) of ``[..., F]``; no clamp if ``limit`` is 0 (recipe 3).

    Computed, and returned unless ``dtype`` is given, in at least float32.
    """
    if gate.numel() and implementation(gate, up) == "triton":
        result: Tensor = _SwiGLU.apply(gate, up, limit, dtype or torch.float32)
        return result
    gate, up = at_least_fp32(gate), at_least_fp32(up)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    product = F.silu(gate) * up
    return product if dtype is None else product.to(dtype)


@torch.no_grad()
def clamp_hits(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Share of elements that ``clamped_swiglu`` clamps, 0-dim float32."""
    if limit > 0 and gate.numel() and implementation(gate, up) == "triton":
        gate, up, count = gate.contiguous(), up.contiguous(), gate.numel()
        hits = gate.new_empty(triton.cdiv(count, 1024), dtype=torch.int32)
        _hits_kernel[(len(hits),)](gate, up, hits, count, float(limit), BLOCK=1024)
        return hits.sum() / (2 * count)
    width = gate.shape[-1]
    return clamped_rows(gate.reshape(-1, width), up.reshape(-1, width), limit).sum() / (2 * gate.numel())


def clamped_rows(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """How many elements of each row ``clamped_swiglu`` clamps, ``[R]`` float32."""
    if limit <= 0:
        return gate.new_zeros(len(gate), dtype=torch.float32)
    return ((gate > limit).sum(1) + (up.abs() > limit).sum(1)).float()


# Triton.


@jit
def silu(x):
    """On a GPU to the bit as torch computes it: with a division that is rounded."""
    if _INTERPRETED:
        return x / (1 + tl.exp(-x))
    else:
        return tl.div_rn(x, 1 + exp(-x))


@jit
def clamped(gate, up, limit, CLAMP: tl.constexpr):
    """Both inputs of the product, clamped as torch's clamp: NaN stays."""
    if CLAMP:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@jit
def hit(gate, up, limit):
    """1 for each of both that is clamped, int32."""
    return (gate > limit).to(tl.int32) + (tl.abs(up) > limit).to(tl.int32)


@jit
def slopes(gate, up, upper, limit, CLAMP: tl.constexpr):
    """The gradients of both from ``upper``, that of the product; none where a value is clamped."""
    a, b = clamped(gate, up, limit, CLAMP)
    sigmoid = 1 / (1 + exp(-a))
    to_gate = upper * b * sigmoid * (1 + a * (1 - sigmoid))
    to_up = upper * a * sigmoid
    if CLAMP:
        to_gate = tl.where(gate > limit, 0.0, to_gate)
        to_up = tl.where(tl.abs(up) > limit, 0.0, to_up)
    return to_gate, to_up


@jit
def _clamped_swiglu_kernel(gate, up, out, count, limit, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    a, b = clamped(a, b, limit, CLAMP)
    tl.store(out + at, cast(silu(a) * b, out.dtype.element_ty), mask=at < count)


@jit
def _clamped_swiglu_slopes_kernel(
    gate, up, gradient, to_gate, to_up, count, limit, CLAMP: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    upper = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
    x, y = slopes(a, b, upper, limit, CLAMP)
    tl.store(to_gate + at, cast(x, to_gate.dtype.element_ty), mask=at < count)
    tl.store(to_up + at, cast(y, to_up.dtype.element_ty), mask=at < count)


@jit
def _hits_kernel(gate, up, hits, count, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(hits + tl.program_id(0), tl.sum(hit(a, b, limit), 0))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
        gate, up, count = gate.contiguous(), up.contiguous(), gate.numel()
        out = torch.empty_like(gate, dtype=dtype)
        _clamped_swiglu_kernel[(triton.cdiv(count, 1024),)](
            gate, up, out, count, float(limit), CLAMP=limit > 0, BLOCK=1024
        )
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        to_gate, to_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        _clamped_swiglu_slopes_kernel[(triton.cdiv(count, 1024),)](
            gate, up, gradient.contiguous(), to_gate, to_up, count, float(ctx.limit), CLAMP=ctx.limit > 0, BLOCK=1024
        )
        return to_gate, to_up, None, None
