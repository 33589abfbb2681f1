"""FP4 quantization-aware training: what routed experts' weights and the indexer's queries and keys are rounded to.

E2M1 (0, 1/2, 1, 1 1/2, 2, 3, 4, 6 and their negatives) in groups of 32 of a row, with the scale 2^ceil(log2(largest / 6)).
A weight goes on to FP8 in blocks of 128 x 128, whose scale is that of the block's largest group over 2^6: where the scales
of a block lie within 2^14 of each other FP8 holds the same values, and then FP8 products are those of FP4 weights
(recipe 8.2). Rounded values are dequantised, as in ``kernels.fp8``; a group with something that is not finite is NaN.

Shapes: O output features, I input features, J index dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .fp8 import CPU_ELEMENTS
from .numerics import cast, e2m1_code, e2m1_value, e4m3_code, e4m3_value, power_of_two, scale_exponent
from .quantize import FP4_FLOOR, FP4_GROUP, FP8_BLOCK, FP8_MAX


@torch.no_grad()
def fp4_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight [..., O, I]`` rounded to FP4 and held in FP8.

    Returns:
        the values that FP8 holds, in ``dtype``, and how many blocks of 128 x 128 do not hold FP4's (0-dim int64).
    """
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not weight.numel():
        return rounded, torch.zeros((), dtype=torch.long, device=weight.device)
    if implementation(weight) == "triton":
        return _weight_on_device(weight, rounded)
    flat = rounded.view(-1, *weight.shape[-2:])
    size = max(1, CPU_ELEMENTS // (FP8_BLOCK * weight.shape[-1])) * FP8_BLOCK
    inexact = torch.zeros((), dtype=torch.long, device=weight.device)
    for matrix, out in zip(weight.reshape(flat.shape), flat, strict=True):
        for part, place in zip(matrix.split(size), out.split(size), strict=True):
            groups, scale = _grouped(part)
            _round(groups, scale)
            inexact += _hold_in_fp8(groups, scale, part.shape[1])
            place.copy_(groups.flatten(-2)[:, : part.shape[1]])
    return rounded, inexact


def fake_quantize_fp4(x: Tensor) -> Tensor:
    """``x [..., J]`` rounded in groups of 32, in its dtype; the gradient passes unchanged."""
    result: Tensor = _FakeQuantize.apply(x)
    return result


def rotate(x: Tensor) -> Tensor:
    """The Hadamard transform of ``x [..., J]`` over its last dimension, orthonormal, hence its own inverse (recipe 2.3).

    Raises:
        ValueError: J is no power of two.
    """
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise ValueError(f"the Hadamard rotation needs a power of two, not {size} (index_head_dim)")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    step = 1
    while step < size:
        low, high = wide.unflatten(-1, (-1, 2, step)).unbind(-2)
        wide = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    return (wide * size**-0.5).to(x.dtype)


def index_operand(x: Tensor) -> Tensor:
    """Queries or keys ``[..., J]`` of the indexer as they enter FP4 scores: rotated, then rounded (recipe 2.3)."""
    if x.numel() and implementation(x) == "triton":
        result: Tensor = _IndexOperand.apply(x)
        return result
    return fake_quantize_fp4(rotate(x))


@torch.no_grad()
def fp4_counts(x: Tensor) -> Tensor:
    """Elements of ``x [..., J]`` on the largest code, those that were not zero and are, and all; float32 ``[3]``."""
    groups, scale = _grouped(x.reshape(-1, x.shape[-1]))
    zeros = (groups == 0).sum()
    codes = _round(groups, torch.where(scale.isnan(), scale, 1.0), _inverse(scale)).abs()
    vanished = (codes == 0).sum() - zeros
    return torch.stack(((codes == 6).sum(), vanished, vanished.new_tensor(x.numel()))).float()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not x.numel():
            return x.clone()
        if implementation(x) == "triton":
            return _operand_on_device(x, rotated=False)
        groups, scale = _grouped(x.reshape(-1, x.shape[-1]))
        return _round(groups, scale).flatten(-2)[:, : x.shape[-1]].to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _IndexOperand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _operand_on_device(x, rotated=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return rotate(gradient)


def _grouped(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, I]`` as fresh float32 groups ``[M, groups, 32]``, padded with zeros, and their scales ``[M, groups, 1]``."""
    groups = F.pad(matrix.float(), (0, -matrix.shape[1] % FP4_GROUP))
    groups = (groups.clone() if groups.data_ptr() == matrix.data_ptr() else groups).unflatten(1, (-1, FP4_GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_(min=FP4_FLOOR)
    # ceil(log2(largest / 6)) from the bits: 6 is 1.5 * 2^2, a larger significand than 1.5 carries into the exponent.
    exponent = largest.view(torch.int32).add(0x3FFFFF).bitwise_right_shift_(23).sub_(2)  # biased by 127
    scale = exponent.bitwise_left_shift_(23).view(torch.float32)
    return groups, torch.where(largest.isfinite(), scale, torch.nan)


def _inverse(scale: Tensor) -> Tensor:
    """Of a power of two, exactly, 2^-126 to 2^126."""
    return (254 - (scale.view(torch.int32) >> 23)).bitwise_left_shift_(23).view(torch.float32)


def _round(groups: Tensor, scale: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Rounds in place to E2M1's numbers times ``scale``."""
    groups.mul_(_inverse(scale) if inverse is None else inverse)
    # E2M1 steps by half the power of two below a number, and by 1/2 below 1. Added to a float32 of 1.5 * 2^23 steps a
    # number is rounded to whole steps, ties to even ones, which are even codes.
    magic = groups.abs().clamp_(min=1.0)
    magic.view(torch.int32).bitwise_and_(0x7F800000)
    magic.mul_(1.5 * 2**22)
    return groups.add_(magic).sub_(magic).mul_(scale)


def _hold_in_fp8(groups: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Makes of FP4 values ``[M, groups, 32]``, in place, what FP8 holds of them; blocks that this changed."""
    rows, count = groups.shape[:2]
    down, across = -rows % FP8_BLOCK, -count % (FP8_BLOCK // FP4_GROUP)
    tiles = F.pad(scale.squeeze(-1), (0, across, 0, down))  # zeros are never the largest scale
    tiles = tiles.unflatten(1, (-1, FP8_BLOCK // FP4_GROUP)).unflatten(0, (-1, FP8_BLOCK))
    coarse = tiles.amax((1, 3), keepdim=True)
    # E4M3 has 2^-9 as its smallest step, E2M1 half a scale: down to 2^-8 of 64 scales of the largest group all is exact.
    within = (tiles >= coarse * 2.0**-14) | (tiles == 0)
    if groups.device.type == "cpu" and bool(within.all()):
        return torch.zeros((), dtype=torch.long)
    fp8 = (coarse / 64).expand_as(tiles).flatten(2).flatten(0, 1)[:rows, :count].unsqueeze(-1)
    held = (groups / fp8).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float().mul_(fp8)
    changed = F.pad((held != groups).any(-1) & scale.isfinite().squeeze(-1), (0, across, 0, down))
    changed = changed.unflatten(1, (-1, FP8_BLOCK // FP4_GROUP)).unflatten(0, (-1, FP8_BLOCK)).any(3).any(1)
    groups.copy_(held)
    return changed.sum()


# Triton: the same, one pass.


@jit
def _fp4_weight_kernel(x, out, inexact, rows, columns, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """One block of 128 x 128 of one matrix of a stack ``[matrices, rows, columns]``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group, lane = tl.arange(0, BLOCK // GROUP), tl.arange(0, GROUP)
    column = tl.program_id(1) * BLOCK + group[:, None] * GROUP + lane[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None, None] * columns + column[None, :, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 2), 7.052966104933725e-38)  # 6 * 2^-126
    exponent = scale_exponent(largest, 6)
    broken = tl.max(1 - (tl.abs(value) < float("inf")).to(tl.int32), 2)
    exists = tl.max(inside.to(tl.int32), 2)
    whole = tl.max(tl.max(tl.where((exists == 1) & (broken == 0), exponent, -1000), 1), 0)
    code = e2m1_value(e2m1_code(value * power_of_two(-exponent)[:, :, None]))
    # FP8's scale is 2^(whole - 6); between the two scales lie at most 6 powers of two upwards, and where more than 30 lie
    # downwards FP8 has 0 in any case.
    shift = tl.maximum(exponent - whole + 6, -30)
    held = e4m3_value(e4m3_code(code * power_of_two(shift)[:, :, None]))
    lost = tl.where((broken == 0)[:, :, None], (held != code * power_of_two(shift)[:, :, None]).to(tl.int32), 0)
    rounded = _scaled(held, whole - 6)
    rounded = tl.where((broken != 0)[:, :, None], float("nan"), rounded)
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(inexact + place, tl.max(tl.max(tl.max(lost, 2), 1), 0))


@jit
def _scaled(x, exponent):
    """``x`` times 2^exponent, from -132 on, in two exact steps."""
    upper = tl.maximum(exponent, -126)
    return x * power_of_two(exponent - upper) * power_of_two(upper)


@jit
def _operand_kernel(x, out, rows, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr):
    """ROWS rows of ``[rows, COLUMNS]``, rotated or not, rounded in groups of 32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    at = row[:, None] * COLUMNS + column[None, :]
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        value = _hadamard(value, ROWS, SIZE)
        value = cast(value, x.dtype.element_ty).to(tl.float32)
    if SIZE > 32:
        groups = tl.reshape(value, (ROWS, SIZE // 32, 32))
        rounded = tl.reshape(_round_groups(groups, 2), (ROWS, SIZE))
    else:
        rounded = _round_groups(value, 1)
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)


@jit
def _round_groups(groups, AXIS: tl.constexpr):
    largest = tl.maximum(tl.max(tl.abs(groups), AXIS, keep_dims=True), 7.052966104933725e-38)
    exponent = scale_exponent(largest, 6)
    rounded = e2m1_value(e2m1_code(groups * power_of_two(-exponent))) * power_of_two(exponent)
    broken = tl.max(1 - (tl.abs(groups) < float("inf")).to(tl.int32), AXIS, keep_dims=True)
    return tl.where(broken != 0, float("nan"), rounded)


@jit
def _hadamard(value, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Butterflies of float32 ``[ROWS, SIZE]``, in the order of ``rotate``, which makes the sums equal to the bit."""
    if SIZE > 1:
        for level in tl.static_range(0, 12):
            if (1 << level) < SIZE:
                pairs = tl.reshape(value, (ROWS, SIZE // (2 << level), 2, 1 << level))
                low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
                joined = tl.join(low + high, low - high)
                value = tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (ROWS, SIZE))
    return value * (1.0 / tl.sqrt(SIZE * 1.0))


def _weight_on_device(weight: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape[-2:]
    grid = (triton.cdiv(rows, FP8_BLOCK), triton.cdiv(columns, FP8_BLOCK), weight.numel() // (rows * columns))
    inexact = torch.empty(math.prod(grid), dtype=torch.int32, device=weight.device)
    _fp4_weight_kernel[grid](
        weight.contiguous(), rounded, inexact, rows, columns, BLOCK=FP8_BLOCK, GROUP=FP4_GROUP, num_warps=8
    )
    return rounded, inexact.sum()


def _operand_on_device(x: Tensor, rotated: bool) -> Tensor:
    size = x.shape[-1]
    if rotated and size & (size - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two, not {size} (index_head_dim)")
    x = x.contiguous()
    out = torch.empty_like(x)
    whole = triton.next_power_of_2(size)
    many = max(1, 4096 // whole)
    rows = x.numel() // size
    _operand_kernel[(triton.cdiv(rows, many),)](x, out, rows, SIZE=whole, COLUMNS=size, ROWS=many, ROTATED=rotated)
    return out
