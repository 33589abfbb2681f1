"""Hybrid Newton-Schulz, which makes matrices semi-orthogonal: the heart of Muon.

Shapes: b matrices in a stack, n x m one matrix; inside a stack n <= m (tall matrices are transposed on the way in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton
from .product import halves, product

Coefficients = tuple[tuple[float, float, float], ...]

NEWTON_SCHULZ_COEFFICIENTS: Coefficients = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2

# The Gram form starts afresh from X after this many of the ten iterations. Rounding leaves in each eigenvalue of X X^T
# an error of about 1e-7, which grows by 3.4445^2 = 11.9 per iteration where the eigenvalue is small (or zero, when it
# may turn negative). At its last use it is 2e-3 in the first five iterations and 7e-4 in the other five, which end with
# growth by 2^2; without the restart it would be 160, and NaN soon. At condition 1e4 this costs a factor of 2 to 10 in
# accuracy; restarts at 3 and 6 would win that back for up to 30 % more time.
RESTART = 5


def newton_schulz(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T of each matrix U S V^T, by ten Newton-Schulz iterations.

    Algorithm 1 of the DeepSeek-V4 paper: X <- a X + b (X X^T) X + c (X X^T)^2 X on the Frobenius-normalised input,
    eight steps that lift small singular values quickly, then two whose derivative at 1 is zero and that settle there.
    Singular values of at least 1e-4 of the Frobenius norm end in [1.000, 1.0021] but for rounding; those below 2e-5
    stay short of 1.

    Computed in the Gram form (`_gram_factor`) where that is cheaper: what multiplies X is a polynomial of the n x n
    matrix X X^T, so X takes part in 4 products, not 20: 34 n^3 + 4 n^2 m multiply-adds against 10 n^3 + 20 n^2 m.
    On a GPU Triton multiplies float16 numbers (`_split_gram_form`): the Frobenius error is about 0.5 % of the result's
    norm at any condition, where BF16, which the paper calls sufficient, errs by half of it at condition 1e4; below 128
    rows it is that of float32.

    Args:
        matrices: `[..., n, m]`, any floating dtype; works in float32, or float64 if given.

    Returns:
        `[..., n, m]` in the working dtype; zero where the input matrix is all zero.
    """
    chosen = implementation(matrices)
    if chosen == "triton":
        return _split_gram_form(matrices)
    n, m = sorted(matrices.shape[-2:])
    if chosen == "reference" or 2 * m < 3 * n or not _products_are_exact(matrices):
        return newton_schulz_reference(matrices)
    x, tall = _wide_stack(matrices)
    gram = torch.bmm(x, x.mT)
    square_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(torch.finfo(x.dtype).tiny)
    factor = _gram_factor(gram.div_(square_norm), NEWTON_SCHULZ_COEFFICIENTS[:RESTART])
    x = torch.bmm(factor.div_(square_norm.sqrt()), x)
    factor = _gram_factor(torch.bmm(x, x.mT), NEWTON_SCHULZ_COEFFICIENTS[RESTART:])
    x = torch.bmm(factor, x)
    return (x.mT if tall else x).reshape(matrices.shape)


def newton_schulz_reference(matrices: Tensor) -> Tensor:
    """`newton_schulz` as the paper writes it: same arguments, same result but for rounding."""
    x, tall = _wide_stack(matrices)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _wide_stack(matrices: Tensor) -> tuple[Tensor, bool]:
    """`[..., n, m]` to `[b, n, m]` with n <= m in the working dtype, scaled to a largest element of 1; was it tall?"""
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32)).reshape(-1, *matrices.shape[-2:])
    x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
    # Squares of elements below 1e-19 would vanish from a float32 norm; amax of abs is 10x faster than an inf-norm.
    return x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny), tall


def _gram_factor(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """Q `[b, n, n]`, such that Q X is X `[b, n, m]` after the given iterations, from gram = X X^T `[b, n, n]`.

    With P = a I + b G + c G^2 an iteration is X <- P X, hence Q <- Q P and G <- P G P = (G P) P: P and G commute.
    Only as plain products, though: with (G P) P^T, equal in exact arithmetic, the antisymmetric part of the rounding
    error grows in every iteration (40 times the error at condition 1e2, NaN at 1e4 with a later restart).
    """
    factor: Tensor | None = None
    for index, (a, b, c) in enumerate(coefficients):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else torch.bmm(factor, polynomial)
        if index + 1 < len(coefficients):
            gram = torch.bmm(torch.bmm(gram, polynomial), polynomial)
    assert factor is not None
    return factor


def _products_are_exact(matrices: Tensor) -> bool:
    """Whether torch multiplies float32 as such here; TF32 or BF16 products would drive the Gram form to NaN."""
    backend = torch.backends.cuda if matrices.is_cuda else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee") and not torch.is_autocast_enabled(matrices.device.type)


# The split form, of the Triton kernels. A matrix is a pair of float16, high + low, together 22 bits, times a power of
# two that keeps it in range; products take the high numbers alone and add in float32: the rate of BF16 with eight times
# its precision. What makes that enough: no multiple of the identity enters a product. With P = a I + H,
# H = b G + c G^2, an iteration is X <- a X + H X with a X added exactly. Where singular values are small, H is almost
# zero and damps all rounding errors, so that what an error does to a direction is relative to the direction's own size,
# at any condition. The same in the Gram form: Q = q I + K, G <- (a I + H) G (a I + H). There errors grow again, by up
# to 11.9 per iteration: hence four segments, each from a fresh G = X X^T. Of all divisions of the ten iterations into
# four this one errs least (0.8 % at worst for 96 x 192; the next best 2 %, the best of three segments 3 %), and less
# than five segments of two. docs/results/newton_schulz.md has the errors.
SEGMENTS = (3, 2, 2, 3)
X_SCALE, SCALE = 2.0**14, 2.0**10  # of X, up to 1.21, and of n x n matrices, up to 3.4445^3 = 41; float16 ends at 65504
# Rounding errors are independent, and average out along a row. Of narrow matrices all 22 bits are multiplied, by three
# products, which costs no time: they wait for memory anyhow.
NARROW = 128
PROCESSORS = 132  # of an H100; products of fewer tiles are divided along m


class _Pair(NamedTuple):
    """Matrices `[b, rows, columns]` times a power of two, as the sum of two float16."""

    high: Tensor
    low: Tensor

    @classmethod
    def like(cls, x: Tensor) -> _Pair:
        """Fresh memory; each matrix is stored by rows, or by columns if those of ``x`` are."""
        b, rows, columns = x.shape
        if x.stride(-2) == 1 and x.stride(-1) != 1:
            return cls(*(x.new_empty(b, columns, rows, dtype=torch.float16).mT for _ in range(2)))
        return cls(*(x.new_empty(b, rows, columns, dtype=torch.float16) for _ in range(2)))


@jit
def _store_pair(high, low, at, value, inside):
    first = numerics.cast(value, tl.float16)
    tl.store(high + at, first, mask=inside)
    tl.store(low + at, numerics.cast(value - first.to(tl.float32), tl.float16), mask=inside)


@jit
def _load_pair(high, low, at, inside):
    first = tl.load(high + at, mask=inside, other=0.0).to(tl.float32)
    return first + tl.load(low + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _ns_normalize_kernel(x, norms, high, low, stride, elements, blocks, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a matrix, over its norm, as a pair."""
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(x + matrix * stride + at, mask=inside, other=0.0).to(tl.float32)
    value = value / tl.load(norms + matrix) * SCALE
    _store_pair(high + matrix * elements, low + matrix * elements, at, value, inside)


@jit
def _lower_tile(tile, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of the ``tile``-th of the tiles [BM, BN] that reach the diagonal or lie below it."""
    pair, ratio = tile // (BN // BM), BN // BM
    wide = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    wide = tl.where(wide * (wide + 1) // 2 > pair, wide - 1, wide)
    wide = tl.where((wide + 1) * (wide + 2) // 2 <= pair, wide + 1, wide)
    return (wide * ratio + tile % ratio) * BM, (pair - wide * (wide + 1) // 2) * BN


@jit
def _store_mirrored(high, low, row, column, n, first, second, inside, TERMS: tl.constexpr):
    """Also at the mirrored place; there low numbers only if products need them."""
    at, mirror = row[:, None] * n + column[None, :], column[:, None] * n + row[None, :]
    tl.store(high + at, first, mask=inside)
    tl.store(low + at, second, mask=inside)
    tl.store(high + mirror, tl.trans(first), mask=tl.trans(inside))
    if TERMS == 3:
        tl.store(low + mirror, tl.trans(second), mask=tl.trans(inside))


@jit
def _finish_symmetric(
    total, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma,
    ADDENDS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Adds, and stores what lies on or below the diagonal, and its mirror image."""
    row, column = top + tl.arange(0, total.shape[0]), left + tl.arange(0, total.shape[1])
    if left < top + total.shape[0]:
        at, inside = row[:, None] * n + column[None, :], (row[:, None] < n) & (column[None, :] < n)
        value = alpha * total
        if ADDENDS > 0:
            value += beta * _load_pair(c_high, c_low, at, inside)
        if ADDENDS > 1:
            value += gamma * _load_pair(d_high, d_low, at, inside)
        first = numerics.cast(value, tl.float16)
        second = numerics.cast(value - first.to(tl.float32), tl.float16)
        # A mask that is one along a row lets eight numbers be stored at once.
        if left + total.shape[1] <= top:
            _store_mirrored(high, low, row, column, n, first, second, inside, TERMS)
        else:
            inside = inside & (column[None, :] <= row[:, None])
            _store_mirrored(high, low, row, column, n, first, second, inside, TERMS)


@jit
def _finish_halves(
    total, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma,
    ADDENDS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    first, second = halves(total)
    _finish_symmetric(first, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma, ADDENDS, TERMS)
    left += total.shape[1] // 2
    _finish_symmetric(second, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma, ADDENDS, TERMS)


@jit
def _ns_symmetric_kernel(
    a_high, a_low, b_high, b_low, c_high, c_low, d_high, d_low, high, low, partial,
    n, k, row_stride, inner_stride, alpha, beta, gamma, tiles, chunk,
    ADDENDS: tl.constexpr, TERMS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the symmetric alpha A B^T + beta C + gamma D; A, B ``[n, k]``, C, D and the result ``[n, n]``.

    SPLIT: only A B^T over ``chunk`` inner indices, to ``partial`` ``[splits, b, n, n]`` float32, lower tiles.
    """
    tile, part = tl.program_id(0) % tiles, tl.program_id(1)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    top, left = _lower_tile(tile, BM, BN)
    if top >= n:
        return
    row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
    inputs = matrix * n * k
    total = product(
        a_high + inputs, b_high + inputs, a_low + inputs, b_low + inputs, row, column, n, n,
        part * chunk, tl.minimum(k, (part + 1) * chunk), row_stride, inner_stride, inner_stride, row_stride, TERMS, BK,
    )  # fmt: skip
    if SPLIT:
        partial += (part.to(tl.int64) * (tl.num_programs(0) // tiles) + matrix) * n * n
        inside = (row[:, None] < n) & (column[None, :] < n)
        tl.store(partial + row[:, None] * n + column[None, :], total, mask=inside)
    else:
        base = matrix * n * n
        c_high, c_low, d_high, d_low = c_high + base, c_low + base, d_high + base, d_low + base
        high, low = high + base, low + base
        first, second = halves(total)
        _finish_halves(first, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma, ADDENDS, TERMS)
        left += BN // 2
        _finish_halves(
            second, top, left, c_high, c_low, d_high, d_low, high, low, n, alpha, beta, gamma, ADDENDS, TERMS
        )


@jit
def _ns_sum_kernel(
    partial, high, low, n, alpha, tiles, matrices, SPLITS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    """alpha times the sum of what ``_ns_symmetric_kernel`` left in ``partial``, in its order."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    top, left = _lower_tile(tl.program_id(0) % tiles, BLOCK, BLOCK)
    row, column = top + tl.arange(0, BLOCK), left + tl.arange(0, BLOCK)
    at = row[:, None] * n + column[None, :]
    inside = (row[:, None] < n) & (column[None, :] < n)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in range(SPLITS):
        total += tl.load(partial + (part * matrices + matrix) * n * n + at, mask=inside, other=0.0)
    base = matrix * n * n
    _finish_symmetric(
        total, top, left, high, low, high, low, high + base, low + base, n, alpha, 0.0, 0.0, 0, TERMS
    )  # fmt: skip


@jit
def _finish_applied(total, row, left, x_high, x_low, high, low, result, n, m, row_stride, column_stride, alpha, beta,
                    LAST: tl.constexpr):  # fmt: skip
    column = left + tl.arange(0, total.shape[1])
    at = row[:, None] * row_stride + column[None, :] * column_stride
    inside = (row[:, None] < n) & (column[None, :] < m)
    value = alpha * total + beta * _load_pair(x_high, x_low, at, inside)
    if LAST:
        tl.store(result + at, value, mask=inside)
    else:
        _store_pair(high, low, at, value, inside)


@jit
def _ns_apply_kernel(
    k_high, k_low, x_high, x_low, high, low, result, n, m, row_stride, column_stride, alpha, beta, tiles, rows,
    LAST: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of alpha K X + beta X, as a pair, or LAST as float32; K ``[n, n]``, X and the result ``[n, m]``."""
    tile = tl.program_id(0) % tiles
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    # Row by row: programs that run at once share columns of X, and all of K.
    left = tile // rows * BN
    row, column = tile % rows * BM + tl.arange(0, BM), left + tl.arange(0, BN)
    factor, base = matrix * n * n, matrix * n * m
    x_high, x_low, high, low, result = x_high + base, x_low + base, high + base, low + base, result + base
    total = product(
        k_high + factor, x_high, k_low + factor, x_low, row, column, n, m,
        0, n, n, 1, row_stride, column_stride, TERMS, BK,
    )  # fmt: skip
    first, second = halves(total)
    _finish_applied(
        first, row, left, x_high, x_low, high, low, result, n, m, row_stride, column_stride, alpha, beta, LAST
    )
    left += BN // 2
    _finish_applied(
        second, row, left, x_high, x_low, high, low, result, n, m, row_stride, column_stride, alpha, beta, LAST
    )


class _Blocks(NamedTuple):
    """The tile [BM, BN] of a program, BK inner indices of each of its steps, and who computes it."""

    BM: int
    BN: int
    BK: int
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def narrow(cls, rows: int, columns: int, inner: int) -> _Blocks:
        low, wide, deep = (min(64, max(16, triton.next_power_of_2(size))) for size in (rows, columns, inner))
        return cls(low, wide, deep, num_warps=4)


LARGE, MEDIUM, SMALL = _Blocks(128, 256, 64), _Blocks(128, 128, 64), _Blocks(64, 64, 64, num_warps=4)


def _split_gram_form(matrices: Tensor) -> Tensor:
    """`newton_schulz` on a GPU: arguments and result as there, any dtype but float64."""
    if not matrices.numel():
        return torch.zeros_like(matrices, dtype=torch.float32)
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    stack = stack.mT if (tall := stack.shape[-2] > stack.shape[-1]) else stack
    terms = 3 if stack.shape[-2] < NARROW else 1
    x, done = _normalized(stack), 0
    result = torch.empty_like(x.high, dtype=torch.float32)
    for count in SEGMENTS:
        gram = _symmetric(x, x, SCALE / X_SCALE**2, terms)
        factor, identity = _split_factor(gram, NEWTON_SCHULZ_COEFFICIENTS[done : done + count], terms)
        done += count
        x = _applied(factor, x, identity, terms, result if done == len(NEWTON_SCHULZ_COEFFICIENTS) else None)
    return (result.mT if tall else result).reshape(matrices.shape)


def _split_factor(gram: _Pair, coefficients: Coefficients, terms: int) -> tuple[_Pair, float]:
    """As `_gram_factor`: K and q, such that K X + q X is X after the given iterations."""
    factor, identity = gram, 1.0
    for index, (a, b, c) in enumerate(coefficients):
        part = _symmetric(gram, gram, c / SCALE, terms, (b, gram))
        if index == 0:
            factor, identity = part, a
        else:
            factor = _symmetric(part, factor, 1 / SCALE, terms, (a, factor), (identity, part))
            identity *= a
        if index + 1 < len(coefficients):
            half = _symmetric(part, gram, 1 / SCALE, terms, (a, gram))
            gram = _symmetric(half, part, 1 / SCALE, terms, (a, half))
    return factor, identity


def _normalized(x: Tensor) -> _Pair:
    """``x [b, n, m]`` over the norms of its matrices, times X_SCALE."""
    b, n, m = x.shape
    if x.stride()[1:] not in ((m, 1), (1, n)):
        x = x.contiguous()
    # In float64: squares of numbers below 1e-19 would vanish.
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64).float()
    pair, blocks = _Pair.like(x), triton.cdiv(n * m, 4096)
    _ns_normalize_kernel[(b * blocks,)](
        x, norms.clamp_min(torch.finfo(norms.dtype).tiny), *pair, x.stride(0), n * m, blocks, SCALE=X_SCALE, BLOCK=4096
    )
    return pair


def _symmetric(a: _Pair, b: _Pair, scale: float, terms: int, *addends: tuple[float, _Pair]) -> _Pair:
    """scale A B^T and multiples of further matrices, of which only what is not above the diagonal counts."""
    matrices, n, k = a.high.shape
    most = 1 if addends else 16  # parts into which the inner indices may be cut
    if n < NARROW:
        block = _Blocks.narrow(n, n, k)
    else:  # the largest tile of which there are enough; of LARGE ones too much lies above a short diagonal
        sizes = (LARGE, MEDIUM) if n >= 1024 else (MEDIUM,)
        enough = (block for block in sizes if 2 * most * matrices * _lower_tiles(n, block.BM, block.BN) >= PROCESSORS)
        block = next(enough, SMALL)
    tiles = _lower_tiles(n, block.BM, block.BN)
    splits = _splits(matrices * tiles, k, most)
    chunk = triton.cdiv(triton.cdiv(k, splits), block.BK) * block.BK
    splits = triton.cdiv(k, chunk)
    out = _Pair(*(a.high.new_empty(matrices, n, n) for _ in range(2)))
    partial = a.high.new_empty(splits, matrices, n, n, dtype=torch.float32) if splits > 1 else a.high
    (beta, c), (gamma, d) = (*addends, (0.0, out), (0.0, out))[:2]
    _ns_symmetric_kernel[(matrices * tiles, splits)](
        *a, *b, *c, *d, *out, partial, n, k, *a.high.stride()[1:], scale, beta, gamma, tiles, chunk,
        ADDENDS=len(addends), TERMS=terms, SPLIT=splits > 1, **block._asdict(),
    )  # fmt: skip
    if splits > 1:
        size = min(block.BM, 64)
        tiles = _lower_tiles(n, size, size)
        _ns_sum_kernel[(matrices * tiles,)](
            partial, *out, n, scale, tiles, matrices, SPLITS=splits, TERMS=terms, BLOCK=size
        )
    return out


def _lower_tiles(n: int, bm: int, bn: int) -> int:
    wide = -(-n // bn)
    return (bn // bm) * wide * (wide + 1) // 2


def _splits(programs: int, k: int, most: int) -> int:
    """Into how many parts ``k`` inner indices are cut: to keep all multiprocessors busy, at the cost of 512 indices of
    each part, about the time to write its sums and read them again."""
    rounds = {splits: triton.cdiv(programs * splits, PROCESSORS) for splits in range(1, most + 1)}
    return min(rounds, key=lambda splits: rounds[splits] * (k / splits + 512 * (splits > 1)))


def _applied(factor: _Pair, x: _Pair, identity: float, terms: int, result: Tensor | None) -> _Pair:
    """K X + identity X; into ``result``, float32, if there is one."""
    matrices, n, m = x.high.shape
    block = _Blocks.narrow(n, m, n) if n < NARROW else LARGE if m >= 1024 else MEDIUM
    rows, last = triton.cdiv(n, block.BM), result is not None
    tiles = rows * triton.cdiv(m, block.BN)
    out, scale = (x, 1 / X_SCALE) if last else (_Pair.like(x.high), 1.0)
    _ns_apply_kernel[(matrices * tiles,)](
        *factor, *x, *out, result if last else x.high, n, m, *x.high.stride()[1:],
        scale / SCALE, scale * identity, tiles, rows, LAST=last, TERMS=terms, **block._asdict(),
    )  # fmt: skip
    return out
