"""The Triton kernels of FP8 and FP4 against torch's own path, bit for bit, the sign of zeros included."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from quantize_cases import E2M1, E4M3, spread
from torch import Tensor
from triton_cases import DEVICE, assert_same_bits, poisoned, run_as

from openv4.kernels.dispatch import Choice, using
from openv4.kernels.fp4 import fake_quantize_fp4, fp4_weight, index_operand, rotate
from openv4.kernels.fp8 import (
    fake_quantize_kv,
    fp8_linear,
    quantize_rows,
    round_columns,
    round_rows,
    round_weight,
    swiglu_fp8,
)
from openv4.kernels.quantize import dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8
from openv4.kernels.swiglu import clamped_swiglu

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (1, 31), (3, 33), (129, 130), (1, 2, 130, 257))


def bits(x: Tensor) -> Tensor:
    """As integers; every NaN as the same one, because formats have several."""
    if x.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        codes = x.view(torch.uint8).clone()
        return codes.masked_fill_(x.float().isnan(), 255)
    if x.dtype.is_floating_point:
        return x.masked_fill(x.isnan(), torch.nan).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    return x


def assert_same(operation: Callable[..., Any], *inputs: Any) -> None:
    """The same bits as torch, and from a second run."""
    wanted, found, again = (
        [bits(x) for x in forward(how, operation, *inputs)] for how in ("torch", "triton", "triton")
    )
    for ours, same, theirs in zip(found, again, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours, theirs), f"{int((ours != theirs).sum())} of {ours.numel()} differ"
        assert torch.equal(ours, same), "two runs differ"


def forward(how: Choice, operation: Callable[..., Any], *inputs: Any) -> tuple[Tensor, ...]:
    with using(how), poisoned(), torch.no_grad():
        results = operation(*inputs)
    return results if isinstance(results, tuple) else (results,)


def assert_same_gradients(operation: Callable[..., Any], **inputs: Any) -> None:
    wanted, found = (run_as(how, operation, inputs) for how in ("torch", "triton"))
    assert "gradient of x" in wanted
    assert_same_bits({k: bits(v) for k, v in found.items()}, {k: bits(v) for k, v in wanted.items()})


def matrices(shape: tuple[int, ...], dtype: torch.dtype, wide: int = 12) -> Tensor:
    return spread(shape, sum(shape), dtype, wide).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_roundings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = matrices(shape, dtype)
    for operation in (
        round_rows,
        partial(round_rows, group=48),
        round_columns,
        partial(round_columns, group=48),
        partial(round_weight, dtype=dtype),
        partial(round_weight, dtype=torch.float32),
        quantize_rows,
        quantize_fp8,
        fake_quantize_fp4,
    ):
        assert_same(operation, x)


@pytest.mark.parametrize("wide", [2, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_in_fp4_that_fp8_holds_or_not(shape: tuple[int, ...], wide: int) -> None:
    weight = matrices(shape, torch.float32, wide)
    for dtype in DTYPES:
        assert_same(partial(fp4_weight, dtype=dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (129, 130), (2, 3, 130, 258)])
def test_released_formats(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = matrices(shape, dtype)
    assert_same(quantize_fp4, x)
    packed, fp8 = quantize_fp4(x), quantize_fp8(x)
    assert_same(fp4_to_fp8, *packed)
    for codes, scale in (packed, fp8):
        for stored in (scale, scale.float()):
            assert_same(partial(dequantize, dtype=dtype), codes, stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code(dtype: torch.dtype) -> None:
    """All bytes of FP8 and of FP4 times the first, the last and some other bytes of E8M0, NaN among them.

    The interpreter has no subnormal bfloat16, so there scales begin where no code needs one.
    """
    first = 0 if dtype == torch.float32 else 10
    powers = torch.tensor([first, first + 1, first + 2, 60, 119, 127, 135, 190, 246, 253, 254, 255], dtype=torch.uint8)
    scales = powers.view(torch.float8_e8m0fnu).view(-1, 1, 1).to(DEVICE)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).expand(len(scales), 1, 256)
    read = partial(dequantize, dtype=dtype)
    assert_same(read, codes.view(torch.float8_e4m3fn), scales.expand(-1, 1, 2))
    assert_same(read, codes.reshape(-1, 16, 16).view(torch.int8), scales.expand(-1, 16, 1))


@pytest.mark.parametrize("base", [0, 5, 40, 254])
def test_fp4_as_fp8_at_the_ends_of_the_scales(base: int) -> None:
    generator = torch.Generator().manual_seed(base)
    packed = torch.randint(0, 256, (130, 80), generator=generator, dtype=torch.uint8).to(DEVICE)
    scale = (base - torch.randint(0, 21, (130, 5), generator=generator)).clamp(min=0).to(DEVICE, torch.uint8)
    assert_same(fp4_to_fp8, packed.view(torch.int8), scale.view(torch.float8_e8m0fnu))


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_every_exponent_and_tie(largest: float) -> None:
    """Numbers of the format and what lies in the middle between two, times every power of two of a float32."""
    grid = torch.tensor(E2M1 if largest == 6 else E4M3, dtype=torch.float64)
    points = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64))
    groups = torch.cat((points, -points, torch.tensor([largest], dtype=torch.float64)))
    x = (groups * powers.unsqueeze(1)).float()
    x = torch.cat((x, torch.nextafter(x, torch.tensor(torch.inf))))
    x = torch.nn.functional.pad(x[x.isfinite().all(1)], (0, -x.shape[1] % 2)).to(DEVICE)
    for operation in (quantize_fp4, fake_quantize_fp4) if largest == 6 else (quantize_rows, round_rows):
        assert_same(operation, x)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(poison: float) -> None:
    x = spread((130, 160), 1)
    x[0, 5], x[129, 159] = poison, poison
    x = x.to(DEVICE)
    for operation in (
        round_rows,
        round_columns,
        quantize_rows,
        quantize_fp8,
        fake_quantize_fp4,
        partial(round_weight, dtype=torch.float32),
        partial(fp4_weight, dtype=torch.float32),
    ):
        assert_same(operation, x)
    assert_same(lambda x: quantize_fp4(x)[1], x)  # codes under the scale NaN mean nothing
    read = dequantize(*quantize_fp4(x), torch.float32)
    assert read[0, :32].isnan().all() and read[129, 128:].isnan().all() and int(read.isnan().sum()) == 64
    assert dequantize(*quantize_fp8(x), torch.float32)[128:, 128:].isnan().all()
    assert_same(fp4_to_fp8, *quantize_fp4(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "rotary", "group"), [(40, 8, 64), (30, 6, 16), (96, 0, 64), (130, 64, 64)])
def test_keys_and_values(channels: int, rotary: int, group: int, dtype: torch.dtype) -> None:
    """Also where the last group is short, and what follows must not move its scale."""
    x = matrices((2, 5, channels), dtype)
    assert_same_gradients(lambda x: fake_quantize_kv(x, rotary, group), x=x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (2, 3, 16), (33, 64), (2, 17, 128)])
def test_rotation_and_index_operands(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = matrices(shape, dtype, 2)
    for operation in (rotate, index_operand, fake_quantize_fp4):
        assert_same(operation, x)
        assert_same_gradients(operation, x=x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_linear(groups: int, dtype: torch.dtype) -> None:
    """The products are torch's on both sides, of the same numbers."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 67, groups, 133, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(4 * groups, 133, generator=generator).to(DEVICE)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x if groups > 1 else x.squeeze(2), weight, round_weight(weight, dtype), groups)

    assert_same_gradients(product, x=x, weight=weight)


@pytest.mark.parametrize("limit", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 130), (17, 256)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    """The exponentials of two libraries differ in the last bit of a float32, so the result by one step of its dtype at
    most; codes and scales are those of the result, bit for bit."""
    gate, up = matrices(shape, dtype, 3), matrices(shape, dtype, 3).flip(0)
    gate.view(-1)[0] = torch.nan
    found, codes, scales = forward("triton", swiglu_fp8, gate, up, limit)
    wanted = clamped_swiglu(gate, up, limit).to(dtype)
    assert torch.equal(bits(forward("torch", swiglu_fp8, gate, up, limit)[0]), bits(wanted))
    finite, step = wanted.isfinite(), 2.0**-7 if dtype == torch.bfloat16 else 2.0**-21
    assert torch.equal(found.isfinite(), finite)
    assert bool(((found - wanted).double().abs() <= step * wanted.double().abs())[finite].all())
    for ours, theirs in zip((codes, scales), forward("torch", quantize_rows, found), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (0, 4, 64), (2, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    for operation in (
        round_rows,
        round_columns,
        quantize_rows,
        quantize_fp8,
        quantize_fp4,
        fake_quantize_fp4,
        partial(fp4_weight, dtype=torch.bfloat16),
        partial(round_weight, dtype=torch.bfloat16),
        partial(fake_quantize_kv, rotary=0),
        partial(swiglu_fp8, up=x, limit=1.0),
        index_operand,
    ):
        if operation is not index_operand or shape[-1]:
            assert_same(operation, x)
    codes, scale = quantize_fp4(x)
    assert_same(partial(dequantize, dtype=torch.float32), codes, scale)
    assert_same(fp4_to_fp8, codes, scale)
