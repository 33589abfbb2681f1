"""The released low-precision formats: FP8 E4M3 in blocks of 128 x 128, FP4 E2M1 in groups of 32, power-of-two scales.

A quantised matrix is a pair (codes, scale) that stands for codes times scale, the scale of each block spread over it:

    FP8   codes [..., O, I] float8_e4m3fn           scale [..., ceil(O / 128), ceil(I / 128)]
    FP4   codes [..., O, I / 2] int8, packed         scale [..., O, ceil(I / 32)]

Two consecutive FP4 numbers of a row share a byte, the first in its low half. Scales are E8M0 (an exponent and nothing
else) or float32 holding powers of two. Shapes: O output features, I input features. Source: recipe 8.1 to 8.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .numerics import cast, e2m1_code, e2m1_value, e4m3_code, e4m3_value, power_of_two

FP8_BLOCK, FP4_GROUP = 128, 32
FP8_MAX, FP4_MAX = 448.0, 6.0

_ELEMENTS = 2**16

# Below these a block's largest value does not lower its scale any more.
FP8_FLOOR, FP4_FLOOR = 1e-4, 6 * 2.0**-126


class Grid(NamedTuple):
    """The numbers of a float format, and what a block is scaled by to reach them."""

    largest: float
    floor: float
    normal: float  # the smallest normal number
    mantissa: int  # bits

    @property
    def carry(self) -> int:
        """Added to the bits of a float32 x: their exponent becomes that of 2^ceil(log2(x / largest))."""
        mantissa, exponent = math.frexp(self.largest)
        return int((1 - mantissa) * 2**24) - 1 - ((exponent - 1) << 23)


E4M3 = Grid(FP8_MAX, FP8_FLOOR, 2.0**-6, 3)
E2M1 = Grid(FP4_MAX, FP4_FLOOR, 1.0, 1)


class Blocks(NamedTuple):
    """Rows and columns of the weight that share one scale."""

    rows: int
    columns: int


class Quantized(NamedTuple):
    """A stack of quantised matrices as one value; dequantised, it has ``padding`` rows and columns of zeros more."""

    codes: Tensor  # [E, O, I], FP4: [E, O, I / 2]
    scale: Tensor
    padding: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, O, I] with the padding."""
        experts, rows, columns = self.codes.shape
        columns *= 2 if self.codes.dtype == torch.int8 else 1
        return experts, rows + self.padding[0], columns + self.padding[1]

    def dequantize(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some of the matrices."""
        dense = dequantize(self.codes[part], self.scale[part], dtype)
        return torch.nn.functional.pad(dense, (0, self.padding[1], 0, self.padding[0])) if any(self.padding) else dense


def block_of(codes: Tensor) -> Blocks:
    """How the scales of these codes are laid out, by their dtype."""
    return Blocks(1, FP4_GROUP) if codes.dtype == torch.int8 else Blocks(FP8_BLOCK, FP8_BLOCK)


def scale_shape(shape: tuple[int, ...], block: Blocks) -> tuple[int, ...]:
    """Shape of the scales of a weight ``[..., O, I]``."""
    return (*shape[:-2], -(-shape[-2] // block.rows), -(-shape[-1] // block.columns))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[..., O, I]``; exact in bfloat16 and float32 wherever codes times scale lie in their range.

    Args:
        codes: FP8 or packed FP4; scale: E8M0 or float32, as in the head of this file.
    """
    if codes.numel() and dtype != torch.float64 and implementation(codes, scale) == "triton":
        return _dequantize_on_device(codes, scale, dtype)
    block = block_of(codes)
    if codes.dtype == torch.int8:
        return _times(_fp4_bits(codes).to(dtype).mul_(64), scale.float(), block)
    return _times(codes.to(dtype), scale.float(), block)


def quantize_fp8(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP8 codes and E8M0 scales of ``weight [..., O, I]``: scale = 2^ceil(log2(amax / 448)), amax at least 1e-4.

    A block with a number that is not finite has the scale NaN, here and in FP4.

    Args:
        scale: of an earlier quantisation. A block keeps it where it represents the values no worse (by the sum of
            squared errors) than the rule's own would: exactly, if they did not change.
    """
    if scale is None and weight.numel() and implementation(weight) == "triton":
        codes, scales = blocks_on_device(weight.detach())
        return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    return _quantize(weight, scale, Blocks(FP8_BLOCK, FP8_BLOCK), E4M3)


def quantize_fp4(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed FP4 codes and E8M0 scales of ``weight [..., O, I]``, I even: scale = 2^ceil(log2(amax / 6)).

    Args:
        scale: as for ``quantize_fp8``.

    Raises:
        ValueError: I is odd.
    """
    if weight.shape[-1] % 2:
        raise ValueError(f"FP4 packs two input features in a byte; {weight.shape[-1]} cannot be packed")
    if scale is None and weight.numel() and implementation(weight) == "triton":
        return _pack_on_device(weight.detach())
    return _quantize(weight, scale, Blocks(1, FP4_GROUP), E2M1)


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 in groups of 32 as FP8 in blocks of 128 x 128, and where that lost nothing.

    The scale of a block is that of its largest group over 2^6 (6 * 2^6 = 384 fits E4M3). A group's numbers are then
    multiplied by 2^k, k <= 6; down to k = -5 they stay normal numbers: every block whose group scales differ by at most
    2^11 is exact (recipe 8.2). Outside, subnormals carry some values further, and others are rounded.

    Returns:
        FP8 codes, their E8M0 scales, and whether every value of a block survived: bool of the scales' shape.
    """
    if packed.numel() and implementation(packed, scale) == "triton":
        return _rescale_on_device(packed, scale)
    exact = dequantize(packed, scale, torch.float64)  # float32 has no 6 * 2^126
    block = Blocks(FP8_BLOCK, FP8_BLOCK)
    largest = _block_max(scale.float(), Blocks(FP8_BLOCK, FP8_BLOCK // FP4_GROUP))
    coarse = (largest.double() / 64).clamp(min=2.0**-127)
    codes = _times(exact.clone(), 1 / coarse, block).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    same = _times(codes.double(), coarse, block) == exact
    return codes, coarse.float().to(torch.float8_e8m0fnu), _block_max((~same).to(torch.uint8), block) == 0


def quantized_product(x: Tensor, codes: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """``x [..., G, I]`` times the groups of a quantised weight ``[G O, I]``, ``[..., G, O]``, in the dtype of ``x``.

    The weight exists in that dtype during the product only; the backward pass makes it again. It gets no gradient.
    """
    product: Tensor = _QuantizedProduct.apply(x, codes, scale, groups)
    return product


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.groups = groups
        return torch.einsum("...gi,goi->...go", x, _grouped(codes, scale, groups, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        weight = _grouped(codes, scale, ctx.groups, gradient.dtype)
        return torch.einsum("...go,goi->...gi", gradient, weight), None, None, None


def _grouped(codes: Tensor, scale: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return dequantize(codes, scale, dtype).view(groups, -1, codes.shape[-1])


def powers(largest: Tensor, grid: Grid) -> Tensor:
    """Scales of blocks by their ``largest`` sizes, float32: 2^ceil(log2(largest / grid.largest)); NaN if not finite.

    From the bits, where a significand above that of ``grid.largest`` carries into the exponent.
    """
    largest = largest.clamp(min=grid.floor)
    scale = largest.view(torch.int32).add(grid.carry).bitwise_and_(0x7F800000).view(torch.float32)
    return scale.add_(largest - largest)  # inf - inf is NaN


def nearest(scaled: Tensor, grid: Grid) -> Tensor:
    """Rounds float32 within ``grid``, in place, to its numbers, ties to even codes.

    Added to a float32 of 1.5 * 2^23 steps, a number is rounded to whole steps; the grid's steps are 2^-mantissa of the
    power of two below a number. Faster than a cast to float8 and back (measured: by 4).
    """
    below = scaled.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=grid.normal)
    steps = 1.5 * 2.0 ** (23 - grid.mantissa)
    return scaled.add_(below, alpha=steps).sub_(below, alpha=steps)


def _quantize(weight: Tensor, kept: Tensor | None, block: Blocks, grid: Grid) -> tuple[Tensor, Tensor]:
    # So many rows at a time: rounding takes several copies in float32 on the way.
    size = max(1, _ELEMENTS // max(FP8_BLOCK * weight.shape[-1], 1)) * FP8_BLOCK
    parts = weight.detach().split(size, -2)
    scales = [None] * len(parts) if kept is None else kept.split(size // block.rows, -2)
    rounded = [_round(part, scale, block, grid) for part, scale in zip(parts, scales, strict=True)]
    codes, scale = (torch.cat(column, -2) for column in zip(*rounded, strict=True))
    return codes, scale


def _round(weight: Tensor, kept: Tensor | None, block: Blocks, grid: Grid) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scale = powers(_block_max(wide.abs(), block), grid)
    if kept is not None:
        # The rule alone would double the scale of a group whose largest code is 6 for the smallest growth of that one
        # number, and round all others anew, twice as coarsely.
        kept = kept.float()
        scale = torch.where(_error(wide, kept, scale, block) <= _error(wide, scale, scale, block), kept, scale)
    codes = _encode(_times(wide.clone(), 1 / scale, block), block)
    return codes, scale.to(torch.float8_e8m0fnu)


def _error(wide: Tensor, scale: Tensor, unit: Tensor, block: Blocks) -> Tensor:
    """Sum of squared rounding errors of each block, in squares of ``unit``, which keeps them in float32's range."""
    codes = _encode(_times(wide.clone(), 1 / scale, block), block)
    error = _times(dequantize(codes, scale, torch.float32).sub_(wide), 1 / unit, block)
    return _tiles(error.square_(), block).sum((-3, -1))


def _encode(scaled: Tensor, block: Blocks) -> Tensor:
    """The nearest codes, ties to even, too large ones saturated; overwrites its argument."""
    if block.rows > 1:
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    sign = scaled.signbit()
    size = scaled.abs_().clamp_(max=FP4_MAX)
    # E2M1 steps by 1/2 below 2, by 1 below 4, by 2 above; even multiples of a step are even codes.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    size = (size / step).round_() * step
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
    code += sign.to(torch.uint8) * 8
    low, high = code.unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = low | (high << 4)
    return packed.view(torch.int8)


def _fp4_bits(packed: Tensor) -> Tensor:
    """Packed FP4 as float8_e4m3fn ``[..., I]`` of 1/64 their value: sign on sign, exponent on exponent."""
    byte = packed.view(torch.uint8)
    low = ((byte & 0x08) << 4) | ((byte & 0x07) << 2)
    high = (byte & 0x80) | ((byte & 0x70) >> 2)
    return torch.stack((low, high), -1).flatten(-2).view(torch.float8_e4m3fn)


def _times(values: Tensor, scale: Tensor, block: Blocks) -> Tensor:
    """Multiplies ``values [..., O, I]`` in place by the scale of each block, without a copy of their size."""
    columns = scale.to(values.dtype).repeat_interleave(block.columns, -1)[..., : values.shape[-1]]
    if block.rows == 1:
        return values.mul_(columns)
    whole = values.shape[-2] // block.rows
    body, rest = values.split([whole * block.rows, values.shape[-2] - whole * block.rows], -2)
    body.unflatten(-2, (whole, block.rows)).mul_(columns[..., :whole, :].unsqueeze(-2))
    rest.mul_(columns[..., whole:, :])
    return values


def _block_max(values: Tensor, block: Blocks) -> Tensor:
    """The largest of each block of non-negative ``values [..., O, I]``, ``scale_shape`` of it."""
    return _tiles(values, block).amax((-3, -1))


def _tiles(values: Tensor, block: Blocks) -> Tensor:
    """``[..., O, I]`` in blocks, ``[..., rows of blocks, rows, columns of blocks, columns]``, padded with zeros."""
    down, across = (-values.shape[-2] % block.rows, -values.shape[-1] % block.columns)
    padded = torch.nn.functional.pad(values, (0, across, 0, down)) if down or across else values
    tiles: Tensor = padded.unflatten(-1, (-1, block.columns)).unflatten(-3, (-1, block.rows))
    return tiles


# Triton: the same in one pass, for stacks of matrices [matrices, rows, columns]. The formats are told apart by their
# largest numbers.


@jit
def largest_of(x, AXIS: tl.constexpr):
    """The bits, int32, of the largest sizes of float32 ``x``: NaN is above all, which a maximum of floats may skip."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)


@jit
def scale_bits(largest, MAX: tl.constexpr):
    """The bits of ``powers(largest)``, from the bits of ``largest``; some finite power where it would be NaN."""
    if MAX == 448:
        return (tl.maximum(largest, 0x38D1B717) + (0x1FFFFF - (8 << 23))) & 0x7F800000  # at least 1e-4
    else:
        return (tl.maximum(largest, 0x01C00000) + (0x3FFFFF - (2 << 23))) & 0x7F800000  # at least 6 * 2^-126


@jit
def scale_of(largest, MAX: tl.constexpr):
    """``powers(largest)``, NaN if that is not finite, and its inverse, float32."""
    bits = scale_bits(largest, MAX)
    scale = tl.where(largest < 0x7F800000, bits.to(tl.float32, bitcast=True), float("nan"))
    return scale, (0x7F000000 - bits).to(tl.float32, bitcast=True)


@jit
def nearest_to(scaled, MAX: tl.constexpr):
    """``nearest``."""
    below = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    steps = tl.maximum(below, 0.015625) * 1572864.0 if MAX == 448 else tl.maximum(below, 1.0) * 6291456.0
    return (scaled + steps) - steps


@jit
def scale_byte(bits, largest):
    """E8M0 of ``scale_bits``, uint8; NaN where ``largest`` is not finite."""
    return tl.where(largest < 0x7F800000, bits >> 23, 255).to(tl.uint8)


@jit
def code_of(scaled, finite):
    """E4M3 codes, uint8, of float32 within 448; NaN where not ``finite``."""
    return tl.where(finite, e4m3_code(scaled), 0x7F).to(tl.uint8)


@jit
def _blocks_kernel(x, out, codes, scales, rows, columns, BLOCK: tl.constexpr):
    """A block of 128 x 128, to codes and a scale, or dequantised."""
    across = tl.cdiv(columns, BLOCK)
    down = tl.program_id(0) // across
    row = down * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(largest_of(value, 1), 0)
    scale, inverse = scale_of(largest, 448)
    if out is not None:
        tl.store(out + at, cast(nearest_to(value * inverse, 448) * scale, out.dtype.element_ty), mask=inside)
    else:
        tl.store(codes + at, code_of(value * inverse, largest < 0x7F800000), mask=inside)
        place = tl.program_id(1) * (across * tl.cdiv(rows, BLOCK)) + tl.program_id(0)
        tl.store(scales + place, scale_byte(scale_bits(largest, 448), largest))


@jit
def _pack_kernel(x, codes, scales, rows, columns, ROWS: tl.constexpr, MANY: tl.constexpr):
    """MANY groups of 32 of ROWS rows to packed FP4; ``columns`` are even."""
    tiles = tl.cdiv(columns, MANY * 32)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % tiles * MANY + tl.arange(0, MANY)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    value = tl.load(x + row[:, None, None] * columns + column[None, :, :], mask=inside, other=0.0).to(tl.float32)
    largest = largest_of(value, 2)
    _, inverse = scale_of(largest, 6)
    code = e2m1_code(value * inverse[:, :, None])
    low, high = tl.split(tl.reshape(code, (ROWS, MANY, 16, 2)))
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (row < rows)[:, None, None] & (byte < columns // 2)[None, :, :]
    tl.store(codes + row[:, None, None] * (columns // 2) + byte[None, :, :], low | (high << 4), mask=inside)
    groups = tl.cdiv(columns, 32)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(scales + row[:, None] * groups + group[None, :], scale_byte(scale_bits(largest, 6), largest), mask=inside)


@jit
def _scale_value(stored):
    """float32 of scales in E8M0, uint8, or in float32."""
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.int32)
        bits = tl.where(bits == 0, 0x400000, bits << 23)  # 2^-127 is subnormal
        return tl.where(stored == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    else:
        return stored


@jit
def _dequantize_blocks_kernel(codes, scales, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows, a part of BLOCK, of one column of blocks."""
    across = tl.cdiv(columns, BLOCK)
    first = tl.program_id(0) // across * ROWS
    place = first // BLOCK * across + tl.program_id(0) % across
    scale = _scale_value(tl.load(scales + tl.program_id(1).to(tl.int64) * (tl.cdiv(rows, BLOCK) * across) + place))
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    code = tl.load(codes + at, mask=inside, other=0)
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), e4m3_value(code))
    tl.store(out + at, cast(value * scale, out.dtype.element_ty), mask=inside)


@jit
def _unpacked(packed):
    """E2M1 codes ``[ROWS, MANY, 32]`` of bytes ``[ROWS, MANY, 16]``."""
    pairs = tl.join(packed & 15, packed >> 4)
    return tl.reshape(pairs, (packed.shape[0], packed.shape[1], 32))


@jit
def _dequantize_groups_kernel(codes, scales, out, rows, columns, ROWS: tl.constexpr, MANY: tl.constexpr):
    """MANY groups of 32 of ROWS rows from packed FP4."""
    tiles = tl.cdiv(columns, MANY * 32)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % tiles * MANY + tl.arange(0, MANY)
    groups = tl.cdiv(columns, 32)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    scale = _scale_value(tl.load(scales + row[:, None] * groups + group[None, :], mask=inside))
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (row < rows)[:, None, None] & (byte < columns // 2)[None, :, :]
    packed = tl.load(codes + row[:, None, None] * (columns // 2) + byte[None, :, :], mask=inside, other=0)
    value = e2m1_value(_unpacked(packed)) * scale[:, :, None]
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    tl.store(out + row[:, None, None] * columns + column[None, :, :], cast(value, out.dtype.element_ty), mask=inside)


@jit
def _rescale_kernel(packed, scales, codes, coarse, lossless, rows, columns, BLOCK: tl.constexpr):
    """A block of 128 x 128 from FP4 to FP8."""
    across, groups = tl.cdiv(columns, BLOCK), tl.cdiv(columns, 32)
    row = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1).to(tl.int64) * rows + row
    group = tl.program_id(0) % across * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    fine = tl.load(scales + start[:, None] * groups + group[None, :], mask=inside, other=0).to(tl.int32)
    largest = tl.max(tl.max(fine, 1), 0)
    whole = tl.where(largest == 255, 255, tl.maximum(largest - 6, 0))
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (row < rows)[:, None, None] & (byte < columns // 2)[None, :, :]
    pairs = tl.load(packed + start[:, None, None] * (columns // 2) + byte[None, :, :], mask=inside, other=0)
    # At most 2^6; below 2^-30 nothing is left in any case.
    exact = e2m1_value(_unpacked(pairs)) * power_of_two(tl.maximum(fine - whole, -30))[:, :, None]
    code = code_of(exact, whole < 255)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    tl.store(codes + start[:, None, None] * columns + column[None, :, :], code, mask=inside)
    lost = tl.max(tl.max(tl.max((e4m3_value(code) != exact).to(tl.int32), 2), 1), 0)
    place = tl.program_id(1) * (across * tl.cdiv(rows, BLOCK)) + tl.program_id(0)
    tl.store(coarse + place, whole.to(tl.uint8))
    tl.store(lossless + place, ((lost == 0) & (whole < 255)).to(tl.uint8))


def _grid_of_blocks(shape: tuple[int, ...], rows: int = FP8_BLOCK) -> tuple[int, int]:
    """Programs for parts of so many rows and 128 columns, those of a matrix and the matrices of a stack."""
    *stack, height, width = shape
    return triton.cdiv(height, rows) * triton.cdiv(width, FP8_BLOCK), math.prod(stack)


def blocks_on_device(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Codes and scales in blocks of 128 x 128, both uint8, or with ``dtype`` the rounded values alone."""
    weight, (rows, columns) = weight.contiguous(), weight.shape[-2:]
    out = codes = scales = None
    if dtype is None:
        codes = weight.new_empty(weight.shape, dtype=torch.uint8)
        scales = codes.new_empty(scale_shape(weight.shape, Blocks(FP8_BLOCK, FP8_BLOCK)))
    else:
        out = weight.new_empty(weight.shape, dtype=dtype)
    grid = _grid_of_blocks(weight.shape)
    _blocks_kernel[grid](weight, out, codes, scales, rows, columns, BLOCK=FP8_BLOCK, num_warps=8)
    return tuple(made for made in (out, codes, scales) if made is not None)


def _pack_on_device(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight, columns = weight.contiguous(), weight.shape[-1]
    rows = weight.numel() // columns
    codes = weight.new_empty(*weight.shape[:-1], columns // 2, dtype=torch.uint8)
    scales = codes.new_empty(scale_shape(weight.shape, Blocks(1, FP4_GROUP)))
    grid = (triton.cdiv(rows, 32) * triton.cdiv(columns, 128),)
    _pack_kernel[grid](weight, codes, scales, rows, columns, ROWS=32, MANY=4)
    return codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)


def _dequantize_on_device(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    fp4 = codes.dtype == torch.int8
    codes, scale = codes.contiguous().view(torch.uint8), _plain(scale)
    *stack, rows, width = codes.shape
    columns = 2 * width if fp4 else width
    out = codes.new_empty(*stack, rows, columns, dtype=dtype)
    if fp4:
        tall = out.numel() // columns
        tiles = triton.cdiv(tall, 32) * triton.cdiv(columns, FP8_BLOCK)
        _dequantize_groups_kernel[(tiles,)](codes, scale, out, tall, columns, ROWS=32, MANY=4)
    else:
        grid = _grid_of_blocks(out.shape, 32)
        _dequantize_blocks_kernel[grid](codes, scale, out, rows, columns, ROWS=32, BLOCK=FP8_BLOCK)
    return out


def _rescale_on_device(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed, scale = packed.contiguous().view(torch.uint8), scale.to(torch.float8_e8m0fnu).contiguous()
    *stack, rows, width = packed.shape
    codes = packed.new_empty(*stack, rows, 2 * width)
    shape = scale_shape(codes.shape, Blocks(FP8_BLOCK, FP8_BLOCK))
    coarse, lossless = packed.new_empty(shape), packed.new_empty(shape)
    _rescale_kernel[_grid_of_blocks(codes.shape)](
        packed, scale.view(torch.uint8), codes, coarse, lossless, rows, 2 * width, BLOCK=FP8_BLOCK, num_warps=8
    )
    return codes.view(torch.float8_e4m3fn), coarse.view(torch.float8_e8m0fnu), lossless.view(torch.bool)


def _plain(scale: Tensor) -> Tensor:
    """As a kernel reads it: E8M0 as bytes."""
    scale = scale.contiguous()
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale.float()
