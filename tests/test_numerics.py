"""The roundings and products that all Triton kernels use, bit for bit against torch's own."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE

from openv4.kernels import numerics
from openv4.kernels.dispatch import jit, tl, triton
from openv4.kernels.quantize import quantize_fp4, quantize_fp8


@jit
def _codes_kernel(x, e4m3, e2m1, e4m3_back, e2m1_back, half, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0)
    wide, narrow = numerics.e4m3_code(value), numerics.e2m1_code(value)
    tl.store(e4m3 + at, wide, mask=inside)
    tl.store(e2m1 + at, narrow, mask=inside)
    tl.store(e4m3_back + at, numerics.e4m3_value(wide), mask=inside)
    tl.store(e2m1_back + at, numerics.e2m1_value(narrow), mask=inside)
    tl.store(half + at, numerics.cast(value, tl.bfloat16), mask=inside)


@jit
def _scales_kernel(x, e4m3, e2m1, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=1.0)
    tl.store(e4m3 + at, numerics.power_of_two(numerics.scale_exponent(value, 448)), mask=inside)
    tl.store(e2m1 + at, numerics.power_of_two(numerics.scale_exponent(value, 6)), mask=inside)


@jit
def _dot_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + row[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * N + column[None, :])
    z = tl.load(c + row[:, None] * N + column[None, :])
    tl.store(out + row[:, None] * N + column[None, :], numerics.dot(x, y, z) + numerics.dot(x, y))


def _numbers() -> torch.Tensor:
    """Every place where a rounding may go wrong: all ties and their neighbours, subnormals, saturation, both zeros."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    ties = torch.cat((ties, torch.arange(-24, 25) / 4))
    near = torch.cat((torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9))))
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=generator) * torch.exp2(torch.arange(20_000) % 40 - 25)
    edges = torch.tensor([0.0, -0.0, 448, 449, 464, 480, 1e30, -1e30, 6, 7, 5, 2.0**-10, 2.0**-11, 3 * 2.0**-11])
    return torch.cat((grid, ties, near, spread, edges)).to(DEVICE)


def test_codes_and_casts_equal_torchs() -> None:
    x = _numbers()
    codes = [torch.empty(len(x), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    back = [torch.empty(len(x), device=DEVICE) for _ in range(2)]
    half = torch.empty(len(x), dtype=torch.bfloat16, device=DEVICE)
    _codes_kernel[(triton.cdiv(len(x), 1024),)](x, *codes, *back, half, len(x), BLOCK=1024)
    e4m3 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes[0], e4m3.view(torch.uint8))
    assert torch.equal(back[0], e4m3.float())
    assert torch.equal(half.view(torch.int16), x.to(torch.bfloat16).view(torch.int16))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=DEVICE)
    size = x.double().abs().clamp(max=6)
    distance = (size.unsqueeze(1) - table).abs()
    nearest = distance.min(1).values
    # Of two codes at the same distance the even one wins.
    code = torch.where(distance == nearest.unsqueeze(1), torch.tensor([0, 9, 1, 10, 2, 11, 3, 12], device=DEVICE), 99)
    expected = code.argmin(1) + 8 * x.signbit()
    assert torch.equal(codes[1].long(), expected)
    assert torch.equal(back[1].double(), table[codes[1].long() % 8] * torch.where(x.signbit(), -1.0, 1.0))


def test_scales_equal_those_of_the_released_formats() -> None:
    """At powers of two times the largest number, where ceil(log2) jumps, and one float32 to either side."""
    exponents = torch.exp2(torch.arange(-10, 30).float())
    edge = torch.cat((exponents * 448, exponents * 6, exponents * 7))
    x = torch.cat((edge, torch.nextafter(edge, torch.tensor(1e30)), torch.nextafter(edge, torch.tensor(0.0))))
    x = torch.cat((x, torch.rand(3000, generator=torch.Generator().manual_seed(1)) * 1e4 + 1e-3))
    fp8 = torch.stack([quantize_fp8(v.view(1, 1))[1].float().view(()) for v in x])
    fp4 = torch.stack([quantize_fp4(v.expand(1, 2))[1].float().view(()) for v in x])
    found = [torch.empty(len(x), device=DEVICE) for _ in range(2)]
    _scales_kernel[(triton.cdiv(len(x), 1024),)](x.to(DEVICE), *found, len(x), BLOCK=1024)
    assert torch.equal(found[0].cpu(), fp8)
    assert torch.equal(found[1].cpu(), fp4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in ((16, 64), (64, 32)))
    c = torch.randn(16, 32, generator=generator).to(DEVICE)
    out = torch.full((16, 32), torch.nan, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, out, M=16, N=32, K=64)
    expected = 2 * (a.double() @ b.double()) + c
    assert ((out - expected).abs().max() / expected.abs().max()) < 1e-6
