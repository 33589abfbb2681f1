"""Root-mean-square normalisation, with or without a learned weight."""

from typing import Any

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged where it is already as precise (float64 in tests)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times ``weight`` if given.

    Args:
        x: ``[..., D]``, any float dtype; computed in at least float32, returned in the dtype of ``x``.
        weight: ``[D]`` or None (DeepSeek-V4 normalises query heads and mHC inputs without a weight).
    """
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Saves the input and one number a row; autograd would keep the normalised input as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        factor = (square / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        normed: Tensor = wide * factor
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        wide, upper = at_least_fp32(x), at_least_fp32(gradient)
        normed = wide * factor
        to_weight = None
        if weight is not None:
            to_weight = (upper * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
            upper = upper * weight
        # y = x f with f = (mean(x^2) + eps)^-1/2: dx = f (dy - y mean(dy y)).
        along = (upper * normed).mean(-1, keepdim=True)
        return normed.mul_(-along).add_(upper).mul_(factor).to(x.dtype), to_weight, None
