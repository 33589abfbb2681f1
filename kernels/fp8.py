"""FP8 products as V3 and V4 train with: E4M3, activations in groups of 1 x 128, weights in blocks of 128 x 128.

A value is rounded to code times scale, the scale 2^ceil(log2(largest / 448)) of its group, its largest at least 1e-4
(recipe 8.1). Code times scale has a significand of 4 bits, so bfloat16 and float32 hold it: what is called *rounded* here
is dequantised, and products of rounded values with float32 sums are the products of FP8 tensor cores, exactly. Where a
group holds something that is not finite, it becomes NaN as a whole, and the trainer skips the step.

Shapes: I input features, O output features, G groups of a grouped product, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .numerics import cast, e4m3_code, e4m3_value, power_of_two, scale_exponent
from .quantize import FP8_BLOCK, FP8_FLOOR

# Elements that are rounded at once on a CPU: what is made on the way stays in the cache.
CPU_ELEMENTS = 2**16


def round_rows(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """``x [..., I]`` rounded in groups along its last dimension, in its dtype; the last group may be short."""
    if not x.numel():
        return x
    if implementation(x) == "triton":
        return _round_on_device(x, group, transposed=False)
    rows = x.reshape(-1, x.shape[-1])
    return _by_chunks(rows, lambda part: _rounded(part, (1, group)), rows.shape[-1], 1).view(x.shape)


def round_columns(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """``x [..., M, I]`` rounded in groups along dim -2, in its dtype: operands of a weight's gradient."""
    if not x.numel():
        return x
    if implementation(x) == "triton":
        return _round_on_device(x, group, transposed=True)
    return torch.stack([_columns(matrix, group) for matrix in x.reshape(-1, *x.shape[-2:])]).view(x.shape)


def _columns(matrix: Tensor, group: int) -> Tensor:
    return _by_chunks(matrix, lambda part: _rounded(part, (group, 1)), matrix.shape[-1], group)


@torch.no_grad()
def round_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [..., O, I]`` rounded in blocks of 128 x 128, in ``dtype``."""
    if not weight.numel():
        return weight.to(dtype)
    if implementation(weight) == "triton":
        return _round_blocks_on_device(weight, dtype)
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    flat = rounded.view(-1, *weight.shape[-2:])
    for matrix, out in zip(weight.reshape(flat.shape), flat, strict=True):
        size = _whole(FP8_BLOCK, matrix.shape[-1])
        for part, place in zip(matrix.split(size), out.split(size), strict=True):
            place.copy_(_rounded(part, (FP8_BLOCK, FP8_BLOCK)))
    return rounded


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
            to_weight = torch.bmm(left.mT.float(), right.float()).flatten(0, 1).to(ctx.dtype)
        return to_x, to_weight, None, None


def fake_quantize_kv(x: Tensor, rotary: int, group: int = 64) -> Tensor:
    """Keys/values ``[..., C]`` as an FP8 cache holds them: all but the last ``rotary`` channels rounded in groups of 64.

    The gradient passes unchanged. Source: recipe 2.1 and 2.2 (rounding to E4M3, which early copies of the official code
    left out; recipe 8.1).
    """
    result: Tensor = _FakeKV.apply(x, rotary, group)
    return result


class _FakeKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotary: int, group: int) -> Tensor:
        still, turned = x.split([x.shape[-1] - rotary, rotary], -1)
        return torch.cat((round_rows(still, group), turned), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None


def fp8_counts(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """Of ``round_rows(x)``: elements on the largest code, elements that were not zero and are, all; float32 ``[3]``."""
    return _counts(x.reshape(-1, x.shape[-1]), (1, group))


def fp8_weight_counts(weight: Tensor) -> Tensor:
    """The same of ``round_weight``, of one matrix ``[O, I]``."""
    return _counts(weight, (FP8_BLOCK, FP8_BLOCK))


@torch.no_grad()
def _counts(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    codes = _codes(_blocks(matrix, block))[0].float().abs()
    vanished = (codes == 0).sum() - (_blocks(matrix, block) == 0).sum()
    return torch.stack(((codes == 448).sum(), vanished, vanished.new_tensor(matrix.numel()))).float()


def _by_chunks(matrix: Tensor, function: Callable[[Tensor], Tensor], width: int, unit: int) -> Tensor:
    """``function`` of some rows of ``[M, I]`` at a time, whole groups of ``unit`` rows, joined."""
    if matrix.numel() <= 2 * CPU_ELEMENTS or matrix.device.type != "cpu":
        return function(matrix)
    return torch.cat([function(part) for part in matrix.split(_whole(unit, width))])


def _whole(unit: int, width: int) -> int:
    """About as many rows of that width as are rounded at once, whole units."""
    return max(1, CPU_ELEMENTS // (width * unit)) * unit


def _rounded(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """``[M, I]`` rounded in blocks of so many rows and columns, in its dtype."""
    codes, scale = _codes(_blocks(matrix, block))
    values = codes.float().mul_(scale).flatten(-2).flatten(-3, -2)
    return values[: matrix.shape[0], : matrix.shape[1]].to(matrix.dtype)


def _blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """``[M, I]`` as float32 ``[rows of blocks, rows, columns of blocks, columns]``, padded with zeros."""
    down, across = -matrix.shape[0] % block[0], -matrix.shape[1] % block[1]
    wide = matrix.float()
    padded = F.pad(wide, (0, across, 0, down)) if down or across else wide
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of ``_blocks``, and the scales, which broadcast over them; NaN where a block is not finite."""
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp_(min=FP8_FLOOR)
    # ceil(log2(largest / 448)) from the bits of a float32: 448 is 1.75 * 2^8, so a larger significand than 1.75 carries
    # into the exponent. Both powers of two are exact, and so are the products.
    exponent = largest.view(torch.int32).add(0x1FFFFF).bitwise_right_shift_(23).sub_(8)  # biased by 127
    scale = exponent.bitwise_left_shift(23).view(torch.float32)
    inverse = exponent.neg_().add_(254).bitwise_left_shift_(23).view(torch.float32)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (blocks * inverse).to(torch.float8_e4m3fn), scale


# Triton: the same, one pass.


@jit
def _round_kernel(x, out, rows, columns, stride, GROUP: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """ROWS rows of one group of columns each: ``[rows, columns]``, rows ``stride`` apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WHOLE)
    column = tl.program_id(1) * GROUP + lane
    inside = (row < rows)[:, None] & ((lane < GROUP) & (column < columns))[None, :]
    at = row[:, None] * stride + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 1), 1e-4)
    exponent = scale_exponent(largest, 448)[:, None]
    rounded = e4m3_value(e4m3_code(value * power_of_two(-exponent))) * power_of_two(exponent)
    # tl.max may pass over a NaN, so each value is asked.
    broken = tl.max(1 - (tl.abs(value) < float("inf")).to(tl.int32), 1)[:, None]
    rounded = tl.where(broken != 0, float("nan"), rounded)
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)


@jit
def _round_columns_kernel(x, out, rows, columns, GROUP: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """One group of rows of COLUMNS columns, of one matrix of a stack ``[matrices, rows, columns]``."""
    lane = tl.arange(0, WHOLE)
    row = tl.program_id(0).to(tl.int64) * GROUP + lane
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = ((lane < GROUP) & (row < rows))[:, None] & (column < columns)[None, :]
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 0), 1e-4)
    exponent = scale_exponent(largest, 448)[None, :]
    rounded = e4m3_value(e4m3_code(value * power_of_two(-exponent))) * power_of_two(exponent)
    broken = tl.max(1 - (tl.abs(value) < float("inf")).to(tl.int32), 0)[None, :]
    rounded = tl.where(broken != 0, float("nan"), rounded)
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)


@jit
def _round_blocks_kernel(x, out, rows, columns, BLOCK: tl.constexpr):
    """One block of one matrix of a stack ``[matrices, rows, columns]``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-4)
    exponent = scale_exponent(largest, 448)
    rounded = e4m3_value(e4m3_code(value * power_of_two(-exponent))) * power_of_two(exponent)
    broken = tl.max(tl.max(1 - (tl.abs(value) < float("inf")).to(tl.int32), 1), 0)
    rounded = tl.where(broken != 0, float("nan"), rounded)
    tl.store(out + at, cast(rounded, out.dtype.element_ty), mask=inside)


def _round_on_device(x: Tensor, group: int, transposed: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    whole = triton.next_power_of_2(group)
    rows, columns = x.shape[-2] if x.dim() > 1 else 1, x.shape[-1]
    if transposed:
        wide = 64
        grid = (triton.cdiv(rows, group), triton.cdiv(columns, wide), x.numel() // (rows * columns))
        _round_columns_kernel[grid](x, out, rows, columns, GROUP=group, WHOLE=whole, COLUMNS=wide)
        return out
    rows = x.numel() // columns
    tall = max(1, 4096 // whole)
    grid = (triton.cdiv(rows, tall), triton.cdiv(columns, group))
    _round_kernel[grid](x, out, rows, columns, columns, GROUP=group, ROWS=tall, WHOLE=whole)
    return out


def _round_blocks_on_device(weight: Tensor, dtype: torch.dtype) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, columns = weight.shape[-2:]
    grid = (triton.cdiv(rows, FP8_BLOCK), triton.cdiv(columns, FP8_BLOCK), weight.numel() // (rows * columns))
    _round_blocks_kernel[grid](weight, out, rows, columns, BLOCK=FP8_BLOCK, num_warps=8)
    return out
