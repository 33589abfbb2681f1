"""Manifold-constrained hyper-connections in Triton; ``hyper_connection.py`` says what is computed, and calls this.

A program takes some columns of some tokens; the last of those that share tokens finds their coefficients, with
Sinkhorn's normalisation in registers, and reads the streams a second time, which its neighbours have just left in L2.
Backward a pass finds the gradients of the coefficients, and a second one all else. A float32 factor of a product with
bfloat16 streams is split into two bfloat16 numbers, 16 bits of mantissa where TF32, which recipe 4 allows, has 11.

Shapes: as in ``hyper_connection.py``; of a token: K = S D numbers in all streams, P parts that sums over columns or
tokens are made of.
"""

# mypy: disable-error-code="assignment,arg-type"
# Kernels grow tuples in unrolled loops, which have no type that Python can say.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import numerics
from .dispatch import jit, tl, triton


class Constants(NamedTuple):
    iterations: int
    eps: float
    norm_eps: float


@jit
def _halves(x):
    """float32 ``x`` as the sum of two bfloat16 numbers, to 2^-14 of it: cut off after 8 and after 16 bits."""
    bits = x.to(tl.uint32, bitcast=True)
    rest = (x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True)
    high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, (rest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def _split_kernel(x, high, low, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    upper, lower = _halves(tl.load(x + at, mask=at < count, other=0.0).to(tl.float32))
    tl.store(high + at, upper, mask=at < count)
    tl.store(low + at, lower, mask=at < count)


@jit
def _stacked(x, first, ROWS: tl.constexpr):
    """Of ``x [2 ROWS, n]``, which holds the same rows twice, the upper halves and then the lower ones."""
    high, low = _halves(x)
    return tl.where((first < ROWS)[:, None], high, low)


@jit
def _unstacked(x, ROWS: tl.constexpr):
    """Sums of the products of upper and of lower halves."""
    return tl.sum(tl.reshape(x, [2, ROWS, x.shape[1]]), 0)


@jit
def _coefficients_of(post, residual, row, rows, S: tl.constexpr):
    """C_k at k and K_jk at S j + k, each ``[ROWS]``."""
    weights, mixed = (), ()
    for k in tl.static_range(S):
        weights = weights + (tl.load(post + row * S + k, mask=row < rows, other=0.0).to(tl.float32),)
    for jk in tl.static_range(S * S):
        mixed = mixed + (tl.load(residual + row * (S * S) + jk, mask=row < rows, other=0.0).to(tl.float32),)
    return weights, mixed


@jit
def _streams_at(streams, at, inside, hidden, S: tl.constexpr):
    """``[ROWS, BLOCK]`` of each stream, float32."""
    x = ()
    for j in tl.static_range(S):
        x = x + (tl.load(streams + j * hidden + at, mask=inside, other=0.0).to(tl.float32),)
    return x


@jit
def _new_stream(x, upper, weights, mixed, inside, k: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr):
    """X'_k = C_k F + sum_j K_jk X_j (recipe 4, update), rounded to the streams' dtype."""
    new = upper * weights[k][:, None]
    for j in tl.static_range(S):
        new += x[j] * mixed[j * S + k][:, None]
    return numerics.cast(tl.where(inside, new, 0.0), DTYPE)


@jit
def _gates(projected, factor, scale, base, at, inside):
    """The normed projection, and what the sigmoid or Sinkhorn's normalisation gets."""
    normed = projected * factor
    return normed, normed * scale + tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _sinkhorn(logits, j, k, eps, S: tl.constexpr, ITERATIONS: tl.constexpr):
    """``sinkhorn`` of ``logits [ROWS, j, k]``: softmax, matrix, and what each step divided by. 0 beyond S."""
    valid = (j < S) & (k < S)
    logits = tl.where(k < S, logits, float("-inf"))
    softmax = tl.exp(logits - tl.max(logits, 2, keep_dims=True))
    softmax = softmax / tl.sum(softmax, 2, keep_dims=True)
    softmax = tl.where(valid, softmax, 0.0)
    matrix = tl.where(valid, softmax + eps, 0.0)
    from_j, from_k = tl.where(j < S, eps, 1.0), tl.where(k < S, eps, 1.0)
    totals = ()
    for step in tl.static_range(2 * ITERATIONS - 1):
        if step % 2 == 0:
            total = tl.sum(matrix, 1, keep_dims=True) + from_k
        else:
            total = tl.sum(matrix, 2, keep_dims=True) + from_j
        matrix = matrix / total
        totals = totals + (total,)
    return softmax, matrix, totals


@jit
def _sinkhorn_backward(slope, softmax, matrix, totals, ITERATIONS: tl.constexpr):
    """The gradient of the logits; the matrix before a step is the one after it times what it was divided by."""
    for back in tl.static_range(2 * ITERATIONS - 1):
        total = totals[2 * ITERATIONS - 2 - back]
        slope = (slope - tl.sum(slope * matrix, 1 + back % 2, keep_dims=True)) / total
        matrix = matrix * total
    return (slope - tl.sum(slope * softmax, 2, keep_dims=True)) * softmax


@jit
def _read_kernel(
    streams,
    output,
    post,
    residual,
    fn,
    fn_low,
    base,
    scale,
    partials,
    arrived,
    new,
    x,
    next_post,
    next_residual,
    raw,
    factors,
    rows,
    hidden,
    eps,
    norm_eps,
    S: tl.constexpr,
    S_BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Collapse y = sum_j A_j X_j with A, C, K of recipe 4; ``output`` given: of the new streams, which are written."""
    SITE: tl.constexpr = next_post is not None
    R: tl.constexpr = S * (S + 2) if SITE else S
    DTYPE: tl.constexpr = streams.dtype.element_ty
    piece, tile = tl.program_id(0), tl.program_id(1)
    local, r = tl.arange(0, ROWS), tl.arange(0, R_BLOCK)
    row = tile.to(tl.int64) * ROWS + local
    known = row < rows
    one, wide = tile.to(tl.int64) * ROWS * hidden, tile.to(tl.int64) * ROWS * (S * hidden)
    if output is not None:
        weights, mixed = _coefficients_of(post, residual, row, rows, S)
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    projected = tl.zeros([ROWS, R_BLOCK], tl.float32)
    width = tl.cdiv(tl.cdiv(hidden, SLICES), BLOCK) * BLOCK
    for start in tl.range(piece * width, tl.minimum(piece * width + width, hidden), BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        inside = known[:, None] & (column < hidden)[None, :]
        at = local[:, None] * (S * hidden) + column[None, :]
        old = _streams_at(streams + wide, at, inside, hidden, S)
        if output is not None:
            upper = tl.load(output + one + local[:, None] * hidden + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        for k in tl.static_range(S):
            if output is not None:
                value = _new_stream(old, upper, weights, mixed, inside, k, S, DTYPE)
                tl.store(new + wide + k * hidden + at, value, mask=inside)
            else:
                value = old[k].to(DTYPE)
            square += value.to(tl.float32) * value.to(tl.float32)
            of_fn = r[None, :] * (S * hidden) + k * hidden + column[:, None]
            in_fn = (r < R)[None, :] & (column < hidden)[:, None]
            matrix = tl.load(fn + of_fn, mask=in_fn, other=0.0)
            if fn_low is not None:
                projected = numerics.dot(value, tl.load(fn_low + of_fn, mask=in_fn, other=0.0), projected)
                projected = numerics.dot(value, matrix, projected)
            else:
                projected = numerics.dot(value.to(tl.float32), matrix.to(tl.float32), projected)
    # The sum of squares takes the first free column.
    part = tl.where((r == R)[None, :], tl.sum(square, 1)[:, None], projected)
    tl.store(partials + (piece * rows + row)[:, None] * R_BLOCK + r[None, :], part, mask=known[:, None])
    tl.debug_barrier()  # what all threads wrote goes before the count
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SLICES - 1:
        s = tl.arange(0, S_BLOCK)
        j, k = s[None, :, None], s[None, None, :]
        of_pre, of_post, of_residual = s[None, :], S + s[None, :], 2 * S + j * S + k
        some = (s < S)[None, :] & known[:, None]
        square_sum = tl.zeros([ROWS], tl.float32)
        pre = tl.zeros([ROWS, S_BLOCK], tl.float32)
        if SITE:
            every = (j < S) & (k < S) & known[:, None, None]
            to_post = tl.zeros([ROWS, S_BLOCK], tl.float32)
            to_residual = tl.zeros([ROWS, S_BLOCK, S_BLOCK], tl.float32)
        for p in tl.static_range(SLICES):
            mine = partials + (p * rows + row) * R_BLOCK
            square_sum += tl.load(mine + R, mask=known, other=0.0, cache_modifier=".cg")
            pre += tl.load(mine[:, None] + of_pre, mask=some, other=0.0, cache_modifier=".cg")
            if SITE:
                to_post += tl.load(mine[:, None] + of_post, mask=some, other=0.0, cache_modifier=".cg")
                to_residual += tl.load(mine[:, None, None] + of_residual, mask=every, other=0.0, cache_modifier=".cg")
        factor = tl.rsqrt(square_sum / (S * hidden) + norm_eps)
        tl.store(factors + row, factor, mask=known)
        tl.store(raw + row[:, None] * R + of_pre, pre, mask=some)
        gate = tl.load(scale).to(tl.float32)
        pre = tl.sigmoid(_gates(pre, factor[:, None], gate, base, of_pre, (s < S)[None, :])[1]) + eps
        if SITE:
            tl.store(raw + row[:, None] * R + of_post, to_post, mask=some)
            tl.store(raw + row[:, None, None] * R + of_residual, to_residual, mask=every)
            gate = tl.load(scale + 1).to(tl.float32)
            _, logits = _gates(to_post, factor[:, None], gate, base, of_post, (s < S)[None, :])
            tl.store(next_post + row[:, None] * S + of_pre, 2 * tl.sigmoid(logits), mask=some)
            gate = tl.load(scale + 2).to(tl.float32)
            _, logits = _gates(to_residual, factor[:, None, None], gate, base, of_residual, (j < S) & (k < S))
            _, matrix, _ = _sinkhorn(logits, j, k, eps, S, ITERATIONS)
            tl.store(next_residual + row[:, None, None] * (S * S) + j * S + k, matrix, mask=every)
        source = streams + wide
        if output is not None:
            source = new + wide
        weights = ()
        for n in tl.static_range(S):
            weights = weights + (tl.sum(tl.where((s == n)[None, :], pre, 0.0), 1),)
        for start in tl.range(0, hidden, BLOCK, num_stages=3):
            column = start + tl.arange(0, BLOCK)
            inside = known[:, None] & (column < hidden)[None, :]
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            for n in tl.static_range(S):
                of_stream = n * hidden + local[:, None] * (S * hidden) + column[None, :]
                value = tl.load(source + of_stream, mask=inside, other=0.0, cache_modifier=".cg")
                total += value.to(tl.float32) * weights[n][:, None]
            tl.store(
                x + one + local[:, None] * hidden + column[None, :],
                numerics.cast(total, x.dtype.element_ty),
                mask=inside,
            )


@jit
def _write_kernel(
    streams,
    output,
    post,
    residual,
    new,
    rows,
    hidden,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local, start = tl.arange(0, ROWS), tl.program_id(1).to(tl.int64) * ROWS
    row = start + local
    inside = (row < rows)[:, None] & (column < hidden)[None, :]
    at = local[:, None] * (S * hidden) + column[None, :]
    old = _streams_at(streams + start * (S * hidden), at, inside, hidden, S)
    of_output = start * hidden + local[:, None] * hidden + column[None, :]
    upper = tl.load(output + of_output, mask=inside, other=0.0).to(tl.float32)
    weights, mixed = _coefficients_of(post, residual, row, rows, S)
    for k in tl.static_range(S):
        value = _new_stream(old, upper, weights, mixed, inside, k, S, new.dtype.element_ty)
        tl.store(new + start * (S * hidden) + k * hidden + at, value, mask=inside)


@jit
def _coefficients_backward_kernel(
    streams,
    base,
    scale,
    raw,
    factors,
    x_gradient,
    post_gradient,
    residual_gradient,
    pre,
    to_raw,
    through_norm,
    parts,
    rows,
    hidden,
    eps,
    S: tl.constexpr,
    S_BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From dy the gradient of A, from those of A, C, K that of F v and of v through its norm; A once more.

    ``parts`` gets a row of sums from each program: the gradients of base, then of the scales.
    """
    SITE: tl.constexpr = post_gradient is not None
    R: tl.constexpr = S * (S + 2) if SITE else S
    COLUMNS: tl.constexpr = R + 3 if SITE else R + 1
    local, first = tl.arange(0, ROWS), tl.program_id(0).to(tl.int64) * ROWS
    row = first + local
    known, s = row < rows, tl.arange(0, S_BLOCK)
    sums = ()
    for n in tl.static_range(S):
        sums = sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
    for start in tl.range(0, hidden, BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        inside = known[:, None] & (column < hidden)[None, :]
        at = local[:, None] * hidden + column[None, :]
        upper = tl.load(x_gradient + first * hidden + at, mask=inside, other=0.0).to(tl.float32)
        at = local[:, None] * (S * hidden) + column[None, :]
        value = _streams_at(streams + first * (S * hidden), at, inside, hidden, S)
        longer = ()
        for n in tl.static_range(S):
            longer = longer + (sums[n] + value[n] * upper,)
        sums = longer
    slope = tl.zeros([ROWS, S_BLOCK], tl.float32)
    for n in tl.static_range(S):
        slope += tl.where((s == n)[None, :], tl.sum(sums[n], 1)[:, None], 0.0)
    j, k = s[None, :, None], s[None, None, :]
    of_pre, of_post, of_residual = s[None, :], S + s[None, :], 2 * S + j * S + k
    valid = s < S
    some = valid[None, :] & known[:, None]
    factor = tl.load(factors + row, mask=known, other=0.0)
    part = parts + tl.program_id(0).to(tl.int64) * COLUMNS

    gate = tl.load(scale).to(tl.float32)
    projected = tl.load(raw + row[:, None] * R + of_pre, mask=some, other=0.0)
    normed, logits = _gates(projected, factor[:, None], gate, base, of_pre, valid[None, :])
    sigmoid = tl.sigmoid(logits)
    slope *= sigmoid * (1 - sigmoid)
    tl.store(pre + row[:, None] * S + of_pre, sigmoid + eps, mask=some)
    tl.store(to_raw + row[:, None] * R + of_pre, slope * gate * factor[:, None], mask=some)
    along = tl.sum(slope * gate * projected, 1)
    tl.store(part + s, tl.sum(slope, 0), mask=valid)
    tl.store(part + R, tl.sum(slope * normed))
    if SITE:
        gate = tl.load(scale + 1).to(tl.float32)
        projected = tl.load(raw + row[:, None] * R + of_post, mask=some, other=0.0)
        normed, logits = _gates(projected, factor[:, None], gate, base, of_post, valid[None, :])
        sigmoid = tl.sigmoid(logits)
        slope = tl.load(post_gradient + row[:, None] * S + of_pre, mask=some, other=0.0).to(tl.float32)
        slope *= 2 * sigmoid * (1 - sigmoid)
        tl.store(to_raw + row[:, None] * R + of_post, slope * gate * factor[:, None], mask=some)
        along += tl.sum(slope * gate * projected, 1)
        tl.store(part + S + s, tl.sum(slope, 0), mask=valid)
        tl.store(part + R + 1, tl.sum(slope * normed))

        gate = tl.load(scale + 2).to(tl.float32)
        inside = (j < S) & (k < S)
        every = inside & known[:, None, None]
        projected = tl.load(raw + row[:, None, None] * R + of_residual, mask=every, other=0.0)
        normed, logits = _gates(projected, factor[:, None, None], gate, base, of_residual, inside)
        softmax, matrix, totals = _sinkhorn(logits, j, k, eps, S, ITERATIONS)
        at = row[:, None, None] * (S * S) + j * S + k
        slope = tl.load(residual_gradient + at, mask=every, other=0.0).to(tl.float32)
        slope = _sinkhorn_backward(slope, softmax, matrix, totals, ITERATIONS)
        tl.store(to_raw + row[:, None, None] * R + of_residual, slope * gate * factor[:, None, None], mask=every)
        along += tl.sum(tl.sum(slope * gate * projected, 2), 1)
        tl.store(
            part + tl.reshape(of_residual, [S_BLOCK, S_BLOCK]), tl.sum(slope, 0), mask=valid[:, None] & valid[None, :]
        )
        tl.store(part + R + 2, tl.sum(slope * normed))
    # d factor / d v = -factor^3 v / (S D)
    tl.store(through_norm + row, -along * factor * factor * factor / (S * hidden), mask=known)


@jit
def _streams_backward_kernel(
    streams, output, post, residual, gradient, fn, fn_low, pre, to_raw, through_norm, x_gradient, to_streams,
    to_output, to_mixing, rows, hidden, R: tl.constexpr, R_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, S: tl.constexpr,
    SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of streams and layer's output, and of each slice of columns a part of those of C and K.

    ``fn`` None: of ``mhc_post`` alone; ``output`` None: of ``mhc_pre``. With dX' the gradient of the new streams
    dX_j = sum_k K_jk dX'_k, dF(y) = sum_k C_k dX'_k, dC_k = <dX'_k, F(y)>, dK_jk = <X_j, dX'_k>. Reading adds to dX'_k
    A_k dy, what comes through the norm, and through the projection.
    """
    DTYPE: tl.constexpr = streams.dtype.element_ty
    LANES: tl.constexpr = BLOCK // GROUP
    piece, first = tl.program_id(0), tl.program_id(1).to(tl.int64) * ROWS
    local, r = tl.arange(0, ROWS), tl.arange(0, R_BLOCK)
    row = first + local
    known = row < rows
    if output is not None:
        weights, mixed = _coefficients_of(post, residual, row, rows, S)
        sums = ()
        for _ in tl.static_range(S * (S + 1)):
            sums = sums + (tl.zeros([ROWS, LANES], tl.float32),)
    if fn is not None:
        collapse = ()
        for k in tl.static_range(S):
            collapse = collapse + (tl.load(pre + row * S + k, mask=known, other=0.0)[:, None],)
        along = tl.load(through_norm + row, mask=known, other=0.0)[:, None]
        if fn_low is not None:
            twice = tl.arange(0, 2 * ROWS)
            again = first + twice % ROWS
            of_raw, in_raw = again[:, None] * R + r[None, :], (again < rows)[:, None] & (r < R)[None, :]
            factor = _stacked(tl.load(to_raw + of_raw, mask=in_raw, other=0.0), twice, ROWS)
        else:
            in_raw = known[:, None] & (r < R)[None, :]
            factor = tl.load(to_raw + row[:, None] * R + r[None, :], mask=in_raw, other=0.0)
    one, wide = first * hidden, first * (S * hidden)
    width = tl.cdiv(tl.cdiv(hidden, SLICES), BLOCK) * BLOCK
    for start in tl.range(piece * width, tl.minimum(piece * width + width, hidden), BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = known[:, None] & (column < hidden)[None, :]
        at, at_stream = local[:, None] * hidden + column[None, :], local[:, None] * (S * hidden) + column[None, :]
        old = _streams_at(streams + wide, at_stream, inside, hidden, S)
        if output is not None:
            upper = tl.load(output + one + at, mask=inside, other=0.0).to(tl.float32)
            to_upper = tl.zeros([ROWS, BLOCK], tl.float32)
            to_old = ()
            for _ in tl.static_range(S):
                to_old = to_old + (tl.zeros([ROWS, BLOCK], tl.float32),)
            longer = ()
        if fn is not None:
            to_x = tl.load(x_gradient + one + at, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(S):
            slope = tl.zeros([ROWS, BLOCK], tl.float32)
            if fn is not None:
                of_fn = r[:, None] * (S * hidden) + k * hidden + column[None, :]
                in_fn = (r < R)[:, None] & (column < hidden)[None, :]
                matrix = tl.load(fn + of_fn, mask=in_fn, other=0.0)
                if fn_low is not None:
                    both = numerics.dot(factor, tl.load(fn_low + of_fn, mask=in_fn, other=0.0))
                    slope = _unstacked(numerics.dot(factor, matrix, both), ROWS)
                else:
                    slope = numerics.dot(factor, matrix.to(tl.float32))
            if output is not None:
                slope += tl.load(gradient + wide + k * hidden + at_stream, mask=inside, other=0.0).to(tl.float32)
            if fn is not None:
                value = old[k]
                if output is not None:
                    value = _new_stream(old, upper, weights, mixed, inside, k, S, DTYPE).to(tl.float32)
                slope += to_x * collapse[k] + value * along
            if output is not None:
                to_upper += slope * weights[k][:, None]
                longer = longer + (sums[(S + 1) * k] + _by_groups(slope * upper, GROUP),)
                further = ()
                for n in tl.static_range(S):
                    further = further + (to_old[n] + slope * mixed[n * S + k][:, None],)
                    longer = longer + (sums[(S + 1) * k + 1 + n] + _by_groups(slope * old[n], GROUP),)
                to_old = further
            else:
                tl.store(to_streams + wide + k * hidden + at_stream, numerics.cast(slope, DTYPE), mask=inside)
        if output is not None:
            sums = longer
            tl.store(to_output + one + at, numerics.cast(to_upper, to_output.dtype.element_ty), mask=inside)
            for n in tl.static_range(S):
                tl.store(to_streams + wide + n * hidden + at_stream, numerics.cast(to_old[n], DTYPE), mask=inside)
    if output is not None:
        part = to_mixing + (piece * rows + row) * (S * (S + 1))
        for k in tl.static_range(S):
            tl.store(part + k, tl.sum(sums[(S + 1) * k], 1), mask=known)
            for n in tl.static_range(S):
                tl.store(part + S + n * S + k, tl.sum(sums[(S + 1) * k + 1 + n], 1), mask=known)


@jit
def _by_groups(x, GROUP: tl.constexpr):
    """Sums of GROUP numbers of a row each: those that a thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP]), 2)


@jit
def _fn_backward_kernel(
    streams, to_raw, to_fn, rows, columns, span, R: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dF = sum over tokens of the projection's gradient times v, of each span of tokens a part."""
    SPLIT: tl.constexpr = streams.dtype.element_ty == tl.bfloat16
    HEIGHT: tl.constexpr = 2 * R_BLOCK if SPLIT else R_BLOCK
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1).to(tl.int64) * span
    local, twice = tl.arange(0, ROWS), tl.arange(0, HEIGHT)
    r = twice % R_BLOCK
    total = tl.zeros([HEIGHT, BLOCK], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + span, rows), ROWS, num_stages=4):
        known = start + local < rows
        at = r[:, None] + local[None, :] * R
        factor = tl.load(to_raw + start * R + at, mask=(r < R)[:, None] & known[None, :], other=0.0)
        at = local[:, None] * columns + column[None, :]
        value = tl.load(streams + start * columns + at, mask=known[:, None] & (column < columns)[None, :], other=0.0)
        if SPLIT:
            total = numerics.dot(_stacked(factor, twice, R_BLOCK), value, total)
        else:
            total = numerics.dot(factor, value.to(tl.float32), total)
    if SPLIT:
        total = _unstacked(total, R_BLOCK)
    r = tl.arange(0, R_BLOCK)
    at = tl.program_id(1).to(tl.int64) * (R * columns) + r[:, None] * columns + column[None, :]
    tl.store(to_fn + at, total, mask=(r < R)[:, None] & (column < columns)[None, :])


READ_TILE = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}
BACK_TILE = {"ROWS": 16, "BLOCK": 64, "GROUP": 4, "STAGES": 1, "num_warps": 8}


def _block(size: int, least: int = 1) -> int:
    return max(int(triton.next_power_of_2(size)), least)


def _factors(fn: Tensor, streams: Tensor) -> tuple[Tensor, Tensor | None]:
    """``fn`` as it is multiplied with these streams: in two halves if they are bfloat16."""
    if streams.dtype != torch.bfloat16:
        return fn, None
    high, low = (torch.empty_like(fn, dtype=torch.bfloat16) for _ in range(2))
    _split_kernel[(triton.cdiv(fn.numel(), 1024),)](fn, high, low, fn.numel(), BLOCK=1024)
    return high, low


def _read(
    streams: Tensor, written: tuple[Tensor, ...], site: tuple[Tensor, Tensor, Tensor], constants: Constants
) -> tuple[Tensor | None, ...]:
    """New streams if ``written``, (output, post, residual), is given; x, post and residual; projection and factor."""
    (batch, length, count, hidden), (fn, base, scale) = streams.shape, site
    rows, head = batch * length, len(scale) == 1
    output, post, residual = written or (None, None, None)
    new = torch.empty_like(streams) if written else None
    x = streams.new_empty(batch, length, hidden)
    next_post = None if head else streams.new_empty(batch, length, count, dtype=torch.float32)
    next_residual = None if head else streams.new_empty(batch, length, count, count, dtype=torch.float32)
    raw = streams.new_empty(rows, len(fn), dtype=torch.float32)
    factors = streams.new_empty(rows, dtype=torch.float32)
    tile = READ_TILE
    # Columns in 8 slices: enough programs for a multiprocessor each with 500 tokens, and few partial sums.
    slices = min(triton.cdiv(hidden, tile["BLOCK"]), 8)
    tiles, r_block = triton.cdiv(rows, tile["ROWS"]), _block(len(fn) + 1, 16)
    partials = streams.new_empty(slices, rows, r_block, dtype=torch.float32)
    arrived = streams.new_zeros(tiles, dtype=torch.int32)
    _read_kernel[(slices, tiles)](
        streams, output, post, residual, *_factors(fn, streams), base, scale, partials, arrived, new, x, next_post,
        next_residual, raw, factors, rows, hidden, constants.eps, constants.norm_eps, S=count, S_BLOCK=_block(count, 2),
        R_BLOCK=r_block,
        ITERATIONS=constants.iterations, SLICES=slices, **tile,
    )  # fmt: skip
    return new, x, next_post, next_residual, raw, factors


def _coefficients_backward(
    streams: Tensor, site: tuple[Tensor, ...], constants: Constants, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """pre, to_raw and through_norm of the tokens; gradients of base and scale. ``gradients`` of x, post, residual."""
    (batch, length, count, hidden), (fn, base, scale, raw, factors) = streams.shape, site
    rows = batch * length
    pre = streams.new_empty(rows, count, dtype=torch.float32)
    to_raw, through_norm = torch.empty_like(raw), torch.empty_like(factors)
    tile = {"ROWS": 4, "BLOCK": 256}
    programs = triton.cdiv(rows, tile["ROWS"])
    parts = streams.new_empty(programs, len(fn) + len(scale), dtype=torch.float32)
    _coefficients_backward_kernel[(programs,)](
        streams, base, scale, raw, factors, *gradients, pre, to_raw, through_norm, parts, rows, hidden, constants.eps,
        S=count, S_BLOCK=_block(count, 2), ITERATIONS=constants.iterations, **tile, num_warps=4,
    )  # fmt: skip
    to_base, to_scale = parts.sum(0).split((len(fn), len(scale)))
    return pre, to_raw, through_norm, to_base.to(base.dtype), to_scale.to(scale.dtype)


def _streams_backward(
    streams: Tensor, written: tuple[Tensor, ...], fn: Tensor | None, reading: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of streams, output, post and residual. ``written``: (output, post, residual, gradient of the new
    streams); ``reading``: (pre, to_raw, through_norm, gradient of x)."""
    batch, length, count, hidden = streams.shape
    rows, tile = batch * length, BACK_TILE
    slices = min(triton.cdiv(hidden, tile["BLOCK"]), 4)
    output, post, residual, gradient = written or (None,) * 4
    to_streams = torch.empty_like(streams)
    to_output = parts = to_post = to_residual = None
    if output is not None:
        to_output = torch.empty_like(output)
        parts = streams.new_empty(slices, rows, count * (count + 1), dtype=torch.float32)
    height, factors = (1, (None, None)) if fn is None else (len(fn), _factors(fn, streams))
    _streams_backward_kernel[(slices, triton.cdiv(rows, tile["ROWS"]))](
        streams, output, post, residual, gradient, *factors, *(reading or (None,) * 4), to_streams, to_output, parts,
        rows, hidden, R=height, R_BLOCK=_block(height, 16), M_BLOCK=_block(count * (count + 1)), S=count, SLICES=slices,
        **tile,
    )  # fmt: skip
    if parts is not None and post is not None and residual is not None:
        to_post, to_residual = parts.sum(0).split((count, count * count), 1)
        to_post, to_residual = to_post.reshape(post.shape), to_residual.reshape(residual.shape)
        to_post, to_residual = to_post.to(post.dtype), to_residual.to(residual.dtype)
    return to_streams, to_output, to_post, to_residual


def _fn_backward(streams: Tensor, to_raw: Tensor, fn: Tensor) -> Tensor:
    rows, columns = len(to_raw), fn.shape[1]
    tile = {"ROWS": 64, "BLOCK": 128}
    blocks = triton.cdiv(columns, tile["BLOCK"])
    span = max(triton.cdiv(rows, max(512 // blocks, 1)), tile["ROWS"])
    parts = streams.new_empty(max(triton.cdiv(rows, span), 1), *fn.shape, dtype=torch.float32)
    _fn_backward_kernel[(blocks, len(parts))](
        streams, to_raw, parts, rows, columns, span, R=len(fn), R_BLOCK=_block(len(fn), 16), **tile, num_warps=4
    )
    return parts.sum(0).to(fn.dtype)


class TritonRead(torch.autograd.Function):
    """x, and post and residual or None. Saves what ``_Read`` saves."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, constants: Constants
    ) -> tuple[Tensor | None, ...]:
        streams, fn = streams.contiguous(), fn.contiguous()
        _, *outputs, raw, factors = _read(streams, (), (fn, base, scale), constants)
        ctx.save_for_backward(streams, fn, base, scale, raw, factors)
        ctx.constants = constants
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        streams, fn, *site = ctx.saved_tensors
        upper = tuple(x if x is None else x.contiguous() for x in gradients)
        *reading, to_base, to_scale = _coefficients_backward(streams, (fn, *site), ctx.constants, upper)
        to_streams, *_ = _streams_backward(streams, (), fn, (*reading, upper[0]))
        return to_streams, _fn_backward(streams, reading[1], fn), to_base, to_scale, None


class TritonWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
        streams, output, post, residual = (x.contiguous() for x in (streams, output, post, residual))
        batch, length, count, hidden = streams.shape
        new, tile = torch.empty_like(streams), {"ROWS": 16, "BLOCK": 128 if count <= 4 else 64}
        grid = triton.cdiv(hidden, tile["BLOCK"]), triton.cdiv(batch * length, tile["ROWS"])
        _write_kernel[grid](streams, output, post, residual, new, batch * length, hidden, S=count, **tile, num_warps=4)
        ctx.save_for_backward(streams, output, post, residual)
        return new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        streams, *written = ctx.saved_tensors
        return _streams_backward(streams, (*written, gradient.contiguous()), None, ())


class TritonWriteRead(torch.autograd.Function):
    """Saves what ``TritonWrite`` and ``TritonRead`` save: the new streams, which whoever reads them next saves too."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        output: Tensor,
        post: Tensor,
        residual: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        constants: Constants,
    ) -> tuple[Tensor | None, ...]:
        streams, output, post, residual, fn = (x.contiguous() for x in (streams, output, post, residual, fn))
        *outputs, raw, factors = _read(streams, (output, post, residual), (fn, base, scale), constants)
        ctx.save_for_backward(streams, output, post, residual, outputs[0], fn, base, scale, raw, factors)
        ctx.constants = constants
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        streams, output, post, residual, new, fn, *site = ctx.saved_tensors
        upper = tuple(x.contiguous() for x in gradients)
        *reading, to_base, to_scale = _coefficients_backward(new, (fn, *site), ctx.constants, upper)
        written = output, post, residual, gradient.contiguous()
        to_written = _streams_backward(streams, written, fn, (*reading, upper[0]))
        return *to_written, _fn_backward(new, reading[1], fn), to_base, to_scale, None
