"""Arguments of hyper-connection sites, and what the tests compare of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from openv4.kernels.hyper_connection import Mixing, mhc_head, mhc_post, mhc_post_pre, mhc_pre

# The sums have the width of the streams (some hundred terms) or, in the gradients of a site's parameters, the length of
# the rows (some thousand), and each is off by about the square root of that many roundings, of 6e-8 or 1e-16. The 20
# iterations of Sinkhorn's normalisation contract errors.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = [(1, 1), (2, 3), (3, 4), (1, 127), (2, 128), (1, 129), (2, 1000), (1, 4097)]  # [B, T]

Sites = Callable[..., Tensor | tuple[Tensor, ...]]


def draw(site: str, batch: int, length: int, streams: int = 4, hidden: int = 6, seed: int = 0) -> list[Tensor]:
    """Arguments of a site, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(batch, length, streams, hidden)
    if site == "post":
        residual = normal(batch, length, streams, streams).softmax(-1)
        return [x, normal(batch, length, hidden), normal(batch, length, streams).exp(), residual]
    rows = streams if site == "head" else streams * (streams + 2)
    width = streams * hidden
    return [x, normal(rows, width) * width**-0.5, normal(rows), normal(1 if site == "head" else 3)]


def run(function: Sites, arguments: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of all arguments, for random gradients of the outputs. The last dtype is repeated.

    The random gradients are numbers that bfloat16 holds, so that every dtype gets the same.
    """
    dtypes = dtypes + dtypes[-1:] * (len(arguments) - len(dtypes))
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(arguments, dtypes, strict=True)]
    result = function(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    upper = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upper)]


def flash_calls() -> dict[str, Callable[[], None]]:
    """Every operation at V4-Flash's sizes, forward and backward, few tokens."""
    streams, hidden, tokens = 4, 4096, 256
    rows = streams * (streams + 2)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def site(rows: int = rows, gates: int = 3) -> tuple[Tensor, Tensor, Tensor]:
        return leaf(rows, streams * hidden), leaf(rows), leaf(gates)

    def backward(*outputs: Tensor) -> None:
        torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])

    def pre(dtype: torch.dtype) -> None:
        x, mixing = mhc_pre(leaf(1, tokens, streams, hidden, dtype=dtype), *site(), 20, 1e-6, 1e-6)
        backward(x, *mixing)

    def head(dtype: torch.dtype) -> None:
        backward(mhc_head(leaf(1, tokens, streams, hidden, dtype=dtype), *site(streams, 1), 1e-6, 1e-6))

    def write(dtype: torch.dtype) -> tuple[Tensor, Tensor, Mixing]:
        old, output = leaf(1, tokens, streams, hidden, dtype=dtype), leaf(1, tokens, hidden, dtype=dtype)
        return old, output, Mixing(leaf(1, tokens, streams), leaf(1, tokens, streams, streams))

    def post(dtype: torch.dtype) -> None:
        backward(mhc_post(*write(dtype)))

    def post_pre(dtype: torch.dtype) -> None:
        new, x, mixing = mhc_post_pre(*write(dtype), *site(), 20, 1e-6, 1e-6)
        backward(new, x, *mixing)

    return {
        f"{call.__name__} {str(dtype).removeprefix('torch.')}": lambda call=call, dtype=dtype: call(dtype)
        for call in (pre, head, post, post_pre)
        for dtype in (torch.bfloat16, torch.float32)
    }
