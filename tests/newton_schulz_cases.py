"""Inputs of Newton-Schulz, hard ones among them, the roundings of its GPU form in torch, and V4-Flash's shapes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.newton_schulz import NEWTON_SCHULZ_COEFFICIENTS, SCALE, SEGMENTS, X_SCALE, newton_schulz


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(spectrum: Tensor, *shape: int, seed: int = 0) -> Tensor:
    """Float64 matrices of these singular values between random bases."""
    u, _, vh = torch.linalg.svd(random(*shape, seed=seed, dtype=torch.float64), full_matrices=False)
    return (u * spectrum) @ vh


def hard_spectra(n: int) -> dict[str, Tensor]:
    full = torch.logspace(0, -6, n, dtype=torch.float64)
    return {
        "condition 1e2": full ** (1 / 3),
        "condition 1e4": full ** (2 / 3),
        "condition 1e6": full,
        "half of the rank": (full > 1e-3).double(),
        "rank one": (full == 1).double(),
    }


def float16(x: Tensor, scale: float) -> Tensor:
    """What a Triton kernel holds as a float16 number times ``scale``."""
    return (x * scale).half().float() / scale


def pair(x: Tensor, scale: float) -> Tensor:
    """What it holds as two of them."""
    high = float16(x, scale)
    return high + float16(x - high, scale)


def split_gram_form(
    matrices: Tensor, segments: tuple[int, ...] = SEGMENTS, terms: int = 1, narrow: Callable[..., Tensor] = float16
) -> Tensor:
    """The form of the Triton kernels with their roundings, but for the order of sums; wide matrices ``[..., n, m]``.

    ``narrow(x, scale)`` rounds the factors of products.
    """

    def product(a: Tensor, b: Tensor, a_scale: float, b_scale: float) -> Tensor:
        p, q = narrow(a, a_scale), narrow(b, b_scale)
        if terms == 1:
            return p @ q
        return narrow(a - p, a_scale) @ q + p @ narrow(b - q, b_scale) + p @ q

    def symmetric(a: Tensor, b: Tensor, *addends: Tensor, factor: float = 1.0, scale: float = SCALE) -> Tensor:
        total = sum(addends, factor * product(a, b.mT, scale, scale)).tril()
        return pair(total + total.tril(-1).mT, SCALE)

    x = pair((matrices / torch.linalg.matrix_norm(matrices.double(), keepdim=True)).float(), X_SCALE)
    done = 0
    for count in segments:
        gram = symmetric(x, x, scale=X_SCALE)
        factor, identity = gram, 1.0
        for index, (a, b, c) in enumerate(NEWTON_SCHULZ_COEFFICIENTS[done : done + count]):
            part = symmetric(gram, gram, b * gram, factor=c)
            factor = symmetric(part, factor, a * factor, identity * part) if index else part
            identity *= a
            if index + 1 < count:
                half = symmetric(part, gram, a * gram)
                gram = symmetric(half, part, a * half)
        x = identity * x + product(factor, x, SCALE, X_SCALE)
        done += count
        x = pair(x, X_SCALE) if done < len(NEWTON_SCHULZ_COEFFICIENTS) else x
    return x


def flash_calls() -> dict[str, Callable[[], object]]:
    """V4-Flash's matrices, stored by rows and by columns, narrow ones, and ones of odd sizes."""
    shapes = {
        "experts": (2, 2048, 4096),
        "experts, down": (2, 4096, 2048),
        "q_b": (1, 32768, 1024),
        "kv": (8, 512, 4096),
        "mHC, pre": (2, 4, 16384),
        "mHC, mix": (2, 16, 16384),
        "index weights": (2, 64, 4096),
        "odd": (2, 129, 1030),
    }
    return {name: partial(newton_schulz, torch.zeros(shape)) for name, shape in shapes.items()}
