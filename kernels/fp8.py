"""FP8 products as V3 and V4 train with: E4M3, activations in groups of 1 x 128, weights in blocks of 128 x 128.

A value is rounded to code times scale, the scale 2^ceil(log2(largest / 448)) of its group, its largest at least 1e-4
(recipe 8.1). Code times scale has a significand of 4 bits, so bfloat16 and float32 hold it: what is called *rounded*
here is dequantised, and products of rounded values with float32 sums are the products of FP8 tensor cores, exactly.
Where a group holds something that is not finite, it becomes NaN as a whole, and the trainer skips the step.

Shapes: I input features, O output features, G groups of a grouped product, M tokens, F hidden of a SwiGLU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .numerics import cast
from .quantize import (
    E4M3,
    FP8_BLOCK,
    Grid,
    blocks_on_device,
    code_of,
    largest_of,
    nearest,
    nearest_to,
    powers,
    scale_bits,
    scale_byte,
    scale_of,
)
from .swiglu import clamped, clamped_swiglu, silu

# Elements that are rounded at once on a CPU: few enough for the cache, many enough that the dozen small operations do
# not count (measured from 2^15 to 2^20).
CPU_ELEMENTS = 2**18


def round_rows(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """``x [..., I]`` rounded in groups along its last dimension, in its dtype; the last group may be short.

    Like all roundings here it has no gradient: autograd functions call it.
    """
    if not x.numel():
        return x
    if implementation(x) == "triton":
        return rows_on_device(x, E4M3, group)
    return round_matrix(x.reshape(-1, x.shape[-1]), (1, group), E4M3).view(x.shape)


def round_columns(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """``x [..., M, I]`` rounded in groups along dim -2, in its dtype: operands of a weight's gradient."""
    if not x.numel():
        return x
    if implementation(x) == "triton":
        return _columns_on_device(x, group)
    return _each(x, (group, 1), x.dtype)


@torch.no_grad()
def round_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [..., O, I]`` rounded in blocks of 128 x 128, in ``dtype``."""
    if not weight.numel():
        return weight.to(dtype)
    if implementation(weight) == "triton":
        (rounded,) = blocks_on_device(weight, dtype)
        return rounded
    return _each(weight, (FP8_BLOCK, FP8_BLOCK), dtype)


@torch.no_grad()
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``round_rows`` as codes ``[..., I]`` float8_e4m3fn and scales ``[..., ceil(I / 128)]`` float8_e8m0fnu."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = codes.new_empty(*x.shape[:-1], -(-x.shape[-1] // FP8_BLOCK))
    if not x.numel():
        return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    if implementation(x) == "triton":
        _rows_launch(x.contiguous(), E4M3, FP8_BLOCK, x.shape[-1], codes=codes, scales=scales)
        return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    matrix = x.reshape(-1, x.shape[-1])
    values, scale = scaled(matrix, (1, FP8_BLOCK), E4M3)
    fp8 = as_matrix(values, matrix.shape).to(torch.float8_e4m3fn)
    return fp8.reshape(x.shape), scale.reshape(scales.shape).to(torch.float8_e8m0fnu)


@torch.no_grad()
def swiglu_fp8(gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """``clamped_swiglu`` of ``[..., F]``, in the dtype of ``gate``, and its ``quantize_rows`` (recipe 3 and 8.1).

    Returns:
        hidden ``[..., F]``, its codes and their scales.
    """
    if gate.numel() and implementation(gate, up) == "triton":
        return _swiglu_on_device(gate, up, limit)
    hidden = clamped_swiglu(gate, up, limit, gate.dtype)
    return hidden, *quantize_rows(hidden)


def fp8_linear(x: Tensor, weight: Tensor, rounded: Tensor, groups: int = 1) -> Tensor:
    """``x [..., I]`` times ``weight [O, I]``, ``[..., O]``, each of the three products of training in FP8.

    Forward: rows of x and the rounded weight. Gradient of x: rows of the output's gradient and the same rounded weight.
    Gradient of the weight, float32, which passes its rounding unchanged: both operands rounded in groups of 128 tokens.
    So V3 describes it, and Transformer Engine's block scaling does it (recipe 8.1, 8.2).

    Args:
        rounded: the weight's values in the dtype of ``x``, as ``round_weight`` makes them; it gets no gradient.
        groups: with G > 1, ``x [..., G, I]`` to ``[..., G, O / G]``, the rows of ``weight`` group by group.
    """
    result: Tensor = _FP8Linear.apply(x, weight, rounded, groups)
    return result


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, rounded)
        ctx.groups, ctx.dtype = groups, weight.dtype
        if groups == 1:
            return F.linear(round_rows(x), rounded)
        return torch.einsum("...gi,goi->...go", round_rows(x), rounded.unflatten(0, (groups, -1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded = ctx.saved_tensors
        matrices = rounded.unflatten(0, (ctx.groups, -1))  # [G, O / G, I]
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            upper = round_rows(gradient)
            if ctx.groups == 1:
                to_x = upper @ rounded
            else:
                to_x = torch.einsum("...go,goi->...gi", upper, matrices)
        if ctx.needs_input_grad[1]:
            left, right = (
                round_columns(t.reshape(-1, ctx.groups, t.shape[-1]).transpose(0, 1).contiguous())
                for t in (gradient, x)
            )
            to_weight = _wide_product(left.mT, right).flatten(0, 1).to(ctx.dtype)
        return to_x, to_weight, None, None


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Of stacks of matrices, the sums in float32 and returned so."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def fake_quantize_kv(x: Tensor, rotary: int, group: int = 64) -> Tensor:
    """Keys/values ``[..., C]`` as an FP8 cache holds them: all but ``rotary`` last channels rounded in groups of 64.

    The gradient passes unchanged. Source: recipe 2.1 and 2.2 (rounding to E4M3, which early copies of the official code
    left out; recipe 8.1).
    """
    result: Tensor = _FakeKV.apply(x, rotary, group)
    return result


class _FakeKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotary: int, group: int) -> Tensor:
        still = x.shape[-1] - rotary
        if x.numel() and implementation(x) == "triton":
            return rows_on_device(x, E4M3, group, still)
        return torch.cat((round_rows(x[..., :still], group), x[..., still:]), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None


def fp8_counts(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """Of ``round_rows(x)``: elements on the largest code, elements that were not zero and are, all; float32 ``[3]``."""
    return count(x.reshape(-1, x.shape[-1]), (1, group), E4M3)


def fp8_weight_counts(weight: Tensor) -> Tensor:
    """The same of ``round_weight``, of one matrix ``[O, I]``."""
    return count(weight, (FP8_BLOCK, FP8_BLOCK), E4M3)


# What roundings to FP8 and to FP4 share: matrices [M, I] in blocks of so many rows and columns.


@torch.no_grad()
def count(matrix: Tensor, block: tuple[int, int], grid: Grid) -> Tensor:
    """Of a rounding: elements on the largest code, elements that were not zero and are, all; float32 ``[3]``."""
    codes, _ = on_grid(matrix, block, grid)
    sizes = as_matrix(codes, matrix.shape).abs()
    saturated, vanished = (sizes == grid.largest).sum(), ((sizes == 0) & (matrix != 0)).sum()
    return torch.stack((saturated, vanished, torch.full_like(vanished, matrix.numel()))).float()


def _each(matrices: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``round_matrix`` of each matrix of a stack ``[..., M, I]``."""
    out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    shape = (-1, *matrices.shape[-2:])
    for matrix, place in zip(matrices.reshape(shape), out.view(shape), strict=True):
        round_matrix(matrix, block, E4M3, place)
    return out


@torch.no_grad()
def round_matrix(matrix: Tensor, block: tuple[int, int], grid: Grid, out: Tensor | None = None) -> Tensor:
    """``[M, I]`` rounded, into ``out`` or in its dtype."""
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device) if out is None else out
    for part, place in zip(parts(matrix, block), parts(out, block), strict=True):
        dequantize_into(place, *on_grid(part, block, grid), block)
    return out


def parts(matrix: Tensor, block: tuple[int, int]) -> Iterator[Tensor]:
    """Whole blocks of ``matrix`` that are rounded at once: all of it, but on a CPU what fits into the cache."""
    if matrix.device.type != "cpu":
        yield matrix
        return
    columns = max(block[1], CPU_ELEMENTS // (block[0] * block[1]) * block[1])
    rows = max(1, CPU_ELEMENTS // (block[0] * min(columns, matrix.shape[1]))) * block[0]
    for band in matrix.split(rows):
        yield from band.split(columns, 1)


def on_grid(part: Tensor, block: tuple[int, int], grid: Grid) -> tuple[Tensor, Tensor]:
    """Numbers of the grid, float32, that stand for ``in_blocks(part)``, and the scales, which broadcast over them."""
    values, scale = scaled(part, block, grid)
    return nearest(values, grid), scale


def scaled(part: Tensor, block: tuple[int, int], grid: Grid) -> tuple[Tensor, Tensor]:
    """``on_grid`` before it rounds: divided by powers of two, hence exact."""
    blocks = in_blocks(part.float(), block)
    sizes = blocks.abs()
    largest = sizes.amax((1, 3), keepdim=True) if 1 in block else sizes.amax(3, keepdim=True).amax(1, keepdim=True)
    scale = powers(largest, grid)
    return blocks * scale.reciprocal(), scale


def dequantize_into(place: Tensor, values: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """What ``on_grid`` returns, multiplied, as the matrix ``place``; overwrites it."""
    if values.numel() == place.numel():
        torch.mul(values, scale, out=in_blocks(place, block))
    else:
        place.copy_(as_matrix(values.mul_(scale), place.shape))


def in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """As ``[rows of blocks, rows, columns of blocks, columns]``; a view, unless it must be padded with zeros."""
    down, across = -matrix.shape[0] % block[0], -matrix.shape[1] % block[1]
    padded = F.pad(matrix, (0, across, 0, down)) if down or across else matrix
    rows, columns = padded.shape
    return padded.view(rows // block[0], block[0], columns // block[1], block[1])


def as_matrix(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``in_blocks``."""
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


# Triton: the same, one pass.


@jit
def _round_kernel(
    x, out, codes, scales, rows, columns, still,
    MAX: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """MANY groups of ROWS rows of ``[rows, columns]``, to codes and scales, or dequantised; columns from ``still`` on
    stay as they are. WHOLE is the power of two from GROUP on."""
    tiles = tl.cdiv(columns, GROUP * MANY)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, lane = tl.program_id(0) % tiles * MANY + tl.arange(0, MANY), tl.arange(0, WHOLE)
    column = group[:, None] * GROUP + lane[None, :]
    inside = (row < rows)[:, None, None] & ((lane < GROUP)[None, :] & (column < columns))[None, :, :]
    at = row[:, None, None] * columns + column[None, :, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    moved = (column < still)[None, :, :]
    largest = largest_of(tl.where(moved, value, 0.0), 2)
    scale, inverse = scale_of(largest, MAX)
    scaled = value * inverse[:, :, None]
    if out is not None:
        rounded = tl.where(moved, nearest_to(scaled, MAX) * scale[:, :, None], value)
        tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)
    else:
        tl.store(codes + at, code_of(scaled, (largest < 0x7F800000)[:, :, None]), mask=inside)
        groups = tl.cdiv(columns, GROUP)
        inside = (row < rows)[:, None] & (group < groups)[None, :]
        byte = scale_byte(scale_bits(largest, MAX), largest)
        tl.store(scales + row[:, None] * groups + group[None, :], byte, mask=inside)


@jit
def _round_columns_kernel(x, out, rows, columns, GROUP: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """One group of rows of COLUMNS columns, of one matrix of a stack ``[matrices, rows, columns]``."""
    tiles = tl.cdiv(columns, COLUMNS)
    lane = tl.arange(0, WHOLE)
    row = tl.program_id(0) // tiles * GROUP + lane
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = ((lane < GROUP) & (row < rows))[:, None] & (column < columns)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest_of(value, 0), 448)
    rounded = nearest_to(value * inverse[None, :], 448) * scale[None, :]
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)


@jit
def _swiglu_kernel(gate, up, hidden, codes, scales, rows, columns, limit, CLAMP: tl.constexpr, ROWS: tl.constexpr):
    """One group of 128 of ROWS rows."""
    groups = tl.cdiv(columns, 128)
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % groups
    column = group * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    a = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    a, b = clamped(a, b, limit, CLAMP)
    made = cast(silu(a) * b, hidden.dtype.element_ty)
    tl.store(hidden + at, made, mask=inside)
    value = made.to(tl.float32)
    largest = largest_of(value, 1)
    bits = scale_bits(largest, 448)
    _, inverse = scale_of(largest, 448)
    tl.store(codes + at, code_of(value * inverse[:, None], (largest < 0x7F800000)[:, None]), mask=inside)
    tl.store(scales + row * groups + group, scale_byte(bits, largest), mask=row < rows)


def rows_on_device(x: Tensor, grid: Grid, group: int, still: int | None = None) -> Tensor:
    """``x [..., I]`` rounded in groups along its last dimension, but for what follows its first ``still`` channels."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _rows_launch(x, grid, group, x.shape[-1] if still is None else still, out=out)
    return out


def _rows_launch(
    x: Tensor,
    grid: Grid,
    group: int,
    still: int,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    columns, whole = x.shape[-1], triton.next_power_of_2(group)
    rows = x.numel() // columns
    many = max(1, min(FP8_BLOCK, triton.next_power_of_2(columns)) // whole)
    tall = max(1, 4096 // (whole * many))
    programs = triton.cdiv(rows, tall) * triton.cdiv(columns, group * many)
    _round_kernel[(programs,)](
        x,
        out,
        codes,
        scales,
        rows,
        columns,
        still,
        MAX=int(grid.largest),
        GROUP=group,
        WHOLE=whole,
        MANY=many,
        ROWS=tall,
    )


def _columns_on_device(x: Tensor, group: int) -> Tensor:
    x, (rows, columns) = x.contiguous(), x.shape[-2:]
    out, wide = torch.empty_like(x), 64
    grid = (triton.cdiv(rows, group) * triton.cdiv(columns, wide), x.numel() // (rows * columns))
    _round_columns_kernel[grid](x, out, rows, columns, GROUP=group, WHOLE=triton.next_power_of_2(group), COLUMNS=wide)
    return out


def _swiglu_on_device(gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    columns = gate.shape[-1]
    rows, groups = gate.numel() // columns, triton.cdiv(columns, FP8_BLOCK)
    hidden = torch.empty_like(gate)
    codes = torch.empty_like(gate, dtype=torch.uint8)
    scales = codes.new_empty(*gate.shape[:-1], groups)
    _swiglu_kernel[(triton.cdiv(rows, 16) * groups,)](
        gate, up, hidden, codes, scales, rows, columns, float(limit), CLAMP=limit > 0, ROWS=16
    )
    return hidden, codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
