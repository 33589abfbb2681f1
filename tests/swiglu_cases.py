"""Calls of the clamped SwiGLU, for compiling its kernels."""

from collections.abc import Callable
from functools import partial

import torch

from openv4.kernels.swiglu import clamp_hits, clamped_swiglu


def flash_calls() -> dict[str, Callable[[], None]]:
    """V4-Flash's shared expert; with a clamp and without."""

    def call(limit: float, dtype: torch.dtype) -> None:
        gate, up = (torch.zeros(64, 2048, dtype=dtype, requires_grad=True) for _ in range(2))
        for out in (None, dtype):
            clamped_swiglu(gate, up, limit, out).sum().backward()
        clamp_hits(gate.detach(), up.detach(), limit)

    return {
        f"limit {limit}, {dtype}": partial(call, limit, dtype)
        for limit in (10.0, 0.0)
        for dtype in (torch.bfloat16, torch.float32)
    }
