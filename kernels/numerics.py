"""What Triton kernels compute with: products, roundings, and the codes of FP8 and FP4, exact on a GPU and interpreted.

Triton's interpreter multiplies bfloat16 wrongly, truncates where it should round to bfloat16, and rounds wrongly to
FP8. So kernels multiply by ``dot`` and round by ``cast``, and make and read FP8 and FP4 numbers as integers.
Source of the formats: recipe 8.1.
"""

from __future__ import annotations

from importlib import import_module

from .dispatch import INTERPRETED, jit, tl

_INTERPRETED = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)
libdevice = None if tl is None else import_module("triton.language.extra.libdevice")


@jit
def dot(a, b, accumulator=None, TF32: tl.constexpr = 0):
    """``a [m, k]`` times ``b [k, n]`` in float32, added to ``accumulator [m, n]``; sides are at least 16, powers of 2.

    TF32 says in how many products of that format float32 numbers are multiplied: 1 or 3; 0: as float32, exactly.
    """
    if _INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        if accumulator is not None:
            product += accumulator
        return product
    else:
        return tl.dot(a, b, accumulator, input_precision="tf32" if TF32 == 1 else ("tf32x3" if TF32 == 3 else "ieee"))


@jit
def cast(x, DTYPE: tl.constexpr):
    """``x`` in another float dtype of at least 16 bits, rounded to nearest, ties to even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        wide = even.to(tl.float32, bitcast=True)
        return tl.where(x == x, wide, x.to(tl.float32)).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@jit
def exp(x):
    """Of float32, on a GPU by CUDA's library, as torch does: Triton's own approximates."""
    if _INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@jit
def log1p(x):
    """log(1 + x) of float32 from 0 to 1, whose relative error does not grow where x is small."""
    if _INTERPRETED:
        near = 1 + x
        exact = near == 1
        return tl.where(exact, x, tl.log(near) * (x / tl.where(exact, 1.0, near - 1)))
    else:
        return libdevice.log1p(x)


@jit
def order_of(x):
    """int32 that are ordered as float32 ``x`` is; NaN lies beyond the infinity of its sign, -0 just below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def power_of_two(exponent):
    """2^exponent float32 of an int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@jit
def scale_exponent(largest, MAX: tl.constexpr):
    """ceil(log2(largest / MAX)) int32 of a positive normal float32; MAX 448 (E4M3) or 6 (E2M1)."""
    bits = largest.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - 127
    mantissa = bits & 0x7FFFFF
    if MAX == 448:  # 1.75 * 2^8
        return exponent - 8 + (mantissa > 0x600000).to(tl.int32)
    else:  # 1.5 * 2^2
        return exponent - 2 + (mantissa > 0x400000).to(tl.int32)


@jit
def e4m3_code(x):
    """The E4M3 code, uint8, nearest to float32 ``x``: ties to even, beyond 448 saturated."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    wide = size.to(tl.uint32, bitcast=True)
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # at 2^14 float32 steps by 2^-9
    code = tl.where(size < 0.015625, subnormal, normal)
    return (code | sign).to(tl.uint8)


@jit
def e4m3_value(code):
    """float32 of an E4M3 code, uint8, that is no NaN."""
    wide = code.to(tl.uint32)
    size = wide & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = size.to(tl.float32) * 0.001953125  # 2^-9
    value = tl.where(size < 8, subnormal, normal)
    return (value.to(tl.uint32, bitcast=True) | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)


@jit
def e2m1_code(x):
    """The E2M1 code, uint8 below 16, nearest to float32 ``x``: ties to even, beyond 6 saturated."""
    sign = (x.to(tl.uint32, bitcast=True) >> 28) & 8
    size = tl.minimum(tl.abs(x), 6.0)
    wide = size.to(tl.uint32, bitcast=True)
    normal = ((wide + 0x1FFFFF + ((wide >> 22) & 1)) >> 22) - (126 << 1)
    subnormal = (size + 4194304.0).to(tl.uint32, bitcast=True) - 0x4A800000  # at 2^22 float32 steps by 1/2
    code = tl.where(size < 1.0, subnormal, normal)
    return (code | sign).to(tl.uint8)


@jit
def e2m1_value(code):
    """float32 of an E2M1 code, uint8 below 16."""
    wide = code.to(tl.uint32)
    size = wide & 7
    normal = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return (value.to(tl.uint32, bitcast=True) | ((wide & 8) << 28)).to(tl.float32, bitcast=True)
