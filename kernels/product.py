"""The inner loop of matrix products in Triton kernels, for operands that lie in memory by rows or by columns."""

from __future__ import annotations

from . import numerics
from .dispatch import jit, tl


@jit
def product(
    a, b, a_low, b_low, row, column, rows, columns, first, last, a_stride, a_inner, b_inner, b_stride,
    TERMS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of A times columns of B in float32, over inner indices from ``first`` to ``last``, BK at a time.

    A ``[rows, K]`` has strides ``a_stride, a_inner``, B ``[K, columns]`` has ``b_inner, b_stride``; what lies outside
    counts as zero. With TERMS 3 the factors are A + A_low and B + B_low, less the product of both low parts; with 1
    these are not read.
    """
    inner = first + tl.arange(0, BK)
    a_at = row[:, None] * a_stride + inner[None, :] * a_inner
    b_at = inner[:, None] * b_inner + column[None, :] * b_stride
    a_row, b_column = row[:, None] < rows, column[None, :] < columns
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(first, last, BK):
        inner = start + tl.arange(0, BK)
        a_inside, b_inside = a_row & (inner[None, :] < last), b_column & (inner[:, None] < last)
        x, y = tl.load(a + a_at, mask=a_inside, other=0.0), tl.load(b + b_at, mask=b_inside, other=0.0)
        if TERMS == 3:
            total = numerics.dot(tl.load(a_low + a_at, mask=a_inside, other=0.0), y, total)
            total = numerics.dot(x, tl.load(b_low + b_at, mask=b_inside, other=0.0), total)
        total = numerics.dot(x, y, total)
        a_at += BK * a_inner
        b_at += BK * b_inner
    return total


@jit
def halves(x):
    """The left and the right half of the columns: what follows a product needs fewer registers half by half."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
