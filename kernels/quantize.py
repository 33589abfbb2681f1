"""The released low-precision formats: FP8 E4M3 in blocks of 128 x 128, FP4 E2M1 in groups of 32, power-of-two scales.

A quantised matrix is a pair (codes, scale) that stands for codes times scale, the scale of each block spread over it:

    FP8   codes [..., O, I] float8_e4m3fn           scale [..., ceil(O / 128), ceil(I / 128)]
    FP4   codes [..., O, I / 2] int8, packed         scale [..., O, ceil(I / 32)]

Two consecutive FP4 numbers of a row share a byte, the first in its low half. Scales are E8M0 (an exponent and nothing
else) or float32 holding powers of two. Shapes: O output features, I input features. Source: recipe 8.1 to 8.3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

FP8_BLOCK, FP4_GROUP = 128, 32
FP8_MAX, FP4_MAX = 448.0, 6.0

_ELEMENTS = 2**16

# Below these a block's largest value does not lower its scale any more.
FP8_FLOOR, FP4_FLOOR = 1e-4, 6 * 2.0**-126


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
    block = block_of(codes)
    if codes.dtype == torch.int8:
        return _times(_fp4_bits(codes).to(dtype).mul_(64), scale.float(), block)
    return _times(codes.to(dtype), scale.float(), block)


def quantize_fp8(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP8 codes and E8M0 scales of ``weight [..., O, I]``: scale = 2^ceil(log2(amax / 448)), amax at least 1e-4.

    Args:
        scale: of an earlier quantisation. A block keeps it where it represents the values no worse (by the sum of
            squared errors) than the rule's own would: exactly, if they did not change.
    """
    return _quantize(weight, scale, Blocks(FP8_BLOCK, FP8_BLOCK), FP8_MAX, FP8_FLOOR)


def quantize_fp4(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed FP4 codes and E8M0 scales of ``weight [..., O, I]``, I even: scale = 2^ceil(log2(amax / 6)).

    Args:
        scale: as for ``quantize_fp8``.

    Raises:
        ValueError: I is odd.
    """
    if weight.shape[-1] % 2:
        raise ValueError(f"FP4 packs two input features in a byte; {weight.shape[-1]} cannot be packed")
    return _quantize(weight, scale, Blocks(1, FP4_GROUP), FP4_MAX, FP4_FLOOR)


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 in groups of 32 as FP8 in blocks of 128 x 128, and where that lost nothing.

    The scale of a block is that of its largest group over 2^6 (6 * 2^6 = 384 fits E4M3). A group's numbers are then
    multiplied by 2^k, k <= 6; down to k = -5 they stay normal numbers: every block whose group scales differ by at most
    2^11 is exact (recipe 8.2). Outside, subnormals carry some values further, and others are rounded.

    Returns:
        FP8 codes, their E8M0 scales, and whether every value of a block survived: bool of the scales' shape.
    """
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


def _quantize(
    weight: Tensor, kept: Tensor | None, block: Blocks, largest: float, floor: float
) -> tuple[Tensor, Tensor]:
    # So many rows at a time: rounding takes several copies in float32 on the way.
    size = max(1, _ELEMENTS // max(FP8_BLOCK * weight.shape[-1], 1)) * FP8_BLOCK
    parts = weight.detach().split(size, -2)
    scales = [None] * len(parts) if kept is None else kept.split(size // block.rows, -2)
    rounded = [_round(part, scale, block, largest, floor) for part, scale in zip(parts, scales, strict=True)]
    codes, scale = (torch.cat(column, -2) for column in zip(*rounded, strict=True))
    return codes, scale


def _round(weight: Tensor, kept: Tensor | None, block: Blocks, largest: float, floor: float) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    # In float64 the quotient is exact enough to tell 448 from the next float32 above it.
    mantissa, exponent = torch.frexp(_block_max(wide.abs(), block).double().clamp_(min=floor) / largest)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    scale = scale.clamp_(2.0**-127, 2.0**127).float()
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
