"""Arguments of the routed experts, for their tests and for compiling their kernels."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.fp8 import round_weight
from openv4.kernels.moe import routed_experts, routed_experts_reference

NAMES = ["x", "weights", "w1", "w3", "w2"]
WIDTHS = {"aligned": (16, 24), "odd": (7, 13), "mixed": (8, 5)}  # of tokens and of experts; odd ones take the loop


def draw(tokens: int, experts: int = 5, k: int = 2, widths: str = "aligned", seed: int = 0) -> list[Tensor]:
    """x, ids, weights, w1, w3, w2; float64. Every token chooses different experts."""
    hidden, inner = WIDTHS[widths]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    w1, w3 = (normal(experts, inner, hidden) * hidden**-0.5 for _ in range(2))
    return [normal(tokens, hidden), ids, weights, w1, w3, normal(experts, hidden, inner) * inner**-0.5]


def run(
    arguments: list[Tensor], limit: float, *dtypes: torch.dtype, reference: bool = False, cast: bool = False
) -> dict[str, Tensor]:
    """Output, all gradients and, of ours, the clamped share. ``dtypes``: of x and of the rest; ``cast``: matrices are
    given in the dtype of x, and in the other one as shapes without numbers."""
    x, ids, *others = arguments
    x = x.detach().to(dtypes[0]).requires_grad_()
    weights, w1, w3, w2 = (t.detach().to(dtypes[-1]).requires_grad_() for t in others)
    result = {}
    if reference:
        result["output"] = routed_experts_reference(x, ids, weights, w1, w3, w2, limit)
    else:
        values = None
        if cast:
            values = w1.detach().to(x.dtype), w3.detach().to(x.dtype), w2.detach().to(x.dtype)
            w1, w3, w2 = (w.new_zeros(()).expand(w.shape).requires_grad_() for w in (w1, w3, w2))
        result["output"], result["clamped"] = routed_experts(x, ids, weights, w1, w3, w2, limit, cast=values)
        assert not result["clamped"].requires_grad
    # Numbers that bfloat16 holds, so that every dtype gets the same.
    upper = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = [x, weights, w1, w3, w2]
    gradients = torch.autograd.grad(result["output"], inputs, upper.to(result["output"].dtype))
    return result | dict(zip(NAMES, gradients, strict=True))


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
