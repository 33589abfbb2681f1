"""Rotary position embedding: interleaved pairs on the last dimensions of a head, YaRN frequencies, inverse rotation.

Shapes: B batch, T tokens, C channels of a head, R rotated pairs. A table is (cos, sin), each ``[B, T, R]`` float32.
Source: recipe 2.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton
from .norm import at_least_fp32, rms_factor, rms_norm, rms_slope, row_programs, row_tile


def rope_frequencies(
    dim: int, theta: float, factor: float = 1.0, original: int = 65536, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """Angular frequency of each rotated pair, radians per token, ``[dim / 2]`` float64.

    With ``factor`` > 1, YaRN: pairs that turn more than ``beta_fast`` times within ``original`` tokens keep their
    frequency, those that turn less than ``beta_slow`` times are slowed by ``factor``, the ones between are blended.
    DeepSeek-V4 applies no attention scaling (mscale) with it. Source: official inference code; recipe 2.1.
    """
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pair / dim)
    if factor == 1.0:
        return frequency

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), dim - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp


def rope_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[..., dim / 2]`` float32 of integer ``positions [...]``.

    The angle is formed in float64: at a million tokens a float32 product is off by a hundredth of a radian.
    """
    angle = positions.to(torch.float64).unsqueeze(-1) * frequencies.to(positions.device)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], inverse: bool = False) -> Tensor:
    """Rotates the last 2R channels of ``x [B, T, ..., C]``; ``table`` is (cos, sin), each ``[B, T, R]``.

    Channels (2i, 2i+1) of that tail are the complex number that is turned. ``inverse`` turns backwards, as
    DeepSeek-V4 does to the output of attention, whose values carry the rotation of their keys.
    """
    chosen = implementation(x)
    if chosen == "triton":
        rotated: Tensor = _TritonRope.apply(x, *table, inverse)
        return rotated
    if chosen == "reference":
        return apply_rope_reference(x, table, inverse)
    cos, sin = table
    still, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    wide = at_least_fp32(turned).contiguous()
    turn = torch.complex(cos, -sin if inverse else sin).to(wide.dtype.to_complex())
    turn = turn.view(*cos.shape[:2], *(1,) * (x.dim() - 3), cos.shape[-1])
    turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), -1)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: tuple[Tensor, Tensor]) -> Tensor:
    """``apply_rope(rms_norm(x, weight, eps), table)`` of ``x [B, T, ..., C]``, in the dtype of ``x``.

    In Triton it is one pass over the data, which rounds once, at the end.
    """
    if (implementation(x) if weight is None else implementation(x, weight)) == "triton":
        result: Tensor = _TritonNormRope.apply(x, weight, eps, *table)
        return result
    return apply_rope(rms_norm(x, weight, eps), table)


def apply_rope_reference(x: Tensor, table: tuple[Tensor, Tensor], inverse: bool = False) -> Tensor:
    """``apply_rope`` in real numbers: (a, b) becomes (a cos - b sin, a sin + b cos)."""
    cos, sin = (part.view(*part.shape[:2], *(1,) * (x.dim() - 3), part.shape[-1]) for part in table)
    sin = -sin if inverse else sin
    still, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    a, b = at_least_fp32(turned).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), -1)


@jit
def turn(x, cos, sin, token, live, still, pairs, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates rows of ``x [ROWS, BLOCK]`` float32, the ``pairs`` after the first ``still``, as the table has it for
    ``token [ROWS]``; ``live [ROWS]`` says which rows there are."""
    pair = tl.arange(0, BLOCK // 2) - still
    at = token[:, None] * pairs + pair[None, :]
    turned = live[:, None] & ((pair >= 0) & (pair < pairs))[None, :]
    c, s = tl.load(cos + at, mask=turned, other=0.0), tl.load(sin + at, mask=turned, other=0.0)
    if INVERSE:
        s = -s
    a, b = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    both = tl.join(tl.where(turned, a * c - b * s, a), tl.where(turned, a * s + b * c, b))
    return tl.reshape(both, [ROWS, BLOCK])


@jit
def _rope_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    columns,
    still,
    pairs,
    SHIFT: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK) - SHIFT
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & ((column >= 0) & (column < columns))[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    turned = turn(wide, cos, sin, row // heads, row < rows, still, pairs, INVERSE, ROWS, BLOCK)
    tl.store(out + at, numerics.cast(turned, out.dtype.element_ty), mask=inside)


@jit
def _norm_rope_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    factors,
    rows,
    heads,
    columns,
    still,
    pairs,
    eps,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK) - SHIFT
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    exists = (column >= 0) & (column < columns)
    inside = (row < rows)[:, None] & exists[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = rms_factor(wide, columns, eps)
    tl.store(factors + row, factor, mask=row < rows)
    normed = wide * factor[:, None]
    if weight is not None:
        normed *= tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    turned = turn(normed, cos, sin, row // heads, row < rows, still, pairs, False, ROWS, BLOCK)
    tl.store(out + at, numerics.cast(turned, out.dtype.element_ty), mask=inside)


@jit
def _norm_rope_backward_kernel(
    x,
    weight,
    cos,
    sin,
    factors,
    gradient,
    to_x,
    to_weight,
    rows,
    heads,
    columns,
    still,
    pairs,
    tiles,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``to_weight`` gets a row of sums from each program."""
    column = tl.arange(0, BLOCK) - SHIFT
    exists = (column >= 0) & (column < columns)
    if weight is not None:
        scale = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=3):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < rows)[:, None] & exists[None, :]
        factor = tl.load(factors + row, mask=row < rows, other=0.0)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        upper = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        upper = turn(upper, cos, sin, row // heads, row < rows, still, pairs, True, ROWS, BLOCK)
        if weight is not None:
            total += upper * normed
            upper *= scale
        slope = rms_slope(normed, upper, factor, columns)
        tl.store(to_x + at, numerics.cast(slope, to_x.dtype.element_ty), mask=inside)
    if weight is not None:
        at = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(to_weight + at, tl.sum(total, 0), mask=exists)


def rope_tile(columns: int, pairs: int) -> tuple[int, dict[str, int]]:
    """Pairs of a tile before the first that turns, and how a kernel that calls ``turn`` is launched: its tiles begin
    a column before the rows where these have an odd length, so that they consist of pairs."""
    shift = columns % 2
    return (columns + shift) // 2 - pairs, {"SHIFT": shift, **row_tile(columns + shift, 2)}


def _like(x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The table with a row for each token of ``x``."""
    return tuple(part.expand(*x.shape[:2], -1).contiguous() for part in table)


def _sizes(x: Tensor, pairs: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Rows, rows of a token, columns, pairs of a tile that stand still, pairs that turn; and the tile."""
    columns = x.shape[-1]
    still, tile = rope_tile(columns, pairs)
    return (x.numel() // columns, math.prod(x.shape[2:-1]), columns, still, pairs), tile


class _TritonRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        table = _like(x, (cos, sin))
        ctx.save_for_backward(*table)
        ctx.inverse = inverse
        return _TritonRope.turned(x, table, inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _TritonRope.turned(gradient, ctx.saved_tensors, not ctx.inverse), None, None, None

    @staticmethod
    def turned(x: Tensor, table: tuple[Tensor, ...], inverse: bool) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        sizes, tile = _sizes(x, table[0].shape[-1])
        _rope_kernel[(triton.cdiv(sizes[0], tile["ROWS"]),)](x, *table, out, *sizes, INVERSE=inverse, **tile)
        return out


class _TritonNormRope(torch.autograd.Function):
    """Saves the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        x, table = x.contiguous(), _like(x, (cos, sin))
        sizes, tile = _sizes(x, cos.shape[-1])
        out, factors = torch.empty_like(x), x.new_empty(sizes[0], dtype=torch.float32)
        grid = (triton.cdiv(sizes[0], tile["ROWS"]),)
        _norm_rope_kernel[grid](x, weight, *table, out, factors, *sizes, eps, **tile)
        ctx.save_for_backward(x, weight, factors, *table)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors, *table = ctx.saved_tensors
        sizes, tile = _sizes(x, table[0].shape[-1])
        tiles, programs = row_programs(len(factors), tile)
        to_x = torch.empty_like(x)
        parts = None if weight is None else x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        arguments = x, weight, *table, factors, gradient.contiguous(), to_x, parts, *sizes, tiles
        _norm_rope_backward_kernel[(programs,)](*arguments, **tile)
        to_weight = None if weight is None or parts is None else parts.sum(0).to(weight.dtype)
        return to_x, to_weight, None, None, None
