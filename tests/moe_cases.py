"""Calls of the routed experts, for compiling their kernels."""

from collections.abc import Callable
from functools import partial

import torch

from openv4.kernels.fp8 import round_weight
from openv4.kernels.moe import routed_experts


def flash_calls() -> dict[str, Callable[[], None]]:
    """Experts of V4-Flash's widths with many tokens each and few, and in FP8; and widths that fill no tile."""

    def call(tokens: int, experts: int, hidden: int, inner: int, dtype: torch.dtype, rounds: bool = False) -> None:
        x = torch.zeros(tokens, hidden, dtype=dtype, requires_grad=True)
        weights = torch.zeros(tokens, 2, requires_grad=True)
        ids = torch.zeros(tokens, 2, dtype=torch.long)
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        matrices = [torch.zeros(experts, *shape, requires_grad=True) for shape in shapes]
        rounded = tuple(round_weight(w.detach(), dtype) for w in matrices) if rounds else None
        routed_experts(x, ids, weights, *matrices, 10.0, None, rounded)[0].sum().backward()  # type: ignore[arg-type]

    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (16, 64, 128, 256):
            found[f"{tokens} tokens, 2 experts, {dtype}"] = partial(call, tokens, 2, 4096, 2048, dtype)
        found[f"FP8, {dtype}"] = partial(call, 128, 2, 4096, 2048, dtype, rounds=True)
        found[f"odd widths, {dtype}"] = partial(call, 40, 3, 70, 33, dtype)
    found["256 experts"] = partial(call, 256, 256, 64, 32, torch.bfloat16)
    return found
