"""Arguments of the RMS norm, for its tests and for compiling its kernels."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.norm import rms_norm, rms_norm_fp8

SHAPES = [(1, 1), (63,), (30, 5), (0, 5), (7, 431), (2, 129, 2, 5), (2, 3, 128), (1, 1000)]


def draw(shape: tuple[int, ...], weighted: bool, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """``x`` of that shape and dtype, and a float32 weight."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(*shape, generator=generator).to(dtype)}
    return inputs | {"weight": torch.randn(shape[-1], generator=generator)} if weighted else inputs


def flash_calls() -> dict[str, Callable[[], None]]:
    """Rows of V4-Flash's sizes: all streams, hidden, query latent, head; and of sizes that fill no tile."""

    def call(columns: int, weighted: bool, dtype: torch.dtype) -> None:
        x = torch.zeros(256, columns, dtype=dtype, requires_grad=True)
        weight = torch.zeros(columns, requires_grad=True) if weighted else None
        rms_norm(x, weight).sum().backward()
        rms_norm_fp8(x, weight)[0].sum().backward()

    return {
        f"{columns}, {'weight' if weighted else 'no weight'}, {dtype}": partial(call, columns, weighted, dtype)
        for columns in (16384, 4096, 1024, 512, 63, 1)
        for weighted in (True, False)
        for dtype in (torch.bfloat16, torch.float32)
    }
