"""Root-mean-square normalisation, with or without a learned weight; also with its result in FP8 beside it.

Shapes: D row, G groups of 128 in a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton

GROUP = 128  # numbers of a row that share an FP8 scale
FP8_MAX, FP8_FLOOR = 448.0, 1e-4

# Numbers that the programs of a kernel hold at a time, which each sum a part of a weight's gradient: 2^13 on each
# multiprocessor of an H100. A constant, so that sums have the same order on every device.
HELD = 132 * 2**13


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged where it is already as precise (float64 in tests)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times ``weight`` if given.

    Args:
        x: ``[..., D]``, any float dtype; computed in at least float32, returned in the dtype of ``x``.
        weight: ``[D]`` or None (DeepSeek-V4 normalises query heads and mHC inputs without a weight).
    """
    chosen = implementation(x) if weight is None else implementation(x, weight)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps)
    normed: Tensor = _TritonRMSNorm.apply(x, weight, eps) if chosen == "triton" else _RMSNorm.apply(x, weight, eps)
    return normed


def rms_norm_fp8(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm`` and, for a product in FP8 that follows, its result quantised in groups of 1 x 128 (recipe 8.1).

    Returns:
        the normed ``[..., D]``, through which alone gradients flow; its codes ``[..., D]`` float8_e4m3fn, NaN where it
        is NaN; and their scales ``[..., G]`` float8_e8m0fnu: 2^ceil(log2(amax / 448)), amax at least 1e-4.
    """
    chosen = implementation(x) if weight is None else implementation(x, weight)
    if chosen == "triton":
        quantized: tuple[Tensor, Tensor, Tensor] = _TritonRMSNormFP8.apply(x, weight, eps)
        return quantized
    normed = rms_norm(x, weight, eps)
    return normed, *_quantize(normed.detach())


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``rms_norm`` as its formula."""
    wide = at_least_fp32(x)
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed if weight is None else normed * weight).to(x.dtype)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x [..., D]``."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    # In float64 the quotient is exact enough to tell 448 from the next float32 above it.
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True).double().clamp_(min=FP8_FLOOR) / FP8_MAX)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype)).float()
    codes = (groups / scale).flatten(-2)[..., : x.shape[-1]].to(torch.float8_e4m3fn)
    return codes.contiguous(), scale.squeeze(-1).to(torch.float8_e8m0fnu)


class _RMSNorm(torch.autograd.Function):
    """Saves the input and one number a row; autograd would keep the normalised input as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        factor = (square / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        normed: Tensor = wide * factor
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        wide, upper = at_least_fp32(x), at_least_fp32(gradient)
        normed = wide * factor
        to_weight = None
        if weight is not None:
            to_weight = (upper * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
            upper = upper * weight
        # y = x f with f = (mean(x^2) + eps)^-1/2: dx = f (dy - y mean(dy y)).
        along = (upper * normed).mean(-1, keepdim=True)
        return normed.mul_(-along).add_(upper).mul_(factor).to(x.dtype), to_weight, None


@jit
def rms_factor(x, columns, eps):
    """(mean(x^2) + eps)^-1/2 of each row of ``x [ROWS, BLOCK]`` float32, which is 0 beyond ``columns``."""
    return tl.rsqrt(tl.sum(x * x, 1) / columns + eps)


@jit
def rms_slope(normed, upper, factor, columns):
    """The gradient of x from ``upper``, that of ``normed`` = x times its row's ``factor``; see ``_RMSNorm``."""
    along = tl.sum(upper * normed, 1) / columns
    return (upper - normed * along[:, None]) * factor[:, None]


@jit
def _rms_norm_kernel(
    x, weight, out, factors, codes, scales, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    GROUP: tl.constexpr = 128
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = rms_factor(wide, columns, eps)
    tl.store(factors + row, factor, mask=row < rows)
    normed = wide * factor[:, None]
    if weight is not None:
        normed *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    rounded = numerics.cast(normed, out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    if codes is not None:
        grouped = tl.reshape(rounded.to(tl.float32), [ROWS, BLOCK // GROUP, GROUP])
        largest = tl.maximum(tl.max(tl.abs(grouped), 2), 1e-4)
        exponent = numerics.scale_exponent(largest, 448)
        code = numerics.e4m3_code(grouped * numerics.power_of_two(-exponent)[:, :, None])
        code = tl.where(grouped == grouped, code, 0x7F)
        tl.store(codes + at, tl.reshape(code, [ROWS, BLOCK]), mask=inside)
        group, groups = tl.arange(0, BLOCK // GROUP), tl.cdiv(columns, GROUP)
        inside = (row < rows)[:, None] & (group < groups)[None, :]
        tl.store(
            scales + row[:, None].to(tl.int64) * groups + group[None, :], (exponent + 127).to(tl.uint8), mask=inside
        )


@jit
def _rms_norm_backward_kernel(
    x, weight, factors, gradient, to_x, to_weight, rows, columns, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """``to_weight`` gets a row of sums from each program."""
    column = tl.arange(0, BLOCK)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.float32)
    # Longer rows fetched ahead would not fit into shared memory.
    STAGES: tl.constexpr = 3 if BLOCK <= 8192 else 1
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        factor = tl.load(factors + row, mask=row < rows, other=0.0)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        upper = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            total += upper * normed
            upper *= scale
        slope = rms_slope(normed, upper, factor, columns)
        tl.store(to_x + at, numerics.cast(slope, to_x.dtype.element_ty), mask=inside)
    if weight is not None:
        at = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to_weight + at, tl.sum(total, 0), mask=column < columns)


def row_tile(columns: int, least: int = 1) -> dict[str, int]:
    """How kernels that need whole rows are launched: 16 numbers for each thread, short rows several at a time."""
    block = max(triton.next_power_of_2(columns), least)
    rows = max(2048 // block, 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 1), 32)}


def row_programs(rows: int, tile: dict[str, int]) -> tuple[int, int]:
    """Tiles that the rows are cut into, and programs that share them."""
    tiles = triton.cdiv(rows, tile["ROWS"])
    return tiles, min(tiles, max(HELD // (tile["ROWS"] * tile["BLOCK"]), 1))


def _forward(x: Tensor, weight: Tensor | None, eps: float, quantize: bool) -> tuple[Tensor, ...]:
    """Result, one factor a row and, if asked for, codes and scales."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    out, factors = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    codes = scales = None
    if quantize:
        codes = torch.empty_like(x, dtype=torch.uint8)
        scales = codes.new_empty(*x.shape[:-1], -(-columns // GROUP))
    tile = row_tile(columns, GROUP if quantize else 1)
    grid = (triton.cdiv(rows, tile["ROWS"]),)
    _rms_norm_kernel[grid](x, weight, out, factors, codes, scales, rows, columns, eps, **tile)
    if codes is None or scales is None:
        return out, factors
    return out, factors, codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def _backward(saved: tuple[Tensor, Tensor | None, Tensor], gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, factors = saved
    columns = x.shape[-1]
    to_x, tile = torch.empty_like(x), row_tile(columns)
    tiles, programs = row_programs(len(factors), tile)
    parts = None if weight is None else x.new_empty(programs, columns, dtype=torch.float32)
    arguments = x, weight, factors, gradient.contiguous(), to_x, parts, len(factors), columns, tiles
    _rms_norm_backward_kernel[(programs,)](*arguments, **tile)
    return to_x, None if weight is None or parts is None else parts.sum(0).to(weight.dtype), None


class _TritonRMSNorm(torch.autograd.Function):
    """Saves what ``_RMSNorm`` saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        out, factors = _forward(x, weight, eps, quantize=False)
        ctx.save_for_backward(x, weight, factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx.saved_tensors, gradient)


class _TritonRMSNormFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        x = x.contiguous()
        out, factors, codes, scales = _forward(x, weight, eps, quantize=True)
        ctx.save_for_backward(x, weight, factors)
        ctx.mark_non_differentiable(codes, scales)
        return out, codes, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx.saved_tensors, gradient)
