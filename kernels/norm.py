"""Root-mean-square normalisation, with or without a learned weight."""

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
    wide = at_least_fp32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    return normed.to(x.dtype)
