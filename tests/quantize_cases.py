"""Numbers to round, and roundings by the book, one number at a time, exact in float64."""

import bisect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from openv4.kernels.fp4 import fake_quantize_fp4, fp4_weight, index_operand, rotate
from openv4.kernels.fp8 import fake_quantize_kv, fp8_linear, quantize_rows, round_weight, swiglu_fp8
from openv4.kernels.quantize import dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# E4M3 without its NaN: 8 subnormals, then 8 numbers for each of 15 exponents.
E4M3 = tuple(m * 2.0**-9 for m in range(8)) + tuple(
    (8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
)
SHAPES = ((1, 1), (1, 31), (3, 32), (5, 33), (129, 130), (130, 257), (128, 128))


def nearest(x: float, grid: tuple[float, ...]) -> float:
    """The number of the grid next to |x|, ties to the even code, with the sign of x; beyond the grid its end."""
    size = min(abs(x), grid[-1])
    above = bisect.bisect_left(grid, size)
    below = max(above - 1, 0)
    if grid[above] - size == size - grid[below]:
        code = above if above % 2 == 0 else below
    else:
        code = above if grid[above] - size < size - grid[below] else below
    return math.copysign(grid[code], x)


def scale_of(values: list[float], largest: float, floor: float) -> float:
    """2^ceil(log2(amax / largest)): the smallest power of two that brings amax to ``largest`` or below."""
    amax = max(floor, *(abs(v) for v in values))
    exponent = math.frexp(amax)[1] - math.frexp(largest)[1] - 1
    while math.ldexp(largest, exponent) < amax:
        exponent += 1
    return math.ldexp(1.0, exponent)


def round_group(values: list[float], grid: tuple[float, ...], floor: float) -> list[float]:
    scale = scale_of(values, grid[-1], floor)
    return [nearest(v / scale, grid) * scale for v in values]


def by_hand(x: Tensor, block: tuple[int, int], grid: tuple[float, ...], floor: float) -> Tensor:
    """``x [M, I]`` rounded in blocks, float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], block[0]):
        for left in range(0, x.shape[1], block[1]):
            part = x[top : top + block[0], left : left + block[1]]
            rounded = round_group(part.flatten().tolist(), grid, floor)
            place = out[top : top + block[0], left : left + block[1]]
            place.copy_(torch.tensor(rounded, dtype=torch.float64).view(part.shape))
    return out


def spread(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, wide: int = 8) -> Tensor:
    """Normal numbers times powers of two from 2^-wide to 2^wide, some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-wide, wide + 1, shape, generator=generator).float())
    return (x * (torch.rand(shape, generator=generator) > 0.05)).to(dtype)


def flash_calls() -> dict[str, Callable[[], None]]:
    """Every rounding at V4-Flash's sizes, few tokens."""

    def linear(dtype: torch.dtype) -> None:
        x = torch.zeros(256, 4096, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1024, 4096, requires_grad=True)
        fp8_linear(x, weight, round_weight(weight, dtype)).sum().backward()

    def rows(dtype: torch.dtype) -> None:
        gate, up = torch.zeros(2, 256, 2048, dtype=dtype)
        quantize_rows(gate)
        swiglu_fp8(gate, up, 10.0)
        swiglu_fp8(gate, up, 0.0)

    def operands(dtype: torch.dtype) -> None:
        x = torch.zeros(1, 64, 64, 128, dtype=dtype, requires_grad=True)
        index_operand(x).sum().backward()
        rotate(x).sum().backward()
        fake_quantize_fp4(x).sum().backward()
        fake_quantize_kv(torch.zeros(1, 256, 512, dtype=dtype, requires_grad=True), 64).sum().backward()

    def experts(dtype: torch.dtype) -> None:
        weight = torch.zeros(2, 2048, 4096)
        fp4_weight(weight, dtype)
        packed = quantize_fp4(weight.to(dtype))
        dequantize(*packed, dtype)
        dequantize(*quantize_fp8(weight.to(dtype)), dtype)
        codes, scale, _ = fp4_to_fp8(*packed)
        dequantize(codes, scale.float(), dtype)
        dequantize(packed[0], packed[1].float(), dtype)

    work = {"linear": linear, "rows": rows, "operands": operands, "experts": experts}
    return {
        f"{name} {str(dtype).removeprefix('torch.')}": lambda call=call, dtype=dtype: call(dtype)
        for name, call in work.items()
        for dtype in (torch.bfloat16, torch.float32)
    }
