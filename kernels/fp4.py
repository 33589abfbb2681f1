"""FP4 quantization-aware training: what routed experts' weights and the indexer's queries and keys are rounded to.

E2M1 (0, 1/2, 1, 1 1/2, 2, 3, 4, 6 and their negatives) in groups of 32 of a row, with the scale
2^ceil(log2(largest / 6)). A weight goes on to FP8 in blocks of 128 x 128, whose scale is that of the block's largest
group over 2^6: where the scales of a block lie within 2^14 of each other FP8 holds the same values, and then FP8
products are those of FP4 weights (recipe 8.2). Rounded values are dequantised, as in ``kernels.fp8``; a group with
something that is not finite is NaN.

Shapes: O output features, I input features, J index dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import INTERPRETED, implementation, jit, tl, triton
from .fp8 import CPU_ELEMENTS, as_matrix, count, dequantize_into, on_grid, parts, round_matrix, rows_on_device
from .numerics import cast
from .quantize import E2M1, E4M3, FP4_GROUP, FP8_BLOCK, largest_of, nearest, nearest_to, scale_bits, scale_of

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@torch.no_grad()
def fp4_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight [..., O, I]`` rounded to FP4 and held in FP8.

    Returns:
        the values that FP8 holds, in ``dtype``, and how many blocks of 128 x 128 do not hold FP4's (0-dim int64).
    """
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    inexact = torch.zeros((), dtype=torch.long, device=weight.device)
    if not weight.numel():
        return rounded, inexact
    if implementation(weight) == "triton":
        return rounded, _weight_on_device(weight, rounded)
    flat = rounded.view(-1, *weight.shape[-2:])
    block = (FP8_BLOCK, FP8_BLOCK)
    for matrix, out in zip(weight.reshape(flat.shape), flat, strict=True):
        for part, place in zip(parts(matrix, block), parts(out, block), strict=True):
            values, scale = on_grid(part, (1, FP4_GROUP), E2M1)
            # FP8's scale is 2^-6 of the largest; as E4M3 steps by 2^-9 and E2M1 by half a scale, 2^-8 of that will do.
            # To ask whether all groups are like that costs little on a CPU; elsewhere the host would wait for it.
            if part.device.type == "cpu" and bool(scale.max() <= scale.min() * 2.0**14):
                dequantize_into(place, values, scale, (1, FP4_GROUP))
            else:
                values.mul_(scale)  # [M, 1, groups, 32]
                inexact += _hold_in_fp8(values.squeeze(1), scale.squeeze((1, 3)))
                place.copy_(as_matrix(values, part.shape))
    return rounded, inexact


def fake_quantize_fp4(x: Tensor) -> Tensor:
    """``x [..., J]`` rounded in groups of 32, in its dtype; the gradient passes unchanged."""
    result: Tensor = _FakeQuantize.apply(x)
    return result


def rotate(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of ``x [..., J]``, its own inverse (recipe 2.3).

    Raises:
        ValueError: J is no power of two.
    """
    return _rotated(x, rounded=False)


def index_operand(x: Tensor) -> Tensor:
    """Queries or keys ``[..., J]`` of the indexer as they enter FP4 scores: rotated, then rounded (recipe 2.3).

    The gradient passes the rounding unchanged.

    Raises:
        ValueError: as ``rotate``.
    """
    return _rotated(x, rounded=True)


def fp4_counts(x: Tensor) -> Tensor:
    """Elements of ``x [..., J]`` on the largest code, those that were not zero and are, and all; float32 ``[3]``."""
    return count(x.reshape(-1, x.shape[-1]), (1, FP4_GROUP), E2M1)


def _rotated(x: Tensor, rounded: bool) -> Tensor:
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise ValueError(f"the Hadamard rotation needs a power of two, not {size} (index_head_dim)")
    result: Tensor = _Rotate.apply(x, rounded)
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: bool) -> Tensor:
        ctx.triton = x.numel() > 0 and implementation(x) == "triton"
        if ctx.triton:
            return _rotate_on_device(x, rounded)
        rotated = _butterflies(x)
        return _round_groups(rotated) if rounded else rotated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _rotate_on_device(gradient, False) if ctx.triton else _butterflies(gradient), None


def _butterflies(x: Tensor) -> Tensor:
    """Along the first dimension of a copy, where neighbours in memory are of one kind."""
    size, out = x.shape[-1], torch.empty_like(x)
    if not x.numel():
        return out
    many = max(1, CPU_ELEMENTS // size) if x.device.type == "cpu" else x.numel()
    for part, place in zip(x.reshape(-1, size).split(many), out.view(-1, size).split(many), strict=True):
        wide = part.T.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
        other, step = torch.empty_like(wide), 1
        while step < size:
            low, high = wide.unflatten(0, (-1, 2, step)).unbind(1)
            total, difference = other.unflatten(0, (-1, 2, step)).unbind(1)
            torch.add(low, high, out=total)
            torch.sub(low, high, out=difference)
            wide, other, step = other, wide, 2 * step
        place.copy_(wide.mul_(size**-0.5).T)
    return out


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.numel() and implementation(x) == "triton":
            return rows_on_device(x, E2M1, FP4_GROUP)
        return _round_groups(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _round_groups(x: Tensor) -> Tensor:
    if not x.numel():
        return x.clone()
    return round_matrix(x.reshape(-1, x.shape[-1]), (1, FP4_GROUP), E2M1).view(x.shape)


def _hold_in_fp8(groups: Tensor, scale: Tensor) -> Tensor:
    """Makes of FP4 values ``[M, groups, 32]``, in place, what FP8 holds of them; counts the blocks that this changed.

    Args:
        scale: that of each group.
    """
    rows, count = scale.shape
    down, across = -rows % FP8_BLOCK, -count % (FP8_BLOCK // FP4_GROUP)
    tiles = F.pad(scale.nan_to_num(0.0), (0, across, 0, down))  # zeros are never the largest scale
    tiles = tiles.unflatten(1, (-1, FP8_BLOCK // FP4_GROUP)).unflatten(0, (-1, FP8_BLOCK))
    coarse = tiles.amax((1, 3), keepdim=True)
    fp8 = (coarse / 64).expand_as(tiles).flatten(2).flatten(0, 1)[:rows, :count].unsqueeze(-1)
    held = nearest(groups / fp8, E4M3).mul_(fp8)
    changed: Tensor = F.pad((held != groups).any(-1) & scale.isfinite(), (0, across, 0, down))
    changed = changed.unflatten(1, (-1, FP8_BLOCK // FP4_GROUP)).unflatten(0, (-1, FP8_BLOCK)).any(3).any(1)
    groups.copy_(held)
    return changed.sum()


# Triton: the same, one pass.


@jit
def _fp4_values(x, at, inside):
    """Of ``[ROWS, groups, 32]`` at ``at`` the FP4 values, and the bits of each group's largest size."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = largest_of(value, 2)
    scale, inverse = scale_of(largest, 6)
    return nearest_to(value * inverse[:, :, None], 6) * scale[:, :, None], largest


@jit
def _fp4_weight_kernel(x, out, inexact, rows, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One block of 128 x 128 of one matrix of a stack ``[matrices, rows, columns]``, ROWS rows at a time."""
    across = tl.cdiv(columns, BLOCK)
    first, row = tl.program_id(0) // across * BLOCK, tl.arange(0, ROWS)
    group, lane = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    column = tl.program_id(0) % across * BLOCK + group[:, None] * 32 + lane[None, :]
    coarse = tl.zeros((ROWS, BLOCK // 32), tl.int32)
    finest = tl.full((ROWS, BLOCK // 32), 0x7F800000, tl.int32)
    for start in range(first, first + BLOCK, ROWS):
        inside = (start + row < rows)[:, None, None] & (column < columns)[None, :, :]
        at = (tl.program_id(1).to(tl.int64) * rows + start + row)[:, None, None] * columns + column[None, :, :]
        value, largest = _fp4_values(x, at, inside)
        tl.store(out + at, cast(value, out.dtype.element_ty), mask=inside)
        # Neither what is not finite nor groups of zeros, those outside among them, say how far scales lie apart.
        counts, bits = (largest > 0) & (largest < 0x7F800000), scale_bits(largest, 6)
        coarse = tl.maximum(coarse, tl.where(counts, bits, 0))
        finest = tl.minimum(finest, tl.where(counts, bits, 0x7F800000))
    most = tl.max(tl.max(coarse, 1), 0)
    lost = 0
    if tl.min(tl.min(finest, 1), 0) < most - (14 << 23):
        # E4M3 may not hold them all. Its scale is 2^-6 of the coarsest, so far above the finest a normal number.
        unit = most - (6 << 23)
        scale, inverse = unit.to(tl.float32, bitcast=True), (0x7F000000 - unit).to(tl.float32, bitcast=True)
        for start in range(first, first + BLOCK, ROWS):
            inside = (start + row < rows)[:, None, None] & (column < columns)[None, :, :]
            at = (tl.program_id(1).to(tl.int64) * rows + start + row)[:, None, None] * columns + column[None, :, :]
            value, largest = _fp4_values(x, at, inside)
            held = nearest_to(value * inverse, 448) * scale
            tl.store(out + at, cast(held, out.dtype.element_ty), mask=inside)
            changed = (held != value) & (largest < 0x7F800000)[:, :, None]
            lost = tl.maximum(lost, tl.max(tl.max(tl.max(changed.to(tl.int32), 2), 1), 0))
    tl.store(inexact + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), lost)


@jit
def _rotate_kernel(
    x, out, rows, scale, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, ROUNDED: tl.constexpr
):
    """ROWS rows of ``[rows, SIZE]`` times a Hadamard matrix, rounded to FP4 in groups or not."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    at = row[:, None] * SIZE + column[None, :]
    inside = (row < rows)[:, None]
    value = _hadamard(tl.load(x + at, mask=inside, other=0.0).to(tl.float32)) * scale
    rotated = cast(value, x.dtype.element_ty)
    if ROUNDED:
        groups = tl.reshape(rotated.to(tl.float32), (ROWS, SIZE // GROUP, GROUP))
        power, inverse = scale_of(largest_of(groups, 2), 6)
        rounded = nearest_to(groups * inverse[:, :, None], 6) * power[:, :, None]
        rotated = cast(tl.reshape(rounded, (ROWS, SIZE)), x.dtype.element_ty)
    tl.store(out + at, rotated, mask=inside)


@jit
def _hadamard(x):
    """Butterflies of float32 ``[ROWS, SIZE]``, in the order of ``rotate``, which makes the sums equal to the bit."""
    for level in tl.static_range(0, 16):
        if (1 << level) < x.shape[1]:
            pairs = tl.reshape(x, (x.shape[0] * x.shape[1] // (2 << level), 2, 1 << level))
            bits = pairs.to(tl.int32, bitcast=True)
            # What both numbers of a pair make by exclusive or, with one of them, is the other.
            if _INTERPRETED:  # to which that reduction is 100 times as slow as a maximum
                both = tl.max(bits, 1, keep_dims=True) ^ tl.min(bits, 1, keep_dims=True)
            else:
                both = tl.xor_sum(bits, 1, keep_dims=True)
            other = (both ^ bits).to(tl.float32, bitcast=True)
            second = tl.arange(0, 2)[None, :, None] == 1
            x = tl.reshape(tl.where(second, other - pairs, pairs + other), x.shape)
    return x


def _weight_on_device(weight: Tensor, rounded: Tensor) -> Tensor:
    weight, (rows, columns) = weight.contiguous(), weight.shape[-2:]
    grid = (triton.cdiv(rows, FP8_BLOCK) * triton.cdiv(columns, FP8_BLOCK), weight.numel() // (rows * columns))
    inexact = weight.new_empty(math.prod(grid), dtype=torch.int32)
    _fp4_weight_kernel[grid](weight, rounded, inexact, rows, columns, BLOCK=FP8_BLOCK, ROWS=32)
    return inexact.sum()


def _rotate_on_device(x: Tensor, rounded: bool) -> Tensor:
    x, size = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // size
    many = max(1, 4096 // size)
    _rotate_kernel[(triton.cdiv(rows, many),)](
        x, out, rows, size**-0.5, SIZE=size, GROUP=min(size, FP4_GROUP), ROWS=many, ROUNDED=rounded
    )
    return out
