"""Routed experts in Triton: what ``kernels.moe`` computes, on a GPU, without a wait for it.

Copies of tokens are sorted by expert, by counting, and each expert's share begins at a whole tile. The products fetch
tokens by their index (but for FP8's gradients of matrices, whose operands are rounded in groups of rows) and end with
what follows them: gate and up with SwiGLU and routing weight, down's gradient with their slopes. Sums over a token's
experts, and over an expert's tokens, have one order each.

Shapes: as in ``kernels.moe``; R rows, C chunks of copies that are counted at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import numerics
from .dispatch import jit, tl, triton
from .fp8 import round_columns, round_rows
from .product import halves, product
from .quantize import FP8_BLOCK
from .swiglu import clamped, hit, silu, slopes

_Operand = tuple[Tensor, Tensor | None]  # of a product: rows, and what names them if they are tokens

NEIGHBOURS = 8  # tiles of rows that run side by side, and share what they read of an expert


@jit
def _chosen(ids, copies, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """A chunk's copies of tokens, and which expert each is for, ``[BLOCK, EXPERTS]`` of 0 and 1."""
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + copy, mask=copy < copies, other=-1)
    return copy, (chosen[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@jit
def _count_kernel(ids, counts, copies, experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    _, chosen = _chosen(ids, copies, BLOCK, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    tl.store(counts + tl.program_id(0) * experts + expert, tl.sum(chosen, 0), mask=expert < experts)


@jit
def _place_kernel(
    ids, weights, before, slot, source, scales, copies, experts, many, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """``before [C, E]``: the row of an expert's first copy in this chunk."""
    copy, chosen = _chosen(ids, copies, BLOCK, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    first = tl.load(before + tl.program_id(0) * experts + expert, mask=expert < experts, other=0)
    row = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + first[None, :]), 1)
    inside = copy < copies
    tl.store(slot + copy, row, mask=inside)
    tl.store(source + row, copy // many, mask=inside)
    tl.store(scales + row, tl.load(weights + copy, mask=inside, other=0.0).to(tl.float32), mask=inside)


@jit
def _combine_kernel(rows, slot, out, tokens, columns, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of each token's copies, the first expert first."""
    tiles = tl.cdiv(columns, BLOCK)
    token = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot + token.to(tl.int64) * K + k, mask=token < tokens, other=0).to(tl.int64)
        total += tl.load(rows + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = token[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + at, numerics.cast(total, out.dtype.element_ty), mask=inside)


@jit
def _pick_kernel(parts, slot, out, copies, rows, count, BLOCK: tl.constexpr):
    """Sum of the ``count`` parts of each copy's row."""
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slot + copy, mask=copy < copies, other=0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + row + part * rows, mask=copy < copies, other=0.0)
    tl.store(out + copy, numerics.cast(total, out.dtype.element_ty), mask=copy < copies)


@jit
def _tile_of(
    ends, experts, row_tiles, columns, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NEAR: tl.constexpr
):
    """This program's first row, its first column, and the expert that the rows belong to: ``experts`` if none.

    NEAR tiles of rows pass over all columns before the next ones do.
    """
    wide = NEAR * tl.cdiv(columns, BN)
    first = tl.program_id(0) // wide * NEAR
    near = tl.minimum(row_tiles - first, NEAR)
    top = (first + tl.program_id(0) % wide % near) * BM
    left = tl.program_id(0) % wide // near * BN
    index = tl.arange(0, EXPERTS)
    end = tl.load(ends + index, mask=index < experts, other=0)
    expert = tl.sum(((end <= top) & (index < experts)).to(tl.int32), 0)
    return top, left, expert


@jit
def _gate_up_kernel(
    x, w1, w3, source, scales, ends, gate, up, hidden, hits, tokens, width, inner, experts, row_tiles, limit,
    CLAMP: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """A tile of both projections, and of the hidden activations times the routing weight."""
    top, left, expert = _tile_of(ends, experts, row_tiles, inner, EXPERTS, BM, BN, NEAR)
    if expert < experts:
        row, column, depth = top + tl.arange(0, BM), left + tl.arange(0, BN), tl.arange(0, BK)
        token = tl.load(source + row)
        x_at = token[:, None].to(tl.int64) * width + depth[None, :]
        w_at = depth[:, None] + column[None, :] * width
        w1 += expert.to(tl.int64) * inner * width
        w3 += expert.to(tl.int64) * inner * width
        a, b = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for start in range(0, width, BK):
            inside = depth < width - start
            rows = tl.load(x + x_at, mask=(token < tokens)[:, None] & inside[None, :], other=0.0)
            within = inside[:, None] & (column < inner)[None, :]
            a = numerics.dot(rows, tl.load(w1 + w_at, mask=within, other=0.0), a)
            b = numerics.dot(rows, tl.load(w3 + w_at, mask=within, other=0.0), b)
            x_at += BK
            w_at += BK
        at = row[:, None].to(tl.int64) * inner + column[None, :]
        within = (column < inner)[None, :]
        # What follows sees what the backward pass will see.
        a, b = numerics.cast(a, gate.dtype.element_ty), numerics.cast(b, up.dtype.element_ty)
        tl.store(gate + at, a, mask=within)
        tl.store(up + at, b, mask=within)
        a, b = a.to(tl.float32), b.to(tl.float32)
        if CLAMP:
            counted = tl.where((token < tokens)[:, None] & within, hit(a, b, limit), 0)
            tl.store(hits + tl.program_id(0), tl.sum(tl.sum(counted, 1), 0))
        a, b = clamped(a, b, limit, CLAMP)
        made = silu(a) * b * tl.load(scales + row)[:, None]
        tl.store(hidden + at, numerics.cast(made, hidden.dtype.element_ty), mask=within)


@jit
def _down_kernel(
    hidden, w2, ends, down, width, inner, experts, row_tiles,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    top, left, expert = _tile_of(ends, experts, row_tiles, width, EXPERTS, BM, BN, NEAR)
    if expert < experts:
        row, column = top.to(tl.int64) + tl.arange(0, BM), left + tl.arange(0, BN)
        w = w2 + expert.to(tl.int64) * width * inner
        total = product(
            hidden, w, hidden, w, row, column, top + BM, width, 0, inner, inner, 1, 1, inner, TERMS=1, BK=BK
        )
        at = row[:, None] * width + column[None, :]
        tl.store(down + at, numerics.cast(total, down.dtype.element_ty), mask=(column < width)[None, :])


@jit
def _hidden_slopes(total, row, left, scale, gate, up, hidden, to_gate, to_up, inner, limit, CLAMP: tl.constexpr):
    """What follows ``total``, the gradient of the hidden activations; returns that of the routing weights."""
    column = left + tl.arange(0, total.shape[1])
    at, within = row[:, None].to(tl.int64) * inner + column[None, :], (column < inner)[None, :]
    a = tl.load(gate + at, mask=within, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=within, other=0.0).to(tl.float32)
    x, y = slopes(a, b, total * scale, limit, CLAMP)
    tl.store(to_gate + at, numerics.cast(x, to_gate.dtype.element_ty), mask=within)
    tl.store(to_up + at, numerics.cast(y, to_up.dtype.element_ty), mask=within)
    a, b = clamped(a, b, limit, CLAMP)
    made = silu(a) * b
    tl.store(hidden + at, numerics.cast(made * scale, hidden.dtype.element_ty), mask=within)
    return tl.sum(total * made, 1)


@jit
def _to_hidden_kernel(
    upper, w2, source, scales, ends, gate, up, hidden, to_gate, to_up, to_scales, tokens, width, inner, experts,
    row_tiles, limit,
    CLAMP: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of both projections; of the hidden activations, made again; ``to_scales`` gets a row of
    sums from each tile of columns."""
    top, left, expert = _tile_of(ends, experts, row_tiles, inner, EXPERTS, BM, BN, NEAR)
    if expert < experts:
        row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
        token = tl.load(source + row)
        w = w2 + expert.to(tl.int64) * width * inner
        total = product(
            upper, w, upper, w, token.to(tl.int64), column, tokens, inner, 0, width, width, 1, inner, 1, TERMS=1, BK=BK
        )
        scale = tl.load(scales + row)[:, None]
        first, second = halves(total)
        sums = _hidden_slopes(first, row, left, scale, gate, up, hidden, to_gate, to_up, inner, limit, CLAMP)
        left += BN // 2
        sums += _hidden_slopes(second, row, left, scale, gate, up, hidden, to_gate, to_up, inner, limit, CLAMP)
        part = (left // BN).to(tl.int64) * row_tiles * BM
        tl.store(to_scales + part + row, sums)


@jit
def _to_rows_kernel(
    to_gate, to_up, w1, w3, ends, to_rows, width, inner, experts, row_tiles,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    top, left, expert = _tile_of(ends, experts, row_tiles, width, EXPERTS, BM, BN, NEAR)
    if expert < experts:
        row, column, depth = top.to(tl.int64) + tl.arange(0, BM), left + tl.arange(0, BN), tl.arange(0, BK)
        row_at = row[:, None] * inner + depth[None, :]
        w_at = expert.to(tl.int64) * inner * width + depth[:, None] * width + column[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        # One after the other: operands of both at once, some tiles ahead, would not fit into shared memory.
        for start in range(0, inner, BK):
            inside = depth < inner - start
            a = tl.load(to_gate + row_at + start, mask=inside[None, :], other=0.0)
            within = inside[:, None] & (column < width)[None, :]
            total = numerics.dot(a, tl.load(w1 + w_at + start * width, mask=within, other=0.0), total)
        for start in range(0, inner, BK):
            inside = depth < inner - start
            a = tl.load(to_up + row_at + start, mask=inside[None, :], other=0.0)
            within = inside[:, None] & (column < width)[None, :]
            total = numerics.dot(a, tl.load(w3 + w_at + start * width, mask=within, other=0.0), total)
        at = row[:, None] * width + column[None, :]
        tl.store(to_rows + at, numerics.cast(total, to_rows.dtype.element_ty), mask=(column < width)[None, :])


@jit
def _outer_kernel(
    left, right, left_source, right_source, ends, out, tokens, height, width, column_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of the sum over an expert's rows of left^T right; operands by tokens where a source is given."""
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    row = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        index = start + tl.arange(0, BK)
        inside = index < last
        a_row, b_row, a_inside, b_inside = index, index, inside, inside
        if left_source is not None:
            a_row = tl.load(left_source + index, mask=inside, other=tokens)
            a_inside = a_row < tokens
        if right_source is not None:
            b_row = tl.load(right_source + index, mask=inside, other=tokens)
            b_inside = b_row < tokens
        a_at = a_row[None, :].to(tl.int64) * height + row[:, None]
        b_at = b_row[:, None].to(tl.int64) * width + column[None, :]
        a = tl.load(left + a_at, mask=a_inside[None, :] & (row < height)[:, None], other=0.0)
        b = tl.load(right + b_at, mask=b_inside[:, None] & (column < width)[None, :], other=0.0)
        total = numerics.dot(a, b, total)
    at = (expert.to(tl.int64) * height + row[:, None]) * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    tl.store(out + at, numerics.cast(total, out.dtype.element_ty), mask=inside)


class _Rows(NamedTuple):
    """Where the copies of tokens stand. The number of rows is bounded, not read, so that the host does not wait."""

    ends: Tensor  # [E] int32: one past each expert's last row
    source: Tensor  # [R] int32: token of each row, M for padding
    scales: Tensor  # [R] float32: its routing weight, 0 for padding
    slot: Tensor  # [M, K] int32: row of each token's copies


def _sorted_rows(ids: Tensor, weights: Tensor, experts: int, tile: int) -> _Rows:
    """A counting sort, stable: copies of one expert keep the order of their tokens."""
    (tokens, many), copies = ids.shape, ids.numel()
    whole = triton.next_power_of_2(experts)
    block = max(8192 // whole, 16)
    chunks = triton.cdiv(copies, block)
    counts = torch.empty(chunks, experts, dtype=torch.int32, device=ids.device)
    _count_kernel[(chunks,)](ids, counts, copies, experts, BLOCK=block, EXPERTS=whole)
    seen = counts.cumsum(0, dtype=torch.int32)
    padded = (seen[-1] + (tile - 1)) // tile * tile
    ends = padded.cumsum(0, dtype=torch.int32)
    before = seen - counts + (ends - padded)
    rows = (copies + min(experts, copies) * (tile - 1)) // tile * tile
    slot = torch.empty(tokens, many, dtype=torch.int32, device=ids.device)
    source = torch.full((rows,), tokens, dtype=torch.int32, device=ids.device)
    scales = torch.zeros(rows, dtype=torch.float32, device=ids.device)
    _place_kernel[(chunks,)](
        ids, weights, before, slot, source, scales, copies, experts, many, BLOCK=block, EXPERTS=whole
    )
    return _Rows(ends, source, scales, slot)


def _tile(copies: int, experts: int) -> int:
    """Rows of a tile: of experts with few tokens a lower one, half of which would be padding otherwise."""
    rows: int = triton.next_power_of_2(triton.cdiv(copies, experts))
    return min(max(rows, 16), FP8_BLOCK)


class _Shape(NamedTuple):
    """How the grouped products are launched."""

    rows: int
    tile: int
    experts: int
    wide: bool  # elements of four bytes

    def launch(self, columns: int, double: bool) -> tuple[tuple[int], int, dict[str, int]]:
        """Grid, tiles of rows, and constants, for so many columns; ``double``: of a program that holds two tiles."""
        tall, across = self.rows // self.tile, 128 if double or self.tile < 128 else 256
        constants = {
            "EXPERTS": triton.next_power_of_2(self.experts),
            "BM": self.tile,
            "BN": across,
            "BK": 32 if self.wide else 64,
            "NEAR": NEIGHBOURS,
            "num_warps": 8 if self.tile >= 64 else 4,
            "num_stages": 3,
        }
        return (tall * triton.cdiv(columns, across),), tall, constants


class TritonRoutedExperts(torch.autograd.Function):
    """Arguments as of ``kernels.moe.routed_experts``; saves the two projections. ``values``: what to multiply by in
    place of w1, w3, w2; ``fp8``: whether these are FP8's, and so are the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        limit: float,
        values: tuple[Tensor, Tensor, Tensor] | None,
        fp8: bool,
    ) -> tuple[Tensor, Tensor]:
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        (tokens, width), (experts, inner, _) = x.shape, w1.shape
        tile = FP8_BLOCK if fp8 else _tile(ids.numel(), experts)
        rows = _sorted_rows(ids, weights, experts, tile)
        shape = _Shape(len(rows.source), tile, experts, x.element_size() == 4)
        v1, v3, v2 = (w.to(x.dtype).contiguous() for w in (values or (w1, w3, w2)))
        gate, up, hidden = (x.new_empty(shape.rows, inner) for _ in range(3))
        grid, tall, constants = shape.launch(inner, double=True)
        hits = torch.zeros(grid, dtype=torch.int32, device=x.device)
        _gate_up_kernel[grid](
            round_rows(x) if fp8 else x, v1, v3, rows.source, rows.scales, rows.ends, gate, up, hidden,
            hits, tokens, width, inner, experts, tall, float(limit), CLAMP=limit > 0, **constants,
        )  # fmt: skip
        if fp8:
            hidden = round_rows(hidden)
        down = x.new_empty(shape.rows, width)
        grid, tall, constants = shape.launch(width, double=False)
        _down_kernel[grid](hidden, v2, rows.ends, down, width, inner, experts, tall, **constants)
        output = _combined(down, rows.slot, torch.float32)
        ctx.save_for_backward(x, *(values or (w1, w3, w2)), gate, up, *rows)
        ctx.shape, ctx.limit, ctx.fp8 = shape, limit, fp8
        ctx.dtypes = weights.dtype, w1.dtype, w3.dtype, w2.dtype
        share = hits.sum() / (2 * ids.numel() * inner)
        ctx.mark_non_differentiable(share)
        return output, share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w3, w2, gate, up, *rest = ctx.saved_tensors
        rows, shape, experts = _Rows(*rest), ctx.shape, ctx.shape.experts
        (tokens, width), inner = x.shape, gate.shape[1]
        v1, v3, v2 = (w.to(x.dtype).contiguous() for w in (w1, w3, w2))
        weights_dtype, *dtypes = ctx.dtypes
        upper = gradient.to(x.dtype).contiguous()

        hidden, to_gate, to_up = (torch.empty_like(gate) for _ in range(3))
        grid, tall, constants = shape.launch(inner, double=True)  # the slopes need registers as well
        to_scales = x.new_empty(grid[0] // tall, shape.rows, dtype=torch.float32)
        _to_hidden_kernel[grid](
            round_rows(upper) if ctx.fp8 else upper, v2, rows.source, rows.scales, rows.ends, gate, up, hidden,
            to_gate, to_up, to_scales, tokens, width, inner, experts, tall, float(ctx.limit),
            CLAMP=ctx.limit > 0, **constants,
        )  # fmt: skip
        to_weights, copies = x.new_empty(rows.slot.shape, dtype=weights_dtype), rows.slot.numel()
        _pick_kernel[(triton.cdiv(copies, 256),)](
            to_scales, rows.slot, to_weights, copies, shape.rows, len(to_scales), BLOCK=256
        )

        # Operands of the matrices' gradients: tokens by their index, or rounded in groups of an expert's rows.
        tokens_of: _Operand = (x, rows.source)
        upper_of: _Operand = (upper, rows.source)
        _, _, _, *learns = ctx.needs_input_grad[:6]
        outer = _Outer(rows.ends, tokens, dtypes)
        if ctx.fp8 and any(learns):
            tokens_of = round_columns(_gathered(x, rows.source)), None
            upper_of = round_columns(_gathered(upper, rows.source)), None
            hidden = round_columns(hidden)
        left_gate, left_up = ((round_columns(t) if ctx.fp8 else t, None) for t in (to_gate, to_up))
        to_w1 = outer(left_gate, tokens_of, 0) if learns[0] else None
        to_w3 = outer(left_up, tokens_of, 1) if learns[1] else None
        to_w2 = outer(upper_of, (hidden, None), 2) if learns[2] else None
        del hidden, left_gate, left_up, tokens_of, upper_of

        if not ctx.needs_input_grad[0]:
            return None, None, to_weights, to_w1, to_w3, to_w2, None, None, None
        if ctx.fp8:
            to_gate, to_up = round_rows(to_gate), round_rows(to_up)
        to_rows = x.new_empty(shape.rows, width)
        grid, tall, constants = shape.launch(width, double=False)
        _to_rows_kernel[grid](to_gate, to_up, v1, v3, rows.ends, to_rows, width, inner, experts, tall, **constants)
        to_x = _combined(to_rows, rows.slot, x.dtype)
        return to_x, None, to_weights, to_w1, to_w3, to_w2, None, None, None


class _Outer(NamedTuple):
    """Gradients of the experts' matrices."""

    ends: Tensor
    tokens: int
    dtypes: list[torch.dtype]

    def __call__(self, left: _Operand, right: _Operand, index: int) -> Tensor:
        (a, a_source), (b, b_source) = left, right
        height, width = a.shape[1], b.shape[1]
        out = a.new_empty(len(self.ends), height, width, dtype=self.dtypes[index])
        across = triton.cdiv(width, 256)
        # Where an index is read in the loop, what it leads to can be asked for only after it came.
        stages = 3 if a_source is None and b_source is None else 4
        _outer_kernel[(triton.cdiv(height, 128) * across, len(self.ends))](
            a, b, a_source, b_source, self.ends, out, self.tokens, height, width, across,
            BM=128, BN=256, BK=32 if a.element_size() == 4 else 64, STAGES=stages, num_warps=8,
        )  # fmt: skip
        return out


def _combined(rows: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, many), columns = slot.shape, rows.shape[1]
    out = rows.new_empty(tokens, columns, dtype=dtype)
    block = min(triton.next_power_of_2(columns), 1024)
    tall = max(2048 // block, 1)
    grid = (triton.cdiv(tokens, tall) * triton.cdiv(columns, block),)
    _combine_kernel[grid](rows, slot, out, tokens, columns, K=many, ROWS=tall, BLOCK=block)
    return out


def _gathered(x: Tensor, source: Tensor) -> Tensor:
    """The rows of ``x`` that ``source`` names, zeros for padding."""
    padding = source == len(x)
    return x[source.long().masked_fill(padding, 0)].masked_fill(padding.unsqueeze(1), 0.0)
